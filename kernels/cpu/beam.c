/* Search of sums of codebook entries that come closest to vectors; quant/beam.py says what the codes mean.
 *
 * With half[e] = |c_e|^2 / 2 - x . c_e, half the squared distance of x to a sum of entries is, but for |x|^2 / 2, the sum of
 * their halves and of the products of each pair. All entries are numbered through, stage after stage.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define STAGES 4
#define BLOCK 16
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    float score;
    int32_t codes[STAGES];
} Partial;

/* Put one more partial sum into the sorted list, which keeps `beam` of them; returns what a better one must be below. */
INLINE float keep(Partial *list, int *length, int beam, Partial one) {
    int i = *length < beam ? (*length)++ : beam - 1;
    for (; i > 0 && list[i - 1].score > one.score; i--) list[i] = list[i - 1];
    list[i] = one;
    return *length < beam ? __builtin_inff() : list[beam - 1].score;
}

/* Partial sums of one stage more: `from` with each of its entries, the `beam` best of them into `into`. */
static int extend(const Partial *from, int length, Partial *into, int beam, const float *half, const float *products,
                  long all, int stage, long entries) {
    int found = 0;
    float worst = __builtin_inff();
    for (int p = 0; p < length; p++) {
        const float *row[STAGES], base = from[p].score;
        for (int s = 0; s < stage; s++) row[s] = products + from[p].codes[s] * all + stage * entries;
        for (long start = 0; start < entries; start += BLOCK) {
            float score[BLOCK];
            int any = 0;
            for (int i = 0; i < BLOCK; i++) score[i] = base + half[stage * entries + start + i];
            for (int s = 0; s < stage; s++) for (int i = 0; i < BLOCK; i++) score[i] += row[s][start + i];
            for (int i = 0; i < BLOCK; i++) any |= score[i] < worst;
            if (!any) continue;
            for (int i = 0; i < BLOCK; i++) if (score[i] < worst) {
                Partial one = from[p];
                one.score = score[i], one.codes[stage] = (int32_t)(stage * entries + start + i);
                worst = keep(into, &found, beam, one);
            }
        }
    }
    return found;
}

/* Each stage takes the best entry given the others, at most 3 times round. */
static void polish(int32_t *codes, const float *half, const float *products, long all, int stages, long entries) {
    for (int round = 0, moved = 1; round < 3 && moved; round++) {
        moved = 0;
        for (int m = 0; m < stages; m++) {
            float least = __builtin_inff();
            int32_t best = codes[m];
            for (long e = m * entries; e < (m + 1) * entries; e++) {
                float score = half[e];
                for (int s = 0; s < stages; s++) if (s != m) score += products[codes[s] * all + e];
                if (score < least) least = score, best = (int32_t)e;
            }
            moved |= best != codes[m];
            codes[m] = best;
        }
    }
}

/* Codes (count, stages), numbered within their stage, of vectors (count, d).
 *
 * books: (d, stages * entries), norms: (stages * entries) halves of squared lengths, products: (stages * entries)^2.
 * entries is a multiple of 16. Returns -1 when memory ran out. */
int fewbits_beam(const float *vectors, const float *books, const float *norms, const float *products, int32_t *codes,
                 long count, int stages, long entries, long d, int beam, int threads) {
    const long all = stages * entries;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *half = malloc(all * sizeof(float));
        Partial *lists = malloc(2 * beam * sizeof(Partial));
        if (!half || !lists) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (long v = 0; v < count; v++) {
            if (!half || !lists) continue;
            memcpy(half, norms, all * sizeof(float));
            for (long i = 0; i < d; i++) {
                const float x = vectors[v * d + i];
                for (long e = 0; e < all; e++) half[e] -= x * books[i * all + e];
            }
            Partial *from = lists, *into = lists + beam;
            int length = 1;
            memset(from, 0, sizeof(Partial));
            for (int stage = 0; stage < stages; stage++) {
                length = extend(from, length, into, beam, half, products, all, stage, entries);
                Partial *other = from;
                from = into, into = other;
            }
            if (stages > 1) polish(from[0].codes, half, products, all, stages, entries);
            for (int m = 0; m < stages; m++) codes[v * stages + m] = from[0].codes[m] - (int32_t)(m * entries);
        }
        free(half);
        free(lists);
    }
    return failed ? -1 : 0;
}
