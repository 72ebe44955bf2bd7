/* Product of a few tokens with a matrix of packed integer codes, and dense float32 rows from such codes.
 *
 * Layout (see quant/bitpack.py): row n is a dense little-endian bit stream of K codes of `bits` bits in
 * ceil(K*bits/32) words; `scale` (N, G) float16, bfloat16 or float32 and `zero` (N, G) uint8 (NULL: 2^(bits-1))
 * belong to groups of K/G columns. value = scale * (code - zero).
 *
 * The product never expands a row. Sixteen lanes each own one *run* of consecutive columns: the codes of one word
 * where bits divides 32, else 32 codes in `bits` words. Code j of every lane is then the same shift of the same
 * register, so a step over 16 weights is shift, look up, multiply-add. x is permuted once per call to match, and the
 * scale is applied once per run (a run lies in one group). One thread computes all of a row, so results depend
 * neither on the number of threads nor on the number of tokens.
 *
 * Written with GCC/Clang vector extensions, 64 bytes wide: AVX-512 takes one register, AVX2 two, NEON and SSE four.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define MAX_WORDS 8
#define TOKENS 4 /* tokens that share the decoding of a row */
#define SMALL_WORK (1L << 15) /* weights below which waking other threads costs more than they save */
#define INLINE static inline __attribute__((always_inline))

typedef float f32v __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t u32v __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint64_t u64x8 __attribute__((vector_size(64)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef float f32x8 __attribute__((vector_size(32), aligned(4), may_alias));

enum { SCALE_F16 = 0, SCALE_BF16 = 1, SCALE_F32 = 2 };

typedef struct {
    const float *x;       /* (tokens, tiles, run, LANES): x permuted to the order in which codes come out */
    const float *sums;    /* (tokens, tiles, LANES): sum of x over each run */
    const int32_t *group; /* (tiles): group of lane 0 */
    const int32_t *lane;  /* (tiles, LANES): group of each lane, counted from that of lane 0 */
    long tiles, words, run;
} Plan;

/* ---- parameters ------------------------------------------------------------------------------------------- */

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

INLINE void load_scales(const void *scale, int kind, long row, long groups, float *out) {
    const uint16_t *narrow = (const uint16_t *)scale + row * groups;
    if (kind == SCALE_F32) memcpy(out, (const float *)scale + row * groups, groups * sizeof(float));
    else if (kind == SCALE_BF16) for (long g = 0; g < groups; g++) out[g] = from_bits((uint32_t)narrow[g] << 16);
    else for (long g = 0; g < groups; g++) out[g] = half_to_float(narrow[g]);
}

/* ---- product ---------------------------------------------------------------------------------------------- */

/* Code minus 2^(bits-1) of the lowest `bits` bits of each lane, exactly. */
INLINE f32v centred(u32v raw, const int bits) {
#ifdef __AVX512F__
    if (bits <= 4) { /* the look-up reads 4 bits of its index: no mask is needed, the table repeats instead */
        const float h = (float)(1 << (bits - 1));
        const int m = (1 << bits) - 1;
        const f32v table = {0 - h, (1 & m) - h, (2 & m) - h, (3 & m) - h, (4 & m) - h, (5 & m) - h,
                            (6 & m) - h, (7 & m) - h, (8 & m) - h, (9 & m) - h, (10 & m) - h, (11 & m) - h,
                            (12 & m) - h, (13 & m) - h, (14 & m) - h, (15 & m) - h};
        return (f32v)_mm512_permutexvar_ps((__m512i)raw, (__m512)table);
    }
#endif
    /* 2^23 + code as a float has the code in its low bits: no conversion instruction */
    u32v bits_of = (raw & ((1u << bits) - 1)) | 0x4b000000u;
    return (f32v)bits_of - (8388608.0f + (float)(1 << (bits - 1)));
}

/* Sixteen consecutive words from `from`; those beyond the end of the row read as 0. */
INLINE u32v load_words(const uint32_t *row, long from, long words) {
    const long left = words - from;
    if (left >= LANES) return *(const u32v *)(row + from);
#ifdef __AVX512F__ /* a memcpy of variable length here costs as much as a whole tile */
    return (u32v)_mm512_maskz_loadu_epi32(left > 0 ? (__mmask16)((1u << left) - 1) : 0, row + from);
#else
    u32v out = {0};
    if (left > 0) memcpy(&out, row + from, left * sizeof(uint32_t));
    return out;
#endif
}

/* out[w] = word w of each lane's run in tile t, where a run is `stride` words. */
INLINE void lane_words(const uint32_t *row, long t, long words, const int stride, u32v *out) {
    u32v loaded[MAX_WORDS];
#pragma GCC unroll 8
    for (int i = 0; i < stride; i++) loaded[i] = load_words(row, (t * stride + i) * LANES, words);
    if (stride == 1) {
        out[0] = loaded[0];
        return;
    }
#pragma GCC unroll 8
    for (int w = 0; w < stride; w++) {
#ifdef __AVX512F__ /* lane l wants word l*stride + w: permutations read the low 4 bits, masks choose by the rest */
        const u32v lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const u32v index = lanes * stride + w;
        __m512i picked = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int i = 0; i < stride; i++) {
            const __mmask16 mask = _mm512_cmpeq_epi32_mask((__m512i)(index >> 4), _mm512_set1_epi32(i));
            picked = _mm512_mask_permutexvar_epi32(picked, mask, (__m512i)index, (__m512i)loaded[i]);
        }
        out[w] = (u32v)picked;
#else
        for (int l = 0; l < LANES; l++) out[w][l] = loaded[(l * stride + w) / LANES][(l * stride + w) % LANES];
#endif
    }
}

/* Scales (or scaled zero points) of the 16 lanes of tile t from those of the row's groups. */
INLINE f32v lane_params(const float *row, const Plan *plan, long t) {
#ifdef __AVX512F__
    const __m512i index = _mm512_loadu_si512(plan->lane + t * LANES);
    return (f32v)_mm512_permutexvar_ps(index, _mm512_loadu_ps(row + plan->group[t]));
#else
    f32v out;
    for (int l = 0; l < LANES; l++) out[l] = row[plan->group[t] + plan->lane[t * LANES + l]];
    return out;
#endif
}

INLINE float sum_lanes(f32v v) {
    typedef float f32x4 __attribute__((vector_size(16)));
    f32x4 q[4];
    memcpy(q, &v, sizeof(v));
    const f32x4 sum = (q[0] + q[2]) + (q[1] + q[3]);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

/* y[m] = row . x[m] for `tokens` tokens from token `first`. `bits` and `tokens` are constants after inlining. */
INLINE void row_product(const uint32_t *row, const Plan *plan, const float *scale, const float *offset, long first,
                        const int bits, const int tokens, float *y) {
    const int stride = 32 % bits ? bits : 1;
    const int run = 32 * stride / bits;
    const long tile_size = (long)run * LANES, token_size = plan->tiles * tile_size;
    const float *x = plan->x + first * token_size;
    const float *sums = plan->sums + first * plan->tiles * LANES;
    f32v total[TOKENS];
    for (int m = 0; m < tokens; m++) total[m] = (f32v){0};
    for (long t = 0; t < plan->tiles; t++, x += tile_size, sums += LANES) {
        u32v words[MAX_WORDS];
        f32v part[TOKENS];
        lane_words(row, t, plan->words, stride, words);
        for (int m = 0; m < tokens; m++) part[m] = (f32v){0};
#pragma GCC unroll 32
        for (int j = 0; j < run; j++) {
            const int word = j * bits / 32, shift = j * bits % 32;
            u32v raw = words[word] >> shift;
            if (shift + bits > 32) raw |= words[word + 1] << (32 - shift);
            const f32v value = centred(raw, bits);
            for (int m = 0; m < tokens; m++) part[m] += value * *(const f32v *)(x + m * token_size + j * LANES);
        }
        const f32v s = lane_params(scale, plan, t);
        for (int m = 0; m < tokens; m++) total[m] += s * part[m];
        if (offset) {
            const f32v z = lane_params(offset, plan, t);
            for (int m = 0; m < tokens; m++) total[m] -= z * *(const f32v *)(sums + m * plan->tiles * LANES);
        }
    }
    for (int m = 0; m < tokens; m++) y[m] = sum_lanes(total[m]);
}

#define ROWS_OF(B)                                                                                                   \
    static void row_tokens_##B(const uint32_t *row, const Plan *plan, const float *scale, const float *offset,       \
                               long tokens, float *y) {                                                              \
        long m = 0;                                                                                                  \
        for (; m + 4 <= tokens; m += 4) row_product(row, plan, scale, offset, m, B, 4, y + m);                       \
        if (tokens - m >= 2) { row_product(row, plan, scale, offset, m, B, 2, y + m); m += 2; }                      \
        if (tokens - m) row_product(row, plan, scale, offset, m, B, 1, y + m);                                       \
    }
ROWS_OF(1) ROWS_OF(2) ROWS_OF(3) ROWS_OF(4) ROWS_OF(5) ROWS_OF(6) ROWS_OF(7) ROWS_OF(8)

typedef void (*RowTokens)(const uint32_t *, const Plan *, const float *, const float *, long, float *);
static const RowTokens ROW_TOKENS[9] = {0,           row_tokens_1, row_tokens_2, row_tokens_3, row_tokens_4,
                                        row_tokens_5, row_tokens_6, row_tokens_7, row_tokens_8};

static void permute_tokens(const float *x, long tokens, long columns, const Plan *plan, float *out, float *sums) {
    for (long m = 0; m < tokens; m++, x += columns)
        for (long t = 0; t < plan->tiles; t++, out += plan->run * LANES, sums += LANES)
            for (long l = 0; l < LANES; l++) {
                const long start = (t * LANES + l) * plan->run;
                float sum = 0;
                for (long j = 0; j < plan->run; j++) {
                    const float value = start + j < columns ? x[start + j] : 0;
                    out[j * LANES + l] = value;
                    sum += value;
                }
                sums[l] = sum;
            }
}

/* ---- dense rows ------------------------------------------------------------------------------------------- */

/* Codes of a row as floats. Eight codes are exactly `bits` bytes, so one 64-bit word holds them at fixed shifts. */
INLINE void decode_codes(const uint8_t *row, long bytes, long columns, const int bits, float *out) {
    const u64x8 shift = {0, bits, 2 * bits, 3 * bits, 4 * bits, 5 * bits, 6 * bits, 7 * bits};
    for (long k = 0; k < columns; k += 8, row += bits, bytes -= bits) {
        uint64_t word = 0;
        memcpy(&word, row, bytes < 8 ? bytes : 8);
        const u64x8 codes = ((u64x8){0} + word) >> shift & ((1u << bits) - 1);
        const f32x8 values = __builtin_convertvector((i32x8)__builtin_convertvector(codes, u32x8), f32x8);
        if (k + 8 <= columns) *(f32x8 *)(out + k) = values;
        else memcpy(out + k, &values, (columns - k) * sizeof(float));
    }
}

static void dequantize_row(const uint32_t *row, long words, const float *scale, const uint8_t *zero, long columns,
                           long groups, int bits, float *out) {
    const uint8_t *bytes = (const uint8_t *)row;
    switch (bits) {
#define DECODE(B) case B: decode_codes(bytes, words * 4, columns, B, out); break;
        DECODE(1) DECODE(2) DECODE(3) DECODE(4) DECODE(5) DECODE(6) DECODE(7) DECODE(8)
    }
    const long size = columns / groups;
    for (long g = 0; g < groups; g++, out += size) {
        const float z = zero ? zero[g] : (float)(1 << (bits - 1)), s = scale[g];
        for (long k = 0; k < size; k++) out[k] = (out[k] - z) * s;
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

int fewbits_dequantize(const uint32_t *packed, const void *scale, int kind, const uint8_t *zero, float *out,
                       long rows, long columns, long groups, int bits, int threads) {
    const long words = (columns * bits + 31) / 32;
    int failed = 0;
    if (rows * columns < SMALL_WORK) threads = 1;
#pragma omp parallel num_threads(threads)
    {
        float *scales = malloc(groups * sizeof(float));
        if (!scales) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (long n = 0; n < rows; n++) {
            if (!scales) continue;
            load_scales(scale, kind, n, groups, scales);
            dequantize_row(packed + n * words, words, scales, zero ? zero + n * groups : 0, columns, groups, bits,
                           out + n * columns);
        }
        free(scales);
    }
    return failed ? -1 : 0;
}

/* Permuted x, its sums and the lane tables in one block that the caller frees; NULL when memory ran out. */
static void *make_plan(const float *x, long tokens, long columns, long groups, int bits, Plan *plan) {
    const long stride = 32 % bits ? bits : 1, size = columns / groups;
    plan->run = 32 * stride / bits;
    plan->words = (columns * bits + 31) / 32;
    plan->tiles = (columns + plan->run * LANES - 1) / (plan->run * LANES);
    const long lanes = plan->tiles * LANES;
    float *block = malloc((tokens * lanes * (plan->run + 1) + lanes + plan->tiles) * sizeof(float));
    if (!block) return 0;
    float *sums = block + tokens * lanes * plan->run;
    int32_t *lane = (int32_t *)(sums + tokens * lanes), *group = lane + lanes;
    for (long l = 0; l < lanes; l++) {
        const long own = l * plan->run / size;
        if (l % LANES == 0) group[l / LANES] = (int32_t)(own < groups ? own : groups - 1);
        lane[l] = (int32_t)(own < groups ? own : groups - 1) - group[l / LANES];
    }
    permute_tokens(x, tokens, columns, plan, block, sums);
    plan->x = block, plan->sums = sums, plan->lane = lane, plan->group = group;
    return block;
}

int fewbits_gemv(const float *x, const uint32_t *packed, const void *scale, int kind, const uint8_t *zero, float *y,
                 long tokens, long rows, long columns, long groups, int bits, int threads) {
    const long run = 32 % bits ? 32 : 32 / bits, words = (columns * bits + 31) / 32;
    const int by_runs = groups == 1 || columns / groups % run == 0; /* else a run straddles groups: dense rows */
    Plan plan = {0};
    void *block = by_runs ? make_plan(x, tokens, columns, groups, bits, &plan) : 0;
    int failed = by_runs && !block;
    if (rows * columns < SMALL_WORK) threads = 1;
#pragma omp parallel num_threads(threads)
    {
        /* 16 floats beyond the last group are read (and not used) by lane_params */
        float *scales = calloc(2 * (groups + LANES) + (by_runs ? tokens : columns), sizeof(float));
        float *offsets = scales + groups + LANES, *rest = offsets + groups + LANES;
        if (!scales) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (long n = 0; n < rows; n++) {
            if (!scales || (by_runs && !block)) continue;
            const uint8_t *z = zero ? zero + n * groups : 0;
            load_scales(scale, kind, n, groups, scales);
            if (by_runs) {
                if (z) for (long g = 0; g < groups; g++) offsets[g] = scales[g] * (float)(z[g] - (1 << (bits - 1)));
                ROW_TOKENS[bits](packed + n * words, &plan, scales, z ? offsets : 0, tokens, rest);
                for (long m = 0; m < tokens; m++) y[m * rows + n] = rest[m];
            } else {
                dequantize_row(packed + n * words, words, scales, z, columns, groups, bits, rest);
                for (long m = 0; m < tokens; m++) y[m * rows + n] = dot(rest, x + m * columns, columns);
            }
        }
        free(scales);
    }
    free(block);
    return failed ? -1 : 0;
}
