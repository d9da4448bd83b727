/* What generated programs call: special functions, and small dense linear algebra with strides known when compiled. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline, unused))

/* glibc has versions of these that work on whole vectors; `omp simd` loops find them through the declarations. */
#if VECTOR_MATH >= 1
#pragma omp declare simd notinbranch
extern double exp(double);
#pragma omp declare simd notinbranch
extern double log(double);
#pragma omp declare simd notinbranch
extern double sin(double);
#pragma omp declare simd notinbranch
extern double cos(double);
#pragma omp declare simd notinbranch
extern double pow(double, double);
#endif
#if VECTOR_MATH >= 2 /* since glibc 2.35 */
#pragma omp declare simd notinbranch
extern double log1p(double);
#pragma omp declare simd notinbranch
extern double expm1(double);
#pragma omp declare simd notinbranch
extern double tanh(double);
#pragma omp declare simd notinbranch
extern double erf(double);
#pragma omp declare simd notinbranch
extern double erfc(double);
#pragma omp declare simd notinbranch
extern double atan(double);
#endif

INLINE double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
INLINE double log_gamma(double x) {
  int sign;
  return lgamma_r(x, &sign);
}

/* Recurrence up to 10, then the asymptotic series; reflection below 0 (Abramowitz and Stegun 6.3.5, 6.3.7, 6.3.18). */
static double __attribute__((unused)) digamma(double x) {
  if (x == 0.0) return -copysign(INFINITY, x);
  double shift = 0.0;
  if (x < 0.0) {
    if (x == trunc(x)) return NAN;
    shift = -M_PI / tan(M_PI * (x - trunc(x)));
    x = 1.0 - x;
  }
  for (; x < 10.0; x += 1.0) shift -= 1.0 / x;
  double z = 1.0 / (x * x);
  double series = z * (1.0 / 12 - z * (1.0 / 120 - z * (1.0 / 252 - z * (1.0 / 240 - z * (1.0 / 132 - z * (691.0 / 32760 - z / 12.0))))));
  return log(x) - 0.5 / x - series + shift;
}

/* The same for the derivative (6.4.7, 6.4.11). */
static double __attribute__((unused)) trigamma(double x) {
  double sign = 1.0, shift = 0.0;
  if (x < 0.5) {
    double s = sin(M_PI * x);
    sign = -1.0;
    shift = M_PI * M_PI / (s * s);
    x = 1.0 - x;
  }
  double sum = 0.0;
  for (; x < 12.0; x += 1.0) sum += 1.0 / (x * x);
  double z = 1.0 / (x * x);
  sum += 1.0 / x + 0.5 * z + z / x * (1.0 / 6 - z * (1.0 / 30 - z * (1.0 / 42 - z * (1.0 / 30 - z * (5.0 / 66 - z * 691.0 / 2730)))));
  return shift + sign * sum;
}

/* Places that count from the end. */
#define WRAP(i, n) ((i) < 0 ? (i) + (n) : (i))

/* Largest and smallest; what is not a number wins. */
#define LARGER(a, b) (((a) > (b)) | ((a) != (a)) ? (a) : (b))
#define SMALLER(a, b) (((a) < (b)) | ((a) != (a)) ? (a) : (b))

#define LINEAR_ALGEBRA(T, S)                                                                                            \
  /* c (m, n), row after row, = a (m, k) b (k, n); strides by row and column. */                                        \
  INLINE void matmul_##S(long m, long n, long k, const T *restrict a, long ai, long ak, const T *restrict b, long bk,   \
                         long bj, T *restrict c) {                                                                      \
    if (ak == 1 && bk == 1 && (k >= n || bj != 1)) {                                                                    \
      for (long i = 0; i < m; i++)                                                                                      \
        for (long j = 0; j < n; j++) {                                                                                  \
          T sum = 0;                                                                                                    \
          _Pragma("omp simd reduction(+ : sum)") for (long l = 0; l < k; l++) sum += a[i * ai + l] * b[l + j * bj];     \
          c[i * n + j] = sum;                                                                                           \
        }                                                                                                               \
    } else if (n == 1) {                                                                                                \
      for (long i = 0; i < m; i++) c[i] = 0;                                                                            \
      for (long l = 0; l < k; l++)                                                                                      \
        for (long i = 0; i < m; i++) c[i] += a[i * ai + l * ak] * b[l * bk];                                            \
    } else {                                                                                                            \
      for (long i = 0; i < m * n; i++) c[i] = 0;                                                                        \
      if (m * n <= 1024 && k > m)                                                                                       \
        for (long l = 0; l < k; l++)                                                                                    \
          for (long i = 0; i < m; i++)                                                                                  \
            for (long j = 0; j < n; j++) c[i * n + j] += a[i * ai + l * ak] * b[l * bk + j * bj];                       \
      else                                                                                                              \
        for (long i = 0; i < m; i++)                                                                                    \
          for (long l = 0; l < k; l++)                                                                                  \
            for (long j = 0; j < n; j++) c[i * n + j] += a[i * ai + l * ak] * b[l * bk + j * bj];                       \
    }                                                                                                                   \
  }                                                                                                                     \
  /* Lower factor of a symmetric (n, n), from its lower triangle; the order of the first minor that is not positive. */ \
  INLINE int cholesky_##S(long n, const T *restrict a, long ai, long aj, T *restrict l) {                               \
    for (long i = 0; i < n * n; i++) l[i] = 0;                                                                          \
    for (long j = 0; j < n; j++) {                                                                                      \
      for (long i = j; i < n; i++) {                                                                                    \
        T sum = a[i * ai + j * aj], part = 0;                                                                           \
        _Pragma("omp simd reduction(+ : part)") for (long k = 0; k < j; k++) part += l[i * n + k] * l[j * n + k];       \
        sum -= part;                                                                                                    \
        if (i == j) {                                                                                                   \
          if (!(sum > 0)) return (int)j + 1;                                                                            \
          l[j * n + j] = (T)sqrt(sum);                                                                                  \
        } else                                                                                                          \
          l[i * n + j] = sum / l[j * n + j];                                                                            \
      }                                                                                                                 \
    }                                                                                                                   \
    return 0;                                                                                                           \
  }                                                                                                                     \
  /* x (n, r) with strides xi, xj becomes inv(a) x for a triangular a (n, n). */                                        \
  INLINE void solve_##S(long n, long r, const T *restrict a, long ai, long aj, int upper, int unit, T *restrict x,      \
                        long xi, long xj) {                                                                             \
    for (long step = 0; step < n; step++) {                                                                             \
      long i = upper ? n - 1 - step : step;                                                                             \
      for (long k = upper ? i + 1 : 0; k < (upper ? n : i); k++)                                                        \
        for (long j = 0; j < r; j++) x[i * xi + j * xj] -= a[i * ai + k * aj] * x[k * xi + j * xj];                     \
      if (!unit)                                                                                                        \
        for (long j = 0; j < r; j++) x[i * xi + j * xj] /= a[i * ai + i * aj];                                          \
    }                                                                                                                   \
  } \
  /* Factors of a (n, n) with rows exchanged, as LAPACK keeps them: both in lu, rows by number from 1. */ \
  INLINE void lu_##S(long n, const T *restrict a, long ai, long aj, T *restrict lu, int32_t *restrict rows, T *restrict sign, \
                     T *restrict log_size) { \
    T flip = 1, log_sum = 0; \
    for (long i = 0; i < n; i++) \
      for (long j = 0; j < n; j++) lu[i * n + j] = a[i * ai + j * aj]; \
    for (long k = 0; k < n; k++) { \
      long top = k; \
      for (long i = k + 1; i < n; i++) \
        if (fabs((double)lu[i * n + k]) > fabs((double)lu[top * n + k])) top = i; \
      rows[k] = (int32_t)top + 1; \
      if (top != k) { \
        flip = -flip; \
        for (long j = 0; j < n; j++) { \
          T kept = lu[k * n + j]; \
          lu[k * n + j] = lu[top * n + j]; \
          lu[top * n + j] = kept; \
        } \
      } \
      T pivot = lu[k * n + k]; \
      flip = pivot < 0 ? -flip : (pivot == 0 ? 0 : flip); \
      log_sum += (T)log(fabs((double)pivot)); \
      if (pivot != 0) \
        for (long i = k + 1; i < n; i++) { \
          T factor = lu[i * n + k] /= pivot; \
          for (long j = k + 1; j < n; j++) lu[i * n + j] -= factor * lu[k * n + j]; \
        } \
    } \
    *sign = flip; \
    *log_size = log_sum; \
  } \
  /* x (n, r), row after row, becomes inv(a) x, or inv(a') x, from the factors of a. */ \
  INLINE void lu_solve_##S(long n, long r, const T *restrict lu, long li, long lj, const int32_t *restrict rows, int transposed, \
                           T *restrict x) { \
    for (long pass = 0; pass < 2; pass++) { \
      if (pass == 0 && !transposed) \
        for (long k = 0; k < n; k++) \
          if (rows[k] - 1 != k) \
            for (long j = 0; j < r; j++) { \
              T kept = x[k * r + j]; \
              x[k * r + j] = x[(rows[k] - 1) * r + j]; \
              x[(rows[k] - 1) * r + j] = kept; \
            } \
      if (transposed) \
        solve_##S(n, r, lu, lj, li, pass == 1, pass == 1, x, r, 1); \
      else \
        solve_##S(n, r, lu, li, lj, pass == 1, pass == 0, x, r, 1); \
    } \
    if (transposed) \
      for (long k = n - 1; k >= 0; k--) \
        if (rows[k] - 1 != k) \
          for (long j = 0; j < r; j++) { \
            T kept = x[k * r + j]; \
            x[k * r + j] = x[(rows[k] - 1) * r + j]; \
            x[(rows[k] - 1) * r + j] = kept; \
          } \
  }

LINEAR_ALGEBRA(double, d)
LINEAR_ALGEBRA(float, f)
