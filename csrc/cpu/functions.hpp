// What every instruction set provides, for float and double.
#pragma once
#include <cmath>
#include <vector>

#include "../spec.hpp"

namespace drift {

template <class T> int64_t count(const std::vector<Rows<const T>>& arrays) {
    int64_t sum = 0;
    for (const auto& array : arrays) sum += array.count;
    return sum;
}

// Weighted sums under the doubly normalised affinity, the core of forms A and B (and of C for large groups):
//   num[s, g, side, i, :] = Σ_{j in side} w_j A_ij (v_j − centre)      den[s, g, side, i] = Σ_{j in side} w_j A_ij
// for each of S widths. Keys come in arrays, one after the other M a problem; with two sides the last array is the second.
template <class T> struct AffinityProblem {
    const AffinitySpec& spec;
    int64_t groups, D;
    Rows<const T> q;
    std::vector<Rows<const T>> keys, values;  // no values: they are the keys
    const T* w;                               // [G, M] or null
    int threads;
    int64_t M() const { return count(keys); }
    int64_t S() const { return int64_t(spec.widths.size()); }
    const std::vector<Rows<const T>>& summed() const { return values.empty() ? keys : values; }
    Logit<T> logit(int64_t s, int64_t) const { return {spec.logit, T(spec.widths[s]), T(spec.temperature)}; }
    double self_distance(int64_t) const { return spec.self_distance; }
};

template <class T> struct AffinitySums {
    T *num, *den;              // [S, G, sides, N, D], [S, G, sides, N]
    T *row_stats, *col_stats;  // [S, G, 2, N], [S, G, 2, M]: level and (sum of exponentials)^-½ of the logits
    T* centre;                 // [G, D], of the values
};

template <class T> struct AffinityGradients {
    const T *row_stats, *col_stats, *centre;  // of the forward
    const T *grad_num, *grad_den;
    T* grad_q;                                // this and the rest are contiguous, and zero on entry
    std::vector<T*> grad_keys, grad_values;   // no gradients of values: they belong to those of keys
    T* grad_w;                                // [G, M] or null
};

// Sums over pairs under A_ij = exp(L_ij − α_i − β_j), of which the family of fields is composed, with logits
// L = −(C/unit + self_cost)/width for each of S widths: see drift_ops/ops/pairs.py.
template <class T> struct PairProblem {
    const PairSpec& spec;
    int64_t groups, D;
    Rows<const T> q;
    std::vector<Rows<const T>> keys;
    const T* w;                         // [G, M] or null
    std::vector<double> widths, units;  // [S], [G]
    const T *alpha, *beta;              // [S, G, N], [S, G, M]; null: 0
    int threads;
    int64_t M() const { return count(keys); }
    int64_t S() const { return int64_t(widths.size()); }
    const std::vector<Rows<const T>>& summed() const { return keys; }
    CostLogit<T> logit(int64_t s, int64_t g) const { return {spec.cost, T(widths[s] * units[g]), T(spec.least_distance)}; }
    // What makes the cost of a query to itself larger by self_cost units when it is added to its distance.
    double self_distance(int64_t g) const {
        const double more = spec.self_cost * units[g], least = spec.least_distance;
        return spec.cost == CostKind::l2 ? more : std::sqrt(least * least + more) - least;
    }
};

template <class T> struct LogSums {
    bool by_row;
    T* sums;  // [S, G, N] by row, else [S, G, M]
};

template <class T> struct PairSums {
    T *num, *den;     // [S, G, sides, N, D], [S, G, sides, N]
    const T* centre;  // [G, D], or null for 0
};

template <class T> struct PairGradients {
    const T *centre, *grad_num, *grad_den, *grad_columns;  // each null where it is 0
    T* grad_q;  // this and the rest are contiguous, and zero on entry
    std::vector<T*> grad_keys;
    T* grad_w;                              // [G, M] or null
    T *row_flow, *col_flow, *width_flow;  // [S, G, N], [S, G, M], [S, G, N]
};

constexpr int64_t GROUP_PAIRS = int64_t(1) << 18;  // of a group of form C that stays in cache; larger ones are streamed
constexpr int64_t KEEP_DISTANCES_FROM_D = 32;      // where finding them again in phase 2 would cost more than the memory
constexpr int64_t KEPT_ALIGN = 16;                 // columns; a multiple of every vector width

// Columns of the targets of form C: negatives and positives, each padded to whole vectors.
inline int64_t loss_columns(int64_t negatives, int64_t positives) {
    return (negatives + KEPT_ALIGN - 1) / KEPT_ALIGN * KEPT_ALIGN + (positives + KEPT_ALIGN - 1) / KEPT_ALIGN * KEPT_ALIGN;
}

// Form C, the loss over the groups of one feature map.
template <class T> struct LossProblem {
    const LossSpec& spec;
    int64_t groups, D;
    Rows<const T> points[3], weights[3];  // of gen, neg, pos
    int threads;
    int64_t N() const { return points[0].count; }
    int64_t negatives() const { return (spec.include_self ? points[0].count : 0) + points[1].count; }
    int64_t M() const { return negatives() + points[2].count; }
    int64_t columns() const { return loss_columns(negatives(), points[2].count); }
    // Costs of a group that phase 1 keeps for phase 2.
    int64_t kept_of_group() const { return N() * M() <= GROUP_PAIRS && D >= KEEP_DISTANCES_FROM_D ? N() * columns() : 0; }
};

// Numbers [groups, count], or [1, count] that are those of every group.
struct OfGroups {
    const double* first;
    int64_t stride;
    const double* operator()(int64_t g) const { return first + g * stride; }
};

template <class T> struct Functions {
    void (*affinity_forward)(const AffinityProblem<T>&, const AffinitySums<T>&);
    void (*affinity_backward)(const AffinityProblem<T>&, const AffinityGradients<T>&);
    void (*log_sums)(const PairProblem<T>&, const LogSums<T>&);
    void (*weighted_sums)(const PairProblem<T>&, const PairSums<T>&);
    void (*pair_gradients)(const PairProblem<T>&, const PairGradients<T>&);
    // means [1 or G, 2] = {mean C·w, mean w} over all pairs; kept [G, kept_of_group] receives the costs, null: they are not kept.
    void (*loss_scale)(const LossProblem<T>&, double* means, T* kept);
    // forces [R, G, N, D] before the division by λ; moments [G, R, R] = mean_{i,dim} forces_r·forces_s; details [6, R, G, N] or null.
    void (*loss_moments)(const LossProblem<T>&, OfGroups scale, T* kept, T* forces, T* moments, T* details);
    // grad_g = −2·incoming_g·Σ_R forces_R·factors_R / (N·D·s), where a group's numbers are {scale, factors}.
    void (*loss_gradient)(const LossSpec&, const Rows<T>& grad, int64_t groups, int64_t D, OfGroups numbers, const T* forces,
                          const T* incoming, int threads);
};

namespace avx512 { extern const Functions<float> of_float; extern const Functions<double> of_double; }
namespace avx2 { extern const Functions<float> of_float; extern const Functions<double> of_double; }
namespace portable { extern const Functions<float> of_float; extern const Functions<double> of_double; }

}  // namespace drift
