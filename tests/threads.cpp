// Calls every CPU kernel on several threads and compares with one thread; built and run under ThreadSanitizer by
// tests/sanitize.py. With the argument "race", races on purpose.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "functions.hpp"
#include "parallel.hpp"

using namespace drift;

namespace {

template <class T> std::vector<T> numbers(int64_t count, unsigned seed) {
    std::vector<T> values(count);
    for (auto& value : values) {
        seed = seed * 1664525u + 1013904223u;
        value = T(seed >> 8) / T(1 << 23) - T(1);
    }
    return values;
}

template <class T> struct Results {
    std::vector<std::vector<T>> arrays;
    T* add(int64_t count) {
        arrays.emplace_back(count, T(0));
        return arrays.back().data();
    }
};

// All points of G problems, one problem after the other.
template <class T> Rows<const T> rows(const std::vector<T>& points, int64_t count, int64_t D) { return {points.data(), count, 1, {count * D, 0, D}}; }

// Forms A and B, forward and backward.
template <class T>
void affinity(const Functions<T>& functions, LogitKind logit, int64_t G, int64_t N, int64_t M, int64_t D, int threads, Results<T>& results) {
    const AffinitySpec spec{logit, {0.5, 1.5}, 1.0, 0.0, false, 2, 0.0, std::numeric_limits<double>::infinity()};
    const int64_t S = spec.widths.size(), L = M / 2;
    const auto q = numbers<T>(G * N * D, 1), first = numbers<T>(G * L * D, 2), last = numbers<T>(G * (M - L) * D, 6), w = numbers<T>(G * M, 3);
    const AffinityProblem<T> problem{spec, G, D, rows(q, N, D), {rows(first, L, D), rows(last, M - L, D)}, {}, w.data(), threads};
    results.arrays.reserve(64);
    T *num = results.add(S * G * 2 * N * D), *den = results.add(S * G * 2 * N);
    T *row_stats = results.add(S * G * 2 * N), *col_stats = results.add(S * G * 2 * M), *centre = results.add(G * D);
    functions.affinity_forward(problem, {num, den, row_stats, col_stats, centre});
    const auto grad_num = numbers<T>(S * G * 2 * N * D, 4), grad_den = numbers<T>(S * G * 2 * N, 5);
    T *grad_q = results.add(G * N * D), *grad_first = results.add(G * L * D), *grad_last = results.add(G * (M - L) * D);
    functions.affinity_backward(problem, {row_stats, col_stats, centre, grad_num.data(), grad_den.data(), grad_q, {grad_first, grad_last}, {},
                                          results.add(G * M)});
}

// The sums over pairs, and their gradients.
template <class T>
void pairs(const Functions<T>& functions, CostKind cost, int64_t G, int64_t N, int64_t M, int64_t D, int threads, Results<T>& results) {
    const PairSpec spec{cost, true, 1.0, 2, 0.0, 0.0};
    const int64_t S = 2, keys = N + M;
    const auto q = numbers<T>(G * N * D, 1), last = numbers<T>(G * M * D, 2), w = numbers<T>(G * keys, 3);
    const auto alpha = numbers<T>(S * G * N, 4), beta = numbers<T>(S * G * keys, 5);
    const PairProblem<T> problem{spec, G, D, rows(q, N, D), {rows(q, N, D), rows(last, M, D)}, w.data(), {0.5, 1.5},
                                 std::vector<double>(G, 2.0), alpha.data(), beta.data(), threads};
    results.arrays.reserve(64);
    functions.log_sums(problem, {true, results.add(S * G * N)});
    functions.log_sums(problem, {false, results.add(S * G * keys)});
    const auto centre = numbers<T>(G * D, 6), grad_num = numbers<T>(S * G * 2 * N * D, 7), grad_den = numbers<T>(S * G * 2 * N, 8);
    T *num = results.add(S * G * 2 * N * D), *den = results.add(S * G * 2 * N);
    functions.weighted_sums(problem, {num, den, centre.data()});
    T *grad_q = results.add(G * N * D), *grad_first = results.add(G * N * D), *grad_last = results.add(G * M * D), *grad_w = results.add(G * keys);
    T *row_flow = results.add(S * G * N), *col_flow = results.add(S * G * keys), *width_flow = results.add(S * G * N);
    functions.pair_gradients(problem, {centre.data(), grad_num.data(), grad_den.data(), beta.data(), grad_q, {grad_first, grad_last}, grad_w,
                                       row_flow, col_flow, width_flow});
}

// Form C, its three phases.
template <class T>
void loss(const Functions<T>& functions, int64_t G, int64_t N, int64_t M, int64_t P, int64_t D, int threads, Results<T>& results) {
    const LossSpec spec{{0.05, 0.2, 1.0}, 1e-6, 1e-4, 1e-3, 100.0, 1e-8};
    const int64_t R = spec.R_list.size(), counts[3] = {N, M, P};
    std::vector<T> points[3], weights[3];
    LossProblem<T> problem{spec, G, D, {}, {}, threads};
    for (int kind = 0; kind < 3; ++kind) {
        points[kind] = numbers<T>(G * counts[kind] * D, 10 + kind), weights[kind].assign(G * counts[kind], T(1));
        problem.points[kind] = rows(points[kind], counts[kind], D), problem.weights[kind] = rows(weights[kind], counts[kind], 1);
    }
    double means[2];
    results.arrays.reserve(64);
    T* kept = problem.kept_of_group() ? results.add(G * problem.kept_of_group()) : nullptr;
    functions.loss_scale(problem, means, kept);
    const double scale = means[0] / means[1], factors[3] = {1.0, 2.0, 3.0};
    T *forces = results.add(R * G * N * D), *moments = results.add(G * R * R), *grad = results.add(G * N * D);
    functions.loss_moments(problem, scale, kept, forces, moments);
    const auto incoming = numbers<T>(G, 20);
    functions.loss_gradient(spec, {grad, N, 1, {N * D, 0, D}}, G, D, scale, factors, forces, incoming.data(), threads);
}

template <class T, class Call> bool same(const std::string& name, Call call) {
    Results<T> one, several;
    call(1, one);
    call(4, several);
    for (size_t a = 0; a < one.arrays.size(); ++a)
        for (size_t i = 0; i < one.arrays[a].size(); ++i) {
            const double expected = one.arrays[a][i], got = several.arrays[a][i];
            if (got != expected && !(std::abs(got - expected) <= 1e-3 * (1 + std::abs(expected)))) {
                std::printf("%s: array %zu has %g at %zu with four threads, %g with one\n", name.c_str(), a, got, i, expected);
                return false;
            }
        }
    return true;
}

template <class T> bool all(const std::string& name, const Functions<T>& functions) {
    bool good = true;
    for (LogitKind logit : {LogitKind::laplace, LogitKind::gaussian}) {
        good &= same<T>(name + " many groups", [&](int threads, Results<T>& r) { affinity(functions, logit, 24, 17, 40, 33, threads, r); });
        good &= same<T>(name + " one group", [&](int threads, Results<T>& r) { affinity(functions, logit, 1, 300, 2000, 5, threads, r); });
    }
    for (CostKind cost : {CostKind::l2, CostKind::l2_sq}) {
        good &= same<T>(name + " pairs of many groups", [&](int threads, Results<T>& r) { pairs(functions, cost, 24, 17, 40, 33, threads, r); });
        good &= same<T>(name + " pairs of one group", [&](int threads, Results<T>& r) { pairs(functions, cost, 1, 300, 1700, 5, threads, r); });
    }
    good &= same<T>(name + " loss", [&](int threads, Results<T>& r) { loss(functions, 24, 24, 8, 24, 40, threads, r); });
    good &= same<T>(name + " loss of small D", [&](int threads, Results<T>& r) { loss(functions, 200, 33, 0, 30, 3, threads, r); });
    good &= same<T>(name + " loss of one group", [&](int threads, Results<T>& r) { loss(functions, 1, 600, 0, 400, 3, threads, r); });
    return good;
}

void race() {
    int shared = 0;
    std::atomic<int> begun{0};
    parallel(2, 2, [&](int64_t, int) {
        begun.fetch_add(1, std::memory_order_relaxed);  // which orders nothing
        while (begun.load(std::memory_order_relaxed) < 2) std::this_thread::yield();
        ++shared;
    });
    std::printf("%d\n", shared);
}

}  // namespace

int main(int count, char** arguments) {
    if (count > 1 && !std::strcmp(arguments[1], "race")) return race(), 0;
    bool good = all("portable float", portable::of_float) & all("portable double", portable::of_double);
#ifdef DRIFT_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        good &= all("avx2 float", avx2::of_float) & all("avx2 double", avx2::of_double);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl"))
        good &= all("avx512 float", avx512::of_float) & all("avx512 double", avx512::of_double);
#endif
    return good ? 0 : 1;
}
