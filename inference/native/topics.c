/* Passes over the words of documents: what `topics/words.py` asks for. Tables have one row of topics a word, a document or a
   place; rows are padded with zeros to whole vectors, so that a padded topic has no prior, no counts and no chance. */
#include "support.h"

enum { LANES = 8 };
typedef float lanes __attribute__((vector_size(32)));
typedef int32_t masks __attribute__((vector_size(32)));

INLINE lanes positive(lanes x) { return (lanes)((masks)x & (x > 0)); }

INLINE float total(lanes x) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < LANES; i++) sum += x[i];
  return sum;
}

/* x ** count for whole and other counts, where 0 <= x <= 1. */
INLINE lanes power(lanes x, float count) {
  lanes found = x - x + 1.0f;
  if (count == (float)(int64_t)count) {
    for (int64_t n = (int64_t)count; n; n >>= 1, x *= x)
      if (n & 1) found *= x;
  } else {
    for (int i = 0; i < LANES; i++) found[i] = powf(x[i], count);
  }
  return found;
}

/* Every place chooses anew given all other words, documents in the order given, and goes `relax` times the way beyond what it
   would choose; the log-likelihood of every word given all others, summed. `eta` has one number a word, or `wide` a row of topics. `zero`, where it is not null, becomes the
   probability (documents, K) that a topic has no word of a document. `work` holds 3 rows. */
double expected_pass(int64_t documents, const int64_t *order, int64_t blocks, const int64_t *starts, const int32_t *words,
                     const float *counts, lanes *r, lanes *N, lanes *Nk, lanes *n, const lanes *alpha, const float *eta,
                     int64_t wide, const lanes *eta_sum, float relax, lanes *zero, lanes *work) {
  lanes *inverse = work, *p = work + blocks, *mine = work + 2 * blocks;
  double found = 0.0, product = 1.0; /* a logarithm now and then, of many words together */
  float alphas = 0.0f;
  for (int64_t b = 0; b < blocks; b++) alphas += total(alpha[b]);
  for (int64_t i = 0; i < documents; i++) {
    const int64_t d = order[i];
    lanes *nd = n + d * blocks, *none = zero ? zero + d * blocks : 0;
    float length = alphas - 1.0f;
    for (int64_t j = starts[d]; j < starts[d + 1]; j++) length += counts[j];
    if (length < 1e-7f) length = 1e-7f;
    for (int64_t b = 0; b < blocks; b++) {
      mine[b] = nd[b];
      inverse[b] = 1.0f / (Nk[b] + eta_sum[b]);
      if (none) none[b] = mine[b] - mine[b] + 1.0f;
    }
    for (int64_t j = starts[d]; j < starts[d + 1]; j++) {
      const float c = counts[j], each = 1.0f / (c > 1.0f ? c : 1.0f);
      lanes *rj = r + j * blocks, *Nv = N + words[j] * blocks, sum = {0};
      if (j + 2 < starts[documents])
        for (int64_t b = 0; b < blocks; b++) __builtin_prefetch(N + words[j + 2] * blocks + b);
      for (int64_t b = 0; b < blocks; b++) {
        const lanes own = rj[b] * each;
        const lanes prior = wide ? ((const lanes *)eta)[words[j] * blocks + b] : own - own + eta[words[j]];
        p[b] = (positive(Nv[b] - own) + prior) * (positive(mine[b] - own) + alpha[b]) * inverse[b];
        sum += p[b];
      }
      const float norm = total(sum), scale = c / norm;
      if (c == 1.0f) {
        product *= norm / length;
        if (product < 1e-250) found += log(product), product = 1.0;
      } else {
        found += c * logf(norm / length);
      }
      sum -= sum;
      for (int64_t b = 0; b < blocks; b++) {
        if (none) none[b] *= power(positive(1.0f - p[b] / norm), c);
        p[b] = positive((1.0f + relax) * scale * p[b] - relax * rj[b]);
        sum += p[b];
      }
      const float whole = c / total(sum);
      for (int64_t b = 0; b < blocks; b++) {
        const lanes fresh = p[b] * whole, change = fresh - rj[b];
        Nv[b] += change;
        mine[b] += change;
        Nk[b] += change;
        rj[b] = fresh;
      }
    }
    for (int64_t b = 0; b < blocks; b++) nd[b] = mine[b];
  }
  return found + log(product);
}

INLINE uint64_t rotated(uint64_t x, int k) { return (x << k) | (x >> (64 - k)); }

/* xoshiro256+ (Blackman and Vigna 2018): a number in [0, 1). */
INLINE float uniform(uint64_t *s) {
  const uint64_t found = s[0] + s[3], t = s[1] << 17;
  s[2] ^= s[0], s[3] ^= s[1], s[1] ^= s[2], s[0] ^= s[3], s[2] ^= t, s[3] = rotated(s[3], 45);
  return (float)(found >> 40) * 0x1p-24f;
}

/* Place after place draws one topic for all its words given the places before it: r, N, Nk and n, zero at first, are filled. */
void first_pass(int64_t documents, const int64_t *order, int64_t blocks, const int64_t *starts, const int32_t *words,
                const float *counts, lanes *r, lanes *N, float *Nk, lanes *n, const lanes *alpha, const float *eta, int64_t wide,
                const float *eta_sum, uint64_t *state, lanes *work) {
  lanes *p = work, *sums = work + blocks;
  float *inverse = (float *)(work + 2 * blocks);
  const int64_t K = blocks * LANES;
  for (int64_t k = 0; k < K; k++) inverse[k] = 1.0f / (Nk[k] + eta_sum[k]);
  for (int64_t i = 0; i < documents; i++) {
    const int64_t d = order[i];
    lanes *nd = n + d * blocks;
    for (int64_t j = starts[d]; j < starts[d + 1]; j++) {
      lanes *Nv = N + words[j] * blocks, sum = {0};
      for (int64_t b = 0; b < blocks; b++) {
        const lanes prior = wide ? ((const lanes *)eta)[words[j] * blocks + b] : sum - sum + eta[words[j]];
        p[b] = (Nv[b] + prior) * (nd[b] + alpha[b]) * ((lanes *)inverse)[b];
        sum += p[b];
        sums[b] = sum;
      }
      /* first the lane, then the block: the running sums of a lane over the blocks are there already */
      float left = uniform(state) * total(sum);
      int lane = 0;
      while (lane < LANES - 1 && left >= sum[lane]) left -= sum[lane++];
      int64_t b = 0;
      while (b < blocks - 1 && left >= sums[b][lane]) b++;
      int64_t k = b * LANES + lane;
      if (!(p[b][lane] > 0.0f)) /* rounding has led to a topic without a chance */
        for (k = 0; k < K - 1 && !(((float *)p)[k] > 0.0f); k++) {}
      ((float *)Nv)[k] += counts[j], ((float *)nd)[k] += counts[j], Nk[k] += counts[j];
      ((float *)(r + j * blocks))[k] = counts[j];
      inverse[k] = 1.0f / (Nk[k] + eta_sum[k]);
    }
  }
}

/* Shares of documents given a table of topics: `rounds` of EM on their expected counts n, then the counts of words in topics are
   added to S and become r (where these are not null), n becomes their sums over the words, and the log-likelihood of all words
   at the shares before that is returned. Document d is told by the table of number tables[d]. `zero` as above; `work` holds 2
   rows. */
double settle_pass(int64_t documents, const int64_t *tables, int64_t vocabulary, int64_t rounds, int64_t blocks,
                   const int64_t *starts, const int32_t *words, const float *counts, const lanes *W, lanes *S, lanes *r,
                   lanes *n, const lanes *alpha, lanes *zero, lanes *work) {
  lanes *theta = work, *gain = work + blocks;
  double found = 0.0;
  for (int64_t d = 0; d < documents; d++) {
    const lanes *table = W + tables[d] * vocabulary * blocks;
    lanes *sums = S ? S + tables[d] * vocabulary * blocks : 0, *nd = n + d * blocks, *none = zero ? zero + d * blocks : 0;
    for (int64_t i = 0; i <= rounds; i++) {
      lanes all = {0};
      for (int64_t b = 0; b < blocks; b++) theta[b] = nd[b] + alpha[b], gain[b] = theta[b] - theta[b], all += theta[b];
      const float whole = total(all);
      const int last = i == rounds;
      if (last && none)
        for (int64_t b = 0; b < blocks; b++) none[b] = gain[b] + 1.0f;
      for (int64_t j = starts[d]; j < starts[d + 1]; j++) {
        const lanes *word = table + words[j] * blocks;
        lanes dot = {0};
        for (int64_t b = 0; b < blocks; b++) dot += word[b] * theta[b];
        const float p = total(dot) + 1e-34f, ratio = counts[j] / p;
        if (!last) {
          for (int64_t b = 0; b < blocks; b++) gain[b] += ratio * word[b];
          continue;
        }
        found += counts[j] * logf(p / whole);
        for (int64_t b = 0; b < blocks; b++) {
          const lanes share = ratio * word[b] * theta[b];
          if (sums) sums[words[j] * blocks + b] += share;
          if (r) r[j * blocks + b] = share;
          gain[b] += share;
        }
        if (none)
          for (int64_t b = 0; b < blocks; b++) none[b] *= power(positive(1.0f - word[b] * theta[b] / p), counts[j]);
      }
      for (int64_t b = 0; b < blocks; b++) nd[b] = last ? gain[b] : theta[b] * gain[b];
    }
  }
  return found;
}
