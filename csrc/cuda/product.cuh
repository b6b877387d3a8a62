// Matrix products of one block of threads: operands go through shared memory in chunks of the depth, the result stays
// in registers. float uses the tensor cores (TF32, or 3xTF32: each factor as the sum of two TF32 numbers, which keeps
// float32's precision), double the ordinary units; both leave the same elements with the same threads.
//
// A tile of the result has 64 rows × 32·NT columns. Its 8 warps lie 2 × 4 on it, each on 32 rows × 8·NT columns.
#pragma once
#include "launch.cuh"

namespace drift::cuda {

constexpr int ROWS = 64;
template <class T> constexpr int COLUMN_TILES = sizeof(T) == 4 ? 4 : 2;  // NT of the kernels of forms A and B
template <int NT> constexpr int COLS = 32 * NT;
template <class T> constexpr int VECTOR = 16 / sizeof(T);     // elements a 16-byte access moves
template <class T> constexpr int CHUNK = 8 * VECTOR<T>;       // depth staged at once
template <class T> constexpr int CHUNK_LD = CHUNK<T> + VECTOR<T>;  // leading dimension that spreads rows over the banks
template <class T, int NT> constexpr int STRIP_LD = COLS<NT> + VECTOR<T>;  // of a tile in shared memory, likewise
template <class T, int NT> constexpr int VALUES_LD = COLS<NT> + 8;

// Elements of shared memory that products want.
template <class T, int NT>
constexpr int STAGE = std::max((ROWS + COLS<NT>)*CHUNK_LD<T>, CHUNK<T>* VALUES_LD<T, NT>);

// The elements of a tile that a thread holds: rows row(0…3) × columns col(0…2·NT−1).
template <class T, int NT> struct Tile {
    T value[4][2 * NT];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int c = 0; c < 2 * NT; ++c) value[r][c] = 0;
    }
    __device__ __forceinline__ void operator+=(const Tile& other) {
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int c = 0; c < 2 * NT; ++c) value[r][c] += other.value[r][c];
    }
    static __device__ __forceinline__ int warp_row() { return threadIdx.x / 32 % 2; }
    static __device__ __forceinline__ int warp_col() { return threadIdx.x / 64; }
    static __device__ __forceinline__ int row(int r) { return 32 * warp_row() + threadIdx.x % 32 / 4 + 8 * r; }
    static __device__ __forceinline__ int col(int c) { return 8 * NT * warp_col() + c / 2 * 8 + threadIdx.x % 4 * 2 + c % 2; }
};

// Row n of a matrix with `depth` contiguous columns; null past the last.
template <class T> struct Matrix {
    const T* first;
    int count;
    int64_t depth;
    __device__ __forceinline__ const T* operator()(int n) const { return n < count ? first + n * depth : nullptr; }
};

__device__ __forceinline__ bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class T> struct alignas(16) Vector {
    T value[VECTOR<T>];
};

// Columns [at, at + VECTOR) of a row (null: zeros), minus those of `centre` unless it is null; zeros from `depth` on.
template <class T> __device__ __forceinline__ Vector<T> load(const T* row, const T* centre, int64_t at, int64_t depth) {
    Vector<T> x{};
    if (!row || at >= depth) return x;
    if (depth % VECTOR<T> == 0 && aligned(row)) {
        x = *reinterpret_cast<const Vector<T>*>(row + at);
        if (centre)
#pragma unroll
            for (int e = 0; e < VECTOR<T>; ++e) x.value[e] -= centre[at + e];
        return x;
    }
#pragma unroll
    for (int e = 0; e < VECTOR<T>; ++e)
        if (at + e < depth) x.value[e] = row[at + e] - (centre ? centre[at + e] : T(0));
    return x;
}

// COUNT rows × `WIDTH` columns on their way to shared memory, held by the block's registers meanwhile.
template <class T, int COUNT, int WIDTH> struct Fetched {
    static constexpr int EACH = WIDTH / VECTOR<T>, N = COUNT * EACH / THREADS;
    static_assert(COUNT * EACH % THREADS == 0);
    Vector<T> held[N];

    template <class Rows> __device__ __forceinline__ void fetch(const Rows& rows, int first, const T* centre, int64_t at, int64_t depth) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int index = threadIdx.x + n * THREADS;
            held[n] = load<T>(rows(first + index / EACH), centre, at + index % EACH * VECTOR<T>, depth);
        }
    }
    __device__ __forceinline__ void put(T* shared, int ld) const {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int index = threadIdx.x + n * THREADS;
            *reinterpret_cast<Vector<T>*>(shared + index / EACH * ld + index % EACH * VECTOR<T>) = held[n];
        }
    }
};

#ifdef __CUDACC__
// c[16×8] += a[16×8] · b[8×8] of a warp; of the operands, the bits that TF32 lacks are ignored.
__device__ __forceinline__ void mma_tf32(float& c0, float& c1, float& c2, float& c3, const float (&a)[4], const float (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
          "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
#endif

// The nearest TF32 number (Veltkamp's splitting): three operations of the float units, where the conversion takes more.
__device__ __forceinline__ float to_tf32(float x) {
    const float scaled = __fmul_rn(x, 8193);  // 2^13 + 1
    return __fsub_rn(scaled, __fsub_rn(scaled, x));
}

template <int COUNT> struct Tf32 {
    float big[COUNT], small[COUNT];  // x = big + small; a TF32 number holds all of `small` but half its last bit
    __device__ __forceinline__ void set(int n, float x) {
        big[n] = to_tf32(x);
        small[n] = x - big[n];
    }
};

// tile += X·Yᵀ over one staged chunk. X [64][x_ld] holds rows; Y holds rows of the right-hand side ([columns][y_ld]), or,
// with BY_DEPTH, its transpose ([depth][y_ld]).
template <bool BY_DEPTH, bool SPLIT, int NT>
__device__ __forceinline__ void multiply_tf32(Tile<float, NT>& tile, const float* X, int x_ld, const float* Y, int y_ld) {
    const int lane = threadIdx.x % 32, quad = lane / 4, in_quad = lane % 4;
    const float* x = X + (32 * tile.warp_row() + quad) * x_ld + in_quad;
    const int col = 8 * NT * tile.warp_col() + quad;
    const float* y = BY_DEPTH ? Y + in_quad * y_ld + col : Y + col * y_ld + in_quad;
    const int y_deeper = BY_DEPTH ? y_ld : 1, y_right = BY_DEPTH ? 8 : 8 * y_ld;
#pragma unroll 1
    for (int k = 0; k < CHUNK<float>; k += 8) {
        Tile<float, NT> of_step;  // tensor cores truncate every sum: long ones are added up outside them
        Tile<float, NT>& sums = SPLIT ? of_step : tile;
        if (SPLIT) of_step.clear();
        Tf32<4> a[2];
        Tf32<2> b[NT];
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int e = 0; e < 4; ++e) a[m].set(e, x[(16 * m + e % 2 * 8) * x_ld + k + e / 2 * 4]);
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) b[n].set(e, y[(k + 4 * e) * y_deeper + n * y_right]);
        // neighbours in this order do not wait for each other's sums
#pragma unroll
        for (int pass = SPLIT ? 0 : 2; pass < 3; ++pass)
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int m = 0; m < 2; ++m)
                    mma_tf32(sums.value[2 * m][2 * n], sums.value[2 * m][2 * n + 1], sums.value[2 * m + 1][2 * n],
                             sums.value[2 * m + 1][2 * n + 1], pass == 0 ? a[m].small : a[m].big, pass == 1 ? b[n].small : b[n].big);
        if (SPLIT) tile += of_step;
    }
}

template <bool BY_DEPTH, int NT>
__device__ __forceinline__ void multiply(Tile<float, NT>& tile, const float* X, int x_ld, const float* Y, int y_ld, bool split) {
    if (split)
        multiply_tf32<BY_DEPTH, true>(tile, X, x_ld, Y, y_ld);
    else
        multiply_tf32<BY_DEPTH, false>(tile, X, x_ld, Y, y_ld);
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

template <bool BY_DEPTH, int NT>
__device__ __forceinline__ void multiply(Tile<double, NT>& tile, const double* X, int x_ld, const double* Y, int y_ld, bool) {
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

// tile = X·Yᵀ, or with `differences` Σ (x − y)², of rows 0… of X and y_first… of Y minus `centre` (null: 0); on_chunk sees
// what is fetched of both.
template <class T, int NT, class X, class Y, class OnChunk>
__device__ __forceinline__ void product_of_rows(Tile<T, NT>& tile, const X& x, const Y& y, int y_first, int64_t depth, const T* centre,
                                                bool differences, bool split, T* stage, OnChunk on_chunk) {
    T *x_stage = stage, *y_stage = stage + ROWS * CHUNK_LD<T>;
    Fetched<T, ROWS, CHUNK<T>> x_next;
    Fetched<T, COLS<NT>, CHUNK<T>> y_next;
    tile.clear();
    x_next.fetch(x, 0, centre, 0, depth);
    y_next.fetch(y, y_first, centre, 0, depth);
    for (int64_t at = 0; at < depth; at += CHUNK<T>) {
        __syncthreads();  // everyone is done with the previous chunk
        x_next.put(x_stage, CHUNK_LD<T>);
        y_next.put(y_stage, CHUNK_LD<T>);
        on_chunk(x_next, y_next);
        __syncthreads();
        if (at + CHUNK<T> < depth) {
            x_next.fetch(x, 0, centre, at + CHUNK<T>, depth);
            y_next.fetch(y, y_first, centre, at + CHUNK<T>, depth);
        }
        if (differences)
            accumulate<false>(tile, x_stage, CHUNK_LD<T>, y_stage, CHUNK_LD<T>, [](T a, T b) { return (a - b) * (a - b); });
        else
            multiply<false>(tile, x_stage, CHUNK_LD<T>, y_stage, CHUNK_LD<T>, split);
    }
}

template <class T, int NT>
__device__ __forceinline__ void product_of_rows(Tile<T, NT>& tile, const Matrix<T>& x, const Matrix<T>& y, bool differences, bool split, T* stage) {
    product_of_rows(tile, x, y, 0, x.depth, static_cast<const T*>(nullptr), differences, split, stage, [](const auto&, const auto&) {});
}

// tile[r] += strip[r] · V for each of `strips` strips: V has `count` rows of which columns [at, at + COLS) are wanted, minus
// those of `centre`. Strip r is at strip + r·strip_size, [64][strip_ld]; its columns from `count` to a multiple of CHUNK are 0.
template <class T, int NT, int STRIPS, class V>
__device__ __forceinline__ void product_with_strips(Tile<T, NT> (&tile)[STRIPS], int strips, const T* strip, int strip_size, int strip_ld,
                                                    const V& values, int count, int64_t at, int64_t depth, const T* centre, bool split,
                                                    T* stage) {
    Fetched<T, CHUNK<T>, COLS<NT>> next;
    next.fetch(values, 0, centre, at, depth);
    for (int j = 0; j < count; j += CHUNK<T>) {
        __syncthreads();
        next.put(stage, VALUES_LD<T, NT>);
        __syncthreads();
        if (j + CHUNK<T> < count) next.fetch(values, j + CHUNK<T>, centre, at, depth);
#pragma unroll
        for (int r = 0; r < STRIPS; ++r)
            if (r < strips) multiply<true>(tile[r], strip + r * strip_size + j, strip_ld, stage, VALUES_LD<T, NT>, split);
    }
}

}  // namespace drift::cuda
