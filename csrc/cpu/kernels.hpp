// The entry points every instruction set provides, for float and double. All arrays are contiguous.
#pragma once
#include <cstdint>

namespace drift {

// Weighted sums under the doubly normalised affinity, the core of forms A and B (and of C for large groups):
//   num[s, g, side, i, :] = Σ_{j in side} w_j A_ij v_j      den[s, g, side, i] = Σ_{j in side} w_j A_ij
// for each of S kernel widths. Keys [0, split) are the first side (negatives), the others the last; sides is 1 or 2.
template <class T> struct AffinityProblem {
    int64_t groups, N, M, D, split;
    int sides, widths;
    int kernel;              // Kernel of affinity.hpp
    const double* width;     // [S]: the temperature T (Laplace) or σ (Gaussian)
    double temperature;      // of the softmax over a Gaussian kernel; unused for Laplace
    double floor, least_distance, self_distance;  // self_distance is added to the pair (query i, key i); +∞ masks it
    bool has_self;           // key i is query i for i < N
    const T *q, *k, *v, *w;  // [G, N, D], [G, M, D], [G, M, D], [G, M] or null
    int threads;
};

template <class T> struct AffinitySums {
    T *num, *den;              // [S, G, sides, N, D], [S, G, sides, N]
    T *row_stats, *col_stats;  // [S, G, 2, N], [S, G, 2, M]: maximum and (sum of exponentials)^-½ of the logits
};

template <class T> struct AffinityGradients {
    const T *row_stats, *col_stats;  // of the forward
    const T *grad_num, *grad_den;
    T *grad_q, *grad_k, *grad_v, *grad_w;  // like q, k, v, w, and zero on entry; grad_w may be null
};

// Form C, the loss over the groups of one feature map: targets are [gen, neg, pos].
template <class T> struct LossProblem {
    int64_t groups, D;
    int64_t count[3];    // of gen, neg, pos
    const T* points[3];  // [G, count, D]
    const T* weights[3];  // [G, count]
    int threads;
};

template <class T> struct Kernels {
    void (*affinity_forward)(const AffinityProblem<T>&, const AffinitySums<T>&);
    void (*affinity_backward)(const AffinityProblem<T>&, const AffinityGradients<T>&);
    // sums[2] = {Σ d·w, Σ w}; kept receives the distances [G, N, M rounded up to 16], null: they are not kept.
    void (*loss_scale)(const LossProblem<T>&, double* sums, T* kept);
    // forces [R, G, N, D] before the division by λ; moments [G, R, R] = mean_{i,dim} forces_r·forces_s.
    void (*loss_moments)(const LossProblem<T>&, double scale, int R, const double* R_list, double floor, T* kept, T* forces, T* moments);
    // grad [G, size] = group_factors[g]·Σ_R forces_R·factors_R.
    void (*loss_gradient)(int64_t groups, int64_t size, int R, const T* forces, const double* factors, const T* group_factors,
                          int threads, T* grad);
};

namespace avx512 { extern const Kernels<float> float_kernels; extern const Kernels<double> double_kernels; }
namespace avx2 { extern const Kernels<float> float_kernels; extern const Kernels<double> double_kernels; }
namespace portable { extern const Kernels<float> float_kernels; extern const Kernels<double> double_kernels; }

}  // namespace drift
