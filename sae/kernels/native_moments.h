/* Adam's moments in eight bits, a row at a time; moments.py has the equations. Included by native.c.

   A row's gradient and what comes out of it fit the first cache: the new moments are written there, and rounded once
   the largest of them is known. */

#define LARGEST_FIRST 127
#define LARGEST_ROOT 255
/* Seeds are spread over the places by it. */
#define GOLDEN 0x9e3779b9u
/* Below it a scale has no inverse in float32. */
#define LEAST_SCALE ((real)1e-30)

/* lowbias32 (C. Wellons). */
static inline uint32_t hashed(uint32_t bits) {
    bits = (bits ^ (bits >> 16)) * 0x7feb352du;
    bits = (bits ^ (bits >> 15)) * 0x846ca68bu;
    return bits ^ (bits >> 16);
}

static inline real inverse_of(real scale, real largest) { return scale > LEAST_SCALE ? largest / scale : 0; }

/* adam_row for moments [n] with their two scales; `place` is that of the row's first entry in the hash, `scratch` has
   room for 2 n numbers. */
static inline void adam_small_row(real *restrict w, int8_t *restrict first, uint8_t *restrict second, real *restrict scales,
                                  const real *restrict g, long n, uint32_t place, real *restrict scratch, const Adam *a) {
    real step = a->rate / a->correction1, correction = 1 / (real)sqrt(a->correction2), eps = a->epsilon;
    real b1 = a->beta1, b2 = a->beta2, c1 = a->rest1, c2 = a->rest2;
    real unit = scales[0] / LARGEST_FIRST, unit_of_root = scales[1] / LARGEST_ROOT, largest = 0, largest_root = 0;
    real *restrict m = scratch, *restrict root = scratch + n;
#pragma omp simd reduction(max : largest, largest_root)
    for (long i = 0; i < n; i++) {
        real gradient = g[i], before = second[i] * unit_of_root;
        m[i] = b1 * (first[i] * unit) + c1 * gradient;
        real v = b2 * (before * before) + c2 * gradient * gradient;
#if REAL_IS_DOUBLE
        root[i] = sqrt(v);
        real size = fabs(m[i]);
#else
        root[i] = sqrtf(v);
        real size = fabsf(m[i]);
#endif
        w[i] -= step * m[i] / (root[i] * correction + eps);
        largest = MAX(size, largest), largest_root = MAX(root[i], largest_root);
    }
    real inverse = inverse_of(largest, LARGEST_FIRST), inverse_root = inverse_of(largest_root, LARGEST_ROOT);
#pragma omp simd
    for (long i = 0; i < n; i++) {
        uint32_t bits = hashed(place + (uint32_t)i);
        real up = (real)(int32_t)(bits >> 16) / 65536, up_root = (real)(int32_t)(bits & 0xffff) / 65536;
        /* Both are at least -127, so that what is cut off after adding 127 is rounded down. */
        real q = m[i] * inverse + up + LARGEST_FIRST, r = root[i] * inverse_root + up_root;
        first[i] = (int8_t)((int32_t)MAX(MIN(q, 2 * LARGEST_FIRST), 0) - LARGEST_FIRST);
        second[i] = (uint8_t)(int32_t)MAX(MIN(r, LARGEST_ROOT), 1);
    }
    scales[0] = largest, scales[1] = largest_root;
}
