// Form C, the release's training loss. Many small groups: each worker takes whole ones, whose matrices stay in cache. Large
// ones: distances for the scale, then the weighted sums of forms A and B, all threads on one group.
//
//   loss_scale     distances, and the means that the global scale is made of
//   loss_moments   the three softmax tables, the force of every R, and the mean products that λ and the loss are made of
//   loss_gradient  the forces, weighted by the global λ
// Sums are kept in double, one a group, and added in group order: the same result whatever the number of threads.
#pragma once
#include "affinity_forward.hpp"

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
    const int64_t N, M, D, ld, depth;
    Buffer<const T*> rows;
    Buffer<T> centred, panels, query_norms, norms, negative_weights, positive_weights;  // weights are 0 on the other side
    Buffer<T> own_distances, A, row_stats, col_stats;

  public:
    double weight_total = 0;  // Σ w of the group opened last

    explicit LossGroup(const LossProblem<T>& p)
        : p(p), N(p.N()), M(p.M()), D(p.D), ld(round_up(M, KEPT_ALIGN)), depth(round_up(D, PANEL<T>)), rows(round_up(M, PANEL<T>)),
          centred(N * D), panels(std::max(round_up(M, PANEL<T>) * D, M * depth)), query_norms(N), norms(round_up(M, PANEL<T>)),
          negative_weights(ld), positive_weights(ld), own_distances(N * ld), A(N * ld), row_stats(2 * round_up(N, ROW_GRAIN)), col_stats(2 * ld) {}

    // Distances into `kept` (null: into the group's own memory); returns Σ d·w.
    double find_distances(int64_t g, T* kept) {
        open(g);
        T* d = kept ? kept : own_distances;
        std::fill_n(static_cast<T*>(norms), round_up(M, PANEL<T>), INF<T>);
        const T* centre = rows[0];  // any of the points will do: pairs too close for it are worked out from differences
        for (int64_t i = 0; i < N; ++i)
            for (int64_t e = 0; e < D; ++e) centred[i * D + e] = rows[i][e] - centre[e];
        pack_transposed<T>(M, D, rows, centre, panels);
        for (int64_t j = 0; j < M; j += PANEL<T>) find_panel_norms<T>(panels + j * D, D, std::min<int64_t>(PANEL<T>, M - j), norms + j);
        std::copy_n(static_cast<T*>(norms), N, static_cast<T*>(query_norms));
        for_tiles([&](const Tile<T>& t) {
            distances<T>(t, D, {rows, centred, query_norms}, {rows, panels, norms}, true, T(p.spec.least_distance), d + t.row * ld + t.col);
        });
        double total = 0;
        for (int64_t i = 0; i < N; ++i) {
            Vec<T> of_row{};
            for (int64_t j = 0; j < M; j += WIDTH<T>) {  // infinite distances beyond the targets count for nothing
                const Vec<T> here = load<T>(d + i * ld + j), w = load<T>(negative_weights + j) + load<T>(positive_weights + j);
                of_row += here > std::numeric_limits<T>::max() && w == Vec<T>{} ? Vec<T>{} : here * w;
            }
            total += horizontal_sum<T>(of_row);
        }
        return total;
    }

    // Forces of every R into forces[R][g], mean products of theirs into moments[R, R]. `kept` as above, or null to find
    // the distances again.
    void find_forces(int64_t g, T* kept, double scale, T* forces, T* moments) {
        if (kept)
            open(g);
        else
            find_distances(g, nullptr);
        T* d = kept ? kept : own_distances;
        pack_rows<T>(M, D, rows, medoid(d), panels);
        const T kernel_scale = T(std::max(scale, p.spec.least_scale)), unit = unit_of_points<T>(p.spec, scale, D);
        const T self_distance = T(p.spec.self_distance) * kernel_scale;
        for_tiles([&](const Tile<T>& t) { add_to_self_pairs(t, self_distance, d + t.row * ld + t.col); });
        const T least_distance = least_of(d);
        const int64_t R = p.spec.R_list.size(), stride = p.groups * N * D;
        T* of_group = forces + g * N * D;
        for (int64_t r = 0; r < R; ++r) {
            find_coefficients(d, {LogitKind::laplace, T(p.spec.R_list[r]) * kernel_scale, T(1)}, least_distance, 1 / unit);
            multiply<T>(N, D, M, A, ld, 1, panels, M * PANEL<T>, of_group + r * stride, D, false);
        }
        find_moments(R, N, D, of_group, stride, moments);
    }

  private:
    void open(int64_t g) {
        int64_t j = 0;
        weight_total = 0;
        std::fill_n(static_cast<const T**>(rows), round_up(M, PANEL<T>), nullptr);
        std::fill_n(static_cast<T*>(negative_weights), ld, T(0));
        std::fill_n(static_cast<T*>(positive_weights), ld, T(0));
        for (int kind = 0; kind < 3; ++kind)
            for (int64_t n = 0; n < p.points[kind].count; ++n, ++j) {
                rows[j] = p.points[kind](g, n);
                const T weight = *p.weights[kind](g, n);
                (kind == 2 ? positive_weights : negative_weights)[j] = weight;
                weight_total += weight;
            }
    }

    // The generated sample nearest to all targets together: an origin that a few far outliers do not move away from the
    // rest, where the rest would lose digits.
    const T* medoid(const T* d) const {
        int64_t best = 0;
        T least = INF<T>;
        for (int64_t i = 0; i < N; ++i) {
            const T total = sum<T>(d + i * ld, M);
            if (total < least) least = total, best = i;
        }
        return rows[best];
    }

    T least_of(const T* d) const {
        Vec<T> least = splat<T>(INF<T>);
        for (int64_t i = 0; i < N; ++i)
            for (int64_t j = 0; j < M; j += WIDTH<T>) {
                const Vec<T> here = load<T>(d + i * ld + j);
                least = here < least ? here : least;
            }
        return -horizontal_max<T>(-least);
    }

    template <class Body> void for_tiles(Body body) const {
        for (int64_t i = 0; i < N; i += TILE_ROWS)
            for (int64_t j = 0; j < M; j += TILE_COLS)
                body(Tile<T>{i, std::min(TILE_ROWS, N - i), j, std::min(TILE_COLS, M - j), ld});
    }

    // c⁻_ij = −A⁻_ij Σ⁺_i and c⁺_ij = A⁺_ij Σ⁻_i, times `by`, left in A.
    void find_coefficients(const T* d, const Logit<T>& logit, T least_distance, T by) {
        const int64_t padded = round_up(N, ROW_GRAIN);
        const Statistics<T> row{row_stats, row_stats + padded}, col{col_stats, col_stats + ld};
        const T level = logit.at(least_distance), least = std::sqrt(T(p.spec.floor));
        row.start(padded, level), col.start(ld, level);
        for_tiles([&](const Tile<T>& t) {
            const int64_t corner = t.row * ld + t.col;
            add_exponentials<T>(t, logit, level, d + corner, row.sum + t.row, col.sum + t.col, A + corner);
        });
        const bool one_level = all_counted<T>(row.sum, N) && all_counted<T>(col.sum, M);
        if (one_level)
            row.finish(N), col.finish(ld);
        else
            find_affinities_far_apart(d, logit, row, col);
        for (int64_t i = 0; i < N; ++i) {
            T* a = A + i * ld;
            Vec<T> negatives{}, positives{};
            for (int64_t j = 0; j < M; j += WIDTH<T>) {
                Vec<T> value = load<T>(a + j);
                if (one_level) store<T>(a + j, value = at_least<T>(value * row.sum[i] * load<T>(col.sum + j), least));
                negatives += value * load<T>(negative_weights + j);
                positives += value * load<T>(positive_weights + j);
            }
            const T of_negatives = -horizontal_sum<T>(positives) * by, of_positives = horizontal_sum<T>(negatives) * by;
            for (int64_t j = 0; j < M; j += WIDTH<T>)
                store<T>(a + j, load<T>(a + j) * (load<T>(negative_weights + j) * of_negatives + load<T>(positive_weights + j) * of_positives));
        }
    }

    // The affinities where one level does not serve all logits: every row and column has its own.
    void find_affinities_far_apart(const T* d, const Logit<T>& logit, const Statistics<T>& row, const Statistics<T>& col) {
        const int64_t padded = round_up(N, ROW_GRAIN);
        row.start(padded, -INF<T>), col.start(ld, -INF<T>);
        for_tiles([&](const Tile<T>& t) {
            T* corner = A + t.row * ld + t.col;
            find_logits<T>(t, logit, d + t.row * ld + t.col, corner);
            add_to_statistics<T>(t, corner, row.at(t.row), col.at(t.col));
        });
        row.finish(padded), col.finish(ld);
        for_tiles([&](const Tile<T>& t) {
            T* corner = A + t.row * ld + t.col;
            affinities<T>(t, corner, row.at(t.row), col.at(t.col), T(p.spec.floor), false, corner);
        });
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
    std::vector<double> of_rows;

  public:
    DistanceSum(const AffinityProblem<T>& problem) : Base(problem, problem.threads), of_rows(Base::N) {}
    double operator()(int64_t g) {
        Base::open(g);
        std::fill(of_rows.begin(), of_rows.end(), 0.0);
        Base::walk([&](const KeyTile<T>& t, int worker) {
            const T *d = Base::find_distances(worker, t), *w = Base::tile_weights(t);
            for (int64_t i = 0; i < t.rows; ++i) of_rows[t.row + i] += dot<T>(d + i * t.ld, w, t.cols);
        });
        double total = 0;
        for (double of_row : of_rows) total += of_row;
        return total;
    }
};

// A large group as a problem of form B: gen, neg and pos are the keys, `weights` [M] receives theirs.
template <class T> AffinityProblem<T> as_affinity(const LossProblem<T>& p, const AffinitySpec& spec, int64_t g, T* weights) {
    AffinityProblem<T> problem{spec, 1, p.D, p.points[0], {p.points[0], p.points[1], p.points[2]}, {}, weights, p.threads};
    problem.q.first = p.points[0](g, 0);
    for (int kind = 0; kind < 3; ++kind) {
        problem.keys[kind].first = p.points[kind](g, 0);
        for (int64_t n = 0; n < p.points[kind].count; ++n) *weights++ = *p.weights[kind](g, n);
    }
    return problem;
}

template <class T> double scale_of_large_group(const LossProblem<T>& p, int64_t g, double& weight_total) {
    Buffer<T> weights(p.M());
    const AffinitySpec spec{LogitKind::laplace, {}, 1.0, 0.0, true, 1, p.spec.least_distance, 0.0};
    const AffinityProblem<T> problem = as_affinity<T>(p, spec, g, weights);
    weight_total = sum<T>(weights, p.M());
    return DistanceSum<T>(problem)(0);
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
            sums[g] = group.find_distances(g, kept ? kept + g * p.kept_of_group() : nullptr);
            weights[g] = group.weight_total;
        });
    double sum = 0, weight = 0;
    for (int64_t g = 0; g < p.groups; ++g) sum += sums[g], weight += weights[g];
    means[0] = sum / (double(p.groups) * double(p.N()) * double(p.M())), means[1] = weight / (double(p.groups) * double(p.M()));
}

template <class T> void loss_moments(const LossProblem<T>& p, double scale, T* kept, T* forces, T* moments) {
    const int64_t R2 = p.spec.R_list.size() * p.spec.R_list.size();
    if (is_streamed(p))
        for (int64_t g = 0; g < p.groups; ++g) forces_of_large_group(p, g, scale, forces, moments + R2 * g);
    else
        for_groups(p, [&](LossGroup<T>& group, int64_t g) {
            group.find_forces(g, kept ? kept + g * p.kept_of_group() : nullptr, scale, forces, moments + R2 * g);
        });
}

template <class T>
void loss_gradient(const LossSpec& spec, const Rows<T>& grad, int64_t groups, int64_t D, double scale, const double* factors,
                   const T* forces, const T* incoming, int threads) {
    const int64_t N = grad.count, R = spec.R_list.size();
    const T by = T(-2 / (double(N) * double(D))) / unit_of_points<T>(spec, scale, D);
    parallel(groups, threads_for(groups * N * D * R, threads), [&](int64_t g, int) {
        for (int64_t i = 0; i < N; ++i) {
            T* out = grad(g, i);
            for (int64_t r = 0; r < R; ++r) {
                const T* force = forces + ((r * groups + g) * N + i) * D;
                const T factor = T(factors[r]) * by * incoming[g];
                for (int64_t e = 0; e < D; ++e) out[e] = r == 0 ? force[e] * factor : out[e] + force[e] * factor;
            }
        }
    });
}

}  // namespace drift::DRIFT_ISA
