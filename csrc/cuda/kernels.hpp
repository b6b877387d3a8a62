// What the CUDA kernels are called with: plain structures of device pointers and sizes, no CUDA types, so that module.cpp
// needs no CUDA compiler. Arrays are contiguous where they are not Rows. Errors of the CUDA runtime are thrown as
// std::runtime_error.
#pragma once
#include <cstdint>

#include "../spec.hpp"

namespace drift::cuda {

constexpr int MAX_WIDTHS = 64;  // of one call: they travel as kernel arguments

struct Device {
    int index;
    void* stream;
};

// Weighted sums under the doubly normalised affinity:
//   num[s, g, side, i, :] = Σ_{j in side} w_j A_ij v_j      den[s, g, side, i] = Σ_{j in side} w_j A_ij
// Keys [0, split) are side 0, the others the last side.
template <class T> struct Affinity {
    int64_t groups, N, M, D, split;
    int sides, widths;
    LogitKind logit;
    bool has_self;                                // key i is query i for i < N
    bool split_products;                          // float: products of both halves, otherwise of the high ones
    double width[MAX_WIDTHS], temperature;        // widths in units of *unit
    double floor, least_distance, self_distance;  // self_distance, in units of *unit, is added to self pairs; +∞ masks them
    const double* unit;                           // device; null: 1
    const T *q, *k, *v, *w;                       // [G, N, D], [G, M, D], [G, M, D], [G, M] or null
    // Of sums over pairs, instead of logit, width, temperature, self_distance and unit: widths [S, G], and the distances [G] of
    // queries to themselves.
    CostKind cost;
    const T *pair_widths, *self_distances;
};

template <class T> struct Sums {
    T *num, *den;              // [S, G, sides, N, D], [S, G, sides, N]
    T *row_stats, *col_stats;  // [S, G, 2, N], [S, G, 2, M]: maximum and (sum of exponentials)^-½ of the logits
};

template <class T> struct Gradients {
    const T *row_stats, *col_stats;  // of the forward
    const T *grad_num, *grad_den;
    T *grad_q, *grad_k, *grad_v, *grad_w;  // like q, k, v, w
    // Of sums over pairs, of which any incoming gradient may be null; the flows are those of drift_ops.ops.pairs.
    const T* grad_columns;                   // [S, G, M]
    T *row_flow, *col_flow, *width_flow;     // [S, G, N], [S, G, M], [S, G, N]
};

// Every function that takes `scratch` returns how many doubles of scratch memory it wants, and does no more where that is null.
template <class T> int64_t affinity_forward(const Affinity<T>&, const Sums<T>&, double* scratch, Device);
template <class T> int64_t affinity_backward(const Affinity<T>&, const Gradients<T>&, double* scratch, Device);
// Sums over pairs, whose statistics are potentials: twice their values, and 1.
template <class T> int64_t pair_log_sums(const Affinity<T>&, const T* potential, bool by_row, T* sums, double* scratch, Device);
template <class T> int64_t pair_weighted_sums(const Affinity<T>&, const Sums<T>&, double* scratch, Device);
template <class T> int64_t pair_gradients(const Affinity<T>&, const Gradients<T>&, double* scratch, Device);
template <class T> int64_t affinity_scale(const Affinity<T>&, double* means, double* scratch, Device);  // means as of loss_scale

// Form C for groups small enough for the shared memory of one block of threads; targets are [gen, neg, pos].
constexpr int MAX_LOSS_WIDTHS = 4, MAX_LOSS_SAMPLES = 64;

struct Loss {
    int64_t groups, D;
    int widths;  // R
    bool split_products;
    double R[MAX_LOSS_WIDTHS], floor, least_distance, least_scale, self_distance;
    Rows<const float> points[3], weights[3];  // of gen, neg, pos
    const double* scale;                      // device
    float* kept;  // the distances [G, N, targets] that loss_scale leaves for the others; null: found again
    DRIFT_MATH int count(int kind) const { return int(points[kind].count); }
    DRIFT_MATH int targets() const { return count(0) + count(1) + count(2); }
};

bool group_fits(int samples, int targets, int widths, Device);  // what the others take
// means[0] = mean_{g,i,j} d·w_j and means[1] = mean_{g,j} w_j.
int64_t loss_scale(const Loss&, double* means, double* scratch, Device);
int64_t loss_moments(const Loss&, float* moments, double* scratch, Device);  // [G, R, R]: mean_{i, dim} F_r F_r'
void loss_gradient(const Loss&, const double* factors, const float* incoming, const Rows<float>& grad, Device);

const char* device_error();  // why the CUDA runtime finds no device; null where it finds one

}  // namespace drift::cuda
