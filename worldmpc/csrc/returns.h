// Returns of imagined sequences, as worldmpc.planners.rollout_return defines them, for the world model of TD-MPC2. Without a policy its critics
// read the latent alone; with one, an action of either Gaussian of sample_row as well.

#pragma once
#include "heads.h"
#include "network.h"

typedef struct {
    Net dynamics, reward, policy, critics, termination; // policy, termination: layers is 0 where there is none; critics: heads to average
    int64_t envs, samples, horizon;                     // E, S, H
    int64_t actions_dim, bins;                          // A, K
    int64_t hard;                                       // continuation by a threshold instead of a probability
    int64_t clipped;                                    // the policy's actions are clipped instead of squashed
    int64_t threads;
    float discount, log_std_min, log_std_max;
    const float *z, *actions, *eps, *support; // [E, Z], [H, E, S, A], [E, S, A] (for proposals [H, E, S, A]), [K]
    float *out;                               // [E, S]; proposals: [H, E, S, A]
} Returns;

static Gaussian gaussian_prior(const Returns *r) {
    return (Gaussian){.dims = r->actions_dim, .log_std_min = r->log_std_min, .log_std_max = r->log_std_max};
}

static void returns_of_block(const Returns *r, int64_t first, int64_t rows, const float *starts, int64_t gap, float *scratch, int64_t length, int64_t size) {
    const int64_t rest = r->envs * r->samples, n = r->bins, a = r->actions_dim;
    const int64_t starts_dynamics = up(r->dynamics.layer[0].out, PANEL), env = first / r->samples;
    float *z = scratch + scratch_floats(length, size), *logits = z + size * length, *act = logits + size * length;
    float *value = act + size * length, *weight = value + size;
    for (int64_t i = 0; i < rows; i++) value[i] = 0, weight[i] = 1;
    Input x = {.shared = r->samples, .offset = first % r->samples};
    for (int64_t h = 0; h < r->horizon; h++) {
        x.x1 = z, x.ld1 = length, x.x2 = r->actions + (h * rest + first) * a, x.ld2 = a;
        x.start = h ? NULL : starts + gap + env * up(r->reward.layer[0].out, PANEL);
        forward_block(&r->reward, 0, 0, rows, x, logits, length, scratch, length, size);
        x.start = h ? NULL : starts + env * starts_dynamics;
        forward_block(&r->dynamics, 0, 0, rows, x, z, length, scratch, length, size);
        for (int64_t i = 0; i < rows; i++) {
            value[i] += weight[i] * two_hot_value(logits + i * length, r->support, n);
            weight[i] *= r->discount;
        }
        if (!r->termination.layers) continue;
        x.start = NULL;
        forward_block(&r->termination, 0, 0, rows, x, logits, length, scratch, length, size);
        for (int64_t i = 0; i < rows; i++) {
            const float terminated = 1.0f / (1.0f + expf(-logits[i * length]));
            weight[i] *= 1.0f - (r->hard ? (float)(terminated > 0.5f) : terminated);
        }
    }
    x.start = NULL;
    if (r->policy.layers) {
        forward_block(&r->policy, 0, 0, rows, x, logits, length, scratch, length, size);
        const Gaussian prior = gaussian_prior(r);
        for (int64_t i = 0; i < rows; i++) sample_row(&prior, r->clipped, logits + i * length, r->eps + (first + i) * a, act + i * a);
        x.x2 = act, x.ld2 = a;
    }
    for (int64_t head = 0; head < r->critics.heads; head++) {
        forward_block(&r->critics, r->critics.members[head], 0, rows, x, logits, length, scratch, length, size);
        for (int64_t i = 0; i < rows; i++) value[i] += weight[i] * two_hot_value(logits + i * length, r->support, n) / r->critics.heads;
    }
    memcpy(r->out + first, value, 4 * rows);
}

int worldmpc_returns(const Returns *r) {
    const Net *possible[] = {&r->dynamics, &r->reward, &r->policy, &r->critics, &r->termination}, *nets[5];
    const int64_t rows = r->envs * r->samples;
    int64_t length = 0, work = 0, count = 0;
    for (int i = 0; i < 5; i++)
        if (possible[i]->layers) nets[count++] = possible[i];
    for (int i = 0; i < count; i++) length = length > row_length(nets[i]) ? length : row_length(nets[i]);
    for (int i = 0; i < count; i++) work += multiplications(nets[i]);
    const int threads = threads_for(r->threads, work);
    const int64_t size = block_rows(rows, length, 1, threads), blocks = (rows + size - 1) / size, tall = up(size, 2 * PAIRS);
    const int64_t starts[] = {up(r->dynamics.layer[0].out, PANEL), up(r->reward.layer[0].out, PANEL)};
    int failed = 0;
    float *start = room(r->envs * (starts[0] + starts[1]), &failed);
#pragma omp parallel num_threads(threads)
    {
        const unsigned mode = flush_tiny();
        float *scratch = room(scratch_floats(length, tall) + 3 * tall * length + 2 * tall, &failed);
        if (r->dynamics.bf16) begin_bf16();
        for (int i = 0; i < count; i++) pack_shared(nets[i]);
#pragma omp barrier
        if (!failed) {
#pragma omp for schedule(static) collapse(2)
            for (int i = 0; i < 2; i++)
                for (int64_t env = 0; env < r->envs; env++)
                    start_row(nets[i], 0, r->z + env * nets[i]->d1, start + i * r->envs * starts[0] + env * starts[i], scratch, length, tall);
#pragma omp for schedule(static)
            for (int64_t block = 0; block < blocks; block++)
                returns_of_block(r, block * size, least(rows - block * size, size), start, r->envs * starts[0], scratch, length, tall);
        }
        if (r->dynamics.bf16) end_bf16();
        free(scratch);
        _mm_setcsr(mode);
    }
    free(start);
    for (int i = 0; i < count && !failed; i++) mark_packed(nets[i]);
    return failed;
}

// Proposals of the policy prior: sampled actions, each followed by the dynamics but the last. Reads dynamics and policy alone.
int worldmpc_proposals(const Returns *r) {
    const Net *nets[] = {&r->dynamics, &r->policy};
    const int64_t rows = r->envs * r->samples, a = r->actions_dim;
    const int64_t length = row_length(nets[0]) > row_length(nets[1]) ? row_length(nets[0]) : row_length(nets[1]);
    const int threads = threads_for(r->threads, multiplications(nets[0]) + multiplications(nets[1]));
    const int64_t size = block_rows(rows, length, 1, threads), blocks = (rows + size - 1) / size, tall = up(size, 2 * PAIRS);
    const Gaussian prior = gaussian_prior(r);
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        const unsigned mode = flush_tiny();
        float *scratch = room(scratch_floats(length, tall) + 2 * tall * length, &failed);
        if (r->dynamics.bf16) begin_bf16();
        for (int i = 0; i < 2; i++) pack_shared(nets[i]);
#pragma omp barrier
        if (!failed) {
            float *z = scratch + scratch_floats(length, tall), *logits = z + tall * length;
#pragma omp for schedule(static)
            for (int64_t block = 0; block < blocks; block++) {
                const int64_t first = block * size, count = least(rows - first, size), d1 = r->dynamics.d1;
                for (int64_t i = 0; i < count; i++) memcpy(z + i * length, r->z + (first + i) / r->samples * d1, 4 * d1);
                for (int64_t h = 0; h < r->horizon; h++) {
                    float *act = r->out + (h * rows + first) * a;
                    Input x = {.x1 = z, .ld1 = length, .shared = 1};
                    forward_block(&r->policy, 0, 0, count, x, logits, length, scratch, length, tall);
                    for (int64_t i = 0; i < count; i++)
                        sample_row(&prior, r->clipped, logits + i * length, r->eps + (h * rows + first + i) * a, act + i * a);
                    x.x2 = act, x.ld2 = a;
                    if (h + 1 < r->horizon) forward_block(&r->dynamics, 0, 0, count, x, z, length, scratch, length, tall);
                }
            }
        }
        if (r->dynamics.bf16) end_bf16();
        free(scratch);
        _mm_setcsr(mode);
    }
    for (int i = 0; i < 2 && !failed; i++) mark_packed(nets[i]);
    return failed;
}
