// Matrix products in register tiles over weights packed into panels of PANEL columns, as in BLIS (Van Zee and van de Geijn 2015).

#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
enum { LANES = 16, TILE = 12 };
#else
enum { LANES = 8, TILE = 6 };
#endif
enum { PANEL = 2 * LANES, PAIRS = 16 }; // PAIRS: pairs of bfloat16 numbers that one step of the inner product takes, at most

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The first n of LANES numbers, zeros behind them.
static inline __attribute__((always_inline)) vec load(const float *x, int64_t n) {
    if (n == LANES) return *(const vec *)x;
#ifdef __AVX512F__
    return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), x);
#else
    vec v = {0};
    memcpy(&v, x, 4 * n);
    return v;
#endif
}

static inline __attribute__((always_inline)) void store(float *x, int64_t n, vec v) {
    if (n == LANES) *(vec *)x = v;
#ifdef __AVX512F__
    else _mm512_mask_storeu_ps(x, (__mmask16)((1u << n) - 1), (__m512)v);
#else
    else memcpy(x, &v, 4 * n);
#endif
}

// c[rows, PANEL] = init + a[rows, k] b[k, PANEL]. Row r of a begins at a + r * across and goes on in steps of `along`.
static inline __attribute__((always_inline)) void tile(
    const int rows, const float *a, const int64_t across, const int64_t along, const int64_t k, const float *b,
    const float *init, const int64_t ldi, float *c, const int64_t ldc) {
    vec sum[TILE][2];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2; v++) sum[r][v] = *(const vec *)(init + r * ldi + v * LANES);
    const float *a0 = a, *a1 = a + 4 * across, *a2 = a + 8 * across;
    for (int64_t p = 0; p < k; p++, a0 += along, a1 += along, a2 += along, b += PANEL) {
        const vec b0 = *(const vec *)b, b1 = *(const vec *)(b + LANES);
        _mm_prefetch((const char *)(b + 24 * PANEL), _MM_HINT_T0);
        _mm_prefetch((const char *)(b + 24 * PANEL + LANES), _MM_HINT_T0);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const float *at = (r < 4 ? a0 : r < 8 ? a1 : a2) + (r & 3) * across;
            sum[r][0] += *at * b0;
            sum[r][1] += *at * b1;
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2; v++) *(vec *)(c + r * ldc + v * LANES) = sum[r][v];
}

#ifdef __AVX512F__
#define EACH_HEIGHT(CALL) CALL(1) CALL(2) CALL(3) CALL(4) CALL(5) CALL(6) CALL(7) CALL(8) CALL(9) CALL(10) CALL(11) CALL(12)
#else
#define EACH_HEIGHT(CALL) CALL(1) CALL(2) CALL(3) CALL(4) CALL(5) CALL(6)
#endif

// c[rows, PANEL] = init + a[rows, k] b[k, PANEL] for any number of rows; ldi is 0 where all rows begin alike.
static void multiply_panel(
    int64_t rows, const float *a, int64_t lda, int64_t k, const float *b, const float *init, int64_t ldi, float *c, int64_t ldc) {
    for (int64_t r = 0; r < rows; r += TILE) {
        const float *at = a + r * lda, *from = init + r * ldi;
        float *ct = c + r * ldc;
        switch (least(rows - r, TILE)) {
#define CALL(R) case R: tile(R, at, lda, 1, k, b, from, ldi, ct, ldc); break;
            EACH_HEIGHT(CALL)
#undef CALL
        }
    }
}

// c[rows, PANEL] = init + a^T b with a[k, TILE], of which `rows` columns are used, and b[k, PANEL].
static void multiply_transposed(int64_t rows, const float *a, int64_t k, const float *b, const float *init, int64_t ldi, float *c, int64_t ldc) {
    switch (rows) {
#define CALL(R) case R: tile(R, a, 1, TILE, k, b, init, ldi, c, ldc); break;
        EACH_HEIGHT(CALL)
#undef CALL
    }
}

// A row of a panel: `columns` values, then zeros.
static inline void pack_row(const float *from, int64_t columns, float *to) {
    for (int64_t c = 0; c < PANEL; c += LANES) *(vec *)(to + c) = columns >= c + LANES ? load(from + c, LANES) : columns > c ? load(from + c, columns - c) : (vec){0};
}

// Rows and columns of a square exchanged, in registers: at distance 1, 2, 4, ... each pair of rows exchanges halves (Eklundh 1972).
static inline __attribute__((always_inline)) void transpose(vec *rows) {
    typedef int32_t lanes __attribute__((vector_size(4 * LANES)));
    lanes index;
    for (int l = 0; l < LANES; l++) index[l] = l;
#pragma GCC unroll 4
    for (int s = 1; s < LANES; s *= 2) {
        const lanes second = (index & s) != 0;
        const lanes low = (second & (index + LANES - s)) | (~second & index), high = (second & (index + LANES)) | (~second & (index + s));
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & s) continue;
            const vec a = rows[i], b = rows[i + s];
            rows[i] = __builtin_shuffle(a, b, low);
            rows[i + s] = __builtin_shuffle(a, b, high);
        }
    }
}

// Panel of the forward product: packed[k][column] = weight[column][k], zero behind the last column.
static void pack_panel(const float *weight, int64_t in, int64_t columns, float *packed) {
    for (int64_t k = 0; k < in; k += LANES) {
        const int64_t left = least(in - k, LANES);
        for (int64_t c = 0; c < PANEL; c += LANES) {
            vec rows[LANES];
            if (left == LANES && columns >= c + LANES) {
#pragma GCC unroll 16
                for (int r = 0; r < LANES; r++) rows[r] = *(const vec *)(weight + (c + r) * in + k);
            } else {
                for (int r = 0; r < LANES; r++) rows[r] = c + r < columns ? load(weight + (c + r) * in + k, left) : (vec){0};
            }
            transpose(rows);
            if (left == LANES) {
#pragma GCC unroll 16
                for (int r = 0; r < LANES; r++) *(vec *)(packed + (k + r) * PANEL + c) = rows[r];
            } else {
                for (int r = 0; r < left; r++) *(vec *)(packed + (k + r) * PANEL + c) = rows[r];
            }
        }
    }
}

// Products of bfloat16 numbers, summed in float32: the inner dimension in pairs, b as [pair][column][2] -----------------------------

static inline uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? (uint16_t)(bits >> 16 | 0x40) : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Pairs of a packed inner dimension: in whole steps, the rest zero.
static inline int64_t pairs_of(int64_t k) { return up(k, 2 * PAIRS) / 2; }

#ifdef __AVX512BF16__
// LANES floats that lie `stride` apart.
static inline vec gather(const float *from, int64_t stride) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return (vec)_mm512_i32gather_ps(_mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)stride)), from, 4);
}
#endif

static void pack_panel_bf16(const float *weight, int64_t in, int64_t first, int64_t k, int64_t columns, uint16_t *packed) {
    for (int64_t pair = 0; pair < pairs_of(k); pair++, packed += 2 * PANEL) {
#ifdef __AVX512BF16__
        if (columns == PANEL && 2 * pair + 1 < k) {
            for (int64_t c = 0; c < PANEL; c += LANES) {
                const float *from = weight + c * in + first + 2 * pair;
                const __m256i low = (__m256i)_mm512_cvtneps_pbh((__m512)gather(from, in)), high = (__m256i)_mm512_cvtneps_pbh((__m512)gather(from + 1, in));
                _mm512_storeu_si512(packed + 2 * c, _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
            }
            continue;
        }
#endif
        for (int64_t c = 0; c < PANEL; c++)
            for (int64_t i = 0; i < 2; i++)
                packed[2 * c + i] = c < columns && 2 * pair + i < k ? to_bf16(weight[c * in + first + 2 * pair + i]) : 0;
    }
}

#ifdef __AVX512BF16__
static void round_row(const float *x, int64_t n, uint16_t *y) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) _mm256_storeu_si256((__m256i *)(y + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
    for (; i < n; i++) y[i] = to_bf16(x[i]);
    for (; i < 2 * pairs_of(n); i++) y[i] = 0;
}

#ifdef __AMX_BF16__
// c[32, PANEL] = init + a[32, k] b, in the processor's own matrix registers. `a` and `c` have 32 rows, however many count.
static inline void tile_bf16(const uint16_t *a, int64_t lda, int64_t pairs, const uint16_t *b, const float *init, int64_t ldi, float *c, int64_t ldc) {
    _tile_loadd(0, init, 4 * ldi);
    _tile_loadd(1, init + 16, 4 * ldi);
    _tile_loadd(2, init + 16 * ldi, 4 * ldi);
    _tile_loadd(3, init + 16 * ldi + 16, 4 * ldi);
    for (int64_t p = 0; p < pairs; p += PAIRS, a += 2 * PAIRS, b += 2 * PAIRS * PANEL) {
        _tile_loadd(4, a, 2 * lda);
        _tile_loadd(6, b, 4 * PANEL);
        _tile_loadd(7, b + 32, 4 * PANEL);
        _tile_loadd(5, a + 16 * lda, 2 * lda);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 4 * ldc);
    _tile_stored(1, c + 16, 4 * ldc);
    _tile_stored(2, c + 16 * ldc, 4 * ldc);
    _tile_stored(3, c + 16 * ldc + 16, 4 * ldc);
}

enum { HEIGHT = 32 };

static void multiply_panel_bf16(
    int64_t rows, const uint16_t *a, int64_t lda, int64_t pairs, const uint16_t *b, const float *init, int64_t ldi, float *c, int64_t ldc) {
    for (int64_t r = 0; r < rows; r += HEIGHT) tile_bf16(a + r * lda, lda, pairs, b, init + r * ldi, ldi, c + r * ldc, ldc);
}

static void begin_bf16(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shapes = {.palette = 1};
    for (int t = 0; t < 8; t++) shapes.bytes[t] = 64, shapes.rows[t] = 16;
    _tile_loadconfig(&shapes);
}

static void end_bf16(void) { _tile_release(); }
#else
static inline __attribute__((always_inline)) void tile_bf16(
    const int rows, const uint16_t *a, const int64_t lda, const int64_t pairs, const uint16_t *b, const float *init, const int64_t ldi, float *c,
    const int64_t ldc) {
    __m512 sum[TILE][2];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2; v++) sum[r][v] = _mm512_loadu_ps(init + r * ldi + v * 16);
    const uint16_t *a0 = a, *a1 = a + 4 * lda, *a2 = a + 8 * lda;
    for (int64_t p = 0; p < pairs; p++, a0 += 2, a1 += 2, a2 += 2, b += 2 * PANEL) {
        const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + 32);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, (r < 4 ? a0 : r < 8 ? a1 : a2) + (r & 3) * lda, 4);
            const __m512bh ar = (__m512bh)_mm512_set1_epi32(pair);
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], ar, b0);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], ar, b1);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2; v++) _mm512_storeu_ps(c + r * ldc + v * 16, sum[r][v]);
}

static void multiply_panel_bf16(
    int64_t rows, const uint16_t *a, int64_t lda, int64_t pairs, const uint16_t *b, const float *init, int64_t ldi, float *c, int64_t ldc) {
    for (int64_t r = 0; r < rows; r += TILE) {
        const uint16_t *at = a + r * lda;
        const float *from = init + r * ldi;
        float *ct = c + r * ldc;
        switch (least(rows - r, TILE)) {
#define CALL(R) case R: tile_bf16(R, at, lda, pairs, b, from, ldi, ct, ldc); break;
            EACH_HEIGHT(CALL)
#undef CALL
        }
    }
}

static void begin_bf16(void) {}
static void end_bf16(void) {}
#endif
#endif
