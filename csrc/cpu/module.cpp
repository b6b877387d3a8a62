// The Python module drift_ops._cpu: raw addresses and sizes in, the kernels of the best instruction set this machine has.
// Arguments are checked in Python (drift_ops/cpu.py is the only caller).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.hpp"

namespace py = pybind11;
using namespace drift;

namespace {

struct InstructionSet {
    std::string name;
    const Kernels<float>* of_float;
    const Kernels<double>* of_double;
};

// Best first.
std::vector<InstructionSet> supported() {
    std::vector<InstructionSet> sets;
#ifdef DRIFT_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        sets.push_back({"avx512", &avx512::float_kernels, &avx512::double_kernels});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        sets.push_back({"avx2", &avx2::float_kernels, &avx2::double_kernels});
#endif
    sets.push_back({"portable", &portable::float_kernels, &portable::double_kernels});
    return sets;
}

InstructionSet chosen = supported().front();

void choose(const std::string& name) {
    std::string known;
    for (const auto& set : supported()) {
        if (set.name == name) {
            chosen = set;
            return;
        }
        known += (known.empty() ? "" : ", ") + set.name;
    }
    throw std::invalid_argument("instruction set '" + name + "' is not available on this machine; available: " + known);
}

template <class T> const Kernels<T>& kernels() {
    if constexpr (sizeof(T) == 4)
        return *chosen.of_float;
    else
        return *chosen.of_double;
}

template <class T> T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

struct Affinity {
    int64_t groups, N, M, D, split;
    int sides;
    bool gaussian, has_self;
    std::vector<double> widths;
    double temperature, floor, least_distance, self_distance;
    int threads;

    template <class T> AffinityProblem<T> problem(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t w) const {
        return {groups, N, M, D, split, sides, int(widths.size()), gaussian ? 1 : 0, widths.data(), temperature, floor, least_distance,
                self_distance, has_self, at<T>(q), at<T>(k), at<T>(v), at<T>(w), threads};
    }
    template <class T>
    void forward(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t w, uintptr_t num, uintptr_t den, uintptr_t row_stats,
                 uintptr_t col_stats) const {
        kernels<T>().affinity_forward(problem<T>(q, k, v, w), {at<T>(num), at<T>(den), at<T>(row_stats), at<T>(col_stats)});
    }
    template <class T>
    void backward(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t w, uintptr_t row_stats, uintptr_t col_stats, uintptr_t grad_num,
                  uintptr_t grad_den, uintptr_t grad_q, uintptr_t grad_k, uintptr_t grad_v, uintptr_t grad_w) const {
        kernels<T>().affinity_backward(problem<T>(q, k, v, w),
                                       {at<T>(row_stats), at<T>(col_stats), at<T>(grad_num), at<T>(grad_den), at<T>(grad_q),
                                        at<T>(grad_k), at<T>(grad_v), at<T>(grad_w)});
    }
};

struct Loss {
    int64_t groups, D;
    std::vector<int64_t> counts;         // of gen, neg, pos
    std::vector<uintptr_t> points, weights;
    int threads;

    template <class T> LossProblem<T> problem() const {
        LossProblem<T> p{groups, D, {}, {}, {}, threads};
        for (int kind = 0; kind < 3; ++kind)
            p.count[kind] = counts.at(kind), p.points[kind] = at<T>(points.at(kind)), p.weights[kind] = at<T>(weights.at(kind));
        return p;
    }
    template <class T> void scale(uintptr_t sums, uintptr_t kept) const {
        kernels<T>().loss_scale(problem<T>(), at<double>(sums), at<T>(kept));
    }
    template <class T>
    void moments(double scale, const std::vector<double>& R_list, double floor, uintptr_t kept, uintptr_t forces, uintptr_t moments) const {
        kernels<T>().loss_moments(problem<T>(), scale, int(R_list.size()), R_list.data(), floor, at<T>(kept), at<T>(forces),
                                  at<T>(moments));
    }
};

template <class T>
void loss_gradient(int64_t groups, int64_t size, const std::vector<double>& factors, int threads, uintptr_t forces,
                   uintptr_t group_factors, uintptr_t grad) {
    kernels<T>().loss_gradient(groups, size, int(factors.size()), at<T>(forces), factors.data(), at<T>(group_factors), threads,
                               at<T>(grad));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    const auto release = py::call_guard<py::gil_scoped_release>();
    m.def("choose", &choose);
    m.def("chosen", [] { return chosen.name; });
    m.def("supported", [] {
        std::vector<std::string> names;
        for (const auto& set : supported()) names.push_back(set.name);
        return names;
    });
    py::class_<Affinity>(m, "Affinity")
        .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, int, bool, bool, std::vector<double>, double, double, double, double, int>(),
             py::kw_only(), py::arg("groups"), py::arg("N"), py::arg("M"), py::arg("D"), py::arg("split"), py::arg("sides"),
             py::arg("gaussian"), py::arg("has_self"), py::arg("widths"), py::arg("temperature"), py::arg("floor"),
             py::arg("least_distance"), py::arg("self_distance"), py::arg("threads"))
        .def("forward_float32", &Affinity::forward<float>, release)
        .def("forward_float64", &Affinity::forward<double>, release)
        .def("backward_float32", &Affinity::backward<float>, release)
        .def("backward_float64", &Affinity::backward<double>, release);
    py::class_<Loss>(m, "Loss")
        .def(py::init<int64_t, int64_t, std::vector<int64_t>, std::vector<uintptr_t>, std::vector<uintptr_t>, int>(), py::kw_only(),
             py::arg("groups"), py::arg("D"), py::arg("counts"), py::arg("points"), py::arg("weights"), py::arg("threads"))
        .def("scale_float32", &Loss::scale<float>, release)
        .def("scale_float64", &Loss::scale<double>, release)
        .def("moments_float32", &Loss::moments<float>, release)
        .def("moments_float64", &Loss::moments<double>, release);
    m.def("loss_gradient_float32", &loss_gradient<float>, release);
    m.def("loss_gradient_float64", &loss_gradient<double>, release);
}
