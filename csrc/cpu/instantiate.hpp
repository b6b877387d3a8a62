// Included by one source per instruction set, which is compiled with that instruction set's flags (setup.py).
#include "loss.hpp"

namespace drift::DRIFT_ISA {

const Kernels<float> float_kernels{affinity_forward<float>, affinity_backward<float>, loss_scale<float>, loss_moments<float>,
                                   loss_gradient<float>};
const Kernels<double> double_kernels{affinity_forward<double>, affinity_backward<double>, loss_scale<double>, loss_moments<double>,
                                     loss_gradient<double>};

}  // namespace drift::DRIFT_ISA
