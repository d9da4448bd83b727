/* A Newton step for the walks of one topic's words through time: what `topics/walks.py` asks for. Arrays of slices and words are
   (T, V), those of the model with `stride` numbers from slice to slice. */
#include "support.h"

enum { BLOCK = 256 }; /* words whose walks stay in the cache together */

typedef struct {
  int64_t T, V, stride;
  const float *pi, *n;   /* shares of words (T, V) with stride, and words of the topic a slice (T,) */
  float first, step;     /* precisions of the start and of a move */
  float *inverse;        /* 1 / pivots of the tridiagonal part, (T, V) */
} system_t;

/* The walk's precision times x at slice t and word v of an array whose slices are `stride` apart. */
INLINE float pull(const system_t *s, const float *x, int64_t stride, int64_t t, int64_t v) {
  const float *here = x + t * stride + v;
  float found = t == 0 ? s->first * here[0] : 0.0f;
  if (t > 0) found += s->step * (here[0] - here[-stride]);
  if (t < s->T - 1) found -= s->step * (here[stride] - here[0]);
  return found;
}

/* z = the inverse of the tridiagonal part times r, for words a to b; r . z is returned. */
static double solve(const system_t *s, const float *r, float *z, int64_t a, int64_t b) {
  const int64_t T = s->T, V = s->V;
  const float off = -s->step;
  double found = 0.0;
  for (int64_t t = 0; t < T; t++) {
    const float *before = s->inverse + (t - 1) * V, *last = z + (t - 1) * V, *right = r + t * V;
    float *here = z + t * V;
    if (t == 0) memcpy(here + a, right + a, (b - a) * sizeof(float));
    else
#pragma omp simd
      for (int64_t v = a; v < b; v++) here[v] = right[v] - off * before[v] * last[v];
  }
  for (int64_t t = T - 1; t >= 0; t--) {
    const float *inverse = s->inverse + t * V, *next = z + (t + 1) * V, *right = r + t * V;
    float *here = z + t * V, sum = 0.0f;
    if (t == T - 1)
#pragma omp simd
      for (int64_t v = a; v < b; v++) here[v] *= inverse[v];
    else
#pragma omp simd
      for (int64_t v = a; v < b; v++) here[v] = inverse[v] * (here[v] - off * next[v]);
#pragma omp simd reduction(+ : sum)
    for (int64_t v = a; v < b; v++) sum += here[v] * right[v];
    found += sum;
  }
  return found;
}

/* beta moves by `rounds` rounds of preconditioned conjugate gradients, no word by more than `far`. S are counts of words, `base`
   (V,) is where the walks start from; `work` holds 6 T V numbers and 2 T more. */
void newton_step(int64_t T, int64_t V, int64_t stride, float *beta, const float *S, const float *pi, const float *n,
                 const float *base, float first, float step, int64_t rounds, float far, float *work) {
  float *inverse = work, *x = inverse + T * V, *r = x + T * V, *z = r + T * V, *p = z + T * V, *h = p + T * V;
  float *means = h + T * V; /* of p under the shares, a slice */
  const system_t s = {T, V, stride, pi, n, first, step, inverse};
  double rz = 0.0;
  memset(means, 0, T * sizeof(float));
  for (int64_t a = 0; a < V; a += BLOCK) {
    const int64_t b = a + BLOCK < V ? a + BLOCK : V;
    for (int64_t t = 0; t < T; t++) {
      const float own = (T > 1) * (2 - (t == 0) - (t == T - 1)) * step + (t == 0) * first;
#pragma omp simd
      for (int64_t v = a; v < b; v++) {
        const float count = n[t] * pi[t * stride + v];
        const float pivot = count + own - (t > 0 ? step * step * inverse[(t - 1) * V + v] : 0.0f);
        inverse[t * V + v] = 1.0f / pivot;
        r[t * V + v] = S[t * stride + v] - count - pull(&s, beta, stride, t, v) + (t == 0 ? first * base[v] : 0.0f);
        x[t * V + v] = 0.0f;
      }
    }
    rz += solve(&s, r, p, a, b);
    for (int64_t t = 0; t < T; t++) {
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t v = a; v < b; v++) sum += pi[t * stride + v] * p[t * V + v];
      means[t] += sum;
    }
  }
  for (int64_t i = 0; i < rounds && rz > 0.0; i++) {
    double curvature = 0.0, fresh = 0.0;
    for (int64_t t = 0; t < T; t++) {
      for (int64_t a = 0; a < V; a += BLOCK) {
        const int64_t b = a + BLOCK < V ? a + BLOCK : V;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t v = a; v < b; v++) {
          const float here = p[t * V + v];
          const float found = pull(&s, p, V, t, v) + n[t] * pi[t * stride + v] * (here - means[t]);
          h[t * V + v] = found;
          sum += here * found;
        }
        curvature += sum;
      }
    }
    if (!(curvature > 0.0)) break;
    const float move = (float)(rz / curvature);
    const int last = i == rounds - 1;
    for (int64_t a = 0; a < V; a += BLOCK) {
      const int64_t b = a + BLOCK < V ? a + BLOCK : V;
      for (int64_t t = 0; t < T; t++)
#pragma omp simd
        for (int64_t v = a; v < b; v++) {
          x[t * V + v] += move * p[t * V + v];
          r[t * V + v] -= move * h[t * V + v];
        }
      if (!last) fresh += solve(&s, r, z, a, b);
    }
    if (last) break;
    const float share = (float)(fresh / rz);
    for (int64_t t = 0; t < T; t++) {
      double mean = 0.0;
      for (int64_t a = 0; a < V; a += BLOCK) {
        const int64_t b = a + BLOCK < V ? a + BLOCK : V;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t v = a; v < b; v++) {
          p[t * V + v] = z[t * V + v] + share * p[t * V + v];
          sum += pi[t * stride + v] * p[t * V + v];
        }
        mean += sum;
      }
      means[t] = (float)mean;
    }
    rz = fresh;
  }
  for (int64_t t = 0; t < T; t++)
#pragma omp simd
    for (int64_t v = 0; v < V; v++) {
      const float move = x[t * V + v];
      beta[t * stride + v] += move > far ? far : move < -far ? -far : move;
    }
}
