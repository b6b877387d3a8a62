// How a group of form C couples its samples with its targets: from costs to the coefficients of the targets.
//
// Targets lie in columns, negatives first, and positives start at a whole vector. One exponential a pair: E = exp(L − level),
// with a level for each row and side that none of its logits exceeds, and A = max(E·row·column, √floor) with factors of rows
// and columns. Where such factors would leave the range of the numbers, logarithms take their place.
#pragma once
#include "tiles.hpp"

namespace drift::DRIFT_ISA {

// The columns of a side: its targets, and the padding behind them.
struct Columns {
    int64_t begin, end, targets;
};

// What is found for every sample, [N] each; null: it is not wanted. As DETAILS in drift_ops/spec.py.
template <class T> struct Details {
    T *log_row_sums = nullptr, *log_mass = nullptr, *sum_neg = nullptr, *sum_pos = nullptr, *slope = nullptr, *residual = nullptr;
};

// Sinkhorn's factors stay below this, so that a product of two, and what was lost when E was rounded to 0, matter nowhere.
template <class T> constexpr T MOST_SCALING = sizeof(T) == 4 ? T(0x1p40) : T(0x1p300);

// Rows that share what they read and write of columns: in an iteration of Sinkhorn's, and elsewhere.
constexpr int SCALED_AT_ONCE = 8, ROWS_AT_ONCE = 4;

template <class T> class Coupling {
    const LossSpec& spec;
    const int64_t N, ld, padded;
    const Columns sides[2];  // negatives, positives
    const T least;
    const T* costs = nullptr;  // [N, ld], infinite where there is no pair
    T slope_of_logits = 0;     // L = slope·cost + log w
    Buffer<T> memory;  // of all that follows
    T* free = memory;
    T *const A = take(N * ld), *const levels = take(2 * padded);                               // E, then A, then c; of rows and sides
    T *const sums = take(2 * padded), *const moved = take(2 * padded);                         // Σ E and Σ E·slope·cost
    T *const nearest = take(2 * padded), *const row_factors = take(2 * padded);                // the least cost, and the factor of A
    T *const column_factors = take(ld), *const column_sums = take(ld), *const potentials = take(ld), *const rows_of_logs = take(padded);
    T *const log_weights = take(ld), *const weights = take(ld), *const shares = take(ld);  // added to L; multiplies A; sums of Sinkhorn's columns

    T* take(int64_t count) { return std::exchange(free, free + count); }

  public:
    Coupling(const LossSpec& spec, int64_t N, int64_t ld, Columns negatives, Columns positives)
        : spec(spec), N(N), ld(ld), padded(round_up(N, KEPT_ALIGN)), sides{negatives, positives}, least(std::sqrt(T(spec.floor))),
          memory((N + 6) * ld + 11 * padded) {
        std::fill(levels, row_factors + 2 * padded, T(0));
        std::fill(log_weights, log_weights + ld, -INF<T>);
        for (const Columns& side : sides) std::fill_n(log_weights + side.begin, side.targets, T(0));
    }

    // Takes over the weights [ld] of a group's targets, 0 in the padding.
    void open(const T* of_targets) {
        std::copy_n(of_targets, ld, weights);
        if (spec.weights == WeightsKind::affinity) return;
        const bool kernel = spec.weights == WeightsKind::kernel;
        for (const Columns& side : sides)
            for (int64_t j = side.begin; j < side.begin + side.targets; ++j) {
                const T w = of_targets[j];
                const bool left_out = kernel && w == 0;
                log_weights[j] = left_out ? -INF<T> : kernel ? std::log(w) : T(0);
                weights[j] = left_out ? T(0) : T(1);
            }
        for (int64_t j = 0; j < ld; ++j) shares[j] = kernel ? weights[j] : of_targets[j];
        if (spec.coupling != CouplingKind::sinkhorn) return;
        if (spec.split_sides)
            share_out(sides[0].begin, sides[0].end), share_out(sides[1].begin, sides[1].end);
        else
            share_out(0, ld);
    }

    // The costs that the next calls are about.
    void start(const T* of_group) {
        costs = of_group;
        for (int side = 0; side < 2; ++side)
            for (int64_t i = 0; i < N; ++i) {
                Vec<T> least_cost = splat<T>(INF<T>);
                const T* row = costs + i * ld;
                for_columns(side, [&](int64_t j) {
                    const Vec<T> here = load<T>(row + j);
                    least_cost = here < least_cost ? here : least_cost;
                });
                nearest[side * padded + i] = sides[side].targets == 1 ? least_cost[0] : -horizontal_max<T>(-least_cost);
            }
    }

    // The coefficients [N, ld] of the targets for logits L = −cost/width + log w, times `by`; R is the width in other units.
    const T* coefficients(T width, T R, T by, const Details<T>& details) {
        slope_of_logits = -1 / width;
        find_levels();
        with_bool(spec.weights == WeightsKind::kernel, [&](auto weighted) {
            with_bool(details.slope != nullptr, [&](auto moves) {
                with_bool(spec.coupling == CouplingKind::two_sided, [&](auto by_column) { find_exponentials<weighted, moves, by_column>(); });
            });
        });
        if (details.log_row_sums) find_masses(R, details);
        T residual = 0;
        if (spec.split_sides)
            for (int side = 0; side < 2; ++side) residual += couple(side, side) / 2;
        else
            residual = couple(0, 1);
        if (details.residual) std::fill_n(details.residual, N, residual);
        for_rows<ROWS_AT_ONCE>([&](auto rows, int64_t i) { coefficients_of_rows<rows>(i, by, details); });
        return A;
    }

  private:
    void share_out(int64_t begin, int64_t end) {
        const T by = T(N) / sum<T>(&shares[begin], end - begin);
        for (int64_t j = begin; j < end; ++j) shares[j] *= by;
    }
    template <class Body> DRIFT_INLINE void for_columns(int side, Body body) const {
        for (int64_t j = sides[side].begin; j < sides[side].end; j += WIDTH<T>) body(j);
    }
    // Calls body(ROWS, i), i the first of so many rows, and body(1, i) for those that are left.
    template <int ROWS, class Body> DRIFT_INLINE void for_rows(Body body) const {
        int64_t i = 0;
        for (; i + ROWS <= N; i += ROWS) body(std::integral_constant<int, ROWS>(), i);
        for (; i < N; ++i) body(std::integral_constant<int, 1>(), i);
    }
    template <class Body> static void with_bool(bool value, Body body) { value ? body(std::true_type()) : body(std::false_type()); }

    Vec<T> logits(int64_t i, int64_t j) const { return load<T>(costs + i * ld + j) * slope_of_logits + load<T>(log_weights + j); }

    void find_levels() {
        if (spec.weights == WeightsKind::kernel)
            for (int side = 0; side < 2; ++side)
                for (int64_t i = 0; i < N; ++i) {
                    Vec<T> most = splat<T>(-INF<T>);
                    for_columns(side, [&](int64_t j) { most = greater<T>(logits(i, j), most); });
                    levels[side * padded + i] = finite_shift<T, T>(horizontal_max<T>(most));
                }
        else
            for (int64_t at = 0; at < 2 * padded; at += WIDTH<T>) store<T>(levels + at, finite_shift<T, Vec<T>>(load<T>(nearest + at) * slope_of_logits));
    }

    // E, its sums along rows, and BY_COLUMN those along columns about the highest level of their side.
    template <bool WEIGHTED, bool MOVES, bool BY_COLUMN> void find_exponentials() {
        if (BY_COLUMN) std::fill_n(column_sums, ld, T(0)), find_factors_of_levels();
        for (int side = 0; side < 2; ++side)
            for_rows<ROWS_AT_ONCE>([&](auto rows, int64_t i) { exponentials_of_rows<rows, WEIGHTED, MOVES, BY_COLUMN>(side, i); });
    }
    template <int ROWS, bool WEIGHTED, bool MOVES, bool BY_COLUMN> void exponentials_of_rows(int side, int64_t i) {
        const int64_t at = side * padded + i, next = ld;
        const T *const of_costs = costs + i * ld, *const level = levels + at, *const by = row_factors + at, *const log_w = log_weights;
        T *const out = A + i * ld, *const of_columns = column_sums, slope = slope_of_logits;
        Vec<T> sum[ROWS] = {}, move[ROWS] = {};
        for_columns(side, [&](int64_t j) {
            Vec<T> of_column = BY_COLUMN ? load<T>(of_columns + j) : Vec<T>{};
            for (int n = 0; n < ROWS; ++n) {
                const Vec<T> L = load<T>(of_costs + n * next + j) * slope;
                const Vec<T> E = exp_nonpositive((WEIGHTED ? L + load<T>(log_w + j) : L) - level[n]);
                store<T>(out + n * next + j, E);
                sum[n] += E;
                if (MOVES) move[n] += E > T(0) ? E * L : Vec<T>{};
                if (BY_COLUMN) of_column += E * by[n];
            }
            if (BY_COLUMN) store<T>(of_columns + j, of_column);
        });
        const bool one = sides[side].targets == 1;  // One positive a group, as speech and policies have it, is in the first lane.
        fold_lanes<T>(sum, one, sums + at);
        if (MOVES) fold_lanes<T>(move, one, moved + at);
    }
    // row_factors = exp(level − the highest of its side).
    void find_factors_of_levels() {
        for (int side = 0; side < 2; ++side) {
            const T top = highest_level(side);
            for (int64_t at = side * padded; at < side * padded + N; at += WIDTH<T>) store<T>(row_factors + at, exp_nonpositive(load<T>(levels + at) - top));
        }
    }
    T highest_level(int side) const {
        T top = -INF<T>;
        for (int64_t i = 0; i < N; ++i) top = levels[side * padded + i] > top ? levels[side * padded + i] : top;
        return top;
    }

    // Levels of rows from i on over the sides from first to last, and the sums of exponentials about them: 0 where none is left.
    std::pair<Vec<T>, Vec<T>> rows_from(int64_t i, int first, int last) const {
        const Vec<T> level = load<T>(levels + first * padded + i), sum = load<T>(sums + first * padded + i);
        if (first == last) return {level, sum};
        const Vec<T> other = load<T>(levels + last * padded + i), of_other = load<T>(sums + last * padded + i);
        const Vec<T> both = sum == T(0) ? other : of_other == T(0) ? level : greater<T>(level, other);
        return {both, sum * exp_up_to_0(level - both) + of_other * exp_up_to_0(other - both)};
    }
    static Vec<T> exp_up_to_0(Vec<T> x) { return exp_nonpositive(x > T(0) ? Vec<T>{} : x); }

    void find_masses(T R, const Details<T>& details) const {
        for (int64_t first = 0; first < N; first += WIDTH<T>) {
            const auto [level, sum] = rows_from(first, 0, 1);
            const Vec<T> moved_neg = load<T>(moved + first) * exp_up_to_0(load<T>(levels + first) - level);
            const Vec<T> moved_pos = load<T>(moved + padded + first) * exp_up_to_0(load<T>(levels + padded + first) - level);
            for (int64_t i = first; i < std::min(N, first + WIDTH<T>); ++i) {
                const int64_t lane = i - first, pos = padded + i;
                const T log_sum = sum[lane] > 0 ? level[lane] + std::log(sum[lane]) : T(0);
                details.log_row_sums[i] = log_sum;
                details.log_mass[i] = levels[pos] + std::log(sums[pos]) - log_sum;
                const T mean = (moved_neg[lane] + moved_pos[lane]) / sum[lane];  // of L, which moves by −L/R
                details.slope[i] = sums[pos] > 0 ? (mean - moved[pos] / sums[pos]) / R : T(0);
            }
        }
    }

    // The factors of A in the columns of the sides from first to last; returns Sinkhorn's residual.
    T couple(int first, int last) {
        const Columns columns{sides[first].begin, sides[last].end, sides[first].targets + (last > first ? sides[last].targets : 0)};
        std::fill(&column_factors[columns.begin], &column_factors[0] + columns.end, T(1));
        if (spec.coupling == CouplingKind::sinkhorn) return sinkhorn(first, last, columns);
        const bool both_axes = spec.coupling == CouplingKind::two_sided;
        if (both_axes && !all_columns_counted(columns)) {
            couple_logarithms(first, last, columns);
            return 0;
        }
        for (int side = first; side <= last; ++side) {
            const T top = both_axes ? highest_level(side) : T(0);
            for (int64_t i = 0; i < N; i += WIDTH<T>) {
                const auto [level, sum] = rows_from(i, first, last);
                const Vec<T> own = load<T>(levels + side * padded + i);
                const Vec<T> factor = both_axes  // exp(own − (level + top)/2), of which no part is positive
                                          ? exp_up_to_0((own - level) * T(0.5) + (own - top) * T(0.5)) / square_root<T>(sum)
                                          : exp_up_to_0(own - level) / sum;
                store<T>(row_factors + side * padded + i, sum > T(0) ? factor : Vec<T>{});
            }
        }
        if (both_axes)
            for (int64_t j = columns.begin; j < columns.end; j += WIDTH<T>) {
                const Vec<T> sum = load<T>(&column_sums[j]);
                store<T>(&column_factors[j], sum > T(0) ? T(1) / square_root<T>(sum) : Vec<T>{});
            }
        return 0;
    }

    bool all_columns_counted(Columns c) const {
        typename Simd<T>::ivec lost{};
        for (int64_t j = c.begin; j < c.end; j += WIDTH<T>)
            lost |= ~(load<T>(column_sums + j) >= LEAST_SUM<T>) & (load<T>(log_weights + j) > -INF<T>);
        return !any<T>(lost);
    }

    // A of some rows, then the coefficients of their targets.
    template <int ROWS> void coefficients_of_rows(int64_t i, T by, const Details<T>& details) {
        const bool cancels = spec.split_sides && least == 0;  // factors of rows, which may be too small for numbers of this type
        const bool has_no_self_pairs = spec.include_self && spec.self_distance == INF<double>;
        const int64_t next = ld;
        T total[2][ROWS], *const row = A + i * ld;
        const T *const of_columns = column_factors, *const w = weights, lowest = least;
        for (int side = 0; side < 2; ++side) {
            T factor[ROWS];
            for (int n = 0; n < ROWS; ++n) factor[n] = cancels ? T(row_factors[side * padded + i + n] > 0) : row_factors[side * padded + i + n];
            Vec<T> sum[ROWS] = {};
            for_columns(side, [&](int64_t j) {
                const Vec<T> of_column = load<T>(of_columns + j), weight = load<T>(w + j);
                for (int n = 0; n < ROWS; ++n) {
                    const Vec<T> value = at_least<T>(load<T>(row + n * next + j) * factor[n] * of_column, lowest) * weight;
                    store<T>(row + n * next + j, value);
                    sum[n] += value;
                }
            });
            fold_lanes<T>(sum, sides[side].targets == 1, total[side]);
        }
        T of_neg[ROWS], of_pos[ROWS];
        for (int n = 0; n < ROWS; ++n) {
            T &neg = total[0][n], &pos = total[1][n], &of_self = row[n * next + i + n];
            if (has_no_self_pairs) neg -= of_self, of_self = 0;  // whatever the floor
            const bool empty = neg == 0 || pos == 0;
            of_neg[n] = -by * (empty ? 0 : spec.split_sides ? 1 / neg : pos);
            of_pos[n] = by * (empty ? 0 : spec.split_sides ? 1 / pos : neg);
            if (!details.sum_neg) continue;
            details.sum_neg[i + n] = neg * (cancels ? row_factors[i + n] : T(1));
            details.sum_pos[i + n] = pos * (cancels ? row_factors[padded + i + n] : T(1));
        }
        for (int side = 0; side < 2; ++side)
            for (int n = 0; n < ROWS; ++n)
                for_columns(side, [&](int64_t j) { store<T>(row + n * next + j, load<T>(row + n * next + j) * (side == 0 ? of_neg : of_pos)[n]); });
    }

    // Sinkhorn's iterations on E, rows and columns scaled in turn.
    T sinkhorn(int first, int last, Columns c) {
        for (int64_t i = 0; i < N; ++i)  // both sides of a row about one level
            for (int side = first; side <= last && first != last; ++side) {
                const Vec<T> level = rows_from(i / WIDTH<T> * WIDTH<T>, first, last).first;
                const T by = exp_up_to_0(levels[side * padded + i] - level)[i % WIDTH<T>];
                if (by != 1) for_columns(side, [&](int64_t j) { store<T>(&A[i * ld + j], load<T>(&A[i * ld + j]) * by); });
            }
        std::fill(&potentials[c.begin], &potentials[0] + c.end, T(0));
        T residual = 0;
        for (int n = 0; n < spec.iterations; ++n)
            if (!scale(first, last, c, residual)) scale_logarithms(first, last, c, residual);
        return residual;
    }

    // One iteration; false, and no factor of a column changed, where a factor leaves the range.
    bool scale(int first, int last, Columns c, T& residual) {
        std::fill(&column_sums[c.begin], &column_sums[0] + c.end, T(0));
        bool in_range = true;
        for_rows<SCALED_AT_ONCE>([&](auto rows, int64_t i) { in_range &= scale_rows<rows>(i, first, last, c); });
        typename Simd<T>::ivec outside{};
        for (int64_t j = c.begin; j < c.end; j += WIDTH<T>) {
            const Vec<T> sum = load<T>(&column_sums[j]), share = load<T>(&shares[j]);
            outside |= (share > T(0)) & ~((sum < MOST_SCALING<T>) & (share < sum * MOST_SCALING<T>));
        }
        if (!in_range || any<T>(outside)) return false;
        Vec<T> error{};
        for (int64_t j = c.begin; j < c.end; j += WIDTH<T>) {
            const Vec<T> sum = load<T>(&column_sums[j]), share = load<T>(&shares[j]), off = sum * load<T>(&column_factors[j]) - share;
            error += share > T(0) ? (off < T(0) ? -off : off) : Vec<T>{};
            store<T>(&column_factors[j], share > T(0) ? share / sum : Vec<T>{});
        }
        residual = horizontal_sum<T>(error) / T(c.targets);
        return true;
    }

    // The factors of some rows, and what these rows add to the sums of columns; false where a factor leaves the range.
    template <int ROWS> bool scale_rows(int64_t i, int first, int last, Columns c) {
        T *const of_columns = column_sums, *const rows = A + i * ld, factor[ROWS];
        const T* const factors = column_factors;
        Vec<T> total[ROWS] = {};
        for (int64_t j = c.begin; j < c.end; j += WIDTH<T>) {
            const Vec<T> of_column = load<T>(factors + j);
            for (int n = 0; n < ROWS; ++n) total[n] += load<T>(rows + n * ld + j) * of_column;
        }
        bool in_range = true;
        for (int n = 0; n < ROWS; ++n) {
            const int64_t a = first * padded + i + n, b = last * padded + i + n;
            const T sum = horizontal_sum<T>(total[n]);
            const bool empty = sums[a] == 0 && sums[b] == 0;
            factor[n] = empty ? T(0) : 1 / sum;
            in_range &= empty || (sum < MOST_SCALING<T> && factor[n] < MOST_SCALING<T>);
            row_factors[a] = row_factors[b] = factor[n];
        }
        for (int64_t j = c.begin; j < c.end; j += WIDTH<T>) {
            Vec<T> sum = load<T>(of_columns + j);
            for (int n = 0; n < ROWS; ++n) sum += load<T>(rows + n * ld + j) * factor[n];
            store<T>(of_columns + j, sum);
        }
        return in_range;
    }

    // The same iteration from logarithms: the columns' factors go into potentials, and E becomes exp(L + rows + potentials).
    void scale_logarithms(int first, int last, Columns c, T& residual) {
        for (int64_t j = c.begin; j < c.end; ++j) potentials[j] += std::log(column_factors[j]);
        find_row_logarithms(c, true);
        std::copy(&potentials[c.begin], &potentials[0] + c.end, &column_sums[c.begin]);
        find_column_logarithms(c, true);
        T error = 0;
        for (int64_t j = c.begin; j < c.end; ++j) {
            if (shares[j] > 0) error += std::abs(std::exp(column_sums[j] - potentials[j]) - shares[j]);
            column_factors[j] = shares[j];
        }
        residual = error / T(c.targets);
        exponentiate(first, last, c, 1);
    }

    // Two sides where one level does not serve all logits of a column: A = exp(L − (log Σ_j + log Σ_i)/2).
    void couple_logarithms(int first, int last, Columns c) {
        find_row_logarithms(c, false);
        find_column_logarithms(c, false);
        exponentiate(first, last, c, T(0.5));
    }

    // rows_of_logs = −log Σ_j exp(L + potentials), 0 where nothing is left.
    void find_row_logarithms(Columns c, bool with_potentials) {
        if (!with_potentials) std::fill(&potentials[c.begin], &potentials[0] + c.end, T(0));
        for (int64_t i = 0; i < N; ++i) {
            const auto exponents = [&](int64_t j) { return logits(i, j) + load<T>(&potentials[j]); };
            Vec<T> most = splat<T>(-INF<T>), sum{};
            for (int64_t j = c.begin; j < c.end; j += WIDTH<T>) most = greater<T>(exponents(j), most);
            const T level = finite_shift<T, T>(horizontal_max<T>(most));
            for (int64_t j = c.begin; j < c.end; j += WIDTH<T>) sum += exp_nonpositive(exponents(j) - level);
            const T total = horizontal_sum<T>(sum);
            rows_of_logs[i] = total > 0 ? -level - std::log(total) : T(0);
        }
    }

    // potentials = −log Σ_i exp(L + rows_of_logs), 0 where nothing is left.
    void find_column_logarithms(Columns c, bool with_rows) {
        for (int64_t j = c.begin; j < c.end; j += WIDTH<T>) {
            const auto exponents = [&](int64_t i) { return logits(i, j) + (with_rows ? rows_of_logs[i] : T(0)); };
            Vec<T> most = splat<T>(-INF<T>), sum{};
            for (int64_t i = 0; i < N; ++i) most = greater<T>(exponents(i), most);
            const Vec<T> level = finite_shift<T, Vec<T>>(most);
            for (int64_t i = 0; i < N; ++i) sum += exp_nonpositive(exponents(i) - level);
            for (int l = 0; l < WIDTH<T>; ++l) potentials[j + l] = sum[l] > 0 ? -level[l] - std::log(sum[l]) : T(0);
        }
    }

    // E = exp(L + by·(rows_of_logs + potentials)), of which all factors are 1.
    void exponentiate(int first, int last, Columns c, T by) {
        for (int64_t i = 0; i < N; ++i) {
            for (int64_t j = c.begin; j < c.end; j += WIDTH<T>)
                store<T>(&A[i * ld + j], exp_nonpositive(logits(i, j) + (load<T>(&potentials[j]) + rows_of_logs[i]) * by));
            row_factors[first * padded + i] = row_factors[last * padded + i] = 1;
        }
    }
};

}  // namespace drift::DRIFT_ISA
