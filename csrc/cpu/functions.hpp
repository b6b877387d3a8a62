// What every instruction set provides, for float and double.
#pragma once
#include <vector>

#include "../spec.hpp"

namespace drift {

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
    int64_t M() const {
        int64_t sum = 0;
        for (const auto& array : keys) sum += array.count;
        return sum;
    }
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
