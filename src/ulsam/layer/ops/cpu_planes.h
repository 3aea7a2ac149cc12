/* The stages of contiguous maps, a plane a channel: V pixels at once, channels one after the other. */

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
