// Maxima and sums of exponentials of the logits of a tile, by row and by column.
#pragma once
#include "affinity.cuh"

namespace drift::cuda {

// Adds (max, sum) of other logits to a running maximum and sum of exp(L − max).
template <class T> __device__ __forceinline__ void merge(T& max, T& sum, T other_max, T other_sum) {
    const T now = max > other_max ? max : other_max, shift = finite_shift<T>(now);
    sum = sum * std::exp(max - shift) + other_sum * std::exp(other_max - shift);
    max = now;
}

// Statistics of a tile's rows and columns, by warp: [2 of max, sum][warps across][ROWS], [2][warps down][COLS].
template <class T, int NT> struct TileStatistics {
    T row[2][4][ROWS], col[2][2][COLS<NT>];

    __device__ void put_rows(const Tile<T, NT>& logits) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            T max = -INF<T>, sum = 0;
#pragma unroll
            for (int c = 0; c < 2 * NT; ++c) max = fmax(max, logits.value[r][c]);
            max = max_over_row(max);
#pragma unroll
            for (int c = 0; c < 2 * NT; ++c) sum += std::exp(logits.value[r][c] - finite_shift<T>(max));
            sum = sum_over_row(sum);
            if (lane % 4 == 0) row[0][logits.warp_col()][logits.row(r)] = max, row[1][logits.warp_col()][logits.row(r)] = sum;
        }
    }
    __device__ void put_cols(const Tile<T, NT>& logits) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int c = 0; c < 2 * NT; ++c) {
            T max = -INF<T>, sum = 0;
#pragma unroll
            for (int r = 0; r < 4; ++r) max = fmax(max, logits.value[r][c]);
            max = max_over_col(max);
#pragma unroll
            for (int r = 0; r < 4; ++r) sum += std::exp(logits.value[r][c] - finite_shift<T>(max));
            sum = sum_over_col(sum);
            if (lane < 4) col[0][logits.warp_row()][logits.col(c)] = max, col[1][logits.warp_row()][logits.col(c)] = sum;
        }
    }
    __device__ void add_row(int i, T& max, T& sum) const {
        for (int w = 0; w < 4; ++w) merge(max, sum, row[0][w][i], row[1][w][i]);
    }
    __device__ void add_col(int j, T& max, T& sum) const {
        for (int w = 0; w < 2; ++w) merge(max, sum, col[0][w][j], col[1][w][j]);
    }
};

}  // namespace drift::cuda
