// Tiles that a block of threads holds in its registers, and how rows of memory become operands of products (product.cuh).
//
// A tile has 64 rows × 32·NT columns. The block's 8 warps lie 2 × 4 on it, each on 32 rows × 8·NT columns.
#pragma once
#include "halves.cuh"

namespace drift::cuda {

constexpr int ROWS = 64;
template <class T> constexpr int COLUMN_TILES = sizeof(T) == 4 ? 4 : 2;  // NT of the kernels of forms A and B
template <int NT> constexpr int COLS = 32 * NT;
template <class T> constexpr int VECTOR = 16 / sizeof(T);     // elements a 16-byte access moves
template <class T> constexpr int CHUNK = 8 * VECTOR<T>;       // depth staged at once
static_assert(CHUNK<float> == BLOCK_OF_HALVES);
template <class T> constexpr int CHUNK_LD = CHUNK<T> + VECTOR<T>;  // leading dimension that spreads rows over the banks
template <class T, int NT> constexpr int STRIP_LD = COLS<NT> + VECTOR<T>;  // of a tile in shared memory, likewise
template <class T, int NT> constexpr int VALUES_LD = COLS<NT> + (sizeof(T) == 4 ? 4 : 8);

// Elements of shared memory that products want: the largest of each warp's operands, a chunk of both operands.
constexpr int MAXIMA = 2 * WARPS;
template <class T, int NT> constexpr int VALUES_STAGE = MAXIMA + CHUNK<T>* VALUES_LD<T, NT>;  // one operand lies elsewhere
template <class T, int NT> constexpr int STAGE = std::max(MAXIMA + (ROWS + COLS<NT>)*CHUNK_LD<T>, VALUES_STAGE<T, NT>);

// The elements of a tile that a thread holds: rows row(0…3) × columns col(0…2·NT−1).
template <class T, int NT> struct Tile {
    T value[4][2 * NT];

    template <class Body> static __device__ __forceinline__ void for_each(Body body) {  // body(r, c)
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int c = 0; c < 2 * NT; ++c) body(r, c);
    }
    __device__ __forceinline__ void fill(T x) {
        for_each([&](int r, int c) { value[r][c] = x; });
    }
    static __device__ __forceinline__ int warp_row() { return threadIdx.x / 32 % 2; }
    static __device__ __forceinline__ int warp_col() { return threadIdx.x / 64; }
    static __device__ __forceinline__ int row(int r) { return 32 * warp_row() + threadIdx.x % 32 / 4 + 8 * r; }
    static __device__ __forceinline__ int col(int c) { return 8 * NT * warp_col() + c / 2 * 8 + threadIdx.x % 4 * 2 + c % 2; }
};

// Part `part` of `parts` of [begin, end), none of them empty as long as parts <= end - begin.
struct Range {
    int64_t begin, end;
    __host__ __device__ Range part(int64_t n, int64_t parts) const {
        return {begin + (end - begin) * n / parts, begin + (end - begin) * (n + 1) / parts};
    }
};

__device__ __forceinline__ bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Row n of a contiguous matrix with `depth` columns; the last row for any past it, which spares `fetch` branches.
template <class T> struct Matrix {
    const T* first;
    int count;
    int64_t depth;
    __device__ __forceinline__ const T* operator()(int n) const { return first + std::min(n, count - 1) * depth; }
    __device__ __forceinline__ bool in_vectors() const { return depth % VECTOR<T> == 0 && aligned(first); }
};

template <class T> struct alignas(16) Vector {
    T value[VECTOR<T>];
};

// COUNT rows × `WIDTH` columns on their way to shared memory, held by the block's registers meanwhile.
template <class T, int COUNT, int WIDTH> struct Fetched {
    static constexpr int EACH = WIDTH / VECTOR<T>, N = COUNT * EACH / THREADS;
    static_assert(COUNT * EACH % THREADS == 0 && THREADS % EACH == 0);
    Vector<T> held[N], origin;

    // Columns at… of rows first…, and of `centre` unless it is null; zeros from `end` on.
    template <class Rows> __device__ __forceinline__ void fetch(const Rows& rows, int first, const T* centre, int64_t at, int64_t end) {
        const int64_t column = at + threadIdx.x % EACH * VECTOR<T>;
        first += threadIdx.x / EACH;
        origin = {};
        if (column < end && rows.in_vectors()) {
            if (centre) origin = *reinterpret_cast<const Vector<T>*>(centre + column);
#pragma unroll
            for (int n = 0; n < N; ++n) held[n] = *reinterpret_cast<const Vector<T>*>(rows(first + n * (THREADS / EACH)) + column);
            return;
        }
#pragma unroll
        for (int e = 0; e < VECTOR<T>; ++e) {
            const bool exists = column + e < end;
            if (centre && exists) origin.value[e] = centre[column + e];
#pragma unroll
            for (int n = 0; n < N; ++n) held[n].value[e] = exists ? rows(first + n * (THREADS / EACH))[column + e] : T(0);
        }
    }
    // Minus `centre`: not before the rows are wanted, so that nobody waits for them until then.
    __device__ __forceinline__ void subtract_origin() {
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < VECTOR<T>; ++e) held[n].value[e] -= origin.value[e];
    }
    __device__ __forceinline__ void put(T* shared, int ld) const {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int index = threadIdx.x + n * THREADS;
            *reinterpret_cast<Vector<T>*>(shared + index / EACH * ld + index % EACH * VECTOR<T>) = held[n];
        }
    }

    // As an operand of `multiply`: put_maxima, __syncthreads, put_operand. Returns what undoes the scaling.
    __device__ __forceinline__ void put_maxima(T* of_warps) const {
        if constexpr (sizeof(T) == 4) {
            float largest = 0;
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int e = 0; e < VECTOR<T>; ++e) largest = std::fmax(largest, std::fabs(held[n].value[e]));
            put_largest(largest, reinterpret_cast<unsigned*>(of_warps));
        }
    }
    __device__ __forceinline__ T put_operand(T* shared, int ld, const T* of_warps) const {
        if constexpr (sizeof(T) == 4) {
            const Scale scale = scale_for(largest_of_block(reinterpret_cast<const unsigned*>(of_warps)));
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const int index = threadIdx.x + n * THREADS;
                put_halves(shared + index / EACH * ld, index % EACH * VECTOR<T>, held[n].value, scale.by);
            }
            return scale.back;
        } else {
            put(shared, ld);
            return 1;
        }
    }
};

}  // namespace drift::cuda
