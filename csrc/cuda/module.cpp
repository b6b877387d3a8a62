// The Python module drift_ops._cuda: specs and tensors in, as drift_ops/cuda.py has checked and laid them out.
#include "../python.hpp"

#include <algorithm>

#include "kernels.hpp"

namespace {

using namespace drift;
using namespace drift::cuda;

// Where and how the kernels of a call run; `allocate(n)` makes a tensor of so many doubles.
struct Launch {
    bool float64, split_products;
    Device device;
    py::function allocate;

    template <class Call> void in_dtype(Call call) const { float64 ? call(double()) : call(float()); }
    // Calls run(scratch memory) with as much as run(nullptr) says it wants.
    template <class Run> void with_scratch(Run run) const {
        const py::object scratch = allocate(run(nullptr) + 1);
        double* memory = data<double>(scratch);
        const py::gil_scoped_release release;
        run(memory);
    }
};

// Of q, k, v, w and the keys of all tensors but the last.
template <class T>
Affinity<T> affinity(const AffinitySpec& spec, py::tuple points, int64_t first, py::handle unit, const Launch& launch) {
    const py::tuple of_queries = points[0].attr("shape"), of_keys = points[1].attr("shape");
    Affinity<T> p{element(of_queries, 0), element(of_queries, 1), element(of_keys, 1), element(of_queries, 2), spec.sides == 2 ? first : 0,
                  spec.sides, int(spec.widths.size()), spec.logit, spec.has_self, launch.split_products, {}, spec.temperature, spec.floor,
                  spec.least_distance, spec.self_distance, data<double>(unit), data<T>(points[0]), data<T>(points[1]), data<T>(points[2]),
                  data<T>(points[3]), CostKind{}, nullptr, nullptr};
    if (spec.widths.size() > MAX_WIDTHS) throw std::invalid_argument("too many widths for one call");
    std::copy(spec.widths.begin(), spec.widths.end(), p.width);
    return p;
}

void find_sums(py::handle spec, py::tuple points, int64_t first, py::handle unit, py::tuple sums, const Launch& launch) {
    launch.in_dtype([&](auto number) {
        using T = decltype(number);
        const Affinity<T> p = affinity<T>(affinity_spec(spec), points, first, unit, launch);
        const Sums<T> out{data<T>(sums[0]), data<T>(sums[1]), data<T>(sums[2]), data<T>(sums[3])};
        launch.with_scratch([&](double* scratch) { return affinity_forward(p, out, scratch, launch.device); });
    });
}

void find_gradients(py::handle spec, py::tuple points, int64_t first, py::tuple known, py::tuple grads,
                    const Launch& launch) {
    launch.in_dtype([&](auto number) {
        using T = decltype(number);
        const Affinity<T> p = affinity<T>(affinity_spec(spec), points, first, py::none(), launch);
        const Gradients<T> io{data<T>(known[0]), data<T>(known[1]), data<T>(known[2]), data<T>(known[3]),
                              data<T>(grads[0]), data<T>(grads[1]), data<T>(grads[2]), data<T>(grads[3])};
        launch.with_scratch([&](double* scratch) { return affinity_backward(p, io, scratch, launch.device); });
    });
}

// The same of sums over pairs; `widths` are those [S, G] and the distances [G] of queries to themselves.
template <class T> Affinity<T> pairs(const PairSpec& spec, py::tuple points, int64_t first, py::tuple widths, const Launch& launch) {
    const py::tuple of_queries = points[0].attr("shape"), of_keys = points[1].attr("shape"), of_widths = widths[0].attr("shape");
    return {element(of_queries, 0), element(of_queries, 1), element(of_keys, 1), element(of_queries, 2), spec.sides == 2 ? first : 0,
            spec.sides, int(element(of_widths, 0)), LogitKind{}, spec.has_self, launch.split_products, {}, 0, spec.floor,
            spec.least_distance, 0, nullptr, data<T>(points[0]), data<T>(points[1]), data<T>(points[2]), data<T>(points[3]),
            spec.cost, data<T>(widths[0]), data<T>(widths[1])};
}

void find_log_sums(py::handle spec, py::tuple points, py::tuple widths, py::handle potential, bool by_row, py::handle sums,
                   const Launch& launch) {
    launch.in_dtype([&](auto number) {
        using T = decltype(number);
        const Affinity<T> p = pairs<T>(pair_spec(spec), points, 0, widths, launch);
        const T* of_others = data<T>(potential);
        T* out = data<T>(sums);
        launch.with_scratch([&](double* scratch) { return pair_log_sums(p, of_others, by_row, out, scratch, launch.device); });
    });
}

void find_pair_sums(py::handle spec, py::tuple points, int64_t first, py::tuple widths, py::tuple stats, py::tuple sums, const Launch& launch) {
    launch.in_dtype([&](auto number) {
        using T = decltype(number);
        const Affinity<T> p = pairs<T>(pair_spec(spec), points, first, widths, launch);
        const Sums<T> io{data<T>(sums[0]), data<T>(sums[1]), data<T>(stats[0]), data<T>(stats[1])};
        launch.with_scratch([&](double* scratch) { return pair_weighted_sums(p, io, scratch, launch.device); });
    });
}

void find_pair_gradients(py::handle spec, py::tuple points, int64_t first, py::tuple widths, py::tuple known, py::tuple grads,
                         py::tuple flows, const Launch& launch) {
    launch.in_dtype([&](auto number) {
        using T = decltype(number);
        const Affinity<T> p = pairs<T>(pair_spec(spec), points, first, widths, launch);
        const Gradients<T> io{data<T>(known[0]), data<T>(known[1]), data<T>(known[2]), data<T>(known[3]), data<T>(grads[0]),
                              data<T>(grads[1]), data<T>(grads[2]), data<T>(grads[3]), data<T>(known[4]), data<T>(flows[0]),
                              data<T>(flows[1]), data<T>(flows[2])};
        launch.with_scratch([&](double* scratch) { return pair_gradients(p, io, scratch, launch.device); });
    });
}

void find_scale(py::handle spec, py::tuple points, py::handle means, const Launch& launch) {
    launch.in_dtype([&](auto number) {
        using T = decltype(number);
        const Affinity<T> p = affinity<T>(affinity_spec(spec), points, 0, py::none(), launch);
        double* out = data<double>(means);
        launch.with_scratch([&](double* scratch) { return affinity_scale(p, out, scratch, launch.device); });
    });
}

Loss loss(py::handle spec_object, py::tuple map, py::handle kept, py::handle scale, const Launch& launch) {
    const LossSpec spec = loss_spec(spec_object);
    const py::tuple points = map[0], weights = map[1], of_gen = points[0].attr("shape");
    Loss p{element(of_gen, 0) * element(of_gen, 1), element(of_gen, 3), int(spec.R_list.size()), launch.split_products, {}, spec.floor,
           spec.least_distance, spec.least_scale, spec.self_distance, {}, {}, data<double>(scale), data<float>(kept)};
    if (spec.R_list.size() > MAX_LOSS_WIDTHS) throw std::invalid_argument("too many R for groups in shared memory");
    std::copy(spec.R_list.begin(), spec.R_list.end(), p.R);
    for (int kind = 0; kind < 3; ++kind)
        p.points[kind] = rows<const float>(points[kind], 1), p.weights[kind] = rows<const float>(weights[kind], 0);
    return p;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.attr("MAX_WIDTHS") = MAX_WIDTHS;
    m.def("device_error", &device_error);
    m.def("group_fits", [](int samples, int targets, int widths, int device) {
        return group_fits(samples, targets, widths, {device, nullptr});
    });
    py::class_<Launch>(m, "Launch").def(py::init([](bool float64, bool split_products, int device, uintptr_t stream, py::function allocate) {
        return Launch{float64, split_products, {device, reinterpret_cast<void*>(stream)}, std::move(allocate)};
    }));
    m.def("affinity_forward", &find_sums);
    m.def("affinity_backward", &find_gradients);
    m.def("log_sums", &find_log_sums);
    m.def("weighted_sums", &find_pair_sums);
    m.def("pair_gradients", &find_pair_gradients);
    m.def("affinity_scale", &find_scale);
    m.def("loss_scale", [](py::handle spec, py::tuple map, py::handle kept, py::handle means, const Launch& launch) {
        const Loss p = loss(spec, map, kept, py::none(), launch);
        double* out = data<double>(means);
        launch.with_scratch([&](double* scratch) { return loss_scale(p, out, scratch, launch.device); });
    });
    m.def("loss_moments", [](py::handle spec, py::tuple map, py::handle kept, py::handle scale, py::handle moments, const Launch& launch) {
        const Loss p = loss(spec, map, kept, scale, launch);
        float* out = data<float>(moments);
        launch.with_scratch([&](double* scratch) { return loss_moments(p, out, scratch, launch.device); });
    });
    m.def("loss_gradient", [](py::handle spec, py::tuple map, py::handle kept, py::handle scale, py::handle factors, py::handle incoming,
                              py::handle grad, const Launch& launch) {
        const Loss p = loss(spec, map, kept, scale, launch);
        loss_gradient(p, data<double>(factors), data<float>(incoming), rows<float>(grad, 1), launch.device);
    });
}
