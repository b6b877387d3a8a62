// Included by one source per instruction set, which is compiled with that instruction set's flags (setup.py).
#include "affinity_backward.hpp"
#include "affinity_forward.hpp"
#include "loss.hpp"
#include "pairs_backward.hpp"
#include "pairs_forward.hpp"

namespace drift::DRIFT_ISA {

template <class T>
constexpr Functions<T> FUNCTIONS{affinity_forward<T>, affinity_backward<T>, log_sums<T>,     weighted_sums<T>,
                                 pair_gradients<T>,   loss_scale<T>,        loss_moments<T>, loss_gradient<T>};
extern const Functions<float> of_float = FUNCTIONS<float>;
extern const Functions<double> of_double = FUNCTIONS<double>;

}  // namespace drift::DRIFT_ISA
