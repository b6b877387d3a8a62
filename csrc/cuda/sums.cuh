// Sums, maxima and minima over the threads of a block that share a tile's row or column, over its warps and over all of it.
#pragma once
#include "tile.cuh"

namespace drift::cuda {

// x combined with that of the lanes first, 2·first, … last away.
template <class T, class Combine> __device__ __forceinline__ T combine_lanes(T x, int first, int last, Combine combine) {
#pragma unroll
    for (int lanes = first; lanes <= last; lanes *= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, lanes));
    return x;
}
template <class T> __device__ __forceinline__ T sum_lanes(T x, int first, int last) {
    return combine_lanes(x, first, last, [](T a, T b) { return a + b; });
}
template <class T> __device__ __forceinline__ T max_lanes(T x, int first, int last) {
    return combine_lanes(x, first, last, [](T a, T b) { return fmax(a, b); });
}

// Within a warp 4 threads share a tile's row, 8 its columns.
template <class T> __device__ __forceinline__ T sum_over_row(T x) { return sum_lanes(x, 1, 2); }
template <class T> __device__ __forceinline__ T sum_over_col(T x) { return sum_lanes(x, 4, 16); }
template <class T> __device__ __forceinline__ T max_over_row(T x) { return max_lanes(x, 1, 2); }
template <class T> __device__ __forceinline__ T max_over_col(T x) { return max_lanes(x, 4, 16); }
template <class T> __device__ __forceinline__ T sum_over_warp(T x) { return sum_lanes(x, 1, 16); }
__device__ __forceinline__ float min_over_warp(float x) {
    return combine_lanes(x, 1, 16, [](float a, float b) { return fminf(a, b); });
}

// Row sums of a tile, one a thread's row: `sums` [4][ROWS] in shared memory, a line for every column of warps. After a
// __syncthreads, total_of_row(sums, i) is the sum of row i.
template <class T, int NT> __device__ __forceinline__ void put_row_sums(const T (&mine)[4], T* sums) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const T sum = sum_over_row(mine[r]);
        if (threadIdx.x % 4 == 0) sums[Tile<T, NT>::warp_col() * ROWS + Tile<T, NT>::row(r)] = sum;
    }
}
template <class T> __device__ __forceinline__ T total_of_row(const T* sums, int i) {
    return (sums[i] + sums[ROWS + i]) + (sums[2 * ROWS + i] + sums[3 * ROWS + i]);
}

// Σ of all threads' x, known to thread 0; `shared` has a double for every warp.
__device__ __forceinline__ double sum_over_block(double x, double* shared) {
    x = sum_over_warp(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    if (threadIdx.x != 0) return 0;
    for (int w = 1; w < WARPS; ++w) x += shared[w];
    return x;
}

}  // namespace drift::cuda
