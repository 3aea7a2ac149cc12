/* The kernels for one instruction set: a source file defines RUN and V (float lanes), may define TARGET (what the
   compiler may use beyond its flags) and NATIVE_MAX, then includes this.

   Work is done a unit at a time: groups n0..n1 of one image, which need nothing from any other. All sums are float32;
   bfloat16 is widened when it is read. In channels_last V channels are handled at once and pixels one after the other;
   in the contiguous layout V pixels at once and channels one after the other.

   The 3x3 maximum is that of 3 rows' maxima of 3 pixels. Its gradient goes to the first maximum in row-major order: to
   the first row that holds it, and there to the first pixel. A maximum passes over NaNs beside its own pixel: one NaN
   makes all of its group's map NaN, so it is enough that it stays where it is. */

#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"

#define PRAGMA(...) PRAGMA_(__VA_ARGS__)
#define PRAGMA_(...) _Pragma(#__VA_ARGS__)
#if defined(TARGET) && defined(__clang__)
PRAGMA(clang attribute push(__attribute__((target(TARGET))), apply_to = function))
#elif defined(TARGET)
PRAGMA(GCC target(TARGET))
#endif

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll_count(16)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

typedef float vf __attribute__((vector_size(4 * V)));
typedef int32_t vi __attribute__((vector_size(4 * V)));
typedef uint32_t vu __attribute__((vector_size(4 * V)));
typedef uint16_t vh __attribute__((vector_size(2 * V)));

#include "cpu_lanes.h"

/* one unit's memory; maps are [groups][ld] floats, ld = H * W and the rest of the last vector */

struct unit {
    const struct job *job;
    int64_t b, c0, c1; /* its image and channels */
    int n0, n1;        /* its groups */
    int64_t pixels, ld, width;
    float *maps, *dmaps;
    float *by_pixel, *dby_pixel; /* [pixels][width] */
    vf *sums;                    /* channels_last: [1 or TILE][ld] of V channels */
    vf *rows, *to_row;           /* of INPUT_BACK: as sums, with room around */
    int planes;                  /* contiguous: so many at a time */
    int64_t apart;               /* from one vector's rows or one plane to the next */
    float *plane[4];
    float *copy;                 /* a plane that is safe to read beyond its ends */
    int32_t *group, *place;      /* channels_last: of each channel, from n0 on; and its place for `spread` */
    int32_t *inside, *no_left, *no_right; /* -1 or 0 a pixel */
};

INLINE int lanes_at(int64_t at, int64_t end) { return end - at < V ? (int)(end - at) : V; }

/* map += bias; where a pixel is NaN all become it */
INLINE void add_bias(const struct unit *u, float *map, float bias) {
    vi nan = {0};
    for (int64_t p = 0; p < u->pixels; p += V) {
        vf l = get(map + p) + bias;
        nan |= (l != l) & get_ints(u->inside + p);
        put(map + p, l);
    }
    for (int k = 0; k < V; k++)
        for (int64_t p = 0; nan[k] && p < u->pixels; p += V) put(map + p, splat(NAN));
}

/* l + bias, of V pixels, with the ReLU; and the largest so far */
INLINE void add_and_compare(const struct unit *u, float *l, int64_t p, float bias, int relu, vf *most) {
    vf h = get(l + p) + bias;
    if (relu) h = positive(h);
    if (p + V > u->pixels) h = pick(get_ints(u->inside + p), h, splat(-INFINITY));
    *most = vmax(*most, h);
    put(l + p, h);
}

/* Maps l to plus + softmax(relu?(l + bias)), in place. A step of all maps comes before the next one: the steps of one
   map wait for each other. */
INLINE void softmax(const struct unit *u, int groups, const float *bias, int relu, float plus) {
    int64_t pixels = u->pixels, whole = pixels / V * V, many = 1;
    if (u->ld && u->ld < SOFTMAX_FLOATS) many = SOFTMAX_FLOATS / u->ld; /* a map may be empty */
    if (many > SOFTMAX_MAPS) many = SOFTMAX_MAPS;
    for (int64_t first = 0; first < groups; first += many) {
        float each[SOFTMAX_MAPS]; /* the largest value, then the share of 1 */
        int64_t maps = groups - first < many ? groups - first : many;
        float *all = u->maps + first * u->ld;
        for (int64_t n = 0; n < maps; n++) {
            float *l = all + n * u->ld, more = bias ? bias[first + n] : 0;
            vf most = splat(-INFINITY);
            for (int64_t p = 0; p < whole; p += V) add_and_compare(u, l, p, more, relu, &most);
            if (whole < pixels) add_and_compare(u, l, whole, more, relu, &most);
            each[n] = lanes_max(most);
        }
        for (int64_t n = 0; n < maps; n++) {
            float *l = all + n * u->ld;
            vf top = splat(each[n]), total = {0};
            for (int64_t p = 0; p < pixels; p += V) {
                vf e = exponential(get(l + p) - top);
                total += e;
                put(l + p, e);
            }
            each[n] = 1 / lanes_sum(total);
        }
        for (int64_t n = 0; n < maps; n++) {
            float *l = all + n * u->ld;
            for (int64_t p = 0; p < pixels; p += V) put(l + p, get(l + p) * each[n] + plus);
        }
    }
}

/* da, the gradient of a = softmax(relu?(l)), to that of l, in place; returns its sum */
INLINE float softmax_back(const struct unit *u, const float *l, const float *a, float *da, int relu) {
    vf dot = {0}, sum = {0};
    for (int64_t p = 0; p < u->pixels; p += V) dot += keep(get_ints(u->inside + p), get(a + p) * get(da + p));
    float mean = lanes_sum(dot);
    for (int64_t p = 0; p < u->pixels; p += V) {
        vf d = get(a + p) * (get(da + p) - mean);
        if (relu) d = keep(~(vi)(load(l, p, 0, lanes_at(p, u->pixels)) <= 0), d);
        d = keep(get_ints(u->inside + p), d);
        sum += d;
        put(da + p, d);
    }
    return lanes_sum(sum);
}

#include "cpu_last.h"
#include "cpu_planes.h"

/* the stages of one unit */

INLINE void run_unit(const struct unit *u, int last, int bf16, int relu) {
    const struct job *job = u->job;
    int64_t stages = job->stages, groups = u->n1 - u->n0, row = u->pixels * sizeof(float);
    float *l = job->l ? job->l + (u->b * job->g + u->n0) * u->pixels : NULL;
    float *dl = job->dl ? job->dl + (u->b * job->g + u->n0) * u->pixels : NULL;
    if (stages & LOGITS) {
        memset(u->maps, 0, groups * u->ld * sizeof(float));
        last ? logits_last(u, bf16, relu) : logits_planes(u, bf16, relu);
        for (int64_t n = 0; l && n < groups; n++) {
            float *map = u->maps + n * u->ld;
            add_bias(u, map, job->bias ? job->bias[u->n0 + n] : 0);
            memcpy(l + n * u->pixels, map, row);
        }
    } else if (stages & (MULTIPLY | MAPS_BACK | INPUT_BACK))
        for (int64_t n = 0; n < groups; n++) memcpy(u->maps + n * u->ld, l + n * u->pixels, row);
    if (stages & (MULTIPLY | MAPS_BACK | INPUT_BACK)) {
        const float *bias = stages & LOGITS && !l && job->bias ? job->bias + u->n0 : NULL;
        softmax(u, groups, bias, relu, stages & MULTIPLY ? 1 : 0);
    }
    if (stages & MULTIPLY) last ? multiply_last(u, bf16) : multiply_planes(u, bf16);
    if (stages & MAPS_BACK) {
        memset(u->dmaps, 0, groups * u->ld * sizeof(float));
        last ? maps_back_last(u, bf16) : maps_back_planes(u, bf16);
        for (int64_t n = 0; n < groups; n++) {
            float *dmap = u->dmaps + n * u->ld;
            float sum = softmax_back(u, l + n * u->pixels, u->maps + n * u->ld, dmap, relu);
            if (job->dbias) job->dbias[u->b * job->g + u->n0 + n] = sum;
            if (dl) memcpy(dl + n * u->pixels, dmap, row);
        }
    } else if (stages & INPUT_BACK)
        for (int64_t n = 0; n < groups; n++) {
            memset(u->dmaps + n * u->ld, 0, u->ld * sizeof(float));
            memcpy(u->dmaps + n * u->ld, dl + n * u->pixels, row);
        }
    if (stages & INPUT_BACK) last ? input_back_last(u, bf16, relu) : input_back_planes(u, bf16, relu);
    if (stages & MOMENTS) last ? moments_last(u, bf16) : moments_planes(u, bf16);
    if (stages & ADD) last ? add_last(u, bf16) : add_planes(u, bf16);
}

static void run_one(const struct unit *u) { /* each choice a build of its own */
    const struct job *job = u->job;
    switch (4 * !!job->channels_last + 2 * !!job->bf16 + !!job->relu) {
    case 0: run_unit(u, 0, 0, 0); break;
    case 1: run_unit(u, 0, 0, 1); break;
    case 2: run_unit(u, 0, 1, 0); break;
    case 3: run_unit(u, 0, 1, 1); break;
    case 4: run_unit(u, 1, 0, 0); break;
    case 5: run_unit(u, 1, 0, 1); break;
    case 6: run_unit(u, 1, 1, 0); break;
    case 7: run_unit(u, 1, 1, 1); break;
    }
}

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* the next n * size bytes of memory, or, without any, only their number */
static void *take(char **from, int64_t n, int64_t size) {
    char *here = *from;
    *from += round_up(n * size, 64);
    return here;
}

/* lays a unit's arrays out from `at` on; returns their end */
static char *lay_out(struct unit *u, char *at, int64_t groups) {
    const struct job *job = u->job;
    int64_t pixels = u->pixels, channels = groups * (job->C / job->g), room = job->W + 2 * V;
    int back = (job->stages & INPUT_BACK) != 0, pooling = back || (job->stages & LOGITS && !row_vectors(job));
    u->ld = round_up(pixels, V);
    u->width = round_up(groups, V) + V;
    u->inside = take(&at, u->ld, 4);
    u->maps = take(&at, groups * u->ld, 4);
    u->dmaps = take(&at, job->stages & (MAPS_BACK | INPUT_BACK) ? groups * u->ld : 0, 4);
    if (job->channels_last) {
        u->group = take(&at, channels + 2 * V, 4);
        u->place = take(&at, channels + 2 * V, 4);
        int spread = back && !by_group(job);
        u->by_pixel = take(&at, (spread ? u->ld : V) * u->width, 4);
        u->dby_pixel = take(&at, spread ? u->ld * u->width : 0, 4);
        u->sums = take(&at, job->stages & LOGITS ? (by_group(job) ? 1 : TILE) * u->ld : 0, sizeof(vf));
        int64_t around = back ? BACK_TILE * job->W : 0, rows = back ? BACK_TILE * pixels + 2 * around : 0;
        u->rows = (vf *)take(&at, rows, sizeof(vf)) + around;
        u->to_row = (vf *)take(&at, rows, sizeof(vf)) + around;
    } else {
        int kinds = back ? 4 : pooling;
        u->no_left = take(&at, u->ld, 4);
        u->no_right = take(&at, u->ld, 4);
        u->copy = take(&at, 2 * (u->ld + 3 * V), 4);
        u->sums = take(&at, job->stages & LOGITS ? row_vectors(job) * job->H : 0, sizeof(vf));
        /* several, so that what one writes has left the store buffer when it is read at another place; few, for the cache */
        u->apart = u->ld + 2 * room;
        u->planes = kinds ? (int)((back ? 3072 : 8192) / (kinds * u->apart)) : 0;
        u->planes = u->planes < 1 ? 1 : u->planes > 16 ? 16 : u->planes;
        for (int k = 0; k < kinds; k++) u->plane[k] = (float *)take(&at, u->planes * u->apart, 4) + room;
    }
    return at;
}

/* what is the same for all units of a call */
static void prepare(struct unit *u, int64_t groups) {
    const struct job *job = u->job;
    int64_t W = job->W, G = job->C / job->g, room = W + 2 * V;
    int back = (job->stages & INPUT_BACK) != 0, pooling = back || (job->stages & LOGITS && !row_vectors(job));
    for (int64_t p = 0; p < u->ld; p++) u->inside[p] = p < u->pixels ? -1 : 0;
    if (job->channels_last) {
        int32_t n = 0, left = (int32_t)G;
        for (int64_t c = 0; c < groups * G + 2 * V; c++, left--) {
            if (!left) n++, left = (int32_t)G;
            u->group[c] = n;
            u->place[c] = n - u->group[c / V * V];
        }
        for (int64_t t = 0; job->stages & LOGITS && t < (by_group(job) ? 1 : TILE); t++)
            for (int64_t p = u->pixels; p < u->ld; p++) u->sums[t * u->ld + p] = (vf){0};
        return;
    }
    for (int64_t p = 0; p < u->ld; p++) {
        u->no_left[p] = p < u->pixels && p % W ? 0 : -1;
        u->no_right[p] = p < u->pixels && (p + 1) % W ? 0 : -1;
    }
    for (int kind = 0; kind < (back ? 4 : pooling); kind++)
        for (int64_t k = 0; k < u->planes * u->apart; k++) u->plane[kind][k - room] = kind ? 0 : -INFINITY;
}

/* units, and how they are split */
struct task {
    const struct job *job;
    int64_t units, parts, most; /* parts of an image; the most groups in one */
    int failed;
};

/* a thread's share of the units */
static void work(void *of, int thread, int threads) {
    struct task *task = of;
    const struct job *job = task->job;
    int64_t parts = task->parts, channels = job->C / job->g;
    struct unit u = {.job = job, .pixels = job->H * job->W};
    char *start = ulsam_memory((uintptr_t)lay_out(&u, NULL, task->most));
    if (!start) {
        __atomic_store_n(&task->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    lay_out(&u, start, task->most);
    prepare(&u, task->most);
    for (int64_t k = task->units * thread / threads; k < task->units * (thread + 1) / threads; k++) {
        u.b = k / parts;
        u.n0 = (int)(k % parts * job->g / parts), u.n1 = (int)((k % parts + 1) * job->g / parts);
        u.c0 = u.n0 * channels, u.c1 = u.n1 * channels;
        run_one(&u);
    }
}

int RUN(const struct job *job) {
    if (!job->B) return 0;
    int64_t worth = 1 + job->B * job->C * job->H * job->W / 16384; /* a thread takes microseconds to wake */
    int64_t threads = job->threads < worth ? job->threads : worth;
    int64_t parts = job->B >= threads ? 1 : (threads + job->B - 1) / job->B;
    if (parts > job->g) parts = job->g;
    struct task task = {job, job->B * parts, parts, (job->g + parts - 1) / parts, 0};
    if (threads > task.units) threads = task.units;
    ulsam_parallel(work, &task, (int)threads);
    return task.failed ? -1 : 0;
}

#if defined(TARGET) && defined(__clang__)
#pragma clang attribute pop
#endif
