/* Products in bf16 on the matrix units of a CPU (AMX). Part of native.c.

   A unit multiplies 16 rows of 32 numbers by 32 numbers of 16 latents at a time. Sums are float32; x and the encoder are
   rounded to bf16.

   Tiles lie in memory one after the other, 1 KiB each: of x 16 rows of 32 numbers; of the encoder 16 pairs of numbers, in
   each pair side by side those of 16 latents. */

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && SELECTS_AT_ONCE && defined(__linux__)
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

enum { DEPTH = 32, TILE_ENTRIES = SIDE * DEPTH };

static long tile_steps(long d) { return (d + DEPTH - 1) / DEPTH; }

#if TILES
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

#endif
