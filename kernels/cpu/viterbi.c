/* Search of the best path through a bit-shift trellis (Viterbi); formats/trellis.py says what the codes mean.
 *
 * Compiled without contraction of products and sums, so that it makes the very choices of its counterpart in torch.
 * Written with GCC/Clang vector extensions, 64 bytes wide.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define TILE 256 /* values that one circular string of bits stands for */
#define INLINE static inline __attribute__((always_inline))

typedef float f32v __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i32v __attribute__((vector_size(64), may_alias));

INLINE f32v lesser(f32v a, f32v b) {
#ifdef __AVX512F__
    return (f32v)_mm512_min_ps((__m512)a, (__m512)b);
#else
    const i32v less = (i32v)(a < b);
    return (f32v)(((i32v)a & less) | ((i32v)b & ~less));
#endif
}

/* An edge is what two neighbouring states share: the upper bits of the later one, the lower bits of the earlier one.
 * cost[e]: of the best path that ends in edge e. next[e] = min over j of cost[s >> k] + (f[s] - x)^2 with
 * s = j * edges + e, the states that e may continue from. */
INLINE void advance(const float *f, const float *cost, float x, float *next, const int k, long edges) {
    const i32v spread = {0 >> k, 1 >> k, 2 >> k,  3 >> k,  4 >> k,  5 >> k,  6 >> k,  7 >> k,
                         8 >> k, 9 >> k, 10 >> k, 11 >> k, 12 >> k, 13 >> k, 14 >> k, 15 >> k};
    for (long e = 0; e < edges; e += LANES) {
        f32v best;
#pragma GCC unroll 16
        for (int j = 0; j < 1 << k; j++) {
            const long s = j * edges + e;
            const f32v error = *(const f32v *)(f + s) - x;
            const f32v total = __builtin_shuffle(*(const f32v *)(cost + (s >> k)), spread) + error * error;
            best = j ? lesser(total, best) : total;
        }
        *(f32v *)(next + e) = best;
    }
}

/* Costs of every edge before and after each value; a row of them is `edges` floats and a margin for whole vectors. */
static void forward(const float *f, const float *x, int k, long edges, float *cost) {
    const long stride = edges + LANES;
    for (long t = 0; t < TILE; t++, cost += stride) switch (k) {
#define CASE(K) case K: advance(f, cost, x[t], cost + stride, K, edges); break;
        CASE(1) CASE(2) CASE(3) CASE(4)
    }
}

/* Follow the best path from edge e after value TILE - 1 back to before value `first`; returns the edge there. */
static long backward(const float *f, const float *x, long first, int k, long edges, const float *cost, long e,
                     uint8_t *codes) {
    const long stride = edges + LANES;
    for (long t = TILE - 1; t >= first; t--) {
        const float *before = cost + t * stride;
        float best = 0;
        long state = 0;
        for (long j = 0; j < 1 << k; j++) {
            const long s = j * edges + e;
            const float error = f[s] - x[t], total = before[s >> k] + error * error;
            if (j == 0 || total < best) best = total, state = s;
        }
        if (codes) codes[t] = (uint8_t)(state & ((1 << k) - 1));
        e = state >> k;
    }
    return e;
}

/* Codes of `tiles` tiles; 0, or -1 when memory ran out. The string is circular, so the path must end in the edge that
 * it starts from: a free search over the tile turned by half a round finds the edge, a second one is bound to it. */
int fewbits_viterbi(const float *values, const float *f, uint8_t *codes, long tiles, int bits, int k,
                           int threads) {
    const long edges = 1L << (bits - k), stride = edges + LANES;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *cost = calloc((TILE + 1) * stride, sizeof(float));
        if (!cost) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (long i = 0; i < tiles; i++) {
            if (!cost) continue;
            const float *x = values + i * TILE;
            float turned[TILE];
            for (long t = 0; t < TILE; t++) turned[t] = x[(t + TILE / 2) % TILE];
            memset(cost, 0, edges * sizeof(float));
            forward(f, turned, k, edges, cost);
            const float *end = cost + TILE * stride;
            long e = 0;
            for (long other = 1; other < edges; other++) if (end[other] < end[e]) e = other;
            const long seam = backward(f, turned, TILE / 2, k, edges, cost, e, 0);
            for (long other = 0; other < edges; other++) cost[other] = other == seam ? 0 : INFINITY;
            forward(f, x, k, edges, cost);
            backward(f, x, 0, k, edges, cost, seam, codes + i * TILE);
        }
        free(cost);
    }
    return failed ? -1 : 0;
}
