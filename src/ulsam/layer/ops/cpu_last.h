/* The stages where channels are last: V channels at once, pixels one after the other. */

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

enum { FIRST, MORE, APART }; /* sums[p] = the sum over the vectors; +=; or the t-th one's in sums[t * ld + p] */

struct windows {
    vf scale[TILE], shift[TILE], weight[TILE];
    int64_t row[4]; /* where four rows begin: the one above, two rows, the one below; beyond the border a row again */
};

/* column j: the maxima of the 3 pixels around the first of two rows, and, if `two`, around the second */
INLINE void column_maxima(
    const struct unit *u, const struct windows *w, int64_t j, int two, vf maxima[2][TILE], int tile, int lanes, int bf16
) {
    const void *x = u->job->x;
    UNROLL for (int t = 0; t < tile; t++) {
        vf value[4];
        UNROLL for (int k = 0; k < 3 + two; k++) {
            int64_t at = w->row[k] + j * u->job->C + t * V;
            value[k] = load(x, at, bf16, lanes) * w->scale[t];
            if (k > 1 && tile > 1 && t % (64 / (bf16 ? 2 : 4) / V) == 0) /* for the next tile: too far to be foreseen */
                __builtin_prefetch((const char *)x + (at + tile * V) * (bf16 ? 2 : 4));
        }
        maxima[0][t] = max3(value[0], value[1], value[2]);
        if (two) maxima[1][t] = max3(value[1], value[2], value[3]);
    }
}

/* the windows of one row, or of two: what both read is then read once */
INLINE void row_windows(
    const struct unit *u, const struct windows *w, vf *sums, int64_t counted, int how, int two, int tile, int lanes,
    int bf16, int relu
) {
    int64_t W = u->job->W;
    vf left[2][TILE], here[2][TILE], right[2][TILE];
    UNROLL for (int t = 0; t < tile; t++) left[0][t] = left[1][t] = splat(-INFINITY);
    column_maxima(u, w, 0, two, here, tile, lanes, bf16);
    for (int64_t j = 0; j < W; j++, sums++) {
        if (j + 1 < W)
            column_maxima(u, w, j + 1, two, right, tile, lanes, bf16);
        else
            UNROLL for (int t = 0; t < tile; t++) right[0][t] = right[1][t] = splat(-INFINITY);
        UNROLL for (int k = 0; k < 1 + two; k++) {
            vf sum = how == MORE ? sums[k * W] : (vf){0};
            UNROLL for (int t = 0; t < tile; t++) {
                vf m = max3(left[k][t], here[k][t], right[k][t]);
                vf product = lanes_from(w->weight[t] * (relu ? positive(m + w->shift[t]) : m), t ? 0 : counted);
                if (how == APART)
                    sums[t * u->ld + k * W] = product;
                else
                    sum += product;
                left[k][t] = here[k][t], here[k][t] = right[k][t];
            }
            if (how != APART) sums[k * W] = sum;
        }
    }
}

/* the sums of weight * relu?(maximum of the 3x3 pixels + shift), of `tile` vectors of channels from c on, without the
   first `counted` channels */
INLINE void sum_windows(
    const struct unit *u, int64_t c, int64_t counted, int how, int tile, int lanes, int bf16, int relu
) {
    const struct job *job = u->job;
    int64_t H = job->H, row = job->W * job->C, at = u->b * u->pixels * job->C + c;
    struct windows w;
    UNROLL for (int t = 0; t < tile; t++) {
        w.scale[t] = get_param(job->scale, c + t * V, lanes), w.shift[t] = get_param(job->shift, c + t * V, lanes);
        w.weight[t] = get_param(job->weight, c + t * V, lanes);
    }
    for (int64_t i = 0; i < H; i += 2, at += 2 * row) {
        vf *sums = u->sums + i * job->W;
        w.row[0] = i ? at - row : at, w.row[1] = at;
        w.row[2] = i + 1 < H ? at + row : at, w.row[3] = i + 2 < H ? at + 2 * row : w.row[2];
        i + 1 < H ? row_windows(u, &w, sums, counted, how, 1, tile, lanes, bf16, relu)
                  : row_windows(u, &w, sums, counted, how, 0, tile, lanes, bf16, relu);
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
            if (tile > 1 && t % (64 / (bf16 ? 2 : 4) / V) == 0) /* for the next tile: too far to be foreseen */
                __builtin_prefetch((const char *)x + (at + (tile + t) * V) * (bf16 ? 2 : 4));
            row[t] = max3(left[t], here[t], right);
            left[t] = here[t], here[t] = right;
        }
    }
    UNROLL for (int t = 0; t < tile; t++) row[t] = vmax(left[t], here[t]);
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
