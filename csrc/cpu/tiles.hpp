// What every form computes on a tile of queries × keys: distances, logits, softmax statistics, affinities (../spec.hpp).
#pragma once
#include "../spec.hpp"
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

// Points of a problem as distances want them: as they are, for differences, and about a centre, for products.
template <class T> struct Queries {
    const T* const* rows;
    const T* centred;  // [N, D]
    const T* norms;    // of the centred rows
};
template <class T> struct Keys {
    const T* const* rows;  // null in the padding
    const T* panels;       // pack_transposed of the centred rows
    const T* norms;        // +∞ in the padding, so that padded distances are +∞
};

// The point nearest to the mean of all, which is amid the rest: a few far outliers draw the mean away, but none of the rest
// to them. Every pair is as far apart about this centre as before, and close points keep their digits.
template <class T> const T* find_centre(const T* const* points, int64_t count, int64_t depth, T* mean) {
    std::fill(mean, mean + depth, T(0));
    for (int64_t n = 0; n < count; ++n)
        for (int64_t e = 0; e < depth; ++e) mean[e] += points[n][e];
    for (int64_t e = 0; e < depth; ++e) mean[e] /= T(count);
    const T* best = points[0];
    T least = INF<T>;
    for (int64_t n = 0; n < count; ++n) {
        const T distance = squared_distance(points[n], static_cast<const T*>(mean), depth);
        if (distance < least) least = distance, best = points[n];
    }
    return best;
}

// Up to this dimension differences cost no more than products and a look for close pairs.
constexpr int64_t DIFFERENCES_UP_TO = 8;

template <class T> void distances_by_differences(const Tile<T>& t, int64_t depth, const T* centred, const T* k_panels, const T* k_norms, T least, T* d) {
    for (int64_t i = 0; i < t.rows; ++i) {
        const T* q = centred + (t.row + i) * depth;
        for (int64_t j = 0; j < t.width; j += WIDTH<T>) {
            const int64_t col = t.col + j;
            const T* k = k_panels + col / PANEL<T> * PANEL<T> * depth + col % PANEL<T>;
            Vec<T> square{};
            for (int64_t e = 0; e < depth; ++e) {
                const Vec<T> difference = q[e] - load<T>(k + e * PANEL<T>);
                square += difference * difference;
            }
            const Vec<T> norm = load<T>(k_norms + col);
            store<T>(d + i * t.ld + j, norm > std::numeric_limits<T>::max() ? norm : at_least<T>(square_root<T>(square), least));
        }
    }
}

// d[i][j] = max(‖q_i − k_j‖, least), from products of centred rows, except for close pairs. With `has_self`, key i
// is query i, and its distance is exactly `least`. Padding columns get +∞.
template <class T>
void distances(const Tile<T>& t, int64_t depth, const Queries<T>& q, const Keys<T>& k, bool has_self, T least, T* d) {
    if (depth <= DIFFERENCES_UP_TO) return distances_by_differences(t, depth, q.centred, k.panels, k.norms, least, d);
    multiply<T>(t.rows, t.width, depth, q.centred + t.row * depth, depth, 1, k.panels + t.col * depth, depth * PANEL<T>, d, t.ld, false);
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
            if (!(row[j] * row[j] > (q_norm[0] + k_norms[j]) * T(CLOSE * 1.03)) && !(self_here && j == self) && k.rows[t.col + j]) {
                const T exact = std::sqrt(squared_distance(q.rows[t.row + i], k.rows[t.col + j], depth));
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

struct Exp {
    template <class V> DRIFT_INLINE V operator()(V x) const { return exp_nonpositive(x); }
};

// Calls body(n, L) for the vectors of a row of a tile, whose distances start at `d`; −∞ in the padding. What kind of logit
// it is, is asked outside the loop, as compilers leave it inside.
template <class T, class Body> DRIFT_INLINE void for_logits(const Tile<T>& t, const Logit<T>& logit, const T* d, Body body) {
    if (logit.kind == LogitKind::laplace) {
        const Logit<T> laplace{LogitKind::laplace, logit.width, logit.temperature};
        for (int64_t j = 0; j < t.width; j += WIDTH<T>) body(j, laplace.at(load<T>(d + j), Exp()));
    } else {
        for (int64_t j = 0; j < t.width; j += WIDTH<T>) body(j, logit.at(load<T>(d + j), Exp()));
    }
}

template <class T, class Body> DRIFT_INLINE void for_logits(const Tile<T>& t, const CostLogit<T>& logit, const T* d, Body body) {
    const auto of_kind = [&](CostKind kind) {
        const CostLogit<T> known{kind, logit.width, logit.least_distance};
        for (int64_t j = 0; j < t.width; j += WIDTH<T>) body(j, known.at(load<T>(d + j)));
    };
    logit.kind == CostKind::l2 ? of_kind(CostKind::l2) : of_kind(CostKind::l2_sq);
}

template <class T, class Kind> void find_logits(const Tile<T>& t, const Kind& logit, const T* d, T* logits) {
    for (int64_t i = 0; i < t.rows; ++i)
        for_logits(t, logit, d + i * t.ld, [&](int64_t j, Vec<T> L) { store<T>(logits + i * t.ld + j, L); });
}

// Softmax statistics along one axis: levels and sums of exp(L − level), then level and sum^-½.
template <class T> struct Statistics {
    T* level;
    T* sum;
    Statistics at(int64_t n) const { return {level + n, sum + n}; }

    void start(int64_t count, T from) const {
        std::fill(level, level + count, from);
        std::fill(sum, sum + count, T(0));
    }
    void finish(int64_t count) const {
        for (int64_t n = 0; n < count; ++n) finish_statistics<T>(level[n], sum[n]);
    }
};

// Sums of exponentials relative to a common level in which nothing is lost: their terms are normal numbers or too small to
// count.
template <class T> constexpr T LEAST_SUM = sizeof(T) == 4 ? T(0x1p-80) : T(1e-270);

template <class T> bool all_counted(const T* sums, int64_t count) {
    bool all = true;
    for (int64_t n = 0; n < count; ++n) all &= sums[n] >= LEAST_SUM<T>;
    return all;
}

// Adds exp(L − level) of a tile, with a level that no logit exceeds: one exponential serves the sums of rows and columns,
// which both start at the tile's corner.
template <class T> void add_exponentials(const Tile<T>& t, const Logit<T>& logit, T level, const T* d, T* row_sums, T* col_sums) {
    for (int64_t i = 0; i < t.rows; ++i) {
        Vec<T> sum{};
        for_logits(t, logit, d + i * t.ld, [&](int64_t j, Vec<T> L) {
            const Vec<T> value = exp_nonpositive(L - level);
            sum += value;
            store<T>(col_sums + j, load<T>(col_sums + j) + value);
        });
        row_sums[i] += horizontal_sum<T>(sum);
    }
}

template <class T> void raise(Statistics<T> running, const T* fresh_max, int64_t count) {
    for (int64_t n = 0; n < count; n += WIDTH<T>) {
        const Vec<T> old = load<T>(running.level + n), now = greater<T>(load<T>(fresh_max + n), old);
        store<T>(running.sum + n, load<T>(running.sum + n) * exp_nonpositive(old - finite_shift<T, Vec<T>>(now)));
        store<T>(running.level + n, now);
    }
}

// Adds a tile of logits, however far apart, to the statistics of its rows and columns, whose levels are running maxima (both
// arrays start at the tile's corner, padded).
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
    for (int64_t j = 0; j < t.width; j += WIDTH<T>) store<T>(col_max + j, finite_shift<T, Vec<T>>(load<T>(cols.level + j)));
    for (int64_t i = 0; i < t.rows; ++i) {
        const Vec<T> shift = finite_shift<T, Vec<T>>(splat<T>(rows.level[i]));
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
        const T row_half = rows.level[i] * T(0.5), row_factor = rows.sum[i];
        for (int64_t j = 0; j < t.width; j += WIDTH<T>) {
            const Vec<T> exponent = load<T>(logits + i * t.ld + j) - (load<T>(cols.level + j) * T(0.5) + row_half);
            const Vec<T> value = exp_nonpositive(exponent) * (load<T>(cols.sum + j) * row_factor);
            store<T>(out + i * t.ld + j, at_least<T>(value, least));
        }
        const int64_t self = t.row + i - t.col;
        if (masked_self && self >= 0 && self < t.cols) out[i * t.ld + self] = 0;
    }
}

// Adds exp(L_ij − β_j) of a tile to the sums of its rows, whose levels are running maxima: one exponential a pair.
template <class T, class Kind>
void add_to_rows(const Tile<T>& t, const Kind& logit, const T* d, const T* beta, Statistics<T> rows) {
    T exponents[TILE_COLS];  // of a row
    for (int64_t i = 0; i < t.rows; ++i) {
        Vec<T> top = splat<T>(-std::numeric_limits<T>::max()) * 2, sum{};
        for_logits(t, logit, d + i * t.ld, [&](int64_t j, Vec<T> L) {
            const Vec<T> exponent = L - load<T>(beta + j);
            top = greater<T>(exponent, top);
            store<T>(exponents + j, exponent);
        });
        const T old = rows.level[i], now = std::max(old, horizontal_max<T>(top)), shift = finite_shift<T, T>(now);
        for (int64_t j = 0; j < t.width; j += WIDTH<T>) sum += exp_nonpositive(load<T>(exponents + j) - shift);
        if (now > old) rows.sum[i] *= std::exp(old - shift);
        rows.sum[i] += horizontal_sum<T>(sum);
        rows.level[i] = now;
    }
}

// The same of exp(L_ij − α_i) and the columns; `exponents` is room for the tile.
template <class T, class Kind>
void add_to_columns(const Tile<T>& t, const Kind& logit, const T* d, const T* alpha, Statistics<T> cols, T* exponents) {
    T level[TILE_COLS], sums[TILE_COLS] = {};
    std::fill(level, level + t.width, -INF<T>);
    for (int64_t i = 0; i < t.rows; ++i)
        for_logits(t, logit, d + i * t.ld, [&](int64_t j, Vec<T> L) {
            const Vec<T> exponent = L - alpha[i];
            store<T>(level + j, greater<T>(exponent, load<T>(level + j)));
            store<T>(exponents + i * t.ld + j, exponent);
        });
    raise(cols, level, t.width);
    for (int64_t j = 0; j < t.width; j += WIDTH<T>) store<T>(level + j, finite_shift<T, Vec<T>>(load<T>(cols.level + j)));
    for (int64_t i = 0; i < t.rows; ++i)
        for (int64_t j = 0; j < t.width; j += WIDTH<T>)
            store<T>(sums + j, load<T>(sums + j) + exp_nonpositive(load<T>(exponents + i * t.ld + j) - load<T>(level + j)));
    for (int64_t j = 0; j < t.width; j += WIDTH<T>) store<T>(cols.sum + j, load<T>(cols.sum + j) + load<T>(sums + j));
}

// Logits to max(exp(L_ij − α_i − β_j), √floor), but 0 where the exponent is −∞; potentials start at the tile's corner.
template <class T> void affinities_of_potentials(const Tile<T>& t, const T* logits, const T* alpha, const T* beta, T floor, T* out) {
    const T least = std::sqrt(floor);
    for (int64_t i = 0; i < t.rows; ++i)
        for (int64_t j = 0; j < t.width; j += WIDTH<T>) {
            const Vec<T> exponent = load<T>(logits + i * t.ld + j) - alpha[i] - load<T>(beta + j);
            const Vec<T> value = at_least<T>(exponential<T>(exponent), least);
            store<T>(out + i * t.ld + j, exponent < std::numeric_limits<T>::lowest() ? Vec<T>{} : value);
        }
}

}  // namespace drift::DRIFT_ISA
