/* Whole numbers of 8 bits screen, floats decide. Part of native.c.

   With VNNI a CPU multiplies 8-bit integers four times as fast as floats. Columns are scaled by powers of two, which change
   no product, so that no entry takes the range of all others:

       x . w = x' . w',  x' = x / c,  w' = w c;  x' = step_x q_x + e_x,  w' = step_w q_w + e_w.

   Integer sums are exact, the lengths of what rounding left over are known, and by Cauchy-Schwarz

       |x . w - step_x step_w q_x . q_w| <= |e_x| |w'| + |x' - e_x| |e_w|.

   What could pass by this bound is computed again in float32, and that decides. */

enum { SCREEN_LATENTS = 64, SCREEN_ROWS = 6, QUAD = 4 };
/* Sums of more products of two bytes could leave 32 bits. */
enum { LONGEST_SCREENED = 1 << 16 };

static long quads_of(long d) { return (d + QUAD - 1) / QUAD; }

static long screen_latents(long n_latents) { return (n_latents + SCREEN_LATENTS - 1) / SCREEN_LATENTS * SCREEN_LATENTS; }

/* A batch and an encoder in whole numbers. Panels of sixteen latents, four entries of each side by side, 128 added. */
typedef struct {
    uint8_t *panels;
    int8_t *rows;
    float *steps, *lengths, *errors;                 /* of latents: step_w, |w'|, |e_w| */
    float *row_steps, *row_errors, *row_lengths;     /* of rows: step_x, |e_x| and what floats may add, |x' - e_x| */
    float *more;                                     /* infinite where nothing is known of a row, else 0 */
    int32_t *starts;                                 /* of a row's sums, for the 128 that was added */
    float *columns;                                  /* 1 / c, then c */
} Screen;

/* Bytes of the first of the two parts that a screen lies in, or of the second. */
API long screen_room(long batch, long n_latents, long d, long second, long threads) {
    (void)threads;
    if (!second) return (screen_latents(n_latents) + batch) * quads_of(d) * QUAD;
    return (3 * screen_latents(n_latents) + 5 * batch + 2 * (d + 16)) * (long)sizeof(float);
}

static Screen screen_in(const void *whole, const void *scales, long batch, long n_latents, long d) {
    long n = screen_latents(n_latents);
    float *at = (float *)scales;
    Screen screen = {.panels = (uint8_t *)whole, .rows = (int8_t *)whole + n * quads_of(d) * QUAD};
    screen.steps = at, screen.lengths = at + n, screen.errors = at + 2 * n;
    at += 3 * n;
    screen.row_steps = at, screen.row_errors = at + batch, screen.row_lengths = at + 2 * batch, screen.more = at + 3 * batch;
    screen.starts = (int32_t *)(at + 4 * batch), screen.columns = at + 5 * batch;
    return screen;
}

#if SCREENS == 8
/* What became of a row: its step, |row'|, |what rounding left|, |the rest|, and the sum of the whole numbers. A row that
   cannot be rounded is all left over, and its whole numbers are 0. */
typedef struct {
    float step, length, error, rest;
    int32_t sum;
    int known;
} Rounded;

static Rounded to_bytes(const float *row, const float *factors, long d, int8_t *to) {
    __m512 largest = _mm512_setzero_ps(), squares = largest;
    __mmask16 any = 0;
    long length = quads_of(d) * QUAD;
    for (long i = 0; i < d; i += SIDE) {
        __mmask16 there = first_of(d - i);
        __m512 given = _mm512_maskz_loadu_ps(there, row + i), v = _mm512_mul_ps(given, _mm512_maskz_loadu_ps(there, factors + i));
        any |= _mm512_cmp_ps_mask(given, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        largest = _mm512_max_ps(_mm512_abs_ps(v), largest), squares = _mm512_fmadd_ps(v, v, squares);
    }
    float most = _mm512_reduce_max_ps(largest), square = _mm512_reduce_add_ps(squares);
    if (!(square < INFINITY && (most >= LEAST_SCREENED || !any))) { /* a NaN is in the squares, if not in the largest */
        memset(to, 0, (size_t)length);
        return (Rounded){.error = INFINITY};
    }
    __m512 each = _mm512_set1_ps(most > 0 ? 127 / most : 0), step = _mm512_set1_ps(most / 127);
    __m512 errors = _mm512_setzero_ps(), rest = errors;
    __m512i sum = _mm512_setzero_si512();
    for (long i = 0; i < length; i += SIDE) {
        __mmask16 there = first_of(d - i), room = first_of(length - i);
        __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, row + i), _mm512_maskz_loadu_ps(there, factors + i));
        __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v, each));
        __m512 kept = _mm512_mul_ps(_mm512_cvtepi32_ps(q), step), left = _mm512_sub_ps(v, kept);
        errors = _mm512_fmadd_ps(left, left, errors), rest = _mm512_fmadd_ps(kept, kept, rest);
        sum = _mm512_add_epi32(sum, q);
        _mm_mask_storeu_epi8(to + i, room, _mm512_cvtepi32_epi8(q));
    }
    float a_little = 1 + 1e-5f + (float)d * 0x1p-26f; /* for sums of squares, which are of d / 16 terms, and of sixteen */
    return (Rounded){most / 127, a_little * sqrtf(square), a_little * sqrtf(_mm512_reduce_add_ps(errors)),
                     a_little * sqrtf(_mm512_reduce_add_ps(rest)), _mm512_reduce_add_epi32(sum), 1};
}

/* 1 / c and c of each column: c^4 is its mean square to the nearest power of 16, so that both sides share what is uneven. */
static void scale_columns(const float *x, long batch, long d, float *columns, long threads) {
    enum { TOGETHER = 64 };
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (long first = 0; first < d; first += TOGETHER) {
        float sums[TOGETHER] = {0};
        long n = MIN(TOGETHER, d - first);
        for (long b = 0; b < batch; b++)
#pragma omp simd
            for (long i = 0; i < n; i++) sums[i] += x[b * d + first + i] * x[b * d + first + i];
        for (long i = 0; i < n; i++) {
            float mean = sums[i] / (float)batch;
            int power = mean > 0 && mean < INFINITY ? (int)lrintf(log2f(mean) / 4) : 0;
            columns[first + i] = ldexpf(1, -power), columns[d + first + i] = ldexpf(1, power);
        }
    }
}

static void screen_rows_of(const float *x, long batch, long d, const Screen *screen, long threads) {
    float floats = ((float)d / 8 + 32) * 0x1p-24f; /* of |x'| |w'|, in the sum that decides and in the bound */
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (long b = 0; b < batch; b++) {
        Rounded row = to_bytes(x + b * d, screen->columns, d, screen->rows + b * quads_of(d) * QUAD);
        screen->row_steps[b] = row.step, screen->row_lengths[b] = row.rest;
        screen->row_errors[b] = row.known ? row.error + floats * (row.error + row.rest) : 0;
        screen->more[b] = row.known ? 0 : INFINITY;
        screen->starts[b] = -128 * row.sum;
    }
}

static void screen_latents_of(const float *encoder, long n_latents, long d, const Screen *screen, long threads) {
    long quads = quads_of(d), n_panels = screen_latents(n_latents) / SIDE;
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (long number = 0; number < n_panels; number++) {
        int8_t *rows = own_memory((size_t)(SIDE * quads * QUAD));
        for (long i = 0; i < SIDE; i++) {
            long j = number * SIDE + i;
            Rounded row = {0};
            if (j < n_latents) row = to_bytes(encoder + j * d, screen->columns + d, d, rows + i * quads * QUAD);
            else memset(rows + i * quads * QUAD, 0, (size_t)(quads * QUAD));
            screen->steps[j] = row.step, screen->lengths[j] = row.length, screen->errors[j] = row.error;
        }
        __m512i apart = _mm512_mullo_epi32(counting(), _mm512_set1_epi32((int)quads));
        uint8_t *panel = screen->panels + number * SIDE * quads * QUAD;
        for (long p = 0; p < quads; p++) {
            __m512i four = _mm512_i32gather_epi32(apart, rows + p * QUAD, QUAD);
            _mm512_storeu_si512(panel + p * SIDE * QUAD, _mm512_xor_si512(four, _mm512_set1_epi32((int)0x80808080)));
        }
    }
}

/* How much of a pre-latent the bound hides, on average, in units of the deviation that pre-latents have where x and w know
   nothing of each other, |x| |w| / sqrt(d): all of it where nothing is known of a row. */
static float looseness(const Screen *screen, long batch, long n_latents, long d) {
    double rows = 0, latents = 0, n_rows = 0, n = 0;
    for (long b = 0; b < batch; b++)
        if (screen->more[b] > 0) rows++, n_rows++;
        else if (screen->row_lengths[b] > 0) rows += screen->row_errors[b] / screen->row_lengths[b], n_rows++;
    for (long j = 0; j < n_latents; j++)
        if (!(screen->errors[j] < INFINITY)) latents++, n++;
        else if (screen->lengths[j] > 0) latents += screen->errors[j] / screen->lengths[j], n++;
    return (float)((rows / MAX(n_rows, 1) + latents / MAX(n, 1)) * sqrt((double)d));
}
#endif

/* Rounds a batch and an encoder. Returns how loose the bound is (see `looseness`). */
API real screen_batch(const real *x, const real *encoder, long batch, long n_latents, long d, void *whole, void *scales, long threads) {
#if SCREENS == 8
    Screen screen = screen_in(whole, scales, batch, n_latents, d);
    scale_columns(x, batch, d, screen.columns, threads);
    screen_rows_of(x, batch, d, &screen, threads);
    screen_latents_of(encoder, n_latents, d, &screen, threads);
    return looseness(&screen, batch, n_latents, d);
#else
    (void)x, (void)encoder, (void)batch, (void)n_latents, (void)d, (void)whole, (void)scales, (void)threads;
    return INFINITY;
#endif
}

#if SCREENS == 8
/* Which latents of 64 could be larger than `least` in up to six rows, whose numbers are given: a row's are in passes[i]. */
static inline void screen_tile_of(const Scores *scores, const Screen *screen, const int32_t *numbers, long m, long c, const float *least,
                                  __mmask64 passes[SCREEN_ROWS]) {
    enum { PANELS = SCREEN_LATENTS / SIDE };
    long n_latents = scores->n_latents, quads = quads_of(scores->d);
    float floats = 0x1p-21f * scores->largest_bias; /* what they may add where the bias is */
    long panel = quads * SIDE * QUAD;
    const uint8_t *w = screen->panels + c * quads * QUAD;
    const int8_t *from[SCREEN_ROWS];
    __m512i sums[SCREEN_ROWS][PANELS];
#pragma GCC unroll 6
    for (long i = 0; i < SCREEN_ROWS; i++) {
        long b = numbers[i < m ? i : 0];
        from[i] = screen->rows + b * quads * QUAD;
        sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = _mm512_set1_epi32(screen->starts[b]);
    }
    for (long p = 0; p < quads; p++) {
        __m512i w0 = _mm512_loadu_si512(w + p * SIDE * QUAD), w1 = _mm512_loadu_si512(w + panel + p * SIDE * QUAD);
        __m512i w2 = _mm512_loadu_si512(w + 2 * panel + p * SIDE * QUAD), w3 = _mm512_loadu_si512(w + 3 * panel + p * SIDE * QUAD);
#pragma GCC unroll 6
        for (long i = 0; i < SCREEN_ROWS; i++) {
            int32_t quad;
            memcpy(&quad, from[i] + p * QUAD, sizeof quad);
            __m512i four = _mm512_set1_epi32(quad);
            sums[i][0] = _mm512_dpbusd_epi32(sums[i][0], w0, four), sums[i][1] = _mm512_dpbusd_epi32(sums[i][1], w1, four);
            sums[i][2] = _mm512_dpbusd_epi32(sums[i][2], w2, four), sums[i][3] = _mm512_dpbusd_epi32(sums[i][3], w3, four);
        }
    }
    __m512i kept[SCREEN_ROWS][PANELS]; /* the tile, out of the registers */
    memcpy(kept, sums, sizeof kept);
    for (long i = 0; i < SCREEN_ROWS; i++) passes[i] = 0;
    for (long q = 0; q < PANELS; q++) {
        long j = c + q * SIDE;
        __mmask16 there = first_of(n_latents - j);
        __m512 step = _mm512_loadu_ps(screen->steps + j), length = _mm512_loadu_ps(screen->lengths + j);
        __m512 error = _mm512_loadu_ps(screen->errors + j), added = _mm512_maskz_loadu_ps(there, scores->bias + j);
        for (long i = 0; i < m; i++) {
            long b = numbers[i];
            __m512 hidden = _mm512_fmadd_ps(_mm512_set1_ps(screen->row_errors[b]), length, _mm512_set1_ps(screen->more[b] + floats));
            hidden = _mm512_fmadd_ps(_mm512_set1_ps(screen->row_lengths[b]), error, hidden);
            __m512 scale = _mm512_mul_ps(_mm512_set1_ps(screen->row_steps[b]), step);
            __m512 most = _mm512_fmadd_ps(_mm512_cvtepi32_ps(kept[i][q]), scale, _mm512_add_ps(added, hidden));
            /* unless it is surely no larger: a bound that is no number lets pass */
            passes[i] |= (__mmask64)_mm512_mask_cmp_ps_mask(there, most, _mm512_set1_ps(least[i]), _CMP_NLE_UQ) << (q * SIDE);
        }
    }
}

/* Products of four pairs of rows. */
static inline void four_pairs(const float *const x[4], const float *const w[4], long d, float out[4]) {
    const float *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3], *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
    __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
    long i = 0;
    for (; i + SIDE <= d; i += SIDE) {
        s0 = _mm512_fmadd_ps(_mm512_loadu_ps(x0 + i), _mm512_loadu_ps(w0 + i), s0);
        s1 = _mm512_fmadd_ps(_mm512_loadu_ps(x1 + i), _mm512_loadu_ps(w1 + i), s1);
        s2 = _mm512_fmadd_ps(_mm512_loadu_ps(x2 + i), _mm512_loadu_ps(w2 + i), s2);
        s3 = _mm512_fmadd_ps(_mm512_loadu_ps(x3 + i), _mm512_loadu_ps(w3 + i), s3);
    }
    if (i < d) {
        __mmask16 there = first_of(d - i);
        s0 = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(there, x0 + i), _mm512_maskz_loadu_ps(there, w0 + i), s0);
        s1 = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(there, x1 + i), _mm512_maskz_loadu_ps(there, w1 + i), s1);
        s2 = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(there, x2 + i), _mm512_maskz_loadu_ps(there, w2 + i), s2);
        s3 = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(there, x3 + i), _mm512_maskz_loadu_ps(there, w3 + i), s3);
    }
    out[0] = _mm512_reduce_add_ps(s0), out[1] = _mm512_reduce_add_ps(s1);
    out[2] = _mm512_reduce_add_ps(s2), out[3] = _mm512_reduce_add_ps(s3);
}
#endif
