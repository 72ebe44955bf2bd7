/* Product of a few tokens with a matrix of codes of 1 to 4 bits that look values up, and dense float32 rows from such.
 *
 * Layout (see kernels/groups.py): row n is a dense little-endian bit stream of K codes in `words` words. A group of K/G
 * columns has its own table of 16 values, made from its numbers `coef` (N, terms, G), float16 or bfloat16, and rows of
 * `book` (kinds * terms, 16), where tables of fewer codes repeat: sum_p coef_p / whole * book[kind * terms + p].
 *
 * Sixteen codes next to one another are looked up at once, in a table that is a register or two: shift, look up,
 * multiply-add. One thread computes all of a row, so results depend neither on the number of threads nor on the number
 * of tokens.
 *
 * Written with GCC/Clang vector extensions, 64 bytes wide; AVX-512 and AVX2 look up by intrinsics.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define LANES 16
#define TOKENS 4 /* that share the decoding of a row */
#define SMALL_WORK (1L << 15) /* weights below which waking other threads costs more than they save */
#define SLACK 16 /* bytes that may be read beyond the codes of a row */
#define INLINE static inline __attribute__((always_inline))

typedef float f32v __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t u32v __attribute__((vector_size(64), aligned(4), may_alias));

typedef struct {
    const uint8_t *packed; /* (rows, words * 4) */
    const uint16_t *coef;  /* (rows, terms, groups) */
    const uint8_t *kind;   /* (rows, groups), or NULL */
    const float *book;     /* (kinds * terms, 16) */
    float whole;
    int brain; /* coef is bfloat16 */
    long rows, columns, groups, terms;
    int bits;
} Weight;

/* ---- tables ----------------------------------------------------------------------------------------------- */

INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE float half_to_float(uint16_t half) {
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    float value = from_bits(magnitude) * 0x1p112f; /* rebias the exponent; right for subnormals too */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (magnitude >= 0x0f800000) bits = magnitude | 0x7f800000; /* inf and NaN stay what they are */
    return from_bits(bits | (uint32_t)(half & 0x8000) << 16);
}

static void load_units(const Weight *w, long row, float *out) {
    const long count = w->terms * w->groups;
    const uint16_t *coef = w->coef + row * count;
    if (w->brain) for (long i = 0; i < count; i++) out[i] = from_bits((uint32_t)coef[i] << 16);
    else for (long i = 0; i < count; i++) out[i] = half_to_float(coef[i]);
    if (w->whole != 1) for (long i = 0; i < count; i++) out[i] /= w->whole;
}

INLINE f32v table_of(const Weight *w, const float *units, const uint8_t *kind, long group) {
    const float *book = w->book + (kind ? kind[group] : 0) * w->terms * LANES;
    f32v table = *(const f32v *)book * units[group];
    for (long p = 1; p < w->terms; p++) table += *(const f32v *)(book + p * LANES) * units[p * w->groups + group];
    return table;
}

/* Entries named by the low 4 bits of each lane. */
INLINE f32v look_up(f32v table, u32v index) {
#if defined(__AVX512F__)
    return (f32v)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#elif defined(__AVX2__)
    __m256 half[2], out[2];
    __m256i part[2];
    memcpy(half, &table, 64);
    memcpy(part, &index, 64);
    for (int i = 0; i < 2; i++)
        out[i] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(half[0], part[i]), _mm256_permutevar8x32_ps(half[1], part[i]),
                                  _mm256_castsi256_ps(_mm256_slli_epi32(part[i], 28)));
    f32v found;
    memcpy(&found, out, 64);
    return found;
#else
    f32v found;
    for (int l = 0; l < LANES; l++) found[l] = table[index[l] & 15];
    return found;
#endif
}

/* Sixteen codes from step `s` of a row on, in the low 4 bits of each lane: twice 8 codes, which are `bits` bytes. */
INLINE u32v codes_at(const uint8_t *row, long s, const int bits) {
#ifdef __AVX512VBMI__ /* byte 0 of each lane is any 8 bits of the 64 */
    typedef uint64_t u64v __attribute__((vector_size(64)));
    const u64v pair = {0, 2, 4, 6, 8, 10, 12, 14};
    const u64v from = (pair * bits) | ((pair + 1) * bits) << 32;
    uint64_t word;
    memcpy(&word, row + s * 2 * bits, 8);
    return (u32v)_mm512_multishift_epi64_epi8((__m512i)from, _mm512_set1_epi64((int64_t)word));
#else
    const u32v shift = {0, bits, 2 * bits, 3 * bits, 4 * bits, 5 * bits, 6 * bits, 7 * bits,
                        0, bits, 2 * bits, 3 * bits, 4 * bits, 5 * bits, 6 * bits, 7 * bits};
    uint32_t low, high;
    memcpy(&low, row + s * 2 * bits, 4);
    memcpy(&high, row + s * 2 * bits + bits, 4);
    const u32v words = {low, low, low, low, low, low, low, low, high, high, high, high, high, high, high, high};
    return words >> shift;
#endif
}

INLINE uint32_t code_at(const uint8_t *row, long k, int bits) {
    uint16_t word;
    memcpy(&word, row + k * bits / 8, 2);
    return word >> (k * bits % 8); /* tables repeat, so bits above need no mask but that of 16 */
}

INLINE float sum_lanes(f32v v) {
    typedef float f32x4 __attribute__((vector_size(16)));
    f32x4 q[4];
    memcpy(q, &v, sizeof(v));
    const f32x4 sum = (q[0] + q[2]) + (q[1] + q[3]);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

/* ---- rows ------------------------------------------------------------------------------------------------- */

static long row_bytes(const Weight *w) { return (w->columns * w->bits + 31) / 32 * 4; }

static long steps_of(const Weight *w) { return (w->columns + LANES - 1) / LANES; }

/* Codes of a row that may be read a little beyond its end: where that is beyond all rows, a copy. */
static const uint8_t *readable(const Weight *w, long row, uint8_t *copy) {
    const long bytes = row_bytes(w), needed = steps_of(w) * 2 * w->bits + SLACK;
    const uint8_t *own = w->packed + row * bytes;
    if ((w->rows - row) * bytes >= needed) return own;
    memset(copy, 0, needed);
    memcpy(copy, own, bytes);
    return copy;
}

/* y[m] = row . x[m] of `tokens` tokens `stride` apart; x is padded to whole steps. */
INLINE void row_product(const Weight *w, const uint8_t *row, const float *units, const uint8_t *kind, const float *x,
                        long stride, const int bits, const int tokens, float *y) {
    f32v even[TOKENS], odd[TOKENS]; /* two sums, so that one need not wait for the other */
    for (int m = 0; m < tokens; m++) even[m] = odd[m] = (f32v){0};
    const long size = w->groups == 1 ? steps_of(w) : w->columns / w->groups / LANES;
    const int single = w->terms == 1 && !kind; /* all groups share a table but for a factor */
    const f32v shared = *(const f32v *)w->book;
    long g = 0, s = 0;
    if (single && size == 1) { /* then every step has a factor of its own */
        for (; g + 2 <= w->groups; g += 2) {
            const f32v a = look_up(shared, codes_at(row, g, bits)) * units[g];
            const f32v b = look_up(shared, codes_at(row, g + 1, bits)) * units[g + 1];
            for (int m = 0; m < tokens; m++) {
                even[m] += a * *(const f32v *)(x + m * stride + g * LANES);
                odd[m] += b * *(const f32v *)(x + m * stride + (g + 1) * LANES);
            }
        }
        s = g;
    }
    for (; g < w->groups; g++) {
        f32v table;
        if (single) table = shared * units[g];
        else table = table_of(w, units, kind, g);
        long i = 0;
        for (; i + 2 <= size; i += 2, s += 2) {
            const f32v a = look_up(table, codes_at(row, s, bits)), b = look_up(table, codes_at(row, s + 1, bits));
            for (int m = 0; m < tokens; m++) {
                even[m] += a * *(const f32v *)(x + m * stride + s * LANES);
                odd[m] += b * *(const f32v *)(x + m * stride + (s + 1) * LANES);
            }
        }
        if (i < size) {
            const f32v a = look_up(table, codes_at(row, s, bits));
            for (int m = 0; m < tokens; m++) even[m] += a * *(const f32v *)(x + m * stride + s * LANES);
            s++;
        }
    }
    for (int m = 0; m < tokens; m++) y[m] = sum_lanes(even[m] + odd[m]);
}

#define ROWS_OF(B)                                                                                                   \
    static void row_tokens_##B(const Weight *w, const uint8_t *row, const float *units, const uint8_t *kind,         \
                               const float *x, long stride, long tokens, float *y) {                                 \
        long m = 0;                                                                                                  \
        for (; m + 4 <= tokens; m += 4) row_product(w, row, units, kind, x + m * stride, stride, B, 4, y + m);       \
        if (tokens - m >= 2) { row_product(w, row, units, kind, x + m * stride, stride, B, 2, y + m); m += 2; }      \
        if (tokens - m) row_product(w, row, units, kind, x + m * stride, stride, B, 1, y + m);                       \
    }
ROWS_OF(1) ROWS_OF(2) ROWS_OF(3) ROWS_OF(4)

typedef void (*RowTokens)(const Weight *, const uint8_t *, const float *, const uint8_t *, const float *, long, long,
                          float *);
static const RowTokens ROW_TOKENS[5] = {0, row_tokens_1, row_tokens_2, row_tokens_3, row_tokens_4};

INLINE void decode_steps(const Weight *w, const uint8_t *row, const float *units, const uint8_t *kind, const int bits,
                         float *out) {
    const long size = w->columns / w->groups;
    for (long g = 0, start = 0; g < w->groups; g++, start += size) {
        const f32v table = table_of(w, units, kind, g);
        for (long k = start; k < start + size; k += LANES) { /* whole steps, except at the end of a ragged row */
            const f32v values = look_up(table, codes_at(row, k / LANES, bits));
            if (k + LANES <= start + size) *(f32v *)(out + k) = values;
            else memcpy(out + k, &values, (start + size - k) * sizeof(float));
        }
    }
}

/* `out (columns)` of groups of any size. */
static void decode_row(const Weight *w, const uint8_t *row, const float *units, const uint8_t *kind, float *out) {
    const long size = w->columns / w->groups;
    if (w->groups == 1 || size % LANES == 0) {
        switch (w->bits) {
#define DECODE(B) case B: decode_steps(w, row, units, kind, B, out); break;
            DECODE(1) DECODE(2) DECODE(3) DECODE(4)
        }
        return;
    }
    for (long g = 0, k = 0; g < w->groups; g++) {
        float table[LANES];
        const f32v values = table_of(w, units, kind, g);
        memcpy(table, &values, sizeof(table));
        for (const long end = k + size; k < end; k++) out[k] = table[code_at(row, k, w->bits) & 15];
    }
}

static float dot(const float *a, const float *b, long count) {
    f32v total = {0};
    long k = 0;
    for (; k + LANES <= count; k += LANES) total += *(const f32v *)(a + k) * *(const f32v *)(b + k);
    float rest = 0;
    for (; k < count; k++) rest += a[k] * b[k];
    return sum_lanes(total) + rest;
}

/* ---- entry points: 0, or -1 when memory ran out ----------------------------------------------------------- */

/* With y (tokens, rows), the products with x (tokens, columns); with NULL for x, y is the dense (rows, columns). */
static int over_rows(const Weight *w, const float *x, long stride, long tokens, float *y, int threads) {
    const int by_steps = w->groups == 1 || w->columns / w->groups % LANES == 0;
    const long floats = w->terms * w->groups + (x && !by_steps ? w->columns : tokens);
    int failed = 0;
    if (w->rows * w->columns < SMALL_WORK) threads = 1;
#pragma omp parallel num_threads(threads)
    {
        float *units = malloc(floats * sizeof(float) + steps_of(w) * 2 * w->bits + SLACK);
        float *rest = units + w->terms * w->groups;
        if (!units) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (long n = 0; n < w->rows; n++) {
            if (!units) continue;
            const uint8_t *row = readable(w, n, (uint8_t *)(units + floats));
            const uint8_t *kind = w->kind ? w->kind + n * w->groups : 0;
            load_units(w, n, units);
            if (!x) {
                decode_row(w, row, units, kind, y + n * w->columns);
            } else if (by_steps) {
                ROW_TOKENS[w->bits](w, row, units, kind, x, stride, tokens, rest);
                for (long m = 0; m < tokens; m++) y[m * w->rows + n] = rest[m];
            } else {
                decode_row(w, row, units, kind, rest);
                for (long m = 0; m < tokens; m++) y[m * w->rows + n] = dot(rest, x + m * stride, w->columns);
            }
        }
        free(units);
    }
    return failed ? -1 : 0;
}

#define WEIGHT {packed, coef, kind, book, whole, brain, rows, columns, groups, terms, bits}

/* y (tokens, rows) = x (tokens, stride), which is padded with zeros to whole steps of 16 columns, times the weight. */
int fewbits_group_gemv(const float *x, const uint8_t *packed, const uint16_t *coef, const uint8_t *kind,
                       const float *book, float whole, int brain, float *y, long tokens, long stride, long rows,
                       long columns, long groups, long terms, int bits, int threads) {
    const Weight w = WEIGHT;
    return over_rows(&w, x, stride, tokens, y, threads);
}

/* out (rows, columns) float32 */
int fewbits_group_dequantize(const uint8_t *packed, const uint16_t *coef, const uint8_t *kind, const float *book,
                             float whole, int brain, float *out, long rows, long columns, long groups, long terms,
                             int bits, int threads) {
    const Weight w = WEIGHT;
    return over_rows(&w, 0, 0, 0, out, threads);
}
