/* Products in bf16 on the matrix units of a CPU (AMX), selected from as they are made. Part of native.c.

   A unit multiplies 16 rows of 32 numbers by 32 numbers of 16 latents at a time. What it gives is compared with a bound
   of each row while it lies in the cache, and only what passes is kept: no matrix of pre-latents exists, and the encoder is
   read once for all rows of a chunk. The bound rises as larger values are found. Sums are float32; x and the encoder are
   rounded to bf16.

   Tiles lie in memory one after the other, 1 KiB each: of x 16 rows of 32 numbers; of the encoder 16 pairs of numbers, in
   each pair side by side those of 16 latents. */

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__linux__) && !REAL_IS_DOUBLE
#define TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define TILES 0
#endif

/* Whether these units are there, and the system lets this process use them. */
API long multiplies_tiles(long threads) {
    (void)threads;
#if TILES
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return 0;
#endif
}

enum { SIDE = 16, DEPTH = 32, TILE_ENTRIES = SIDE * DEPTH, CHUNK_ROWS = 256 };

static long tile_steps(long d) { return (d + DEPTH - 1) / DEPTH; }

#if TILES
/* Of 16 entries those that exist where `left` are left. */
static inline __mmask16 first_of(long left) { return (__mmask16)(left >= SIDE ? 0xffff : left > 0 ? (1u << left) - 1 : 0); }

/* 32 numbers from `row` on, 0 where fewer are left, rounded. */
static inline __m512i rounded_32(const float *row, long left) {
    __m512 low = _mm512_maskz_loadu_ps(first_of(left), row), high = _mm512_maskz_loadu_ps(first_of(left - SIDE), row + SIDE);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

/* Sixteen pairs of one number from each, rounded. */
static inline __m512i in_pairs(__m512 first, __m512 second) {
    __m512i order = _mm512_set_epi32(0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008,
                                     0x170007, 0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}
#endif

/* Row j of the encoder, to its place in the tiles. */
static inline void tile_latent(const real *row, long j, long d, bf16 *tiles) {
#if TILES
    uint32_t *panel = (uint32_t *)(tiles + j / SIDE * tile_steps(d) * TILE_ENTRIES) + j % SIDE;
    for (long i = 0; i < d; i += DEPTH) {
        uint32_t pairs[SIDE];
        _mm512_storeu_si512(pairs, rounded_32(row + i, d - i));
        for (long p = 0; p < SIDE; p++) panel[(i / 2 + p) * SIDE] = pairs[p];
    }
#else
    (void)row, (void)j, (void)d, (void)tiles;
#endif
}

/* The whole encoder; tiles has room for an even number of panels of 16 latents, and is 0 where there are none. */
API void tile_encoder(const real *encoder, long n_latents, long d, bf16 *tiles, long threads) {
    long panel = tile_steps(d) * TILE_ENTRIES, n_panels = (n_latents + 2 * SIDE - 1) / (2 * SIDE) * 2;
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (long c = 0; c < n_panels; c++) {
        if ((c + 1) * SIDE > n_latents) memset(tiles + c * panel, 0, (size_t)panel * sizeof(bf16));
        for (long j = c * SIDE; j < MIN((c + 1) * SIDE, n_latents); j++) tile_latent(encoder + j * d, j, d, tiles);
    }
}

#if TILES
/* What one row has kept so far. All that passed `least` is there, until the list is as long as `full`. */
typedef struct {
    int32_t *latents;
    float *values;
    long n, full;
} Kept;

static void use_tiles(void) {
    struct {
        uint8_t palette, start, zero[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shapes = {.palette = 1};
    for (long t = 0; t < 8; t++) shapes.row_bytes[t] = 2 * DEPTH, shapes.rows[t] = SIDE;
    __asm__ volatile("" : : "r"(&shapes) : "memory"); /* the headers of some compilers say that 8 bytes of it are read */
    _tile_loadconfig(&shapes);
}

/* m rows of x, `stride` apart: 16 rows a tile, an even number of tiles, 0 where there are none. */
static void tile_rows(const float *x, long d, long stride, long m, bf16 *tiles) {
    long steps = tile_steps(d);
    for (long r = 0; r < (m + 2 * SIDE - 1) / (2 * SIDE) * 2 * SIDE; r++)
        for (long s = 0; s < steps; s++) {
            __m512i rounded = rounded_32(x + r * stride * d + s * DEPTH, r < m ? d - s * DEPTH : 0);
            _mm512_storeu_si512(tiles + (r / SIDE * steps + s) * TILE_ENTRIES + r % SIDE * DEPTH, rounded);
        }
}

/* out [32, 32] = left right, or added to it: two tiles of rows times two of columns, in each of n steps of 32 numbers that
   they share. The second of each lies `left_apart`, `right_apart` behind the first; rows of `out` lie ld apart. */
static inline __attribute__((always_inline)) void four_tiles(const bf16 *left, long left_apart, const bf16 *right,
                                                             long right_apart, long n, float *out, long ld, int add) {
    const bf16 *more_left = left + left_apart, *more_right = right + right_apart;
    enum { IN = 2 * DEPTH };
    float *below = out + SIDE * ld;
    size_t apart = (size_t)ld * sizeof(float);
    __asm__ volatile("" : : : "memory"); /* nor do they say that a tile is read from memory */
    if (add) {
        _tile_loadd(0, out, apart);
        _tile_loadd(1, out + SIDE, apart);
        _tile_loadd(2, below, apart);
        _tile_loadd(3, below + SIDE, apart);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long s = 0; s < n * TILE_ENTRIES; s += TILE_ENTRIES) {
        _tile_loadd(4, left + s, IN);
        _tile_loadd(6, right + s, IN);
        _tile_loadd(7, more_right + s, IN);
        _tile_loadd(5, more_left + s, IN);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, apart);
    _tile_stored(1, out + SIDE, apart);
    _tile_stored(2, below, apart);
    _tile_stored(3, below + SIDE, apart);
}

/* A bound that at least k of the values reach and not many more do; what does not is dropped. Returns the bound: nothing
   that comes later and is no larger can be among the k largest, of equal ones the first. */
static float tighten(Kept *kept, float least, long k) {
    float low = least, high = least, *restrict values = kept->values;
    if (k <= FEW) { /* the k-th largest maximum of sixteen groups: k values reach it */
        __m512 largest = _mm512_setzero_ps();
        for (long e = 0; e < kept->n; e += SIDE)
            largest = _mm512_max_ps(largest, _mm512_maskz_loadu_ps(first_of(kept->n - e), values + e));
        float maxima[SIDE];
        _mm512_storeu_ps(maxima, largest);
        low = MAX(low, kth_of_few(maxima, SIDE, k));
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

/* The pre-latents of m rows that are larger than their row's `least`, in the order of their latents; of these, where k > 0,
   at least the k largest. */
static void keep_from_tiles(const Scores *scores, const bf16 *rows, long m, long k, float *least, Kept *kept) {
    long n_latents = scores->n_latents, steps = tile_steps(scores->d), panel = steps * TILE_ENTRIES;
    float out[2 * SIDE * 2 * SIDE] __attribute__((aligned(64)));
    __m512i counting = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (long c = 0; c < n_latents; c += 2 * SIDE) {
        __mmask16 there = first_of(n_latents - c), more_there = first_of(n_latents - c - SIDE);
        __m512 bias = _mm512_maskz_loadu_ps(there, scores->bias + c), more_bias = _mm512_maskz_loadu_ps(more_there, scores->bias + c + SIDE);
        __m512i who = _mm512_add_epi32(counting, _mm512_set1_epi32((int)c)), more_who = _mm512_add_epi32(who, _mm512_set1_epi32(SIDE));
        for (long r = 0; r < m; r += 2 * SIDE) {
            four_tiles(rows + r * steps * DEPTH, panel, scores->tiles + c * steps * DEPTH, panel, steps, out, 2 * SIDE, 0);
            for (long b = r; b < MIN(r + 2 * SIDE, m); b++) {
                __m512 v = _mm512_add_ps(_mm512_load_ps(out + (b - r) * 2 * SIDE), bias);
                __m512 w = _mm512_add_ps(_mm512_load_ps(out + (b - r) * 2 * SIDE + SIDE), more_bias);
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
static long rows_of_chunk(long n_rows, long threads) {
    long n_chunks = MAX(threads * ((n_rows + threads * CHUNK_ROWS - 1) / (threads * CHUNK_ROWS)), 1);
    return ((n_rows + n_chunks - 1) / n_chunks + 2 * SIDE - 1) / (2 * SIDE) * 2 * SIDE;
}

/* A thread's part of a batch: lists for the rows of a chunk, and the rows themselves. */
typedef struct {
    float *values;
    int32_t *latents;
    bf16 *rows;
    long room; /* of a list */
    Kept *kept;
    float *least, *norms, *work;
} Chunk;

static Chunk chunk_of(long rows, long n_latents, long d) {
    /* A list may hold every latent, though hardly ever does: most of this memory is never touched. Lists a power of two
       apart would share the few places that a cache has for them. */
    long room = (n_latents + 2 * SIDE) / SIDE * SIDE + 3 * SIDE;
    size_t lists = (size_t)(rows * room) * sizeof(float), tiles = (size_t)(rows * tile_steps(d) * DEPTH) * sizeof(bf16);
    size_t rest = (size_t)rows * (sizeof(Kept) + 2 * sizeof(float)) + (size_t)n_latents * sizeof(float);
    char *memory = own_memory(2 * lists + tiles + rest);
    Chunk chunk = {.values = (float *)memory, .latents = (int32_t *)(memory + lists), .rows = (bf16 *)(memory + 2 * lists), .room = room};
    chunk.kept = (Kept *)(memory + 2 * lists + tiles);
    chunk.least = (float *)(chunk.kept + rows), chunk.norms = chunk.least + rows, chunk.work = chunk.norms + rows;
    return chunk;
}

/* Empty lists of m rows. */
static void begin(const Chunk *chunk, long m, long full) {
    for (long b = 0; b < m; b++)
        chunk->kept[b] = (Kept){chunk->latents + b * chunk->room, chunk->values + b * chunk->room, 0, full};
}

/* Only the rows that `which` names are left, from the first on: their tiles and their lists. */
static void leave_rows(const Chunk *chunk, const int32_t *which, long n, long steps, long full) {
    for (long i = 0; i < n; i++) {
        long b = which[i];
        for (long s = 0; s < steps; s++)
            memmove(chunk->rows + (i / SIDE * steps + s) * TILE_ENTRIES + i % SIDE * DEPTH,
                    chunk->rows + (b / SIDE * steps + s) * TILE_ENTRIES + b % SIDE * DEPTH, DEPTH * sizeof(bf16));
        chunk->kept[i] = chunk->kept[b], chunk->kept[i].n = 0, chunk->kept[i].full = full, chunk->least[i] = 0;
    }
}

/* The search in row b begins at `guess` * |x_b|. Where that was too high, it begins again at 0: the guess changes how long
   it takes, and nothing else. `cuts`, where given, receives the k-th largest pre-latent as a share of |x_b|. */
static void top_k_of_tiles(const Scores *scores, long k, float guess, int32_t *latents, float *values, float *cuts, long threads) {
    long n_rows = scores->batch, d = scores->d, rows = rows_of_chunk(n_rows, threads), full = 4 * k + 2 * SIDE;
#pragma omp parallel num_threads((int)threads)
    {
        Chunk chunk = chunk_of(rows, scores->n_latents, d);
        use_tiles();
#pragma omp for schedule(dynamic, 1)
        for (long first = 0; first < n_rows; first += rows) {
            long m = MIN(rows, n_rows - first), left = m;
            int32_t which[CHUNK_ROWS];
            begin(&chunk, m, full);
            for (long b = 0; b < m; b++) {
                const float *x = scores->x + (first + b) * d;
                chunk.norms[b] = sqrtf(dot(x, x, d)), chunk.least[b] = guess * chunk.norms[b], which[b] = (int32_t)b;
                if (!(chunk.least[b] < INFINITY)) chunk.least[b] = 0;
            }
            tile_rows(scores->x + first * d, d, 1, m, chunk.rows);
            while (left > 0) {
                long again = 0, of = left;
                keep_from_tiles(scores, chunk.rows, of, k, chunk.least, chunk.kept);
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
                if (again > 0) leave_rows(&chunk, which, again, tile_steps(d), full);
                left = again;
            }
        }
        _tile_release();
    }
}

static long at_least_of_tiles(const Scores *scores, long stride, float least, const float *row_least, long capacity,
                              int64_t *starts, int32_t *counts, int32_t *latents, float *values, long threads) {
    long total = 0, d = scores->d, n_rows = (scores->batch + stride - 1) / stride, rows = rows_of_chunk(n_rows, threads);
#pragma omp parallel num_threads((int)threads)
    {
        Chunk chunk = chunk_of(rows, scores->n_latents, d);
        use_tiles();
#pragma omp for schedule(dynamic, 1)
        for (long first = 0; first < n_rows; first += rows) {
            long m = MIN(rows, n_rows - first);
            begin(&chunk, m, 0);
            for (long b = 0; b < m; b++) {
                float limit = row_least ? row_least[(first + b) * stride] : least;
                chunk.least[b] = limit > 0 ? nextafterf(limit, 0) : 0;
            }
            tile_rows(scores->x + first * stride * d, d, stride, m, chunk.rows);
            keep_from_tiles(scores, chunk.rows, m, 0, chunk.least, chunk.kept);
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
        _tile_release();
    }
    return total;
}
#endif
