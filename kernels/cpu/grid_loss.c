/* What a choice of scales and tables loses: the weighed squared error of groups at their nearest values; formats/grid.py.
 *
 * Values of a table rise, and a weight takes the next one where it is above the middle between them.
 */
#include <stdint.h>

#define LANES 16
#define CHUNK 128 /* weights that stay in the first cache */

/* `values` and `middles` are those of the group, in units of its weights; a table has `entries` values. */
static float loss_of(const float *weight, const float *importance, long size, const float *values, const float *middles,
                     int entries) {
    float total[LANES] = {0};
    for (long start = 0; start < size; start += CHUNK) {
        const long count = size - start < CHUNK ? size - start : CHUNK, whole = count / LANES * LANES;
        const float *w = weight + start, *h = importance + start;
        float q[CHUNK];
        for (long j = 0; j < count; j++) q[j] = values[0];
        for (int i = 1; i < entries; i++) {
            const float middle = middles[i - 1], value = values[i];
            for (long j = 0; j < count; j++) q[j] = w[j] > middle ? value : q[j];
        }
        for (long j = 0; j < count; j++) q[j] = (w[j] - q[j]) * h[j] * (w[j] - q[j]);
        for (long j = 0; j < whole; j += LANES) for (int l = 0; l < LANES; l++) total[l] += q[j + l];
        for (long j = whole; j < count; j++) total[j - whole] += q[j];
    }
    float sum = 0;
    for (int l = 0; l < LANES; l++) sum += total[l];
    return sum;
}

/* loss (groups) of weight (groups, size), of which importance (period, size) is that of every period-th, with tables
 * kind (groups) of values (kinds, entries) and middles (kinds, entries - 1), in units unit (groups). `entries` is 16
 * at most. One thread: callers have several. */
int fewbits_grid_loss(const float *weight, const float *importance, const float *unit, const uint8_t *kind,
                      const float *values, const float *middles, float *loss, long groups, long size, long period,
                      int entries) {
    for (long g = 0; g < groups; g++) {
        const float *h = importance + g % period * size, *w = weight + g * size;
        float v[LANES], m[LANES];
        for (int i = 0; i < entries; i++) v[i] = values[kind[g] * entries + i] * unit[g];
        for (int i = 0; i < entries - 1; i++) m[i] = middles[kind[g] * (entries - 1) + i] * unit[g];
        loss[g] = loss_of(w, h, size, v, m, entries);
    }
    return 0;
}
