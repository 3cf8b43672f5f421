/* AMX's matrix units in plain C, so that what is written for them is tested on CPUs without; included before native.c. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define __AMX_BF16__ 1
#define syscall(...) 0 /* the system's permission is not needed */

static _Thread_local float tiles_[8][16][16]; /* those that multiply hold pairs of bf16 numbers */

static inline void load_(int tile, const void *from, size_t apart) {
    for (int r = 0; r < 16; r++) memcpy(tiles_[tile][r], (const char *)from + r * apart, 64);
}

static inline void store_(int tile, void *to, size_t apart) {
    for (int r = 0; r < 16; r++) memcpy((char *)to + r * apart, tiles_[tile][r], 64);
}

static inline float number_(const float *pair, int which) {
    uint16_t bits[2];
    memcpy(bits, pair, sizeof bits);
    uint32_t word = (uint32_t)bits[which] << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

static inline void multiply_(int sums, int left, int right) {
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++)
            for (int pair = 0; pair < 16; pair++)
                for (int i = 0; i < 2; i++)
                    tiles_[sums][m][n] += number_(&tiles_[left][m][pair], i) * number_(&tiles_[right][pair][n], i);
}

#define _tile_loadconfig(shapes) ((void)(shapes))
#define _tile_release() ((void)0)
#define _tile_zero(tile) memset(tiles_[tile], 0, sizeof tiles_[tile])
#define _tile_loadd(tile, from, apart) load_(tile, from, apart)
#define _tile_stored(tile, to, apart) store_(tile, to, apart)
#define _tile_dpbf16ps(sums, left, right) multiply_(sums, left, right)
