// Specs and tensors of Python as the structures of the kernels. Of a tensor no more is asked than its address, shape and
// strides, so that no torch is needed to build this, and any torch will do.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "spec.hpp"

namespace drift {

namespace py = pybind11;

template <class T> T field(py::handle spec, const char* name) { return spec.attr(name).cast<T>(); }

// A field of a spec that is one of these names, as the enumerator in the same place.
template <class Kind, size_t COUNT> Kind kind(py::handle spec, const char* name, const char* const (&names)[COUNT]) {
    const auto value = field<std::string>(spec, name);
    for (size_t n = 0; n < COUNT; ++n)
        if (value == names[n]) return Kind(n);
    throw std::invalid_argument(name + (": got '" + value) + "', which the compiled kernels do not know");
}

inline AffinitySpec affinity_spec(py::handle spec) {
    return {kind<LogitKind>(spec, "logit", LOGIT_NAMES), field<std::vector<double>>(spec, "widths"), field<double>(spec, "temperature"),
            field<double>(spec, "floor"), field<bool>(spec, "has_self"), field<int>(spec, "sides"),
            field<double>(spec, "least_distance"), field<double>(spec, "self_distance")};
}

inline PairSpec pair_spec(py::handle spec) {
    return {kind<CostKind>(spec, "cost", COST_NAMES), field<bool>(spec, "has_self"), field<double>(spec, "self_cost"),
            field<int>(spec, "sides"), field<double>(spec, "floor"), field<double>(spec, "least_distance")};
}

inline LossSpec loss_spec(py::handle spec) {
    return {field<std::vector<double>>(spec, "R_list"), field<double>(spec, "floor"), field<double>(spec, "least_distance"),
            field<double>(spec, "least_scale"), field<double>(spec, "self_distance"), field<double>(spec, "least_squared_lambda")};
}

// Where a tensor's elements start; null for None and where there are none.
template <class T> T* data(py::handle tensor) {
    return tensor.is_none() ? nullptr : reinterpret_cast<T*>(tensor.attr("data_ptr")().cast<uintptr_t>());
}

inline int64_t element(const py::tuple& numbers, size_t n) { return py::cast<int64_t>(numbers[n]); }

// A tensor [L, T, count, …] or [groups, count, …], with so many dimensions behind `count`.
template <class T> Rows<T> rows(py::handle tensor, int behind) {
    const py::tuple shape = tensor.attr("shape"), strides = tensor.attr("stride")();
    const size_t at = shape.size() - behind - 1;
    const bool parted = at == 2;
    return {data<T>(tensor), element(shape, at), parted ? element(shape, 1) : 1,
            {element(strides, 0), parted ? element(strides, 1) : 0, element(strides, at)}};
}

}  // namespace drift
