// What every form computes on a tile of queries × keys: distances, logits, softmax statistics, affinities (../math.hpp).
#pragma once
#include "../math.hpp"
#include "gemm.hpp"

namespace drift::DRIFT_ISA {

constexpr int64_t TILE_ROWS = 64, TILE_COLS = 256;  // a float tile is 64 KiB: two or three of them stay in L2

template <class T> constexpr T INF = std::numeric_limits<T>::infinity();

// Rows [row, row + rows) × columns [col, col + cols) of one problem. The matrices of a tile (distances, logits, …) are
// passed as pointers to its corner, row-major with leading dimension ld, padded to `width` columns.
template <class T> struct Tile {
    int64_t row, rows, col, cols, ld;
    int64_t width = round_up(cols, WIDTH<T>);
};

template <class T> T sum(const T* x, int64_t count) {
    Vec<T> total{};
    int64_t n = 0;
    for (; n + WIDTH<T> <= count; n += WIDTH<T>) total += load<T>(x + n);
    T tail = horizontal_sum<T>(total);
    for (; n < count; ++n) tail += x[n];
    return tail;
}

// Multiplies x by the weights w (null: ones) and returns the sum of the products.
template <class T> T weigh(T* x, const T* w, int64_t count) {
    if (w)
        for (int64_t n = 0; n < count; ++n) x[n] *= w[n];
    return sum<T>(x, count);
}

template <class T> DRIFT_INLINE T dot(const T* x, const T* y, int64_t depth) {
    Vec<T> sum{};
    int64_t d = 0;
    for (; d + WIDTH<T> <= depth; d += WIDTH<T>) sum += load<T>(x + d) * load<T>(y + d);
    T tail = horizontal_sum<T>(sum);
    for (; d < depth; ++d) tail += x[d] * y[d];
    return tail;
}

template <class T> DRIFT_INLINE T squared_norm(const T* x, int64_t depth) { return dot(x, x, depth); }

template <class T> T squared_distance(const T* x, const T* y, int64_t depth) {
    Vec<T> sum{};
    int64_t d = 0;
    for (; d + WIDTH<T> <= depth; d += WIDTH<T>) {
        const Vec<T> difference = load<T>(x + d) - load<T>(y + d);
        sum += difference * difference;
    }
    T tail = horizontal_sum<T>(sum);
    for (; d < depth; ++d) tail += (x[d] - y[d]) * (x[d] - y[d]);
    return tail;
}

// One side of the distances of a problem, centred: rows as given, and what the matrix product wants.
template <class T> struct Queries {
    const T* rows;  // [N, D], centred
    const T* norms;
};
template <class T> struct Keys {
    const T* const* rows;  // M pointers, in the coordinates of `exact_queries` below
    const T* panels;       // pack_transposed of the centred rows
    const T* norms;        // of the centred rows; +∞ in the padding, so that padded distances are +∞
};

// Up to this dimension differences cost no more than products and a look for close pairs.
constexpr int64_t DIFFERENCES_UP_TO = 8;

template <class T> void distances_by_differences(const Tile<T>& t, int64_t depth, const T* q_rows, const T* k_panels, T least, T* d) {
    for (int64_t i = 0; i < t.rows; ++i) {
        const T* q = q_rows + (t.row + i) * depth;
        for (int64_t j = 0; j < t.width; j += WIDTH<T>) {
            const int64_t col = t.col + j;
            const T* k = k_panels + col / PANEL<T> * PANEL<T> * depth + col % PANEL<T>;
            Vec<T> square{};
            for (int64_t e = 0; e < depth; ++e) {
                const Vec<T> difference = q[e] - load<T>(k + e * PANEL<T>);
                square += difference * difference;
            }
            store<T>(d + i * t.ld + j, at_least<T>(square_root<T>(square), least));
        }
        std::fill(d + i * t.ld + t.cols, d + i * t.ld + t.width, INF<T>);
    }
}

// d[i][j] = max(‖q_i − k_j‖, least), from products of centred rows, except for close pairs. With `has_self`, key i
// is query i, and its distance is exactly `least`. Padding columns get +∞.
template <class T>
void distances(const Tile<T>& t, int64_t depth, const Queries<T>& q, const T* const* exact_queries, const Keys<T>& k,
               bool has_self, T least, T* d) {
    if (depth <= DIFFERENCES_UP_TO) return distances_by_differences(t, depth, q.rows, k.panels, least, d);
    multiply<T>(t.rows, t.width, depth, q.rows + t.row * depth, depth, 1, k.panels + t.col * depth, depth * PANEL<T>, d, t.ld, false);
    for (int64_t i = 0; i < t.rows; ++i) {
        T* row = d + i * t.ld;
        const T* k_norms = k.norms + t.col;
        const Vec<T> q_norm = splat<T>(q.norms[t.row + i]);
        const int64_t self = t.row + i - t.col;
        const bool self_here = has_self && self >= 0 && self < t.cols;
        if (self_here) row[self] = -INF<T>;  // far, so that it does not count as close
        typename Simd<T>::ivec close{};
        for (int64_t j = 0; j < t.width; j += WIDTH<T>) {
            const Vec<T> norms = q_norm + load<T>(k_norms + j), square = norms - T(2) * load<T>(row + j);
            close |= square < norms * T(CLOSE);
            store<T>(row + j, at_least<T>(square_root<T>(square), least));
        }
        if (self_here) row[self] = least;
        if (!any<T>(close)) continue;
        for (int64_t j = 0; j < t.cols; ++j)  // a bound a little wider than above: rounding must not miss a close pair
            if (!(row[j] * row[j] > (q_norm[0] + k_norms[j]) * T(CLOSE * 1.03)) && !(self_here && j == self)) {
                const T exact = std::sqrt(squared_distance(exact_queries[t.row + i], k.rows[t.col + j], depth));
                row[j] = exact < least ? least : exact;  // NaN stays NaN
            }
    }
}

template <class T> void add_to_self_pairs(const Tile<T>& t, T amount, T* d) {
    for (int64_t i = 0; i < t.rows; ++i) {
        const int64_t self = t.row + i - t.col;
        if (self >= 0 && self < t.cols) d[i * t.ld + self] += amount;
    }
}

// L of a tile; −∞ in the padding.
template <class T> struct Logits : Logit<T> {
    using Logit<T>::kernel, Logit<T>::sigma, Logit<T>::temperature;

    void operator()(const Tile<T>& t, const T* d, T* logits) const {
        const T inverse = T(1) / temperature, falloff = T(-0.5) / (sigma * sigma);
        if (kernel == Kernel::laplace) {
            for (int64_t i = 0; i < t.rows; ++i)
                for (int64_t n = i * t.ld; n < i * t.ld + t.width; n += WIDTH<T>) store<T>(logits + n, load<T>(d + n) * -inverse);
            return;
        }
        for (int64_t i = 0; i < t.rows; ++i) {
            T* row = logits + i * t.ld;
            for (int64_t j = 0; j < t.width; j += WIDTH<T>) {
                const Vec<T> distance = load<T>(d + i * t.ld + j);
                store<T>(row + j, exp_nonpositive(distance * distance * falloff) * inverse);
            }
            for (int64_t j = t.cols; j < t.width; ++j) row[j] = -INF<T>;
        }
    }
};

// Softmax statistics along one axis: running maxima and sums of exp(L − max), then max and sum^-½.
template <class T> struct Statistics {
    T* max;
    T* sum;
    Statistics at(int64_t n) const { return {max + n, sum + n}; }

    void start(int64_t count) {
        std::fill(max, max + count, -INF<T>);
        std::fill(sum, sum + count, T(0));
    }
    void finish(int64_t count) {
        for (int64_t n = 0; n < count; ++n) finish_statistics<T>(max[n], sum[n]);
    }
};

template <class T> void raise(Statistics<T> running, const T* fresh_max, int64_t count) {
    for (int64_t n = 0; n < count; n += WIDTH<T>) {
        const Vec<T> old = load<T>(running.max + n), now = greater<T>(load<T>(fresh_max + n), old);
        store<T>(running.sum + n, load<T>(running.sum + n) * exp_nonpositive(old - finite_shift<T, Vec<T>>(now)));
        store<T>(running.max + n, now);
    }
}

// Adds a tile of logits to the statistics of its rows and columns (both arrays start at the tile's corner, padded).
template <class T> void add_to_statistics(const Tile<T>& t, const T* logits, Statistics<T> rows, Statistics<T> cols) {
    T row_max[TILE_ROWS + WIDTH<T>], col_max[TILE_COLS];
    std::fill(col_max, col_max + t.width, -INF<T>);
    std::fill(row_max, row_max + TILE_ROWS + WIDTH<T>, -INF<T>);
    for (int64_t i = 0; i < t.rows; ++i) {
        Vec<T> top = splat<T>(-std::numeric_limits<T>::max()) * 2;
        for (int64_t j = 0; j < t.width; j += WIDTH<T>) {
            const Vec<T> logit = load<T>(logits + i * t.ld + j);
            top = greater<T>(logit, top);
            store<T>(col_max + j, greater<T>(logit, load<T>(col_max + j)));
        }
        row_max[i] = horizontal_max<T>(top);
    }
    raise(rows, row_max, t.rows);
    raise(cols, col_max, t.width);
    for (int64_t j = 0; j < t.width; j += WIDTH<T>) store<T>(col_max + j, finite_shift<T, Vec<T>>(load<T>(cols.max + j)));
    for (int64_t i = 0; i < t.rows; ++i) {
        const Vec<T> shift = finite_shift<T, Vec<T>>(splat<T>(rows.max[i]));
        Vec<T> sum{};
        for (int64_t j = 0; j < t.width; j += WIDTH<T>) {
            const Vec<T> logit = load<T>(logits + i * t.ld + j);
            sum += exp_nonpositive(logit - shift);
            store<T>(cols.sum + j, load<T>(cols.sum + j) + exp_nonpositive(logit - load<T>(col_max + j)));
        }
        rows.sum[i] += horizontal_sum<T>(sum);
    }
}

// Logits to affinities; `rows` and `cols` are finished and start at the tile's corner. With `masked_self` the self pairs
// are 0 whatever the floor.
template <class T>
void affinities(const Tile<T>& t, const T* logits, Statistics<T> rows, Statistics<T> cols, T floor, bool masked_self, T* out) {
    const T least = std::sqrt(floor);
    for (int64_t i = 0; i < t.rows; ++i) {
        const T row_half = rows.max[i] * T(0.5), row_factor = rows.sum[i];
        for (int64_t j = 0; j < t.width; j += WIDTH<T>) {
            const Vec<T> exponent = load<T>(logits + i * t.ld + j) - (load<T>(cols.max + j) * T(0.5) + row_half);
            const Vec<T> value = exp_nonpositive(exponent) * (load<T>(cols.sum + j) * row_factor);
            store<T>(out + i * t.ld + j, at_least<T>(value, least));
        }
        const int64_t self = t.row + i - t.col;
        if (masked_self && self >= 0 && self < t.cols) out[i * t.ld + self] = 0;
    }
}

}  // namespace drift::DRIFT_ISA
