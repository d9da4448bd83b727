/* Leapfrog steps of many chains, all of the same number: what `methods/hmc.py` asks for in every iteration. */
#include <stdint.h>

typedef void (*potential)(const double *q, void *const *inputs, char *arena, double *value, double *gradient);

/* velocity = inverse mass times momentum; inverse is (dim,), or (dim, dim) where dense. */
static void velocity(int64_t dim, int64_t dense, const double *inverse, const double *p, double *v) {
  for (int64_t i = 0; i < dim; i++) {
    if (!dense) {
      v[i] = inverse[i] * p[i];
      continue;
    }
    double sum = 0.0;
    for (int64_t j = 0; j < dim; j++) sum += inverse[i * dim + j] * p[j];
    v[i] = sum;
  }
}

/* Chains first..last-1 of (chains, dim) arrays move `steps` steps; values are (chains,), work is (dim,). */
void hmc_move(potential density, void *const *inputs, char *arena, double *work, int64_t dim, int64_t dense, int64_t first,
              int64_t last, int64_t steps, double step, const double *inverse, double *position, double *momentum,
              double *gradient, double *value) {
  for (int64_t c = first; c < last; c++) {
    double *q = position + c * dim, *p = momentum + c * dim, *g = gradient + c * dim;
    for (int64_t i = 0; i < dim; i++) p[i] += 0.5 * step * g[i];
    for (int64_t s = 0; s < steps; s++) {
      velocity(dim, dense, inverse, p, work);
      for (int64_t i = 0; i < dim; i++) q[i] += step * work[i];
      density(q, inputs, arena, value + c, g);
      double kick = s + 1 < steps ? step : 0.5 * step, total = 0.0;
      for (int64_t i = 0; i < dim; i++) {
        p[i] += kick * g[i];
        total += g[i];
      }
      if (!(total - total == 0.0)) break; /* far out nothing is finite any more: the proposal is not taken */
    }
  }
}
