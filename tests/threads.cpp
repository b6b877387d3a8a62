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

#include "kernels.hpp"
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

// Forms A and B, forward and backward.
template <class T>
void affinity(const Kernels<T>& kernels, int kernel, int64_t G, int64_t N, int64_t M, int64_t D, int threads, Results<T>& results) {
    const int S = 2, sides = 2;
    const double widths[S] = {0.5, 1.5};
    const auto q = numbers<T>(G * N * D, 1), k = numbers<T>(G * M * D, 2), w = numbers<T>(G * M, 3);
    const double infinity = std::numeric_limits<double>::infinity();
    const AffinityProblem<T> problem{G, N, M, D, M / 2, sides, S, kernel, widths, 1.0, 0.0, 0.0, infinity, false,
                                     q.data(), k.data(), k.data(), w.data(), threads};
    results.arrays.reserve(64);
    T *num = results.add(S * G * sides * N * D), *den = results.add(S * G * sides * N);
    T *rows = results.add(S * G * 2 * N), *columns = results.add(S * G * 2 * M);
    kernels.affinity_forward(problem, {num, den, rows, columns});
    const auto grad_num = numbers<T>(S * G * sides * N * D, 4), grad_den = numbers<T>(S * G * sides * N, 5);
    T *grad_q = results.add(G * N * D), *grad_k = results.add(G * M * D), *grad_v = results.add(G * M * D), *grad_w = results.add(G * M);
    kernels.affinity_backward(problem, {rows, columns, grad_num.data(), grad_den.data(), grad_q, grad_k, grad_v, grad_w});
}

// Form C, its three phases.
template <class T>
void loss(const Kernels<T>& kernels, int64_t G, int64_t N, int64_t M, int64_t P, int64_t D, int threads, Results<T>& results) {
    const int R = 3;
    const double R_list[R] = {0.05, 0.2, 1.0}, factors[R] = {1.0, 2.0, 3.0};
    const int64_t counts[3] = {N, M, P};
    std::vector<T> points[3], weights[3];
    LossProblem<T> problem{G, D, {N, M, P}, {}, {}, threads};
    for (int kind = 0; kind < 3; ++kind) {
        points[kind] = numbers<T>(G * counts[kind] * D, 10 + kind), weights[kind].assign(G * counts[kind], T(1));
        problem.points[kind] = points[kind].data(), problem.weights[kind] = weights[kind].data();
    }
    double sums[2];
    results.arrays.reserve(64);
    T* kept = results.add(G * N * ((N + M + P + 15) / 16 * 16));
    kernels.loss_scale(problem, sums, kept);
    const double scale = sums[0] / (sums[1] * N);
    T *forces = results.add(R * G * N * D), *moments = results.add(G * R * R), *grad = results.add(G * N * D);
    kernels.loss_moments(problem, scale, R, R_list, 1e-6, kept, forces, moments);
    const auto by = numbers<T>(G, 20);
    kernels.loss_gradient(G, N * D, R, forces, factors, by.data(), threads, grad);
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

template <class T> bool all(const std::string& name, const Kernels<T>& kernels) {
    bool good = true;
    for (int kernel : {0, 1}) {
        good &= same<T>(name + " many groups", [&](int threads, Results<T>& r) { affinity(kernels, kernel, 24, 17, 40, 33, threads, r); });
        good &= same<T>(name + " one group", [&](int threads, Results<T>& r) { affinity(kernels, kernel, 1, 300, 520, 24, threads, r); });
    }
    good &= same<T>(name + " loss", [&](int threads, Results<T>& r) { loss(kernels, 24, 24, 8, 24, 40, threads, r); });
    good &= same<T>(name + " loss of small D", [&](int threads, Results<T>& r) { loss(kernels, 200, 33, 0, 30, 3, threads, r); });
    return good;
}

void race() {
    int shared = 0;
    std::atomic<int> begun{0};
    parallel(2, [&](int) {
        begun.fetch_add(1, std::memory_order_relaxed);  // which orders nothing
        while (begun.load(std::memory_order_relaxed) < 2) std::this_thread::yield();
        ++shared;
    });
    std::printf("%d\n", shared);
}

}  // namespace

int main(int count, char** arguments) {
    if (count > 1 && !std::strcmp(arguments[1], "race")) return race(), 0;
    bool good = all("portable float", portable::float_kernels) & all("portable double", portable::double_kernels);
#ifdef DRIFT_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        good &= all("avx2 float", avx2::float_kernels) & all("avx2 double", avx2::double_kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl"))
        good &= all("avx512 float", avx512::float_kernels) & all("avx512 double", avx512::double_kernels);
#endif
    return good ? 0 : 1;
}
