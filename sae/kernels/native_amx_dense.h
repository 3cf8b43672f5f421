/* A ReLU's dense step on AMX units. Part of native.c.

       z = max(0, x encoder^T + bias),  gradient = scale (z decoder - x),  through = (gradient decoder^T + cost norms) where z > 0
       g_encoder = through^T x,  g_decoder = z^T gradient,  g_bias = sum of through over samples

   Products are of bf16 numbers, summed in float32. Samples come in chunks: a chunk's z is multiplied by the decoder, 256
   latents at a time, as soon as it is made. z is the one matrix as large as a batch's pre-latents that is written, in
   bf16; `through` and both gradients are made for 64 latents at a time, when the update visits these.

   Beside the tiles of native_amx.h there are tiles of columns (16 columns of a matrix, 32 samples of each) and of pairs
   of rows (16 pairs, in each side by side the numbers of 16 columns). */

enum { DENSE_ROWS = 128, SHARED_STEPS = 8, N_SUMS = 2, VISITED = 64 };

/* Samples of a batch that are worked on together. */
static long dense_rows(long batch) { return (batch + DENSE_ROWS - 1) / DENSE_ROWS * DENSE_ROWS; }

#if TILES
/* What a dense step leaves for the update. */
typedef struct {
    const float *x, *bias, *norms, *decoder;
    float cost, scale;
    long batch, n, d, rows; /* of the batch, latents, width, rows rounded up */
    const bf16 *encoder, *decoder_pairs;
    bf16 *z, *x_columns, *gradient_columns, *gradient_rows;
    float *gradient, *sums; /* sums [chunks, N_SUMS, n]: of z, of how often latents fire */
    double *squares;
} Dense;

/* Columns of m rows: tile (i, s) has columns 16 i to 16 i + 15 of 32 rows; tiles of a column lie `apart` tiles from the next's. */
static void tile_columns(const float *matrix, long d, long m, bf16 *tiles, long apart) {
    __m512i down = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32((int)d));
    for (long i = 0; i < tile_steps(d) * DEPTH; i++)
        for (long b = 0; b < (m + DEPTH - 1) / DEPTH * DEPTH; b += DEPTH) {
            const float *from = matrix + b * d + i;
            __m512 zero = _mm512_setzero_ps();
            __mmask16 low = i < d ? first_of(m - b) : 0, high = i < d ? first_of(m - b - SIDE) : 0;
            __m512 first = _mm512_mask_i32gather_ps(zero, low, down, from, 4);
            __m512 second = _mm512_mask_i32gather_ps(zero, high, down, from + SIDE * d, 4);
            __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(second, first);
            _mm512_storeu_si512(tiles + (i / SIDE * apart + b / DEPTH) * TILE_ENTRIES + i % SIDE * DEPTH, rounded);
        }
}

/* Pairs of rows of a matrix [n, d]: tile (i, s) has rows 32 s to 32 s + 31, columns 16 i to 16 i + 15. */
static void tile_pairs(const float *matrix, long n, long d, bf16 *tiles, long threads) {
    long steps = tile_steps(n);
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (long s = 0; s < steps; s++)
        for (long q = 0; q < SIDE; q++) {
            long j = s * DEPTH + 2 * q;
            for (long i = 0; i < tile_steps(d) * DEPTH; i += SIDE) {
                const float *from = matrix + j * d + i;
                __m512 first = _mm512_maskz_loadu_ps(j < n ? first_of(d - i) : 0, from);
                __m512 second = _mm512_maskz_loadu_ps(j + 1 < n ? first_of(d - i) : 0, from + d);
                _mm512_storeu_si512(tiles + (i / SIDE * steps + s) * TILE_ENTRIES + q * DEPTH, in_pairs(first, second));
            }
        }
}

/* z of a chunk and 32 latents, from out [32, 32] on: rounded, for the product with the decoder and for that over samples. */
static inline __attribute__((always_inline)) void fire(const Dense *step, const float *out, long c, long r, long m, long first,
                                                       bf16 *rows, long rows_steps, long at_step, float *sums) {
    long steps = step->rows / DEPTH, panel = steps * TILE_ENTRIES;
    __mmask16 there[2] = {first_of(step->n - c), first_of(step->n - c - SIDE)};
    __m512 zero = _mm512_setzero_ps(), bias[2], sum[2] = {zero, zero}, fires[2] = {zero, zero};
    for (long h = 0; h < 2; h++) bias[h] = _mm512_maskz_loadu_ps(there[h], step->bias + c + h * SIDE);
    bf16 *pairs = step->z + c / SIDE * panel + (first + r) / DEPTH * TILE_ENTRIES;
    for (long b = 0; b < DEPTH; b += 2) {
        __m512 z[2][2];
        for (long i = 0; i < 2; i++)
            for (long h = 0; h < 2; h++) {
                __m512 v = _mm512_add_ps(_mm512_load_ps(out + (b + i) * DEPTH + h * SIDE), bias[h]);
                /* a NaN stays one: the loss shall tell */
                __mmask16 on = _mm512_mask_cmp_ps_mask(r + b + i < m ? there[h] : 0, v, zero, _CMP_NLE_UQ);
                z[i][h] = _mm512_maskz_mov_ps(on, v);
                sum[h] = _mm512_add_ps(sum[h], z[i][h]);
                fires[h] = _mm512_mask_add_ps(fires[h], on, fires[h], _mm512_set1_ps(1));
            }
        for (long i = 0; i < 2; i++)
            _mm512_storeu_si512(rows + ((r / SIDE + (b + i) / SIDE) * rows_steps + at_step) * TILE_ENTRIES + (b + i) % SIDE * DEPTH,
                                (__m512i)_mm512_cvtne2ps_pbh(z[i][1], z[i][0]));
        for (long h = 0; h < 2; h++)
            _mm512_storeu_si512(pairs + h * panel + b / 2 * DEPTH, in_pairs(z[0][h], z[1][h]));
    }
    for (long h = 0; h < 2; h++) {
        float *z_sum = sums + c + h * SIDE, *n_fires = z_sum + step->n;
        _mm512_mask_storeu_ps(z_sum, there[h], _mm512_add_ps(_mm512_maskz_loadu_ps(there[h], z_sum), sum[h]));
        _mm512_mask_storeu_ps(n_fires, there[h], _mm512_add_ps(_mm512_maskz_loadu_ps(there[h], n_fires), fires[h]));
    }
}

/* The gradient in the pre-latents of 32 samples, where they fire, in pairs; and its sum over samples, added to `sums`. */
static inline __attribute__((always_inline)) void flow_back(const Dense *step, const float *out, long c, long at, bf16 *through,
                                                            float *sums) {
    long panel = step->rows / DEPTH * TILE_ENTRIES;
    for (long h = 0; h < 2; h++) {
        long j = c + h * SIDE;
        __m512 norm = step->norms ? _mm512_maskz_loadu_ps(first_of(step->n - j), step->norms + j) : _mm512_set1_ps(1);
        __m512 cost = _mm512_mul_ps(_mm512_set1_ps(step->cost), norm), sum = _mm512_loadu_ps(sums + h * SIDE);
        const bf16 *z = step->z + j / SIDE * panel + at * TILE_ENTRIES;
        bf16 *pairs = through + h * panel + at * TILE_ENTRIES;
        for (long b = 0; b < DEPTH; b += 2) {
            __m512i fired = _mm512_loadu_si512(z + b / 2 * DEPTH);
            __m512 first = _mm512_add_ps(_mm512_load_ps(out + b * DEPTH + h * SIDE), cost);
            __m512 second = _mm512_add_ps(_mm512_load_ps(out + (b + 1) * DEPTH + h * SIDE), cost);
            first = _mm512_maskz_mov_ps(_mm512_test_epi32_mask(fired, _mm512_set1_epi32(0xffff)), first);
            second = _mm512_maskz_mov_ps(_mm512_test_epi32_mask(fired, _mm512_set1_epi32((int)0xffff0000)), second);
            sum = _mm512_add_ps(sum, _mm512_add_ps(first, second));
            _mm512_storeu_si512(pairs + b / 2 * DEPTH, in_pairs(first, second));
        }
        _mm512_storeu_ps(sums + h * SIDE, sum);
    }
}

/* A chunk of samples, from x to z and the gradient. */
static void dense_chunk(const Dense *step, long first) {
    long n = step->n, d = step->d, m = MIN(DENSE_ROWS, step->batch - first), steps = tile_steps(d), panel = steps * TILE_ENTRIES;
    long n_steps = tile_steps(n), ld = steps * DEPTH + SIDE;
    bf16 *rows = own_memory((size_t)(DENSE_ROWS * (steps * DEPTH + SHARED_STEPS * DEPTH)) * sizeof(bf16) +
                            (size_t)(DENSE_ROWS * ld + DEPTH * DEPTH) * sizeof(float));
    bf16 *z = rows + DENSE_ROWS * steps * DEPTH;
    float *x_hat = (float *)(z + DENSE_ROWS * SHARED_STEPS * DEPTH), *out = x_hat + DENSE_ROWS * ld;
    float *sums = step->sums + first / DENSE_ROWS * N_SUMS * n;
    memset(sums, 0, (size_t)(N_SUMS * n) * sizeof(float));
    long all = (m + DEPTH - 1) / DEPTH * DEPTH;
    tile_rows(step->x + first * d, d, 1, m, rows);
    tile_columns(step->x + first * d, d, m, step->x_columns + first / DEPTH * TILE_ENTRIES, step->rows / DEPTH);
    for (long begin = 0; begin < n_steps; begin += SHARED_STEPS) {
        long now = MIN(SHARED_STEPS, n_steps - begin);
        for (long s = 0; s < now; s++) {
            const bf16 *latents = step->encoder + (begin + s) * 2 * panel;
            for (long r = 0; r < all; r += DEPTH) {
                four_tiles(rows + r * steps * DEPTH, panel, latents, panel, steps, out, DEPTH, 0);
                fire(step, out, (begin + s) * DEPTH, r, m, first, z, SHARED_STEPS, s, sums);
            }
        }
        for (long i = 0; i < steps; i++)
            for (long r = 0; r < all; r += DEPTH)
                four_tiles(z + r * SHARED_STEPS * DEPTH, SHARED_STEPS * TILE_ENTRIES, step->decoder_pairs + (2 * i * n_steps + begin) * TILE_ENTRIES,
                           n_steps * TILE_ENTRIES, now, x_hat + r * ld + i * DEPTH, ld, begin > 0);
    }
    double squares = 0;
    for (long b = 0; b < m; b++) {
        const float *restrict to = step->x + (first + b) * d, *restrict from = x_hat + b * ld;
        float *restrict g = step->gradient + (first + b) * d, square = 0, scale = step->scale;
#pragma omp simd reduction(+ : square)
        for (long i = 0; i < d; i++) {
            float residual = from[i] - to[i];
            square += residual * residual;
            g[i] = scale * residual;
        }
        squares += square;
    }
    step->squares[first / DENSE_ROWS] = squares;
    tile_rows(step->gradient + first * d, d, 1, m, step->gradient_rows + first * steps * DEPTH);
    tile_columns(step->gradient + first * d, d, m, step->gradient_columns + first / DEPTH * TILE_ENTRIES, step->rows / DEPTH);
}

/* to [n_latents, d] = pairs^T columns, summed over `n_steps` times 32 samples. Up to VISITED latents at a time: what is read
   of the columns is as large as a cache. */
static void over_samples(const bf16 *pairs, const bf16 *columns, long apart, long n_steps, long n_latents, long d, float *out,
                         float *to) {
    long steps = tile_steps(d);
    for (long begin = 0; begin < n_steps; begin += SHARED_STEPS)
        for (long i = 0; i < steps; i++)
            for (long j = 0; j < n_latents; j += DEPTH)
                four_tiles(columns + (2 * i * apart + begin) * TILE_ENTRIES, apart * TILE_ENTRIES,
                           pairs + (j / SIDE * apart + begin) * TILE_ENTRIES, apart * TILE_ENTRIES,
                           MIN(SHARED_STEPS, n_steps - begin), out + (j / DEPTH * steps + i) * DEPTH * DEPTH, DEPTH, begin > 0);
    __m512i down = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(DEPTH));
    for (long j = 0; j < n_latents; j++)
        for (long i = 0; i < d; i += SIDE) {
            const float *from = out + (j / DEPTH * steps * DEPTH + i) * DEPTH + j % DEPTH;
            _mm512_mask_storeu_ps(to + j * d + i, first_of(d - i), _mm512_i32gather_ps(down, from, 4));
        }
}

/* Gradient rows of some latents. */
typedef struct {
    float *encoder, *decoder, *bias, *sums, *work;
    bf16 *through, *decoder_rows;
} Visit;

/* A visit's memory, `size` bytes of it; nothing is written where `memory` is null. */
static Visit visit_of(const Dense *step, char *memory, size_t *size) {
    size_t width = (size_t)(tile_steps(step->d) * DEPTH), rows = VISITED * (size_t)step->d * sizeof(float);
    size_t through = VISITED * (size_t)step->rows * sizeof(bf16), decoder_rows = VISITED * width * sizeof(bf16);
    size_t at = 0;
    Visit visit = {0};
#define TAKE(field, bytes) (memory ? (void)(visit.field = (void *)(memory + at)) : (void)0, at += ((bytes) + 63) / 64 * 64)
    TAKE(encoder, rows);
    TAKE(decoder, rows);
    TAKE(bias, VISITED * sizeof(float));
    TAKE(sums, VISITED * sizeof(float) * N_SUMS);
    TAKE(work, VISITED * width * sizeof(float));
    TAKE(through, through);
    TAKE(decoder_rows, decoder_rows);
#undef TAKE
    *size = at;
    return visit;
}

/* Gradients of latents c to c + VISITED - 1, and their sums over chunks. */
static void visit_latents(const Dense *step, long c, const Visit *visit) {
    long d = step->d, n = step->n, steps = tile_steps(d), panel = steps * TILE_ENTRIES;
    long apart = step->rows / DEPTH, n_steps = (step->batch + DEPTH - 1) / DEPTH, n_chunks = step->rows / DENSE_ROWS;
    long own = MIN(VISITED, n - c);
    memset(visit->bias, 0, VISITED * sizeof(float));
    memset(visit->decoder_rows, 0, (size_t)(VISITED / SIDE * panel) * sizeof(bf16));
    for (long j = 0; j < own; j++) tile_latent(step->decoder + (c + j) * d, j, d, visit->decoder_rows);
    for (long s = 0; s < n_steps; s++)
        for (long j = 0; j < own; j += DEPTH) {
            four_tiles(step->gradient_rows + s * 2 * panel, panel, visit->decoder_rows + j / SIDE * panel, panel, steps, visit->work, DEPTH, 0);
            flow_back(step, visit->work, c + j, s, visit->through + j / SIDE * apart * TILE_ENTRIES, visit->bias + j);
        }
    over_samples(visit->through, step->x_columns, apart, n_steps, own, d, visit->work, visit->encoder);
    const bf16 *z = step->z + c / SIDE * apart * TILE_ENTRIES;
    over_samples(z, step->gradient_columns, apart, n_steps, own, d, visit->work, visit->decoder);
    memset(visit->sums, 0, VISITED * N_SUMS * sizeof(float));
    for (long chunk = 0; chunk < n_chunks; chunk++)
        for (long i = 0; i < N_SUMS; i++)
            for (long j = c; j < MIN(c + VISITED, n); j++)
                visit->sums[i * VISITED + j - c] += step->sums[(chunk * N_SUMS + i) * n + j];
}
#endif

/* Numbers of bf16 that a step of so many rows needs as scratch: the decoder, z, the columns of x, columns and rows of the
   gradient. */
API long dense_scratch(long batch, long n, long d, long threads) {
    (void)threads;
    long rows = dense_rows(batch), width = tile_steps(d) * DEPTH, latents = tile_steps(n) * DEPTH;
    return latents * width + rows * latents + 3 * rows * width;
}

/* Up to the gradient. `encoder` are its tiles; `scratch` has dense_scratch numbers, `sums` N_SUMS n for each chunk of
   DENSE_ROWS rows, `squares` one; all of them, and x, are read again by the update, which is given `plan` (256 bytes). */
API void dense_step(const real *x, const bf16 *encoder, const real *bias, const real *decoder, const real *norms, real cost,
                    real scale, long batch, long n, long d, bf16 *scratch, real *sums, double *squares, real *gradient,
                    int32_t *firing, real *totals, void *plan, long threads) {
#if TILES
    long rows = dense_rows(batch), width = tile_steps(d) * DEPTH, latents = tile_steps(n) * DEPTH, n_chunks = rows / DENSE_ROWS;
    bf16 *decoder_pairs = scratch, *z = decoder_pairs + latents * width, *x_columns = z + rows * latents;
    bf16 *gradient_columns = x_columns + rows * width, *gradient_rows = gradient_columns + rows * width;
    Dense step = {x, bias, norms, decoder, cost, scale, batch, n, d, rows, encoder, decoder_pairs, z, x_columns,
                  gradient_columns, gradient_rows, gradient, sums, squares};
    _Static_assert(sizeof step <= 256, "a plan is larger than its room");
    memcpy(plan, &step, sizeof step);
    tile_pairs(decoder, n, d, decoder_pairs, threads);
#pragma omp parallel num_threads((int)threads)
    {
        use_tiles();
#pragma omp for schedule(dynamic, 1)
        for (long first = 0; first < batch; first += DENSE_ROWS) dense_chunk(&step, first);
        _tile_release();
    }
    double code_sum = 0, square = 0;
    for (long chunk = 0; chunk < n_chunks; chunk++) square += squares[chunk];
    for (long j = 0; j < n; j++) {
        float z_sum = 0, fires = 0;
        for (long chunk = 0; chunk < n_chunks; chunk++) {
            z_sum += sums[chunk * N_SUMS * n + j];
            fires += sums[(chunk * N_SUMS + 1) * n + j];
        }
        firing[j] = (int32_t)fires;
        code_sum += z_sum * (norms ? norms[j] : 1);
    }
    totals[0] = (real)square, totals[1] = (real)code_sum;
#else
    (void)x, (void)encoder, (void)bias, (void)decoder, (void)norms, (void)cost, (void)scale, (void)batch, (void)n, (void)d;
    (void)scratch, (void)sums, (void)squares, (void)gradient, (void)firing, (void)totals, (void)plan;
#endif
    (void)threads;
}

/* What `update` makes of a plan, as matrices: gradients, the sum of each latent's codes, and how often it fires. */
API void dense_gradients(const void *plan, real *g_encoder, real *g_decoder, real *g_bias, real *sums, real *fires, long threads) {
#if TILES
    const Dense *step = plan;
    long d = step->d, n = step->n;
#pragma omp parallel num_threads((int)threads)
    {
        size_t size;
        visit_of(step, NULL, &size);
        Visit visit = visit_of(step, own_memory(size), &size);
        use_tiles();
#pragma omp for schedule(dynamic, 1)
        for (long c = 0; c < n; c += VISITED) {
            size_t own = (size_t)MIN(VISITED, n - c), row = (size_t)d * sizeof(float);
            visit_latents(step, c, &visit);
            memcpy(g_encoder + c * d, visit.encoder, own * row);
            memcpy(g_decoder + c * d, visit.decoder, own * row);
            memcpy(g_bias + c, visit.bias, own * sizeof(float));
            memcpy(sums + c, visit.sums, own * sizeof(float));
            memcpy(fires + c, visit.sums + VISITED, own * sizeof(float));
        }
        _tile_release();
    }
#else
    (void)plan, (void)g_encoder, (void)g_decoder, (void)g_bias, (void)sums, (void)fires;
#endif
    (void)threads;
}
