/* Product of a few tokens with a matrix of bit-shift trellis codes, and dense float32 rows from such codes.
 *
 * A tile is 32 rows by 8 columns of the weight, 256 values in the order t = 32 * column + row. Its codes are a
 * circular string of bits, k new ones for each value; the last `bits` bits up to and including those of value t are
 * its state, and a hash of the state its value (quant/formats/trellis.py). The string is stored in 8k words, the first
 * bit in the highest place.
 *
 * Written with GCC/Clang vector extensions.
 */
#include <stdint.h>
#include <string.h>

#define ROWS 32 /* of a tile */
#define COLUMNS 8
#define TOKENS 4 /* that share the decoding of a tile */
#define INLINE static inline __attribute__((always_inline))

typedef uint64_t u64x8 __attribute__((vector_size(64)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef float f32x8 __attribute__((vector_size(32), aligned(4), may_alias));

/* The bytes of a tile's string in order, behind a copy of the last eight. */
INLINE void open_tile(const uint32_t *words, const int k, uint8_t *bytes) {
    uint32_t *out = (uint32_t *)(bytes + 8);
    for (int w = 0; w < 8 * k; w++) out[w] = __builtin_bswap32(words[w]);
    memcpy(bytes, bytes + 32 * k, 8);
}

/* Values 8g to 8g + 7 of a tile in units of the codebook's step: the bytes of a hash of the state, added up. */
INLINE f32x8 decode8(const uint8_t *bytes, int g, const int k, int bits) {
    uint64_t window;
    memcpy(&window, bytes + (g + 1) * k, 8); /* ends with the bits of value 8g + 7 */
    const u64x8 shift = {7 * k, 6 * k, 5 * k, 4 * k, 3 * k, 2 * k, k, 0};
    const u64x8 states = ((u64x8){0} + __builtin_bswap64(window)) >> shift & ((1u << bits) - 1);
    const u32x8 hash = __builtin_convertvector(states, u32x8) * 0x83DCD12Du;
    const u32x8 pairs = (hash & 0x00FF00FFu) + (hash >> 8 & 0x00FF00FFu);
    return __builtin_convertvector((i32x8)((pairs + (pairs >> 16)) & 0x7FFu) - 510, f32x8);
}

INLINE void product(const uint32_t *packed, const float *x, float *y, long tokens_stride_y, long columns,
                    const int tokens, const int k, int bits, float step) {
    f32x8 sum[TOKENS][4] = {0};
    _Alignas(64) uint8_t bytes[8 + 32 * 4 + 64];
    for (long c = 0; c < columns; c += COLUMNS, packed += 8 * k) {
        f32x8 part[TOKENS][4] = {0};
        open_tile(packed, k, bytes);
#pragma GCC unroll 8
        for (int i = 0; i < COLUMNS; i++)
#pragma GCC unroll 4
            for (int g = 0; g < 4; g++) {
                const f32x8 value = decode8(bytes, i * 4 + g, k, bits);
                for (int m = 0; m < tokens; m++) part[m][g] += value * x[m * columns + c + i];
            }
        for (int m = 0; m < tokens; m++) for (int g = 0; g < 4; g++) sum[m][g] += part[m][g];
    }
    for (int m = 0; m < tokens; m++)
        for (int g = 0; g < 4; g++) *(f32x8 *)(y + m * tokens_stride_y + 8 * g) = sum[m][g] * step;
}

#define PRODUCTS(K)                                                                                                  \
    static void product_##K(const uint32_t *packed, const float *x, float *y, long rows, long columns, long tokens,  \
                            int bits, float step) {                                                                  \
        long m = 0;                                                                                                  \
        for (; m + 4 <= tokens; m += 4)                                                                              \
            product(packed, x + m * columns, y + m * rows, rows, columns, 4, K, bits, step);                         \
        for (; m + 2 <= tokens; m += 2)                                                                              \
            product(packed, x + m * columns, y + m * rows, rows, columns, 2, K, bits, step);                         \
        if (m < tokens) product(packed, x + m * columns, y + m * rows, rows, columns, 1, K, bits, step);             \
    }
PRODUCTS(1) PRODUCTS(2) PRODUCTS(3) PRODUCTS(4)

/* y (tokens, rows) = x (tokens, columns) times the codes `packed` (rows / 32, columns / 8, 8k). One thread computes
 * all of a row, so results depend neither on the number of threads nor on the number of tokens. */
int fewbits_trellis_gemv(const float *x, const uint32_t *packed, float *y, long tokens, long rows, long columns, int k,
                         int bits, float step, int threads) {
    const long tile_row = columns / COLUMNS * 8 * k;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < rows; n += ROWS) switch (k) {
#define RUN(K) case K: product_##K(packed + n / ROWS * tile_row, x, y + n, rows, columns, tokens, bits, step); break;
        RUN(1) RUN(2) RUN(3) RUN(4)
    }
    return 0;
}

/* out (rows, columns) float32 */
int fewbits_trellis_dequantize(const uint32_t *packed, float *out, long rows, long columns, int k, int bits, float step,
                               int threads) {
    const long tile_row = columns / COLUMNS * 8 * k;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < rows; n += ROWS) {
        const uint32_t *tile = packed + n / ROWS * tile_row;
        _Alignas(64) uint8_t bytes[8 + 32 * 4 + 64];
        for (long c = 0; c < columns; c += COLUMNS, tile += 8 * k) {
            open_tile(tile, k, bytes);
            for (int i = 0; i < COLUMNS; i++)
                for (int g = 0; g < 4; g++) {
                    const f32x8 value = decode8(bytes, i * 4 + g, k, bits) * step;
                    for (int l = 0; l < 8; l++) out[(n + 8 * g + l) * columns + c + i] = value[l];
                }
        }
    }
    return 0;
}
