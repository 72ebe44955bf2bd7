/* Product of a few tokens with vectors of columns, and dense float32 rows from such vectors.
 *
 * A vector is `length` consecutive columns of one row: an entry of the codebook of its place, or of the one codebook of
 * all places. `codes` is (rows, places), of bytes or, where `wide`, of 32-bit integers. See quant/formats/vq.py.
 *
 * Written with GCC/Clang vector extensions.
 */
#include <stdint.h>
#include <string.h>

#define STEP 64   /* entries that are multiplied at a time; their number is a multiple, a power of two from 256 on */
#define RUN 16    /* places that are added up by themselves: tables of so many, of 256 entries, fit in the first cache */
#define BLOCK 256 /* rows that are taken through one run after the other, while their codes stay in the second cache */
#define LANES 8
#define INLINE static inline __attribute__((always_inline))

typedef float f32x8 __attribute__((vector_size(32), aligned(4), may_alias));

INLINE long code(const void *codes, long at, const int wide) {
    return wide ? ((const int32_t *)codes)[at] : ((const uint8_t *)codes)[at];
}

/* table[e] = sum over i of x[i] * book[i][e], for STEP entries of a book (length, entries). */
static void products(const float *x, const float *book, float *table, long length, long entries) {
    f32x8 sum[STEP / LANES] = {0};
    for (long i = 0; i < length; i++)
        for (int j = 0; j < STEP / LANES; j++) sum[j] += *(const f32x8 *)(book + i * entries + j * LANES) * x[i];
    memcpy(table, sum, sizeof sum);
}

/* y[n] = sum over places g of table[g][codes[n][g]], for rows from `first` up to `last`. */
INLINE void outputs(const float *table, const void *codes, float *y, long first, long last, long places, long entries,
                    const int wide) {
    for (long start = 0; start < places; start += RUN) {
        const long end = start + RUN < places ? start + RUN : places;
        for (long n = first; n < last; n++) {
            float part = 0;
            for (long g = start; g < end; g++) part += table[g * entries + code(codes, n * places + g, wide)];
            y[n] = start ? y[n] + part : part;
        }
    }
}

/* y (tokens, rows) = x (tokens, places * length) times the vectors. `books` is (places or, where `shared`, 1, length,
 * entries), and `table` has room for (places, entries). One thread computes all of an entry, and of a row, for one token
 * after the other: results depend neither on the number of threads nor on the number of tokens. */
int fewbits_row_gemv(const float *x, const void *codes, const float *books, float *table, float *y, long tokens,
                     long rows, long places, long entries, long length, int shared, int wide, int threads) {
    for (long m = 0; m < tokens; m++, x += places * length, y += rows) {
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
        for (long g = 0; g < places; g++)
            for (long e = 0; e < entries; e += STEP)
                products(x + g * length, books + (shared ? 0 : g * length * entries) + e, table + g * entries + e,
                         length, entries);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (long first = 0; first < rows; first += BLOCK) {
            const long last = first + BLOCK < rows ? first + BLOCK : rows;
            if (wide) outputs(table, codes, y, first, last, places, entries, 1);
            else outputs(table, codes, y, first, last, places, entries, 0);
        }
    }
    return 0;
}

/* out (rows, places * length) float32, of `books` (places or 1, entries, length) */
int fewbits_row_dequantize(const void *codes, const float *books, float *out, long rows, long places, long entries,
                           long length, int shared, int wide, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < rows; n++)
        for (long g = 0; g < places; g++) {
            const long at = n * places + g;
            const float *value = books + ((shared ? 0 : g * entries) + code(codes, at, wide)) * length;
            switch (length) { /* a few floats are copied faster where their number is known */
            case 4: memcpy(out + at * 4, value, 4 * sizeof *out); break;
            case 8: memcpy(out + at * 8, value, 8 * sizeof *out); break;
            default: memcpy(out + at * length, value, length * sizeof *out);
            }
        }
    return 0;
}
