// The coefficients of a group's forces, from its distances in shared memory: what phases 2 and 3 begin with.
#pragma once
#include "loss.cuh"

namespace drift::cuda {

// Shared memory of a block: a place to stage products, `strips` matrices [64][ld] of which the last holds the distances (its
// predecessors are free while distances are found, and the stage extends into them), statistics.
struct Layout {
    int M, ld, strips, widths;
    __host__ __device__ Layout(int M, int widths, int strips) : M(M), ld((M + 31) / 32 * 32 + 4), strips(strips), widths(widths) {}
    __host__ __device__ int first_strip() const {
        const int others = (strips - 1) * ROWS * ld, least = VALUES_STAGE<float, 4>;
        return others + least < STAGE<float, GROUP_NT> ? STAGE<float, GROUP_NT> - others : least;
    }
    __host__ __device__ int statistics() const { return first_strip() + strips * ROWS * ld; }
    __host__ __device__ int targets() const { return statistics() + ROWS + COLS<GROUP_NT>; }
    __host__ __device__ int coefficients() const { return targets() + Targets::size(M); }
    __host__ __device__ size_t bytes() const { return (coefficients() + (2 + widths) * ROWS + (1 + widths) * M) * sizeof(float); }
};

// The coefficients c of a group. δ·scale is the distance, with 100 scales on the self pairs; the maximum of a row's logits is at
// its least δ whatever R, so one minimum a row and a column serves every R.
template <int R> struct Coefficients {
    const Loss& p;
    const Targets& targets;
    const Layout layout;
    const float *d, unit, of_self, inverse_unit, least;  // unit: of distances; the inverse one: of coordinates
    float *row_min, *row_total, *row_factor, *col_min, *col_factor;  // [64], [64], [R, 64], [M], [R, M]
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, N, M;

    __device__ Coefficients(const Loss& p, const Targets& targets, const Layout& layout, float* shared)
        : p(p), targets(targets), layout(layout), d(shared + layout.first_strip() + (layout.strips - 1) * ROWS * layout.ld),
          unit(fmaxf(float(*p.scale), float(p.least_scale))), of_self(float(p.self_distance) * unit),
          inverse_unit(1 / fmaxf(float(*p.scale / std::sqrt(double(p.D))), float(p.least_scale))), least(std::sqrt(float(p.floor))),
          row_min(shared + layout.coefficients()), row_total(row_min + ROWS), row_factor(row_total + ROWS),
          col_min(row_factor + R * ROWS), col_factor(col_min + layout.M), N(p.count(0)), M(layout.M) {}

    __device__ __forceinline__ float distance(int i, int j) const {
        return d[i * layout.ld + j] + (i == j ? of_self : 0.0f);
    }
    struct Rates {
        float of[R];
        __device__ __forceinline__ Rates(const Coefficients& c) {
#pragma unroll
            for (int r = 0; r < R; ++r) of[r] = 1 / (float(c.p.R[r]) * c.unit);
        }
    };
    static __device__ __forceinline__ void add_exponentials(float (&sum)[R], float difference, const Rates& rate) {
#pragma unroll
        for (int r = 0; r < R; ++r) sum[r] += std::exp(difference * rate.of[r]);
    }

    // After this and a __syncthreads, all but `d` is known.
    __device__ void find_statistics() const {
        const Rates rate(*this);
        for (int i = warp; i < N; i += THREADS / 32) {
            float min = INF<float>, total = 0, sum[R] = {};
            for (int j = lane; j < M; j += 32) min = fminf(min, distance(i, j)), total += d[i * layout.ld + j];
            min = min_over_warp(min), total = sum_over_warp(total);
            for (int j = lane; j < M; j += 32) add_exponentials(sum, min - distance(i, j), rate);
#pragma unroll
            for (int r = 0; r < R; ++r) row_factor[r * ROWS + i] = 1 / std::sqrt(sum_over_warp(sum[r]));
            row_min[i] = min, row_total[i] = total;  // all lanes agree
        }
        for (int j = threadIdx.x; j < M; j += THREADS) {
            float min = INF<float>, sum[R] = {};
            for (int i = 0; i < N; ++i) min = fminf(min, distance(i, j));
            for (int i = 0; i < N; ++i) add_exponentials(sum, min - distance(i, j), rate);
#pragma unroll
            for (int r = 0; r < R; ++r) col_factor[r * M + j] = 1 / std::sqrt(sum[r]);
            col_min[j] = min;
        }
    }

    // The sample nearest to all targets together: an origin that a few far outliers do not move away from the rest.
    __device__ const float* medoid() const {
        int best = 0;
        float least_total = row_total[0];
        for (int i = 1; i < N; ++i) {
            const float total = row_total[i];
            if (total < least_total) best = i, least_total = total;
        }
        return targets(best);
    }

    // w_j A_ij of every R.
    __device__ __forceinline__ void weighted_affinities(float (&A)[R], int i, int j, const Rates& rate) const {
        const float difference = (row_min[i] + col_min[j]) * 0.5f - distance(i, j), weight = targets.weight[j];
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const float value = std::exp(difference * rate.of[r]) * (row_factor[r * ROWS + i] * col_factor[r * M + j]);
            A[r] = (value < least ? least : value) * weight;
        }
    }

    // Calls body(i, j, c_ij / s of every R) for all pairs; a warp has a row, and a pair's distance is not read after its call.
    template <class Body> __device__ __forceinline__ void for_pairs(Body body) const {
        const int split = p.count(0) + p.count(1);
        const Rates rate(*this);
        float A[R];
        for (int i = warp; i < N; i += THREADS / 32) {
            float negative[R] = {}, positive[R] = {};
            for (int j = lane; j < M; j += 32) {
                weighted_affinities(A, i, j, rate);
#pragma unroll
                for (int r = 0; r < R; ++r) negative[r] += j < split ? A[r] : 0, positive[r] += j < split ? 0 : A[r];
            }
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const float of_negatives = -sum_over_warp(positive[r]) * inverse_unit;
                positive[r] = sum_over_warp(negative[r]) * inverse_unit, negative[r] = of_negatives;
            }
            for (int j = lane; j < M; j += 32) {
                weighted_affinities(A, i, j, rate);
#pragma unroll
                for (int r = 0; r < R; ++r) A[r] *= j < split ? negative[r] : positive[r];
                body(i, j, A);
            }
        }
    }
};

// Distances of group g into the last strip, and the statistics. Afterwards the strips before it are zero.
template <int R>
__device__ __forceinline__ void prepare(const Loss& p, int64_t g, const Targets& targets, const Layout& layout, float* shared,
                                        const Coefficients<R>& c) {
    float* strips = shared + layout.first_strip();
    float* d = strips + (layout.strips - 1) * ROWS * layout.ld;
    for (int n = threadIdx.x; n < ROWS * layout.ld; n += THREADS) d[n] = 0;  // beyond the pairs, too
    __syncthreads();
    if (p.kept) {
        const int N = p.count(0), M = layout.M;
        const float* kept = p.kept + g * N * M;
        for (int i = threadIdx.x / 32; i < N; i += THREADS / 32)
            for (int j = threadIdx.x % 32; j < M; j += 32) d[i * layout.ld + j] = kept[i * M + j];
    } else {
        const float least = float(p.least_distance);
        find_squares(p, targets, Range{0, p.D}, shared, shared + layout.statistics(),
                     [&](int i, int j, float square) { d[i * layout.ld + j] = distance_of(square, i, j, least); });
    }
    __syncthreads();
    c.find_statistics();
    for (int n = threadIdx.x; n < (layout.strips - 1) * ROWS * layout.ld; n += THREADS) strips[n] = 0;
    __syncthreads();
}

// Calls body(std::integral_constant<int, widths>()).
template <int R = 1, class Body> void with_widths(int widths, Body body) {
    if constexpr (R < MAX_LOSS_WIDTHS)
        if (widths != R) return with_widths<R + 1>(widths, body);
    body(std::integral_constant<int, R>());
}

}  // namespace drift::cuda
