// What forms A and B, and with PAIRS the sums over pairs, compute on a tile of pairs: distances, logits, affinities; and how a
// problem is cut into tiles.
//
// A kernel looks at the pairs from the queries or from the keys: the axis whose points lie along a tile's rows is `x`, the
// other is `y`. All of it is symmetric in the two but for the sides and the weights, which belong to the keys.
#pragma once
#include <utility>

#include "product.cuh"
#include "sums.cuh"

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

template <bool PAIRS, class T> __device__ auto logit(const Affinity<T>& p, int s, int64_t g) {
    if constexpr (PAIRS)
        return CostLogit<T>{p.cost, p.pair_widths[s * p.groups + g], T(p.least_distance)};
    else
        return Logit<T>{p.logit, T(p.width[s]) * (p.unit ? T(*p.unit) : T(1)), T(p.temperature)};
}

// Pairs (r, c) of the tile that exist: body(r, c, i, j) with i, j counted from the spans' first points.
template <class T, int NT, class Body> __device__ __forceinline__ void for_pairs(Span x, Span y, Body body) {
    Tile<T, NT>::for_each([&](int r, int c) {
        const int i = Tile<T, NT>::row(r), j = Tile<T, NT>::col(c);
        if (i < x.count && j < y.count) body(r, c, i, j);
    });
}

// Of a query to itself, in problem g.
template <bool PAIRS, class T> __device__ __forceinline__ T distance_to_self(const Affinity<T>& p, int64_t g) {
    return PAIRS ? p.self_distances[g] : T(p.least_distance) + T(p.self_distance) * (p.unit ? T(*p.unit) : T(1));
}

// d = max(‖x_i − y_j‖, least_distance), the self pairs' exactly distance_to_self. Products lose close pairs: a tile that has any
// is worked out again from differences.
template <bool PAIRS, class T, int NT>
__device__ void find_distances(Tile<T, NT>& d, const Affinity<T>& p, int64_t g, const Axis<T>& x, Span xs, const Axis<T>& y, Span ys, T* stage) {
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
    const T least = T(p.least_distance), self_distance = distance_to_self<PAIRS>(p, g);
    for_pairs<T, NT>(xs, ys, [&](int r, int c, int i, int j) {
        const T distance = std::sqrt(d.value[r][c]);
        d.value[r][c] = j == i + self ? self_distance : distance < least ? least : distance;  // NaN stays NaN
    });
}

// A of one pair from its logit and the finished statistics of x_i and y_j of one width.
template <bool PAIRS, class T> struct Affinities {
    const T *x_max, *x_factor, *y_max, *y_factor;
    T least;          // sqrt(floor)
    int64_t masked;   // pair (i, i + masked) is 0 whatever the floor (not with PAIRS: their exponent tells)

    __device__ Affinities(const Affinity<T>& p, const Axis<T>& x, Span xs, const Axis<T>& y, Span ys, int s)
        : x_max(x.stats + s * x.stats_stride + xs.first), x_factor(x_max + x.count), y_max(y.stats + s * y.stats_stride + ys.first),
          y_factor(y_max + y.count), least(std::sqrt(T(p.floor))),
          masked(p.has_self && p.self_distance == INF<double> ? xs.first - ys.first : int64_t(1) << 40) {}

    __device__ __forceinline__ T operator()(int i, int j, T logit) const {
        const T exponent = logit - (x_max[i] + y_max[j]) * T(0.5), value = std::exp(exponent) * (x_factor[i] * y_factor[j]);
        if (PAIRS) return value < least && exponent != -INF<T> ? least : value;  // potentials leave pairs out, too
        return j == i + masked ? T(0) : value < least ? least : value;
    }
};

template <class T, int NT> __device__ __forceinline__ void put_strip(T* strip, const Tile<T, NT>& tile) {
    tile.for_each([&](int r, int c) { strip[tile.row(r) * STRIP_LD<T, NT> + tile.col(c)] = tile.value[r][c]; });
}

// Columns [at, at + COLS) of out: the tile where `first`, otherwise added to what the same threads left there. Out has `rows` rows
// of D elements, a row every `ld`.
template <class T, int NT>
__device__ __forceinline__ void add_tile(T* out, int64_t ld, const Tile<T, NT>& tile, int rows, int64_t at, int64_t D, bool first) {
    tile.for_each([&](int r, int c) {
        const int64_t dim = at + tile.col(c);
        if (tile.row(r) >= rows || dim >= D) return;
        T& there = out[tile.row(r) * ld + dim];
        there = first ? tile.value[r][c] : there + tile.value[r][c];
    });
}

// out [rows, D] += strip · values, all of D. The strip is lost.
template <class T, int NT>
__device__ void add_product(T* out, int rows, T* strip, const Matrix<T>& values, bool first, bool split, T* stage) {
    __syncthreads();  // the strip is complete
    split_strip(strip, STRIP_LD<T, NT>);
    for (int64_t at = 0; at < values.depth; at += COLS<NT>) {
        Tile<T, NT> sums[1];
        sums[0].fill(0);
        product_with_strips<T, NT, 1>(sums, strip, 0, STRIP_LD<T, NT>, values, values.count, at, values.depth, nullptr, split, stage);
        add_tile(out, values.depth, sums[0], rows, at, values.depth, first);
    }
}

// How a problem is cut over the blocks: spans of an axis along a tile's rows (ROWS points) and along its columns.
struct Cut {
    Spans queries_down, queries_across, keys_down, keys_across;
    int row_parts, col_parts;           // of the passes over all pairs: row_parts × col_parts blocks a problem
    int key_parts, gradient_key_parts;  // where a block has ROWS queries: of every side; of all keys
    int query_parts;                    // where a block has ROWS keys

    template <class T>
    Cut(const Affinity<T>& p, int columns, Device device)
        : queries_down{0, p.N, ROWS}, queries_across{0, p.N, columns}, keys_down{p.split, p.M, ROWS}, keys_across{p.split, p.M, columns} {
        const int64_t wanted = enough_blocks(device), of_first = keys_across.first_side(), of_keys = keys_across.count();
        auto parts = [&](int64_t blocks, int64_t spans, int64_t most) {
            return int(std::clamp<int64_t>(ceil_div(wanted, blocks), 1, std::min(spans, most)));
        };
        row_parts = parts(p.groups, queries_down.count(), 16);
        col_parts = parts(p.groups * row_parts, of_keys, 32);
        key_parts = parts(p.groups * queries_down.count() * p.sides, p.sides == 1 ? of_keys : std::min(of_first, of_keys - of_first), 32);
        gradient_key_parts = parts(p.groups * queries_down.count(), of_keys, 32);
        query_parts = parts(p.groups * keys_down.count(), queries_across.count(), 32);
    }
    int64_t rectangles() const { return int64_t(row_parts) * col_parts; }
};

// What a block has of a problem where blocks walk a range of queries × a range of keys.
template <class T> struct Rectangle {
    int64_t group, row_part, col_part;
    Axis<T> x, y;
    Range rows, cols;
    __device__ Rectangle(const Affinity<T>& p, const Cut& cut, const Known<T>& known)
        : group(blockIdx.x / (cut.row_parts * cut.col_parts)), row_part(blockIdx.x / cut.col_parts % cut.row_parts),
          col_part(blockIdx.x % cut.col_parts), x(queries(p, known, group)), y(keys(p, known, group)),
          rows(Range{0, cut.queries_down.count()}.part(row_part, cut.row_parts)),
          cols(Range{0, cut.keys_across.count()}.part(col_part, cut.col_parts)) {}
};

template <class T> __global__ void __launch_bounds__(THREADS) squared_norms(const __grid_constant__ Affinity<T> p, T* norms) {
    const int64_t n = int64_t(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32, queries = p.groups * p.N;
    if (n >= queries + p.groups * p.M) return;
    const T* point = n < queries ? p.q + n * p.D : p.k + (n - queries) * p.D;
    T sum = 0;
    for (int64_t e = threadIdx.x % 32; e < p.D; e += 32) sum += point[e] * point[e];
    sum = sum_over_warp(sum);
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

// Results that may come in parts: `parts` in scratch memory, to be summed, or the destination itself where there is one part.
template <class T> struct Parts {
    T *parts, *destination;
    int count;
    int64_t size;

    Parts(Scratch& scratch, T* destination, int count, int64_t size)
        : parts(count > 1 ? scratch.take<T>(count * size) : destination), destination(destination), count(count), size(size) {}
    void sum(Device device) const {
        if (parts != destination) launch("sum_parts", sum_parts<T>, device, ceil_div(size, THREADS), 0, parts, count, size, destination);
    }
};

}  // namespace drift::cuda
