// The Python module drift_ops._cpu: specs and tensors in, the functions of the best instruction set this machine has.
// Arguments are checked in Python (drift_ops/cpu.py is the only caller).
#include <stdexcept>
#include <string>
#include <vector>

#include "../python.hpp"
#include "buffer.hpp"
#include "functions.hpp"

using namespace drift;

namespace {

struct InstructionSet {
    std::string name;
    const Functions<float>* of_float;
    const Functions<double>* of_double;
};

// Best first.
std::vector<InstructionSet> supported() {
    std::vector<InstructionSet> sets;
#ifdef DRIFT_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        sets.push_back({"avx512", &avx512::of_float, &avx512::of_double});
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back({"avx2", &avx2::of_float, &avx2::of_double});
#endif
    sets.push_back({"portable", &portable::of_float, &portable::of_double});
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

const Functions<float>& functions_of(float) { return *chosen.of_float; }
const Functions<double>& functions_of(double) { return *chosen.of_double; }

// Calls body(T()) for the T of a tensor's elements.
template <class Body> void with_type_of(py::handle tensor, Body body) {
    if (tensor.attr("element_size")().cast<int>() == 4)
        body(float());
    else
        body(double());
}

template <class T> std::vector<Rows<T>> list_of_rows(const py::list& tensors) {
    std::vector<Rows<T>> all;
    for (py::handle tensor : tensors) all.push_back(rows<T>(tensor, 1));
    return all;
}

template <class T>
AffinityProblem<T> affinity_problem(const AffinitySpec& spec, py::handle q, const py::list& keys, const py::list& values, py::handle w, int threads) {
    const py::tuple shape = q.attr("shape");
    return {spec, element(shape, 0), element(shape, 2), rows<const T>(q, 1), list_of_rows<const T>(keys), list_of_rows<const T>(values),
            data<const T>(w), threads};
}

void affinity_forward(py::handle spec_, py::handle q, const py::list& keys, const py::list& values, py::handle w, py::handle num, py::handle den,
                      py::handle row_stats, py::handle col_stats, py::handle centre, int threads) {
    const AffinitySpec spec = affinity_spec(spec_);
    with_type_of(q, [&](auto type) {
        using T = decltype(type);
        const auto problem = affinity_problem<T>(spec, q, keys, values, w, threads);
        const AffinitySums<T> sums{data<T>(num), data<T>(den), data<T>(row_stats), data<T>(col_stats), data<T>(centre)};
        const py::gil_scoped_release release;
        functions_of(type).affinity_forward(problem, sums);
    });
}

void affinity_backward(py::handle spec_, py::handle q, const py::list& keys, const py::list& values, py::handle w, py::handle row_stats,
                       py::handle col_stats, py::handle centre, py::handle grad_num, py::handle grad_den, py::handle grad_q,
                       const py::list& grad_keys, const py::list& grad_values, py::handle grad_w, int threads) {
    const AffinitySpec spec = affinity_spec(spec_);
    with_type_of(q, [&](auto type) {
        using T = decltype(type);
        const auto problem = affinity_problem<T>(spec, q, keys, values, w, threads);
        AffinityGradients<T> io{data<const T>(row_stats), data<const T>(col_stats), data<const T>(centre), data<const T>(grad_num),
                                data<const T>(grad_den), data<T>(grad_q), {}, {}, data<T>(grad_w)};
        for (py::handle grad : grad_keys) io.grad_keys.push_back(data<T>(grad));
        for (py::handle grad : grad_values) io.grad_values.push_back(data<T>(grad));
        const py::gil_scoped_release release;
        functions_of(type).affinity_backward(problem, io);
    });
}

template <class T>
PairProblem<T> pair_problem(const PairSpec& spec, py::handle q, const py::list& keys, py::handle w, const std::vector<double>& widths,
                            const std::vector<double>& units, py::handle alpha, py::handle beta, int threads) {
    const py::tuple shape = q.attr("shape");
    return {spec, element(shape, 0), element(shape, 2), rows<const T>(q, 1), list_of_rows<const T>(keys), data<const T>(w), widths, units,
            data<const T>(alpha), data<const T>(beta), threads};
}

void log_sums(py::handle spec_, py::handle q, const py::list& keys, const std::vector<double>& widths, const std::vector<double>& units,
              py::handle potential, bool by_row, py::handle sums, int threads) {
    const PairSpec spec = pair_spec(spec_);
    with_type_of(q, [&](auto type) {
        using T = decltype(type);
        const py::none none;
        const auto problem = pair_problem<T>(spec, q, keys, none, widths, units, by_row ? py::handle(none) : potential,
                                             by_row ? potential : py::handle(none), threads);
        const LogSums<T> out{by_row, data<T>(sums)};
        const py::gil_scoped_release release;
        functions_of(type).log_sums(problem, out);
    });
}

void weighted_sums(py::handle spec_, py::handle q, const py::list& keys, const std::vector<double>& widths, const std::vector<double>& units,
                   py::handle alpha, py::handle beta, py::handle w, py::handle centre, py::handle num, py::handle den, int threads) {
    const PairSpec spec = pair_spec(spec_);
    with_type_of(q, [&](auto type) {
        using T = decltype(type);
        const auto problem = pair_problem<T>(spec, q, keys, w, widths, units, alpha, beta, threads);
        const PairSums<T> out{data<T>(num), data<T>(den), data<const T>(centre)};
        const py::gil_scoped_release release;
        functions_of(type).weighted_sums(problem, out);
    });
}

void pair_gradients(py::handle spec_, py::handle q, const py::list& keys, const std::vector<double>& widths, const std::vector<double>& units,
                    py::handle alpha, py::handle beta, py::handle w, py::handle centre, py::handle grad_num, py::handle grad_den,
                    py::handle grad_columns, py::handle grad_q, const py::list& grad_keys, py::handle grad_w, py::handle row_flow,
                    py::handle col_flow, py::handle width_flow, int threads) {
    const PairSpec spec = pair_spec(spec_);
    with_type_of(q, [&](auto type) {
        using T = decltype(type);
        const auto problem = pair_problem<T>(spec, q, keys, w, widths, units, alpha, beta, threads);
        PairGradients<T> io{data<const T>(centre), data<const T>(grad_num), data<const T>(grad_den), data<const T>(grad_columns),
                            data<T>(grad_q), {}, data<T>(grad_w), data<T>(row_flow), data<T>(col_flow), data<T>(width_flow)};
        for (py::handle grad : grad_keys) io.grad_keys.push_back(data<T>(grad));
        const py::gil_scoped_release release;
        functions_of(type).pair_gradients(problem, io);
    });
}

// Weights that are None are 1.
template <class T> Rows<const T> weight_rows(py::handle weights, int64_t count) {
    static constexpr T ONE = 1;
    if (weights.is_none()) return {&ONE, count, 1, {0, 0, 0}};
    return rows<const T>(weights, 0);
}

// points and weights of gen, neg, pos [L, T, count, …] or [groups, count, …].
template <class T> LossProblem<T> loss_problem(const LossSpec& spec, py::handle map, int threads) {
    const py::tuple points = map.attr("points"), weights = map.attr("weights"), shape = points[0].attr("shape");
    const int64_t D = element(shape, shape.size() - 1), groups = element(shape, 0) * (shape.size() == 4 ? element(shape, 1) : 1);
    LossProblem<T> p{spec, groups, D, {}, {}, threads};
    for (int kind = 0; kind < 3; ++kind)
        p.points[kind] = rows<const T>(points[kind], 1), p.weights[kind] = weight_rows<T>(weights[kind], p.points[kind].count);
    return p;
}

py::object gen_of(py::handle map) { return py::tuple(map.attr("points"))[0]; }

void loss_scale(py::handle spec_, py::handle map, py::handle means, py::handle kept, int threads) {
    const LossSpec spec = loss_spec(spec_);
    with_type_of(gen_of(map), [&](auto type) {
        using T = decltype(type);
        const auto problem = loss_problem<T>(spec, map, threads);
        double* out = data<double>(means);
        T* distances = data<T>(kept);
        const py::gil_scoped_release release;
        functions_of(type).loss_scale(problem, out, distances);
    });
}

void loss_moments(py::handle spec_, py::handle map, double scale, py::handle kept, py::handle forces, py::handle moments, int threads) {
    const LossSpec spec = loss_spec(spec_);
    with_type_of(gen_of(map), [&](auto type) {
        using T = decltype(type);
        const auto problem = loss_problem<T>(spec, map, threads);
        T *distances = data<T>(kept), *out = data<T>(forces), *products = data<T>(moments);
        const py::gil_scoped_release release;
        functions_of(type).loss_moments(problem, scale, distances, out, products);
    });
}

// All phases but the last, of one map and no other ranks: its losses [G] and forces, its scale and λ_R² as `statistics` [1 + R],
// and for the last phase the scale and 1/λ_R.
template <class T> std::vector<double> forward_of_map(const LossProblem<T>& p, T* losses, T* statistics, T* forces) {
    const auto& functions = functions_of(T());
    const int64_t R = p.spec.R_list.size();
    const Buffer<T> distances(p.groups * p.kept_of_group()), moments(p.groups * R * R);
    T* const kept = p.kept_of_group() ? static_cast<T*>(distances) : nullptr;
    double means[2];
    functions.loss_scale(p, means, kept);
    std::vector<double> numbers{means[0] / means[1]};
    functions.loss_moments(p, numbers[0], kept, forces, moments);
    statistics[0] = T(numbers[0]);
    for (int64_t r = 0; r < R; ++r) {
        double sum = 0;
        for (int64_t g = 0; g < p.groups; ++g) sum += moments[(g * R + r) * R + r];
        const double square = sum / double(p.groups), least = p.spec.least_squared_lambda;
        statistics[1 + r] = T(square);
        numbers.push_back(1 / std::sqrt(square < least ? least : square));
    }
    for (int64_t g = 0; g < p.groups; ++g) {
        double loss = 0;
        for (int64_t n = 0; n < R * R; ++n) loss += moments[g * R * R + n] * numbers[1 + n / R] * numbers[1 + n % R];
        losses[g] = T(loss);
    }
    return numbers;
}

std::vector<std::vector<double>> loss_forward(py::handle spec_, const py::list& maps, const py::list& losses, const py::list& statistics,
                                              const py::list& forces, int threads) {
    const LossSpec spec = loss_spec(spec_);
    std::vector<std::vector<double>> numbers;
    for (size_t m = 0; m < maps.size(); ++m)
        with_type_of(losses[m], [&](auto type) {
            using T = decltype(type);
            const auto problem = loss_problem<T>(spec, maps[m], threads);
            T *of_groups = data<T>(losses[m]), *found = data<T>(statistics[m]), *out = data<T>(forces[m]);
            const py::gil_scoped_release release;
            numbers.push_back(forward_of_map<T>(problem, of_groups, found, out));
        });
    return numbers;
}

void loss_gradient(py::handle spec_, const std::vector<std::vector<double>>& numbers, const py::list& forces, const py::list& incoming,
                   const py::list& grads, int threads) {
    const LossSpec spec = loss_spec(spec_);
    for (size_t m = 0; m < grads.size(); ++m)
        with_type_of(grads[m], [&](auto type) {
            using T = decltype(type);
            const py::tuple shape = forces[m].attr("shape");
            const int64_t groups = element(shape, 1), D = element(shape, 3);
            const auto grad = rows<T>(grads[m], 1);
            const T *of_map = data<const T>(forces[m]), *of_loss = data<const T>(incoming[m]);
            const py::gil_scoped_release release;
            functions_of(type).loss_gradient(spec, grad, groups, D, numbers[m][0], numbers[m].data() + 1, of_map, of_loss, threads);
        });
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.def("choose", &choose);
    m.def("chosen", [] { return chosen.name; });
    m.def("supported", [] {
        std::vector<std::string> names;
        for (const auto& set : supported()) names.push_back(set.name);
        return names;
    });
    m.def("affinity_forward", &affinity_forward);
    m.def("affinity_backward", &affinity_backward);
    m.def("log_sums", &log_sums);
    m.def("weighted_sums", &weighted_sums);
    m.def("pair_gradients", &pair_gradients);
    m.attr("GROUP_PAIRS") = GROUP_PAIRS, m.attr("KEEP_DISTANCES_FROM_D") = KEEP_DISTANCES_FROM_D, m.attr("KEPT_ALIGN") = KEPT_ALIGN;
    m.def("loss_scale", &loss_scale);
    m.def("loss_moments", &loss_moments);
    m.def("loss_forward", &loss_forward);
    m.def("loss_gradient", &loss_gradient);
}
