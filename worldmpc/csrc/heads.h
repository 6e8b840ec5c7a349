// What becomes of a network's output: two-hot scalars (worldmpc.models.two_hot) and the squashed Gaussian (worldmpc.models.heads), with gradients.

#pragma once
#include <omp.h>
#include "network.h"

typedef struct {
    int64_t rows, bins, threads;
    float vmin, vmax, width;        // range of the bins and their distance
    const float *support;           // [K] for values
    const float *logits, *x, *grad; // [M, K], [M] the scalars that losses compare with, [M] of out
    float *out, *saved, *dlogits;   // [M]; kept for the backward pass, [M, 3] for values and [M, 2] for losses, or NULL; [M, K]
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

// Logarithm of the sum of exponentials of a row below its largest one, `top`; `inner`, unless NULL: the expected bin.
static inline float log_sum_exp(const float *logits, const float *support, int64_t n, float *largest_one, float *inner) {
    const float top = *largest_one = largest(logits, n);
    vec sum = {0}, weighted = {0};
    EACH(c, n, {
        const vec e = exp_negative(load_logits(logits + c, left) - top);
        sum += e;
        if (inner) weighted += e * load(support + c, left);
    });
    const float all_of_it = total(sum);
    if (inner) *inner = total(weighted) / all_of_it;
    return logf(all_of_it);
}

static inline float symexp(float x) { return copysignf(expm1f(fabsf(x)), x); }

// symexp of the expected bin of a row of logits.
static float two_hot_value(const float *logits, const float *support, int64_t n) {
    float top, x;
    log_sum_exp(logits, support, n, &top, &x);
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

// Runs its last argument for every row r, on the threads that pay where each of its numbers costs `work` multiplications.
#define EACH_ROW(t, work, ...)                                            \
    do {                                                                  \
        const int threads = threads_for((t)->threads, (t)->rows * (work)); \
        _Pragma("omp parallel num_threads(threads)") {                    \
            const unsigned mode = flush_tiny();                           \
            _Pragma("omp for schedule(static)")                           \
            for (int64_t r = 0; r < (t)->rows; r++) { __VA_ARGS__ }       \
            _mm_setcsr(mode);                                             \
        }                                                                 \
    } while (0)

// Values of rows; saves the largest logit, what the exponentials below it are divided by, as a logarithm, and the expected bin.
void worldmpc_two_hot_values(const TwoHot *t) {
    EACH_ROW(t, 32 * t->bins, {
        float top, x;
        const float log_sum = log_sum_exp(t->logits + r * t->bins, t->support, t->bins, &top, &x);
        t->out[r] = symexp(x);
        if (t->saved) t->saved[3 * r] = top, t->saved[3 * r + 1] = log_sum, t->saved[3 * r + 2] = x;
    });
}

void worldmpc_two_hot_values_back(const TwoHot *t) {
    EACH_ROW(t, 32 * t->bins, {
        const float top = t->saved[3 * r], log_sum = t->saved[3 * r + 1], x = t->saved[3 * r + 2];
        // The slope of sign(x) (exp|x| - 1), which PyTorch counts as 0 in the middle, where the sign is.
        const float slope = t->grad[r] * (x == 0.0f ? 0.0f : expf(fabsf(x)));
        const float *logits = t->logits + r * t->bins;
        float *d = t->dlogits + r * t->bins;
        EACH(c, t->bins, store(d + c, left, slope * exp_negative(load(logits + c, left) - top - log_sum) * (load(t->support + c, left) - x)););
    });
}

// Cross-entropies of rows against the two-hot distributions of scalars; saves the largest logit and what the exponentials below it are divided by, as a logarithm.
void worldmpc_two_hot_losses(const TwoHot *t) {
    EACH_ROW(t, 32 * t->bins, {
        const float *logits = t->logits + r * t->bins;
        float top, weight;
        const float log_sum = log_sum_exp(logits, NULL, t->bins, &top, NULL);
        const int64_t bin = two_hot_place(t, t->x[r], &weight);
        const float low = logits[bin] - top - log_sum, high = logits[bin + 1] - top - log_sum;
        t->out[r] = -(low + weight * (high - low));
        if (t->saved) t->saved[2 * r] = top, t->saved[2 * r + 1] = log_sum;
    });
}

void worldmpc_two_hot_losses_back(const TwoHot *t) {
    EACH_ROW(t, 32 * t->bins, {
        const float top = t->saved[2 * r], log_sum = t->saved[2 * r + 1], slope = t->grad[r], *logits = t->logits + r * t->bins;
        float *d = t->dlogits + r * t->bins, weight;
        const int64_t bin = two_hot_place(t, t->x[r], &weight);
        EACH(c, t->bins, store(d + c, left, slope * exp_negative(load(logits + c, left) - top - log_sum)););
        d[bin] -= slope * (1.0f - weight);
        d[bin + 1] -= slope * weight;
    });
}

typedef struct {
    int64_t rows, dims, threads;
    float log_std_min, log_std_max;
    const float *raw, *eps;                                 // [M, 2 A], [M, A]
    float *action, *mean, *log_std, *log_prob, *scaled;     // [M, A] x 3, [M] x 2
    const float *d_action, *d_mean, *d_log_std, *d_log_prob, *d_scaled; // gradients of these, each or NULL
    float *d_raw;                                           // [M, 2 A]
} Gaussian;

// log of (2 pi)^(1/2).
#define HALF_LOG_2_PI 0.918938533f

static inline vec bounded(const Gaussian *g, vec log_std) {
    return g->log_std_min + 0.5f * (g->log_std_max - g->log_std_min) * (tanh_of(log_std) + 1.0f);
}

// x within -1 and 1. NaN stays NaN, as x is the second operand.
static inline vec clip(vec x) { return LEAST(all(1.0f), MOST(all(-1.0f), x)); }

// Actions alone, of one row: tanh(mean + eps std), or clip(tanh(mean) + eps std).
static void sample_row(const Gaussian *g, int clipped, const float *raw, const float *eps, float *action) {
    const int64_t n = g->dims;
    if (clipped) {
        EACH(c, n, {
            const vec std = exp_of(bounded(g, load(raw + n + c, left)));
            store(action + c, left, clip(tanh_of(load(raw + c, left)) + load(eps + c, left) * std));
        });
        return;
    }
    EACH(c, n, store(action + c, left, tanh_of(load(raw + c, left) + load(eps + c, left) * exp_of(bounded(g, load(raw + n + c, left))))););
}

// Log-density before squashing, up to the sum over actions.
static float gaussian_of_row(const float *eps, const float *log_std, int64_t n) {
    float sum = 0;
    for (int64_t c = 0; c < n; c++) sum += -0.5f * eps[c] * eps[c] - log_std[c] - HALF_LOG_2_PI;
    return sum;
}

static inline float positive(float x) { return x > 0.0f || isnan(x) ? x : 0.0f; }

void worldmpc_gaussian(const Gaussian *g) {
    EACH_ROW(g, 128 * g->dims, {
        const int64_t n = g->dims;
        const float *raw = g->raw + r * 2 * n, *eps = g->eps + r * n;
        float *action = g->action + r * n, *mean = g->mean + r * n, *log_std = g->log_std + r * n;
        EACH(c, n, {
            const vec m = load(raw + c, left);
            const vec bound = bounded(g, load(raw + n + c, left));
            store(log_std + c, left, bound);
            store(mean + c, left, tanh_of(m));
            store(action + c, left, tanh_of(m + load(eps + c, left) * exp_of(bound)));
        });
        const float density = gaussian_of_row(eps, log_std, n);
        float log_prob = density;
        for (int64_t c = 0; c < n; c++) log_prob -= logf(positive(1.0f - action[c] * action[c]) + 1e-6f);
        g->log_prob[r] = log_prob;
        g->scaled[r] = -log_prob * (density * n / (log_prob + 1e-8f));
    });
}

void worldmpc_gaussian_back(const Gaussian *g) {
    EACH_ROW(g, 128 * g->dims, {
        const int64_t n = g->dims;
        const float *raw = g->raw + r * 2 * n, *eps = g->eps + r * n;
        const float *action = g->action + r * n, *mean = g->mean + r * n, *log_std = g->log_std + r * n;
        float *d = g->d_raw + r * 2 * n;
        // scaled = -P D n / (P + 1e-8) for the density D before squashing and P behind it, P = D - sum of log(1 - a^2 + 1e-6).
        const float density = gaussian_of_row(eps, log_std, n), log_prob = g->log_prob[r], below = log_prob + 1e-8f;
        const float d_scaled = g->d_scaled ? g->d_scaled[r] : 0.0f, ratio = density * n / below;
        const float d_prob = (g->d_log_prob ? g->d_log_prob[r] : 0.0f) + d_scaled * (log_prob * ratio / below - ratio);
        const float d_density = d_prob - d_scaled * log_prob * n / below;
        EACH(c, n, {
            const vec a = load(action + c, left), m = load(mean + c, left), bound = load(log_std + c, left);
            const vec room = 1.0f - a * a;
            vec d_a = where_true(room > 0.0f, d_prob * 2.0f * a / (room + 1e-6f));
            if (g->d_action) d_a += load(g->d_action + r * n + c, left);
            const vec d_sum = d_a * room;
            vec d_m = d_sum;
            if (g->d_mean) d_m += load(g->d_mean + r * n + c, left) * (1.0f - m * m);
            vec d_bound = d_sum * load(eps + c, left) * exp_of(bound) - d_density;
            if (g->d_log_std) d_bound += load(g->d_log_std + r * n + c, left);
            const vec t = tanh_of(load(raw + n + c, left));
            store(d + c, left, d_m);
            store(d + n + c, left, d_bound * 0.5f * (g->log_std_max - g->log_std_min) * (1.0f - t * t));
        });
    });
}
