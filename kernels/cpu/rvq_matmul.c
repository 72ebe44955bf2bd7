/* Product of a few tokens with a matrix of residual vector codes, and dense float32 rows from such codes.
 *
 * A vector is 8 rows of one column: the sum of one entry of each of `stages` codebooks (256, 8). `codes` is
 * (rows / 8, stages, columns) bytes. See quant/formats/rvq.py.
 *
 * Written with GCC/Clang vector extensions.
 */
#include <stdint.h>

#define HEIGHT 8
#define ENTRIES 256
#define TOKENS 4 /* that share the look-up of a vector */
#define RUN 128  /* columns that are added up by themselves */
#define INLINE static inline __attribute__((always_inline))

typedef float f32x8 __attribute__((vector_size(32), aligned(4), may_alias));

INLINE f32x8 entry(const float *books, const uint8_t *codes, long columns, long k, const int stages) {
    f32x8 value = *(const f32x8 *)(books + codes[k] * HEIGHT);
#pragma GCC unroll 4
    for (int m = 1; m < stages; m++)
        value += *(const f32x8 *)(books + (m * ENTRIES + codes[m * columns + k]) * HEIGHT);
    return value;
}

INLINE void product(const float *books, const uint8_t *codes, const float *x, float *y, long rows, long columns,
                    const int tokens, const int stages) {
    f32x8 sum[TOKENS] = {0};
    for (long start = 0; start < columns; start += RUN) {
        const long end = start + RUN < columns ? start + RUN : columns;
        f32x8 part[TOKENS] = {0};
        for (long k = start; k < end; k++) {
            const f32x8 value = entry(books, codes, columns, k, stages);
            for (int m = 0; m < tokens; m++) part[m] += value * x[m * columns + k];
        }
        for (int m = 0; m < tokens; m++) sum[m] += part[m];
    }
    for (int m = 0; m < tokens; m++) *(f32x8 *)(y + m * rows) = sum[m];
}

#define PRODUCTS(S)                                                                                                  \
    static void product_##S(const float *books, const uint8_t *codes, const float *x, float *y, long rows,           \
                            long columns, long tokens) {                                                             \
        long m = 0;                                                                                                  \
        for (; m + 4 <= tokens; m += 4) product(books, codes, x + m * columns, y + m * rows, rows, columns, 4, S);   \
        for (; m + 2 <= tokens; m += 2) product(books, codes, x + m * columns, y + m * rows, rows, columns, 2, S);   \
        if (m < tokens) product(books, codes, x + m * columns, y + m * rows, rows, columns, 1, S);                   \
    }
PRODUCTS(2) PRODUCTS(3) PRODUCTS(4)

/* y (tokens, rows) = x (tokens, columns) times the codes. One thread computes all of a row, so results depend neither
 * on the number of threads nor on the number of tokens. */
int fewbits_rvq_gemv(const float *x, const uint8_t *codes, const float *books, float *y, long tokens, long rows,
                     long columns, int stages, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < rows; n += HEIGHT) {
        const uint8_t *own = codes + n / HEIGHT * stages * columns;
        switch (stages) {
#define CASE(S) case S: product_##S(books, own, x, y + n, rows, columns, tokens); break;
            CASE(2) CASE(3) CASE(4)
        }
    }
    return 0;
}

/* out (rows, columns) float32 */
int fewbits_rvq_dequantize(const uint8_t *codes, const float *books, float *out, long rows, long columns, int stages,
                           int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < rows; n += HEIGHT) {
        const uint8_t *own = codes + n / HEIGHT * stages * columns;
        for (long k = 0; k < columns; k++) {
            const f32x8 value = entry(books, own, columns, k, stages);
            for (int i = 0; i < HEIGHT; i++) out[(n + i) * columns + k] = value[i];
        }
    }
    return 0;
}
