// Networks, how they are packed, and a block of rows on its way through one.
//
// Shapes: S stacked seeds, Q heads over the same input, M rows; parameters [members, out, in].

#pragma once
#include <stdlib.h>
#include "pointwise.h"
#include "products.h"

enum { MAX_LAYERS = 8 };
#define CACHE (1 << 20) // bytes of activations that a thread keeps at hand
#define SMALL 400000    // multiplications below which a second thread costs more than it brings
#define DEPTH 256       // rows that one pass over the gradients of weights sums

typedef struct {
    const float *weight, *bias, *ln_weight, *ln_bias; // [members, out, in], [members, out] x 3; no LayerNorm and Mish where ln_weight is NULL
    float *packed, *packed_back;                      // room for both packed forms of all members
    uint8_t *ready, *ready_back;                      // [members] whether they hold the present weights
    float *xhat, *rstd;                               // normalised values and reciprocal deviations, kept for the backward pass [S, Q, M, out], [S, Q, M]; or NULL
    const float *y;                                   // result of the last layer, where that is a SimNorm, for the backward pass [S, Q, M, out]
    float *dh;                                        // gradient behind the product [S, Q, out / TILE rounded up, dh_rows, TILE]
    float *dweight, *dbias, *dln_weight, *dln_bias;   // gradients [members, ...]; or NULL
    int64_t in, out;
} Layer;

typedef struct {
    int64_t layers, seeds, heads, rows;
    int64_t repeat; // rows that share one row of x1
    int64_t d1, d2; // columns of x1 and x2
    int64_t threads;
    int64_t simnorm;        // width of the groups of the final SimNorm, 0 for none
    int64_t strided;        // its layout
    int64_t dh_rows;        // rows of dh, of which a call of backward_rows may fill a part
    int64_t accumulate;     // add to dweight instead of overwriting it
    int64_t bf16;           // products of bfloat16 numbers in the forward pass
    const int64_t *members; // [S, Q] which parameters; for gradients of weights each at most once
    const float *x1, *x2;   // [S, M / repeat, d1], [S, M, d2]
    const float *keep;      // dropout factors of the first layer [S, Q, M, out]; or NULL
    float *out;             // [S, Q, M, out]
    const float *grad;      // of out
    float *dx1, *dx2;       // [S, M, d1], [S, M, d2]; or NULL
    Layer layer[MAX_LAYERS];
} Net;

// Memory for floats; where there is none left, threads see `failed` behind the next barrier.
static float *room(int64_t floats, int *failed) {
    float *memory = aligned_alloc(64, up(4 * floats, 64));
    if (!memory) {
#pragma omp atomic write
        *failed = 1;
    }
    return memory;
}

static int64_t multiplications(const Net *net) {
    int64_t sum = 0;
    for (int64_t l = 0; l < net->layers; l++) sum += net->layer[l].in * net->layer[l].out;
    return sum * net->seeds * net->heads * net->rows;
}

static int threads_for(int64_t threads, int64_t multiplications) { return (int)least(threads, multiplications / SMALL + 1); }

// Length of the rows of a block in any layer: not a power of two, which would put all rows into the same sets of the cache.
static int64_t row_length(const Net *net) {
    int64_t width = net->d1 + net->d2 + 4 * PAIRS;
    for (int64_t l = 0; l < net->layers; l++) width = width > net->layer[l].out ? width : net->layer[l].out;
    return up(width, PANEL) + LANES;
}

// Rows of a block: so many that the weights are not read too often, few enough for the cache, and blocks that threads can share evenly.
static int64_t block_rows(int64_t rows, int64_t length, int64_t units, int threads) {
    int64_t blocks = (rows + CACHE / (8 * length)) / (CACHE / (8 * length) + 1);
    while ((blocks * units) % threads && rows > blocks * TILE) blocks++;
    return (rows + blocks - 1) / blocks;
}

// Whether `member` is packed already, or packed by an earlier one of the pairs that share it.
static int done_before(const Net *net, int64_t pair, const uint8_t *ready) {
    const int64_t member = net->members[pair];
    if (ready[member]) return 1;
    for (int64_t before = 0; before < pair; before++)
        if (net->members[before] == member) return 1;
    return 0;
}

// Forward --------------------------------------------------------------------------------------------------------------------

static int64_t split_of(const Net *net, int64_t l) { return l ? net->layer[l].in : net->d1; }

// A packed panel: the bias, then the weights of x1, then those of x2, each in rows of PANEL floats (or pairs of bfloat16 numbers).
static int64_t panel_rows(const Net *net, int64_t l) {
    const int64_t in = net->layer[l].in, split = split_of(net, l);
    return 1 + (net->bf16 ? pairs_of(split) + pairs_of(in - split) : in);
}

static float *packed_panel(const Net *net, int64_t l, int64_t member, int64_t panel) {
    const Layer *layer = &net->layer[l];
    return layer->packed + (member * up(layer->out, PANEL) + panel * PANEL) * panel_rows(net, l);
}

static void pack_forward(const Net *net, int64_t l, int64_t member, int64_t panel) {
    const Layer *layer = &net->layer[l];
    const int64_t first = panel * PANEL, columns = least(layer->out - first, PANEL), in = layer->in, split = split_of(net, l);
    const float *weight = layer->weight + (member * layer->out + first) * in;
    float *packed = packed_panel(net, l, member, panel);
    pack_row(layer->bias + member * layer->out + first, columns, packed);
    if (net->bf16) {
        uint16_t *to = (uint16_t *)(packed + PANEL);
        pack_panel_bf16(weight, in, 0, split, columns, to);
        pack_panel_bf16(weight, in, split, in - split, columns, to + 2 * PANEL * pairs_of(split));
    } else {
        pack_panel(weight, in, columns, packed + PANEL);
    }
}

// c = init + a W^T for the columns [from, from + k) of the input, a [rows, lda]. Without init: c = bias + a W^T.
static void product(
    const Net *net, int64_t l, int64_t member, int64_t rows, const float *a, int64_t lda, int64_t from, int64_t k,
    const float *init, int64_t ldi, float *c, int64_t ldc, uint16_t *rounded) {
    const int64_t panels = up(net->layer[l].out, PANEL) / PANEL;
#ifdef __AVX512BF16__
    int64_t ldr = 0, pairs = 0, begin = 0;
    if (net->bf16) {
        // Both parts of the first layer's input are padded to whole steps, so that each can be used alone.
        const int64_t split = split_of(net, l), first = from < split ? least(k, split - from) : 0, rest = k - first;
        begin = from ? pairs_of(split) : 0, pairs = (first ? pairs_of(first) : 0) + (rest ? pairs_of(rest) : 0), ldr = 2 * pairs + 32;
        for (int64_t r = 0; r < rows; r++) {
            if (first) round_row(a + r * lda, first, rounded + r * ldr);
            if (rest) round_row(a + r * lda + first, rest, rounded + r * ldr + (first ? 2 * pairs_of(first) : 0));
        }
    }
#endif
    (void)rounded;
    for (int64_t panel = 0; panel < panels; panel++) {
        const float *packed = packed_panel(net, l, member, panel), *start = init ? init + panel * PANEL : packed;
        float *to = c + panel * PANEL;
#ifdef __AVX512BF16__
        if (net->bf16) {
            multiply_panel_bf16(rows, rounded, ldr, pairs, (const uint16_t *)(packed + PANEL * (1 + begin)), start, init ? ldi : 0, to, ldc);
            continue;
        }
#endif
        multiply_panel(rows, a, lda, k, packed + PANEL * (1 + from), start, init ? ldi : 0, to, ldc);
    }
}

// Layer l behind its product, for one row, in place: dropout, LayerNorm, Mish or SimNorm; keeps what the backward pass needs.
static void finish_row(const Net *net, int64_t l, int64_t member, int64_t row, float *h, float *work) {
    const Layer *layer = &net->layer[l];
    const int64_t n = layer->out;
    if (l == 0 && net->keep) {
        const float *keep = net->keep + row * n;
#pragma omp simd
        for (int64_t c = 0; c < n; c++) h[c] *= keep[c];
    }
    if (!layer->ln_weight) return;
    const float *g = layer->ln_weight + member * n, *b = layer->ln_bias + member * n;
    float mean, rstd, *xhat = layer->xhat + row * n;
    moments(h, n, &mean, &rstd);
    if (layer->xhat) layer->rstd[row] = rstd;
    const int last = l == net->layers - 1 && net->simnorm;
    if (last) {
        EACH(c, n, {
            const vec normed = (load(h + c, left) - mean) * rstd;
            if (layer->xhat) store(xhat + c, left, normed);
            store(h + c, left, normed * load(g + c, left) + load(b + c, left));
        });
    } else if (layer->xhat) {
        EACH(c, n, {
            const vec normed = (load(h + c, left) - mean) * rstd;
            store(xhat + c, left, normed);
            store(h + c, left, mish(normed * load(g + c, left) + load(b + c, left)));
        });
    } else {
        EACH(c, n, store(h + c, left, mish((load(h + c, left) - mean) * rstd * load(g + c, left) + load(b + c, left))););
    }
    if (last) simnorm(h, n, net->simnorm, (int)net->strided, work);
}

// Where the input of some rows is: both parts with the distance of their rows, or what x1 contributes to the first layer's product in
// place of x1, of which `shared` rows in turn use the same, the first one `offset` rows ago.
typedef struct {
    const float *x1, *x2, *start;
    int64_t ld1, ld2, shared, offset;
} Input;

// A block of rows through all layers, into out. `row`: place of the first one in what is kept for the backward pass, and in the dropout factors.
static void forward_block(
    const Net *net, int64_t member, int64_t row, int64_t rows, Input x, float *out, int64_t ldo, float *scratch, int64_t length, int64_t size) {
    float *buffers[] = {scratch, scratch + size * length}, *work = scratch + 2 * size * length;
    uint16_t *rounded = (uint16_t *)(work + length);
    for (int64_t l = 0; l < net->layers; l++) {
        const Layer *layer = &net->layer[l];
        float *c = buffers[l & 1];
        const float *a = buffers[~l & 1], *init = NULL;
        int64_t lda = length, from = 0, k = layer->in, ldi = 0;
        if (l == 0 && x.start) {
            const int64_t width = up(layer->out, PANEL);
            a = x.x2, lda = x.ld2, from = net->d1, k = net->d2, init = x.start;
            if (x.offset + rows > x.shared) {
                for (int64_t r = 0; r < rows; r++) memcpy(c + r * length, x.start + (x.offset + r) / x.shared * width, 4 * width);
                init = c, ldi = length;
            }
        } else if (l == 0 && net->d2) {
            float *both = buffers[1];
            for (int64_t r = 0; r < rows; r++) {
                memcpy(both + r * length, x.x1 + r * x.ld1, 4 * net->d1);
                memcpy(both + r * length + net->d1, x.x2 + r * x.ld2, 4 * net->d2);
            }
        } else if (l == 0) {
            a = x.x1, lda = x.ld1;
        }
        product(net, l, member, rows, a, lda, from, k, init, ldi, c, length, rounded);
        for (int64_t r = 0; r < rows; r++) finish_row(net, l, member, row + r, c + r * length, work);
        if (l == net->layers - 1)
            for (int64_t r = 0; r < rows; r++) memcpy(out + r * ldo, c + r * length, 4 * layer->out);
    }
}

// What a row of x1 contributes to the first layer's product, bias included, [out, padded to panels].
static void start_row(const Net *net, int64_t member, const float *x1, float *start, float *scratch, int64_t length, int64_t size) {
    product(net, 0, member, 1, x1, net->d1, 0, net->d1, NULL, 0, scratch, length, (uint16_t *)(scratch + 2 * size * length));
    memcpy(start, scratch, 4 * up(net->layer[0].out, PANEL));
}

// Pack what is not packed yet, shared among the threads of a parallel region; they have to meet before it is used.
static void pack_shared(const Net *net) {
    const int64_t pairs = net->seeds * net->heads;
    for (int64_t l = 0; l < net->layers; l++) {
        const int64_t panels = up(net->layer[l].out, PANEL) / PANEL;
#pragma omp for schedule(static) collapse(2) nowait
        for (int64_t pair = 0; pair < pairs; pair++)
            for (int64_t panel = 0; panel < panels; panel++)
                if (!done_before(net, pair, net->layer[l].ready)) pack_forward(net, l, net->members[pair], panel);
    }
}

static void mark_packed(const Net *net) {
    for (int64_t l = 0; l < net->layers; l++)
        for (int64_t pair = 0; pair < net->seeds * net->heads; pair++) net->layer[l].ready[net->members[pair]] = 1;
}

// Memory that a thread needs for blocks of `size` rows of networks whose rows are `length` long.
static int64_t scratch_floats(int64_t length, int64_t size) { return (3 * size + 1) * length; }
