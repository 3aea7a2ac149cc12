/* The kernels for one instruction set: a source file defines RUN, V (float lanes) and may define NATIVE_MAX, then
   includes this.

   Work is done a unit at a time: groups n0..n1 of one picture, which need nothing from any other. All sums are float32;
   bfloat16 is widened when it is read. In channels_last V channels are handled at once and pixels one after the other;
   in the contiguous layout V pixels at once and channels one after the other.

   The 3x3 maximum is that of 3 rows' maxima of 3 pixels. Its gradient goes to the first maximum in row-major order: to
   the first row that holds it, and there to the first pixel. Maxima here may lose a NaN; but one NaN makes all of its
   group's map NaN, so it is enough to note that there was one. */

#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * V)));
typedef int32_t vi __attribute__((vector_size(4 * V)));
typedef uint32_t vu __attribute__((vector_size(4 * V)));
typedef uint16_t vh __attribute__((vector_size(2 * V)));

/* lanes */

INLINE vf splat(float a) { return a - (vf){0}; }
INLINE vf keep(vi mask, vf a) { return (vf)(mask & (vi)a); }
INLINE vf pick(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

/* a > b ? a : b, so b where either is NaN */
INLINE vf vmax(vf a, vf b) {
#ifdef NATIVE_MAX
    return NATIVE_MAX(a, b);
#else
    return pick(a > b, a, b);
#endif
}
INLINE vf positive(vf a) { return vmax((vf){0}, a); } /* ReLU; a NaN stays */

INLINE float lanes_sum(vf a) {
    float s = 0;
    for (int k = 0; k < V; k++) s += a[k];
    return s;
}
INLINE int any(vi a) {
    int32_t found = 0;
    for (int k = 0; k < V; k++) found |= a[k];
    return found != 0;
}

INLINE vf widen(vh a) { return (vf)(__builtin_convertvector(a, vu) << 16); }
INLINE vh narrow(vf a) { /* to the nearest bfloat16, ties to even; a NaN stays one */
    vu bits = (vu)a, nan = (vu)(a != a);
    return __builtin_convertvector((nan & 0x7fc0) | (~nan & ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)), vh);
}

/* n < V lanes; the others are 0 */
INLINE vf load_part(const void *p, int64_t at, int bf16, int n) {
#ifdef NATIVE_PART
    __mmask16 mask = (__mmask16)((1u << n) - 1);
    if (bf16) return widen((vh)_mm256_maskz_loadu_epi16(mask, (const uint16_t *)p + at));
    return (vf)_mm512_maskz_loadu_ps(mask, (const float *)p + at);
#else
    vh h = {0};
    vf f = {0};
    for (int k = 0; k < n; k++)
        if (bf16)
            h[k] = ((const uint16_t *)p)[at + k];
        else
            f[k] = ((const float *)p)[at + k];
    return bf16 ? widen(h) : f;
#endif
}
INLINE void store_part(void *p, int64_t at, int bf16, int n, vf a) {
#ifdef NATIVE_PART
    __mmask16 mask = (__mmask16)((1u << n) - 1);
    if (bf16)
        _mm256_mask_storeu_epi16((uint16_t *)p + at, mask, (__m256i)narrow(a));
    else
        _mm512_mask_storeu_ps((float *)p + at, mask, (__m512)a);
#else
    vh h = narrow(a);
    for (int k = 0; k < n; k++)
        if (bf16)
            ((uint16_t *)p)[at + k] = h[k];
        else
            ((float *)p)[at + k] = a[k];
#endif
}
INLINE vf load(const void *p, int64_t at, int bf16, int n) {
    if (n < V) return load_part(p, at, bf16, n);
    if (bf16) {
        vh h;
        memcpy(&h, (const uint16_t *)p + at, sizeof h);
        return widen(h);
    }
    vf f;
    memcpy(&f, (const float *)p + at, sizeof f);
    return f;
}
INLINE void store(void *p, int64_t at, int bf16, int n, vf a) {
    if (n < V)
        store_part(p, at, bf16, n, a);
    else if (bf16) {
        vh h = narrow(a);
        memcpy((uint16_t *)p + at, &h, sizeof h);
    } else
        memcpy((float *)p + at, &a, sizeof a);
}
INLINE vf get(const float *p) { return load(p, 0, 0, V); }
INLINE void put(float *p, vf a) { store(p, 0, 0, V, a); }
INLINE void add_to(float *p, vf a) { put(p, get(p) + a); }
INLINE vi get_ints(const int32_t *p) {
    vi a;
    memcpy(&a, p, sizeof a);
    return a;
}
INLINE vf get_param(const float *p, int64_t c, int n) { return p ? load(p, c, 0, n) : (vf){0}; }

/* a0 b0 a1 b1 ... of the lower and of the upper halves; and lanes by number */
#ifdef __clang__
INLINE vf zip_low(vf a, vf b) {
    vf c;
    for (int k = 0; k < V; k++) c[k] = k % 2 ? b[k / 2] : a[k / 2];
    return c;
}
INLINE vf zip_high(vf a, vf b) {
    vf c;
    for (int k = 0; k < V; k++) c[k] = k % 2 ? b[(V + k) / 2] : a[(V + k) / 2];
    return c;
}
INLINE vf permute(vf a, vi at) {
    vf c;
    for (int k = 0; k < V; k++) c[k] = a[at[k]];
    return c;
}
#else
INLINE vf zip_low(vf a, vf b) {
    vi at;
    for (int k = 0; k < V; k++) at[k] = k / 2 + k % 2 * V;
    return __builtin_shuffle(a, b, at);
}
INLINE vf zip_high(vf a, vf b) {
    vi at;
    for (int k = 0; k < V; k++) at[k] = (V + k) / 2 + k % 2 * V;
    return __builtin_shuffle(a, b, at);
}
INLINE vf permute(vf a, vi at) { return __builtin_shuffle(a, at); }
#endif

INLINE void transpose(vf a[V]) {
    for (int stage = 1; stage < V; stage *= 2) {
        vf b[V];
        for (int k = 0; k < V; k++) b[k] = k % 2 ? zip_high(a[k / 2], a[(V + k) / 2]) : zip_low(a[k / 2], a[(V + k) / 2]);
        for (int k = 0; k < V; k++) a[k] = b[k];
    }
}
/* lane k is the sum of the lanes of a[k] */
INLINE vf sums(vf a[V]) {
    for (int half = V / 2; half; half /= 2)
        for (int k = 0; k < half; k++) a[k] = zip_low(a[k], a[k + half]) + zip_high(a[k], a[k + half]);
    return a[0];
}

/* exp of a <= 0, to 2 units in the last place; exp(-87) below that */
INLINE vf exponential(vf a) {
    a = pick(a < -87.0f, splat(-87.0f), a);
    vf shifted = a * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the nearest integer lands in the low bits */
    vf n = shifted - 12582912.0f;
    vf r = a - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts */
    vf p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120, p = p * r + 1.0f / 24, p = p * r + 1.0f / 6, p = p * r + 0.5f;
    return (p * r * r + r + 1.0f) * (vf)(((vi)shifted << 23) + (127 << 23));
}

/* one unit's memory; maps are [groups][ld] floats, ld = H * W and the rest of the last vector */

struct unit {
    const struct job *job;
    int64_t b, c0, c1; /* its picture and channels */
    int n0, n1;        /* its groups */
    int64_t pixels, ld, width;
    float *maps, *dmaps;
    float *by_pixel, *dby_pixel; /* [pixels][width] */
    vf *rows, *to_row;           /* channels_last: [H][W] of V channels */
    float *plane[7];             /* contiguous: planes with a row and a vector of room on both sides */
    float *copy;                 /* a plane that is safe to read beyond its ends */
    int32_t *group;              /* channels_last: of each channel, from n0 on */
    int32_t *inside, *has_left, *has_right; /* -1 or 0 a pixel */
    char *nan;                   /* a group: it holds one */
};

INLINE int lanes_at(int64_t at, int64_t end) { return end - at < V ? (int)(end - at) : V; }

/* l to softmax(relu?(l)), in place or not */
INLINE void softmax(const struct unit *u, const float *l, float *a, int relu) {
    vf least = splat(-INFINITY), most = least, total = {0};
    for (int64_t p = 0; p < u->pixels; p += V) {
        vf h = relu ? positive(get(l + p)) : get(l + p);
        h = pick(get_ints(u->inside + p), h, least);
        most = vmax(most, h);
        put(a + p, h);
    }
    float top = most[0];
    for (int k = 1; k < V; k++) top = most[k] > top ? most[k] : top;
    for (int64_t p = 0; p < u->pixels; p += V) {
        vf e = exponential(get(a + p) - top);
        total += keep(get_ints(u->inside + p), e);
        put(a + p, e);
    }
    float share = 1 / lanes_sum(total);
    for (int64_t p = 0; p < u->pixels; p += V) put(a + p, get(a + p) * share);
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

/* channels_last */

/* maps[group of a channel][p0 + k] += products[k], which holds V channels of pixel p0 + k */
INLINE void gather(const struct unit *u, vf products[V], const int32_t *group, int lanes, float *maps, int64_t p0) {
    if (group[0] == group[lanes - 1]) {
        add_to(maps + group[0] * u->ld + p0, sums(products));
        return;
    }
    transpose(products);
    for (int k = 0; k < lanes;) {
        int32_t n = group[k];
        vf s = products[k];
        for (k++; k < lanes && group[k] == n; k++) s += products[k];
        add_to(maps + n * u->ld + p0, s);
    }
}

/* add + maps of V pixels from p0 on, to rows [V][width]: the value of channel c's group is then at rows[k][group[c]] */
INLINE void turn(const struct unit *u, const float *maps, int64_t p0, float add, float *rows) {
    int groups = u->n1 - u->n0;
    for (int n = 0; n < groups; n += V) {
        vf block[V];
        for (int k = 0; k < V; k++) block[k] = n + k < groups ? get(maps + (n + k) * u->ld + p0) + add : (vf){0};
        transpose(block);
        for (int k = 0; k < V; k++) put(rows + k * u->width + n, block[k]);
    }
}
INLINE vf spread(const float *row, const int32_t *group) {
    return permute(get(row + group[0]), get_ints(group) - group[0]);
}

/* the maxima of each 3 pixels in a row, of the V channels at x[at]; which of them hold a NaN */
INLINE vi row_maxima(const struct unit *u, const void *x, int64_t at, vf scale, int lanes, int bf16) {
    int64_t C = u->job->C, W = u->job->W;
    vf least = splat(-INFINITY), *rows = u->rows;
    vi nan = {0};
    for (int64_t i = 0; i < u->job->H; i++, rows += W) {
        vf left = least, here = load(x, at, bf16, lanes), right;
        nan |= here != here;
        here *= scale;
        for (int64_t j = 0; j < W; j++, left = here, here = right) {
            at += C;
            right = least;
            if (j + 1 < W) {
                right = load(x, at, bf16, lanes);
                nan |= right != right;
                right *= scale;
            }
            rows[j] = vmax(vmax(left, here), right);
        }
    }
    return nan;
}

INLINE void logits_last(const struct unit *u, int bf16, int relu) {
    const struct job *job = u->job;
    int64_t W = job->W;
    for (int64_t c = u->c0; c < u->c1; c += V) {
        int lanes = lanes_at(c, u->c1), filled = 0;
        const int32_t *group = u->group + c - u->c0;
        vf scale = get_param(job->scale, c, lanes), shift = get_param(job->shift, c, lanes);
        vf weight = get_param(job->weight, c, lanes), products[V];
        vi nan = row_maxima(u, job->x, u->b * u->pixels * job->C + c, scale, lanes, bf16);
        if (any(nan))
            for (int k = 0; k < lanes; k++) u->nan[group[k]] |= nan[k] != 0;
        int64_t p0 = 0;
        for (int64_t i = 0; i < job->H; i++) {
            const vf *here = u->rows + i * W, *above = i ? here - W : here, *below = i + 1 < job->H ? here + W : here;
            for (int64_t j = 0; j < W; j++) {
                vf m = vmax(vmax(above[j], here[j]), below[j]);
                products[filled++] = weight * (relu ? positive(m + shift) : m);
                if (filled == V) {
                    gather(u, products, group, lanes, u->maps, p0);
                    p0 += V, filled = 0;
                }
            }
        }
        if (filled) {
            while (filled < V) products[filled++] = (vf){0};
            gather(u, products, group, lanes, u->maps, p0);
        }
    }
}

INLINE void multiply_last(const struct unit *u, int bf16) {
    const struct job *job = u->job;
    int64_t G = job->C / job->g;
    for (int64_t p0 = 0; p0 < u->pixels; p0 += V) {
        turn(u, u->maps, p0, 1, u->by_pixel);
        for (int64_t p = p0; p < p0 + V && p < u->pixels; p++) {
            const float *row = u->by_pixel + (p - p0) * u->width;
            int64_t at = (u->b * u->pixels + p) * job->C;
            if (G % V == 0) {
                for (int64_t c = u->c0; c < u->c1; row++) {
                    vf factor = splat(*row);
                    for (int64_t end = c + G; c < end; c += V)
                        store(job->y, at + c, bf16, V, load(job->x, at + c, bf16, V) * factor);
                }
                continue;
            }
            for (int64_t c = u->c0; c < u->c1; c += V) {
                int lanes = lanes_at(c, u->c1);
                vf factor = spread(row, u->group + c - u->c0);
                store(job->y, at + c, bf16, lanes, load(job->x, at + c, bf16, lanes) * factor);
            }
        }
    }
}

INLINE void maps_back_last(const struct unit *u, int bf16) {
    const struct job *job = u->job;
    for (int64_t c = u->c0; c < u->c1; c += V) {
        int lanes = lanes_at(c, u->c1);
        for (int64_t p0 = 0; p0 < u->pixels; p0 += V) {
            vf products[V];
            for (int k = 0; k < V; k++) {
                int64_t at = (u->b * u->pixels + p0 + k) * job->C + c;
                products[k] = p0 + k < u->pixels ? load(job->dy, at, bf16, lanes) * load(job->x, at, bf16, lanes) : (vf){0};
            }
            gather(u, products, u->group + c - u->c0, lanes, u->dmaps, p0);
        }
    }
}

INLINE void input_back_last(const struct unit *u, int bf16, int relu) {
    const struct job *job = u->job;
    int64_t C = job->C, H = job->H, W = job->W;
    vf *rows = u->rows, *to_row = u->to_row;
    for (int64_t p0 = 0; p0 < u->pixels; p0 += V) {
        turn(u, u->maps, p0, 1, u->by_pixel + p0 * u->width);
        turn(u, u->dmaps, p0, 0, u->dby_pixel + p0 * u->width);
    }
    for (int64_t c = u->c0; c < u->c1; c += V) {
        int lanes = lanes_at(c, u->c1);
        const int32_t *group = u->group + c - u->c0;
        int64_t start = u->b * u->pixels * C + c;
        vf scale = get_param(job->scale, c, lanes), shift = get_param(job->shift, c, lanes);
        vf slope = scale * get_param(job->weight, c, lanes), q = {0}, r = {0};
        row_maxima(u, job->x, start, scale, lanes, bf16);
        memset(to_row, 0, u->pixels * sizeof *to_row);
        for (int64_t i = 0, p = 0; i < H; i++)
            for (int64_t j = 0; j < W; j++, p++) {
                vf above = rows[i ? p - W : p], here = rows[p], below = rows[i + 1 < H ? p + W : p];
                vf m = vmax(vmax(above, here), below), d = spread(u->dby_pixel + p * u->width, group);
                if (relu) d = keep(m + shift > 0, d);
                r += d;
                if (i) {
                    to_row[p - W] += keep(above == m, d);
                    d = keep(above != m, d);
                }
                to_row[p] += i + 1 < H ? keep(here == m, d) : d;
                if (i + 1 < H) to_row[p + W] += keep(here != m, d);
            }
        for (int64_t i = 0; i < H; i++) {
            int64_t p = i * W, at = start + p * C;
            vf x_left = {0}, x_here = load(job->x, at, bf16, lanes), x_right;
            vf d_left = {0}, d_here = {0}, d_right; /* what has reached these pixels so far */
            for (int64_t j = 0; j < W; j++, p++, at += C) {
                vf m = rows[p], d = to_row[p];
                if (j) {
                    vf left = x_left * scale;
                    d_left += keep(left == m, d);
                    d = keep(left != m, d);
                    vf dy = load(job->dy, at - C, bf16, lanes), factor = spread(u->by_pixel + (p - 1) * u->width, group);
                    store(job->dx, at - C, bf16, lanes, dy * factor + slope * d_left);
                    q += d_left * x_left;
                }
                if (j + 1 < W) {
                    vf here = x_here * scale;
                    d_here += keep(here == m, d);
                    d_right = keep(here != m, d);
                    x_right = load(job->x, at + C, bf16, lanes);
                    x_left = x_here, x_here = x_right, d_left = d_here, d_here = d_right;
                } else {
                    d_here += d;
                    vf dy = load(job->dy, at, bf16, lanes), factor = spread(u->by_pixel + p * u->width, group);
                    store(job->dx, at, bf16, lanes, dy * factor + slope * d_here);
                    q += d_here * x_here;
                }
            }
        }
        store(job->q, u->b * C + c, 0, lanes, q);
        store(job->r, u->b * C + c, 0, lanes, r);
    }
}

INLINE void moments_last(const struct unit *u, int bf16) {
    const struct job *job = u->job;
    for (int64_t c = u->c0; c < u->c1; c += V) {
        int lanes = lanes_at(c, u->c1);
        int64_t start = u->b * u->pixels * job->C + c;
        vf sum = {0}, squares = {0};
        for (int64_t p = 0; p < u->pixels; p++) sum += load(job->x, start + p * job->C, bf16, lanes);
        vf mean = sum / (float)u->pixels;
        for (int64_t p = 0; p < u->pixels; p++) {
            vf d = load(job->x, start + p * job->C, bf16, lanes) - mean;
            squares += d * d;
        }
        store(job->q, u->b * job->C + c, 0, lanes, mean);
        store(job->r, u->b * job->C + c, 0, lanes, squares);
    }
}

INLINE void add_last(const struct unit *u, int bf16) {
    const struct job *job = u->job;
    for (int64_t p = 0; p < u->pixels; p++)
        for (int64_t c = u->c0; c < u->c1; c += V) {
            int lanes = lanes_at(c, u->c1);
            int64_t at = (u->b * u->pixels + p) * job->C + c;
            vf d = load(job->q, c, 0, lanes) + load(job->r, c, 0, lanes) * load(job->x, at, bf16, lanes);
            store(job->dx, at, bf16, lanes, load(job->dx, at, bf16, lanes) + d);
        }
}

/* contiguous */

/* channel c's plane of x, where the pixel before it and a vector behind it can be read */
INLINE const void *plane_of(const struct unit *u, const void *x, int64_t c, int bf16) {
    int64_t at = (u->b * u->job->C + c) * u->pixels, total = u->job->B * u->job->C * u->pixels, size = bf16 ? 2 : 4;
    const char *plane = (const char *)x + at * size;
    if (at && at + u->pixels + V < total) return plane;
    return memcpy((char *)(u->copy + V), plane, u->pixels * size);
}

/* the maxima of each 3 pixels in a row, with -inf around them; which lanes hold a NaN */
INLINE vi plane_row_maxima(const struct unit *u, const void *x, float scale, int bf16) {
    vf least = splat(-INFINITY);
    float *rows = u->plane[0];
    vi nan = {0};
    for (int64_t p = 0; p < u->pixels; p += V) {
        vf here = load(x, p, bf16, V), left = load(x, p - 1, bf16, V) * scale, right = load(x, p + 1, bf16, V) * scale;
        nan |= (here != here) & get_ints(u->inside + p);
        left = pick(get_ints(u->has_left + p), left, least);
        right = pick(get_ints(u->has_right + p), right, least);
        put(rows + p, vmax(vmax(left, here * scale), right));
    }
    put(rows + u->pixels, least);
    return nan;
}

INLINE void logits_planes(const struct unit *u, int bf16, int relu) {
    const struct job *job = u->job;
    int64_t W = job->W, G = job->C / job->g;
    const float *rows = u->plane[0];
    for (int64_t c = u->c0; c < u->c1; c++) {
        float shift = job->shift ? job->shift[c] : 0, *map = u->maps + (c - u->c0) / G * u->ld;
        vf weight = splat(job->weight[c]);
        if (any(plane_row_maxima(u, plane_of(u, job->x, c, bf16), job->scale[c], bf16))) u->nan[(c - u->c0) / G] = 1;
        for (int64_t p = 0; p < u->pixels; p += V) {
            vf m = vmax(vmax(get(rows + p - W), get(rows + p)), get(rows + p + W));
            add_to(map + p, weight * (relu ? positive(m + shift) : m));
        }
    }
}

INLINE void multiply_planes(const struct unit *u, int bf16) {
    const struct job *job = u->job;
    int64_t G = job->C / job->g, whole = u->pixels / V * V;
    for (int64_t c = u->c0; c < u->c1; c++) {
        const float *map = u->maps + (c - u->c0) / G * u->ld;
        int64_t at = (u->b * job->C + c) * u->pixels;
        for (int64_t p = 0; p < whole; p += V)
            store(job->y, at + p, bf16, V, load(job->x, at + p, bf16, V) * (1 + get(map + p)));
        if (whole < u->pixels) {
            int lanes = lanes_at(whole, u->pixels);
            store(job->y, at + whole, bf16, lanes, load(job->x, at + whole, bf16, lanes) * (1 + get(map + whole)));
        }
    }
}

INLINE void maps_back_planes(const struct unit *u, int bf16) {
    const struct job *job = u->job;
    int64_t G = job->C / job->g;
    for (int64_t c = u->c0; c < u->c1; c++) {
        float *map = u->dmaps + (c - u->c0) / G * u->ld;
        int64_t at = (u->b * job->C + c) * u->pixels;
        for (int64_t p = 0; p < u->pixels; p += V) {
            int lanes = lanes_at(p, u->pixels);
            add_to(map + p, load(job->dy, at + p, bf16, lanes) * load(job->x, at + p, bf16, lanes));
        }
    }
}

INLINE void input_back_planes(const struct unit *u, int bf16, int relu) {
    const struct job *job = u->job;
    int64_t W = job->W, G = job->C / job->g;
    const float *rows = u->plane[0];
    float *const *up = u->plane + 1, *const *side = u->plane + 4; /* to the row above, the same, below; and sideways */
    for (int64_t c = u->c0; c < u->c1; c++) {
        int64_t at = (u->b * job->C + c) * u->pixels;
        const float *map = u->maps + (c - u->c0) / G * u->ld, *dmap = u->dmaps + (c - u->c0) / G * u->ld;
        float scale = job->scale[c], shift = job->shift ? job->shift[c] : 0, slope = scale * job->weight[c];
        vf q = {0}, r = {0};
        const void *x = plane_of(u, job->x, c, bf16);
        plane_row_maxima(u, x, scale, bf16);
        for (int64_t p = 0; p < u->pixels; p += V) {
            vf above = get(rows + p - W), here = get(rows + p), m = vmax(vmax(above, here), get(rows + p + W));
            vf d = get(dmap + p);
            if (relu) d = keep(m + shift > 0, d);
            r += d;
            put(up[0] + p, keep(above == m, d));
            d = keep(above != m, d);
            put(up[1] + p, keep(here == m, d));
            put(up[2] + p, keep(here != m, d));
        }
        for (int64_t p = 0; p < u->pixels; p += V) {
            vf m = get(rows + p), d = get(up[0] + p + W) + get(up[1] + p) + get(up[2] + p - W);
            vi left = (load(x, p - 1, bf16, V) * scale == m) & get_ints(u->has_left + p);
            vi here = load(x, p, bf16, V) * scale == m;
            put(side[0] + p, keep(left, d));
            d = keep(~left, d);
            put(side[1] + p, keep(here, d));
            put(side[2] + p, keep(~here & get_ints(u->has_right + p), d));
        }
        for (int64_t p = 0; p < u->pixels; p += V) {
            int lanes = lanes_at(p, u->pixels);
            vf d = get(side[0] + p + 1) + get(side[1] + p) + get(side[2] + p - 1);
            q += keep(get_ints(u->inside + p), d * load(x, p, bf16, V));
            store(job->dx, at + p, bf16, lanes, load(job->dy, at + p, bf16, lanes) * (1 + get(map + p)) + slope * d);
        }
        job->q[u->b * job->C + c] = lanes_sum(q);
        job->r[u->b * job->C + c] = lanes_sum(r);
    }
}

INLINE void moments_planes(const struct unit *u, int bf16) {
    const struct job *job = u->job;
    for (int64_t c = u->c0; c < u->c1; c++) {
        int64_t at = (u->b * job->C + c) * u->pixels;
        vf sum = {0}, squares = {0};
        for (int64_t p = 0; p < u->pixels; p += V) sum += load(job->x, at + p, bf16, lanes_at(p, u->pixels));
        float mean = lanes_sum(sum) / (float)u->pixels;
        for (int64_t p = 0; p < u->pixels; p += V) {
            vf d = keep(get_ints(u->inside + p), load(job->x, at + p, bf16, lanes_at(p, u->pixels)) - mean);
            squares += d * d;
        }
        job->q[u->b * job->C + c] = mean;
        job->r[u->b * job->C + c] = lanes_sum(squares);
    }
}

INLINE void add_planes(const struct unit *u, int bf16) {
    const struct job *job = u->job;
    for (int64_t c = u->c0; c < u->c1; c++) {
        int64_t at = (u->b * job->C + c) * u->pixels;
        for (int64_t p = 0; p < u->pixels; p += V) {
            int lanes = lanes_at(p, u->pixels);
            vf d = job->q[c] + job->r[c] * load(job->x, at + p, bf16, lanes);
            store(job->dx, at + p, bf16, lanes, load(job->dx, at + p, bf16, lanes) + d);
        }
    }
}

/* the stages of one unit */

INLINE void run_unit(const struct unit *u, int last, int bf16, int relu) {
    const struct job *job = u->job;
    int64_t stages = job->stages, groups = u->n1 - u->n0, row = u->pixels * sizeof(float);
    float *l = job->l ? job->l + (u->b * job->g + u->n0) * u->pixels : NULL;
    float *dl = job->dl ? job->dl + (u->b * job->g + u->n0) * u->pixels : NULL;
    if (stages & LOGITS) {
        memset(u->maps, 0, groups * u->ld * sizeof(float));
        memset(u->nan, 0, groups);
        last ? logits_last(u, bf16, relu) : logits_planes(u, bf16, relu);
        for (int64_t n = 0; n < groups; n++) {
            float *map = u->maps + n * u->ld, bias = job->bias ? job->bias[u->n0 + n] : 0;
            if (u->nan[n]) bias = NAN;
            for (int64_t p = 0; p < u->pixels; p += V) add_to(map + p, splat(bias));
            if (l) memcpy(l + n * u->pixels, map, row);
        }
    } else if (stages & (MULTIPLY | MAPS_BACK | INPUT_BACK))
        for (int64_t n = 0; n < groups; n++) memcpy(u->maps + n * u->ld, l + n * u->pixels, row);
    if (stages & (MULTIPLY | MAPS_BACK | INPUT_BACK))
        for (int64_t n = 0; n < groups; n++) softmax(u, u->maps + n * u->ld, u->maps + n * u->ld, relu);
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

/* memory that a thread keeps from call to call */
static void *memory(size_t size) {
    static __thread void *kept;
    static __thread size_t kept_size;
    if (size > kept_size) {
        free(kept);
        kept_size = 0;
        kept = aligned_alloc(64, (size + 63) / 64 * 64);
        if (kept) kept_size = size;
    }
    return kept;
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
    int back = (job->stages & INPUT_BACK) != 0, logits = (job->stages & LOGITS) || back;
    u->ld = round_up(pixels, V);
    u->width = round_up(groups, V) + V;
    u->inside = take(&at, u->ld, 4);
    u->maps = take(&at, groups * u->ld, 4);
    u->dmaps = take(&at, job->stages & (MAPS_BACK | INPUT_BACK) ? groups * u->ld : 0, 4);
    u->nan = take(&at, groups, 1);
    if (job->channels_last) {
        u->group = take(&at, channels + 2 * V, 4);
        u->by_pixel = take(&at, (back ? u->ld : V) * u->width, 4);
        u->dby_pixel = take(&at, back ? u->ld * u->width : 0, 4);
        u->rows = take(&at, logits ? pixels : 0, sizeof(vf));
        u->to_row = take(&at, back ? pixels : 0, sizeof(vf));
    } else {
        u->has_left = take(&at, u->ld, 4);
        u->has_right = take(&at, u->ld, 4);
        u->copy = take(&at, pixels + 3 * V, 4);
        for (int k = 0; k < (back ? 7 : logits); k++) u->plane[k] = (float *)take(&at, u->ld + 2 * room, 4) + room;
    }
    return at;
}

/* what is the same for all units of a call */
static void prepare(struct unit *u, int64_t groups) {
    const struct job *job = u->job;
    int64_t W = job->W, G = job->C / job->g, room = W + 2 * V;
    for (int64_t p = 0; p < u->ld; p++) u->inside[p] = p < u->pixels ? -1 : 0;
    if (job->channels_last) {
        for (int64_t c = 0; c < groups * G + 2 * V; c++) u->group[c] = (int32_t)(c / G);
        return;
    }
    for (int64_t p = 0; p < u->ld; p++) {
        u->has_left[p] = p < u->pixels && p % W ? -1 : 0;
        u->has_right[p] = p < u->pixels && (p + 1) % W ? -1 : 0;
    }
    if (!(job->stages & (LOGITS | INPUT_BACK))) return;
    for (int64_t k = -room; k < u->ld + room; k++) u->plane[0][k] = -INFINITY;
    for (int plane = 1; plane < 7 && job->stages & INPUT_BACK; plane++)
        for (int64_t k = -room; k < u->ld + room; k++) u->plane[plane][k] = 0;
}

int RUN(const struct job *job) {
    int64_t parts = job->B >= job->threads ? 1 : (job->threads + job->B - 1) / job->B; /* of a picture */
    if (parts > job->g) parts = job->g;
    int64_t units = job->B * parts, most = (job->g + parts - 1) / parts;
    int threads = (int)(units < job->threads ? units : job->threads), failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        struct unit u = {.job = job, .pixels = job->H * job->W};
        char *start = memory((size_t)(lay_out(&u, NULL, most) - (char *)NULL));
        if (start) {
            lay_out(&u, start, most);
            prepare(&u, most);
        } else {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t k = 0; k < units; k++) {
            if (!start) continue;
            u.b = k / parts;
            u.n0 = (int)(k % parts * job->g / parts), u.n1 = (int)((k % parts + 1) * job->g / parts);
            u.c0 = u.n0 * (job->C / job->g), u.c1 = u.n1 * (job->C / job->g);
            run_one(&u);
        }
    }
    return failed ? -1 : 0;
}
