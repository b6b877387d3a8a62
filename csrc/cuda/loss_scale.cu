// Phase 1 of form C's groups: Σ d·w and Σ w, and the distances kept.
//
//   group_scale     of every group at once
//   group_squares, scale_of_squares   in parts: squared distances in some dimensions, and their sums
#include "loss.cuh"
#include "means.cuh"

namespace drift::cuda {

namespace {

// Phase 1 of a group, as its pairs' squared distances come: Σ d·w, and the distances kept.
struct ScaleSums {
    const Targets& targets;
    float *kept, least, total = 0;
    __device__ ScaleSums(const Loss& p, const Targets& targets, int64_t g)
        : targets(targets), kept(p.kept ? p.kept + g * p.count(0) * targets.total : nullptr), least(float(p.least_distance)) {}

    __device__ __forceinline__ void add(int i, int j, float square) {
        const float d = distance_of(square, i, j, least);
        total += d * targets.weight[j];
        if (kept) kept[i * targets.total + j] = d;
    }
    __device__ __forceinline__ void finish(double* sums, double* shared) const {  // sums [2]: Σ d·w and Σ w
        float weight = 0;
        for (int j = threadIdx.x; j < targets.total; j += THREADS) weight += targets.weight[j];
        const double all = sum_over_block(total, shared), all_weight = sum_over_block(weight, shared);
        if (threadIdx.x == 0) sums[0] = all, sums[1] = all_weight;
    }
};

// Shared memory of the next three kernels.
struct ScaleLayout {
    static constexpr int SUMS = 0, STAGED = SUMS + 2 * WARPS, NORMS = STAGED + STAGE<float, GROUP_NT>, TARGETS = NORMS + ROWS + COLS<GROUP_NT>;
    static size_t bytes(const Loss& p) { return (TARGETS + Targets::size(p.targets())) * sizeof(float); }
};

// sums [G, 2].
__global__ void __launch_bounds__(THREADS, 1) group_scale(const __grid_constant__ Loss p, double* sums) {
    using At = ScaleLayout;
    float* shared = shared_as<float>();
    const Targets targets(p, blockIdx.x, shared + At::TARGETS);
    ScaleSums found(p, targets, blockIdx.x);
    find_squares(p, targets, Range{0, p.D}, shared + At::STAGED, shared + At::NORMS,
                 [&](int i, int j, float square) { found.add(i, j, square); });
    found.finish(sums + 2 * int64_t(blockIdx.x), shared_as<double>());
}

// squares [parts, G, N, targets].
__global__ void __launch_bounds__(THREADS, 1) group_squares(const __grid_constant__ Loss p, int parts, float* squares) {
    using At = ScaleLayout;
    float* shared = shared_as<float>();
    const Share share(p, parts);
    const Targets targets(p, share.group, shared + At::TARGETS);
    float* out = squares + (share.part * p.groups + share.group) * targets.N * targets.total;
    find_squares(p, targets, share.dims, shared + At::STAGED, shared + At::NORMS,
                 [&](int i, int j, float square) { out[i * targets.total + j] = square; });
}

// As group_scale, from squares [parts, G, N, targets].
__global__ void __launch_bounds__(THREADS) scale_of_squares(const __grid_constant__ Loss p, int parts, const float* squares, double* sums) {
    const Targets targets(p, blockIdx.x, shared_as<float>() + ScaleLayout::TARGETS);
    ScaleSums found(p, targets, blockIdx.x);
    const int M = targets.total, pairs = targets.N * M;
    for (int n = threadIdx.x; n < pairs; n += THREADS) {
        float square = 0;
        for (int part = 0; part < parts; ++part) square += squares[(part * p.groups + blockIdx.x) * pairs + n];
        found.add(n / M, n % M, square);
    }
    found.finish(sums + 2 * int64_t(blockIdx.x), shared_as<double>());
}

}  // namespace

int64_t loss_scale(const Loss& p, double* means, double* memory, Device device) {
    const OnDevice guard(device);
    const int parts = parts_of_group(p, device);
    const int64_t N = p.count(0), M = p.targets();
    Scratch scratch{memory};
    double* sums = scratch.take<double>(2 * p.groups);
    float* squares = scratch.take<float>(parts > 1 ? parts * p.groups * N * M : 0);
    if (!memory) return scratch.doubles;
    const size_t shared = ScaleLayout::bytes(p);
    if (parts > 1) {
        launch("group_squares", group_squares, device, p.groups * parts, shared, p, parts, squares);
        launch("scale_of_squares", scale_of_squares, device, p.groups, shared, p, parts, squares, sums);
    } else {
        launch("group_scale", group_scale, device, p.groups, shared, p, sums);
    }
    launch_finish_means(sums, p.groups, double(p.groups) * N * M, double(p.groups) * M, means, device);
    return scratch.doubles;
}

}  // namespace drift::cuda
