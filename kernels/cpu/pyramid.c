/* The point of the pyramid {p in Z^16: sum |p_i| = pulses} that points most nearly where a vector does; formats/pvq.py. */
#include <math.h>
#include <stdint.h>

#define SIZE 16
#define SWAPS 2

static void project(const float *x, int pulses, int8_t *out) {
    float a[SIZE], p[SIZE], total = 0, inner = 0, power = 0;
    int left = pulses;
    for (int i = 0; i < SIZE; i++) total += a[i] = fabsf(x[i]);
    if (!(total > 0)) { /* no direction is better than another */
        for (int i = 0; i < SIZE; i++) a[i] = 1;
        total = SIZE;
    }
    for (int i = 0; i < SIZE; i++) {
        p[i] = floorf((pulses - 1) * a[i] / total);
        inner += a[i] * p[i], power += p[i] * p[i], left -= (int)p[i];
    }
    for (; left > 0; left--) { /* the rest one by one, where they turn the point most */
        float most = -1;
        int best = 0;
        for (int i = 0; i < SIZE; i++) {
            const float gain = (inner + a[i]) * (inner + a[i]) / (power + 2 * p[i] + 1);
            if (gain > most) most = gain, best = i;
        }
        inner += a[best], power += 2 * p[best] + 1, p[best] += 1;
    }
    for (int swap = 0; swap < SWAPS; swap++) { /* a pulse from i to j */
        float most = -INFINITY;
        int from = 0, to = 0;
        for (int i = 0; i < SIZE; i++) {
            if (p[i] == 0) continue;
            for (int j = 0; j < SIZE; j++) {
                if (i == j) continue;
                const float cosine = (inner - a[i] + a[j]) / sqrtf(fmaxf(power - 2 * p[i] + 2 * p[j] + 2, 1));
                if (cosine > most) most = cosine, from = i, to = j;
            }
        }
        if (!(most > inner / sqrtf(power) * (1 + 1e-6f))) break;
        inner += a[to] - a[from], power += 2 * p[to] - 2 * p[from] + 2;
        p[from] -= 1, p[to] += 1;
    }
    for (int i = 0; i < SIZE; i++) out[i] = (int8_t)(x[i] < 0 ? -p[i] : p[i]);
}

/* points (count, 16) of vectors (count, 16) */
int fewbits_pyramid(const float *vectors, int8_t *points, long count, int pulses, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < count; i++) project(vectors + i * SIZE, pulses, points + i * SIZE);
    return 0;
}
