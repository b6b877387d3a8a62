// The end of form C's phase 1, whoever found the sums.
#pragma once
#include "sums.cuh"

namespace drift::cuda {

// means[0] = Σ_part parts[part, 0] / pairs, means[1] = Σ_part parts[part, 1] / targets; one block.
static __global__ void __launch_bounds__(THREADS) finish_means(const double* parts, int64_t count, double pairs, double targets, double* means) {
    double* shared = shared_as<double>();
    double sum[2] = {};
    for (int64_t n = threadIdx.x; n < count; n += THREADS) sum[0] += parts[2 * n], sum[1] += parts[2 * n + 1];
    const double total = sum_over_block(sum[0], shared), weight = sum_over_block(sum[1], shared);
    if (threadIdx.x == 0) means[0] = total / pairs, means[1] = weight / targets;
}

inline void launch_finish_means(const double* parts, int64_t count, double pairs, double targets, double* means, Device device) {
    launch("finish_means", finish_means, device, 1, WARPS * sizeof(double), parts, count, pairs, targets, means);
}

}  // namespace drift::cuda
