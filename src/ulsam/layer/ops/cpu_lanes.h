/* Numbers side by side: V lanes of a vector, how they are read, written, compared and turned. */

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
