// The Python module drift_ops._cuda: raw device addresses, sizes and a stream in. Arguments are checked in Python
// (drift_ops/cuda.py is the only caller).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.hpp"

namespace py = pybind11;
using namespace drift::cuda;

namespace {

template <class T> T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

struct AffinityProblem {
    int64_t groups, N, M, D, split;
    bool gaussian, has_self, split_products;
    std::vector<double> widths;
    double temperature, floor, least_distance, self_distance;
    uintptr_t unit;
    int device;
    uintptr_t stream;

    Device where() const { return {device, at<void>(stream)}; }
    template <class T> Affinity<T> problem(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t w) const {
        if (widths.size() > MAX_WIDTHS)
            throw std::invalid_argument("got " + std::to_string(widths.size()) + " widths, the cuda backend takes at most " + std::to_string(MAX_WIDTHS));
        Affinity<T> p{groups, N, M, D, split, split ? 2 : 1, int(widths.size()), gaussian ? drift::Kernel::gaussian : drift::Kernel::laplace,
                      has_self, split_products, {}, temperature, floor, least_distance, self_distance, at<double>(unit), at<T>(q), at<T>(k),
                      at<T>(v), at<T>(w)};
        std::copy(widths.begin(), widths.end(), p.width);
        return p;
    }

    template <class T>
    int64_t forward(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t w, uintptr_t num, uintptr_t den, uintptr_t row_stats,
                 uintptr_t col_stats, uintptr_t scratch) const {
        return affinity_forward(problem<T>(q, k, v, w), {at<T>(num), at<T>(den), at<T>(row_stats), at<T>(col_stats)}, at<double>(scratch), where());
    }
    template <class T>
    int64_t backward(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t w, uintptr_t row_stats, uintptr_t col_stats, uintptr_t grad_num,
                  uintptr_t grad_den, uintptr_t grad_q, uintptr_t grad_k, uintptr_t grad_v, uintptr_t grad_w, uintptr_t scratch) const {
        return affinity_backward(problem<T>(q, k, v, w),
                              {at<T>(row_stats), at<T>(col_stats), at<T>(grad_num), at<T>(grad_den), at<T>(grad_q), at<T>(grad_k),
                               at<T>(grad_v), at<T>(grad_w)},
                              at<double>(scratch), where());
    }
    template <class T> int64_t scale(uintptr_t q, uintptr_t k, uintptr_t w, uintptr_t means, uintptr_t scratch) const {
        return affinity_scale(problem<T>(q, k, 0, w), at<double>(means), at<double>(scratch), where());
    }
};

struct LossProblem {
    int64_t groups, D;
    std::vector<int> counts;  // of gen, neg, pos
    std::vector<uintptr_t> points, weights;
    std::vector<double> R_list;
    double floor;
    uintptr_t scale, kept;
    bool split_products;
    int device;
    uintptr_t stream;

    Device where() const { return {device, at<void>(stream)}; }
    Loss problem() const {
        Loss p{groups, 1, D, {}, int(R_list.size()), split_products, {}, floor, 1e-4, 1e-3, 100, {}, {}, at<double>(scale), at<float>(kept)};
        for (int kind = 0; kind < 3; ++kind) {
            p.count[kind] = counts.at(kind);
            p.points[kind] = {at<float>(points.at(kind)), {counts[kind] * D, 0, D}};
            p.weights[kind] = {at<float>(weights.at(kind)), {counts[kind], 0, 1}};
        }
        std::copy(R_list.begin(), R_list.end(), p.R);
        return p;
    }
    int64_t find_scale(uintptr_t means, uintptr_t scratch) const { return loss_scale(problem(), at<double>(means), at<double>(scratch), where()); }
    int64_t moments(uintptr_t moments, uintptr_t scratch) const { return loss_moments(problem(), at<float>(moments), at<double>(scratch), where()); }
    void gradient(uintptr_t factors, uintptr_t incoming, uintptr_t grad, std::array<int64_t, 3> strides) const {
        loss_gradient(problem(), at<double>(factors), at<float>(incoming), {at<float>(grad), {strides[0], strides[1], strides[2]}}, where());
    }
};

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    const auto release = py::call_guard<py::gil_scoped_release>();
    m.def("device_error", &device_error);
    m.def("group_fits", [](const std::vector<int>& counts, int widths, int device) { return group_fits(counts[0], counts[0] + counts[1] + counts[2], widths, {device, nullptr}); });
    using A = AffinityProblem;
    py::class_<A>(m, "Affinity")
        .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool, bool, std::vector<double>, double, double, double, double,
                      uintptr_t, int, uintptr_t>(),
             py::kw_only(), py::arg("groups"), py::arg("N"), py::arg("M"), py::arg("D"), py::arg("split"), py::arg("gaussian"),
             py::arg("has_self"), py::arg("split_products"), py::arg("widths"), py::arg("temperature"), py::arg("floor"),
             py::arg("least_distance"), py::arg("self_distance"), py::arg("unit"), py::arg("device"), py::arg("stream"))
        .def("forward_float32", &A::forward<float>, release)
        .def("forward_float64", &A::forward<double>, release)
        .def("backward_float32", &A::backward<float>, release)
        .def("backward_float64", &A::backward<double>, release)
        .def("scale_float32", &A::scale<float>, release)
        .def("scale_float64", &A::scale<double>, release);
    py::class_<LossProblem>(m, "Loss")
        .def(py::init<int64_t, int64_t, std::vector<int>, std::vector<uintptr_t>, std::vector<uintptr_t>, std::vector<double>, double, uintptr_t,
                      uintptr_t, bool, int, uintptr_t>(),
             py::kw_only(), py::arg("groups"), py::arg("D"), py::arg("counts"), py::arg("points"), py::arg("weights"), py::arg("R_list"),
             py::arg("floor"), py::arg("scale"), py::arg("kept"), py::arg("split_products"), py::arg("device"), py::arg("stream"))
        .def("scale", &LossProblem::find_scale, release)
        .def("moments", &LossProblem::moments, release)
        .def("gradient", &LossProblem::gradient, release);
}
