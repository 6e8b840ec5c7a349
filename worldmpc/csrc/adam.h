// Adam (Kingma and Ba 2015, algorithm 1) over flat parameters of several seeds, behind one clip per seed by the norm of all its gradients.

#pragma once
#include <omp.h>
#include "network.h"

enum { MAX_GROUPS = 8, SUMMED = 4096 }; // SUMMED: squares in one partial sum, so that a norm does not depend on the number of threads

typedef struct {
    int64_t size; // parameters of a seed, P
    float *param, *exp_avg, *exp_avg_sq; // [N, P]
    const float *grad;                   // [N, P]
    float *step;                         // []
    const float *lr;                     // []
} Group;

typedef struct {
    int64_t groups, seeds, threads;
    double beta1, beta2, eps, clip;
    const float *skip;    // [N] where any is not 0, nothing is applied
    float *norm, *skipped; // [N] norms before clipping; 1 for seeds that were the reason for applying nothing, else 0
    Group group[MAX_GROUPS];
} Adam;

static float sum_of_squares(const float *x, int64_t n) {
    vec sum[2] = {{0}};
    EACH(c, n, {
        const vec v = load(x + c, left);
        sum[c / LANES & 1] += v * v;
    });
    return total(sum[0] + sum[1]);
}

static void adam_of_part(const Adam *a, const Group *g, int64_t first, int64_t n, float factor, float step_size, float root) {
    const float one = (float)(1.0 - a->beta1), keep = (float)a->beta2, two = (float)(1.0 - a->beta2), eps = (float)a->eps;
    float *param = g->param + first, *mean = g->exp_avg + first, *square = g->exp_avg_sq + first;
    const float *grad = g->grad + first;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const float d = grad[i] * factor, m = mean[i] + one * (d - mean[i]), s = keep * square[i] + two * d * d;
        mean[i] = m, square[i] = s;
        param[i] -= step_size * m / (sqrtf(s) / root + eps);
    }
}

// One step; returns 1 where memory ran out, and then nothing has changed.
int worldmpc_adam(const Adam *a) {
    int64_t parts[MAX_GROUPS + 1] = {0}, work = 0;
    for (int64_t i = 0; i < a->groups; i++) {
        parts[i + 1] = parts[i] + (a->group[i].size + SUMMED - 1) / SUMMED; // of one seed
        work += a->seeds * a->group[i].size;
    }
    const int64_t each = parts[a->groups];
    const int threads = threads_for(a->threads, 16 * work);
    float *sums = malloc(4 * (a->seeds * each + 1)), *factor = malloc(4 * (a->seeds + 1));
    if (!sums || !factor) {
        free(sums), free(factor);
        return 1;
    }
    int skipped = 0;
#pragma omp parallel num_threads(threads)
    {
        const unsigned mode = flush_tiny();
#pragma omp for schedule(static) collapse(2)
        for (int64_t seed = 0; seed < a->seeds; seed++)
            for (int64_t part = 0; part < each; part++) {
                int64_t i = 0;
                while (part >= parts[i + 1]) i++;
                const int64_t first = (part - parts[i]) * SUMMED;
                sums[seed * each + part] =
                    sum_of_squares(a->group[i].grad + seed * a->group[i].size + first, least(a->group[i].size - first, SUMMED));
            }
#pragma omp single
        {
            for (int64_t seed = 0; seed < a->seeds; seed++) {
                double sum = 0;
                for (int64_t part = 0; part < each; part++) sum += sums[seed * each + part];
                const float norm = (float)sqrt(sum);
                a->norm[seed] = norm;
                a->skipped[seed] = a->skip[seed] > 0.0f || !isfinite(norm);
                skipped |= a->skipped[seed] > 0.0f;
                const float most = (float)(a->clip / ((double)norm + 1e-6));
                factor[seed] = most < 1.0f ? most : 1.0f;
            }
            for (int64_t i = 0; i < a->groups && !skipped; i++) *a->group[i].step += 1.0f;
        }
        if (!skipped) {
#pragma omp for schedule(static) collapse(2)
            for (int64_t seed = 0; seed < a->seeds; seed++)
                for (int64_t part = 0; part < each; part++) {
                    int64_t i = 0;
                    while (part >= parts[i + 1]) i++;
                    const Group *g = &a->group[i];
                    const int64_t first = (part - parts[i]) * SUMMED;
                    const double steps = *g->step, slow = 1.0 - pow(a->beta1, steps), slower = 1.0 - pow(a->beta2, steps);
                    adam_of_part(a, g, seed * g->size + first, least(g->size - first, SUMMED), factor[seed], (float)(*g->lr / slow),
                                 (float)sqrt(slower));
                }
        }
        _mm_setcsr(mode);
    }
    free(sums);
    free(factor);
    return 0;
}
