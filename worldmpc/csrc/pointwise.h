// What lies between the products: LayerNorm, Mish, SimNorm, and their gradients, row by row.

#pragma once
#include <math.h>
#include "products.h"

#define NORM_EPS 1e-5f

typedef int32_t ints __attribute__((vector_size(4 * LANES)));
#ifdef __AVX512F__
#define LEAST(a, b) ((vec)_mm512_min_ps((__m512)(vec)(a), (__m512)(vec)(b))) // b where one of them is NaN
#define MOST(a, b) ((vec)_mm512_max_ps((__m512)(vec)(a), (__m512)(vec)(b)))
#else
#define LEAST(a, b) ((vec)_mm256_min_ps((__m256)(vec)(a), (__m256)(vec)(b)))
#define MOST(a, b) ((vec)_mm256_max_ps((__m256)(vec)(a), (__m256)(vec)(b)))
#endif

static inline vec all(float x) { return x - (vec){0}; }

static inline float total(vec v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
#endif
}

// The last argument for every c in steps of LANES below n, with `left` = LANES (a constant, so that load and store are single instructions), and
// once more for the rest, if any.
#define EACH(c, n, ...)                               \
    do {                                              \
        int64_t c = 0;                                \
        for (; c + LANES <= (n); c += LANES) {        \
            const int64_t left = LANES;               \
            __VA_ARGS__                               \
        }                                             \
        if (c < (n)) {                                \
            const int64_t left = (n) - c;             \
            __VA_ARGS__                               \
        }                                             \
    } while (0)

static inline vec reciprocal(vec x) {
#ifdef __AVX512F__
    const vec r = (vec)_mm512_rcp14_ps((__m512)x); // half of the digits; a Newton step gives the others
    return r * (2.0f - x * r);
#else
    return 1.0f / x;
#endif
}

// exp(x) between -87 and 88 by a polynomial of degree 6: relative error below 2e-7. NaN stays NaN.
static inline vec exp_within(vec x) {
    const vec shifted = x * 1.44269504f + 12582912.0f; // rounds to an integer in the lowest bits
    const vec n = shifted - 12582912.0f;
    const vec f = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = f * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    return p * (vec)(((ints)shifted << 23) + 0x3f800000);
}

// exp(x) for x <= 0, that of -87 below.
static inline vec exp_negative(vec x) { return exp_within(MOST(all(-87.0f), x)); }

// exp(x) for any x, that of -87 below and of 88 above.
static inline vec exp_of(vec x) { return exp_within(LEAST(all(88.0f), MOST(all(-87.0f), x))); }

// exp(x) between -60 and 20, where Mish has reached 0 and x to rounding.
static inline vec exp_between(vec x) { return exp_within(LEAST(all(20.0f), MOST(all(-60.0f), x))); }

// tanh(x): from exponentials where they do not cancel, to half a unit in the last place near 1, as 1 - tanh^2 matters; else by its series.
static inline vec tanh_of(vec x) {
    const vec size = MOST(x, -x), e = exp_negative(-2.0f * size), far = 1.0f - 2.0f * e / (1.0f + e), s = x * x;
    const vec near = x + x * s * (-0.333333333f + s * (0.133333333f + s * (-0.0539682540f + s * 0.0218694885f)));
    const ints small = size < 0.25f;
    return (vec)((small & (ints)near) | (~small & (((ints)far) | ((ints)x & (int32_t)0x80000000))));
}

static inline vec where_true(ints mask, vec x) { return (vec)(mask & (ints)x); } // zero elsewhere

// mish(x) = x tanh(log(1 + e^x)) = x n / (n + 2) with n = e^x (e^x + 2), which is 0 from -60 on: so -inf times it is NaN.
static inline vec mish(vec x) {
    const vec e = exp_between(x), n = where_true(x >= -60.0f, e * (e + 2.0f));
    return x * n * reciprocal(n + 2.0f);
}

// Its slope (n + 4 x e (e + 1) / (n + 2)) / (n + 2), of which the second part is 0 from 60 on.
static inline vec mish_slope(vec x) {
    const vec e = where_true(x >= -60.0f, exp_between(x)), n = e * (e + 2.0f), d = reciprocal(n + 2.0f);
    return (n + 4.0f * x * where_true(x < 60.0f, e * (e + 1.0f) * d)) * d;
}

// Mean and reciprocal deviation of a row.
static inline void moments(const float *h, int64_t n, float *mean, float *rstd) {
    vec sum[2] = {{0}}, square[2] = {{0}};
    EACH(c, n, sum[c / LANES & 1] += load(h + c, left););
    const float m = total(sum[0] + sum[1]) / n;
    for (int64_t c = 0; c + LANES <= n; c += LANES) {
        const vec x = load(h + c, LANES) - m;
        square[c / LANES & 1] += x * x;
    }
    float rest = 0;
    for (int64_t c = n / LANES * LANES; c < n; c++) rest += (h[c] - m) * (h[c] - m);
    *mean = m;
    *rstd = 1.0f / sqrtf((total(square[0] + square[1]) + rest) / n + NORM_EPS);
}

enum { CHUNK = 64 }; // groups of a SimNorm done together

// Softmax within groups of `width`: strided ones {g, g + groups, ...}, or neighbours, which are brought into that order in `work` [n].
static void simnorm(float *x, int64_t n, int64_t width, int strided, float *work) {
    const int64_t groups = n / width;
    float *in = x;
    if (!strided) {
        in = work;
        for (int64_t g = 0; g < groups; g++)
            for (int64_t i = 0; i < width; i++) in[i * groups + g] = x[g * width + i];
    }
    EACH(g, groups, {
        float *at = in + g;
        vec most = load(at, left), sum = {0};
        for (int64_t i = 1; i < width; i++) most = MOST(most, load(at + i * groups, left));
        for (int64_t i = 0; i < width; i++) {
            const vec e = exp_negative(load(at + i * groups, left) - most);
            sum += e;
            store(at + i * groups, left, e);
        }
        const vec scale = 1.0f / sum;
        for (int64_t i = 0; i < width; i++) store(at + i * groups, left, load(at + i * groups, left) * scale);
    });
    if (!strided)
        for (int64_t g = 0; g < groups; g++)
            for (int64_t i = 0; i < width; i++) x[g * width + i] = in[i * groups + g];
}

// Gradient in front of SimNorm, into d, from its result y and the gradient behind it.
static void simnorm_back(const float *y, const float *grad, int64_t n, int64_t width, int strided, float *d) {
    const int64_t groups = n / width, step = strided ? groups : 1, stride = strided ? 1 : width;
    for (int64_t first = 0; first < groups; first += CHUNK) {
        const int64_t count = groups - first < CHUNK ? groups - first : CHUNK;
        float dot[CHUNK] = {0};
        for (int64_t i = 0; i < width; i++)
#pragma omp simd
            for (int64_t g = 0; g < count; g++) dot[g] += y[i * step + (first + g) * stride] * grad[i * step + (first + g) * stride];
        for (int64_t i = 0; i < width; i++)
#pragma omp simd
            for (int64_t g = 0; g < count; g++) {
                const int64_t at = i * step + (first + g) * stride;
                d[at] = y[at] * (grad[at] - dot[g]);
            }
    }
}

// Numbers too small for a normal float count as 0, as they would take a hundred times longer. Returns the mode to restore.
static inline unsigned flush_tiny(void) {
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);
    return mode;
}
