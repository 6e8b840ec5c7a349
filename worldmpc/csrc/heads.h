// Two-hot scalars (worldmpc.models.heads.TwoHot) from rows of logits: their values, their losses, and the gradients of both.

#pragma once
#include <omp.h>
#include "network.h"

typedef struct {
    int64_t rows, bins, threads;
    float vmin, vmax, width;        // range of the bins and their distance
    const float *support;           // [K] for values
    const float *logits, *x, *grad; // [M, K], [M] the scalars that losses compare with, [M] of out
    float *out, *saved, *dlogits;   // [M]; kept for the backward pass, [M, 2] for values and [M] for losses, or NULL; [M, K]
} TwoHot;

// The first n of LANES numbers, and -inf behind them, which no softmax notices.
static inline __attribute__((always_inline)) vec load_logits(const float *x, int64_t n) {
    if (n == LANES) return *(const vec *)x;
#ifdef __AVX512F__
    return (vec)_mm512_mask_loadu_ps((__m512)all(-INFINITY), (__mmask16)((1u << n) - 1), x);
#else
    vec v = all(-INFINITY);
    memcpy(&v, x, 4 * n);
    return v;
#endif
}

static inline float largest(const float *logits, int64_t n) {
    vec most = all(-INFINITY);
    EACH(c, n, {
        const vec x = load_logits(logits + c, left);
        most = MOST(most, x);
    });
    float lanes[LANES], top = -INFINITY;
    store(lanes, LANES, most);
    for (int i = 0; i < LANES; i++) top = lanes[i] > top ? lanes[i] : top;
    return top;
}

// Logarithm of the sum of exponentials of a row; `inner`, unless NULL: the expected bin.
static inline float log_sum_exp(const float *logits, const float *support, int64_t n, float *inner) {
    const float top = largest(logits, n);
    vec sum = {0}, weighted = {0};
    EACH(c, n, {
        const vec e = exp_negative(load_logits(logits + c, left) - top);
        sum += e;
        if (inner) weighted += e * load(support + c, left);
    });
    const float all_of_it = total(sum);
    if (inner) *inner = total(weighted) / all_of_it;
    return top + logf(all_of_it);
}

static inline float symexp(float x) { return copysignf(expm1f(fabsf(x)), x); }

// symexp of the expected bin of a row of logits.
static float two_hot_value(const float *logits, const float *support, int64_t n) {
    float x;
    log_sum_exp(logits, support, n, &x);
    return symexp(x);
}

// Lower bin of a scalar, and the weight of the bin above it.
static int64_t two_hot_place(const TwoHot *t, float x, float *weight) {
    float place = copysignf(logf(1.0f + fabsf(x)), x);
    place = place < t->vmin ? t->vmin : place > t->vmax ? t->vmax : place;
    place = (place - t->vmin) / t->width;
    const float lower = isnan(place) ? 0.0f : floorf(place);
    const int64_t bin = least((int64_t)lower, t->bins - 2);
    *weight = place - (float)bin;
    return bin;
}

static int threads_of_rows(const TwoHot *t) { return threads_for(t->threads, 32 * t->rows * t->bins); }

// Runs its last argument for every row r, in blocks, on the threads that pay.
#define EACH_ROW(t, ...)                                                  \
    do {                                                                  \
        const int threads = threads_of_rows(t);                           \
        _Pragma("omp parallel num_threads(threads)") {                    \
            const unsigned mode = flush_tiny();                           \
            _Pragma("omp for schedule(static)")                           \
            for (int64_t r = 0; r < (t)->rows; r++) { __VA_ARGS__ }       \
            _mm_setcsr(mode);                                             \
        }                                                                 \
    } while (0)

// Values of rows; saves what the exponentials are divided by, as a logarithm, and the expected bin.
void worldmpc_two_hot_values(const TwoHot *t) {
    EACH_ROW(t, {
        float x;
        const float log_sum = log_sum_exp(t->logits + r * t->bins, t->support, t->bins, &x);
        t->out[r] = symexp(x);
        if (t->saved) t->saved[2 * r] = log_sum, t->saved[2 * r + 1] = x;
    });
}

void worldmpc_two_hot_values_back(const TwoHot *t) {
    EACH_ROW(t, {
        const float log_sum = t->saved[2 * r], x = t->saved[2 * r + 1];
        // The slope of sign(x) (exp|x| - 1), which PyTorch counts as 0 in the middle, where the sign is.
        const float slope = t->grad[r] * (x == 0.0f ? 0.0f : expf(fabsf(x)));
        const float *logits = t->logits + r * t->bins;
        float *d = t->dlogits + r * t->bins;
        EACH(c, t->bins, store(d + c, left, slope * exp_negative(load(logits + c, left) - log_sum) * (load(t->support + c, left) - x)););
    });
}

// Cross-entropies of rows against the two-hot distributions of scalars; saves what the exponentials are divided by, as a logarithm.
void worldmpc_two_hot_losses(const TwoHot *t) {
    EACH_ROW(t, {
        const float *logits = t->logits + r * t->bins;
        const float log_sum = log_sum_exp(logits, NULL, t->bins, NULL);
        float weight;
        const int64_t bin = two_hot_place(t, t->x[r], &weight);
        const float low = logits[bin] - log_sum, high = logits[bin + 1] - log_sum;
        t->out[r] = -(low + weight * (high - low));
        if (t->saved) t->saved[r] = log_sum;
    });
}

void worldmpc_two_hot_losses_back(const TwoHot *t) {
    EACH_ROW(t, {
        const float log_sum = t->saved[r], slope = t->grad[r], *logits = t->logits + r * t->bins;
        float *d = t->dlogits + r * t->bins, weight;
        const int64_t bin = two_hot_place(t, t->x[r], &weight);
        EACH(c, t->bins, store(d + c, left, slope * exp_negative(load(logits + c, left) - log_sum)););
        d[bin] -= slope * (1.0f - weight);
        d[bin + 1] -= slope * weight;
    });
}
