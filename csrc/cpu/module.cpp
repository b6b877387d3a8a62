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

void affinity_forward(const AffinitySpec& spec, py::handle q, const py::list& keys, const py::list& values, py::handle w, py::handle num, py::handle den,
                      py::handle row_stats, py::handle col_stats, py::handle centre, int threads) {
    with_type_of(q, [&](auto type) {
        using T = decltype(type);
        const auto problem = affinity_problem<T>(spec, q, keys, values, w, threads);
        const AffinitySums<T> sums{data<T>(num), data<T>(den), data<T>(row_stats), data<T>(col_stats), data<T>(centre)};
        const py::gil_scoped_release release;
        functions_of(type).affinity_forward(problem, sums);
    });
}

void affinity_backward(const AffinitySpec& spec, py::handle q, const py::list& keys, const py::list& values, py::handle w, py::handle row_stats,
                       py::handle col_stats, py::handle centre, py::handle grad_num, py::handle grad_den, py::handle grad_q,
                       const py::list& grad_keys, const py::list& grad_values, py::handle grad_w, int threads) {
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

void log_sums(const PairSpec& spec, py::handle q, const py::list& keys, const std::vector<double>& widths, const std::vector<double>& units,
              py::handle potential, bool by_row, py::handle sums, int threads) {
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

void weighted_sums(const PairSpec& spec, py::handle q, const py::list& keys, const std::vector<double>& widths, const std::vector<double>& units,
                   py::handle alpha, py::handle beta, py::handle w, py::handle centre, py::handle num, py::handle den, int threads) {
    with_type_of(q, [&](auto type) {
        using T = decltype(type);
        const auto problem = pair_problem<T>(spec, q, keys, w, widths, units, alpha, beta, threads);
        const PairSums<T> out{data<T>(num), data<T>(den), data<const T>(centre)};
        const py::gil_scoped_release release;
        functions_of(type).weighted_sums(problem, out);
    });
}

void pair_gradients(const PairSpec& spec, py::handle q, const py::list& keys, const std::vector<double>& widths, const std::vector<double>& units,
                    py::handle alpha, py::handle beta, py::handle w, py::handle centre, py::handle grad_num, py::handle grad_den,
                    py::handle grad_columns, py::handle grad_q, const py::list& grad_keys, py::handle grad_w, py::handle row_flow,
                    py::handle col_flow, py::handle width_flow, int threads) {
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

void loss_scale(const LossSpec& spec, py::handle map, py::handle means, py::handle kept, int threads) {
    with_type_of(gen_of(map), [&](auto type) {
        using T = decltype(type);
        const auto problem = loss_problem<T>(spec, map, threads);
        double* out = data<double>(means);
        T* costs = data<T>(kept);
        const py::gil_scoped_release release;
        functions_of(type).loss_scale(problem, out, costs);
    });
}

// A tensor [S, …] of doubles, S = 1 or a row for each group.
OfGroups of_groups(py::handle tensor) {
    const py::tuple shape = tensor.attr("shape"), strides = tensor.attr("stride")();
    return {data<const double>(tensor), element(shape, 0) == 1 ? 0 : element(strides, 0)};
}

void loss_moments(const LossSpec& spec, py::handle map, py::handle scale, py::handle kept, py::handle forces, py::handle moments, py::handle details,
                  int threads) {
    with_type_of(gen_of(map), [&](auto type) {
        using T = decltype(type);
        const auto problem = loss_problem<T>(spec, map, threads);
        const OfGroups of_scale = of_groups(scale);
        T *costs = data<T>(kept), *out = data<T>(forces), *products = data<T>(moments), *found = data<T>(details);
        const py::gil_scoped_release release;
        functions_of(type).loss_moments(problem, of_scale, costs, out, products, spec.details ? found : nullptr);
    });
}

// 1/λ_R behind the scale in `numbers` [S, 1 + R], and λ_R² behind it in `statistics` [1 + R, S], from the mean products of forces.
template <class T> void normalise(const LossProblem<T>& p, const T* moments, int64_t S, double* numbers, T* statistics) {
    const int64_t R = p.spec.R_list.size(), parts = p.spec.normalize == NormalizeKind::group ? p.groups : 1, in_part = p.groups / parts;
    const bool of_roots = p.spec.normalize == NormalizeKind::group_mean;
    for (int64_t s = 0; s < S; ++s)
        for (int64_t r = 0; r < R; ++r) {
            const int64_t first = parts == 1 ? 0 : s * in_part;
            double sum = 0;
            for (int64_t g = first; g < first + in_part; ++g) sum += of_roots ? std::sqrt(double(moments[(g * R + r) * R + r])) : moments[(g * R + r) * R + r];
            const double mean = sum / double(in_part), square = of_roots ? mean * mean : mean;
            statistics[(1 + r) * S + s] = T(square);
            numbers[s * (1 + R) + 1 + r] = p.spec.normalize == NormalizeKind::none ? 1 : 1 / std::sqrt(std::max(p.spec.least_squared_lambda, square));
        }
}

// All phases but the last, of one map and no other ranks: its losses [G], forces and details; its scale and λ_R² as `statistics`
// [1 + R, S], and for the last phase the scale and 1/λ_R, `numbers` [S, 1 + R], where the scale stands already if it is given.
template <class T> void forward_of_map(const LossProblem<T>& p, int64_t S, T* losses, T* statistics, double* numbers, T* forces, T* details) {
    const auto& functions = functions_of(T());
    const int64_t R = p.spec.R_list.size(), parts = p.spec.scale_of_groups ? p.groups : 1;
    const Buffer<T> costs(p.groups * p.kept_of_group()), moments(p.groups * R * R);
    T* const kept = p.kept_of_group() ? static_cast<T*>(costs) : nullptr;
    std::vector<double> means(2 * parts);
    functions.loss_scale(p, means.data(), kept);
    for (int64_t s = 0; s < S; ++s) {
        const int64_t part = parts == 1 ? 0 : s;
        if (!p.spec.scale_given) numbers[s * (1 + R)] = means[2 * part] / means[2 * part + 1];
        statistics[s] = T(numbers[s * (1 + R)]);
    }
    const OfGroups of_groups{numbers, S == 1 ? 0 : 1 + R};
    functions.loss_moments(p, of_groups, kept, forces, moments, details);
    normalise<T>(p, moments, S, numbers, statistics);
    for (int64_t g = 0; g < p.groups; ++g) {
        const double* factors = of_groups(g) + 1;
        double loss = 0;
        for (int64_t n = 0; n < R * R; ++n) loss += moments[g * R * R + n] * factors[n / R] * factors[n % R];
        losses[g] = T(loss);
    }
}

void loss_forward(const LossSpec& spec, const py::list& maps, const py::list& losses, const py::list& statistics, const py::list& numbers,
                  const py::list& forces, const py::list& details, int threads) {
    for (size_t m = 0; m < maps.size(); ++m)
        with_type_of(losses[m], [&](auto type) {
            using T = decltype(type);
            const auto problem = loss_problem<T>(spec, maps[m], threads);
            const int64_t S = element(numbers[m].attr("shape"), 0);
            T *of_groups = data<T>(losses[m]), *found = data<T>(statistics[m]), *out = data<T>(forces[m]);
            T* of_samples = spec.details ? data<T>(details[m]) : nullptr;
            double* for_gradient = data<double>(numbers[m]);
            const py::gil_scoped_release release;
            forward_of_map<T>(problem, S, of_groups, found, for_gradient, out, of_samples);
        });
}

void loss_gradient(const LossSpec& spec, const py::list& numbers, const py::list& forces, const py::list& incoming, const py::list& grads, int threads) {
    for (size_t m = 0; m < grads.size(); ++m)
        with_type_of(grads[m], [&](auto type) {
            using T = decltype(type);
            const py::tuple shape = forces[m].attr("shape");
            const int64_t groups = element(shape, 1), D = element(shape, 3);
            const auto grad = rows<T>(grads[m], 1);
            const OfGroups scale_and_factors = of_groups(numbers[m]);
            const T *of_map = data<const T>(forces[m]), *of_loss = data<const T>(incoming[m]);
            const py::gil_scoped_release release;
            functions_of(type).loss_gradient(spec, grad, groups, D, scale_and_factors, of_map, of_loss, threads);
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
    py::class_<AffinitySpec>(m, "AffinitySpec").def(py::init(&affinity_spec));
    py::class_<PairSpec>(m, "PairSpec").def(py::init(&pair_spec));
    py::class_<LossSpec>(m, "LossSpec").def(py::init(&loss_spec));
    m.def("affinity_forward", &affinity_forward);
    m.def("affinity_backward", &affinity_backward);
    m.def("log_sums", &log_sums);
    m.def("weighted_sums", &weighted_sums);
    m.def("pair_gradients", &pair_gradients);
    m.attr("GROUP_PAIRS") = GROUP_PAIRS, m.attr("KEEP_DISTANCES_FROM_D") = KEEP_DISTANCES_FROM_D;
    m.def("loss_columns", &loss_columns);
    m.def("loss_scale", &loss_scale);
    m.def("loss_moments", &loss_moments);
    m.def("loss_forward", &loss_forward);
    m.def("loss_gradient", &loss_gradient);
}
