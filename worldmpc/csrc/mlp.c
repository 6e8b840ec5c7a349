// Whole multilayer perceptrons on a CPU, forward and backward, and returns of imagined sequences.
//
// A block of rows goes through all layers while it is in the cache, so that nothing but the result (and, for training, what the
// backward pass needs) is written to memory, and threads meet once per network instead of once per operation.
// No allocation outlives a call. Functions return 0, or 1 where memory ran out.

#include <omp.h>
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include "network.h"

#ifndef __AVX512BF16__
static void begin_bf16(void) {}
static void end_bf16(void) {}
#endif

// Forward --------------------------------------------------------------------------------------------------------------------

// The forward pass of all seeds, heads and rows.
int worldmpc_forward(const Net *net) {
    const int64_t pairs = net->seeds * net->heads, length = row_length(net);
    const int threads = threads_for(net->threads, multiplications(net));
    const int64_t size = block_rows(net->rows, length, pairs, threads), blocks = (net->rows + size - 1) / size, tall = up(size, 2 * PAIRS);
    const int64_t width = up(net->layer[0].out, PANEL), starts = net->repeat > 1 ? net->rows / net->repeat : 0;
    int failed = 0;
    float *start = starts ? room(pairs * starts * width, &failed) : NULL;
#pragma omp parallel num_threads(threads)
    {
        const unsigned mode = flush_tiny();
        float *scratch = room(scratch_floats(length, tall), &failed);
        if (net->bf16) begin_bf16();
        pack_shared(net);
#pragma omp barrier
        if (starts && !failed) {
#pragma omp for schedule(static) collapse(2)
            for (int64_t pair = 0; pair < pairs; pair++)
                for (int64_t r = 0; r < starts; r++)
                    start_row(net, net->members[pair], net->x1 + (pair / net->heads * starts + r) * net->d1, start + (pair * starts + r) * width,
                              scratch, length, tall);
        }
        if (!failed) {
#pragma omp for schedule(static) collapse(2)
            for (int64_t pair = 0; pair < pairs; pair++)
                for (int64_t block = 0; block < blocks; block++) {
                    const int64_t seed = pair / net->heads, first = block * size, row = seed * net->rows + first, n = net->layer[net->layers - 1].out;
                    const Input x = {
                        .x1 = net->x1 + row * net->d1, .ld1 = net->d1, .x2 = net->x2 + row * net->d2, .ld2 = net->d2,
                        .start = starts ? start + (pair * starts + first / net->repeat) * width : NULL,
                        .shared = net->repeat, .offset = first % net->repeat};
                    forward_block(net, net->members[pair], pair * net->rows + first, least(net->rows - first, size), x,
                                  net->out + (pair * net->rows + first) * n, n, scratch, length, tall);
                }
        }
        if (net->bf16) end_bf16();
        free(scratch);
        _mm_setcsr(mode);
    }
    free(start);
    if (!failed) mark_packed(net);
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
    const int threads = threads_for(net->threads, multiplications(net));
    const int64_t size = block_rows(net->rows, length, net->seeds, threads), blocks = (net->rows + size - 1) / size;
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
            const int64_t panels = input_panels(net, l);
#pragma omp for schedule(static) collapse(2) nowait
            for (int64_t pair = 0; pair < pairs; pair++)
                for (int64_t panel = 0; panel < panels; panel++) {
                    if (done_before(net, pair, layer->ready_back) || (l == 0 && !net->dx1 && !net->dx2)) continue;
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
            if (l || net->dx1 || net->dx2) layer->ready_back[net->members[pair]] = 1;
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
            const float *from = l ? net->layer[l - 1].xhat + pair * net->rows * ld
                                : second ? net->x2 + seed * net->rows * ld : net->x1 + seed * (net->rows / net->repeat) * ld;
            for (int64_t r = 0; r < depth; r++) {
                float *row = input + (p * DEPTH + r) * PANEL;
                pack_row(from + (first + r) / share * ld + column, columns, row);
                if (!l) continue;
                // The layer below ended in Mish: its result is computed again rather than kept.
                const float *g = net->layer[l - 1].ln_weight + member * ld + column, *b = net->layer[l - 1].ln_bias + member * ld + column;
                EACH(c, columns, store(row + c, left, mish(load(row + c, left) * load(g + c, left) + load(b + c, left))););
            }
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
    const int threads = threads_for(net->threads, multiplications(net));
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

#include "adam.h"
#include "returns.h"

int64_t worldmpc_panel(void) { return PANEL; }
int64_t worldmpc_tile(void) { return TILE; }
int64_t worldmpc_sizes(void) { return sizeof(Returns) + sizeof(TwoHot) + sizeof(Gaussian) + sizeof(Adam); }

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
