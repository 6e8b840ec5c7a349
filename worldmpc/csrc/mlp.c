// Whole multilayer perceptrons on a CPU, forward and backward.
//
// A block of rows goes through all layers while it is in the cache, so that nothing but the result (and, for training, what the
// backward pass needs) is written to memory, and threads meet once per network instead of once per operation.
//
// Shapes: S stacked seeds, Q heads over the same input, M rows; parameters [members, out, in]. No allocation outlives a call.

#include <omp.h>
#include <stdlib.h>
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif
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
    float *xhat, *rstd, *y;                           // kept for the backward pass [S, Q, M, out], [S, Q, M], [S, Q, M, out]; or NULL
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

static int threads_for(const Net *net) { return (int)least(net->threads, multiplications(net) / SMALL + 1); }

// Length of the rows of a block in any layer: not a power of two, which would put all rows into the same sets of the cache.
static int64_t row_length(const Net *net) {
    int64_t width = net->d1 + net->d2 + 4 * PAIRS;
    for (int64_t l = 0; l < net->layers; l++) width = width > net->layer[l].out ? width : net->layer[l].out;
    return up(width, PANEL) + LANES;
}

// Rows of a block: so many that the weights are not read too often, few enough for the cache, and as many blocks as threads can share evenly.
static int64_t block_rows(const Net *net, int64_t units, int threads) {
    const int64_t most = up(CACHE / (8 * row_length(net)), TILE);
    int64_t blocks = (net->rows + most - 1) / most;
    while ((blocks * units) % threads && up((net->rows + blocks - 1) / blocks, TILE) > TILE) blocks++;
    return up((net->rows + blocks - 1) / blocks, TILE);
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
    float *const y = layer->y ? layer->y + row * n : h;
    if (last) {
        EACH(c, n, {
            const vec normed = (load(h + c, left) - mean) * rstd;
            if (layer->xhat) store(xhat + c, left, normed);
            store(h + c, left, normed * load(g + c, left) + load(b + c, left));
        });
    } else if (layer->xhat) {
        EACH(c, n, {
            const vec normed = (load(h + c, left) - mean) * rstd;
            const vec result = mish(normed * load(g + c, left) + load(b + c, left));
            store(xhat + c, left, normed);
            store(h + c, left, result);
            store(y + c, left, result);
        });
    } else {
        EACH(c, n, store(h + c, left, mish((load(h + c, left) - mean) * rstd * load(g + c, left) + load(b + c, left))););
    }
    if (last) simnorm(h, n, net->simnorm, (int)net->strided, work);
}

// One block of rows of one pair through all layers. `start`: what x1 contributes to the first layer, where many rows share its rows.
static void forward_block(const Net *net, int64_t pair, int64_t first, int64_t rows, const float *start, float *scratch, int64_t length, int64_t size) {
    const int64_t member = net->members[pair], seed = pair / net->heads, row = seed * net->rows + first, at = pair * net->rows + first;
    float *buffers[] = {scratch, scratch + size * length}, *work = scratch + 2 * size * length;
    uint16_t *rounded = (uint16_t *)(work + length);
    for (int64_t l = 0; l < net->layers; l++) {
        const Layer *layer = &net->layer[l];
        float *c = buffers[l & 1];
        const float *a = buffers[~l & 1], *init = NULL;
        int64_t lda = length, from = 0, k = layer->in, ldi = 0;
        if (l == 0 && start) {
            const int64_t width = up(layer->out, PANEL), begin = pair * (net->rows / net->repeat);
            a = net->x2 + row * net->d2, lda = net->d2, from = net->d1, k = net->d2;
            init = start + (begin + first / net->repeat) * width;
            if (first / net->repeat != (first + rows - 1) / net->repeat) {
                for (int64_t r = 0; r < rows; r++) memcpy(c + r * length, start + (begin + (first + r) / net->repeat) * width, 4 * width);
                init = c, ldi = length;
            }
        } else if (l == 0 && net->d2) {
            float *both = buffers[1];
            for (int64_t r = 0; r < rows; r++) {
                memcpy(both + r * length, net->x1 + (row + r) * net->d1, 4 * net->d1);
                memcpy(both + r * length + net->d1, net->x2 + (row + r) * net->d2, 4 * net->d2);
            }
        } else if (l == 0) {
            a = net->x1 + row * net->d1, lda = net->d1;
        }
        product(net, l, member, rows, a, lda, from, k, init, ldi, c, length, rounded);
        for (int64_t r = 0; r < rows; r++) finish_row(net, l, member, at + r, c + r * length, work);
        if (l == net->layers - 1)
            for (int64_t r = 0; r < rows; r++) memcpy(net->out + (at + r) * layer->out, c + r * length, 4 * layer->out);
    }
}

// The forward pass of all seeds, heads and rows. Returns 0, or 1 where memory ran out.
int worldmpc_forward(const Net *net) {
    const int64_t pairs = net->seeds * net->heads, length = row_length(net);
    const int threads = threads_for(net);
    const int64_t size = block_rows(net, pairs, threads), blocks = (net->rows + size - 1) / size, tall = up(size, 2 * PAIRS);
    const int64_t width = up(net->layer[0].out, PANEL), starts = net->repeat > 1 ? net->rows / net->repeat : 0;
    int failed = 0;
    float *start = starts ? room(pairs * starts * width, &failed) : NULL;
#pragma omp parallel num_threads(threads)
    {
        const unsigned mode = flush_tiny();
        float *scratch = room((3 * tall + 1) * length, &failed);
#ifdef __AVX512BF16__
        if (net->bf16) begin_bf16();
#endif
        for (int64_t l = 0; l < net->layers; l++) {
            const int64_t panels = up(net->layer[l].out, PANEL) / PANEL;
#pragma omp for schedule(static) collapse(2) nowait
            for (int64_t pair = 0; pair < pairs; pair++)
                for (int64_t panel = 0; panel < panels; panel++)
                    if (!done_before(net, pair, net->layer[l].ready)) pack_forward(net, l, net->members[pair], panel);
        }
#pragma omp barrier
        if (starts && !failed) {
            uint16_t *rounded = (uint16_t *)(scratch + (2 * tall + 1) * length);
#pragma omp for schedule(static) collapse(2)
            for (int64_t pair = 0; pair < pairs; pair++)
                for (int64_t r = 0; r < starts; r++) {
                    const float *x = net->x1 + (pair / net->heads * starts + r) * net->d1;
                    product(net, 0, net->members[pair], 1, x, net->d1, 0, net->d1, NULL, 0, scratch, length, rounded);
                    memcpy(start + (pair * starts + r) * width, scratch, 4 * width);
                }
        }
        if (!failed) {
#pragma omp for schedule(static) collapse(2)
            for (int64_t pair = 0; pair < pairs; pair++)
                for (int64_t block = 0; block < blocks; block++)
                    forward_block(net, pair, block * size, least(net->rows - block * size, size), start, scratch, length, tall);
        }
#ifdef __AVX512BF16__
        if (net->bf16) end_bf16();
#endif
        free(scratch);
        _mm_setcsr(mode);
    }
    free(start);
    for (int64_t l = 0; l < net->layers && !failed; l++)
        for (int64_t pair = 0; pair < pairs; pair++) net->layer[l].ready[net->members[pair]] = 1;
    return failed;
}

// Backward -------------------------------------------------------------------------------------------------------------------

// Panels of a layer's input; x1 and x2 are packed apart, so that the gradient of one of them can be had alone.
static int64_t input_panels(const Net *net, int64_t l) {
    return l ? up(net->layer[l].in, PANEL) / PANEL : (up(net->d1, PANEL) + up(net->d2, PANEL)) / PANEL;
}

static int64_t first_panels(const Net *net, int64_t l) { return l ? input_panels(net, l) : up(net->d1, PANEL) / PANEL; }

// First column of a panel in the layer's input.
static int64_t panel_column(const Net *net, int64_t l, int64_t panel) {
    const int64_t split = first_panels(net, l);
    return panel < split ? panel * PANEL : net->d1 + (panel - split) * PANEL;
}

static int64_t panel_columns(const Net *net, int64_t l, int64_t panel) {
    const int64_t end = l == 0 && panel < first_panels(net, l) ? net->d1 : net->layer[l].in;
    return least(end - panel_column(net, l, panel), PANEL);
}

static float *packed_back_panel(const Net *net, int64_t l, int64_t member, int64_t panel) {
    return net->layer[l].packed_back + (member * input_panels(net, l) + panel) * net->layer[l].out * PANEL;
}

// From the gradient behind layer l (in d) to the one behind its product (into dh), for one row; adds to the sums of the parameters.
static void back_row(const Net *net, int64_t l, int64_t member, int64_t row, const float *d, float *dh, float *work, float *sums) {
    const Layer *layer = &net->layer[l];
    const int64_t n = layer->out;
    const float *keep = l == 0 && net->keep ? net->keep + row * n : NULL;
    float *dbias = sums, *dg = sums + n, *db = sums + 2 * n;
    if (!layer->ln_weight) {
        memcpy(dh, d, 4 * n);
    } else {
        const float *g = layer->ln_weight + member * n, *b = layer->ln_bias + member * n, *xhat = layer->xhat + row * n;
        const int last = l == net->layers - 1 && net->simnorm;
        if (last) simnorm_back(layer->y + row * n, d, n, net->simnorm, (int)net->strided, work);
        vec sum = {0}, inner = {0};
        EACH(c, n, {
            const vec normed = load(xhat + c, left);
            const vec factor = load(g + c, left);
            vec dn;
            if (last) dn = load(work + c, left);
            else dn = load(d + c, left) * mish_slope(normed * factor + load(b + c, left));
            const vec scaled = dn * factor;
            sum += scaled;
            inner += scaled * normed;
            store(dg + c, left, load(dg + c, left) + dn * normed);
            store(db + c, left, load(db + c, left) + dn);
            store(work + c, left, scaled);
        });
        const float mean = total(sum) / n, along = total(inner) / n, rstd = layer->rstd[row];
        EACH(c, n, store(dh + c, left, rstd * (load(work + c, left) - mean - load(xhat + c, left) * along)););
    }
    if (keep) {
#pragma omp simd
        for (int64_t c = 0; c < n; c++) dh[c] *= keep[c];
    }
#pragma omp simd
    for (int64_t c = 0; c < n; c++) dbias[c] += dh[c];
}

// The backward pass of one block of rows of one seed, all heads after each other, as their gradients of the input add up.
static void backward_block(const Net *net, int64_t seed, int64_t first, int64_t rows, float *sums, const int64_t *offset, int64_t per_pair, float *scratch, int64_t length, int64_t size) {
    float *d = scratch, *dh = d + size * length, *a1 = dh + size * length, *a2 = a1 + size * length, *work = a2 + size * length;
    const int64_t split = first_panels(net, 0), row = seed * net->rows + first;
    for (int64_t head = 0; head < net->heads; head++) {
        const int64_t pair = seed * net->heads + head, member = net->members[pair], at = pair * net->rows + first;
        for (int64_t l = net->layers - 1; l >= 0; l--) {
            const Layer *layer = &net->layer[l];
            const int64_t n = layer->out;
            for (int64_t r = 0; r < rows; r++) {
                const float *from = l == net->layers - 1 ? net->grad + (at + r) * n : d + r * length;
                back_row(net, l, member, at + r, from, dh + r * length, work, sums + pair * per_pair + offset[l]);
                if (!layer->dweight) continue;
                float *to = layer->dh + (pair * up(n, TILE) * net->dh_rows + (first + r) * TILE);
                for (int64_t o = 0; o < n; o += TILE, to += net->dh_rows * TILE) memcpy(to, dh + r * length + o, 4 * TILE);
            }
            const float zero[PANEL] = {0};
            for (int64_t panel = 0; panel < input_panels(net, l); panel++) {
                float *to = d + panel * PANEL;
                if (l == 0) {
                    if (!(panel < split ? net->dx1 : net->dx2)) continue;
                    to = panel < split ? a1 + panel * PANEL : a2 + (panel - split) * PANEL;
                }
                const int adds = l == 0 && head;
                multiply_panel(rows, dh, length, n, packed_back_panel(net, l, member, panel), adds ? to : zero, adds ? length : 0, to, length);
            }
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        if (net->dx1) memcpy(net->dx1 + (row + r) * net->d1, a1 + r * length, 4 * net->d1);
        if (net->dx2) memcpy(net->dx2 + (row + r) * net->d2, a2 + r * length, 4 * net->d2);
    }
}

// The backward pass down to the inputs: fills dh of all layers, the gradients of biases and norms, dx1 and dx2.
int worldmpc_backward_rows(const Net *net) {
    const int64_t pairs = net->seeds * net->heads, length = row_length(net);
    const int threads = threads_for(net);
    const int64_t size = block_rows(net, net->seeds, threads), blocks = (net->rows + size - 1) / size;
    int64_t per_pair = 0, offset[MAX_LAYERS];
    for (int64_t l = 0; l < net->layers; l++) offset[l] = per_pair, per_pair += up(3 * net->layer[l].out, LANES);
    float *sums = calloc(threads * pairs * per_pair, 4);
    int failed = !sums;
#pragma omp parallel num_threads(threads)
    {
        const unsigned mode = flush_tiny();
        float *scratch = room((4 * size + 1) * length, &failed);
        for (int64_t l = 0; l < net->layers; l++) {
            const Layer *layer = &net->layer[l];
            const int64_t panels = input_panels(net, l), split = first_panels(net, l);
#pragma omp for schedule(static) collapse(2) nowait
            for (int64_t pair = 0; pair < pairs; pair++)
                for (int64_t panel = 0; panel < panels; panel++) {
                    if (done_before(net, pair, layer->ready_back) || (l == 0 && !(panel < split ? net->dx1 : net->dx2))) continue;
                    const float *weight = layer->weight + net->members[pair] * layer->out * layer->in + panel_column(net, l, panel);
                    float *packed = packed_back_panel(net, l, net->members[pair], panel);
                    for (int64_t o = 0; o < layer->out; o++) pack_row(weight + o * layer->in, panel_columns(net, l, panel), packed + o * PANEL);
                }
        }
#pragma omp barrier
        if (!failed) {
            float *own = sums + omp_get_thread_num() * pairs * per_pair;
#pragma omp for schedule(static) collapse(2)
            for (int64_t seed = 0; seed < net->seeds; seed++)
                for (int64_t block = 0; block < blocks; block++)
                    backward_block(net, seed, block * size, least(net->rows - block * size, size), own, offset, per_pair, scratch, length, size);
        }
        free(scratch);
        _mm_setcsr(mode);
    }
    for (int64_t l = 0; l < net->layers && !failed; l++) {
        const Layer *layer = &net->layer[l];
        const int64_t n = layer->out;
        float *into[] = {layer->dbias, layer->dln_weight, layer->dln_bias};
        for (int64_t pair = 0; pair < pairs; pair++) {
            for (int part = 0; part < 3; part++)
                for (int t = 0; into[part] && t < threads; t++) {
                    const float *from = sums + (t * pairs + pair) * per_pair + offset[l] + part * n;
                    float *to = into[part] + net->members[pair] * n;
                    for (int64_t c = 0; c < n; c++) to[c] += from[c];
                }
            // The first layer is complete only where both parts of its input were packed.
            if (l || (net->dx1 && (net->dx2 || !net->d2))) layer->ready_back[net->members[pair]] = 1;
        }
    }
    free(sums);
    return failed;
}

// dweight of one layer in `count` panels of its input: dh^T input, in passes of DEPTH rows. `input` has room for them.
static void weights_of_panels(const Net *net, int64_t pair, int64_t l, int64_t panel, int64_t count, float *input) {
    const Layer *layer = &net->layer[l];
    const int64_t member = net->members[pair], seed = pair / net->heads, n = layer->out, split = first_panels(net, l);
    const float zero[PANEL] = {0};
    for (int64_t first = 0; first < net->rows; first += DEPTH) {
        const int64_t depth = least(net->rows - first, DEPTH);
        for (int64_t p = 0; p < count; p++) {
            const int second = l == 0 && panel + p >= split;
            const int64_t ld = l ? layer->in : second ? net->d2 : net->d1, columns = panel_columns(net, l, panel + p);
            const int64_t column = panel_column(net, l, panel + p) - (second ? net->d1 : 0), share = l || second ? 1 : net->repeat;
            const float *from = l ? net->layer[l - 1].y + pair * net->rows * ld
                                : second ? net->x2 + seed * net->rows * ld : net->x1 + seed * (net->rows / net->repeat) * ld;
            for (int64_t r = 0; r < depth; r++) pack_row(from + (first + r) / share * ld + column, columns, input + (p * DEPTH + r) * PANEL);
        }
        const float *dh = layer->dh + pair * up(n, TILE) * net->dh_rows + first * TILE;
        const int adds = first || net->accumulate;
        for (int64_t o = 0; o < n; o += TILE, dh += net->dh_rows * TILE)
            for (int64_t p = 0; p < count; p++) {
                const int64_t height = least(n - o, TILE), columns = panel_columns(net, l, panel + p);
                float *to = layer->dweight + (member * n + o) * layer->in + panel_column(net, l, panel + p);
                if (columns == PANEL) {
                    multiply_transposed(height, dh, depth, input + p * DEPTH * PANEL, adds ? to : zero, adds ? layer->in : 0, to, layer->in);
                    continue;
                }
                float c[TILE * PANEL] = {0};
                for (int64_t r = 0; adds && r < height; r++) memcpy(c + r * PANEL, to + r * layer->in, 4 * columns);
                multiply_transposed(height, dh, depth, input + p * DEPTH * PANEL, c, PANEL, c, PANEL);
                for (int64_t r = 0; r < height; r++) memcpy(to + r * layer->in, c + r * PANEL, 4 * columns);
            }
    }
}

// Gradients of the weights of all layers.
int worldmpc_backward_weights(const Net *net) {
    const int64_t pairs = net->seeds * net->heads;
    const int threads = threads_for(net);
    int64_t panels = 0, units = 0, begin[MAX_LAYERS + 1] = {0};
    for (int64_t l = 0; l < net->layers; l++) panels += net->layer[l].dweight ? input_panels(net, l) : 0;
    // Several panels read dh once; enough units remain for the threads to share evenly.
    const int64_t together = panels * pairs >= 32 * threads ? 4 : panels * pairs >= 16 * threads ? 2 : 1;
    for (int64_t l = 0; l < net->layers; l++) begin[l + 1] = units += net->layer[l].dweight ? up(input_panels(net, l), together) / together : 0;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        const unsigned mode = flush_tiny();
        float *input = room(together * DEPTH * PANEL, &failed);
#pragma omp barrier
        if (!failed) {
#pragma omp for schedule(dynamic) collapse(2)
            for (int64_t pair = 0; pair < pairs; pair++)
                for (int64_t unit = 0; unit < units; unit++) {
                    int64_t l = 0;
                    while (unit >= begin[l + 1]) l++;
                    const int64_t panel = (unit - begin[l]) * together;
                    weights_of_panels(net, pair, l, panel, least(input_panels(net, l) - panel, together), input);
                }
        }
        free(input);
        _mm_setcsr(mode);
    }
    return failed;
}

int64_t worldmpc_panel(void) { return PANEL; }
int64_t worldmpc_tile(void) { return TILE; }
int64_t worldmpc_size(void) { return sizeof(Net); }

// Whether products of bfloat16 numbers can be used; asks the system for the processor's matrix registers where they are needed.
int worldmpc_bf16(void) {
#ifdef __AMX_BF16__
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#elif defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}
