/* Training: the passes over x in their order, and what is between them, on vectors of C or g values and on the logits.
   It is what stages.py does with PyTorch for other backends: dozens of calls, which take longer than a small map. */

#include "cpu.h"

#include <math.h>

static int run(struct job job, int64_t stages) {
    job.stages = stages;
    return ulsam_run(&job);
}

/* mean and biased variance of the channels of a job's x; parts [2][B, C] */
static int moments(struct job job, float *parts, float *mean, float *variance) {
    int64_t C = job.C;
    float share = 1.0f / (float)job.B, pixel = 1.0f / (float)(job.H * job.W);
    job.q = parts, job.r = parts + job.B * C;
    int failed = run(job, MOMENTS);
    for (int64_t c = 0; c < C; c++) mean[c] = variance[c] = 0;
    for (int64_t b = 0; b < job.B; b++)
        for (int64_t c = 0; c < C; c++) mean[c] += share * job.q[b * C + c];
    for (int64_t b = 0; b < job.B; b++)
        for (int64_t c = 0; c < C; c++) {
            float d = job.q[b * C + c] - mean[c];
            variance[c] += share * (d * d + pixel * job.r[b * C + c]);
        }
    return failed;
}

/* norm1(w * x) = scale * x + shift */
static void fold(
    const struct training *t, const float *w, const float *mean, const float *variance, float *scale, float *shift
) {
    for (int64_t c = 0; c < t->job.C; c++) {
        scale[c] = w[c] / sqrtf(w[c] * w[c] * variance[c] + t->eps) * t->gamma[c];
        shift[c] = t->beta[c] - scale[c] * mean[c];
    }
}

/* norm2 of the logits */
static void normalize(const struct training *t, const float *mean, const float *variance, float *normed) {
    const struct job *job = &t->job;
    const float *l = job->l;
    int64_t pixels = job->H * job->W;
    for (int64_t k = 0; k < job->B * job->g; k++, l += pixels, normed += pixels) {
        int64_t n = k % job->g;
        float center = mean[n], factor = t->gamma2[n] / sqrtf(variance[n] + t->eps), add = t->beta2[n];
        for (int64_t p = 0; p < pixels; p++) normed[p] = (l[p] - center) * factor + add;
    }
}

/* sum of d * (l - center), in parts that fit a vector */
static float product(const float *d, const float *l, float center, int64_t pixels) {
    float parts[16] = {0}, sum = 0;
    int64_t p = 0;
    for (; p + 16 <= pixels; p += 16)
        for (int k = 0; k < 16; k++) parts[k] += d[p + k] * (l[p + k] - center);
    for (; p < pixels; p++) sum += d[p] * (l[p] - center);
    for (int k = 0; k < 16; k++) sum += parts[k];
    return sum;
}

/* dl, the gradient of norm2's result, to that of the logits, in place; sums [B, g] are dl's over the pixels */
static void normalize_back(
    const struct training *t, const float *mean, const float *variance, const float *sums, float *dl
) {
    const struct job *job = &t->job;
    int64_t pixels = job->H * job->W, step = job->g * pixels;
    float share = 1.0f / (float)(job->B * pixels);
    for (int64_t n = 0; n < job->g; n++) {
        float *d = dl + n * pixels, center = mean[n], inverse = 1 / sqrtf(variance[n] + t->eps), beta = 0, gamma = 0;
        const float *l = job->l + n * pixels;
        for (int64_t b = 0; b < job->B; b++) {
            beta += sums[b * job->g + n];
            gamma += product(d + b * step, l + b * step, center, pixels);
        }
        t->dbeta2[n] = beta, t->dgamma2[n] = gamma *= inverse;
        float factor = t->gamma2[n] * inverse, less = beta * share, slope = gamma * inverse * share;
        for (int64_t b = 0; b < job->B; b++, d += step, l += step)
            for (int64_t p = 0; p < pixels; p++) d[p] = factor * (d[p] - less - slope * (l[p] - center));
    }
}

/* sums over the batch, in its first row */
static void sum_rows(float *rows, int64_t B, int64_t size) {
    for (int64_t b = 1; b < B; b++)
        for (int64_t k = 0; k < size; k++) rows[k] += rows[b * size + k];
}

int ulsam_forward(const struct training *t) {
    struct job job = t->job;
    int64_t C = job.C, g = job.g;
    float *mean = t->moments, *variance = mean + C, *mean2 = variance + C, *variance2 = mean2 + g;
    float *scale = t->memory, *shift = scale + C, *bias = shift + C;
    float *parts = bias + g, *normed = parts; /* one after the other */
    int failed = moments(job, parts, mean, variance);
    fold(t, job.scale, mean, variance, scale, shift);
    job.scale = scale, job.shift = shift, job.bias = NULL;
    if (!job.relu) { /* the kernels leave the shift out, but the moments do show it */
        job.bias = bias;
        for (int64_t n = 0; n < g; n++) bias[n] = 0;
        for (int64_t c = 0; c < C; c++) bias[c / (C / g)] += job.weight[c] * shift[c];
    }
    failed |= run(job, LOGITS);
    struct job logits = job;
    logits.x = job.l, logits.C = g, logits.channels_last = logits.bf16 = 0;
    failed |= moments(logits, parts, mean2, variance2);
    normalize(t, mean2, variance2, normed);
    job.l = normed;
    return failed | run(job, MULTIPLY);
}

int ulsam_backward(const struct training *t) {
    struct job job = t->job;
    const float *w = job.scale, *weight = job.weight;
    int64_t B = job.B, C = job.C, g = job.g, maps = B * g * job.H * job.W;
    float *dbias = t->memory, *q = dbias + B * g, *r = q + B * C, *scale = r + B * C, *shift = scale + C;
    job.dbias = dbias, job.q = q, job.r = r;
    if (!t->gamma) {
        int failed = run(job, MAPS_BACK | INPUT_BACK);
        sum_rows(dbias, B, g), sum_rows(q, B, C), sum_rows(r, B, C);
        for (int64_t c = 0; c < C; c++) {
            t->dscale[c] = weight[c] * q[c], t->dshift[c] = weight[c] * r[c];
            t->dweight[c] = w[c] * q[c] + (job.shift ? job.shift[c] * r[c] : 0);
        }
        for (int64_t n = 0; n < g; n++) t->dbias[n] = dbias[n];
        return failed;
    }
    const float *mean = t->moments, *variance = mean + C, *mean2 = variance + C, *variance2 = mean2 + g;
    float *normed = shift + C, *dl = normed + maps, share = 1.0f / (float)(B * job.H * job.W);
    fold(t, w, mean, variance, scale, shift);
    normalize(t, mean2, variance2, normed);
    job.scale = scale, job.shift = shift, job.l = normed, job.dl = dl;
    int failed = run(job, MAPS_BACK);
    normalize_back(t, mean2, variance2, dbias, dl);
    failed |= run(job, INPUT_BACK);
    sum_rows(q, B, C), sum_rows(r, B, C);
    for (int64_t c = 0; c < C; c++) {
        float inverse = 1 / sqrtf(w[c] * w[c] * variance[c] + t->eps), standard = w[c] * inverse;
        float dbeta = weight[c] * r[c]; /* also the gradient of shift; that of scale, with shift's part in it: */
        float dscale = weight[c] * q[c] - mean[c] * dbeta;
        t->dweight[c] = scale[c] * q[c] + shift[c] * r[c];
        t->dgamma[c] = dscale * standard, t->dbeta[c] = dbeta;
        t->dscale[c] = dscale * t->gamma[c] * t->eps * inverse * inverse * inverse;
        t->dshift[c] = 0; /* a bias before BatchNorm changes nothing */
        /* the gradients of mean and variance, as what they add to each x: q + r * x */
        r[c] = -share * t->dgamma[c] * scale[c] * standard;
        q[c] = -share * scale[c] * dbeta - r[c] * mean[c];
    }
    for (int64_t n = 0; n < g; n++) t->dbias[n] = 0;
    return failed | run(job, ADD);
}
