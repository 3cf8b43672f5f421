/* Products that are selected from as they are made. Part of native.c.

   The pre-latents of a few rows and 32 latents are compared with a bound of each row while they lie in the first cache, and
   only what passes is kept: no matrix of pre-latents exists, and weights are read once for all rows of a chunk. The bound
   rises as larger values are found.

   There are four ways to multiply: the matrix units of native_amx.h, where the encoder is given in tiles; `tile` of
   native.c, where its panels are given, as small weights have them; native_screen.h, where batch and encoder are given in
   whole numbers; else the encoder is read as it is, and rows of x lie in lanes. The k largest of a row of few latents are
   faster found in two passes over it (top_k). */

/* Whether float32 products with large weights are selected from as they are made. */
API long selects_at_once(long threads) {
    (void)threads;
    return SELECTS_AT_ONCE;
}

#if SELECTS_AT_ONCE
enum { CHUNK_ROWS = 256, BLOCK_ROWS = 2 * SIDE, BLOCK_COLUMNS = 2 * SIDE };

/* What one row has kept so far. All that passed `least` is there, until the list is as long as `full`. */
typedef struct {
    int32_t *latents;
    float *values;
    long n, full;
} Kept;

/* A bound that at least k of the values reach and not many more do; what does not is dropped. Returns the bound: nothing
   that comes later and is no larger can be among the k largest, of equal ones the first. */
static float tighten(Kept *kept, float least, long k) {
    float low = least, high = least, *restrict values = kept->values;
    if (k <= FEW) {
        low = MAX(low, kth_of_sixteen_maxima(values, kept->n, k));
    } else {
        for (long e = 0; e < kept->n; e++) high = values[e] > high ? values[e] : high;
        for (int halving = 0; halving < 24; halving++) {
            float middle = (low + high) / 2;
            if (!(middle > low && middle < high)) break;
            int32_t count = 0;
#pragma omp simd reduction(+ : count)
            for (long e = 0; e < kept->n; e++) count += values[e] >= middle;
            if (count >= k) low = middle;
            else high = middle;
            if (count >= k && count <= k + k / 2) break;
        }
    }
    long n = 0;
    for (long e = 0; e < kept->n; e += SIDE) {
        __mmask16 there = first_of(kept->n - e);
        __m512 v = _mm512_maskz_loadu_ps(there, values + e);
        __m512i who = _mm512_maskz_loadu_epi32(there, kept->latents + e);
        __mmask16 stays = _mm512_mask_cmp_ps_mask(there, v, _mm512_set1_ps(low), _CMP_GE_OQ);
        _mm512_mask_compressstoreu_ps(values + n, stays, v);
        _mm512_mask_compressstoreu_epi32(kept->latents + n, stays, who);
        n += _mm_popcnt_u32(stays);
    }
    kept->n = n, kept->full = MAX(kept->full, 2 * n);
    return low;
}

static inline void keep(Kept *kept, __mmask16 which, __m512 values, __m512i latents) {
    _mm512_storeu_ps(kept->values + kept->n, _mm512_maskz_compress_ps(which, values));
    _mm512_storeu_si512(kept->latents + kept->n, _mm512_maskz_compress_epi32(which, latents));
    kept->n += _mm_popcnt_u32(which);
}

static inline int is_screened(const Scores *scores) { return scores->whole != NULL; }

static inline int in_lanes(const Scores *scores) { return !scores->tiles && !scores->panels && !is_screened(scores); }

/* Rows that are multiplied at once: at most BLOCK_ROWS. */
static inline long rows_of_block(const Scores *scores) {
    if (is_screened(scores)) return SCREEN_ROWS;
    return scores->tiles || in_lanes(scores) ? BLOCK_ROWS : 5 * TILE_ROWS;
}

/* out [BLOCK_ROWS, BLOCK_COLUMNS]: m rows of a chunk, from row r on, times the latents from c on. */
static inline void multiply(const Scores *scores, const char *rows, long r, long m, long c, float *out) {
    long d = scores->d;
#if TILES
    if (scores->tiles) {
        long steps = tile_steps(d), panel = steps * TILE_ENTRIES;
        four_tiles((const bf16 *)rows + r * steps * DEPTH, panel, scores->tiles + c * steps * DEPTH, panel, steps, out,
                   BLOCK_COLUMNS, 0);
        return;
    }
#endif
    for (long i = 0; i < m; i += TILE_ROWS)
        tile((const float *)rows + (r + i) * d, d, 1, MIN(TILE_ROWS, m - i), scores->panels + c * d, TILE_COLUMNS, d,
             out + i * BLOCK_COLUMNS, BLOCK_COLUMNS, 0);
}

/* The pre-latents of m rows that are larger than their row's `least`, in the order of their latents; of these, where k > 0,
   at least the k largest. */
static void keep_from_product(const Scores *scores, const char *rows, long m, long k, float *least, Kept *kept) {
    long n_latents = scores->n_latents, block = rows_of_block(scores);
    float out[BLOCK_ROWS * BLOCK_COLUMNS] __attribute__((aligned(64)));
    for (long c = 0; c < n_latents; c += BLOCK_COLUMNS) {
        __mmask16 there = first_of(n_latents - c), more_there = first_of(n_latents - c - SIDE);
        __m512 bias = _mm512_maskz_loadu_ps(there, scores->bias + c), more_bias = _mm512_maskz_loadu_ps(more_there, scores->bias + c + SIDE);
        __m512i who = _mm512_add_epi32(counting(), _mm512_set1_epi32((int)c)), more_who = _mm512_add_epi32(who, _mm512_set1_epi32(SIDE));
        for (long r = 0; r < m; r += block) {
            long n = MIN(block, m - r);
            multiply(scores, rows, r, n, c, out);
            for (long b = r; b < r + n; b++) {
                const float *from = out + (b - r) * BLOCK_COLUMNS;
                __m512 v = _mm512_add_ps(_mm512_load_ps(from), bias), w = _mm512_add_ps(_mm512_load_ps(from + SIDE), more_bias);
                __m512 limit = _mm512_set1_ps(least[b]);
                __mmask16 first = _mm512_mask_cmp_ps_mask(there, v, limit, _CMP_GT_OQ);
                __mmask16 second = _mm512_mask_cmp_ps_mask(more_there, w, limit, _CMP_GT_OQ);
                if (!(first | second)) continue;
                keep(kept + b, first, v, who);
                keep(kept + b, second, w, more_who);
                if (k > 0 && kept[b].n >= kept[b].full) least[b] = tighten(kept + b, least[b], k);
            }
        }
    }
}

enum { LATENTS = 12 };

/* Twelve rows of weights times 32 rows of x in lanes. */
static inline __attribute__((always_inline)) void twelve_latents(const float *weights, const float *x, long d, __m512 sums[LATENTS][2]) {
    const float *w0 = weights, *w3 = w0 + 3 * d, *w6 = w3 + 3 * d, *w9 = w6 + 3 * d; /* few addresses, so that all are in registers */
    for (long i = 0; i < LATENTS; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (long p = 0; p < d; p++, w0++, w3++, w6++, w9++, x += BLOCK_ROWS) {
        __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + SIDE), w;
#define TIMES(i, from)                                    \
    w = _mm512_set1_ps(*(from));                          \
    sums[i][0] = _mm512_fmadd_ps(w, low, sums[i][0]);     \
    sums[i][1] = _mm512_fmadd_ps(w, high, sums[i][1])
        TIMES(0, w0);
        TIMES(1, w0 + d);
        TIMES(2, w0 + 2 * d);
        TIMES(3, w3);
        TIMES(4, w3 + d);
        TIMES(5, w3 + 2 * d);
        TIMES(6, w6);
        TIMES(7, w6 + d);
        TIMES(8, w6 + 2 * d);
        TIMES(9, w9);
        TIMES(10, w9 + d);
        TIMES(11, w9 + 2 * d);
#undef TIMES
    }
}

/* What of latent j passes in the rows `which` of the 16 whose lists are given. */
static void keep_lanes(__mmask16 which, __m512 values, long j, long k, float *least, Kept *kept) {
    float found[SIDE];
    _mm512_storeu_ps(found, values);
    for (unsigned left = which; left; left &= left - 1) {
        Kept *row = kept + __builtin_ctz(left);
        row->values[row->n] = found[__builtin_ctz(left)], row->latents[row->n++] = (int32_t)j;
        if (k > 0 && row->n >= row->full) least[row - kept] = tighten(row, least[row - kept], k);
    }
}

/* keep_from_product, of rows in lanes; `last` has room for twelve rows of weights. */
static void keep_from_lanes(const Scores *scores, const float *rows, long m, long k, float *least, Kept *kept, float *last) {
    long d = scores->d, n_latents = scores->n_latents, n_rows = (m + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS;
    for (long b = m; b < n_rows; b++) least[b] = INFINITY;
    for (long c = 0; c < n_latents; c += LATENTS) {
        long n = MIN(LATENTS, n_latents - c);
        const float *weights = scores->encoder + c * d;
        if (n < LATENTS) {
            memset(last, 0, (size_t)(LATENTS * d) * sizeof(float));
            weights = memcpy(last, weights, (size_t)(n * d) * sizeof(float));
        }
        for (long r = 0; r < n_rows; r += BLOCK_ROWS) {
            /* the next twelve come from afar: a part of them with each block of rows */
            const char *next = (const char *)(scores->encoder + (c + LATENTS) * d);
            size_t size = (size_t)(LATENTS * d) * sizeof(float);
            if (c + 2 * LATENTS <= n_latents)
                for (size_t at = size * (size_t)r / (size_t)n_rows; at < size * (size_t)(r + BLOCK_ROWS) / (size_t)n_rows; at += 64)
                    _mm_prefetch(next + at, _MM_HINT_T1);
            __m512 sums[LATENTS][2];
            twelve_latents(weights, rows + r * d, d, sums);
            for (long i = 0; i < n; i++) {
                __m512 bias = _mm512_set1_ps(scores->bias[c + i]);
                __m512 low = _mm512_add_ps(sums[i][0], bias), high = _mm512_add_ps(sums[i][1], bias);
                __mmask16 first = _mm512_cmp_ps_mask(low, _mm512_loadu_ps(least + r), _CMP_GT_OQ);
                __mmask16 second = _mm512_cmp_ps_mask(high, _mm512_loadu_ps(least + r + SIDE), _CMP_GT_OQ);
                if (!(first | second)) continue;
                keep_lanes(first, low, c + i, k, least + r, kept + r);
                keep_lanes(second, high, c + i, k, least + r + SIDE, kept + r + SIDE);
            }
        }
    }
}

#if SCREENS == 8
/* Pairs of a row of a chunk and a latent that may pass, of 64 latents. */
typedef struct {
    int32_t *rows, *latents;
    long n;
} Pending;

/* The latents of sixteen from `first` on that may pass in a row of the chunk. */
static inline void await(__mmask16 which, long row, long first, Pending *pending) {
    __m512i latents = _mm512_add_epi32(counting(), _mm512_set1_epi32((int)first));
    _mm512_storeu_si512(pending->latents + pending->n, _mm512_maskz_compress_epi32(which, latents));
    _mm512_storeu_si512(pending->rows + pending->n, _mm512_set1_epi32((int)row));
    pending->n += _mm_popcnt_u32(which);
}

/* What is pending, in float32: what passes in truth is kept. `numbers` says which rows of x a chunk has. */
static void decide(const Scores *scores, const int32_t *numbers, Pending *pending, long k, float *least, Kept *kept) {
    long d = scores->d;
    for (long e = 0; e < pending->n; e += 4) {
        const float *x[4], *w[4];
        float products[4];
        for (long i = 0; i < 4; i++) {
            long at = MIN(e + i, pending->n - 1);
            x[i] = scores->x + numbers[pending->rows[at]] * d, w[i] = scores->encoder + pending->latents[at] * d;
        }
        four_pairs(x, w, d, products);
        for (long i = 0; i < MIN(4, pending->n - e); i++) {
            int32_t r = pending->rows[e + i], j = pending->latents[e + i];
            float value = products[i] + scores->bias[j];
            if (!(value > least[r])) continue;
            Kept *row = kept + r;
            row->values[row->n] = value, row->latents[row->n++] = j;
            if (k > 0 && row->n >= row->full) least[r] = tighten(row, least[r], k);
        }
    }
    pending->n = 0;
}

/* keep_from_product, where whole numbers screen: what they let pass of 64 latents is decided while their weights are near. */
static void keep_from_screen(const Scores *scores, const int32_t *numbers, long m, long k, float *least, Kept *kept, Pending *pending) {
    long n_latents = scores->n_latents;
    Screen screen = screen_in(scores->whole, scores->scales, scores->batch, n_latents, scores->d);
    pending->n = 0;
    for (long c = 0; c < n_latents; c += SCREEN_LATENTS) {
        for (long r = 0; r < m; r += SCREEN_ROWS) {
            __mmask64 passes[SCREEN_ROWS];
            long n = MIN(SCREEN_ROWS, m - r);
            screen_tile_of(scores, &screen, numbers + r, n, c, least + r, passes);
            for (long i = 0; i < n; i++)
                for (long q = 0; q < SCREEN_LATENTS && passes[i] >> q; q += SIDE) await((__mmask16)(passes[i] >> q), r + i, c + q, pending);
        }
        decide(scores, numbers, pending, k, least, kept);
    }
}
#endif

/* m rows of x, `stride` apart, into lanes: 32 of them side by side, 0 where there are none. */
static void rows_to_lanes(const float *x, long d, long stride, long m, float *lanes_of) {
    if (stride * d > INT32_MAX / SIDE) { /* too far apart for the numbers that gather */
        memset(lanes_of, 0, (size_t)((m + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS * d) * sizeof(float));
        for (long r = 0; r < m; r++)
            for (long p = 0; p < d; p++)
                lanes_of[(r / BLOCK_ROWS * d + p) * BLOCK_ROWS + r % BLOCK_ROWS] = x[r * stride * d + p];
        return;
    }
    __m512i apart = _mm512_mullo_epi32(counting(), _mm512_set1_epi32((int)(stride * d)));
    for (long r = 0; r < m; r += SIDE) {
        float *to = lanes_of + r / BLOCK_ROWS * BLOCK_ROWS * d + r % BLOCK_ROWS;
        for (long p = 0; p < d; p++)
            _mm512_storeu_ps(to + p * BLOCK_ROWS, _mm512_mask_i32gather_ps(_mm512_setzero_ps(), first_of(m - r), apart, x + r * stride * d + p, 4));
    }
    if (m % BLOCK_ROWS > 0 && m % BLOCK_ROWS <= SIDE)
        for (long p = 0; p < d; p++) _mm512_storeu_ps(lanes_of + m / BLOCK_ROWS * BLOCK_ROWS * d + p * BLOCK_ROWS + SIDE, _mm512_setzero_ps());
}

/* Rows of a chunk, so that each thread has as many chunks: rows are independent, and their number changes no bit. */
static long rows_of_chunk(const Scores *scores, long n_rows, long threads) {
    long block = rows_of_block(scores), most = is_screened(scores) ? 2 * CHUNK_ROWS : CHUNK_ROWS;
    if (in_lanes(scores)) most = MAX(MIN((1L << 18) / scores->d, CHUNK_ROWS), block);
    long n_chunks = MAX(threads * ((n_rows + threads * most - 1) / (threads * most)), 1);
    return ((n_rows + n_chunks - 1) / n_chunks + block - 1) / block * block;
}

/* Of one row of x in a chunk. */
static inline size_t row_bytes(const Scores *scores) {
    if (is_screened(scores)) return 0;
#if TILES
    if (scores->tiles) return (size_t)tile_steps(scores->d) * DEPTH * sizeof(bf16);
#endif
    return (size_t)scores->d * sizeof(float);
}

/* A thread's part of a batch: lists for the rows of a chunk, and the rows themselves. */
typedef struct {
    float *values;
    int32_t *latents;
    char *rows; /* in tiles, in lanes, or as they are */
    long room;  /* of a list */
    Kept *kept;
    float *least, *norms, *work, *last; /* the last has room for the weights of twelve latents */
    int32_t *numbers;                   /* of the rows in x, where whole numbers screen */
#if SCREENS == 8
    Pending pending;
#endif
} Chunk;

static Chunk chunk_of(const Scores *scores, long rows) {
    /* A list may hold every latent, though hardly ever does: most of this memory is never touched. Lists a power of two
       apart would share the few places that a cache has for them. */
    long n_latents = scores->n_latents, d = scores->d, room = (n_latents + 2 * SIDE) / SIDE * SIDE + 3 * SIDE;
    size_t lists = (size_t)(rows * room) * sizeof(float), own_rows = (size_t)rows * row_bytes(scores);
    size_t rest = (size_t)rows * (sizeof(Kept) + 2 * sizeof(float)) + (size_t)(n_latents + LATENTS * d) * sizeof(float);
    size_t screened = is_screened(scores) ? (size_t)(rows + 2 * (rows * SCREEN_LATENTS + SIDE)) * sizeof(int32_t) : 0;
    char *memory = own_memory(2 * lists + own_rows + rest + screened);
    Chunk chunk = {.values = (float *)memory, .latents = (int32_t *)(memory + lists), .rows = memory + 2 * lists, .room = room};
    chunk.kept = (Kept *)(memory + 2 * lists + own_rows);
    chunk.least = (float *)(chunk.kept + rows), chunk.norms = chunk.least + rows, chunk.work = chunk.norms + rows;
    chunk.last = chunk.work + n_latents, chunk.numbers = (int32_t *)(chunk.last + LATENTS * d);
#if SCREENS == 8
    int32_t *pairs = chunk.numbers + rows;
    long most = rows * SCREEN_LATENTS + SIDE;
    chunk.pending = (Pending){pairs, pairs + most, 0};
#endif
#if TILES
    if (scores->tiles) use_tiles();
#endif
    return chunk;
}

static void leave(const Scores *scores) {
    (void)scores;
#if TILES
    if (scores->tiles) _tile_release();
#endif
}

/* m rows into a chunk, `stride` apart. */
static void fetch_rows(const Scores *scores, const Chunk *chunk, const float *x, long stride, long m) {
    long d = scores->d;
#if TILES
    if (scores->tiles) {
        tile_rows(x, d, stride, m, (bf16 *)chunk->rows);
        return;
    }
#endif
    if (is_screened(scores)) return; /* they are where `screen_batch` has put them */
    if (in_lanes(scores)) {
        rows_to_lanes(x, d, stride, m, (float *)chunk->rows);
        return;
    }
    for (long r = 0; r < m; r++) memcpy((float *)chunk->rows + r * d, x + r * stride * d, (size_t)d * sizeof(float));
}

/* Empty lists of m rows. */
static void begin(const Chunk *chunk, long m, long full) {
    for (long b = 0; b < m; b++)
        chunk->kept[b] = (Kept){chunk->latents + b * chunk->room, chunk->values + b * chunk->room, 0, full};
}

static void keep_from_chunk(const Scores *scores, Chunk *chunk, long m, long k) {
#if SCREENS == 8
    if (is_screened(scores)) {
        keep_from_screen(scores, chunk->numbers, m, k, chunk->least, chunk->kept, &chunk->pending);
        return;
    }
#endif
    if (in_lanes(scores)) keep_from_lanes(scores, (const float *)chunk->rows, m, k, chunk->least, chunk->kept, chunk->last);
    else keep_from_product(scores, chunk->rows, m, k, chunk->least, chunk->kept);
}

/* Where the codes of rows go, and each row's k-th largest pre-latent as a share of |x_b|, where it is asked for. */
typedef struct {
    long k;
    int32_t *latents;
    float *values, *cuts;
} TopK;

/* The k largest of m rows, the search in each beginning at `guess` * |x|. `which` has the numbers of the rows, where they do
   not follow each other from `first` on. Rows in which the guess was too high are left out, and their number is appended
   to `again`. */
static void top_k_of_chunk(const Scores *scores, Chunk *chunk, const float *x, long first, const int32_t *which, long m,
                           float guess, const TopK *to, int32_t *again, long *n_again) {
    long d = scores->d, k = to->k;
    begin(chunk, m, 4 * k + 2 * SIDE);
    for (long i = 0; i < m; i++) {
        chunk->norms[i] = sqrtf(dot(x + i * d, x + i * d, d)), chunk->least[i] = guess * chunk->norms[i];
        if (!(chunk->least[i] < INFINITY)) chunk->least[i] = 0;
        if (is_screened(scores)) chunk->numbers[i] = (int32_t)(which ? which[i] : first + i);
    }
    fetch_rows(scores, chunk, x, 1, m);
    keep_from_chunk(scores, chunk, m, k);
    for (long i = 0; i < m; i++) {
        Kept *kept = chunk->kept + i;
        long b = which ? which[i] : first + i;
        if (kept->n < k && chunk->least[i] > 0) {
            long at;
#pragma omp atomic capture
            at = (*n_again)++;
            again[at] = (int32_t)b;
            continue;
        }
        float cut;
        long n = keep_largest(kept->latents, kept->values, kept->n, k, chunk->work, &cut);
        fill_slots(kept->latents, kept->values, n, k, to->latents + b * k, to->values + b * k);
        if (!to->cuts) continue;
        if (n == k && cut == 0)
            for (long e = 0; e < k; e++) cut = e ? MIN(cut, kept->values[e]) : kept->values[0];
        to->cuts[b] = chunk->norms[i] > 0 ? cut / chunk->norms[i] : 0;
    }
}

/* The guess changes how long it takes, and nothing else: rows in which it was too high are searched again from 0 on, all of
   them together, as a block of rows takes as long with few as with many. */
static void top_k_at_once(const Scores *scores, long k, float guess, int32_t *latents, float *values, float *cuts, long threads) {
    long n_rows = scores->batch, d = scores->d, rows = rows_of_chunk(scores, n_rows, threads), n_again = 0;
    TopK to = {k, latents, values, cuts};
    int32_t *again = some_memory((size_t)n_rows * sizeof(int32_t));
    float *x_again = NULL;
#pragma omp parallel num_threads((int)threads)
    {
        Chunk chunk = chunk_of(scores, rows);
#pragma omp for schedule(dynamic, 1)
        for (long first = 0; first < n_rows; first += rows)
            top_k_of_chunk(scores, &chunk, scores->x + first * d, first, NULL, MIN(rows, n_rows - first), guess, &to, again, &n_again);
#pragma omp single
        if (n_again > 0) x_again = some_memory((size_t)(n_again * d) * sizeof(float));
#pragma omp for schedule(static)
        for (long i = 0; i < n_again; i++) memcpy(x_again + i * d, scores->x + again[i] * d, (size_t)d * sizeof(float));
        long few = MAX(MIN(rows_of_chunk(scores, n_again, threads), rows), 1), of = n_again;
#pragma omp for schedule(dynamic, 1)
        for (long i = 0; i < of; i += few)
            top_k_of_chunk(scores, &chunk, x_again + i * d, 0, again + i, MIN(few, of - i), 0, &to, NULL, NULL);
        leave(scores);
    }
    free(again), free(x_again);
}

static long at_least_at_once(const Scores *scores, long stride, float least, const float *row_least, long capacity,
                              int64_t *starts, int32_t *counts, int32_t *latents, float *values, long threads) {
    long total = 0, n_rows = (scores->batch + stride - 1) / stride, rows = rows_of_chunk(scores, n_rows, threads);
#pragma omp parallel num_threads((int)threads)
    {
        Chunk chunk = chunk_of(scores, rows);
#pragma omp for schedule(dynamic, 1)
        for (long first = 0; first < n_rows; first += rows) {
            long m = MIN(rows, n_rows - first);
            begin(&chunk, m, 0);
            for (long b = 0; b < m; b++) {
                float limit = row_least ? row_least[(first + b) * stride] : least;
                chunk.least[b] = limit > 0 ? nextafterf(limit, 0) : 0;
                if (is_screened(scores)) chunk.numbers[b] = (int32_t)((first + b) * stride);
            }
            fetch_rows(scores, &chunk, scores->x + first * stride * scores->d, stride, m);
            keep_from_chunk(scores, &chunk, m, 0);
            for (long b = 0; b < m; b++) {
                long n = chunk.kept[b].n, start;
#pragma omp atomic capture
                {
                    start = total;
                    total += n;
                }
                starts[first + b] = start, counts[first + b] = (int32_t)n;
                if (start + n > capacity) continue;
                memcpy(latents + start, chunk.kept[b].latents, (size_t)n * sizeof(int32_t));
                memcpy(values + start, chunk.kept[b].values, (size_t)n * sizeof(float));
            }
        }
        leave(scores);
    }
    return total;
}
#endif
