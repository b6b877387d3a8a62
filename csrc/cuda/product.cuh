// Matrix products of one block of threads: operands go through shared memory in chunks of the depth, the result stays
// in registers. float uses the tensor cores, in halves (see halves.cuh), double the ordinary units; both leave the same
// elements with the same threads.
#pragma once
#include "tile.cuh"

namespace drift::cuda {

// tile += scale·X·Yᵀ over one staged chunk, the scale that of a row. X [64][x_ld] holds rows; Y holds rows of the right-hand side
// ([columns][y_ld]), or, with BY_DEPTH, its transpose ([depth][y_ld]).
template <bool BY_DEPTH, bool SPLIT, int NT, class ScaleOf>
__device__ __forceinline__ void multiply_halves(Tile<float, NT>& tile, const float* X, int x_ld, const float* Y, int y_ld,
                                                ScaleOf scale_of) {
    constexpr int LOW = BLOCK_OF_HALVES;
    const int lane = threadIdx.x % 32, col = 8 * NT * tile.warp_col();
    const float* x = X + (32 * tile.warp_row() + lane % 16) * x_ld;
    const float* y = BY_DEPTH ? Y + lane % 16 * y_ld : Y + (col + lane % 8) * y_ld;
    Tile<float, NT> of_chunk;  // tensor cores truncate every sum: long ones are added up outside them
    of_chunk.fill(0);
#pragma unroll 1
    for (int k = 0; k < CHUNK<float>; k += 16) {
        unsigned a_big[2][4], a_small[2][4], b[NT][4];  // b: two of the high parts, two of the low ones
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            const __half* at = half_of(x + 16 * m * x_ld, k) + lane / 16 * 8;
            load_matrices<false>(a_big[m], at);
            if (SPLIT) load_matrices<false>(a_small[m], at + LOW);
        }
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const __half* at = BY_DEPTH ? half_of(y + k * y_ld, col + 8 * n) : half_of(y + 8 * n * y_ld, k) + lane / 8 % 2 * 8;
            load_matrices<BY_DEPTH>(b[n], at + lane / 16 * LOW);
        }
        // neighbours in this order do not wait for each other's sums
#pragma unroll
        for (int pass = SPLIT ? 0 : 2; pass < 3; ++pass)
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int m = 0; m < 2; ++m)
                    mma_halves(of_chunk.value[2 * m][2 * n], of_chunk.value[2 * m][2 * n + 1], of_chunk.value[2 * m + 1][2 * n],
                               of_chunk.value[2 * m + 1][2 * n + 1], pass == 0 ? a_small[m] : a_big[m], pass == 1 ? b[n] + 2 : b[n]);
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const float scale = scale_of(tile.row(r));
#pragma unroll
        for (int c = 0; c < 2 * NT; ++c) tile.value[r][c] = std::fma(of_chunk.value[r][c], scale, tile.value[r][c]);
    }
}

template <bool BY_DEPTH, int NT, class ScaleOf>
__device__ __forceinline__ void multiply(Tile<float, NT>& tile, const float* X, int x_ld, const float* Y, int y_ld, ScaleOf scale_of,
                                         bool split) {
    if (split)
        multiply_halves<BY_DEPTH, true>(tile, X, x_ld, Y, y_ld, scale_of);
    else
        multiply_halves<BY_DEPTH, false>(tile, X, x_ld, Y, y_ld, scale_of);
}

// tile += combine(x, y) summed over one staged chunk, on the ordinary units.
template <bool BY_DEPTH, class T, int NT, class Combine>
__device__ __forceinline__ void accumulate(Tile<T, NT>& tile, const T* X, int x_ld, const T* Y, int y_ld, Combine combine) {
#pragma unroll 2
    for (int k = 0; k < CHUNK<T>; ++k) {
        T x[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) x[r] = X[tile.row(r) * x_ld + k];
#pragma unroll
        for (int c = 0; c < 2 * NT; ++c) {
            const T y = BY_DEPTH ? Y[k * y_ld + tile.col(c)] : Y[tile.col(c) * y_ld + k];
#pragma unroll
            for (int r = 0; r < 4; ++r) tile.value[r][c] += combine(x[r], y);
        }
    }
}

template <bool BY_DEPTH, int NT, class ScaleOf>
__device__ __forceinline__ void multiply(Tile<double, NT>& tile, const double* X, int x_ld, const double* Y, int y_ld, ScaleOf, bool) {
    accumulate<BY_DEPTH>(tile, X, x_ld, Y, y_ld, [](double x, double y) { return x * y; });
}

// Squared norms of the rows that pass through a Fetched.
template <int N> struct RowNorms {
    float sum[N] = {};
    template <class F> __device__ __forceinline__ void add(const F& fetched) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            float of_vector = 0;
#pragma unroll
            for (int e = 0; e < VECTOR<float>; ++e) of_vector += fetched.held[n].value[e] * fetched.held[n].value[e];
            sum[n] += of_vector;
        }
    }
    __device__ __forceinline__ void put(float* norms) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            for (int lanes = 1; lanes < 8; lanes *= 2) sum[n] += __shfl_xor_sync(0xffffffffu, sum[n], lanes);
            if (threadIdx.x % 8 == 0) norms[(threadIdx.x + n * THREADS) / 8] = sum[n];
        }
    }
};

// tile = X·Yᵀ, or with `differences` Σ (x − y)², of rows 0… of X and y_first… of Y minus `centre` (null: 0), in the dimensions
// of a range; on_chunk sees what is fetched of both.
template <class T, int NT, class X, class Y, class OnChunk>
__device__ __forceinline__ void product_of_rows(Tile<T, NT>& tile, const X& x, const Y& y, int y_first, Range dims, const T* centre,
                                                bool differences, bool split, T* stage, OnChunk on_chunk) {
    T *x_maxima = stage, *y_maxima = stage + WARPS, *x_stage = stage + MAXIMA, *y_stage = x_stage + ROWS * CHUNK_LD<T>;
    Fetched<T, ROWS, CHUNK<T>> x_next;
    Fetched<T, COLS<NT>, CHUNK<T>> y_next;
    tile.fill(0);
    x_next.fetch(x, 0, centre, dims.begin, dims.end);
    y_next.fetch(y, y_first, centre, dims.begin, dims.end);
    for (int64_t at = dims.begin; at < dims.end; at += CHUNK<T>) {
        T scale = 1;
        x_next.subtract_origin(), y_next.subtract_origin();
        x_next.put_maxima(x_maxima), y_next.put_maxima(y_maxima);
        __syncthreads();  // the maxima are there, and everyone is done with the previous chunk
        if (differences)
            x_next.put(x_stage, CHUNK_LD<T>), y_next.put(y_stage, CHUNK_LD<T>);
        else
            scale = x_next.put_operand(x_stage, CHUNK_LD<T>, x_maxima) * y_next.put_operand(y_stage, CHUNK_LD<T>, y_maxima);
        on_chunk(x_next, y_next);
        __syncthreads();
        if (at + CHUNK<T> < dims.end) {
            x_next.fetch(x, 0, centre, at + CHUNK<T>, dims.end);
            y_next.fetch(y, y_first, centre, at + CHUNK<T>, dims.end);
        }
        if (differences)
            accumulate<false>(tile, x_stage, CHUNK_LD<T>, y_stage, CHUNK_LD<T>, [](T a, T b) { return (a - b) * (a - b); });
        else
            multiply<false>(tile, x_stage, CHUNK_LD<T>, y_stage, CHUNK_LD<T>, [=](int) { return scale; }, split);
    }
}

template <class T, int NT>
__device__ __forceinline__ void product_of_rows(Tile<T, NT>& tile, const Matrix<T>& x, const Matrix<T>& y, bool differences, bool split, T* stage) {
    product_of_rows(tile, x, y, 0, Range{0, x.depth}, static_cast<const T*>(nullptr), differences, split, stage, [](const auto&, const auto&) {});
}

// A strip [64][ld] of shared memory as an operand of `multiply`, to be followed by a __syncthreads; what undoes the scaling of
// a row lies behind its columns.
__device__ __forceinline__ void split_strip(float* strip, int ld) { split_rows(strip, ROWS, ld, ld - VECTOR<float>); }
__device__ __forceinline__ void split_strip(double*, int) {}
__device__ __forceinline__ float row_scale(const float* strip, int ld, int row) { return strip[row * ld + ld - VECTOR<float>]; }
__device__ __forceinline__ double row_scale(const double*, int, int) { return 1; }

// tile[r] += strip[r] · V for each strip: V has `count` rows of which columns [at, at + COLS) are wanted, minus
// those of `centre`. Strip r is at strip + r·strip_size, [64][strip_ld], float ones after split_strip; its columns from
// `count` to a multiple of CHUNK are 0.
template <class T, int NT, int STRIPS, class V>
__device__ __forceinline__ void product_with_strips(Tile<T, NT> (&tile)[STRIPS], const T* strip, int strip_size, int strip_ld,
                                                    const V& values, int count, int64_t at, int64_t depth, const T* centre, bool split,
                                                    T* stage) {
    T *maxima = stage, *value_stage = stage + MAXIMA;
    Fetched<T, CHUNK<T>, COLS<NT>> next;
    next.fetch(values, 0, centre, at, depth);
    for (int j = 0; j < count; j += CHUNK<T>) {
        next.subtract_origin();
        next.put_maxima(maxima);
        __syncthreads();  // the maxima are there, and everyone is done with the previous chunk
        const T scale = next.put_operand(value_stage, VALUES_LD<T, NT>, maxima);
        __syncthreads();
        if (j + CHUNK<T> < count) next.fetch(values, j + CHUNK<T>, centre, at, depth);
#pragma unroll
        for (int r = 0; r < STRIPS; ++r) {
            const T* of_strip = strip + r * strip_size;
            const auto scale_of = [=](int row) { return scale * row_scale(of_strip, strip_ld, row); };
            multiply<true>(tile[r], of_strip + j, strip_ld, value_stage, VALUES_LD<T, NT>, scale_of, split);
        }
    }
}

}  // namespace drift::cuda
