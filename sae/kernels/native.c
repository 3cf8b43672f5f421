/* The stages of a training step on a CPU. Compiled on demand by build.py, once for each type of `real`.

   Sums run in an order that no number of threads changes, so that a result depends on its inputs alone. The work is
   bound by memory: a row of pre-latents, of the decoder, of the weights and their moments is read once, and everything
   that needs it happens while it lies in the cache. `reference.py` says what each function computes. */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#endif

#ifndef REAL
#define REAL float
#endif
typedef REAL real;
typedef uint16_t bf16;

#define API __attribute__((visibility("default")))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* Whether products are selected from as they are made (native_at_once.h). */
#if defined(__AVX512F__) && !REAL_IS_DOUBLE
#define SELECTS_AT_ONCE 1
#else
#define SELECTS_AT_ONCE 0
#endif

/* Of how many bits the whole numbers are that screen products of floats; 0 where they do not. */
#if SELECTS_AT_ONCE && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define SCREENS 8
#elif defined(__AVX2__) && !defined(__AVX512F__) && !REAL_IS_DOUBLE
#define SCREENS 16
#else
#define SCREENS 0
#endif

/* ---------------------------------------------------------------------------------------------- numbers and memory */

static inline float from_bf16(bf16 bits) {
    union { uint32_t u; float f; } word = {(uint32_t)bits << 16};
    return word.f;
}

/* To the nearest, ties to even; a NaN stays one. */
static inline bf16 to_bf16(float value) {
    union { float f; uint32_t u; } word = {value};
    uint32_t rounded = (word.u + 0x7fffu + ((word.u >> 16) & 1u)) >> 16;
    return value == value ? (bf16)rounded : (bf16)0x7fc0;
}

static void *some_memory(size_t size) {
    void *start = aligned_alloc(64, (MAX(size, 1) + 63) / 64 * 64);
    if (!start) {
        fprintf(stderr, "sae: no memory for %zu bytes\n", size);
        abort();
    }
    return start;
}

/* A thread's own memory, kept from call to call: fresh pages would cost more than what is done with them. */
static _Thread_local struct { size_t size; void *start; } own;

static void *own_memory(size_t size) {
    if (own.size < size) {
        free(own.start);
        own.start = some_memory(size);
        own.size = size;
    }
    return own.start;
}

/* Moments of latents that fall silent decay into subnormal numbers, which are a hundred times slower. */
static inline unsigned flush_subnormals(void) {
#if defined(__SSE2__)
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040u);
    return before;
#else
    return 0;
#endif
}

static inline void restore_subnormals(unsigned before) {
#if defined(__SSE2__)
    _mm_setcsr(before);
#endif
}

static inline real dot(const real *restrict a, const real *restrict b, long n) {
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* Four products that share their left side: four chains of additions hide each other's latency. */
static inline void four_dots(const real *restrict a, const real *const rows[4], long n, real out[4]) {
    const real *restrict r0 = rows[0], *restrict r1 = rows[1], *restrict r2 = rows[2], *restrict r3 = rows[3];
    real s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (long i = 0; i < n; i++) {
        s0 += a[i] * r0[i];
        s1 += a[i] * r1[i];
        s2 += a[i] * r2[i];
        s3 += a[i] * r3[i];
    }
    out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3;
}

static inline void add_four(real *restrict out, const real *const rows[4], const real weights[4], long d) {
    const real *restrict r0 = rows[0], *restrict r1 = rows[1], *restrict r2 = rows[2], *restrict r3 = rows[3];
    real w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3];
#pragma omp simd
    for (long i = 0; i < d; i++) out[i] += (w0 * r0[i] + w1 * r1[i]) + (w2 * r2[i] + w3 * r3[i]);
}

/* Four rows from entry e on; past the n-th the first of them again. */
static inline void four_rows(const real *matrix, const int32_t *rows, long e, long n, long d, const real *out[4]) {
    for (long i = 0; i < 4; i++) out[i] = matrix + rows[e + i < n ? e + i : e] * d;
}

/* out += weights . rows */
static inline void add_rows(real *restrict out, const real *matrix, const int32_t *rows, const real *weights, long n,
                            long d) {
    for (long e = 0; e < n; e += 4) {
        const real *four[4];
        real w[4];
        four_rows(matrix, rows, e, n, d, four);
        for (long i = 0; i < 4; i++) w[i] = e + i < n ? weights[e + i] : 0;
        add_four(out, four, w, d);
    }
}

/* --------------------------------------------------------------------------------------------------- small products */

/* out = A B of matrices that lie in the cache, where a BLAS loses what it spends on getting ready: about 90 % of what
   the core can add and multiply at [2048, 64] [64, 256], a BLAS 70 %. And what happens to the result next can happen
   while it is still in the cache. */
#if defined(__AVX512F__)
enum { WIDE_BYTES = 64 };
#elif defined(__AVX__)
enum { WIDE_BYTES = 32 };
#else
enum { WIDE_BYTES = 16 };
#endif
typedef real wide __attribute__((vector_size(WIDE_BYTES), aligned(sizeof(real)), may_alias));
/* A tile of the result, summed in twelve registers: enough to hide the latency of an addition. */
enum { WIDE = WIDE_BYTES / sizeof(real), TILE_ROWS = 6, TILE_COLUMNS = 2 * WIDE };

static long padded(long n) { return (n + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS; }

/* One panel of B [k, n]: TILE_COLUMNS columns from `first` on, row after row, 0 where there are none. */
static void pack_panel(const real *B, long n, long k, long row_stride, long column_stride, long first, real *panel) {
    long width = MIN(TILE_COLUMNS, n - first);
    memset(panel, 0, (size_t)(width < TILE_COLUMNS ? k * TILE_COLUMNS : 0) * sizeof(real));
    const real *from = B + first * column_stride;
    if (column_stride == 1 && width == TILE_COLUMNS) /* a copy of known size is no call */
        for (long p = 0; p < k; p++) memcpy(panel + p * TILE_COLUMNS, from + p * row_stride, TILE_COLUMNS * sizeof(real));
    else if (column_stride == 1)
        for (long p = 0; p < k; p++) memcpy(panel + p * TILE_COLUMNS, from + p * row_stride, (size_t)width * sizeof(real));
    else
        for (long i = 0; i < width; i++)
            for (long p = 0; p < k; p++) panel[p * TILE_COLUMNS + i] = from[i * column_stride + p * row_stride];
}

static void pack(const real *B, long n, long k, long row_stride, long column_stride, real *panels) {
    for (long first = 0; first < n; first += TILE_COLUMNS)
        pack_panel(B, n, k, row_stride, column_stride, first, panels + first * k);
}

static inline __attribute__((always_inline)) void tile(const real *A, long row_stride, long column_stride, long n_rows,
                                                       const real *panel, long n_columns, long k, real *out, long ld,
                                                       int add) {
    const real *from[TILE_ROWS];
    for (long r = 0; r < TILE_ROWS; r++) from[r] = A + (r < n_rows ? r : 0) * row_stride;
    wide sums[TILE_ROWS][2];
#pragma GCC unroll 6
    for (long r = 0; r < TILE_ROWS; r++) sums[r][0] = sums[r][1] = (wide){0};
    for (long p = 0; p < k; p++) {
        const wide *b = (const wide *)(panel + p * TILE_COLUMNS);
        wide left = b[0], right = b[1];
#pragma GCC unroll 6
        for (long r = 0; r < TILE_ROWS; r++) {
            real a = from[r][p * column_stride];
            sums[r][0] += a * left;
            sums[r][1] += a * right;
        }
    }
    if (n_rows == TILE_ROWS && n_columns == TILE_COLUMNS) {
#pragma GCC unroll 6
        for (long r = 0; r < TILE_ROWS; r++) {
            wide *to = (wide *)(out + r * ld);
            if (add) sums[r][0] += to[0], sums[r][1] += to[1];
            to[0] = sums[r][0], to[1] = sums[r][1];
        }
        return;
    }
    real whole[TILE_ROWS][TILE_COLUMNS]; /* by way of memory: registers cannot be counted through */
#pragma GCC unroll 6
    for (long r = 0; r < TILE_ROWS; r++) ((wide *)whole[r])[0] = sums[r][0], ((wide *)whole[r])[1] = sums[r][1];
    for (long r = 0; r < n_rows; r++) {
        real *restrict to = out + r * ld;
#pragma omp simd
        for (long i = 0; i < n_columns; i++) to[i] = add ? to[i] + whole[r][i] : whole[r][i];
    }
}

/* out [m, n] = A B, or added to it. A's entries lie row_stride and column_stride apart (one of them is 1), B is packed. */
static void product(const real *A, long row_stride, long column_stride, const real *panels, long m, long n, long k,
                    real *out, long ld, int add) {
    for (long c = 0; c < n; c += TILE_COLUMNS)
        for (long r = 0; r < m; r += TILE_ROWS) {
            long rows = MIN(TILE_ROWS, m - r), columns = MIN(TILE_COLUMNS, n - c);
            const real *from = A + r * row_stride, *panel = panels + c * k;
            real *to = out + r * ld + c;
            if (column_stride == 1) tile(from, row_stride, 1, rows, panel, columns, k, to, ld, add);
            else tile(from, 1, column_stride, rows, panel, columns, k, to, ld, add);
        }
}

/* -------------------------------------------------------------------------------------------- products that screen */

/* Where whole numbers of 16 bits multiply faster than floats, the encoder's product only screens: rows are rounded to
   multiples of a step, sums are exact, and what the rounding may hide is bounded. What is near the cut is computed
   again in `real`, so that what is selected, and its values, are those of the product in `real`.

   vpmaddwd has twice the products of a fused multiply-add. With VNNI bytes have four times as many: native_screen.h. */
enum { SCREEN_COLUMNS = 16, SCORED_ROWS = 48 };
/* Rows whose largest entry is smaller are not screened: products of their steps would leave the range of floats. */
#define LEAST_SCREENED 1e-12f

/* What the bound needs of all latents, behind the steps of each. */
typedef struct {
    real largest_sum, largest_step, largest_entry;
} Limits;

API long screens(long threads) {
    (void)threads;
    return SCREENS;
}

#if SCREENS == 16
typedef struct {
    real step, sum, largest; /* of absolute values */
} Scale;

static long pairs_of(long d) { return (d + 1) / 2; }

/* row = to * step, but for half a step in each entry. The squares of two such rows sum to less than 2^31 each, so that
   by Cauchy-Schwarz no sum of products leaves 32 bits, on its way neither. */
static Scale to_whole_numbers(const float *restrict row, long d, int16_t *restrict to) {
    float squares = 0, sum = 0, largest = 0;
#pragma omp simd reduction(+ : squares, sum) reduction(max : largest)
    for (long i = 0; i < d; i++) {
        float size = fabsf(row[i]);
        squares += row[i] * row[i], sum += size, largest = size > largest ? size : largest;
    }
    if (!(squares < INFINITY && largest >= LEAST_SCREENED)) {
        memset(to, 0, (size_t)(2 * pairs_of(d)) * sizeof(int16_t));
        return (Scale){0, sum, squares < INFINITY ? largest : INFINITY};
    }
    float by_norm = (46300 - sqrtf((float)d)) / sqrtf(squares), by_entry = 32766 / largest;
    float each = MIN(by_norm, by_entry);
    long i = 0;
    for (; i + 16 <= d; i += 16) {
        __m256 factor = _mm256_set1_ps(each);
        __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(row + i), factor));
        __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(row + i + 8), factor));
        __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
        _mm256_storeu_si256((__m256i *)(to + i), both);
    }
    for (; i < d; i++) to[i] = (int16_t)_mm_cvtss_si32(_mm_set_ss(row[i] * each));
    if (d % 2) to[d] = 0;
    return (Scale){1 / each, sum, largest};
}

/* Sums of products of up to six rows with sixteen latents; out = sum * both steps + the row's margin. */
static inline __attribute__((always_inline)) void screen_tile(const int16_t *rows, long pairs, long n_rows,
                                                              const int16_t *panel, const float *row_steps,
                                                              const float *latent_steps, const float *margins,
                                                              long n_columns, float *out, long ld) {
    __m256i sums[TILE_ROWS][2];
    const int16_t *from[TILE_ROWS];
    for (long r = 0; r < TILE_ROWS; r++) {
        from[r] = rows + (r < n_rows ? r : 0) * 2 * pairs;
        sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    }
    for (long p = 0; p < pairs; p++) {
        __m256i left = _mm256_loadu_si256((const __m256i *)(panel + p * 2 * SCREEN_COLUMNS));
        __m256i right = _mm256_loadu_si256((const __m256i *)(panel + p * 2 * SCREEN_COLUMNS + 16));
#pragma GCC unroll 6
        for (long r = 0; r < TILE_ROWS; r++) {
            int32_t pair;
            memcpy(&pair, from[r] + 2 * p, sizeof pair);
            __m256i both = _mm256_set1_epi32(pair);
            sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(both, left));
            sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(both, right));
        }
    }
#pragma GCC unroll 6
    for (long r = 0; r < TILE_ROWS; r++) {
        if (r >= n_rows) break;
        __m256 step = _mm256_set1_ps(row_steps[r]), margin = _mm256_set1_ps(margins[r]);
        float whole[SCREEN_COLUMNS], *to = n_columns == SCREEN_COLUMNS ? out + r * ld : whole;
        for (long side = 0; side < 2; side++) {
            __m256 steps = _mm256_mul_ps(step, _mm256_loadu_ps(latent_steps + 8 * side));
            _mm256_storeu_ps(to + 8 * side, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[r][side]), steps, margin));
        }
        if (n_columns < SCREEN_COLUMNS) memcpy(out + r * ld, whole, (size_t)n_columns * sizeof(float));
    }
}
#endif

/* Rounds and packs the encoder: panels of sixteen latents, pair of entries after pair, and the scales of its rows, which
   are a multiple of sixteen and are followed by the limits. */
API void screen(const real *encoder, long n_latents, long d, int16_t *panels, real *scales, long threads) {
#if SCREENS == 16
    long pairs = pairs_of(d), n_panels = (n_latents + SCREEN_COLUMNS - 1) / SCREEN_COLUMNS;
    real sum = 0, step = 0, entry = 0;
#pragma omp parallel for num_threads((int)threads) schedule(static) reduction(max : sum, step, entry)
    for (long number = 0; number < n_panels; number++) {
        int32_t *panel = (int32_t *)(panels + number * SCREEN_COLUMNS * 2 * pairs);
        int16_t *row = own_memory((size_t)(2 * pairs) * sizeof(int16_t));
        for (long i = 0; i < SCREEN_COLUMNS; i++) {
            long j = number * SCREEN_COLUMNS + i;
            Scale scale = {0, 0, 0};
            if (j < n_latents) scale = to_whole_numbers(encoder + j * d, d, row);
            else memset(row, 0, (size_t)(2 * pairs) * sizeof(int16_t));
            for (long p = 0; p < pairs; p++) memcpy(panel + p * SCREEN_COLUMNS + i, row + 2 * p, sizeof(int32_t));
            scales[j] = scale.step;
            sum = MAX(sum, scale.sum), step = MAX(step, scale.step), entry = MAX(entry, scale.largest);
        }
    }
    Limits limits = {sum, step, entry};
    memcpy(scales + n_panels * SCREEN_COLUMNS, &limits, sizeof limits);
#else
    (void)encoder, (void)n_latents, (void)d, (void)panels, (void)scales;
#endif
    (void)threads;
}

/* ------------------------------------------------------------------------------------------------------------ input */

/* out = x * factor - b_dec, and the same rounded to bf16 when asked for. */
API void centre(const real *x, real factor, const real *b_dec, real *out, bf16 *rounded, long batch, long d,
                long threads) {
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (long b = 0; b < batch; b++) {
        const real *restrict row = x + b * d;
        real *restrict to = out + b * d;
#pragma omp simd
        for (long i = 0; i < d; i++) to[i] = row[i] * factor - b_dec[i];
        if (rounded)
            for (long i = 0; i < d; i++) rounded[b * d + i] = to_bf16((float)to[i]);
    }
}

/* -------------------------------------------------------------------------------------------------------- selection */

/* Pre-latents as the encoder's product left them: without bias, `real` or bf16. `slack` widens them by what bf16 may
   have changed: sign * slack_row[b] * slack_latent[j] is added (see `exact` in engine.md). Where `pre` is null they are
   computed a few rows at a time, which are read while they lie in the cache: from x and the packed encoder, or, where
   `whole` is given, from whole numbers. These are upper bounds then, by no more than twice the row's margin. Where `tiles`
   are given, or with AVX-512, native_at_once.h selects from them as they are made. */
typedef struct {
    const void *pre;
    const real *bias;
    const real *slack_row, *slack_latent;
    long batch, n_latents, rounded, sign;
    const real *x, *encoder, *panels;
    const int16_t *whole;
    const real *scales;
    const bf16 *tiles;
    long d;
    real largest_bias, margins[SCORED_ROWS];
} Scores;

enum { READ_ROWS = 16 };

/* How many rows are scored at once: a batch's part of the cache, whatever the width. */
static long rows_at_once(const Scores *scores) {
    if (scores->pre) return READ_ROWS;
    return MAX(MIN(SCORED_ROWS, (1L << 20) / MAX(scores->n_latents, 1) / TILE_ROWS * TILE_ROWS), 2 * TILE_ROWS);
}

/* The memory that scoring them takes. */
static long room_for(const Scores *scores, long rows) {
    if (scores->pre) return 0;
    return rows * (scores->n_latents + (scores->whole ? (scores->d + 1) / 2 * 2 : 0));
}

static void prepare(Scores *scores, real *panels, long threads) {
    if (scores->pre) return;
    if (!scores->whole) {
        pack(scores->encoder, scores->n_latents, scores->d, 1, scores->d, panels);
        return;
    }
    real largest = 0;
    for (long j = 0; j < scores->n_latents; j++) largest = MAX((real)fabs(scores->bias[j]), largest); /* a NaN is passed over */
    scores->largest_bias = largest;
}

#if SCREENS == 16
/* What rounding may hide of x . w + b, for all latents: with x = step_x q_x + e_x and |e_x| <= step_x / 2, likewise w,

       |x . w - step_x step_w q_x . q_w| <= (step_x sum |w| + step_w sum |x|) / 2 + d step_x step_w / 4,

   a little more for rounding in floats, here and in the product that is the judge. A row that could not be rounded has
   step 0, and all of x . w is hidden. */
static real margin_of(const Scores *scores, Scale x) {
    Limits w;
    long n_panels = (scores->n_latents + SCREEN_COLUMNS - 1) / SCREEN_COLUMNS;
    memcpy(&w, scores->scales + n_panels * SCREEN_COLUMNS, sizeof w);
    real hidden = 0.51f * (x.step * w.largest_sum + w.largest_step * x.sum) + 0.27f * (real)scores->d * x.step * w.largest_step;
    real whole = x.sum * w.largest_entry, floats = ((real)scores->d / 8 + 32) * 0x1p-24f * whole;
    return hidden + floats + (x.step > 0 ? 0 : whole) + LEAST_SCREENED * x.sum + 0x1p-21f * scores->largest_bias;
}

static void screen_rows(Scores *scores, long first, long stride, long m, real *block) {
    long d = scores->d, n = scores->n_latents, pairs = pairs_of(d);
    int16_t *rows = (int16_t *)(block + m * n);
    real steps[SCORED_ROWS];
    for (long r = 0; r < m; r++) {
        Scale scale = to_whole_numbers(scores->x + (first + r * stride) * d, d, rows + r * 2 * pairs);
        steps[r] = scale.step, scores->margins[r] = margin_of(scores, scale);
    }
    for (long c = 0; c < n; c += SCREEN_COLUMNS)
        for (long r = 0; r < m; r += TILE_ROWS)
            screen_tile(rows + r * 2 * pairs, pairs, MIN(TILE_ROWS, m - r), scores->whole + c * 2 * pairs, steps + r,
                        scores->scales + c, scores->margins + r, MIN(SCREEN_COLUMNS, n - c), block + r * n + c, n);
}
#endif

/* Pre-latents of m rows from row `first` on, `stride` apart, into `block`. */
static void score_rows(Scores *scores, long first, long stride, long m, real *block) {
    long d = scores->d, n = scores->n_latents;
    scores->pre = block;
#if SCREENS == 16
    if (scores->whole) {
        screen_rows(scores, first, stride, m, block);
        return;
    }
#endif
    product(scores->x + first * d, stride * d, 1, scores->panels, m, n, d, block, n, 0);
}

/* Whatever is larger than k values that were screened lies no further below the k-th of them than this. */
static inline real below(const Scores *scores, real screened, long r) {
    return scores->margins[r] < INFINITY ? screened - 2 * scores->margins[r] : 0;
}

static long at_least_of(int32_t *latents, real *values, long n, real least) {
    long kept = 0;
    for (long e = 0; e < n; e++)
        if (values[e] >= least) latents[kept] = latents[e], values[kept++] = values[e];
    return kept;
}

/* What was collected of row b of x, computed again in `real`; what does not reach `least` after all is left out. */
static long judge(const Scores *scores, long b, real least, int32_t *latents, real *values, long n) {
    const real *x = scores->x + b * scores->d;
    long kept = 0;
    for (long e = 0; e < n; e += 4) {
        const real *rows[4];
        real products[4];
        four_rows(scores->encoder, latents, e, n, scores->d, rows);
        four_dots(x, rows, scores->d, products);
        for (long i = 0; i < MIN(4, n - e); i++) {
            int32_t j = latents[e + i];
            real value = products[i] + scores->bias[j];
            if (value >= least && value > 0) latents[kept] = j, values[kept++] = value;
        }
    }
    return kept;
}

enum { LANES = 32 / sizeof(real), WIDTH = 2 * LANES };

/* Latents are dealt to `n` groups, `width` groups at a time: group g has every width-th latent of a run of them. */
typedef struct {
    real *maxima;
    long n, width, n_latents, number;
    const Scores *scores;
} Row;

static long n_groups(long n_latents, long k) {
    long groups = MAX(n_latents / 16, 1);
    while (groups < 4 * k && groups < n_latents) groups *= 2;
    return MAX(MIN(groups, n_latents), 1);
}

static Row row_of(real *maxima, long groups, long n_latents, const Scores *scores) {
    int in_strips = !scores->rounded && groups % WIDTH == 0 && n_latents % groups == 0;
    return (Row){maxima, groups, in_strips ? WIDTH : groups, n_latents, 0, scores};
}

/* The pre-latent of latent j, bias and slack included. */
static inline real pre_latent(const Row *row, long j) {
    const Scores *scores = row->scores;
    long at = row->number * row->n_latents + j;
    real value = scores->rounded ? (real)from_bf16(((const bf16 *)scores->pre)[at]) : ((const real *)scores->pre)[at];
    value += scores->bias[j];
    return scores->slack_row ? value + scores->sign * scores->slack_row[row->number] * scores->slack_latent[j] : value;
}

#if REAL_IS_DOUBLE
#define SMALLEST 4.9406564584124654e-324
#else
#define SMALLEST 1.4012985e-45f
#endif

typedef real lanes __attribute__((vector_size(LANES * sizeof(real))));
#if REAL_IS_DOUBLE
typedef int64_t lane_bits __attribute__((vector_size(LANES * sizeof(real))));
#else
typedef int32_t lane_bits __attribute__((vector_size(LANES * sizeof(real))));
#endif

static inline lanes load(const real *from) {
    lanes v;
    memcpy(&v, from, sizeof v);
    return v;
}

static inline lanes larger(lanes a, lanes b) { /* b where a is NaN */
#if defined(__AVX__) && REAL_IS_DOUBLE
    return (lanes)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif defined(__AVX__)
    return (lanes)_mm256_max_ps((__m256)a, (__m256)b);
#else
    lane_bits first = a > b;
    return (lanes)(((lane_bits)a & first) | ((lane_bits)b & ~first));
#endif
}

/* The maxima of WIDTH groups from group g on, which never leave the registers; their latents lie side by side, so that
   a row is read from its start to its end. */
static inline void maxima_of_strip(const Row *row, const real *from, long g) {
    const real *bias = row->scores->bias;
    long members = row->n_latents / row->n;
    lanes first = {0}, second = {0};
    for (long j = g * members; j < (g + WIDTH) * members; j += WIDTH) {
        first = larger(load(from + j) + load(bias + j), first);
        second = larger(load(from + j + LANES) + load(bias + j + LANES), second);
    }
    memcpy(row->maxima + g, &first, sizeof first);
    memcpy(row->maxima + g + LANES, &second, sizeof second);
}

/* Compiled once for each kind of scores, so that nothing is asked in the loop. */
static inline __attribute__((always_inline)) void load_row_as(Row *row, int rounded, int widened) {
    const Scores *scores = row->scores;
    long b = row->number, n_latents = row->n_latents, n = row->n;
    const real *from = (const real *)scores->pre + b * n_latents, *bias = scores->bias;
    const bf16 *from_rounded = (const bf16 *)scores->pre + b * n_latents;
    const real *per_latent = scores->slack_latent;
    real slack = widened ? scores->sign * scores->slack_row[b] : 0;
    real *maxima = row->maxima;
    memset(maxima, 0, (size_t)n * sizeof(real));
    for (long start = 0; start < n_latents; start += n) {
        long end = MIN(start + n, n_latents), j = start;
        for (; j + LANES <= end; j += LANES) {
            lanes v;
            if (rounded) {
                real wide[LANES];
                for (long i = 0; i < LANES; i++) wide[i] = (real)from_bf16(from_rounded[j + i]);
                v = load(wide);
            } else {
                v = load(from + j);
            }
            v += load(bias + j);
            if (widened) v += slack * load(per_latent + j);
            lanes largest = larger(v, load(maxima + j - start));
            memcpy(maxima + j - start, &largest, sizeof v);
        }
        for (; j < end; j++) {
            real value = pre_latent(row, j);
            maxima[j - start] = MAX(value, maxima[j - start]);
        }
    }
}

/* Reads row b once and keeps the largest positive value of each group. */
static void load_row(Row *row, long b) {
    row->number = b;
    if (row->scores->rounded && row->scores->slack_row) load_row_as(row, 1, 1);
    else if (row->scores->rounded) load_row_as(row, 1, 0);
    else if (row->width == WIDTH && row->n_latents % row->n == 0)
        for (long g = 0; g < row->n; g += WIDTH)
            maxima_of_strip(row, (const real *)row->scores->pre + b * row->n_latents, g);
    else load_row_as(row, 0, 0);
}

enum { FEW = 8 };

/* The k-th largest of n values that are not negative, for k up to FEW, 0 where there are fewer: the largest so far are kept
   in order, without a branch to guess. */
static inline __attribute__((always_inline)) real best_of(const real *values, long n, long k) {
    real best[FEW] = {0};
    for (long e = 0; e < n; e++) {
        real value = values[e];
        for (long i = 0; i < k; i++) {
            real kept = best[i];
            best[i] = kept > value ? kept : value;
            value = kept > value ? value : kept;
        }
    }
    return best[k - 1];
}

static real kth_of_few(const real *values, long n, long k) {
    switch (k) { /* a constant k keeps them in registers */
    case 1: return best_of(values, n, 1);
    case 2: return best_of(values, n, 2);
    case 3: return best_of(values, n, 3);
    case 4: return best_of(values, n, 4);
    case 5: return best_of(values, n, 5);
    case 6: return best_of(values, n, 6);
    case 7: return best_of(values, n, 7);
    default: return best_of(values, n, FEW);
    }
}

enum { SIDE = 16 };

#if SELECTS_AT_ONCE
static inline __m512i counting(void) { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

/* Of 16 entries those that exist where `left` are left. */
static inline __mmask16 first_of(long left) { return (__mmask16)(left >= SIDE ? 0xffff : left > 0 ? (1u << left) - 1 : 0); }

/* How many of sixteen values are larger than each, or equal and before it. */
static inline __m512i ranks(__m512 values) {
    __m512i rank = _mm512_setzero_si512(), one = _mm512_set1_epi32(1);
    __m512i behind = counting();
    for (int s = 1; s < SIDE; s++) { /* each and the one s behind it; behind the last comes the first */
        behind = _mm512_add_epi32(behind, one);
        __m512 other = _mm512_permutexvar_ps(behind, values);
        __mmask16 first = (__mmask16)(0xffff << (SIDE - s)); /* of the two, the other */
        __mmask16 before = _mm512_cmp_ps_mask(other, values, _CMP_GT_OQ) | _mm512_mask_cmp_ps_mask(first, other, values, _CMP_EQ_OQ);
        rank = _mm512_mask_add_epi32(rank, before, rank, one);
    }
    return rank;
}

/* The k-th largest, k <= 16, of the maxima of sixteen groups of positive values: k values reach it. 0 where fewer than k
   groups have a value. */
static inline real kth_of_sixteen_maxima(const real *values, long n, long k) {
    __m512 largest = _mm512_setzero_ps();
    for (long e = 0; e < n; e += SIDE) largest = _mm512_max_ps(_mm512_maskz_loadu_ps(first_of(n - e), values + e), largest);
    __mmask16 kth = _mm512_cmpeq_epi32_mask(ranks(largest), _mm512_set1_epi32((int)k - 1));
    return _mm512_cvtss_f32(_mm512_maskz_compress_ps(kth, largest));
}

/* keep_largest of up to sixteen values. */
static inline long keep_largest_of_sixteen(int32_t *latents, real *values, long n, long k, real *cut) {
    __mmask16 there = first_of(n);
    __m512 v = _mm512_maskz_loadu_ps(there, values);
    __mmask16 stays = _mm512_mask_cmplt_epi32_mask(there, ranks(v), _mm512_set1_epi32((int)k));
    *cut = _mm512_mask_reduce_min_ps(stays, v);
    _mm512_mask_storeu_epi32(latents, there, _mm512_maskz_compress_epi32(stays, _mm512_maskz_loadu_epi32(there, latents)));
    _mm512_mask_storeu_ps(values, there, _mm512_maskz_compress_ps(stays, v));
    return k;
}
#endif

/* A positive bound that at least k of the maxima reach and few others do, or 0 where fewer than k are positive. The
   k-th largest value is at least as large: k values in k groups reach the bound. */
static real bound(const Row *row, long k) {
#if SELECTS_AT_ONCE
    if (k <= FEW) return kth_of_sixteen_maxima(row->maxima, row->n, k);
#endif
    if (k <= FEW) return kth_of_few(row->maxima, row->n, k);
    const real *restrict maxima = row->maxima;
    real low = 0, high = 0;
    long g = 0;
    lanes highest = {0};
    for (; g + LANES <= row->n; g += LANES) highest = larger(load(maxima + g), highest);
    for (; g < row->n; g++) high = MAX(maxima[g], high);
    for (long i = 0; i < LANES; i++) high = MAX(highest[i], high);
    for (int halving = 0; halving < 24; halving++) {
        real middle = (low + high) / 2;
        if (!(middle > low && middle < high)) break;
        int32_t count = 0;
#pragma omp simd reduction(+ : count)
        for (long g = 0; g < row->n; g++) count += maxima[g] >= middle;
        if (count >= k) low = middle;
        else high = middle;
        if (count >= k && count <= k + k / 4) break;
    }
    return low;
}

static inline __attribute__((always_inline)) long collect_as(const Row *row, real least, int32_t *latents, real *values,
                                                             long room, int rounded, int widened) {
    const Scores *scores = row->scores;
    long n = 0, n_latents = row->n_latents, n_groups = row->n, at = row->number * n_latents;
    const real *from = (const real *)scores->pre + at, *bias = scores->bias, *per_latent = scores->slack_latent;
    const bf16 *from_rounded = (const bf16 *)scores->pre + at;
    real slack = widened ? scores->sign * scores->slack_row[row->number] : 0;
    long run = row->width < n_groups ? row->width * (n_latents / n_groups) : n_latents;
    for (long g = 0; g < n_groups; g++) {
        if (!(row->maxima[g] >= least && row->maxima[g] > 0)) continue;
        long start = g / row->width * run;
        for (long j = start + g % row->width; j < start + run; j += row->width) {
            real value = (rounded ? (real)from_bf16(from_rounded[j]) : from[j]) + bias[j];
            if (widened) value += slack * per_latent[j];
            if (value >= least && value > 0) {
                if (n < room) latents[n] = (int32_t)j, values[n] = value;
                n++;
            }
        }
    }
    return n;
}

#if defined(__AVX__)
static inline unsigned where_reached(const real *from, const real *bias, lanes least) {
#if REAL_IS_DOUBLE
    return (unsigned)_mm256_movemask_pd(_mm256_cmp_pd((__m256d)(load(from) + load(bias)), (__m256d)least, _CMP_GE_OQ));
#else
    return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps((__m256)(load(from) + load(bias)), (__m256)least, _CMP_GE_OQ));
#endif
}

/* The same of few latents, in their order: looking at all of them at once costs less than guessing at branches. */
enum { FEW_LATENTS = 1024, AT_ONCE = 32 };

static long collect_in_order(const Row *row, real least, int32_t *latents, real *values, long room) {
    const real *from = (const real *)row->scores->pre + row->number * row->n_latents, *bias = row->scores->bias;
    real limit = least > 0 ? least : SMALLEST;
    long n = 0;
    for (long start = 0; start < row->n_latents; start += AT_ONCE) {
        unsigned reached = 0;
#if SELECTS_AT_ONCE
        for (long i = start; i < start + AT_ONCE; i += SIDE) {
            __m512 v = _mm512_add_ps(_mm512_loadu_ps(from + i), _mm512_loadu_ps(bias + i));
            reached |= (unsigned)_mm512_cmp_ps_mask(v, _mm512_set1_ps(limit), _CMP_GE_OQ) << (i - start);
        }
#else
        lanes limits = limit - (lanes){0};
        for (long i = start; i < start + AT_ONCE; i += LANES)
            reached |= where_reached(from + i, bias + i, limits) << (i - start);
#endif
        for (; reached; reached &= reached - 1, n++) {
            long j = start + __builtin_ctz(reached);
            if (n < room) latents[n] = (int32_t)j, values[n] = from[j] + bias[j];
        }
    }
    return n;
}
#endif

/* The latents whose value is positive and reaches `least`, group by group. Returns their number, and writes as many of
   them as there is room for. */
static long collect(const Row *row, real least, int32_t *latents, real *values, long room) {
    if (row->scores->rounded && row->scores->slack_row) return collect_as(row, least, latents, values, room, 1, 1);
    if (row->scores->rounded) return collect_as(row, least, latents, values, room, 1, 0);
#if defined(__AVX__)
    if (row->n_latents <= FEW_LATENTS && row->n_latents % AT_ONCE == 0)
        return collect_in_order(row, least, latents, values, room);
#endif
    return collect_as(row, least, latents, values, room, 0, 0);
}

enum { COUNTED = 1024 };

/* The k-th largest of a few positive values that are finite: counting all of them in each halving costs less than guessing at
   branches. */
static real kth_by_counting(const real *restrict values, long n, long k) {
    real low = values[0], high = values[0];
#pragma omp simd reduction(min : low) reduction(max : high)
    for (long e = 0; e < n; e++) low = MIN(values[e], low), high = MAX(values[e], high);
    for (;;) { /* the k-th largest lies from low to high */
        real middle = low + (high - low) / 2, least = high;
        int32_t count = 0;
        if (!(middle > low && middle < high)) break;
#pragma omp simd reduction(+ : count) reduction(min : least)
        for (long e = 0; e < n; e++) {
            count += values[e] >= middle;
            least = values[e] >= middle ? MIN(values[e], least) : least;
        }
        if (count == k) return least;
        if (count > k) low = least;
        else high = middle;
    }
    long at_top = 0;
    for (long e = 0; e < n; e++) at_top += values[e] >= high;
    return at_top >= k ? high : low;
}

/* The k-th largest of n values, 1 <= k <= n (quickselect; the order of `values` changes). */
static real kth_largest(real *values, long n, long k) {
    long low = 0, high = n - 1, at = k - 1;
    while (low < high) {
        real a = values[low], b = values[(low + high) / 2], c = values[high];
        real pivot = a > b ? (b > c ? b : (a > c ? c : a)) : (a > c ? a : (b > c ? c : b));
        long i = low, j = high;
        while (i <= j) {
            while (values[i] > pivot) i++;
            while (values[j] < pivot) j--;
            if (i <= j) {
                real swapped = values[i];
                values[i++] = values[j];
                values[j--] = swapped;
            }
        }
        if (at <= j) high = j;
        else if (at >= i) low = i;
        else break;
    }
    return values[at];
}

static int all_finite(const real *values, long n) {
    real largest = 0;
#pragma omp simd reduction(max : largest)
    for (long e = 0; e < n; e++) largest = MAX(values[e], largest);
    return largest < INFINITY;
}

/* Keeps the k largest of n entries, in their order; of equal ones the first. `work` holds n values. */
static long keep_largest(int32_t *latents, real *values, long n, long k, real *work, real *cut) {
    *cut = 0;
    if (n <= k) return n;
#if SELECTS_AT_ONCE
    if (n <= SIDE) return keep_largest_of_sixteen(latents, values, n, k, cut);
#endif
    if (n <= k + 4 && k > FEW) { /* few too many: drop the smallest one by one, of equal ones the last */
        for (; n > k; n--) {
            long smallest = 0;
            for (long e = 1; e < n; e++)
                if (values[e] <= values[smallest]) smallest = e;
            for (long e = smallest; e + 1 < n; e++) values[e] = values[e + 1], latents[e] = latents[e + 1];
        }
        return k;
    }
    real least;
    if (k <= FEW) {
        least = kth_of_few(values, n, k);
    } else if (n <= COUNTED && all_finite(values, n)) {
        least = kth_by_counting(values, n, k);
    } else {
        memcpy(work, values, (size_t)n * sizeof(real));
        least = kth_largest(work, n, k);
    }
    long above = 0, kept = 0;
    for (long e = 0; e < n; e++) above += values[e] > least;
    long ties = k - above;
    for (long e = 0; e < n; e++) {
        if (kept < k && (values[e] > least || (values[e] == least && ties-- > 0))) {
            latents[kept] = latents[e];
            values[kept++] = values[e];
        }
    }
    *cut = least;
    return kept;
}

static void fill_slots(const int32_t *who, const real *found, long n, long k, int32_t *latents, real *values) {
    for (long e = 0; e < k; e++) latents[e] = e < n ? who[e] : 0, values[e] = e < n ? found[e] : 0;
}

#include "native_amx.h"
#include "native_screen.h"
#include "native_at_once.h"

/* Each row's k largest positive pre-latents, k slots a row; a slot without one has value 0. `cuts`, where given,
   receives the k-th largest value of each row (0 where fewer are positive; where product and selection are one, see top_k_at_once). */
API void top_k(const void *pre, long rounded, const real *bias, const real *slack_row, const real *slack_latent, long sign,
               const real *x, const real *encoder, real *panels, const int16_t *whole, const real *scales,
               const bf16 *tiles, long d, long batch, long n_latents, long k, real guess, int32_t *latents, real *values,
               real *cuts, long threads) {
    Scores given = {pre, bias,    slack_row, slack_latent, batch, n_latents, rounded, sign,
                    x,   encoder, panels,    whole,        scales, tiles,    d,       0,    {0}};
#if SELECTS_AT_ONCE
    if (!pre && !panels) {
        if (whole) prepare(&given, panels, threads);
        top_k_at_once(&given, k, guess, latents, values, cuts, threads);
        return;
    }
#endif
    (void)guess;
    long groups = n_groups(n_latents, k), at_once = rows_at_once(&given), room = room_for(&given, at_once);
    prepare(&given, panels, threads);
#pragma omp parallel num_threads((int)threads)
    {
        Scores scores = given;
        size_t reals = (size_t)(room + groups + 2 * n_latents);
        real *block = own_memory(reals * sizeof(real) + (size_t)n_latents * sizeof(int32_t)), *memory = block + room;
        Row row = row_of(memory, groups, n_latents, &scores);
        real *candidates = memory + groups, *work = candidates + n_latents;
        int32_t *who = (int32_t *)(work + n_latents);
#pragma omp for schedule(static)
        for (long first = 0; first < batch; first += at_once) {
            long last = MIN(first + at_once, batch);
            if (!pre) score_rows(&scores, first, 1, last - first, block);
            for (long b = first; b < last; b++) {
                load_row(&row, pre ? b : b - first);
                real cut, least = bound(&row, k);
                if (whole) least = below(&scores, least, b - first);
                long n = collect(&row, least, who, candidates, n_latents);
                if (whole) {
                    if (n > k) {
                        memcpy(work, candidates, (size_t)n * sizeof(real));
                        n = at_least_of(who, candidates, n, below(&scores, kth_largest(work, n, k), b - first));
                    }
                    n = judge(&scores, b, 0, who, candidates, n);
                }
                n = keep_largest(who, candidates, n, k, work, &cut);
                if (cuts) {
                    if (n == k && cut == 0) {
                        cut = candidates[0];
                        for (long e = 1; e < n; e++) cut = MIN(cut, candidates[e]);
                    }
                    cuts[b] = cut;
                }
                if (latents) fill_slots(who, candidates, n, k, latents + b * k, values + b * k);
            }
        }
    }
}

/* Every positive pre-latent that reaches `least` (of its row, where `row_least` is given). Rows take their room from
   the arrays as they are done, so they lie there in any order: row b's counts[b] entries begin at starts[b]. Returns
   how many there are; when that exceeds the capacity, not all were written. */
API long at_least(const void *pre, long rounded, const real *bias, const real *slack_row, const real *slack_latent,
                  long sign, const real *x, const real *encoder, real *panels, const int16_t *whole,
                  const real *scales, const bf16 *tiles, long d, long batch, long n_latents, long stride, real least, const real *row_least, long capacity,
                  int64_t *starts, int32_t *counts, int32_t *latents, real *values, long threads) {
    Scores given = {pre, bias,    slack_row, slack_latent, batch, n_latents, rounded, sign,
                    x,   encoder, panels,    whole,        scales, tiles,    d,       0,    {0}};
#if SELECTS_AT_ONCE
    if (!pre) {
        if (panels || whole) prepare(&given, panels, threads);
        return at_least_at_once(&given, stride, least, row_least, capacity, starts, counts, latents, values, threads);
    }
#endif
    long groups = n_groups(n_latents, 0), at_once = rows_at_once(&given), room = room_for(&given, at_once);
    long total = 0, n_rows = (batch + stride - 1) / stride;
    prepare(&given, panels, threads);
#pragma omp parallel num_threads((int)threads)
    {
        Scores scores = given;
        size_t reals = (size_t)(room + groups + n_latents);
        real *block = own_memory(reals * sizeof(real) + (size_t)n_latents * sizeof(int32_t)), *memory = block + room;
        Row row = row_of(memory, groups, n_latents, &scores);
        real *found = memory + groups;
        int32_t *who = (int32_t *)(found + n_latents);
#pragma omp for schedule(static)
        for (long first = 0; first < n_rows; first += at_once) {
            long last = MIN(first + at_once, n_rows);
            if (!pre) score_rows(&scores, first * stride, stride, last - first, block);
            for (long b = first; b < last; b++) {
                load_row(&row, pre ? b * stride : b - first);
                real limit = row_least ? row_least[b * stride] : least;
                long n = collect(&row, limit, who, found, n_latents), start;
                if (whole) n = judge(&scores, b * stride, limit, who, found, n);
    #pragma omp atomic capture
                {
                    start = total;
                    total += n;
                }
                starts[b] = start, counts[b] = (int32_t)n;
                if (start + n > capacity) continue;
                memcpy(latents + start, who, (size_t)n * sizeof(int32_t));
                memcpy(values + start, found, (size_t)n * sizeof(real));
            }
        }
    }
    return total;
}

/* The n-th largest of `count` positive values. Their leading bits are counted first, so that only the values of one
   bin have to be ordered. */
API real nth_largest(const real *values, long count, long n) {
    enum { BINS = 1 << 15 };
    int32_t *bins = own_memory(BINS * sizeof(int32_t) + (size_t)count * sizeof(real));
    real *inside = (real *)(bins + BINS);
    memset(bins, 0, BINS * sizeof(int32_t));
#define BIN(value) (((union { float f; uint32_t u; }){(float)(value)}).u >> 16)
    for (long e = 0; e < count; e++) bins[BIN(values[e])]++;
    long bin = BINS - 1, above = 0;
    while (bin > 0 && above + bins[bin] < n) above += bins[bin--];
    long m = 0;
    for (long e = 0; e < count; e++)
        if ((long)BIN(values[e]) == bin) inside[m++] = values[e];
#undef BIN
    return kth_largest(inside, m, n - above);
}

/* Gathers the entries that reach `least` into the order of their rows; returns how many. */
API long compact(const int64_t *starts, const int32_t *counts, const int32_t *latents, const real *values, real least,
                 long batch, int64_t *offsets, int32_t *out_latents, real *out_values, long threads) {
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (long b = 0; b < batch; b++) {
        const real *restrict row = values + starts[b];
        long n = 0;
        for (long e = 0; e < counts[b]; e++) n += row[e] >= least;
        offsets[b + 1] = n;
    }
    offsets[0] = 0;
    for (long b = 0; b < batch; b++) offsets[b + 1] += offsets[b];
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (long b = 0; b < batch; b++) {
        long to = offsets[b];
        for (long e = starts[b]; e < starts[b] + counts[b]; e++)
            if (values[e] >= least) out_latents[to] = latents[e], out_values[to++] = values[e];
    }
    return offsets[batch];
}

/* Each entry's pre-latent computed anew, in `real`: x_b . encoder_j + bias_j; negative ones become 0. */
API void rescore(const int64_t *starts, const int32_t *counts, const int32_t *latents, const real *x,
                 const real *encoder, const real *bias, long batch, long d, real *values, long threads) {
#pragma omp parallel for num_threads((int)threads) schedule(dynamic, 16)
    for (long b = 0; b < batch; b++)
        for (long e = starts[b]; e < starts[b] + counts[b]; e++) {
            real value = dot(x + b * d, encoder + latents[e] * d, d) + bias[latents[e]];
            values[e] = value > 0 ? value : 0;
        }
}

/* The k largest positive entries of each row, k slots a row, as `top_k` gives them. */
API void keep_top_k(const int64_t *starts, const int32_t *counts, int32_t *latents, real *values, long batch, long k,
                    int32_t *out_latents, real *out_values, long threads) {
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (long b = 0; b < batch; b++) {
        real cut, *row = values + starts[b], *work = own_memory((size_t)counts[b] * sizeof(real) + 64);
        int32_t *who = latents + starts[b];
        long n = keep_largest(who, row, counts[b], k, work, &cut);
        memcpy(out_latents + b * k, who, (size_t)n * sizeof(int32_t));
        memcpy(out_values + b * k, row, (size_t)n * sizeof(real));
        for (long e = n; e < k; e++) out_latents[b * k + e] = 0, out_values[b * k + e] = 0;
    }
}

/* ----------------------------------------------------------------------------------------------------------- decode */

static inline __attribute__((always_inline)) void decode_row(const int32_t *who, const real *z, long n, long all,
                                                             const real *W_dec, const real *restrict to,
                                                             const real *norms, real cost, real scale, long d,
                                                             real *restrict g, real *code_gradients, real *row_loss,
                                                             real *row_sum) {
    real loss = 0, sum = 0;
    for (long i = 0; i < d; i++) g[i] = -to[i];
    add_rows(g, W_dec, who, z, n, d);
#pragma omp simd reduction(+ : loss)
    for (long i = 0; i < d; i++) {
        loss += g[i] * g[i];
        g[i] *= scale;
    }
    for (long e = 0; e < n; e += 4) {
        const real *four[4];
        real dots[4];
        four_rows(W_dec, who, e, n, d, four);
        four_dots(g, four, d, dots);
        for (long i = 0; i < MIN(4, n - e); i++) code_gradients[e + i] = dots[i];
    }
    for (long e = 0; e < n; e++) {
        real norm = norms ? norms[who[e]] : 1;
        sum += z[e] * norm;
        code_gradients[e] = all || z[e] > 0 ? code_gradients[e] + cost * norm : 0;
    }
    *row_loss = loss, *row_sum = sum;
}

/* One pass over the decoder rows of each sample: residual = z W_dec - target, its square, gradient = scale * residual,
   and for each code gradient . W_dec_j + cost * norms_j. Slots of value 0 get no gradient unless `all` do. `norms` may
   be null: 1. */
API void decode(const int64_t *offsets, const int32_t *latents, const real *values, long all, const real *W_dec,
                const real *target, const real *norms, real cost, real scale, long batch, long d, real *gradient,
                real *code_gradients, real *row_loss, real *row_sum, long threads) {
#pragma omp parallel for num_threads((int)threads) schedule(dynamic, 16)
    for (long b = 0; b < batch; b++) {
        long first = offsets[b], n = offsets[b + 1] - first;
#define DECODE_ROW(width)                                                                                              \
    decode_row(latents + first, values + first, n, all, W_dec, target + b * d, norms, cost, scale, width,              \
               gradient + b * d, code_gradients + first, row_loss + b, row_sum + b)
        if (d == 64) DECODE_ROW(64); /* rows of one known width stay in the registers */
        else DECODE_ROW(d);
#undef DECODE_ROW
    }
}

/* The rows of one level: n of them lie in `matrix`, with a code and a slot of the sample each. */
typedef struct {
    const real *matrix;
    const int32_t *rows, *slots;
    const real *weights;
    long n;
} Level;

/* Row i of entry e on, or any row where there are fewer: a constant `n` leaves what is not needed out. */
#define ROW(i) (level->matrix + (n > (i) ? (long)level->rows[e + (i)] * d : 0))

/* out = sign * from + weights . n rows from entry e on, in one pass; returns |out|^2. */
static inline __attribute__((always_inline)) real add_n(real *out, const real *from, real sign, const Level *level,
                                                        long e, long n, long d) {
    const real *r0 = ROW(0), *r1 = ROW(1), *r2 = ROW(2), *r3 = ROW(3), *w = level->weights + e;
    real w0 = n > 0 ? w[0] : 0, w1 = n > 1 ? w[1] : 0, w2 = n > 2 ? w[2] : 0, w3 = n > 3 ? w[3] : 0, square = 0;
#pragma omp simd reduction(+ : square)
    for (long i = 0; i < d; i++) {
        real value = sign * from[i];
        if (n > 0) value += w0 * r0[i];
        if (n > 1) value += w1 * r1[i];
        if (n > 2) value += w2 * r2[i];
        if (n > 3) value += w3 * r3[i];
        out[i] = value;
        square += value * value;
    }
    return square;
}

/* g = factor * g + rest * later, and its products with n rows from entry e on, in one pass. */
static inline __attribute__((always_inline)) void settle_n(real *g, real factor, const real *later, real rest,
                                                           const Level *level, long e, long n, long d, real dots[4]) {
    const real *r0 = ROW(0), *r1 = ROW(1), *r2 = ROW(2), *r3 = ROW(3);
    real s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (long i = 0; i < d; i++) {
        real value = factor * g[i] + rest * later[i];
        g[i] = value;
        if (n > 0) s0 += value * r0[i];
        if (n > 1) s1 += value * r1[i];
        if (n > 2) s2 += value * r2[i];
        if (n > 3) s3 += value * r3[i];
    }
    dots[0] = s0, dots[1] = s1, dots[2] = s2, dots[3] = s3;
}
#undef ROW

/* out = sign * from + all rows of the level; returns |out|^2. */
static real add_level(real *out, const real *from, real sign, const Level *level, long d) {
    long e = 0;
    for (; e + 4 < level->n; e += 4) {
        add_n(out, from, sign, level, e, 4, d);
        from = out, sign = 1;
    }
    switch (level->n - e) {
    case 0: return add_n(out, from, sign, level, e, 0, d);
    case 1: return add_n(out, from, sign, level, e, 1, d);
    case 2: return add_n(out, from, sign, level, e, 2, d);
    case 3: return add_n(out, from, sign, level, e, 3, d);
    default: return add_n(out, from, sign, level, e, 4, d);
    }
}

/* g = factor * g + rest * later, and its product with each row of the level. */
static void settle_level(real *g, real factor, const real *later, real rest, const Level *level, long d,
                         real *code_gradients) {
    long e = 0;
    do {
        real dots[4];
        long n = MIN(level->n - e, 4);
        if (e == 0) {
            switch (n) {
            case 0: settle_n(g, factor, later, rest, level, e, 0, d, dots); break;
            case 1: settle_n(g, factor, later, rest, level, e, 1, d, dots); break;
            case 2: settle_n(g, factor, later, rest, level, e, 2, d, dots); break;
            case 3: settle_n(g, factor, later, rest, level, e, 3, d, dots); break;
            default: settle_n(g, factor, later, rest, level, e, 4, d, dots);
            }
        } else {
            const real *four[4];
            four_rows(level->matrix, level->rows, e, level->n, d, four);
            four_dots(g, four, d, dots);
        }
        for (long i = 0; i < n; i++) code_gradients[level->slots[e + i]] = dots[i];
        e += 4;
    } while (e < level->n);
}

/* The same for codes that are read n_levels times: reading l takes the slots of levels up to l. `gradient`
   [n_levels, batch, d] receives sum over readings m >= l of weights_m * scale * residual_m, which is what a slot of
   level l gets, or where they are `detached` over m = l and the last one; row_loss the weighted sum of squares,
   row_square that of `reading`. */
API void decode_levels(const int64_t *offsets, const int32_t *latents, const real *values, const int32_t *levels,
                       const real *weights, long n_levels, long reading, long detached, long all, const real *W_dec,
                       const real *target, const real *norms, real cost, real scale, long batch, long d, real *gradient,
                       real *code_gradients, real *row_square, real *row_loss, real *row_sum, long threads) {
#pragma omp parallel for num_threads((int)threads) schedule(dynamic, 16)
    for (long b = 0; b < batch; b++) {
        long first = offsets[b], n = offsets[b + 1] - first;
        const real *z = values + first;
        real *own_codes = own_memory((size_t)n * (sizeof(real) + 2 * sizeof(int32_t)) +
                                     (size_t)(n_levels + 1) * sizeof(int32_t));
        int32_t *own_latents = (int32_t *)(own_codes + n), *slots = own_latents + n, *ends = slots + n;
        real sum = 0, total = 0;

        /* The slots in the order of their levels: ends[l] is where level l ends. */
        memset(ends, 0, (size_t)(n_levels + 1) * sizeof(int32_t));
        for (long e = 0; e < n; e++) ends[levels[first + e] + 1] += all || z[e] > 0;
        for (long l = 0; l < n_levels; l++) ends[l + 1] += ends[l];
        for (long e = 0; e < n; e++) {
            if (!(all || z[e] > 0)) continue;
            int32_t to = ends[levels[first + e]]++;
            own_codes[to] = z[e], own_latents[to] = latents[first + e], slots[to] = (int32_t)e;
        }
#define LEVEL(l) {W_dec, own_latents + begin, slots + begin, own_codes + begin, ends[l] - begin}
        for (long l = 0; l < n_levels; l++) {
            long begin = l ? ends[l - 1] : 0;
            Level level = LEVEL(l);
            real *r = gradient + (l * batch + b) * d;
            real square = add_level(r, l ? r - batch * d : target + b * d, l ? 1 : -1, &level, d);
            total += weights[l] * square;
            if (l == reading) row_square[b] = square;
        }
        for (long l = n_levels - 1; l >= 0; l--) {
            long begin = l ? ends[l - 1] : 0, last = l + 1 == n_levels;
            Level level = LEVEL(l);
            real *g = gradient + (l * batch + b) * d;
            const real *later = last ? g : gradient + ((detached ? n_levels - 1 : l + 1) * batch + b) * d;
            settle_level(g, weights[l] * scale, later, last ? 0 : 1, &level, d, code_gradients + first);
        }
#undef LEVEL
        for (long e = 0; e < n; e++) {
            real norm = norms ? norms[latents[first + e]] : 1;
            sum += z[e] * norm;
            code_gradients[first + e] = all || z[e] > 0 ? code_gradients[first + e] + cost * norm : 0;
        }
        row_loss[b] = total, row_sum[b] = sum;
    }
}

/* ---------------------------------------------------------------------------------------------------------- pursuit */

enum { STRIP = 8 * LANES };

/* s -= z g, in one pass with the search for where the largest of the new s lies. Returns its index; n >= 1. */
static inline long take_away(real *restrict s, const real *restrict g, real z, long n) {
    real best = -INFINITY;
    long at = 0;
    for (long start = 0; start < n; start += STRIP) {
        long end = MIN(start + STRIP, n), j = start;
        real largest = -INFINITY;
        if (end == start + STRIP) {
            lanes most = load(s + start) - z * load(g + start);
            memcpy(s + start, &most, sizeof most);
            for (j += LANES; j < end; j += LANES) {
                lanes v = load(s + j) - z * load(g + j);
                memcpy(s + j, &v, sizeof v);
                most = larger(most, v);
            }
            for (long i = 0; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
        } else {
            for (; j < end; j++) {
                s[j] -= z * g[j];
                largest = s[j] > largest ? s[j] : largest;
            }
        }
        if (largest > best) best = largest, at = start;
    }
    for (long end = MIN(at + STRIP, n); at + 1 < end && !(s[at] == best);) at++;
    return at;
}

/* k steps of matching pursuit on each row of x: `correlations` [batch, n_latents] is x . w_j on entry, and follows the
   residual by the rows of the Gram matrix w_i . w_j. k slots a row; those behind the last step have value 0. */
API void pursue(real *correlations, const real *gram, const real *x, const real *W_dec, long batch, long n_latents,
                long d, long k, int32_t *latents, real *values, long threads) {
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (long b = 0; b < batch; b++) {
        real *restrict r = own_memory((size_t)d * sizeof(real)), *s = correlations + b * n_latents;
        int32_t *who = latents + b * k;
        real *z = values + b * k;
        memcpy(r, x + b * d, (size_t)d * sizeof(real));
        long j = take_away(s, gram, 0, n_latents), t = 0;
        for (; t < k; t++) {
            const real *restrict w = W_dec + j * d;
            real value = dot(r, w, d);
            if (!(value > 0)) break;
            who[t] = (int32_t)j, z[t] = value;
#pragma omp simd
            for (long i = 0; i < d; i++) r[i] -= value * w[i];
            if (t + 1 < k) j = take_away(s, gram + j * n_latents, value, n_latents);
        }
        for (; t < k; t++) who[t] = 0, z[t] = 0;
    }
}

/* Back through these steps (see `unroll` in pursuit.py): from the gradients in the codes and, level after level, in
   x_hat, to what b_dec gets (the first `batch` rows of `out`) and each slot's decoder row (the batches of rows behind
   them, step after step). `fires` is 1 in the slots that count. */
API void unroll(const int32_t *latents, const real *values, const int32_t *levels, const real *code_gradients,
                const real *gradient, const real *x, const real *W_dec, long tied, long batch, long d, long k, real *out,
                real *fires, long threads) {
#pragma omp parallel for num_threads((int)threads) schedule(dynamic, 16)
    for (long b = 0; b < batch; b++) {
        const int32_t *who = latents + b * k;
        const real *z = values + b * k;
        real *restrict r = own_memory((size_t)(2 * d) * sizeof(real)), *restrict back = r + d;
        memset(r, 0, (size_t)(2 * d) * sizeof(real));
        add_rows(r, W_dec, who, z, k, d);
        for (long i = 0; i < d; i++) r[i] = x[b * d + i] - r[i];
        for (long t = k - 1; t >= 0; t--) {
            const real *restrict w = W_dec + who[t] * d;
            const real *restrict own = gradient + ((levels ? levels[b * k + t] : 0) * batch + b) * d;
            real *restrict row = out + ((t + 1) * batch + b) * d, value = z[t];
            fires[b * k + t] = value > 0;
            if (!(value > 0)) continue;
            real g = code_gradients[b * k + t] - dot(back, w, d);
#pragma omp simd
            for (long i = 0; i < d; i++) {
                r[i] += value * w[i];
                row[i] = value * (own[i] - back[i]) + g * r[i];
                back[i] += g * w[i];
            }
        }
        for (long t = k - 1; t > 0; t--) /* into the step before in which the same latent fired */
            for (long before = t - 1; before >= 0 && z[t] > 0; before--)
                if (who[before] == who[t]) {
                    const real *restrict row = out + ((t + 1) * batch + b) * d;
                    real *restrict to = out + ((before + 1) * batch + b) * d;
                    for (long i = 0; i < d; i++) to[i] += row[i];
                    fires[b * k + t] = 0;
                    break;
                }
        for (long i = 0; i < d; i++) out[b * d + i] = gradient[b * d + i] - (tied ? back[i] : 0);
    }
}

/* ----------------------------------------------------------------------------------------------------------- invert */

/* The codes in the order of their latents, samples ascending: a counting sort, each thread with rows of its own.
   `counts` is scratch, [threads, n_latents]. Slots with neither a value nor a gradient are left out. Where codes have
   levels, `decoder_rows` receives level * batch + sample beside the sample. Returns how many codes fire. */
API long invert(const int64_t *offsets, const int32_t *latents, const real *values, const real *code_gradients,
                const int32_t *levels, long batch, long n_latents, int32_t *counts, int32_t *latent_offsets,
                int32_t *rows, int32_t *decoder_rows, real *codes, real *gradients, long threads) {
    long per_thread = (batch + threads - 1) / threads, fired = 0;
#pragma omp parallel for num_threads((int)threads) schedule(static, 1) reduction(+ : fired)
    for (long t = 0; t < threads; t++) {
        int32_t *own_counts = counts + t * n_latents;
        memset(own_counts, 0, (size_t)n_latents * sizeof(int32_t));
        long first = MIN(t * per_thread, batch), last = MIN(first + per_thread, batch);
        for (long e = offsets[first]; e < offsets[last]; e++) {
            own_counts[latents[e]] += values[e] > 0 || code_gradients[e] != 0;
            fired += values[e] > 0;
        }
    }
    int32_t total = 0;
    for (long j = 0; j < n_latents; j++) {
        latent_offsets[j] = total;
        for (long t = 0; t < threads; t++) {
            int32_t n = counts[t * n_latents + j];
            counts[t * n_latents + j] = total;
            total += n;
        }
    }
    latent_offsets[n_latents] = total;
#pragma omp parallel for num_threads((int)threads) schedule(static, 1)
    for (long t = 0; t < threads; t++) {
        int32_t *next = counts + t * n_latents;
        long first = MIN(t * per_thread, batch), last = MIN(first + per_thread, batch);
        for (long b = first; b < last; b++)
            for (long e = offsets[b]; e < offsets[b + 1]; e++)
                if (values[e] > 0 || code_gradients[e] != 0) {
                    int32_t to = next[latents[e]]++;
                    rows[to] = (int32_t)b, codes[to] = values[e], gradients[to] = code_gradients[e];
                    if (levels) decoder_rows[to] = (int32_t)(levels[e] * batch + b);
                }
    }
    return fired;
}

#include "native_amx_dense.h"

/* ----------------------------------------------------------------------------------------------------------- update */

typedef struct {
    real rate, correction1, correction2, beta1, rest1, beta2, rest2, epsilon; /* rest = 1 - beta, rounded once */
} Adam;

/* One step of Adam (Kingma & Ba 2015), as torch.optim.Adam computes it. */
static inline void adam_row(real *restrict w, real *restrict m, real *restrict v, const real *restrict g, long n,
                            const Adam *a) {
    real step = a->rate / a->correction1, root = 1 / (real)sqrt(a->correction2), eps = a->epsilon;
    real b1 = a->beta1, b2 = a->beta2, c1 = a->rest1, c2 = a->rest2;
#pragma omp simd
    for (long i = 0; i < n; i++) {
        real gradient = g[i];
        real first = b1 * m[i] + c1 * gradient, second = b2 * v[i] + c2 * gradient * gradient;
        m[i] = first, v[i] = second;
#if REAL_IS_DOUBLE
        w[i] -= step * first / (sqrt(second) * root + eps);
#else
        w[i] -= step * first / (sqrtf(second) * root + eps);
#endif
    }
}

#include "native_moments.h"

/* Everything that happens to a latent, while its rows lie in the cache: both gradient rows, summed over the samples it
   fired for; `extra` rows (AuxK, or all rows of a dense step); projection of the decoder's gradient; Adam on encoder
   row, decoder row and bias; the decoder row back to norm 1; the encoder row rounded for the next product; counters.

   `blocks` [n_blocks, d_in], where given, receives the sums over latents of (bias gradient) * (encoder row), which is
   what b_dec gets through the encoder. Row i of the extra gradients is that of latent extra_latents[i]; `extra_of` is
   scratch for the way back, [n_latents]. Null: row j is that of latent j.
   After a dense step on AMX units `dense` is its plan, and blocks have VISITED latents: gradients are made here.
   `pull[j]` is added to the gradient in the norm of decoder row j. `encoder_m` is null where the encoder is the
   decoder's: it then has no gradient of its own. Where there are scales [n_latents, 2], moments have eight bits, and are
   rounded by the chance of the step with this number. */
API void update(long n_latents, long d_in, long d_out, long block, const int32_t *latent_offsets, const int32_t *rows,
                const int32_t *decoder_rows, const real *codes, const real *gradients, const real *x,
                const real *residual_gradient, const void *dense, int32_t *extra_of, const int64_t *extra_latents, long n_extra,
                const real *extra_encoder,
                const real *extra_decoder, const real *extra_bias, real rate, real correction1, real correction2,
                real beta1, real rest1, real beta2, real rest2, real epsilon, long unit_norm, real cost, const real *pull, real *encoder,
                void *encoder_m, void *encoder_v, real *encoder_scales, real *decoder, void *decoder_m, void *decoder_v,
                real *decoder_scales, long step, real *bias, real *bias_m, real *bias_v, bf16 *encoder_rounded, bf16 *encoder_tiles, real *norms, real *encoder_norms, int64_t *silent,
                int64_t *window, const int32_t *firing, long batch, real *blocks, long threads) {
    Adam adam = {rate, correction1, correction2, beta1, rest1, beta2, rest2, epsilon};
    long n_blocks = (n_latents + block - 1) / block;
    if (dense && block != VISITED) {
        fprintf(stderr, "sae: a dense step is taken up by %d latents at a time, not %ld\n", VISITED, block);
        abort();
    }
    if (extra_of) {
        for (long j = 0; j < n_latents; j++) extra_of[j] = -1;
        for (long i = 0; i < n_extra; i++) extra_of[extra_latents[i]] = (int32_t)i;
    }
#pragma omp parallel num_threads((int)threads)
    {
        unsigned before = flush_subnormals();
        size_t small = decoder_scales ? 2 * (size_t)MAX(d_in, d_out) : 0;
        size_t own_rows = ((d_in + d_out + small) * sizeof(real) + 63) / 64 * 64, visited = 0;
#if TILES
        if (dense) visit_of(dense, NULL, &visited);
#endif
        real *g_encoder = own_memory(own_rows + visited), *g_decoder = g_encoder + d_in, *scratch = g_decoder + d_out;
        uint32_t seed = 2 * (uint32_t)step;
#if TILES
        Visit visit = {0};
        if (dense) visit = visit_of(dense, (char *)g_encoder + own_rows, &visited), use_tiles();
#endif
#pragma omp for schedule(dynamic, 1)
        for (long c = 0; c < n_blocks; c++) {
#if TILES
            if (dense) visit_latents(dense, c * block, &visit);
#endif
            real *restrict through_bias = blocks ? blocks + c * d_in : NULL;
            if (blocks) memset(through_bias, 0, (size_t)d_in * sizeof(real));
            for (long j = c * block; j < MIN((c + 1) * block, n_latents); j++) {
                long first = latent_offsets ? latent_offsets[j] : 0;
                long n = latent_offsets ? latent_offsets[j + 1] - first : 0;
                long extra = extra_encoder ? (extra_of ? extra_of[j] : j) : -1;
                real *restrict w_enc = encoder + j * d_in, *restrict w_dec = decoder + j * d_out;
                real g_bias = 0, sum = 0;
                long fired = 0;
                if (extra >= 0) {
                    memcpy(g_encoder, extra_encoder + extra * d_in, (size_t)d_in * sizeof(real));
                    memcpy(g_decoder, extra_decoder + extra * d_out, (size_t)d_out * sizeof(real));
                    g_bias = extra_bias[extra];
                } else {
                    memset(g_encoder, 0, (size_t)(d_in + d_out) * sizeof(real));
                }
#if TILES
                if (dense) {
                    long at = j - c * block;
                    for (long i = 0; i < d_in; i++) g_encoder[i] += visit.encoder[at * d_in + i];
                    for (long i = 0; i < d_out; i++) g_decoder[i] += visit.decoder[at * d_out + i];
                    g_bias += visit.bias[at], sum = visit.sums[at], fired = (long)visit.sums[VISITED + at];
                }
#endif
                if (encoder_m) add_rows(g_encoder, x, rows + first, gradients + first, n, d_in);
                add_rows(g_decoder, residual_gradient, decoder_rows + first, codes + first, n, d_out);
                for (long e = first; e < first + n; e++)
                    g_bias += gradients[e], sum += codes[e], fired += codes[e] > 0;
                if (blocks && g_bias != 0)
#pragma omp simd
                    for (long i = 0; i < d_in; i++) through_bias[i] += g_bias * w_enc[i];

                /* The penalty cost * z |w| pulls on the row itself; on unit rows the projection would undo that. */
                real along = unit_norm ? -dot(g_decoder, w_dec, d_out) : cost * sum + (pull ? pull[j] : 0);
                if (!unit_norm) along = norms[j] > 0 ? along / norms[j] : 0;
                if (along != 0)
#pragma omp simd
                    for (long i = 0; i < d_out; i++) g_decoder[i] += along * w_dec[i];

                if (encoder_scales)
                    adam_small_row(w_enc, (int8_t *)encoder_m + j * d_in, (uint8_t *)encoder_v + j * d_in,
                                   encoder_scales + 2 * j, g_encoder, d_in,
                                   (seed + 1) * GOLDEN + (uint32_t)(j * d_in), scratch, &adam);
                else if (encoder_m)
                    adam_row(w_enc, (real *)encoder_m + j * d_in, (real *)encoder_v + j * d_in, g_encoder, d_in, &adam);
                if (decoder_scales)
                    adam_small_row(w_dec, (int8_t *)decoder_m + j * d_out, (uint8_t *)decoder_v + j * d_out,
                                   decoder_scales + 2 * j, g_decoder, d_out, seed * GOLDEN + (uint32_t)(j * d_out),
                                   scratch, &adam);
                else
                    adam_row(w_dec, (real *)decoder_m + j * d_out, (real *)decoder_v + j * d_out, g_decoder, d_out, &adam);
                adam_row(bias + j, bias_m + j, bias_v + j, &g_bias, 1, &adam);
                real norm = (real)sqrt(dot(w_dec, w_dec, d_out));
                if (unit_norm) {
                    real shrink = 1 / MAX(norm, (real)1e-12);
#pragma omp simd
                    for (long i = 0; i < d_out; i++) w_dec[i] *= shrink;
                } else {
                    norms[j] = norm;
                }
                if (encoder_rounded)
                    for (long i = 0; i < d_in; i++) encoder_rounded[j * d_in + i] = to_bf16((float)w_enc[i]);
                if (encoder_tiles) tile_latent(w_enc, j, d_in, encoder_tiles);
                if (encoder_norms) encoder_norms[j] = (real)sqrt(dot(w_enc, w_enc, d_in));
                if (firing) fired = firing[j];
                silent[j] = fired ? 0 : silent[j] + batch;
                window[j] += fired;
            }
        }
#if TILES
        if (dense) _tile_release();
#endif
        restore_subnormals(before);
    }
    (void)dense;
}

/* b_dec: the residual's gradient summed over samples, less what went through the encoder's bias. */
API void update_b_dec(const real *residual_gradient, const real *blocks, long batch, long n_blocks, long d,
                      real rate, real correction1, real correction2, real beta1, real rest1, real beta2, real rest2,
                      real epsilon, real *b_dec, real *m, real *v, long threads) {
    Adam adam = {rate, correction1, correction2, beta1, rest1, beta2, rest2, epsilon};
    enum { TILE = 64 };
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (long first = 0; first < d; first += TILE) {
        long width = MIN(TILE, d - first);
        real g[TILE] = {0};
        for (long b = 0; b < batch; b++)
            for (long i = 0; i < width; i++) g[i] += residual_gradient[b * d + first + i];
        for (long c = 0; blocks && c < n_blocks; c++)
            for (long i = 0; i < width; i++) g[i] -= blocks[c * d + first + i];
        adam_row(b_dec + first, m + first, v + first, g, width, &adam);
    }
}

/* ------------------------------------------------------------------------------------------------------ dense steps */

/* h = max(0, pre + bias) in place, how often each latent fires, and sum_j h_j norms_j of each row. */
API void relu_(real *pre, const real *bias, const real *norms, long batch, long n_latents, int32_t *counts,
               int32_t *firing, real *row_sum, long threads) {
    memset(counts, 0, (size_t)threads * (size_t)n_latents * sizeof(int32_t));
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (long b = 0; b < batch; b++) {
        real *restrict row = pre + b * n_latents, sum = 0;
        int32_t *restrict own_counts = counts + omp_get_thread_num() * n_latents;
#pragma omp simd
        for (long j = 0; j < n_latents; j++) {
            real value = row[j] + bias[j];
            value = value > 0 ? value : (value == value ? 0 : value);
            row[j] = value;
            own_counts[j] += value > 0;
        }
        if (norms) sum = dot(row, norms, n_latents);
        else
#pragma omp simd reduction(+ : sum)
            for (long j = 0; j < n_latents; j++) sum += row[j];
        row_sum[b] = sum;
    }
    memset(firing, 0, (size_t)n_latents * sizeof(int32_t));
    for (long t = 0; t < threads; t++)
        for (long j = 0; j < n_latents; j++) firing[j] += counts[t * n_latents + j];
}

/* g = (g + cost * norms) where z > 0 and 0 elsewhere, in one row; added to `sum`. */
static inline void mask_row(real *restrict g, const real *restrict z, const real *restrict norms, real cost, long n,
                            real *restrict sum) {
#pragma omp simd
    for (long j = 0; j < n; j++) {
        g[j] = z[j] > 0 ? g[j] + cost * (norms ? norms[j] : 1) : 0;
        sum[j] += g[j];
    }
}

/* `mask_row` of every row, in place; and the sum over samples. `blocks` is
   scratch, [ceil(batch / 64), n_latents]. */
API void relu_backward_(real *gradient, const real *h, const real *norms, real cost, long batch, long n_latents,
                        real *blocks, real *bias_gradient, long threads) {
    long n_blocks = (batch + 63) / 64;
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (long c = 0; c < n_blocks; c++) {
        real *restrict sum = blocks + c * n_latents;
        memset(sum, 0, (size_t)n_latents * sizeof(real));
        for (long b = c * 64; b < MIN((c + 1) * 64, batch); b++)
            mask_row(gradient + b * n_latents, h + b * n_latents, norms, cost, n_latents, sum);
    }
#pragma omp parallel for num_threads((int)threads) schedule(static)
    for (long j = 0; j < n_latents; j++) {
        real sum = 0;
        for (long c = 0; c < n_blocks; c++) sum += blocks[c * n_latents + j];
        bias_gradient[j] = sum;
    }
}

/* A ReLU's whole step, of all latents or of the dead ones that AuxK trains, at sizes whose products are small:

       z = max(0, x encoder^T + bias), or its k largest in each row where k > 0
       gradient = scale (z decoder - target),  through = (gradient decoder^T + cost * norms) where z > 0

   and the gradients through^T x, z^T gradient (and cost * sum z / norms along rows that are free), and through summed.
   The target is x, or where `start` is given -start / scale. A chunk of rows sums its part of the weights' gradients,
   PARTS chunks whatever the number of threads. `panels` is scratch, 2 padded(n) d + padded(d) n; `parts` is PARTS times
   2 n d + 3 n + 1. `totals` are the sums of (z decoder - target)^2 and of z norms. `gradient` may be null. */
enum { PARTS = 8, STEP_ROWS = 64 };

API void relu_step(const real *x, const real *start, const real *encoder, const real *bias, const real *decoder,
                   const real *norms, real cost, real scale, long k, long batch, long n, long d, real *panels,
                   real *parts, real *gradient, real *g_encoder, real *g_decoder, real *g_bias, int32_t *firing,
                   real *totals, long threads) {
    real *encoder_panels = panels, *through_panels = panels + padded(n) * d, *decoder_panels = through_panels + padded(n) * d;
    long part_size = 2 * n * d + 3 * n + 1, per_part = (batch + PARTS - 1) / PARTS;
    long ld = n + TILE_COLUMNS; /* rows a power of two apart would share the few places that a cache has for them */
#pragma omp parallel num_threads((int)threads)
    {
#pragma omp for schedule(static) nowait
        for (long first = 0; first < n; first += TILE_COLUMNS) {
            pack_panel(encoder, n, d, 1, d, first, encoder_panels + first * d);
            pack_panel(decoder, n, d, 1, d, first, through_panels + first * d);
        }
#pragma omp for schedule(static)
        for (long first = 0; first < d; first += TILE_COLUMNS)
            pack_panel(decoder, d, n, d, 1, first, decoder_panels + first * n);

        real *z = own_memory((size_t)(STEP_ROWS * (2 * ld + d + 2 * padded(d)) + n) * sizeof(real));
        real *through = z + STEP_ROWS * ld, *own_gradient = through + STEP_ROWS * ld;
        real *x_panels = own_gradient + STEP_ROWS * d, *gradient_panels = x_panels + STEP_ROWS * padded(d);
        real *work = gradient_panels + STEP_ROWS * padded(d);
#pragma omp for schedule(dynamic, 1)
        for (long part = 0; part < PARTS; part++) {
            real *restrict sum_encoder = parts + part * part_size, *restrict sum_decoder = sum_encoder + n * d;
            real *restrict sum_bias = sum_decoder + n * d, *restrict sum_z = sum_bias + n, *restrict fires = sum_z + n;
            real squares = 0;
            memset(part * per_part < batch ? sum_bias : sum_encoder, 0,
                   (size_t)(part * per_part < batch ? 3 * n : part_size) * sizeof(real));
            for (long first = part * per_part; first < MIN((part + 1) * per_part, batch); first += STEP_ROWS) {
                long m = MIN(STEP_ROWS, MIN((part + 1) * per_part, batch) - first);
                const real *own_x = x + first * d;
                int add = first > part * per_part;
                real *g = gradient ? gradient + first * d : own_gradient;
                product(own_x, d, 1, encoder_panels, m, n, d, z, ld, 0);
                for (long b = 0; b < m; b++) {
                    real *restrict row = z + b * ld;
#pragma omp simd
                    for (long j = 0; j < n; j++) {
                        real value = row[j] + bias[j];
                        row[j] = value > 0 ? value : (value == value ? 0 : value);
                    }
                    if (k > 0 && k < n) {
                        memcpy(work, row, (size_t)n * sizeof(real));
                        real cut = kth_largest(work, n, k);
                        for (long j = 0; j < n; j++) row[j] = row[j] < cut ? 0 : row[j];
                    }
#pragma omp simd
                    for (long j = 0; j < n; j++) sum_z[j] += row[j], fires[j] += row[j] > 0;
                }
                product(z, ld, 1, decoder_panels, m, d, n, g, d, 0);
                for (long b = 0; b < m; b++) {
                    const real *restrict from = start ? start + (first + b) * d : own_x + b * d;
                    real *restrict row = g + b * d, factor = start ? -1 / scale : 1;
#pragma omp simd reduction(+ : squares)
                    for (long i = 0; i < d; i++) {
                        real residual = row[i] - factor * from[i];
                        squares += residual * residual;
                        row[i] = scale * residual;
                    }
                }
                product(g, d, 1, through_panels, m, n, d, through, ld, 0);
                for (long b = 0; b < m; b++) mask_row(through + b * ld, z + b * ld, norms, cost, n, sum_bias);
                pack(own_x, d, m, d, 1, x_panels);
                product(through, 1, ld, x_panels, n, d, m, sum_encoder, d, add);
                pack(g, d, m, d, 1, gradient_panels);
                product(z, 1, ld, gradient_panels, n, d, m, sum_decoder, d, add);
            }
            parts[part * part_size + part_size - 1] = squares;
        }
#pragma omp for schedule(static)
        for (long j = 0; j < n; j++) {
            real *restrict to_encoder = g_encoder + j * d, *restrict to_decoder = g_decoder + j * d, sum[3] = {0};
            memset(to_encoder, 0, (size_t)d * sizeof(real));
            memset(to_decoder, 0, (size_t)d * sizeof(real));
            for (long part = 0; part < PARTS; part++) {
                const real *restrict own_encoder = parts + part * part_size + j * d, *restrict own_decoder = own_encoder + n * d;
#pragma omp simd
                for (long i = 0; i < d; i++) to_encoder[i] += own_encoder[i], to_decoder[i] += own_decoder[i];
                for (long e = 0; e < 3; e++) sum[e] += parts[part * part_size + 2 * n * d + e * n + j];
            }
            real norm = norms ? norms[j] : 1, pull = norms ? cost * sum[1] / MAX(norm, (real)1e-12) : 0;
            if (pull != 0)
                for (long i = 0; i < d; i++) to_decoder[i] += pull * decoder[j * d + i];
            g_bias[j] = sum[0];
            firing[j] = (int32_t)sum[2];
            parts[2 * n * d + n + j] = sum[1] * norm; /* read by nobody else from here on */
        }
    }
    totals[0] = totals[1] = 0;
    for (long part = 0; part < PARTS; part++) totals[0] += parts[(part + 1) * part_size - 1];
    for (long j = 0; j < n; j++) totals[1] += parts[2 * n * d + n + j];
}
