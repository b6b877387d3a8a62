// The mathematics of the doubly normalised affinity, element by element: shared by the CPU code (V a vector of T) and the
// CUDA kernels (V = T).
//
// A_ij = sqrt(softmax_j(L)_ij · softmax_i(L)_ij). With a level m_i of row i, of which its maximum is the safest, and the row
// sum s_i = Σ_j exp(L_ij − m_i), and likewise n_j, t_j for columns, A_ij = exp(L_ij − (m_i + n_j)/2) · (s_i · t_j)^-½: two
// statistics a row and a column, one exponential an element, no matrix kept.
#pragma once
#include <cmath>
#include <limits>

#ifdef __CUDACC__
#define DRIFT_MATH __host__ __device__ __forceinline__
#else
#define DRIFT_MATH inline __attribute__((always_inline))
#endif

namespace drift {

// Pairs with d² below this share of their squared norms (5 bits lost in ‖q‖² + ‖k‖² − 2q·k) are worked out from differences.
constexpr double CLOSE = 1.0 / 32;

// −∞ (nothing unmasked so far) shifts by 0, so that exp(−∞ − shift) is 0 and not NaN.
template <class T, class V> DRIFT_MATH V finite_shift(V max) {
    constexpr T LEAST = std::numeric_limits<T>::lowest();
    return max < LEAST ? V{} : max;
}

// Level and sum of exp(L − level) to what A wants: the level and sum^-½. An index with nothing unmasked (sum 0) gets level 0
// and factor 0, hence affinity 0.
template <class T> DRIFT_MATH void finish_statistics(T& level, T& sum) {
    const bool empty = sum == 0;
    level = empty ? 0 : level;
    sum = empty ? 0 : 1 / std::sqrt(sum);
}

enum class LogitKind : int { laplace, gaussian };
constexpr const char* LOGIT_NAMES[] = {"laplace", "gaussian"};  // as in drift_ops/spec.py

// The logit L of a distance: −d/width (Laplace) or exp(−d²/(2·width²))/temperature (Gaussian); −∞ at infinite distance.
template <class T> struct Logit {
    LogitKind kind;
    T width, temperature;

    template <class V, class Exp> DRIFT_MATH V at(V distance, Exp exp_nonpositive) const {
        if (kind == LogitKind::laplace) return distance * (T(-1) / width);
        const V logit = exp_nonpositive(V(distance * distance * (T(-0.5) / (width * width)))) * (T(1) / temperature);
        return distance > std::numeric_limits<T>::max() ? V{} - std::numeric_limits<T>::infinity() : logit;
    }
    DRIFT_MATH T at(T distance) const {
        return at(distance, [](T x) { return std::exp(x); });
    }
    // What no logit exceeds.
    DRIFT_MATH T largest() const { return kind == LogitKind::laplace ? T(0) : T(1) / temperature; }

    // The factor h for which the gradient of L w.r.t. q_i, times dL, is h·(q_i − k_j); 0 where the points coincide.
    template <class V> DRIFT_MATH V point_factor(V logit, V distance, V grad_logit) const {
        if (kind == LogitKind::laplace) {
            const V h = -grad_logit / (distance * width);
            return distance > T(0) ? h : V{};
        }
        const V value = logit < T(0) ? V{} : logit;  // −∞ where there is no pair
        return -grad_logit * value / (width * width);
    }
};

enum class CostKind : int { l2, l2_sq };
constexpr const char* COST_NAMES[] = {"l2", "l2_sq"};  // as in drift_ops/spec.py

// The logit L of a distance d in the family of fields: −d/width or −d²/width; −∞ at infinite distance.
template <class T> struct CostLogit {
    CostKind kind;
    T width, least_distance;

    template <class V> DRIFT_MATH V at(V distance) const {
        return (kind == CostKind::l2 ? distance : V(distance * distance)) * (T(-1) / width);
    }
    // The factor h for which the gradient of L w.r.t. q_i, times dL, is h·(q_i − k_j); 0 up to the least distance, which
    // all nearer pairs have.
    template <class V> DRIFT_MATH V point_factor(V distance, V grad_logit) const {
        const V h = kind == CostKind::l2 ? V(-grad_logit / (distance * width)) : V(grad_logit * (T(-2) / width));
        return distance > least_distance ? h : V{};
    }
};

}  // namespace drift
