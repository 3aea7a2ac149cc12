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

/* lanes */

#if V == 16
#define NUMBERS ((vi){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
#elif V == 8
#define NUMBERS ((vi){0, 1, 2, 3, 4, 5, 6, 7})
#else
#define NUMBERS ((vi){0, 1, 2, 3})
#endif

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
INLINE vf max3(vf a, vf here, vf b) { return vmax(b, vmax(a, here)); } /* NaN where `here` is it; those beside it are passed over */
INLINE vf positive(vf a) { return vmax((vf){0}, a); } /* ReLU; a NaN stays */

/* lanes for which something holds */
#ifdef NATIVE_512
typedef __mmask16 flags;
INLINE flags same(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ); }
INLINE flags above_zero(vf a) { return _mm512_cmp_ps_mask((__m512)a, _mm512_setzero_ps(), _CMP_GT_OQ); }
INLINE vf where(flags f, vf a) { return (vf)_mm512_maskz_mov_ps(f, (__m512)a); }
INLINE vf add_where(flags f, vf a, vf b) { return (vf)_mm512_mask_add_ps((__m512)a, f, (__m512)a, (__m512)b); }
#else
typedef vi flags;
INLINE flags same(vf a, vf b) { return a == b; }
INLINE flags above_zero(vf a) { return a > 0; }
INLINE vf where(flags f, vf a) { return keep(f, a); }
INLINE vf add_where(flags f, vf a, vf b) { return a + keep(f, b); } /* a + b there */
#endif

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
INLINE vf zip_low(vf a, vf b) { return __builtin_shuffle(a, b, NUMBERS / 2 + NUMBERS % 2 * V); }
INLINE vf zip_high(vf a, vf b) { return __builtin_shuffle(a, b, (NUMBERS + V) / 2 + NUMBERS % 2 * V); }
INLINE vf permute(vf a, vi at) { return __builtin_shuffle(a, at); }
#endif

INLINE vf widen(vh a) { return (vf)(__builtin_convertvector(a, vu) << 16); }
INLINE vh narrow(vf a) { /* to the nearest bfloat16, ties to even; a NaN stays one */
    vu bits = (vu)a, nan = (vu)(a != a);
    return __builtin_convertvector((nan & 0x7fc0) | (~nan & ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)), vh);
}

/* n < V lanes; the others are 0 */
INLINE vf load_part(const void *p, int64_t at, int bf16, int n) {
#ifdef NATIVE_512
    __mmask16 mask = (__mmask16)((1u << n) - 1);
    if (bf16) return widen((vh)_mm256_maskz_loadu_epi16(mask, (const uint16_t *)p + at));
    return (vf)_mm512_maskz_loadu_ps(mask, (const float *)p + at);
#else
#ifdef LOAD_PART
    if (!bf16) return LOAD_PART((const float *)p + at, NUMBERS < n);
#endif
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
#ifdef NATIVE_512
    __mmask16 mask = (__mmask16)((1u << n) - 1);
    if (bf16)
        _mm256_mask_storeu_epi16((uint16_t *)p + at, mask, (__m256i)narrow(a));
    else
        _mm512_mask_storeu_ps((float *)p + at, mask, (__m512)a);
#else
    UNROLL for (int half = V / 2; half; half /= 2) /* n in binary: so many of the first lanes, and the next move there */
        if (n & half) {
            vh h = narrow(a);
            if (bf16)
                memcpy((uint16_t *)p + at, &h, half * sizeof h[0]);
            else
                memcpy((float *)p + at, &a, half * sizeof a[0]);
            a = permute(a, (NUMBERS + half) % V), at += half;
        }
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

INLINE float lanes_sum(vf a) {
    UNROLL for (int half = V / 2; half; half /= 2) a += permute(a, (NUMBERS + half) % V);
    return a[0];
}
INLINE float lanes_max(vf a) {
    UNROLL for (int half = V / 2; half; half /= 2) a = vmax(a, permute(a, (NUMBERS + half) % V));
    return a[0];
}

/* a[k]'s lane n is then what a[n]'s lane k was */
INLINE void transpose(vf a[V]) {
#ifdef NATIVE_256 /* within halves first: what crosses them takes two instructions */
    vf b[V];
    UNROLL for (int k = 0; k < V; k += 2) b[k] = UNPACK_LOW(a[k], a[k + 1]), b[k + 1] = UNPACK_HIGH(a[k], a[k + 1]);
    UNROLL for (int k = 0; k < V; k += 4) {
        a[k] = PAIRS_LOW(b[k], b[k + 2]), a[k + 1] = PAIRS_HIGH(b[k], b[k + 2]);
        a[k + 2] = PAIRS_LOW(b[k + 1], b[k + 3]), a[k + 3] = PAIRS_HIGH(b[k + 1], b[k + 3]);
    }
    UNROLL for (int k = 0; k < V / 2; k++) {
        vf low = HALVES_LOW(a[k], a[k + 4]);
        a[k + 4] = HALVES_HIGH(a[k], a[k + 4]), a[k] = low;
    }
#else
    UNROLL for (int stage = 1; stage < V; stage *= 2) {
        vf b[V];
        UNROLL for (int k = 0; k < V; k++) b[k] = k % 2 ? zip_high(a[k / 2], a[(V + k) / 2]) : zip_low(a[k / 2], a[(V + k) / 2]);
        UNROLL for (int k = 0; k < V; k++) a[k] = b[k];
    }
#endif
}
/* lane k is the sum of the lanes of a[k] */
INLINE vf sums(vf a[V]) {
#ifdef NATIVE_256
    UNROLL for (int k = 0; k < 4; k++) a[k] = UNPACK_LOW(a[2 * k], a[2 * k + 1]) + UNPACK_HIGH(a[2 * k], a[2 * k + 1]);
    UNROLL for (int k = 0; k < 2; k++) a[k] = PAIRS_LOW(a[2 * k], a[2 * k + 1]) + PAIRS_HIGH(a[2 * k], a[2 * k + 1]);
    return HALVES_LOW(a[0], a[1]) + HALVES_HIGH(a[0], a[1]);
#else
    UNROLL for (int half = V / 2; half; half /= 2)
        UNROLL for (int k = 0; k < half; k++) a[k] = zip_low(a[k], a[k + half]) + zip_high(a[k], a[k + half]);
    return a[0];
#endif
}

/* exp of a <= 0, to 2 units in the last place; 0 below -87 */
INLINE vf exponential(vf a) {
    vi tiny = a < -87.0f;
    a = vmax(splat(-87.0f), a);
    vf shifted = a * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the nearest integer lands in the low bits */
    vf n = shifted - 12582912.0f;
    vf r = a - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts */
    vf p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120, p = p * r + 1.0f / 24, p = p * r + 1.0f / 6, p = p * r + 0.5f;
    return keep(~tiny, (p * r * r + r + 1.0f) * (vf)(((vi)shifted << 23) + (127 << 23)));
}

/* so many maps of so many floats in all are turned into attention together: half a cache */
#define SOFTMAX_MAPS 16
#define SOFTMAX_FLOATS 4096

/* one unit's memory; maps are [groups][ld] floats, ld = H * W and the rest of the last vector */

struct unit {
    const struct job *job;
    int64_t b, c0, c1; /* its image and channels */
    int n0, n1;        /* its groups */
    int64_t pixels, ld, width;
    float *maps, *dmaps;
    float *by_pixel, *dby_pixel; /* [pixels][width] */
    vf *sums;                    /* channels_last: [1 or TILE][ld] of V channels */
    vf *rows, *to_row;           /* of LOGITS three rows of TILE * V channels; of INPUT_BACK as sums, with room around */
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

/* maps, or 1 + maps, of V pixels from p0 on, to rows [V][width]: channel c's group is then at rows[k][group[c]] */
INLINE void turn(const struct unit *u, const float *maps, int64_t p0, int plus_one, float *rows) {
    int groups = u->n1 - u->n0;
    for (int n = 0; n < groups; n += V) {
        vf block[V];
        for (int k = 0; k < V; k++) {
            block[k] = n + k < groups ? get(maps + (n + k) * u->ld + p0) : (vf){0};
            if (plus_one) block[k] += 1;
        }
        transpose(block);
        for (int k = 0; k < V; k++) put(rows + k * u->width + n, block[k]);
    }
}
/* lane k's value in such a row, its group's: V lanes have at most V groups, from the first lane's on */
INLINE vf spread(const float *row, const int32_t *group, vi place) { return permute(get(row + group[0]), place); }

/* Large groups are worked on one after the other. A last vector of fewer than V channels then begins earlier, and what
   was done before is done again or masked; where that is more than a quarter of the work, vectors hold channels of
   several groups. */
INLINE int by_group(const struct job *job) {
    int64_t G = job->C / job->g;
    return G >= V && (G + V - 1) / V * V * 4 <= G * 5;
}
INLINE int64_t group_end(const struct unit *u, int n) { return u->c0 + (n + 1) * (u->job->C / u->job->g); }
INLINE vf lanes_from(vf a, int64_t first) { return first ? keep(NUMBERS >= (int32_t)first, a) : a; }

/* So many vectors of channels are read together: longer stretches of memory. */
#define TILE 4
#define BACK_TILE 2

/* of a row of `tile` vectors of channels at x[at]: the maxima of each 3 pixels */
INLINE void row_maxima(
    const struct unit *u, const void *x, int64_t at, const vf *scale, vf *row, int tile, int lanes, int bf16
) {
    int64_t C = u->job->C, W = u->job->W;
    vf here[TILE], left[TILE];
    UNROLL for (int t = 0; t < tile; t++)
        here[t] = load(x, at + t * V, bf16, lanes) * scale[t], left[t] = splat(-INFINITY);
    for (int64_t j = 0; j + 1 < W; j++, row += tile) {
        at += C;
        UNROLL for (int t = 0; t < tile; t++) {
            vf right = load(x, at + t * V, bf16, lanes) * scale[t];
            if (tile > 1 && t % (64 / (bf16 ? 2 : 4) / V) == 0) /* what the next tile reads: too far apart to be foreseen */
                __builtin_prefetch((const char *)x + (at + (tile + t) * V) * (bf16 ? 2 : 4));
            row[t] = max3(left[t], here[t], right);
            left[t] = here[t], here[t] = right;
        }
    }
    UNROLL for (int t = 0; t < tile; t++) row[t] = vmax(left[t], here[t]);
}

enum { FIRST, MORE, APART }; /* sums[p] = the sum over the vectors; +=; or the t-th one's in sums[t * ld + p] */

/* the sums of weight * relu?(maximum of the 3x3 pixels + shift), of `tile` vectors of channels from c on, without the
   first `counted` channels */
INLINE void sum_windows(
    const struct unit *u, int64_t c, int64_t counted, int how, int tile, int lanes, int bf16, int relu
) {
    const struct job *job = u->job;
    const void *x = job->x;
    int64_t H = job->H, W = job->W, at = u->b * u->pixels * job->C + c;
    vf scale[TILE], shift[TILE], weight[TILE], *rows = u->rows, *sums = u->sums; /* rows: a ring of three */
    UNROLL for (int t = 0; t < tile; t++) {
        scale[t] = get_param(job->scale, c + t * V, lanes), shift[t] = get_param(job->shift, c + t * V, lanes);
        weight[t] = get_param(job->weight, c + t * V, lanes);
    }
    row_maxima(u, x, at, scale, rows, tile, lanes, bf16);
    for (int64_t i = 0; i < H; i++) {
        const vf *here = rows + i % 3 * tile * W, *above = i ? rows + (i + 2) % 3 * tile * W : here, *below = here;
        if (i + 1 < H) {
            below = rows + (i + 1) % 3 * tile * W;
            row_maxima(u, x, at += W * job->C, scale, (vf *)below, tile, lanes, bf16);
        }
        for (int64_t j = 0; j < W; j++, sums++, above += tile, here += tile, below += tile) {
            vf sum = how == MORE ? *sums : (vf){0};
            UNROLL for (int t = 0; t < tile; t++) {
                vf m = max3(above[t], here[t], below[t]);
                vf product = lanes_from(weight[t] * (relu ? positive(m + shift[t]) : m), t ? 0 : counted);
                if (how == APART)
                    sums[t * u->ld] = product;
                else
                    sum += product;
            }
            if (how != APART) *sums = sum;
        }
    }
}

INLINE void group_tile(const struct unit *u, int n, int64_t c, int64_t counted, int tile, int bf16, int relu) {
    int first = c + counted == u->c0 + n * (u->job->C / u->job->g);
    first ? sum_windows(u, c, counted, FIRST, tile, V, bf16, relu)
          : sum_windows(u, c, counted, MORE, tile, V, bf16, relu);
}

/* sums of pixels p.. of the t-th vector, a vector a pixel */
INLINE void get_sums(const struct unit *u, int t, int64_t p, vf block[V]) {
    UNROLL for (int k = 0; k < V; k++) block[k] = u->sums[t * u->ld + p + k];
}

INLINE void mixed_tile(const struct unit *u, int64_t c, int tile, int lanes, int bf16, int relu) {
    vf block[V];
    sum_windows(u, c, 0, APART, tile, lanes, bf16, relu);
    for (int t = 0; t < tile; t++) {
        const int32_t *group = u->group + c + t * V - u->c0;
        for (int64_t p = 0; p < u->pixels; p += V) get_sums(u, t, p, block), gather(u, block, group, lanes, u->maps, p);
    }
}

INLINE void logits_last(const struct unit *u, int bf16, int relu) {
    int64_t G = u->job->C / u->job->g, c = u->c0;
    for (int n = 0; by_group(u->job) && n < u->n1 - u->n0; n++) {
        vf block[V];
        int64_t end = group_end(u, n);
        for (c = end - G; c + TILE * V <= end; c += TILE * V) group_tile(u, n, c, 0, TILE, bf16, relu);
        if (G >= 2 * V && c + V < end) { /* two vectors, of which the first may have been counted in part */
            int64_t next = c + 2 * V < end ? c + 2 * V : end;
            group_tile(u, n, next - 2 * V, c - (next - 2 * V), 2, bf16, relu), c = next;
        }
        for (; c + V <= end; c += V) group_tile(u, n, c, 0, 1, bf16, relu);
        if (c < end) group_tile(u, n, end - V, c - (end - V), 1, bf16, relu), c = end;
        for (int64_t p = 0; p < u->pixels; p += V) get_sums(u, 0, p, block), put(u->maps + n * u->ld + p, sums(block));
    }
    for (; c + TILE * V <= u->c1; c += TILE * V) mixed_tile(u, c, TILE, V, bf16, relu);
    for (; c < u->c1; c += V) mixed_tile(u, c, 1, lanes_at(c, u->c1), bf16, relu);
}

/* y = x * maps, which are 1 + attention */
INLINE void multiply_last(const struct unit *u, int bf16) {
    const struct job *job = u->job;
    const void *x = job->x; /* copied, as are others below: a store might else change them for all that C knows */
    void *y = job->y;
    int64_t G = job->C / job->g, c0 = u->c0, c1 = u->c1, ld = u->ld;
    if (G % V == 0) {
        for (int64_t p = 0; p < u->pixels; p++) {
            const float *map = u->maps + p;
            int64_t at = (u->b * u->pixels + p) * job->C;
            for (int64_t c = c0; c < c1; map += ld) {
                vf factor = splat(*map);
                for (int64_t end = c + G; c < end; c += V)
                    store(y, at + c, bf16, V, load(x, at + c, bf16, V) * factor);
            }
        }
        return;
    }
    for (int64_t p0 = 0; p0 < u->pixels; p0 += V) {
        turn(u, u->maps, p0, 0, u->by_pixel);
        for (int64_t p = p0; p < p0 + V && p < u->pixels; p++) {
            const float *row = u->by_pixel + (p - p0) * u->width;
            const int32_t *group = u->group, *place = u->place;
            int64_t at = (u->b * u->pixels + p) * job->C, c = c0;
            for (; c + V <= c1; c += V, group += V, place += V) {
                vf factor = spread(row, group, get_ints(place));
                store(y, at + c, bf16, V, load(x, at + c, bf16, V) * factor);
            }
            if (c < c1) {
                vf factor = spread(row, group, get_ints(place));
                store(y, at + c, bf16, (int)(c1 - c), load(x, at + c, bf16, (int)(c1 - c)) * factor);
            }
        }
    }
}

INLINE void mixed_products(const struct unit *u, int64_t p0, int64_t c, int lanes, int bf16) {
    const struct job *job = u->job;
    vf products[V];
    for (int k = 0; k < V; k++) {
        int64_t at = (u->b * u->pixels + p0 + k) * job->C + c;
        products[k] = p0 + k < u->pixels ? load(job->dy, at, bf16, lanes) * load(job->x, at, bf16, lanes) : (vf){0};
    }
    gather(u, products, u->group + c - u->c0, lanes, u->dmaps, p0);
}
INLINE void maps_back_last(const struct unit *u, int bf16) {
    const struct job *job = u->job;
    const void *x = job->x, *dy = job->dy;
    int64_t C = job->C, start = u->b * u->pixels * C, G = C / job->g;
    int whole = by_group(job);
    for (int64_t p0 = 0; whole && p0 < u->pixels; p0 += V)
        for (int n = 0; n < u->n1 - u->n0; n++) {
            vf block[V];
            for (int k = 0; k < V; k++) {
                int64_t end = group_end(u, n), c = end - G, at = start + (p0 + k) * C;
                vf sum = {0};
                for (; p0 + k < u->pixels && c + V <= end; c += V)
                    sum += load(dy, at + c, bf16, V) * load(x, at + c, bf16, V);
                if (p0 + k < u->pixels && c < end) {
                    int64_t last = end - V;
                    sum += lanes_from(load(dy, at + last, bf16, V) * load(x, at + last, bf16, V), c - last);
                }
                block[k] = sum;
            }
            put(u->dmaps + n * u->ld + p0, sums(block));
        }
    for (int64_t p0 = 0; !whole && p0 < u->pixels; p0 += V) {
        int64_t c = u->c0;
        for (; c + V <= u->c1; c += V) mixed_products(u, p0, c, V, bf16);
        if (c < u->c1) mixed_products(u, p0, c, (int)(u->c1 - c), bf16);
    }
}

/* of `tile` vectors of channels from c on; those of one group, n, or of several (n < 0) */
INLINE void input_back_tile(const struct unit *u, int n, int64_t c, int tile, int lanes, int bf16, int relu) {
    const struct job *job = u->job;
    const void *x = job->x, *dy = job->dy;
    int64_t C = job->C, H = job->H, W = job->W, start = u->b * u->pixels * C + c, row = W * tile;
    vf *rows = u->rows, *to_row = u->to_row;
    const int32_t *group = u->group + c - u->c0;
    const float *map = n < 0 ? NULL : u->maps + n * u->ld, *dmap = n < 0 ? NULL : u->dmaps + n * u->ld;
    vi place = get_ints(u->place + c - u->c0);
    vf scale[BACK_TILE], shift[BACK_TILE], slope[BACK_TILE], q[BACK_TILE], r[BACK_TILE];
    UNROLL for (int t = 0; t < tile; t++) {
        scale[t] = get_param(job->scale, c + t * V, lanes), shift[t] = get_param(job->shift, c + t * V, lanes);
        slope[t] = scale[t] * get_param(job->weight, c + t * V, lanes), q[t] = r[t] = (vf){0};
    }
    int64_t far = C >= 256 && job->B * C * H * W > 1 << 18 ? W : 0; /* then these are in no cache, and in long strides */
    for (int64_t i = 0; i < H; i++) {
        int64_t at = start + i * W * C;
        for (int64_t j = 0; j < far; j++) /* what comes last, too far apart for the processor to foresee */
            for (int64_t k = 0; k < tile * V; k += bf16 ? 32 : 16) {
                __builtin_prefetch((const char *)dy + (at + j * C + k) * (bf16 ? 2 : 4));
                __builtin_prefetch((const char *)job->dx + (at + j * C + k) * (bf16 ? 2 : 4), 1);
            }
        row_maxima(u, x, at, scale, rows + i * row, tile, lanes, bf16);
    }
    for (int64_t k = 0; k < row; k++) { /* around the first and the last row; the other sums are begun by the row above */
        rows[k - row] = rows[H * row + k] = splat(-INFINITY);
        to_row[k] = (vf){0};
    }
    for (int64_t p = 0, k = 0; p < u->pixels; p++) { /* what is sent above the first row or below the last one is 0 */
        vf from = n < 0 ? spread(u->dby_pixel + p * u->width, group, place) : splat(dmap[p]);
        UNROLL for (int t = 0; t < tile; t++, k++) {
            vf above = rows[k - row], here = rows[k], m = max3(above, here, rows[k + row]);
            vf d = relu ? where(above_zero(m + shift[t]), from) : from;
            r[t] += d;
            flags it = same(above, m);
            to_row[k - row] = add_where(it, to_row[k - row], d);
            d = where(~it, d);
            it = same(here, m);
            to_row[k] = add_where(it, to_row[k], d);
            to_row[k + row] = where(~it, d);
        }
    }
    for (int64_t i = 0; i < H; i++) {
        int64_t p = i * W, at = start + p * C, k = i * row;
        vf here[BACK_TILE], d_here[BACK_TILE], d_right[BACK_TILE]; /* what has reached a pixel and the next one so far */
        UNROLL for (int t = 0; t < tile; t++, k++) {
            here[t] = load(x, at + t * V, bf16, lanes);
            flags it = same(here[t] * scale[t], rows[k]);
            d_here[t] = where(it, to_row[k]), d_right[t] = where(~it, to_row[k]);
        }
        for (int64_t j = 1; j < W; j++, p++, at += C) {
            vf factor = n < 0 ? spread(u->by_pixel + p * u->width, group, place) : splat(1 + map[p]);
            UNROLL for (int t = 0; t < tile; t++, k++) {
                vf m = rows[k], d = to_row[k], next = load(x, at + C + t * V, bf16, lanes);
                flags it = same(here[t] * scale[t], m);
                vf done = add_where(it, d_here[t], d);
                d = where(~it, d);
                it = same(next * scale[t], m);
                d_here[t] = add_where(it, d_right[t], d), d_right[t] = where(~it, d);
                q[t] += done * here[t], here[t] = next;
                store(job->dx, at + t * V, bf16, lanes, load(dy, at + t * V, bf16, lanes) * factor + slope[t] * done);
            }
        }
        vf factor = n < 0 ? spread(u->by_pixel + p * u->width, group, place) : splat(1 + map[p]);
        UNROLL for (int t = 0; t < tile; t++) {
            q[t] += d_here[t] * here[t];
            store(job->dx, at + t * V, bf16, lanes, load(dy, at + t * V, bf16, lanes) * factor + slope[t] * d_here[t]);
        }
    }
    UNROLL for (int t = 0; t < tile; t++) {
        store(job->q, u->b * C + c + t * V, 0, lanes, q[t]);
        store(job->r, u->b * C + c + t * V, 0, lanes, r[t]);
    }
}
INLINE void input_back_last(const struct unit *u, int bf16, int relu) {
    int64_t G = u->job->C / u->job->g;
    if (by_group(u->job)) {
        for (int n = 0; n < u->n1 - u->n0; n++) {
            int64_t end = group_end(u, n), c = end - G;
            for (; c + BACK_TILE * V <= end; c += BACK_TILE * V) input_back_tile(u, n, c, BACK_TILE, V, bf16, relu);
            for (; c < end; c += V) input_back_tile(u, n, c + V <= end ? c : end - V, 1, V, bf16, relu);
        }
        return;
    }
    for (int64_t p0 = 0; p0 < u->pixels; p0 += V) {
        turn(u, u->maps, p0, 1, u->by_pixel + p0 * u->width);
        turn(u, u->dmaps, p0, 0, u->dby_pixel + p0 * u->width);
    }
    for (int64_t c = u->c0; c < u->c1; c += V) input_back_tile(u, -1, c, 1, lanes_at(c, u->c1), bf16, relu);
}

INLINE void moments_tile(const struct unit *u, int64_t c, int tile, int lanes, int bf16) {
    const struct job *job = u->job;
    int64_t start = u->b * u->pixels * job->C + c, to = u->b * job->C + c;
    vf mean[TILE] = {0}, squares[TILE] = {0};
    for (int64_t p = 0; p < u->pixels; p++)
        UNROLL for (int t = 0; t < tile; t++) mean[t] += load(job->x, start + p * job->C + t * V, bf16, lanes);
    for (int t = 0; t < tile; t++) mean[t] /= (float)u->pixels;
    for (int64_t p = 0; p < u->pixels; p++)
        UNROLL for (int t = 0; t < tile; t++) {
            vf d = load(job->x, start + p * job->C + t * V, bf16, lanes) - mean[t];
            squares[t] += d * d;
        }
    for (int t = 0; t < tile; t++) {
        store(job->q, to + t * V, 0, lanes, mean[t]);
        store(job->r, to + t * V, 0, lanes, squares[t]);
    }
}
INLINE void moments_last(const struct unit *u, int bf16) {
    int64_t c = u->c0;
    for (; c + TILE * V <= u->c1; c += TILE * V) moments_tile(u, c, TILE, V, bf16);
    for (; c < u->c1; c += V) moments_tile(u, c, 1, lanes_at(c, u->c1), bf16);
}

INLINE void add_lanes(const struct job *job, int64_t at, int64_t c, int lanes, int bf16) {
    vf d = load(job->q, c, 0, lanes) + load(job->r, c, 0, lanes) * load(job->x, at + c, bf16, lanes);
    store(job->dx, at + c, bf16, lanes, load(job->dx, at + c, bf16, lanes) + d);
}
INLINE void add_last(const struct unit *u, int bf16) {
    for (int64_t p = 0; p < u->pixels; p++) {
        int64_t at = (u->b * u->pixels + p) * u->job->C, c = u->c0;
        for (; c + V <= u->c1; c += V) add_lanes(u->job, at, c, V, bf16);
        if (c < u->c1) add_lanes(u->job, at, c, (int)(u->c1 - c), bf16);
    }
}

/* contiguous */

/* channel c's plane of x, where the pixel before it and a vector behind it can be read */
INLINE const void *plane_of(const struct unit *u, const void *x, int64_t c, int bf16) {
    int64_t at = (u->b * u->job->C + c) * u->pixels, total = u->job->B * u->job->C * u->pixels, size = bf16 ? 2 : 4;
    const char *plane = (const char *)x + at * size;
    if (at && at + u->pixels + V < total) return plane;
    return memcpy((char *)(u->copy + (at ? u->ld + 3 * V : 0) + V), plane, u->pixels * size);
}

/* the maxima of each 3 pixels in a row, with -inf around them */
INLINE void plane_row_maxima(const struct unit *u, const void *x, float scale, float *rows, int bf16) {
    const int32_t *no_left = u->no_left, *no_right = u->no_right;
    int64_t pixels = u->pixels;
    vf least = splat(-INFINITY);
    for (int64_t p = 0; p < pixels; p += V) {
        vf here = load(x, p, bf16, V) * scale, left = load(x, p - 1, bf16, V) * scale, right = load(x, p + 1, bf16, V) * scale;
        left = (vf)((vi)left | get_ints(no_left + p)); /* -1 is a NaN, which vmax passes over */
        right = (vf)((vi)right | get_ints(no_right + p));
        put(rows + p, max3(left, here, right));
    }
    put(rows + pixels, least);
}
INLINE vf plane_window(const float *row, int64_t W) { return max3(get(row - W), get(row), get(row + W)); }

/* Where rows fill most of their vectors, the sums are kept a row in vectors of its own: nothing is written between. */
INLINE int64_t row_vectors(const struct job *job) {
    int64_t n = (job->W + V - 1) / V;
    return job->H && n * V * 4 <= job->W * 5 ? n : 0;
}
/* sums[i] += the weighted maxima of the 3x3 pixels, V of them from p + i * W on; `first` and `last` are the row's ends */
INLINE vf weighted(vf m, vf shift, vf weight, int relu) { return weight * (relu ? positive(m + shift) : m); }
INLINE vf row_maxima_at(const void *x, int64_t p, vf scale, vi first, vi last, int bf16) {
    vf here = load(x, p, bf16, V) * scale, left = load(x, p - 1, bf16, V) * scale, right = load(x, p + 1, bf16, V) * scale;
    left = (vf)((vi)left | first), right = (vf)((vi)right | last); /* -1 is a NaN, which vmax passes over */
    return max3(left, here, right);
}
INLINE void add_windows(const struct unit *u, const void *x, int64_t c, int64_t p, vf *sums, int bf16, int relu) {
    const struct job *job = u->job;
    int64_t H = job->H, W = job->W;
    vf scale = splat(job->scale[c]), shift = splat(relu ? job->shift[c] : 0), weight = splat(job->weight[c]);
    vi first = NUMBERS == (int32_t)-p, last = NUMBERS >= (int32_t)(W - 1 - p);
    vf here = row_maxima_at(x, p, scale, first, last, bf16), above = here;
    for (int64_t i = 1; i < H; i++, sums++) {
        vf below = row_maxima_at(x, p += W, scale, first, last, bf16);
        *sums += weighted(max3(above, here, below), shift, weight, relu);
        above = here, here = below;
    }
    *sums += weighted(vmax(above, here), shift, weight, relu);
}
/* the same where a row is shorter than a vector: behind its end come NaNs, which turning a vector brings before it, too */
INLINE vf short_window(vf m, vi behind) {
    m = (vf)((vi)m | behind);
    return max3(permute(m, (NUMBERS + V - 1) % V), m, permute(m, (NUMBERS + 1) % V));
}
INLINE void add_short_windows(const struct unit *u, const void *x, int64_t c, vf *sums, int bf16, int relu) {
    const struct job *job = u->job;
    int64_t H = job->H, W = job->W, p = 0;
    vf scale = splat(job->scale[c]), shift = splat(relu ? job->shift[c] : 0), weight = splat(job->weight[c]);
    vi behind = NUMBERS >= (int32_t)W;
    vf here = load(x, p, bf16, V) * scale, above = here;
    for (int64_t i = 1; i < H; i++, sums++) {
        vf below = load(x, p += W, bf16, V) * scale;
        *sums += weighted(short_window(max3(above, here, below), behind), shift, weight, relu);
        above = here, here = below;
    }
    *sums += weighted(short_window(vmax(above, here), behind), shift, weight, relu);
}
INLINE void logits_rows(const struct unit *u, int bf16, int relu) {
    const struct job *job = u->job;
    int64_t G = job->C / job->g, H = job->H, W = job->W, vectors = row_vectors(job), c = u->c0;
    for (int64_t n = 0; n < u->n1 - u->n0; n++) {
        for (int64_t k = 0; k < vectors * H; k++) u->sums[k] = (vf){0};
        for (int64_t end = c + G; c < end; c++) {
            const void *x = plane_of(u, job->x, c, bf16);
            if (W < V)
                add_short_windows(u, x, c, u->sums, bf16, relu);
            else
                for (int64_t k = 0; k < vectors; k++)
                    add_windows(u, x, c, k * V + V <= W ? k * V : W - V, u->sums + k * H, bf16, relu); /* the last one from the row's end */
        }
        for (int64_t k = 0; k < vectors; k++) {
            int64_t p = k * V + V <= W || !k ? k * V : W - V;
            for (int64_t i = 0; i < H; i++) store(u->maps + n * u->ld, i * W + p, 0, (int)(W < V ? W : V), u->sums[k * H + i]);
        }
    }
}

INLINE void logits_planes(const struct unit *u, int bf16, int relu) {
    const struct job *job = u->job;
    int64_t G = job->C / job->g;
    if (row_vectors(job)) {
        logits_rows(u, bf16, relu);
        return;
    }
    for (int64_t c = u->c0; c < u->c1;) {
        int64_t n = (c - u->c0) / G, end = c + u->planes, group_end = u->c0 + (n + 1) * G;
        if (end > group_end) end = group_end;
        for (int64_t k = c; k < end; k++)
            plane_row_maxima(u, plane_of(u, job->x, k, bf16), job->scale[k], u->plane[0] + (k - c) * u->apart, bf16);
        for (int64_t p = 0; p < u->pixels; p += V) {
            const float *rows = u->plane[0] + p;
            vf sum = get(u->maps + n * u->ld + p);
            for (int64_t k = c; k < end; k++, rows += u->apart) {
                vf m = plane_window(rows, job->W);
                if (relu) m = positive(m + job->shift[k]);
                sum += job->weight[k] * m;
            }
            put(u->maps + n * u->ld + p, sum);
        }
        c = end;
    }
}

/* y = x * maps, which are 1 + attention */
INLINE void multiply_planes(const struct unit *u, int bf16) {
    const struct job *job = u->job;
    const char *x = job->x;
    char *y = job->y;
    int64_t G = job->C / job->g, pixels = u->pixels, lanes = pixels < V ? pixels : V;
    for (int64_t n = 0; n < u->n1 - u->n0; n++) {
        const float *map = u->maps + n * u->ld;
        int64_t at = (u->b * job->C + u->c0 + n * G) * pixels;
        for (int64_t k = 0; k < G; k++, at += pixels) {
            for (int64_t p = 0; p + V <= pixels; p += V)
                store(y, at + p, bf16, V, load(x, at + p, bf16, V) * get(map + p));
            if (pixels % V) { /* the last vector again, from its end */
                int64_t p = pixels - lanes;
                store(y, at + p, bf16, (int)lanes, load(x, at + p, bf16, (int)lanes) * get(map + p));
            }
        }
    }
}

INLINE void maps_back_planes(const struct unit *u, int bf16) {
    const struct job *job = u->job;
    int64_t G = job->C / job->g;
    for (int64_t c = u->c0; c < u->c1; c++) {
        float *map = u->dmaps + (c - u->c0) / G * u->ld;
        int64_t at = (u->b * job->C + c) * u->pixels;
        int64_t p = 0;
        for (; p + V <= u->pixels; p += V) add_to(map + p, load(job->dy, at + p, bf16, V) * load(job->x, at + p, bf16, V));
        if (p < u->pixels) {
            int lanes = (int)(u->pixels - p);
            add_to(map + p, load(job->dy, at + p, bf16, lanes) * load(job->x, at + p, bf16, lanes));
        }
    }
}

INLINE void input_back_planes(const struct unit *u, int bf16, int relu) {
    const struct job *job = u->job;
    int64_t W = job->W, G = job->C / job->g;
    for (int64_t c = u->c0, end; c < u->c1; c = end) {
        end = c + u->planes < u->c1 ? c + u->planes : u->c1;
        for (int64_t k = c; k < end; k++)
            plane_row_maxima(u, plane_of(u, job->x, k, bf16), job->scale[k], u->plane[0] + (k - c) * u->apart, bf16);
        for (int64_t k = c; k < end; k++) { /* to the row above, the same, the one below */
            int64_t at = (k - c) * u->apart;
            const float *rows = u->plane[0] + at, *dmap = u->dmaps + (k - u->c0) / G * u->ld;
            float shift = relu ? job->shift[k] : 0;
            vf r = {0};
            for (int64_t p = 0; p < u->pixels; p += V) {
                vf above = get(rows + p - W), here = get(rows + p), m = max3(above, here, get(rows + p + W));
                vf d = get(dmap + p);
                if (relu) d = keep(m + shift > 0, d);
                r += d;
                put(u->plane[1] + at + p, keep(above == m, d));
                d = keep(above != m, d);
                put(u->plane[2] + at + p, keep(here == m, d));
                put(u->plane[3] + at + p, keep(here != m, d));
            }
            job->r[u->b * job->C + k] = lanes_sum(r);
        }
        for (int64_t k = c; k < end; k++) { /* to the pixel at the left, the same, the one at the right; over what is read */
            int64_t at = (k - c) * u->apart;
            float *rows = u->plane[0] + at, *up = u->plane[1] + at, *same = u->plane[2] + at, *down = u->plane[3] + at;
            const void *x = plane_of(u, job->x, k, bf16);
            float scale = job->scale[k];
            for (int64_t p = 0; p < u->pixels; p += V) {
                vf m = get(rows + p), d = get(up + p + W) + get(same + p) + get(down + p - W);
                vi left = (load(x, p - 1, bf16, V) * scale == m) & ~get_ints(u->no_left + p);
                vi here = load(x, p, bf16, V) * scale == m;
                put(up + p, keep(left, d));
                d = keep(~left, d);
                put(rows + p, keep(here, d));
                put(same + p, keep(~(here | get_ints(u->no_right + p)), d));
            }
        }
        for (int64_t k = c; k < end; k++) {
            int64_t at = (k - c) * u->apart, to = (u->b * job->C + k) * u->pixels;
            const float *left = u->plane[1] + at, *same = u->plane[0] + at, *right = u->plane[2] + at;
            const float *map = u->maps + (k - u->c0) / G * u->ld;
            float slope = job->scale[k] * job->weight[k];
            vf q = {0};
            for (int64_t p = 0; p < u->pixels; p += V) {
                int lanes = lanes_at(p, u->pixels);
                vf d = get(left + p + 1) + get(same + p) + get(right + p - 1);
                q += d * load(job->x, to + p, bf16, lanes);
                store(job->dx, to + p, bf16, lanes, load(job->dy, to + p, bf16, lanes) * (1 + get(map + p)) + slope * d);
            }
            job->q[u->b * job->C + k] = lanes_sum(q);
        }
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

INLINE void add_pixels(const struct job *job, int64_t at, vf q, vf r, int lanes, int bf16) {
    store(job->dx, at, bf16, lanes, load(job->dx, at, bf16, lanes) + q + r * load(job->x, at, bf16, lanes));
}
INLINE void add_planes(const struct unit *u, int bf16) {
    for (int64_t c = u->c0; c < u->c1; c++) {
        vf q = splat(u->job->q[c]), r = splat(u->job->r[c]);
        int64_t at = (u->b * u->job->C + c) * u->pixels, end = at + u->pixels;
        for (; at + V <= end; at += V) add_pixels(u->job, at, q, r, V, bf16);
        if (at < end) add_pixels(u->job, at, q, r, (int)(end - at), bf16);
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
        int64_t around = back ? BACK_TILE * job->W : 0, rows = back ? BACK_TILE * pixels : 0, ring = 3 * TILE * job->W;
        if (job->stages & LOGITS && rows < ring) rows = ring;
        u->rows = (vf *)take(&at, rows + 2 * around, sizeof(vf)) + around;
        u->to_row = (vf *)take(&at, back ? BACK_TILE * pixels + 2 * around : 0, sizeof(vf)) + around;
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
