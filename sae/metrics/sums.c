/* Sums over the samples of an evaluation set, from entries alone. Compiled on demand by sae/kernels/build.py, once for
   each type of `real`. native.py says what each function computes, and has the same in torch.

   The features' side lies in the order of features: a feature that is on in some samples owns one row of the sums, which
   stays in the cache while its samples pass by. Features are shared out among threads and their samples come in order,
   so that no number of threads changes a result. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef REAL
#define REAL float
#endif
typedef REAL real;

#define API __attribute__((visibility("default")))

/* product += a^T z and both += 1[a > 0]^T 1[z > threshold], of the features first..last - 1 and sparse rows z. Sample s
   of the features is row row_of[s] of z. */
API void add_sparse_pairs(const int64_t *starts, const int32_t *sample, const real *a, const int32_t *row_of, long first,
                          long last, const int64_t *offsets, const int64_t *unit, const real *z, real threshold,
                          long n_units, double *product, int32_t *both,
                          long threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (long i = first; i < last; i++) {
        double *restrict sums = product + (i - first) * n_units;
        int32_t *restrict counts = both + (i - first) * n_units;
        for (int64_t e = starts[i]; e < starts[i + 1]; e++) {
            int64_t row = row_of[sample[e]];
            double value = a[e];
            int32_t on = value > 0;
            for (int64_t c = offsets[row]; c < offsets[row + 1]; c++) {
                sums[unit[c]] += value * z[c];
                counts[unit[c]] += on & (z[c] > threshold);
            }
        }
    }
}

/* The same for dense rows z [rows, n_units]; |z| <= threshold counts as 0. */
API void add_dense_pairs(const int64_t *starts, const int32_t *sample, const real *a, const int32_t *row_of, long first,
                         long last, const real *z, real threshold, long n_units, double *product, int32_t *both,
                          long threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (long i = first; i < last; i++) {
        double *restrict sums = product + (i - first) * n_units;
        int32_t *restrict counts = both + (i - first) * n_units;
        for (int64_t e = starts[i]; e < starts[i + 1]; e++) {
            const real *restrict row = z + (int64_t)row_of[sample[e]] * n_units;
            double value = a[e];
            int32_t on = value > 0;
            if (threshold > 0) {
#pragma omp simd
                for (long k = 0; k < n_units; k++) {
                    real size = row[k] < 0 ? -row[k] : row[k];
                    sums[k] += size > threshold ? value * row[k] : 0.0;
                    counts[k] += on & (row[k] > threshold);
                }
            } else {
#pragma omp simd
                for (long k = 0; k < n_units; k++) {
                    sums[k] += value * row[k];
                    counts[k] += on & (row[k] > 0);
                }
            }
        }
    }
}

/* found[m, c] = a[row of c, wanted[m, latent of c]] for each entry c of the codes; wanted -1 is never on. Row r of the
   codes is beside row acts_row[r] of the true activations. */
API void look_up(const int64_t *acts_offsets, const int64_t *feature, const real *a, const int64_t *acts_row,
                 const int64_t *offsets, const int64_t *latent, long n_rows, long n_features, const int64_t *wanted,
                 long n_wanted, long d_sae, real *found, long threads) {
    int64_t n_entries = offsets[n_rows];
#pragma omp parallel num_threads(threads)
    {
        real *table = calloc(n_features + 1, sizeof(real));
#pragma omp for schedule(static)
        for (long r = 0; r < n_rows; r++) {
            int64_t begin = acts_offsets[acts_row[r]], end = acts_offsets[acts_row[r] + 1];
            for (int64_t e = begin; e < end; e++) table[feature[e] + 1] = a[e];
            for (long m = 0; m < n_wanted; m++)
                for (int64_t c = offsets[r]; c < offsets[r + 1]; c++)
                    found[m * n_entries + c] = table[wanted[m * d_sae + latent[c]] + 1];
            for (int64_t e = begin; e < end; e++) table[feature[e] + 1] = 0;
        }
        free(table);
    }
}

static double surprise(double count, double n) { return count > 0 ? -(count / n) * log(count / n) : 0; }

static double entropy(double count, double n) { return surprise(count, n) + surprise(n - count, n); }

/* In nats, of two yes or no that are yes in `on` and `fires` of n samples, together in `both`. */
static double mutual_information(double both, double on, double fires, double n) {
    double joint = surprise(both, n) + surprise(on - both, n) + surprise(fires - both, n) +
                   surprise(n - on - fires + both, n);
    double found = entropy(on, n) + entropy(fires, n) - joint;
    return found > 0 ? found : 0;
}

/* What UnitScores keeps of each unit, raised by the features first..first + n_features - 1. `feature` holds their means,
   1 / sd, counts, means of being on and 1 / sd of that; `unit` likewise. Of a mutual information the bound
   log(1 + phi^2) is looked at first. */
API void score_units(const double *product, const int32_t *both, long n_features, long n_units, long first,
                     long n_samples, real floor, const double *feature, const double *unit, double *total, double *best,
                     double *spread, double *information, int64_t *best_feature, long threads) {
    enum { STRIP = 512 };
    const double *mean = unit, *isd = unit + n_units, *count = unit + 2 * n_units, *p = unit + 3 * n_units,
                 *p_isd = unit + 4 * n_units;
    double n = n_samples;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (long begin = 0; begin < n_units; begin += STRIP) {
        long width = n_units - begin < STRIP ? n_units - begin : STRIP;
        double share[STRIP], bound[STRIP], known[STRIP];
        for (long k = 0; k < width; k++) known[k] = expm1(information[begin + k]) * (1 - 1e-9) - 1e-15;
        for (long i = 0; i < n_features; i++) {
            const double *sums = product + i * n_units + begin;
            const int32_t *counts = both + i * n_units + begin;
            double own_mean = feature[i], own_isd = feature[n_features + i], on = feature[2 * n_features + i],
                   own_p = feature[3 * n_features + i], own_p_isd = feature[4 * n_features + i];
            int any = 0;
#pragma omp simd reduction(| : any)
            for (long k = 0; k < width; k++) {
                double r = (sums[k] / n - own_mean * mean[begin + k]) * own_isd * isd[begin + k];
                double phi = (counts[k] / n - own_p * p[begin + k]) * own_p_isd * p_isd[begin + k];
                share[k] = r * r - floor;
                bound[k] = phi * phi;
                any |= (share[k] > 0) | ((bound[k] > known[k]) & (bound[k] > 0));
            }
            if (!any) continue;
            for (long k = 0; k < width; k++) {
                long j = begin + k;
                if (share[k] > 0) {
                    total[j] += share[k];
                    spread[j] += share[k] * log(share[k]);
                    if (share[k] > best[j]) best[j] = share[k], best_feature[j] = first + i;
                }
                if (bound[k] > known[k] && bound[k] > 0) {
                    double found = mutual_information(counts[k], on, count[j], n);
                    if (found > information[j]) {
                        information[j] = found;
                        known[k] = expm1(found) * (1 - 1e-9) - 1e-15;
                    }
                }
            }
        }
    }
}

/* What CodeRecovery keeps of each latent, over the entries of a window: rows of `sums` are firings, sum z, sum z^2, with
   its own feature the sum a z and both, both with the nearest feature, and of samples that judge the threshold of f1_best
   firings above it and both. One thread: additions stay in order. */
API void add_matched(const int64_t *acts_offsets, const int64_t *feature, const real *a, const int64_t *acts_row,
                     const int64_t *offsets, const int64_t *latent, const real *z, long n_rows, long n_features,
                     long start, long chooses_every, real threshold, const int64_t *own, const int64_t *nearest,
                     long d_sae, double *sums, long threads) {
    (void)threads;
    real *table = calloc(n_features + 1, sizeof(real));
    double *fires = sums, *sum = sums + d_sae, *square = sums + 2 * d_sae, *product = sums + 3 * d_sae,
           *both = sums + 4 * d_sae, *both_nearest = sums + 5 * d_sae, *best_fires = sums + 6 * d_sae,
           *best_both = sums + 7 * d_sae;
    for (long r = 0; r < n_rows; r++) {
        int64_t begin = acts_offsets[acts_row[r]], end = acts_offsets[acts_row[r] + 1];
        int judges = (start + r) % chooses_every != 0;
        for (int64_t e = begin; e < end; e++) table[feature[e] + 1] = a[e];
        for (int64_t c = offsets[r]; c < offsets[r + 1]; c++) {
            int64_t j = latent[c];
            double value = z[c], with = table[own[j] + 1];
            int fire = value > 0, best = judges && z[c] > threshold;
            fires[j] += fire;
            sum[j] += value;
            square[j] += value * value;
            product[j] += with * value;
            both[j] += fire && with > 0;
            both_nearest[j] += fire && table[nearest[j] + 1] > 0;
            best_fires[j] += best;
            best_both[j] += best && with > 0;
        }
        for (int64_t e = begin; e < end; e++) table[feature[e] + 1] = 0;
    }
    free(table);
}
