/* Product of a few tokens with a matrix of vector codes, and dense float32 rows from such codes.
 *
 * A vector is `height` (2, 4 or 8) rows of one column: the sum of one entry of each of `stages` codebooks (entries,
 * height). `codes` is (rows / height, stages, columns), of bytes or of 32-bit integers. See quant/formats/rvq.py and
 * vq.py.
 *
 * Written with GCC/Clang vector extensions.
 */
#include <stdint.h>

#define TOKENS 4 /* that share the look-up of a vector */
#define RUN 128  /* columns that are added up by themselves */
#define INLINE static inline __attribute__((always_inline))

/* Everything for one height H and one type of codes T, under names that end in N. */
#define KERNELS(H, T, N)                                                                                             \
    typedef float vector_##N __attribute__((vector_size(4 * H), aligned(4), may_alias));                            \
                                                                                                                     \
    INLINE vector_##N entry_##N(const float *books, long entries, const T *codes, long columns, long k,             \
                                const int stages) {                                                                  \
        vector_##N value = *(const vector_##N *)(books + codes[k] * H);                                              \
        for (int m = 1; m < stages; m++)                                                                             \
            value += *(const vector_##N *)(books + (m * entries + codes[m * columns + k]) * H);                      \
        return value;                                                                                                \
    }                                                                                                                \
                                                                                                                     \
    INLINE void product_##N(const float *books, long entries, const T *codes, const float *x, float *y, long rows,   \
                            long columns, const int tokens, const int stages) {                                      \
        vector_##N sum[TOKENS] = {0};                                                                                \
        for (long start = 0; start < columns; start += RUN) {                                                        \
            const long end = start + RUN < columns ? start + RUN : columns;                                          \
            vector_##N part[TOKENS] = {0};                                                                           \
            for (long k = start; k < end; k++) {                                                                     \
                const vector_##N value = entry_##N(books, entries, codes, columns, k, stages);                       \
                for (int m = 0; m < tokens; m++) part[m] += value * x[m * columns + k];                              \
            }                                                                                                        \
            for (int m = 0; m < tokens; m++) sum[m] += part[m];                                                      \
        }                                                                                                            \
        for (int m = 0; m < tokens; m++) *(vector_##N *)(y + m * rows) = sum[m];                                     \
    }                                                                                                                \
                                                                                                                     \
    INLINE void products_##N(const float *books, long entries, const T *codes, const float *x, float *y, long rows,  \
                             long columns, long tokens, const int stages) {                                          \
        long m = 0;                                                                                                  \
        for (; m + 4 <= tokens; m += 4)                                                                              \
            product_##N(books, entries, codes, x + m * columns, y + m * rows, rows, columns, 4, stages);             \
        for (; m + 2 <= tokens; m += 2)                                                                              \
            product_##N(books, entries, codes, x + m * columns, y + m * rows, rows, columns, 2, stages);             \
        if (m < tokens) product_##N(books, entries, codes, x + m * columns, y + m * rows, rows, columns, 1, stages); \
    }                                                                                                                \
                                                                                                                     \
    static void gemv_##N(const float *x, const T *codes, const float *books, float *y, long tokens, long rows,       \
                         long columns, int stages, long entries, int threads) {                                      \
        _Pragma("omp parallel for num_threads(threads) schedule(static)") for (long n = 0; n < rows; n += H) {       \
            const T *own = codes + n / H * stages * columns;                                                         \
            switch (stages) {                                                                                        \
            case 1: products_##N(books, entries, own, x, y + n, rows, columns, tokens, 1); break;                    \
            case 2: products_##N(books, entries, own, x, y + n, rows, columns, tokens, 2); break;                    \
            case 3: products_##N(books, entries, own, x, y + n, rows, columns, tokens, 3); break;                    \
            default: products_##N(books, entries, own, x, y + n, rows, columns, tokens, 4);                          \
            }                                                                                                        \
        }                                                                                                            \
    }                                                                                                                \
                                                                                                                     \
    static void dequantize_##N(const T *codes, const float *books, float *out, long rows, long columns, int stages,  \
                               long entries, int threads) {                                                          \
        _Pragma("omp parallel for num_threads(threads) schedule(static)") for (long n = 0; n < rows; n += H) {       \
            const T *own = codes + n / H * stages * columns;                                                         \
            for (long k = 0; k < columns; k++) {                                                                     \
                const vector_##N value = entry_##N(books, entries, own, columns, k, stages);                         \
                for (int i = 0; i < H; i++) out[(n + i) * columns + k] = value[i];                                   \
            }                                                                                                        \
        }                                                                                                            \
    }

KERNELS(2, uint8_t, 2_bytes)
KERNELS(4, uint8_t, 4_bytes)
KERNELS(8, uint8_t, 8_bytes)
KERNELS(2, int32_t, 2_words)
KERNELS(4, int32_t, 4_words)
KERNELS(8, int32_t, 8_words)

#define EACH(CALL)                                                                                                   \
    switch (height) {                                                                                                \
    case 2: if (wide) CALL(2_words) else CALL(2_bytes) break;                                                        \
    case 4: if (wide) CALL(4_words) else CALL(4_bytes) break;                                                        \
    case 8: if (wide) CALL(8_words) else CALL(8_bytes) break;                                                        \
    default: return -1;                                                                                              \
    }                                                                                                                \
    return 0;

/* y (tokens, rows) = x (tokens, columns) times the codes, which are 32-bit where `wide`. One thread computes all of a
 * row, so results depend neither on the number of threads nor on the number of tokens. */
int fewbits_vector_gemv(const float *x, const void *codes, const float *books, float *y, long tokens, long rows,
                        long columns, int height, int stages, long entries, int wide, int threads) {
#define GEMV(N) { gemv_##N(x, codes, books, y, tokens, rows, columns, stages, entries, threads); }
    EACH(GEMV)
}

/* out (rows, columns) float32 */
int fewbits_vector_dequantize(const void *codes, const float *books, float *out, long rows, long columns, int height,
                              int stages, long entries, int wide, int threads) {
#define DEQUANTIZE(N) { dequantize_##N(codes, books, out, rows, columns, stages, entries, threads); }
    EACH(DEQUANTIZE)
}
