/* Products that are selected from as they are made. Part of native.c.

   The pre-latents of a few rows and 32 latents are compared with a bound of each row while they lie in the first cache, and
   only what passes is kept: no matrix of pre-latents exists, and weights are read once for all rows of a chunk. The bound
   rises as larger values are found.

   What multiplies are the matrix units of native_amx.h, where the encoder is given in tiles, or `tile` of native.c, where
   weights are small. The k largest of a row of few latents are faster found in two passes over it (top_k). */

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

/* Rows that are multiplied at once: at most BLOCK_ROWS. */
static inline long rows_of_block(const Scores *scores) { return scores->tiles ? BLOCK_ROWS : 5 * TILE_ROWS; }

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
    __m512i counting = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (long c = 0; c < n_latents; c += BLOCK_COLUMNS) {
        __mmask16 there = first_of(n_latents - c), more_there = first_of(n_latents - c - SIDE);
        __m512 bias = _mm512_maskz_loadu_ps(there, scores->bias + c), more_bias = _mm512_maskz_loadu_ps(more_there, scores->bias + c + SIDE);
        __m512i who = _mm512_add_epi32(counting, _mm512_set1_epi32((int)c)), more_who = _mm512_add_epi32(who, _mm512_set1_epi32(SIDE));
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

/* Rows of a chunk, so that each thread has as many chunks: rows are independent, and their number changes no bit. */
static long rows_of_chunk(const Scores *scores, long n_rows, long threads) {
    long block = rows_of_block(scores), n_chunks = MAX(threads * ((n_rows + threads * CHUNK_ROWS - 1) / (threads * CHUNK_ROWS)), 1);
    return ((n_rows + n_chunks - 1) / n_chunks + block - 1) / block * block;
}

/* Of one row of x in a chunk. */
static inline size_t row_bytes(const Scores *scores) {
#if TILES
    if (scores->tiles) return (size_t)tile_steps(scores->d) * DEPTH * sizeof(bf16);
#endif
    return (size_t)scores->d * sizeof(float);
}

/* A thread's part of a batch: lists for the rows of a chunk, and the rows themselves. */
typedef struct {
    float *values;
    int32_t *latents;
    char *rows; /* in tiles, or as they are */
    long room;  /* of a list */
    Kept *kept;
    float *least, *norms, *work;
} Chunk;

static Chunk chunk_of(const Scores *scores, long rows) {
    /* A list may hold every latent, though hardly ever does: most of this memory is never touched. Lists a power of two
       apart would share the few places that a cache has for them. */
    long n_latents = scores->n_latents, d = scores->d, room = (n_latents + 2 * SIDE) / SIDE * SIDE + 3 * SIDE;
    size_t lists = (size_t)(rows * room) * sizeof(float), own_rows = (size_t)rows * row_bytes(scores);
    size_t rest = (size_t)rows * (sizeof(Kept) + 2 * sizeof(float)) + (size_t)n_latents * sizeof(float);
    char *memory = own_memory(2 * lists + own_rows + rest);
    Chunk chunk = {.values = (float *)memory, .latents = (int32_t *)(memory + lists), .rows = memory + 2 * lists, .room = room};
    chunk.kept = (Kept *)(memory + 2 * lists + own_rows);
    chunk.least = (float *)(chunk.kept + rows), chunk.norms = chunk.least + rows, chunk.work = chunk.norms + rows;
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

/* m rows of x into a chunk, from row `first` on, `stride` apart. */
static void fetch_rows(const Scores *scores, const Chunk *chunk, long first, long stride, long m) {
    long d = scores->d;
    const float *x = scores->x + first * stride * d;
#if TILES
    if (scores->tiles) {
        tile_rows(x, d, stride, m, (bf16 *)chunk->rows);
        return;
    }
#endif
    for (long r = 0; r < m; r++) memcpy((float *)chunk->rows + r * d, x + r * stride * d, (size_t)d * sizeof(float));
}

/* Row `from` of a chunk, to the place of row `to`. */
static void move_row(const Scores *scores, const Chunk *chunk, long from, long to) {
#if TILES
    if (scores->tiles) {
        long steps = tile_steps(scores->d);
        bf16 *rows = (bf16 *)chunk->rows;
        for (long s = 0; s < steps; s++)
            memmove(rows + (to / SIDE * steps + s) * TILE_ENTRIES + to % SIDE * DEPTH,
                    rows + (from / SIDE * steps + s) * TILE_ENTRIES + from % SIDE * DEPTH, DEPTH * sizeof(bf16));
        return;
    }
#endif
    size_t size = row_bytes(scores);
    memmove(chunk->rows + (size_t)to * size, chunk->rows + (size_t)from * size, size);
}

/* Empty lists of m rows. */
static void begin(const Chunk *chunk, long m, long full) {
    for (long b = 0; b < m; b++)
        chunk->kept[b] = (Kept){chunk->latents + b * chunk->room, chunk->values + b * chunk->room, 0, full};
}

/* Only the rows that `which` names are left, from the first on, and their lists are empty. */
static void leave_rows(const Scores *scores, const Chunk *chunk, const int32_t *which, long n, long full) {
    for (long i = 0; i < n; i++) {
        move_row(scores, chunk, which[i], i);
        chunk->kept[i] = chunk->kept[which[i]], chunk->kept[i].n = 0, chunk->kept[i].full = full, chunk->least[i] = 0;
    }
}

/* The search in row b begins at `guess` * |x_b|. Where that was too high, it begins again at 0: the guess changes how long
   it takes, and nothing else. `cuts`, where given, receives the k-th largest pre-latent as a share of |x_b|. */
static void top_k_at_once(const Scores *scores, long k, float guess, int32_t *latents, float *values, float *cuts, long threads) {
    long n_rows = scores->batch, d = scores->d, rows = rows_of_chunk(scores, n_rows, threads), full = 4 * k + 2 * SIDE;
#pragma omp parallel num_threads((int)threads)
    {
        Chunk chunk = chunk_of(scores, rows);
#pragma omp for schedule(dynamic, 1)
        for (long first = 0; first < n_rows; first += rows) {
            long m = MIN(rows, n_rows - first), left = m;
            int32_t which[CHUNK_ROWS + BLOCK_ROWS];
            begin(&chunk, m, full);
            for (long b = 0; b < m; b++) {
                const float *x = scores->x + (first + b) * d;
                chunk.norms[b] = sqrtf(dot(x, x, d)), chunk.least[b] = guess * chunk.norms[b], which[b] = (int32_t)b;
                if (!(chunk.least[b] < INFINITY)) chunk.least[b] = 0;
            }
            fetch_rows(scores, &chunk, first, 1, m);
            while (left > 0) {
                long again = 0, of = left;
                keep_from_product(scores, chunk.rows, of, k, chunk.least, chunk.kept);
                for (long i = 0; i < of; i++) {
                    Kept *kept = chunk.kept + i;
                    long b = first + which[i];
                    if (kept->n < k && chunk.least[i] > 0) { /* which happens in the first round alone: row i is still there */
                        which[again++] = (int32_t)i;
                        continue;
                    }
                    float cut;
                    long n = keep_largest(kept->latents, kept->values, kept->n, k, chunk.work, &cut);
                    fill_slots(kept->latents, kept->values, n, k, latents + b * k, values + b * k);
                    if (!cuts) continue;
                    if (n == k && cut == 0)
                        for (long e = 0; e < k; e++) cut = e ? MIN(cut, kept->values[e]) : kept->values[0];
                    cuts[b] = chunk.norms[b - first] > 0 ? cut / chunk.norms[b - first] : 0;
                }
                if (again > 0) leave_rows(scores, &chunk, which, again, full);
                left = again;
            }
        }
        leave(scores);
    }
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
            }
            fetch_rows(scores, &chunk, first, stride, m);
            keep_from_product(scores, chunk.rows, m, 0, chunk.least, chunk.kept);
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
