/* A ReLU's dense step on AMX units, up to the update. Part of native.c.

       z = max(0, x encoder^T + bias),  gradient = scale (z decoder - x),  through = (gradient decoder^T + cost norms) where z > 0
       g_encoder = through^T x,  g_decoder = z^T gradient,  g_bias = sum of through over samples

   and cost * sum z / norms along decoder rows that are free. Products are of bf16 numbers, summed in float32. Samples come
   in chunks: a chunk's z is multiplied by the decoder, 512 latents at a time, as soon as it is made. What is written
   of z and `through` are pairs of samples in bf16, as tiles that the products over samples read.

   Beside the tiles of native_amx.h there are tiles of columns (16 columns of a matrix, 32 samples of each) and of pairs
   of rows (16 pairs, in each side by side the numbers of 16 columns). */

enum { DENSE_ROWS = 128, SHARED_STEPS = 16, N_SUMS = 3 };

/* Samples of a batch that are worked on together. */
static long dense_rows(long batch) { return (batch + DENSE_ROWS - 1) / DENSE_ROWS * DENSE_ROWS; }

#if TILES
typedef struct {
    const float *x, *bias, *norms;
    float cost, scale;
    long batch, n, d, rows; /* of the batch, latents, width, rows rounded up */
    const bf16 *encoder, *decoder, *decoder_pairs;
    bf16 *z, *through, *x_columns, *gradient_columns;
    float *gradient, *sums; /* sums [chunks, N_SUMS, n]: of through, of z, of how often latents fire */
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
        float *z_sum = sums + step->n + c + h * SIDE, *n_fires = z_sum + step->n;
        _mm512_mask_storeu_ps(z_sum, there[h], _mm512_add_ps(_mm512_maskz_loadu_ps(there[h], z_sum), sum[h]));
        _mm512_mask_storeu_ps(n_fires, there[h], _mm512_add_ps(_mm512_maskz_loadu_ps(there[h], n_fires), fires[h]));
    }
}

/* The gradient in the pre-latents, where they fire. */
static inline __attribute__((always_inline)) void flow_back(const Dense *step, const float *out, long c, long at, float *sums) {
    long panel = step->rows / DEPTH * TILE_ENTRIES;
    for (long h = 0; h < 2; h++) {
        long j = c + h * SIDE;
        __mmask16 there = first_of(step->n - j);
        __m512 norm = step->norms ? _mm512_maskz_loadu_ps(there, step->norms + j) : _mm512_set1_ps(1);
        __m512 cost = _mm512_mul_ps(_mm512_set1_ps(step->cost), norm), sum = _mm512_maskz_loadu_ps(there, sums + j);
        const bf16 *z = step->z + j / SIDE * panel + at * TILE_ENTRIES;
        bf16 *pairs = step->through + j / SIDE * panel + at * TILE_ENTRIES;
        for (long b = 0; b < DEPTH; b += 2) {
            __m512i fired = _mm512_loadu_si512(z + b / 2 * DEPTH);
            __m512 first = _mm512_add_ps(_mm512_load_ps(out + b * DEPTH + h * SIDE), cost);
            __m512 second = _mm512_add_ps(_mm512_load_ps(out + (b + 1) * DEPTH + h * SIDE), cost);
            first = _mm512_maskz_mov_ps(_mm512_test_epi32_mask(fired, _mm512_set1_epi32(0xffff)), first);
            second = _mm512_maskz_mov_ps(_mm512_test_epi32_mask(fired, _mm512_set1_epi32((int)0xffff0000)), second);
            sum = _mm512_add_ps(sum, _mm512_add_ps(first, second));
            _mm512_storeu_si512(pairs + b / 2 * DEPTH, in_pairs(first, second));
        }
        _mm512_mask_storeu_ps(sums + j, there, sum);
    }
}

/* A chunk of samples, from x to the pairs of z and `through`. */
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
    tile_rows(step->gradient + first * d, d, 1, m, rows);
    tile_columns(step->gradient + first * d, d, m, step->gradient_columns + first / DEPTH * TILE_ENTRIES, step->rows / DEPTH);
    for (long c = 0; c < n_steps * DEPTH; c += DEPTH)
        for (long r = 0; r < all; r += DEPTH) {
            four_tiles(rows + r * steps * DEPTH, panel, step->decoder + c * steps * DEPTH, panel, steps, out, DEPTH, 0);
            flow_back(step, out, c, (first + r) / DEPTH, sums);
        }
}

/* to [32 latents, d] = pairs^T columns, summed over `n_steps` times 32 samples, or added to what is there. */
static void over_samples(const bf16 *pairs, const bf16 *columns, long apart, long n_steps, long n_latents, long d, float *out,
                         float *to, int add) {
    for (long begin = 0; begin < n_steps; begin += SHARED_STEPS)
        for (long i = 0; i < tile_steps(d); i++)
            four_tiles(columns + (2 * i * apart + begin) * TILE_ENTRIES, apart * TILE_ENTRIES, pairs + begin * TILE_ENTRIES,
                       apart * TILE_ENTRIES, MIN(SHARED_STEPS, n_steps - begin), out + i * DEPTH * DEPTH, DEPTH, begin > 0);
    __m512i down = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(DEPTH));
    for (long j = 0; j < n_latents; j++)
        for (long i = 0; i < d; i += SIDE) {
            __m512 sum = _mm512_i32gather_ps(down, out + i * DEPTH + j, 4);
            if (add) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(first_of(d - i), to + j * d + i));
            _mm512_mask_storeu_ps(to + j * d + i, first_of(d - i), sum);
        }
}
#endif

/* Numbers of bf16 that a step of so many rows needs as scratch: the decoder twice, z, through, the columns of both sides. */
API long dense_scratch(long batch, long n, long d, long threads) {
    (void)threads;
    long rows = dense_rows(batch), width = tile_steps(d) * DEPTH, latents = tile_steps(n) * DEPTH;
    return 2 * rows * latents + 2 * rows * width + 2 * latents * width;
}

/* Rows of a batch from x on. `encoder` are its tiles; `scratch` has dense_scratch numbers, `sums` N_SUMS n for each chunk of
   DENSE_ROWS rows, `squares` one. Gradients of weights, `firing` and `totals` are added to what is there where `add`. */
API void dense_step(const real *x, const bf16 *encoder, const real *bias, const real *decoder, const real *norms, real cost,
                    real scale, long batch, long n, long d, long add, bf16 *scratch, real *sums, double *squares,
                    real *gradient, real *g_encoder, real *g_decoder, real *g_bias, int32_t *firing, real *totals,
                    long threads) {
#if TILES
    long rows = dense_rows(batch), width = tile_steps(d) * DEPTH, latents = tile_steps(n) * DEPTH, n_chunks = rows / DENSE_ROWS;
    bf16 *rows_of_decoder = scratch, *decoder_pairs = rows_of_decoder + latents * width; /* made once for all blocks */
    bf16 *z = decoder_pairs + latents * width, *through = z + rows * latents;
    bf16 *x_columns = through + rows * latents, *gradient_columns = x_columns + rows * width;
    Dense step = {x, bias, norms, cost, scale, batch, n, d, rows, encoder, rows_of_decoder, decoder_pairs, z, through,
                  x_columns, gradient_columns, gradient, sums, squares};
    if (!add) {
        tile_encoder(decoder, n, d, rows_of_decoder, threads);
        tile_pairs(decoder, n, d, decoder_pairs, threads);
    }
    long n_steps = (batch + DEPTH - 1) / DEPTH, apart = rows / DEPTH;
    double code_sum = 0;
#pragma omp parallel num_threads((int)threads)
    {
        use_tiles();
#pragma omp for schedule(dynamic, 1)
        for (long first = 0; first < batch; first += DENSE_ROWS) dense_chunk(&step, first);
        float *out = own_memory((size_t)(width * DEPTH) * sizeof(float));
#pragma omp for schedule(dynamic, 1)
        for (long c = 0; c < latents; c += DEPTH) {
            long own = MIN(DEPTH, n - c);
            const bf16 *pairs = through + c / SIDE * apart * TILE_ENTRIES, *codes = z + c / SIDE * apart * TILE_ENTRIES;
            over_samples(pairs, x_columns, apart, n_steps, own, d, out, g_encoder + c * d, (int)add);
            over_samples(codes, gradient_columns, apart, n_steps, own, d, out, g_decoder + c * d, (int)add);
            for (long j = c; j < c + own; j++) {
                float sum[N_SUMS] = {0};
                for (long chunk = 0; chunk < n_chunks; chunk++)
                    for (long i = 0; i < N_SUMS; i++) sum[i] += sums[(chunk * N_SUMS + i) * n + j];
                float norm = norms ? norms[j] : 1, pull = norms ? cost * sum[1] / MAX(norm, 1e-12f) : 0;
                if (pull != 0)
                    for (long i = 0; i < d; i++) g_decoder[j * d + i] += pull * decoder[j * d + i];
                g_bias[j] = (add ? g_bias[j] : 0) + sum[0];
                firing[j] = (add ? firing[j] : 0) + (int32_t)sum[2];
                sums[n + j] = sum[1] * norm; /* read by nobody else from here on */
            }
        }
        _tile_release();
    }
    totals[0] = add ? totals[0] : 0, totals[1] = add ? totals[1] : 0;
    for (long chunk = 0; chunk < n_chunks; chunk++) totals[0] += (real)squares[chunk];
    for (long j = 0; j < n; j++) code_sum += sums[n + j];
    totals[1] += (real)code_sum;
#else
    (void)x, (void)encoder, (void)bias, (void)decoder, (void)norms, (void)cost, (void)scale, (void)batch, (void)n, (void)d;
    (void)add, (void)scratch, (void)sums, (void)squares, (void)gradient, (void)g_encoder, (void)g_decoder, (void)g_bias;
    (void)firing, (void)totals;
#endif
    (void)threads;
}
