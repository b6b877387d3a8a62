// Form C, a member of the family as a training loss. Many small groups: each worker takes whole ones, whose matrices stay in cache. Large
// ones: distances for the scale, then the weighted sums of forms A and B, all threads on one group.
//
//   loss_scale     costs, and the means that scales are made of
//   loss_moments   the coefficients and force of every R, and the mean products that λ and the loss are made of
//   loss_gradient  the forces, weighted by 1/λ
// Sums are kept in double, one a group, and added in group order: the same result whatever the number of threads.
#pragma once
#include "affinity_forward.hpp"
#include "loss_coupling.hpp"

namespace drift::DRIFT_ISA {

template <class T> bool is_streamed(const LossProblem<T>& p) { return p.N() * p.M() > GROUP_PAIRS; }

template <class T> T unit_of_points(const LossSpec& spec, double scale, int64_t D) {
    return T(std::max(scale / std::sqrt(double(D)), spec.least_scale));
}

constexpr int64_t SHORT_SUM = 512;

// moments [R, R] of one group: mean products of its forces, which lie `stride` apart.
template <class T> void find_moments(int64_t R, int64_t N, int64_t D, const T* forces, int64_t stride, T* moments) {
    for (int64_t r = 0; r < R; ++r)
        for (int64_t other = 0; other <= r; ++other) {
            double sum = 0;  // of short sums, whose terms are not yet lost
            for (int64_t n = 0; n < N * D; n += SHORT_SUM)
                sum += dot(forces + r * stride + n, forces + other * stride + n, std::min(SHORT_SUM, N * D - n));
            moments[r * R + other] = moments[other * R + r] = T(sum / double(N * D));
        }
}

template <class T> class LossGroup {
    const LossProblem<T>& p;
    const int64_t N, D, negatives, first_positive, M, ld, depth;  // M: columns up to the last target
    Buffer<const T*> queries, rows;
    Buffer<T> centred, panels, query_norms, norms, weights, own_costs;
    Coupling<T> coupling;

  public:
    double weight_total = 0;  // Σ w over the pairs of the group opened last

    explicit LossGroup(const LossProblem<T>& p)
        : p(p), N(p.N()), D(p.D), negatives(p.negatives()), first_positive(round_up(negatives, KEPT_ALIGN)),
          M(first_positive + p.points[2].count), ld(p.columns()), depth(round_up(D, PANEL<T>)), queries(N), rows(round_up(ld, PANEL<T>)),
          centred(N * D), panels(std::max(round_up(ld, PANEL<T>) * D, M * depth)), query_norms(N), norms(round_up(ld, PANEL<T>)), weights(ld),
          own_costs(N * ld), coupling(p.spec, N, ld, {0, first_positive, negatives}, {first_positive, ld, p.points[2].count}) {}

    // Costs into `kept` (null: into the group's own memory); returns Σ C·w.
    double find_costs(int64_t g, T* kept) {
        open(g);
        T* costs = kept ? kept : own_costs;
        std::fill_n(static_cast<T*>(norms), round_up(ld, PANEL<T>), INF<T>);
        const T* centre = queries[0];  // any of the points will do: pairs too close for it are worked out from differences
        for (int64_t i = 0; i < N; ++i) {
            for (int64_t e = 0; e < D; ++e) centred[i * D + e] = queries[i][e] - centre[e];
            query_norms[i] = squared_norm(centred + i * D, D);
        }
        pack_transposed<T>(M, D, rows, centre, panels);
        find_norms();
        for (int64_t i = 0; i < N; i += TILE_ROWS)
            for (int64_t j = 0; j < M; j += TILE_COLS) {
                const Tile<T> t{i, std::min(TILE_ROWS, N - i), j, std::min(TILE_COLS, M - j), ld};
                T* corner = costs + t.row * ld + t.col;
                distances<T>(t, D, {queries, centred, query_norms}, {rows, panels, norms}, p.spec.include_self, T(p.spec.least_distance), corner);
            }
        for (int64_t i = 0; i < N; ++i) std::fill(costs + i * ld + round_up(M, WIDTH<T>), costs + (i + 1) * ld, INF<T>);
        double total = 0;
        for (int64_t i = 0; i < N; ++i) total += finish_costs(costs + i * ld, i);
        return total;
    }

    // Forces of every R into forces[R][g], mean products of theirs into moments[R, R]. `kept` as above, or null to find
    // the costs again.
    void find_forces(int64_t g, T* kept, double scale, T* forces, T* moments, T* details) {
        if (kept)
            open(g);
        else
            find_costs(g, nullptr);
        T* costs = kept ? kept : own_costs;
        pack_rows<T>(M, D, rows, medoid(costs), panels);
        const T cost_scale = T(std::max(scale, p.spec.least_scale)), unit = unit_of_points<T>(p.spec, scale, D);
        if (p.spec.include_self) add_to_self_pairs(costs, T(p.spec.self_distance) * cost_scale);
        coupling.start(costs);
        const int64_t R = p.spec.R_list.size(), stride = p.groups * N * D;
        T* of_group = forces + g * N * D;
        for (int64_t r = 0; r < R; ++r) {
            const T width = T(p.spec.R_list[r]);
            const T* c = coupling.coefficients(width * cost_scale, width, 1 / unit, details_of(details, r, g));
            multiply<T>(N, D, M, c, ld, 1, panels, M * PANEL<T>, of_group + r * stride, D, false);
        }
        find_moments(R, N, D, of_group, stride, moments);
        if (p.spec.include_self) set_self_pairs(costs, T(p.spec.least_cost()));
    }

  private:
    void open(int64_t g) {
        std::fill_n(static_cast<const T**>(rows), round_up(ld, PANEL<T>), nullptr);
        std::fill_n(static_cast<T*>(weights), ld, T(0));
        for (int64_t i = 0; i < N; ++i) queries[i] = p.points[0](g, i);
        int64_t j = 0;
        for (int kind = p.spec.include_self ? 0 : 1; kind < 3; ++kind) {
            if (kind == 2) j = first_positive;
            for (int64_t n = 0; n < p.points[kind].count; ++n, ++j) rows[j] = p.points[kind](g, n), weights[j] = *p.weights[kind](g, n);
        }
        const bool of_self = p.spec.include_self && !p.spec.scale_self_pairs;
        weight_total = double(N) * sum<T>(weights, ld) - (of_self ? sum<T>(weights, N) : T(0));
        coupling.open(weights);
    }

    void find_norms() {
        for (int64_t j = 0; j < M; j += PANEL<T>) {
            find_panel_norms<T>(panels + j * D, D, std::min<int64_t>(PANEL<T>, M - j), norms + j);
            for (int64_t l = j; l < std::min(j + PANEL<T>, first_positive); ++l)
                if (!rows[l]) norms[l] = INF<T>;
        }
    }

    // Distances of a row to costs; returns Σ C·w.
    double finish_costs(T* costs, int64_t i) const {
        Vec<T> total{};
        for (int64_t j = 0; j < M; j += WIDTH<T>) {  // infinite costs beyond the targets count for nothing
            Vec<T> here = load<T>(costs + j);
            if (p.spec.cost == CostKind::l2_sq) store<T>(costs + j, here *= here);
            const Vec<T> w = load<T>(weights + j);
            total += here > std::numeric_limits<T>::max() && w == Vec<T>{} ? Vec<T>{} : here * w;
        }
        const bool of_self = p.spec.include_self && !p.spec.scale_self_pairs;
        return double(horizontal_sum<T>(total)) - (of_self ? double(costs[i] * weights[i]) : 0.0);
    }

    void add_to_self_pairs(T* costs, T amount) const {
        for (int64_t i = 0; i < N; ++i) costs[i * ld + i] += amount;
    }
    void set_self_pairs(T* costs, T cost) const {  // as they were, for whoever comes next
        for (int64_t i = 0; i < N; ++i) costs[i * ld + i] = cost;
    }

    // The generated sample nearest to all targets together: an origin that a few far outliers do not move away from the
    // rest, where the rest would lose digits.
    const T* medoid(const T* costs) const {
        int64_t best = 0;
        T least = INF<T>;
        for (int64_t i = 0; i < N; ++i) {
            const T total = sum<T>(costs + i * ld, negatives) + sum<T>(costs + i * ld + first_positive, M - first_positive);
            if (total < least) least = total, best = i;
        }
        return queries[best];
    }

    Details<T> details_of(T* all, int64_t r, int64_t g) const {
        if (!all) return {};
        const int64_t R = p.spec.R_list.size();
        const auto place = [&](int64_t n) { return all + ((n * R + r) * p.groups + g) * N; };
        return {place(0), place(1), place(2), place(3), place(4), place(5)};
    }
};

// Calls body(group, g) for all groups, the next one on whoever is free.
template <class T, class Body> void for_groups(const LossProblem<T>& p, Body body) {
    const int threads = int(std::min<int64_t>(threads_for(p.groups * p.N() * p.M() * p.D, p.threads), p.groups));
    std::vector<LossGroup<T>> of_worker;
    of_worker.reserve(threads);
    for (int worker = 0; worker < threads; ++worker) of_worker.emplace_back(p);
    parallel(p.groups, threads, [&](int64_t g, int worker) { body(of_worker[worker], g); });
}

// Σ d·w of a large group.
template <class T> class DistanceSum : Problem<T> {
    using Base = Problem<T>;
    const CostKind cost;
    std::vector<double> of_rows;

  public:
    DistanceSum(const AffinityProblem<T>& problem, CostKind cost) : Base(problem, problem.threads), cost(cost), of_rows(Base::N) {}
    double operator()(int64_t g) {
        Base::open(g);
        std::fill(of_rows.begin(), of_rows.end(), 0.0);
        Base::walk([&](const KeyTile<T>& t, int worker) {
            T* d = const_cast<T*>(Base::find_distances(worker, t));
            const T* w = Base::tile_weights(t);
            for (int64_t i = 0; i < t.rows; ++i) {
                if (cost == CostKind::l2_sq)
                    for (int64_t j = 0; j < t.cols; ++j) d[i * t.ld + j] *= d[i * t.ld + j];
                of_rows[t.row + i] += dot<T>(d + i * t.ld, w, t.cols);
            }
        });
        double total = 0;
        for (double of_row : of_rows) total += of_row;
        return total;
    }
};

// A large group as a problem of form B: gen, where it counts, neg and pos are the keys, `weights` [M] receives theirs.
template <class T> AffinityProblem<T> as_affinity(const LossProblem<T>& p, const AffinitySpec& spec, int64_t g, T* weights) {
    AffinityProblem<T> problem{spec, 1, p.D, p.points[0], {}, {}, weights, p.threads};
    problem.q.first = p.points[0](g, 0);
    for (int kind = p.spec.include_self ? 0 : 1; kind < 3; ++kind) {
        problem.keys.push_back(p.points[kind]);
        problem.keys.back().first = p.points[kind](g, 0);
        for (int64_t n = 0; n < p.points[kind].count; ++n) *weights++ = *p.weights[kind](g, n);
    }
    return problem;
}

template <class T> double scale_of_large_group(const LossProblem<T>& p, int64_t g, double& weight_total) {
    Buffer<T> weights(p.M());
    const AffinitySpec spec{LogitKind::laplace, {}, 1.0, 0.0, p.spec.include_self, 1, p.spec.least_distance, 0.0};
    const AffinityProblem<T> problem = as_affinity<T>(p, spec, g, weights);
    const double of_self = p.spec.include_self && !p.spec.scale_self_pairs ? sum<T>(weights, p.N()) : T(0);
    weight_total = double(p.N()) * sum<T>(weights, p.M()) - of_self;
    return DistanceSum<T>(problem, p.spec.cost)(0) - p.spec.least_cost() * of_self;
}

template <class T> void forces_of_large_group(const LossProblem<T>& p, int64_t g, double scale, T* forces, T* moments) {
    const int64_t N = p.N(), M = p.M(), D = p.D, R = p.spec.R_list.size();
    const double kernel_scale = std::max(scale, p.spec.least_scale);
    AffinitySpec spec{LogitKind::laplace, p.spec.R_list, 1.0, p.spec.floor, true, 2, p.spec.least_distance, p.spec.self_distance * kernel_scale};
    for (double& width : spec.widths) width *= kernel_scale;
    Buffer<T> weights(M), num(R * 2 * N * D), den(R * 2 * N), row_stats(R * 2 * N), col_stats(R * 2 * M), centre(D);
    const AffinityProblem<T> problem = as_affinity<T>(p, spec, g, weights);
    affinity_forward<T>(problem, {num, den, row_stats, col_stats, centre});
    const T unit = unit_of_points<T>(p.spec, scale, D);
    const int64_t stride = p.groups * N * D;
    T* of_group = forces + g * N * D;
    for (int64_t r = 0; r < R; ++r)
        for (int64_t i = 0; i < N; ++i) {
            const int64_t negative = r * 2 * N + i, positive = negative + N;
            const T by_positive = den[negative] / unit, by_negative = den[positive] / unit;
            T* force = of_group + r * stride + i * D;
            for (int64_t e = 0; e < D; ++e) force[e] = by_positive * num[positive * D + e] - by_negative * num[negative * D + e];
        }
    find_moments(R, N, D, of_group, stride, moments);
}

template <class T> void loss_scale(const LossProblem<T>& p, double* means, T* kept) {
    std::vector<double> sums(p.groups), weights(p.groups);
    if (is_streamed(p))
        for (int64_t g = 0; g < p.groups; ++g) sums[g] = scale_of_large_group(p, g, weights[g]);
    else
        for_groups(p, [&](LossGroup<T>& group, int64_t g) {
            sums[g] = group.find_costs(g, kept ? kept + g * p.kept_of_group() : nullptr);
            weights[g] = group.weight_total;
        });
    const int64_t parts = p.spec.scale_of_groups ? p.groups : 1, in_part = p.groups / parts;
    const double pairs = double(in_part) * double(p.N()) * double(p.M());
    for (int64_t part = 0; part < parts; ++part) {
        double sum = 0, weight = 0;
        for (int64_t g = part * in_part; g < (part + 1) * in_part; ++g) sum += sums[g], weight += weights[g];
        means[2 * part] = sum / pairs, means[2 * part + 1] = weight / pairs;
    }
}

template <class T> void loss_moments(const LossProblem<T>& p, OfGroups scale, T* kept, T* forces, T* moments, T* details) {
    const int64_t R2 = p.spec.R_list.size() * p.spec.R_list.size();
    if (is_streamed(p))
        for (int64_t g = 0; g < p.groups; ++g) forces_of_large_group(p, g, *scale(g), forces, moments + R2 * g);
    else
        for_groups(p, [&](LossGroup<T>& group, int64_t g) {
            group.find_forces(g, kept ? kept + g * p.kept_of_group() : nullptr, *scale(g), forces, moments + R2 * g, details);
        });
}

template <class T>
void loss_gradient(const LossSpec& spec, const Rows<T>& grad, int64_t groups, int64_t D, OfGroups numbers, const T* forces, const T* incoming,
                   int threads) {
    const int64_t N = grad.count, R = spec.R_list.size();
    parallel(groups, threads_for(groups * N * D * R, threads), [&](int64_t g, int) {
        const double *scale = numbers(g), *factors = scale + 1;
        const T by = T(-2 / (double(N) * double(D))) / unit_of_points<T>(spec, *scale, D) * incoming[g];
        for (int64_t i = 0; i < N; ++i) {
            T* out = grad(g, i);
            for (int64_t r = 0; r < R; ++r) {
                const T* force = forces + ((r * groups + g) * N + i) * D;
                const T factor = T(factors[r]) * by;
                for (int64_t e = 0; e < D; ++e) out[e] = r == 0 ? force[e] * factor : out[e] + force[e] * factor;
            }
        }
    });
}

}  // namespace drift::DRIFT_ISA
