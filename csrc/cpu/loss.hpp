// Form C for many groups: the release's training loss. Each thread takes whole groups; a group's matrices stay in cache.
//
//   loss_scale     distances, and the sums the global scale is made of
//   loss_moments   the three softmax tables, the force of every R, and the mean products that λ and the loss are made of
//   loss_gradient  the forces, weighted by the global λ
// Sums are kept in double, one a group, and added in group order: the same result whatever the number of threads.
#pragma once
#include "field.hpp"

namespace drift::DRIFT_ISA {

constexpr int64_t KEPT_ALIGN = 16;  // columns; a multiple of every vector width

template <class T> class LossGroup {
    const LossProblem<T>& p;
    const int64_t N, M, D, ld, depth;
    Buffer<const T*> rows;
    Buffer<T> query_rows, panels, query_norms, norms, weights, own_distances, A, row_stats, col_stats;

  public:
    double weight_total = 0;  // Σ w of the group opened last

    explicit LossGroup(const LossProblem<T>& p)
        : p(p), N(p.count[0]), M(p.count[0] + p.count[1] + p.count[2]), D(p.D), ld(round_up(M, KEPT_ALIGN)),
          depth(round_up(D, PANEL<T>)), rows(round_up(M, PANEL<T>)), query_rows(N * D),
          panels(std::max(round_up(M, PANEL<T>) * D, M * depth)), query_norms(N), norms(round_up(M, PANEL<T>)), weights(ld),
          own_distances(N * ld), A(N * ld), row_stats(2 * round_up(N, ROW_GRAIN)), col_stats(2 * ld) {}

    // Distances into `kept` (null: into the group's own memory); returns Σ d·w.
    double find_distances(int64_t g, T* kept) {
        open(g);
        T* d = kept ? kept : own_distances;
        std::fill_n(static_cast<T*>(norms), round_up(M, PANEL<T>), INF<T>);
        const T* centre = rows[0];  // any of the points will do: pairs too close for it are worked out from differences
        for (int64_t i = 0; i < N; ++i)
            for (int64_t e = 0; e < D; ++e) query_rows[i * D + e] = rows[i][e] - centre[e];
        pack_transposed<T>(M, D, rows, centre, panels);
        for (int64_t j = 0; j < M; j += PANEL<T>) add_panel_norms(panels + j * D, std::min<int64_t>(PANEL<T>, M - j), norms + j);
        std::copy_n(static_cast<T*>(norms), N, static_cast<T*>(query_norms));
        for_tiles([&](const Tile<T>& t) {
            distances<T>(t, D, {query_rows, query_norms}, rows, {rows, panels, norms}, true, T(1e-4), d + t.row * ld + t.col);
        });
        double total = 0;
        for (int64_t i = 0; i < N; ++i) total += dot<T>(d + i * ld, weights, M);
        return total;
    }

    // Forces of every R into forces[R][g], mean products of theirs into moments[R, R]. `kept` as above, or null to find
    // the distances again.
    void find_forces(int64_t g, T* kept, T scale, int R, const double* R_list, T floor, T* forces, T* moments) {
        if (kept)
            open(g);
        else
            find_distances(g, nullptr);
        const T* d = kept ? kept : own_distances;
        pack_rows<T>(M, D, rows, medoid(d), panels);
        const T kernel_scale = std::max(scale, T(1e-3)), unit = std::max(scale / std::sqrt(T(D)), T(1e-3));
        for (int r = 0; r < R; ++r) {
            find_coefficients(d, {Kernel::laplace, T(1), T(R_list[r]) * kernel_scale}, T(100) * kernel_scale, floor, 1 / unit);
            T* force = forces + (r * p.groups + g) * N * D;
            multiply<T>(N, D, M, A, ld, 1, panels, M * PANEL<T>, force, D, false);
            for (int other = 0; other <= r; ++other)
                moments[r * R + other] = moments[other * R + r] = mean_product(force, forces + (other * p.groups + g) * N * D);
        }
    }

  private:
    void open(int64_t g) {
        int64_t j = 0;
        weight_total = 0;
        std::fill_n(static_cast<const T**>(rows), round_up(M, PANEL<T>), nullptr);
        std::fill_n(static_cast<T*>(weights), ld, T(0));
        for (int kind = 0; kind < 3; ++kind)
            for (int64_t n = 0; n < p.count[kind]; ++n, ++j) {
                rows[j] = p.points[kind] + (g * p.count[kind] + n) * D;
                weights[j] = p.weights[kind][g * p.count[kind] + n];
                weight_total += weights[j];
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

    T mean_product(const T* force, const T* other) const {
        double sum = 0;
        for (int64_t n = 0; n < N * D; n += D) sum += dot(force + n, other + n, D);
        return T(sum / double(N * D));
    }

    template <class Body> void for_tiles(Body body) const {
        for (int64_t i = 0; i < N; i += TILE_ROWS)
            for (int64_t j = 0; j < M; j += TILE_COLS)
                body(Tile<T>{i, std::min(TILE_ROWS, N - i), j, std::min(TILE_COLS, M - j), ld});
    }

    // Squared norms of the packed columns of one panel.
    void add_panel_norms(const T* panel, int64_t count, T* out) const {
        Vec<T> sum[2] = {};
        for (int64_t e = 0; e < D; ++e, panel += PANEL<T>)
            for (int v = 0; v < 2; ++v) sum[v] += load<T>(panel + v * WIDTH<T>) * load<T>(panel + v * WIDTH<T>);
        for (int64_t l = 0; l < count; ++l) out[l] = sum[l / WIDTH<T>][l % WIDTH<T>];
    }

    // c⁻_ij = −A⁻_ij Σ⁺_i and c⁺_ij = A⁺_ij Σ⁻_i, times `unit`, left in A.
    void find_coefficients(const T* d, const Logits<T>& logits, T self_distance, T floor, T unit) {
        const int64_t padded = round_up(N, ROW_GRAIN), split = p.count[0] + p.count[1];
        Statistics<T> row{row_stats, row_stats + padded}, col{col_stats, col_stats + ld};
        row.start(padded), col.start(ld);
        for_tiles([&](const Tile<T>& t) {
            T* corner = A + t.row * ld + t.col;
            logits(t, d + t.row * ld + t.col, corner);
            add_to_self_pairs(t, -self_distance / logits.temperature, corner);
            add_to_statistics<T>(t, corner, row.at(t.row), col.at(t.col));
        });
        row.finish(padded), col.finish(ld);
        for_tiles([&](const Tile<T>& t) {
            T* corner = A + t.row * ld + t.col;
            affinities<T>(t, corner, row.at(t.row), col.at(t.col), floor, false, corner);
        });
        for (int64_t i = 0; i < N; ++i) {
            T* a = A + i * ld;
            const T negative = weigh<T>(a, weights, split), positive = weigh<T>(a + split, weights + split, M - split);
            for (int64_t j = 0; j < split; ++j) a[j] *= -positive * unit;
            for (int64_t j = split; j < M; ++j) a[j] *= negative * unit;
        }
    }
};

template <class T, class Body> void for_groups(const LossProblem<T>& p, Body body) {
    const int64_t pairs = p.groups * p.count[0] * (p.count[0] + p.count[1] + p.count[2]);
    const int parts = int(std::min<int64_t>(threads_for(pairs * p.D, p.threads), p.groups));
    std::vector<LossGroup<T>> group;
    group.reserve(parts);
    for (int part = 0; part < parts; ++part) group.emplace_back(p);
    parallel(parts, [&](int part) {
        for (auto [g, end] = share(p.groups, 1, part, parts); g < end; ++g) body(group[part], g);
    });
}

template <class T> int64_t kept_size(const LossProblem<T>& p) {
    return p.count[0] * round_up(p.count[0] + p.count[1] + p.count[2], KEPT_ALIGN);
}

template <class T> void loss_scale(const LossProblem<T>& p, double* sums, T* kept) {
    Buffer<double> parts(2 * p.groups);
    for_groups(p, [&](LossGroup<T>& group, int64_t g) {
        parts[2 * g] = group.find_distances(g, kept ? kept + g * kept_size(p) : nullptr);
        parts[2 * g + 1] = group.weight_total;
    });
    sums[0] = sums[1] = 0;
    for (int64_t g = 0; g < p.groups; ++g) sums[0] += parts[2 * g], sums[1] += parts[2 * g + 1];
}

template <class T>
void loss_moments(const LossProblem<T>& p, double scale, int R, const double* R_list, double floor, T* kept, T* forces, T* moments) {
    for_groups(p, [&](LossGroup<T>& group, int64_t g) {
        group.find_forces(g, kept ? kept + g * kept_size(p) : nullptr, T(scale), R, R_list, T(floor), forces, moments + R * R * g);
    });
}

template <class T>
void loss_gradient(int64_t groups, int64_t size, int R, const T* forces, const double* factors, const T* group_factors, int threads,
                   T* grad) {
    const int parts = threads_for(groups * size * R, threads);
    parallel(parts, [&](int part) {
        for (auto [g, end] = share(groups, 1, part, parts); g < end; ++g) {
            T* out = grad + g * size;
            for (int r = 0; r < R; ++r) {
                const T* force = forces + (r * groups + g) * size;
                const T factor = T(factors[r]) * group_factors[g];
                for (int64_t n = 0; n < size; ++n) out[n] = r == 0 ? force[n] * factor : out[n] + force[n] * factor;
            }
        }
    });
}

}  // namespace drift::DRIFT_ISA
