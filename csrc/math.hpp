// The mathematics of the doubly normalised affinity, element by element: shared by the CPU kernels (V a vector of T)
// and the CUDA kernels (V = T).
//
// A_ij = sqrt(softmax_j(L)_ij · softmax_i(L)_ij). With the row maximum m_i and row sum s_i = Σ_j exp(L_ij − m_i), and
// likewise n_j, t_j for columns, A_ij = exp(L_ij − (m_i + n_j)/2) · (s_i · t_j)^-½: two statistics a row and a column, one
// exponential an element, no matrix kept.
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

// Constants of form C, the release's training loss.
constexpr double LEAST_LOSS_DISTANCE = 1e-4;  // distances are at least this
constexpr double LEAST_SCALE = 1e-3;          // so is what distances are divided by
constexpr double LOSS_SELF_DISTANCE = 100;    // added to the distance of a sample to itself, in units of the scale

enum class Kernel : int { laplace, gaussian };

// −∞ (nothing unmasked so far) shifts by 0, so that exp(−∞ − shift) is 0 and not NaN.
template <class T, class V> DRIFT_MATH V finite_shift(V max) {
    constexpr T LEAST = std::numeric_limits<T>::lowest();
    return max < LEAST ? V{} : max;
}

// Running maximum and sum of exp(L − max) to what A wants: the maximum and sum^-½. An index with nothing unmasked (sum 0)
// gets max 0 and factor 0, hence affinity 0.
template <class T> DRIFT_MATH void finish_statistics(T& max, T& sum) {
    const bool empty = sum == 0;
    max = empty ? 0 : max;
    sum = empty ? 0 : 1 / std::sqrt(sum);
}

// L = −d/T (Laplace) or exp(−d²/(2σ²))/T (Gaussian).
template <class T> struct Logit {
    Kernel kernel;
    T sigma, temperature;

    DRIFT_MATH T at(T distance) const {
        if (kernel == Kernel::laplace) return distance * (T(-1) / temperature);
        return std::exp(distance * distance * (T(-0.5) / (sigma * sigma))) * (T(1) / temperature);
    }

    // The factor h for which the gradient of L w.r.t. q_i, times dL, is h·(q_i − k_j); 0 where the points coincide.
    template <class V> DRIFT_MATH V point_factor(V logit, V distance, V grad_logit) const {
        if (kernel == Kernel::laplace) {
            const V h = -grad_logit / (distance * temperature);
            return distance > T(0) ? h : V{};
        }
        const V value = logit < T(0) ? V{} : logit;  // −∞ where there is no pair
        return -grad_logit * value / (sigma * sigma);
    }
};

}  // namespace drift
