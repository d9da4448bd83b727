/* One chain of the No-U-Turn sampler, with its warm-up: the algorithm of hamiltonian.py and adaptation.py, step by step.

   Random numbers come from NumPy's generator in the same order as there, so that both follow the same path up to rounding.
   A chain owns all memory it touches; many chains run in threads of their own. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#define DIVERGENCE 1000.0

typedef void (*potential)(const double *q, void *const *inputs, char *arena, double *value, double *gradient);

/* Mirrored field by field in native.py. */
typedef struct {
  /* what is asked */
  potential density;
  void *const *inputs;
  char *arena;
  double (*uniform)(void *);
  void *generator;
  int64_t dim, warmup, draws, max_depth, dense, window_begin, window_count, limit;
  const int64_t *windows;
  double target;
  double *work;
  const volatile int32_t *stop;
  /* where it stands: position and gradient have `dim` numbers, adaptation those of `averaging`; enough to go on from */
  double *position, *gradient, *inverse, *factor, *mean, *spread, *adaptation;
  int64_t seen;
  double value, step, warm_seconds, seconds;
  volatile int64_t done, divergences, gradients;
  /* what it leaves: positions (draws, dim), the rest (draws,) */
  double *positions, *energy, *acceptance, *step_size, *lp;
  int64_t *tree_depth, *n_steps;
  uint8_t *diverging;
} chain;

enum { FINISHED = 0, STOPPED = 1, FLAT = 2, STEEP = 3, PAUSED = 4 };

/* A stretch of trajectory in the order in which it was made: `near` was reached first, `far` last. */
typedef struct {
  double *near_p, *near_v, *far_p, *far_v, *sum, *q, *g;
  double value, energy, log_weight;
} tree;

typedef struct {
  double *q, *p, *v, *g;
  double value, energy;
} state;

typedef struct {
  double step, energy, accepted;
  int64_t steps, depth;
  int diverging;
} walk;

typedef struct {
  double target, centre, error, average, count, step;
} averaging;

static double dot(int64_t n, const double *a, const double *b) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

static void copy(int64_t n, double *to, const double *from) { memcpy(to, from, (size_t)n * sizeof(double)); }

static void swap(double **a, double **b) {
  double *kept = *a;
  *a = *b;
  *b = kept;
}

static double log_add(double a, double b) {
  if (a == b) return a + M_LN2;
  double high = a > b ? a : b, low = a > b ? b : a;
  return isnan(a) || isnan(b) ? NAN : high + log1p(exp(low - high));
}

/* -- mass ------------------------------------------------------------------------------------------------------------- */

static void velocity(const chain *c, const double *p, double *v) {
  int64_t n = c->dim;
  if (c->dense)
    for (int64_t i = 0; i < n; i++) v[i] = dot(n, c->inverse + i * n, p);
  else
    for (int64_t i = 0; i < n; i++) v[i] = c->inverse[i] * p[i];
}

/* A momentum from Normal(0, mass); `normal` has room for dim + 1 numbers (Box and Muller 1958). */
static void momentum(const chain *c, double *p, double *normal) {
  int64_t n = c->dim;
  for (int64_t i = 0; i < n; i += 2) {
    double radius = sqrt(-2.0 * log1p(-c->uniform(c->generator))), angle = 2.0 * M_PI * c->uniform(c->generator);
    normal[i] = radius * cos(angle);
    normal[i + 1] = radius * sin(angle);
  }
  for (int64_t i = 0; i < n; i++) p[i] = c->dense ? dot(n, c->factor + i * n, normal) : c->factor[i] * normal[i];
}

/* One more state for the running (co)variance; spread is (dim,) or (dim, dim). */
static void see(chain *c, double *gap) {
  int64_t n = c->dim;
  c->seen++;
  for (int64_t i = 0; i < n; i++) {
    gap[i] = c->position[i] - c->mean[i];
    c->mean[i] += gap[i] / (double)c->seen;
  }
  for (int64_t i = 0; i < n; i++) {
    if (c->dense)
      for (int64_t j = 0; j < n; j++) c->spread[i * n + j] += gap[i] * (c->position[j] - c->mean[j]);
    else
      c->spread[i] += gap[i] * (c->position[i] - c->mean[i]);
  }
}

/* factor = inverse transpose of the Cholesky factor of the inverse mass; 0 where that is not positive definite. */
static int refactor(const chain *c, double *lower) {
  int64_t n = c->dim;
  memset(lower, 0, (size_t)(n * n) * sizeof(double));
  for (int64_t j = 0; j < n; j++)
    for (int64_t i = j; i < n; i++) {
      double sum = c->inverse[i * n + j] - dot(j, lower + i * n, lower + j * n);
      if (i == j && !(sum > 0)) return 0;
      lower[i * n + j] = i == j ? sqrt(sum) : sum / lower[j * n + j];
    }
  memset(c->factor, 0, (size_t)(n * n) * sizeof(double));
  for (int64_t j = 0; j < n; j++) /* column j of the inverse is row j of its transpose */
    for (int64_t i = j; i < n; i++) {
      double sum = i == j ? 1.0 : 0.0;
      for (int64_t k = j; k < i; k++) sum -= lower[i * n + k] * c->factor[j * n + k];
      c->factor[j * n + i] = sum / lower[i * n + i];
    }
  return 1;
}

/* Take the estimate, shrunk towards a small multiple of the identity, and begin another. */
static void renew(chain *c, double *lower) {
  int64_t n = c->dim, size = c->dense ? n * n : n;
  if (c->seen > 1) {
    double share = (double)c->seen / ((double)c->seen + 5.0), floor = 1e-3 * (1.0 - share);
    for (int64_t i = 0; i < size; i++) {
      c->inverse[i] = share * c->spread[i] / (double)(c->seen - 1);
      if (!c->dense || i % (n + 1) == 0) c->inverse[i] += floor;
    }
    if (!c->dense || !refactor(c, lower))
      for (int64_t i = 0; i < size; i++) {
        if (!c->dense)
          c->factor[i] = 1.0 / sqrt(c->inverse[i]);
        else {
          c->inverse[i] = i % (n + 1) ? 0.0 : c->inverse[i];
          c->factor[i] = i % (n + 1) ? 0.0 : 1.0 / sqrt(c->inverse[i]);
        }
      }
  }
  c->seen = 0;
  memset(c->mean, 0, (size_t)n * sizeof(double));
  memset(c->spread, 0, (size_t)size * sizeof(double));
}

/* -- step size -------------------------------------------------------------------------------------------------------- */

static averaging average_from(double step, double target) {
  averaging a = {target, log(10.0 * step), 0.0, 0.0, 0.0, step};
  return a;
}

static void learn(averaging *a, double acceptance) {
  a->count += 1.0;
  double share = 1.0 / (a->count + 10.0);
  a->error = (1.0 - share) * a->error + share * (a->target - acceptance);
  double log_step = a->centre - sqrt(a->count) / 0.05 * a->error, decay = pow(a->count, -0.75);
  a->average = decay * log_step + (1.0 - decay) * a->average;
  a->step = exp(log_step);
}

static void leapfrog(chain *c, state *s, double step) {
  int64_t n = c->dim;
  for (int64_t i = 0; i < n; i++) s->p[i] += 0.5 * step * s->g[i];
  velocity(c, s->p, s->v);
  for (int64_t i = 0; i < n; i++) s->q[i] += step * s->v[i];
  c->density(s->q, c->inputs, c->arena, &s->value, s->g);
  c->gradients++;
  for (int64_t i = 0; i < n; i++) s->p[i] += 0.5 * step * s->g[i];
  velocity(c, s->p, s->v);
  s->energy = 0.5 * dot(n, s->p, s->v) - s->value;
}

/* The chain's place with a new momentum. */
static void refresh(chain *c, state *s, double *normal) {
  copy(c->dim, s->q, c->position);
  copy(c->dim, s->g, c->gradient);
  momentum(c, s->p, normal);
  velocity(c, s->p, s->v);
  s->value = c->value;
  s->energy = 0.5 * dot(c->dim, s->p, s->v) - s->value;
}

/* Double or halve the step until one leapfrog step is accepted with probability 0.8 (JMLR 2014, algorithm 4). */
static int reasonable_step(chain *c, state *s, double *normal, double *step) {
  int direction = 0;
  for (;;) {
    if (*c->stop) return STOPPED;
    refresh(c, s, normal);
    double energy = s->energy;
    leapfrog(c, s, *step);
    int better = energy - s->energy > log(0.8);
    if (direction == 0)
      direction = better ? 1 : -1;
    else if (better != (direction == 1))
      return FINISHED;
    *step *= direction == 1 ? 2.0 : 0.5;
    if (*step > 1e7) return FLAT;
    if (*step < 1e-12) return STEEP;
  }
}

/* -- trajectories ----------------------------------------------------------------------------------------------------- */

/* Whether both ends still move along a + b (2017, appendix A.4.2). */
static int apart(int64_t n, const double *first_v, const double *last_v, const double *a, const double *b) {
  double first = 0.0, last = 0.0;
#pragma omp simd reduction(+ : first, last)
  for (int64_t i = 0; i < n; i++) {
    first += first_v[i] * (a[i] + b[i]);
    last += last_v[i] * (a[i] + b[i]);
  }
  return first > 0 && last > 0;
}

/* Whether an older stretch and the one made after it turn back, together or each with the next state of the other. */
static int turning(int64_t n, const tree *old, const tree *new) {
  return !(apart(n, old->near_v, new->far_v, old->sum, new->sum) && apart(n, old->near_v, new->near_v, old->sum, new->near_p) &&
           apart(n, old->far_v, new->far_v, old->far_p, new->sum));
}

static void take_sample(tree *to, tree *from) {
  swap(&to->q, &from->q);
  swap(&to->g, &from->g);
  to->value = from->value;
  to->energy = from->energy;
}

/* 2 ** depth steps beyond `edge`, joined in trees[0] as the bits of a counter carry; 0 where a part turns back or diverges. */
static int subtree(chain *c, state *edge, walk *w, double step, tree *trees, int *stopped) {
  int64_t n = c->dim, waiting = 0;
  for (int64_t index = 0; index < (int64_t)1 << w->depth; index++) {
    if (*c->stop) {
      *stopped = 1;
      return 0;
    }
    leapfrog(c, edge, step);
    double change = w->energy - edge->energy, total = 0.0;
    w->steps++;
    for (int64_t i = 0; i < n; i++) total += edge->g[i];
    if (!(change > -DIVERGENCE && isfinite(total))) {
      w->diverging = 1;
      return 0;
    }
    w->accepted += exp(change < 0 ? change : 0.0);
    tree *leaf = &trees[waiting];
    copy(n, leaf->near_p, edge->p);
    copy(n, leaf->near_v, edge->v);
    copy(n, leaf->far_p, edge->p);
    copy(n, leaf->far_v, edge->v);
    copy(n, leaf->sum, edge->p);
    copy(n, leaf->q, edge->q);
    copy(n, leaf->g, edge->g);
    leaf->value = edge->value;
    leaf->energy = edge->energy;
    leaf->log_weight = change;
    for (int64_t bits = index; bits & 1; bits >>= 1) {
      tree *new = &trees[waiting], *old = &trees[waiting - 1];
      if (turning(n, old, new)) return 0;
      double weight = log_add(old->log_weight, new->log_weight);
      if (log1p(-c->uniform(c->generator)) < new->log_weight - weight) take_sample(old, new);
      swap(&old->far_p, &new->far_p);
      swap(&old->far_v, &new->far_v);
      for (int64_t i = 0; i < n; i++) old->sum[i] += new->sum[i];
      old->log_weight = weight;
      waiting--;
    }
    waiting++;
  }
  return 1;
}

/* Double a trajectory until it turns back, and move to a state drawn from it; `ends` are those of the trajectory. */
static int transition(chain *c, walk *w, state ends[2], state *edge, tree *whole, tree *trees, double *normal, double *energy) {
  int64_t n = c->dim;
  int stopped = 0;
  refresh(c, &ends[0], normal);
  copy(n, ends[1].q, ends[0].q);
  copy(n, ends[1].p, ends[0].p);
  copy(n, ends[1].v, ends[0].v);
  copy(n, ends[1].g, ends[0].g);
  copy(n, whole->q, ends[0].q);
  copy(n, whole->g, ends[0].g);
  copy(n, whole->sum, ends[0].p);
  whole->value = c->value;
  w->energy = whole->energy = ends[0].energy;
  whole->log_weight = 0.0;
  while (w->depth < c->max_depth) {
    int forward = c->uniform(c->generator) < 0.5;
    state *end = &ends[forward], *other = &ends[!forward];
    copy(n, edge->q, end->q);
    copy(n, edge->p, end->p);
    copy(n, edge->g, end->g);
    if (!subtree(c, edge, w, forward ? w->step : -w->step, trees, &stopped)) break;
    w->depth++;
    tree *half = &trees[0];
    /* The new half is preferred to the old one: both leave the target as it is, this one moves farther. */
    if (log1p(-c->uniform(c->generator)) < half->log_weight - whole->log_weight) take_sample(whole, half);
    tree before = {other->p, other->v, end->p, end->v, whole->sum, 0, 0, 0, 0, 0};
    int turned = turning(n, &before, half);
    for (int64_t i = 0; i < n; i++) whole->sum[i] += half->sum[i];
    whole->log_weight = log_add(whole->log_weight, half->log_weight);
    state kept = *end;
    *end = *edge;
    *edge = kept;
    if (turned) break;
  }
  if (stopped) return STOPPED;
  copy(n, c->position, whole->q);
  copy(n, c->gradient, whole->g);
  c->value = whole->value;
  *energy = whole->energy;
  return FINISHED;
}

static void keep(chain *c, const walk *w, double energy) {
  if (c->done >= c->warmup) {
    int64_t row = c->done - c->warmup;
    copy(c->dim, c->positions + row * c->dim, c->position);
    c->energy[row] = energy;
    c->acceptance[row] = w->accepted / (double)(w->steps > 1 ? w->steps : 1);
    c->step_size[row] = w->step;
    c->lp[row] = c->value;
    c->tree_depth[row] = w->depth;
    c->n_steps[row] = w->steps;
    c->diverging[row] = (uint8_t)w->diverging;
    c->divergences += w->diverging;
  }
  c->step = w->step;
  c->done++;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Numbers of scratch memory that a chain needs. */
int64_t nuts_work(int64_t dim, int64_t max_depth, int64_t dense) {
  return 4 * 3 * dim + 7 * dim * (max_depth + 2) + dim + 2 + dim + (dense ? dim * dim : dim);
}

/* Warm up and draw, from where the chain stands until the end or until `limit` iterations are done. */
int nuts_run(chain *c) {
  int64_t n = c->dim, end = 0;
  double *at = c->work;
#define PIECE(name, size) \
  (name) = at;            \
  at += (size)
  state ends[2], edge;
  state *all[3] = {&ends[0], &ends[1], &edge};
  for (int i = 0; i < 3; i++) {
    PIECE(all[i]->q, n);
    PIECE(all[i]->p, n);
    PIECE(all[i]->v, n);
    PIECE(all[i]->g, n);
  }
  tree trees[64];
  for (int64_t i = 0; i < c->max_depth + 2; i++) {
    PIECE(trees[i].near_p, n);
    PIECE(trees[i].near_v, n);
    PIECE(trees[i].far_p, n);
    PIECE(trees[i].far_v, n);
    PIECE(trees[i].sum, n);
    PIECE(trees[i].q, n);
    PIECE(trees[i].g, n);
  }
  double *normal, *gap, *lower;
  PIECE(normal, n + 2);
  PIECE(gap, n);
  PIECE(lower, c->dense ? n * n : n);

  double step = 1.0, began = now(), warm_before = c->warm_seconds, before = c->seconds;
  int status = FINISHED;
  averaging a;
  if (c->done == 0) {
    status = reasonable_step(c, &edge, normal, &step);
    a = average_from(step, c->target);
  } else
    memcpy(&a, c->adaptation, sizeof a);
  while (end < c->window_count && c->windows[end] <= c->done) end++;
  for (int64_t i = c->done; status == FINISHED && i < c->warmup + c->draws; i++) {
    if (i >= c->limit) {
      status = PAUSED;
      break;
    }
    int warm = i >= c->warmup;
    walk w = {warm ? (a.count ? exp(a.average) : a.step) : a.step, 0.0, 0.0, 0, 0, 0};
    double energy;
    status = transition(c, &w, ends, &edge, &trees[c->max_depth + 1], trees, normal, &energy);
    if (status != FINISHED) break;
    keep(c, &w, energy);
    if (!warm) {
      learn(&a, w.accepted / (double)(w.steps > 1 ? w.steps : 1));
      if (c->window_count && i >= c->window_begin && i < c->windows[c->window_count - 1]) see(c, gap);
      if (end < c->window_count && i + 1 == c->windows[end]) {
        end++;
        renew(c, lower);
        step = a.step;
        status = reasonable_step(c, &edge, normal, &step);
        a = average_from(step, c->target);
      }
      c->warm_seconds = warm_before + now() - began;
    }
    memcpy(c->adaptation, &a, sizeof a);
  }
  c->seconds = before + now() - began;
  return status;
}
