/* Product of a few tokens with pyramid vectors, and dense float32 rows from them.
 *
 * A vector is 16 rows of one column: integers (rows / 16, columns, 16) times one scale (rows / 16, columns). See
 * quant/formats/pvq.py.
 *
 * Written with GCC/Clang vector extensions.
 */
#include <stdint.h>
#include <string.h>

#define HEIGHT 16
#define TOKENS 4 /* that share the conversion of a vector */
#define RUN 128  /* columns that are added up by themselves */
#define INLINE static inline __attribute__((always_inline))

typedef float f32v __attribute__((vector_size(64), aligned(4), may_alias));
typedef int8_t i8v __attribute__((vector_size(16)));

INLINE f32v vector(const int8_t *points, float scale) {
    i8v point;
    memcpy(&point, points, HEIGHT);
    return __builtin_convertvector(point, f32v) * scale;
}

INLINE void product(const int8_t *points, const float *scale, const float *x, float *y, long rows, long columns,
                    const int tokens) {
    f32v sum[TOKENS] = {0};
    for (long start = 0; start < columns; start += RUN) {
        const long end = start + RUN < columns ? start + RUN : columns;
        f32v part[TOKENS] = {0};
        for (long k = start; k < end; k++) {
            const f32v value = vector(points + k * HEIGHT, scale[k]);
            for (int m = 0; m < tokens; m++) part[m] += value * x[m * columns + k];
        }
        for (int m = 0; m < tokens; m++) sum[m] += part[m];
    }
    for (int m = 0; m < tokens; m++) *(f32v *)(y + m * rows) = sum[m];
}

/* y (tokens, rows) = x (tokens, columns) times the vectors. One thread computes all of a row, so results depend neither
 * on the number of threads nor on the number of tokens. */
int fewbits_pvq_gemv(const float *x, const int8_t *points, const float *scale, float *y, long tokens, long rows,
                     long columns, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < rows; n += HEIGHT) {
        const int8_t *own = points + n * columns;
        const float *s = scale + n / HEIGHT * columns;
        long m = 0;
        for (; m + 4 <= tokens; m += 4) product(own, s, x + m * columns, y + m * rows + n, rows, columns, 4);
        for (; m + 2 <= tokens; m += 2) product(own, s, x + m * columns, y + m * rows + n, rows, columns, 2);
        if (m < tokens) product(own, s, x + m * columns, y + m * rows + n, rows, columns, 1);
    }
    return 0;
}

/* out (rows, columns) float32 */
int fewbits_pvq_dequantize(const int8_t *points, const float *scale, float *out, long rows, long columns, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < rows; n += HEIGHT)
        for (long k = 0; k < columns; k++) {
            const f32v value = vector(points + n * columns + k * HEIGHT, scale[n / HEIGHT * columns + k]);
            for (int i = 0; i < HEIGHT; i++) out[(n + i) * columns + k] = value[i];
        }
    return 0;
}
