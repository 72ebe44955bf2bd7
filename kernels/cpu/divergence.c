/* KL between the softmaxes of two rows of logits, and its gradient: quant/refiners/losses.py.
 *
 * Vocabularies are long: what is not fused here would be a dozen passes over memory.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16

static inline float of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static inline float of_bfloat16(uint16_t x) { return of_bits((uint32_t)x << 16); }

static inline uint16_t to_bfloat16(float x) { /* to the nearest, ties to even; x is finite */
    const uint32_t bits = bits_of(x);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* e^x for x <= 0, to 2e-7 of itself; 0 below -87. Without calls and branches, so that compilers make vectors of it. */
static inline float exp_of(float x) {
    const float low = x < -87.0f ? -87.0f : x;
    const float shifted = low * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the nearest integer in the low bits */
    const float n = shifted - 12582912.0f;
    const float r = (low - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts */
    float p = 1.9875691e-4f;
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665795e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    const float y = p * of_bits((bits_of(shifted) << 23) + 0x3f800000u);
    return x < -87.0f ? 0.0f : y;
}

static float sum_of(const float *lanes) {
    double sum = 0;
    for (int l = 0; l < LANES; l++) sum += lanes[l];
    return (float)sum;
}

#define ROWS(NAME, TYPE, READ, WRITE)                                                                                  \
    static float log_sum_##NAME(const TYPE *row, long columns) {                                                       \
        const long whole = columns / LANES * LANES;                                                                    \
        float most[LANES], total[LANES] = {0};                                                                         \
        for (int l = 0; l < LANES; l++) most[l] = -INFINITY;                                                           \
        for (long j = 0; j < whole; j += LANES)                                                                        \
            for (int l = 0; l < LANES; l++) most[l] = READ(row[j + l]) > most[l] ? READ(row[j + l]) : most[l];         \
        for (long j = whole; j < columns; j++) most[0] = READ(row[j]) > most[0] ? READ(row[j]) : most[0];              \
        float top = most[0];                                                                                           \
        for (int l = 1; l < LANES; l++) top = most[l] > top ? most[l] : top;                                           \
        for (long j = 0; j < whole; j += LANES)                                                                        \
            for (int l = 0; l < LANES; l++) total[l] += exp_of(READ(row[j + l]) - top);                                \
        for (long j = whole; j < columns; j++) total[0] += exp_of(READ(row[j]) - top);                                 \
        return top + logf(sum_of(total));                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    static float row_##NAME(const TYPE *student, const TYPE *teacher, TYPE *gradient, long columns) {                  \
        const long whole = columns / LANES * LANES;                                                                    \
        const float of_student = log_sum_##NAME(student, columns), of_teacher = log_sum_##NAME(teacher, columns);      \
        float total[LANES] = {0};                                                                                      \
        for (long j = 0; j < whole; j += LANES)                                                                        \
            for (int l = 0; l < LANES; l++) {                                                                          \
                const float s = READ(student[j + l]) - of_student, t = READ(teacher[j + l]) - of_teacher;              \
                const float p = exp_of(t);                                                                             \
                total[l] += p * (t - s);                                                                               \
                gradient[j + l] = WRITE(exp_of(s) - p);                                                                \
            }                                                                                                          \
        for (long j = whole; j < columns; j++) {                                                                       \
            const float s = READ(student[j]) - of_student, t = READ(teacher[j]) - of_teacher, p = exp_of(t);           \
            total[0] += p * (t - s);                                                                                   \
            gradient[j] = WRITE(exp_of(s) - p);                                                                        \
        }                                                                                                              \
        return sum_of(total);                                                                                          \
    }

#define SAME(x) (x)
ROWS(float, float, SAME, SAME)
ROWS(bfloat16, uint16_t, of_bfloat16, to_bfloat16)

/* kl (rows) and gradient (rows, columns) of the logits student and teacher, all float, or all but kl bfloat16. */
int fewbits_divergence(const void *student, const void *teacher, void *gradient, float *kl, long rows, long columns,
                       int bfloat16, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < rows; i++) {
        const long at = i * columns;
        kl[i] = bfloat16 ? row_bfloat16((const uint16_t *)student + at, (const uint16_t *)teacher + at,
                                        (uint16_t *)gradient + at, columns)
                         : row_float((const float *)student + at, (const float *)teacher + at, (float *)gradient + at,
                                     columns);
    }
    return 0;
}
