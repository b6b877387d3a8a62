// What forms A and B compute on a tile of pairs: distances, logits, affinities; and how a problem is cut into tiles.
//
// A kernel looks at the pairs from the queries or from the keys: the axis whose points lie along a tile's rows is `x`, the
// other is `y`. All of it is symmetric in the two but for the sides and the weights, which belong to the keys.
#pragma once
#include "product.cuh"

namespace drift::cuda {

constexpr int DIFFERENCES_UP_TO = 16;  // dimension up to which differences cost no more than products

template <class T> constexpr T INF = std::numeric_limits<T>::infinity();

extern __shared__ __align__(16) unsigned char shared_memory[];
template <class T> __device__ __forceinline__ T* shared_as() { return reinterpret_cast<T*>(shared_memory); }

struct Span {  // consecutive points of an axis, all of one side
    int64_t first;
    int count, side;
};

// An axis of problem g in spans of at most `size` points.
struct Spans {
    int64_t split, total, size;  // the axis is [0, split) and [split, total)
    __host__ __device__ int64_t first_side() const { return (split + size - 1) / size; }
    __host__ __device__ int64_t count() const { return first_side() + (total - split + size - 1) / size; }
    __device__ Span operator()(int64_t n) const {
        const bool last = n >= first_side();
        const int64_t first = last ? split + (n - first_side()) * size : n * size, end = last ? total : split;
        return {first, int(end - first < size ? end - first : size), last && split ? 1 : 0};
    }
};

// Sides of the keys as ranges of spans.
__host__ __device__ inline Range side_range(const Spans& spans, int side, int sides) {
    return {side == 0 ? 0 : spans.first_side(), side == 0 && sides == 2 ? spans.first_side() : spans.count()};
}

template <class T> struct Axis {  // of one problem
    const T* points;              // [count, D]
    const T* norms;               // squared
    int64_t count;
    const T* stats;  // of width 0: maxima, then factors; the next width's are stats_stride further
    int64_t stats_stride;
    __device__ Matrix<T> rows(Span span, int64_t D) const { return {points + span.first * D, span.count, D}; }
};

// Squared norms of queries, then of keys, and the finished statistics.
template <class T> struct Known {
    const T *q_norms, *k_norms, *row_stats, *col_stats;
};

template <class T> __device__ Axis<T> queries(const Affinity<T>& p, const Known<T>& known, int64_t g) {
    return {p.q + g * p.N * p.D, known.q_norms + g * p.N, p.N, known.row_stats + g * 2 * p.N, p.groups * 2 * p.N};
}
template <class T> __device__ Axis<T> keys(const Affinity<T>& p, const Known<T>& known, int64_t g) {
    return {p.k + g * p.M * p.D, known.k_norms + g * p.M, p.M, known.col_stats + g * 2 * p.M, p.groups * 2 * p.M};
}

template <class T> __device__ Logit<T> logit(const Affinity<T>& p, int s) {
    const T unit = p.unit ? T(*p.unit) : T(1), width = T(p.width[s]) * unit;
    return p.kernel == Kernel::laplace ? Logit<T>{p.kernel, T(1), width} : Logit<T>{p.kernel, width, T(p.temperature)};
}

// Pairs (r, c) of the tile that exist: body(r, c, i, j) with i, j counted from the spans' first points.
template <class T, int NT, class Body> __device__ __forceinline__ void for_pairs(Span x, Span y, Body body) {
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 2 * NT; ++c) {
            const int i = Tile<T, NT>::row(r), j = Tile<T, NT>::col(c);
            if (i < x.count && j < y.count) body(r, c, i, j);
        }
}

// d = max(‖x_i − y_j‖, least_distance), the self pairs' exactly least_distance + self_distance. Products lose close pairs: a
// tile that has any is worked out again from differences.
template <class T, int NT>
__device__ void find_distances(Tile<T, NT>& d, const Affinity<T>& p, const Axis<T>& x, Span xs, const Axis<T>& y, Span ys, T* stage) {
    const T *x_norms = x.norms + xs.first, *y_norms = y.norms + ys.first;
    const int64_t self = p.has_self ? xs.first - ys.first : int64_t(1) << 40;  // pair (i, i + self) is a self pair
    for (bool by_differences = p.D <= DIFFERENCES_UP_TO;; by_differences = true) {
        product_of_rows(d, x.rows(xs, p.D), y.rows(ys, p.D), by_differences, p.split_products, stage);
        if (by_differences) break;
        bool close = false;
        for_pairs<T, NT>(xs, ys, [&](int r, int c, int i, int j) {
            const T norms = x_norms[i] + y_norms[j], square = norms - 2 * d.value[r][c];
            close |= square < norms * T(CLOSE) && j != i + self;
            d.value[r][c] = square;
        });
        if (!__syncthreads_or(close)) break;
    }
    const T least = T(p.least_distance), self_distance = least + T(p.self_distance) * (p.unit ? T(*p.unit) : T(1));
    for_pairs<T, NT>(xs, ys, [&](int r, int c, int i, int j) {
        const T distance = std::sqrt(d.value[r][c]);
        d.value[r][c] = j == i + self ? self_distance : distance < least ? least : distance;  // NaN stays NaN
    });
}

// A of one pair from its logit and the finished statistics of x_i and y_j of one width.
template <class T> struct Affinities {
    const T *x_max, *x_factor, *y_max, *y_factor;
    T least;          // sqrt(floor)
    int64_t masked;   // pair (i, i + masked) is 0 whatever the floor

    __device__ Affinities(const Affinity<T>& p, const Axis<T>& x, Span xs, const Axis<T>& y, Span ys, int s)
        : x_max(x.stats + s * x.stats_stride + xs.first), x_factor(x_max + x.count), y_max(y.stats + s * y.stats_stride + ys.first),
          y_factor(y_max + y.count), least(std::sqrt(T(p.floor))),
          masked(p.has_self && p.self_distance == INF<double> ? xs.first - ys.first : int64_t(1) << 40) {}

    __device__ __forceinline__ T operator()(int i, int j, T logit) const {
        const T value = std::exp(logit - (x_max[i] + y_max[j]) * T(0.5)) * (x_factor[i] * y_factor[j]);
        return j == i + masked ? T(0) : value < least ? least : value;
    }
};

// Sums over the 4 threads that share a tile's row, and over the 8 that share its columns, within a warp.
template <class T> __device__ __forceinline__ T sum_over_row(T x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
template <class T> __device__ __forceinline__ T sum_over_col(T x) {
    x += __shfl_xor_sync(0xffffffffu, x, 4);
    x += __shfl_xor_sync(0xffffffffu, x, 8);
    return x + __shfl_xor_sync(0xffffffffu, x, 16);
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

template <class T, int NT> __device__ __forceinline__ void put_strip(T* strip, const Tile<T, NT>& tile) {
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 2 * NT; ++c) strip[tile.row(r) * STRIP_LD<T, NT> + tile.col(c)] = tile.value[r][c];
}

// out [rows, D], columns [at, at + COLS): the tile where `first`, otherwise added to what the same threads left there.
template <class T, int NT>
__device__ __forceinline__ void add_tile(T* out, const Tile<T, NT>& tile, int rows, int64_t at, int64_t D, bool first) {
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 2 * NT; ++c) {
            const int64_t dim = at + tile.col(c);
            if (tile.row(r) >= rows || dim >= D) continue;
            T& there = out[tile.row(r) * D + dim];
            there = first ? tile.value[r][c] : there + tile.value[r][c];
        }
}

// out [rows, D] += strip · values, all of D. The strip is lost.
template <class T, int NT>
__device__ void add_product(T* out, int rows, T* strip, const Matrix<T>& values, bool first, bool split, T* stage) {
    __syncthreads();  // the strip is complete
    split_strip(strip, STRIP_LD<T, NT>);
    for (int64_t at = 0; at < values.depth; at += COLS<NT>) {
        Tile<T, NT> sums[1];
        sums[0].clear();
        product_with_strips<T, NT, 1>(sums, strip, 0, STRIP_LD<T, NT>, values, values.count, at, values.depth, nullptr, split, stage);
        add_tile(out, sums[0], rows, at, values.depth, first);
    }
}

// How a problem is cut over the blocks: spans of an axis along a tile's rows (ROWS points) and along its columns (COLS).
template <class T> struct Cut {
    static constexpr int WIDE = COLS<COLUMN_TILES<T>>;
    Spans queries_down, queries_across, keys_down, keys_across;
    int row_parts, col_parts;           // of the passes over all pairs: row_parts × col_parts blocks a problem
    int key_parts, gradient_key_parts;  // where a block has ROWS queries: of every side; of all keys
    int query_parts;                    // where a block has ROWS keys

    Cut(const Affinity<T>& p, Device device)
        : queries_down{0, p.N, ROWS}, queries_across{0, p.N, WIDE}, keys_down{p.split, p.M, ROWS}, keys_across{p.split, p.M, WIDE} {
        const int64_t wanted = enough_blocks(device);
        auto parts = [&](int64_t blocks, int64_t spans, int64_t most) {
            return int(std::clamp<int64_t>(ceil_div(wanted, blocks), 1, std::min(spans, most)));
        };
        row_parts = parts(p.groups, queries_down.count(), 16);
        col_parts = parts(p.groups * row_parts, keys_across.count(), 32);
        const int64_t shorter = p.sides == 1 ? keys_across.count() : std::min(keys_across.first_side(), keys_across.count() - keys_across.first_side());
        key_parts = parts(p.groups * queries_down.count() * p.sides, shorter, 32);
        gradient_key_parts = parts(p.groups * queries_down.count(), keys_across.count(), 32);
        query_parts = parts(p.groups * keys_down.count(), queries_across.count(), 32);
    }
};

template <class T> __global__ void __launch_bounds__(THREADS) squared_norms(const __grid_constant__ Affinity<T> p, T* norms) {
    const int64_t n = int64_t(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32, queries = p.groups * p.N;
    if (n >= queries + p.groups * p.M) return;
    const T* point = n < queries ? p.q + n * p.D : p.k + (n - queries) * p.D;
    T sum = 0;
    for (int64_t e = threadIdx.x % 32; e < p.D; e += 32) sum += point[e] * point[e];
    sum = sum_over_col(sum_over_row(sum));
    if (threadIdx.x % 32 == 0) norms[n] = sum;
}

// out[n] = Σ_part parts[part, n].
template <class T> __global__ void __launch_bounds__(THREADS) sum_parts(const T* parts, int count, int64_t size, T* out) {
    const int64_t n = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (n >= size) return;
    T sum = parts[n];
    for (int part = 1; part < count; ++part) sum += parts[part * size + n];
    out[n] = sum;
}

template <class T> void launch_squared_norms(const Affinity<T>& p, T* norms, Device device) {
    const int64_t points = p.groups * (p.N + p.M);
    launch("squared_norms", squared_norms<T>, device, ceil_div(points, THREADS / 32), 0, p, norms);
}
template <class T> void launch_sum_parts(const T* parts, int count, int64_t size, T* out, Device device) {
    launch("sum_parts", sum_parts<T>, device, ceil_div(size, THREADS), 0, parts, count, size, out);
}

}  // namespace drift::cuda
