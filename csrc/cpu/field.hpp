// Forms A and B: weighted sums under the doubly normalised affinity, and their vector-Jacobian product.
//
// A problem is walked in tiles; nothing of size N×M is kept. Small problems are spread over the threads whole; a large one
// is cut into `team` row ranges × `team` column ranges, and in phase p thread t works on column range (t + p) mod team, so
// that every row and every column has one writer at a time: no locks, no atomics, one fixed order of summation.
//
// Keys are laid out in columns, each side padded to whole panels, so that a tile never holds keys of both sides.
#pragma once
#include <vector>

#include "affinity.hpp"
#include "buffer.hpp"
#include "kernels.hpp"
#include "parallel.hpp"

namespace drift::DRIFT_ISA {

constexpr int64_t LARGE = int64_t(1) << 19;  // N·M above which one problem is worth all threads
constexpr int64_t ROW_GRAIN = 16;            // row ranges start at multiples of every vector width

struct Range {
    int64_t begin, end;
};
inline Range share(int64_t count, int64_t grain, int part, int parts) {
    const int64_t grains = (count + grain - 1) / grain;
    return {std::min(count, grains * part / parts * grain), std::min(count, grains * (part + 1) / parts * grain)};
}

// The keys of one side: columns [col, col + count) hold keys [key, key + count).
struct Side {
    int64_t col, key, count;
};

template <class T> struct FieldTile : Tile<T> {
    int side;
    int64_t key;  // of the first column
};

// One problem of the batch at a time, and what both directions need of it.
template <class T> class Field {
  protected:
    const AffinityProblem<T>& p;
    const int team;
    const int64_t rows;  // N, padded to whole vectors
    Side sides[2];
    int64_t cols;        // of all sides, padding included
    bool one_block;      // small enough to keep the distances between passes
    int64_t ld;          // of a thread's tile matrices
    int64_t g = 0;       // the problem being worked on
    Buffer<const T*> query_rows, key_rows;
    Buffer<T> key_panels, query_norms, key_norms;
    Buffer<T> row_stats, col_stats;       // [S, 2, rows], [S, 2, cols]
    std::vector<Buffer<T>> kept_distances;  // a thread's

    Field(const AffinityProblem<T>& problem, int team)
        : p(problem), team(team), rows(round_up(p.N, ROW_GRAIN)),
          sides{{0, 0, p.sides == 1 ? p.M : p.split}, {round_up(p.split, PANEL<T>), p.split, p.sides == 1 ? 0 : p.M - p.split}},
          cols(round_up(sides[0].count, PANEL<T>) + round_up(sides[1].count, PANEL<T>)),
          one_block(team == 1 && p.N <= TILE_ROWS && cols <= 2 * TILE_COLS), ld(one_block ? cols : TILE_COLS), query_rows(p.N),
          key_rows(cols), key_panels(cols * p.D), query_norms(rows), key_norms(cols), row_stats(p.widths * 2 * rows),
          col_stats(p.widths * 2 * cols), kept_distances(tile_buffers()) {}

    std::vector<Buffer<T>> tile_buffers() const {
        std::vector<Buffer<T>> all;
        for (int t = 0; t < team; ++t) all.emplace_back(TILE_ROWS * ld);
        return all;
    }

    Range row_range(int part) const { return share(p.N, ROW_GRAIN, part, team); }
    Statistics<T> row_statistics(int s) const { return {row_stats + s * 2 * rows, row_stats + (s * 2 + 1) * rows}; }
    Statistics<T> col_statistics(int s) const { return {col_stats + s * 2 * cols, col_stats + (s * 2 + 1) * cols}; }
    bool masked_self() const { return p.has_self && p.self_distance == INF<double>; }
    int64_t output_row(int s, const FieldTile<T>& t) const { return ((s * p.groups + g) * p.sides + t.side) * p.N + t.row; }
    Logits<T> logits(int s) const {
        const auto kernel = static_cast<Kernel>(p.kernel);
        return kernel == Kernel::laplace ? Logits<T>{kernel, T(1), T(p.width[s])} : Logits<T>{kernel, T(p.width[s]), T(p.temperature)};
    }

    // Makes `group` the problem being worked on. Padding columns have no key: null, infinitely far.
    void open(int64_t group) {
        g = group;
        std::fill_n(static_cast<const T**>(key_rows), cols, nullptr);
        std::fill_n(static_cast<T*>(key_norms), cols, INF<T>);
        for (int64_t i = 0; i < p.N; ++i) query_rows[i] = p.q + (g * p.N + i) * p.D;
        for (const Side& side : sides)
            for (int64_t j = 0; j < side.count; ++j) key_rows[side.col + j] = p.k + (g * p.M + side.key + j) * p.D;
        parallel(team, [&](int part) {
            for (auto [i, end] = row_range(part); i < end; ++i) query_norms[i] = squared_norm(query_rows[i], p.D);
            const auto [begin, end] = share(cols, PANEL<T>, part, team);
            for (int64_t j = begin; j < end; ++j)
                if (key_rows[j]) key_norms[j] = squared_norm(key_rows[j], p.D);
            pack_transposed<T>(end - begin, p.D, key_rows + begin, nullptr, key_panels + begin * p.D);
        });
    }

    // Calls body(tile) for every tile of the ranges, all of a row block before the next.
    template <class Body> void for_tiles(Range r, Range c, Body body) const {
        for (int64_t i = r.begin; i < r.end; i += TILE_ROWS)
            for (int s = 0; s < p.sides; ++s) {
                const int64_t end = std::min(c.end, sides[s].col + sides[s].count);
                for (int64_t j = std::max(c.begin, sides[s].col); j < end; j += TILE_COLS)
                    body(FieldTile<T>{{i, std::min(TILE_ROWS, r.end - i), j, std::min(TILE_COLS, end - j), ld},
                                      s, sides[s].key + j - sides[s].col});
            }
    }

    // Calls body(thread, row range, column range) over all of the problem; no two calls at a time share a row or a column.
    template <class Body> void for_ranges(Body body) const {
        for (int phase = 0; phase < team; ++phase)
            parallel(team, [&](int t) { body(t, row_range(t), share(cols, PANEL<T>, (t + phase) % team, team)); });
    }

    T* tile_distances(int thread, const FieldTile<T>& t) const { return kept_distances[thread] + (one_block ? t.col : 0); }
    const T* find_distances(int thread, const FieldTile<T>& t) const {
        T* d = tile_distances(thread, t);
        distances<T>(t, p.D, {p.q + g * p.N * p.D, query_norms}, query_rows, {key_rows, key_panels, key_norms}, p.has_self,
                     T(p.least_distance), d);
        if (p.has_self) add_to_self_pairs(t, T(p.self_distance), d);
        return d;
    }
    const T* distances_again(int thread, const FieldTile<T>& t) const {
        return one_block ? tile_distances(thread, t) : find_distances(thread, t);
    }
    void find_affinities(const FieldTile<T>& t, int s, const T* logits, T* A) const {
        affinities<T>(t, logits, row_statistics(s).at(t.row), col_statistics(s).at(t.col), T(p.floor), masked_self(), A);
    }
    const T* tile_weights(const FieldTile<T>& t) const { return p.w ? p.w + g * p.M + t.key : nullptr; }
};

template <class T> class FieldForward : Field<T> {
    using Base = Field<T>;
    using Base::p, Base::g, Base::team, Base::cols, Base::rows, Base::sides, Base::row_stats, Base::col_stats;
    const AffinitySums<T>& out;
    Buffer<const T*> value_rows;
    Buffer<T> value_panels;
    std::vector<Buffer<T>> tiles;

  public:
    FieldForward(const AffinityProblem<T>& problem, const AffinitySums<T>& out, int team)
        : Base(problem, team), out(out), value_rows(p.M), value_panels(p.M * round_up(p.D, PANEL<T>)), tiles(Base::tile_buffers()) {}

    void run(int64_t group) {
        Base::open(group);
        for (int64_t j = 0; j < p.M; ++j) value_rows[j] = p.v + (g * p.M + j) * p.D;
        pack_rows<T>(p.M, p.D, value_rows, nullptr, value_panels);
        find_statistics();
        parallel(team, [&](int t) { sum_rows(t, Base::row_range(t)); });
    }

  private:
    void find_statistics() {
        for (int s = 0; s < p.widths; ++s) Base::row_statistics(s).start(rows), Base::col_statistics(s).start(cols);
        Base::for_ranges([&](int thread, Range r, Range c) {
            Base::for_tiles(r, c, [&](const FieldTile<T>& t) {
                const T* d = Base::find_distances(thread, t);
                for (int s = 0; s < p.widths; ++s) {
                    Base::logits(s)(t, d, tiles[thread]);
                    add_to_statistics<T>(t, tiles[thread], Base::row_statistics(s).at(t.row), Base::col_statistics(s).at(t.col));
                }
            });
        });
        for (int s = 0; s < p.widths; ++s) {
            Base::row_statistics(s).finish(rows), Base::col_statistics(s).finish(cols);
            for (int n = 0; n < 2; ++n) {
                const int64_t at = (s * p.groups + g) * 2 + n;
                std::copy_n(row_stats + (s * 2 + n) * rows, p.N, out.row_stats + at * p.N);
                for (const Side& side : sides)
                    std::copy_n(col_stats + (s * 2 + n) * cols + side.col, side.count, out.col_stats + at * p.M + side.key);
            }
        }
    }

    void sum_rows(int thread, Range r) {
        for (int s = 0; s < p.widths; ++s)
            for (int side = 0; side < p.sides; ++side) {
                const int64_t at = ((s * p.groups + g) * p.sides + side) * p.N;
                std::fill(out.num + (at + r.begin) * p.D, out.num + (at + r.end) * p.D, T(0));
                std::fill(out.den + at + r.begin, out.den + at + r.end, T(0));
            }
        T* A = tiles[thread];
        Base::for_tiles(r, {0, cols}, [&](const FieldTile<T>& t) {
            const T* d = Base::distances_again(thread, t);
            for (int s = 0; s < p.widths; ++s) {
                const int64_t at = Base::output_row(s, t);
                Base::logits(s)(t, d, A);
                Base::find_affinities(t, s, A, A);
                for (int64_t i = 0; i < t.rows; ++i) out.den[at + i] += weigh<T>(A + i * t.ld, Base::tile_weights(t), t.cols);
                multiply<T>(t.rows, p.D, t.cols, A, t.ld, 1, value_panels + t.key * PANEL<T>, p.M * PANEL<T>, out.num + at * p.D,
                            p.D, true);
            }
        });
    }
};

template <class T> class FieldBackward : Field<T> {
    using Base = Field<T>;
    using Base::p, Base::g, Base::team, Base::cols, Base::rows, Base::sides, Base::row_stats, Base::col_stats;
    const AffinityGradients<T>& io;
    const int64_t depth;  // D, padded to whole panels
    Buffer<const T*> value_rows;
    Buffer<T> value_panels;        // transposed
    Buffer<T> key_rows_panels;     // not transposed
    Buffer<T> row_flow, col_flow;  // [S, rows], [S, cols]: Σ_j G_ij and Σ_i G_ij, with G = w·A·dA where A is above the floor
    struct Own {                   // a thread's
        Buffer<T> logits, A, G, h, query_panels, grad_panels;
        Buffer<const T*> pointers;
    };
    std::vector<Own> own;

  public:
    FieldBackward(const AffinityProblem<T>& problem, const AffinityGradients<T>& io, int team)
        : Base(problem, team), io(io), depth(round_up(p.D, PANEL<T>)), value_rows(cols), value_panels(cols * p.D),
          key_rows_panels(p.M * depth), row_flow(p.widths * rows), col_flow(p.widths * cols) {
        auto tile = [&] { return Buffer<T>(TILE_ROWS * this->ld); };
        auto panels = [&] { return Buffer<T>(TILE_ROWS * depth); };
        for (int t = 0; t < team; ++t) own.push_back({tile(), tile(), tile(), tile(), panels(), panels(), Buffer<const T*>(TILE_ROWS)});
    }

    void run(int64_t group) {
        Base::open(group);
        std::fill_n(static_cast<const T**>(value_rows), cols, nullptr);
        for (const Side& side : sides)
            for (int64_t j = 0; j < side.count; ++j) value_rows[side.col + j] = p.v + (g * p.M + side.key + j) * p.D;
        pack_transposed<T>(cols, p.D, value_rows, nullptr, value_panels);
        for (const Side& side : sides)  // keys in their own order, without padding
            for (int64_t j = 0; j < side.count; ++j) value_rows[side.key + j] = p.k + (g * p.M + side.key + j) * p.D;
        pack_rows<T>(p.M, p.D, value_rows, nullptr, key_rows_panels);
        load_statistics();
        std::fill_n(static_cast<T*>(row_flow), p.widths * rows, T(0));
        std::fill_n(static_cast<T*>(col_flow), p.widths * cols, T(0));
        Base::for_ranges([&](int thread, Range r, Range c) {
            Base::for_tiles(r, c, [&](const FieldTile<T>& t) { add_value_gradients(thread, t); });
        });
        Base::for_ranges([&](int thread, Range r, Range c) {
            Base::for_tiles(r, c, [&](const FieldTile<T>& t) { add_point_gradients(thread, t); });
        });
    }

  private:
    void load_statistics() {
        std::fill_n(static_cast<T*>(row_stats), p.widths * 2 * rows, T(0));
        std::fill_n(static_cast<T*>(col_stats), p.widths * 2 * cols, T(0));
        for (int s = 0; s < p.widths; ++s)
            for (int n = 0; n < 2; ++n) {
                const int64_t at = (s * p.groups + g) * 2 + n;
                std::copy_n(io.row_stats + at * p.N, p.N, row_stats + (s * 2 + n) * rows);
                for (const Side& side : sides)
                    std::copy_n(io.col_stats + at * p.M + side.key, side.count, col_stats + (s * 2 + n) * cols + side.col);
            }
    }

    // Rows [row, row + rows) of a matrix [N, D] as the right-hand side of a product.
    void pack_tile_rows(const T* matrix, int64_t count, Own& mine, T* panels) const {
        for (int64_t i = 0; i < count; ++i) mine.pointers[i] = matrix + i * p.D;
        pack_rows<T>(count, p.D, mine.pointers, nullptr, panels);
    }

    // A of the tile, and G = dA_ij = dnum_i·v_j + dden_i (not yet times A and w).
    void find_affinities_and_gradients(const FieldTile<T>& t, int s, const T* d, Own& mine) const {
        const int64_t at = Base::output_row(s, t);
        Base::logits(s)(t, d, mine.logits);
        Base::find_affinities(t, s, mine.logits, mine.A);
        multiply<T>(t.rows, t.width, p.D, io.grad_num + at * p.D, p.D, 1, value_panels + t.col * p.D, p.D * PANEL<T>, mine.G, t.ld, false);
        for (int64_t i = 0; i < t.rows; ++i) {
            const Vec<T> grad_den = splat<T>(io.grad_den[at + i]);
            for (T *G = mine.G + i * t.ld, *end = G + t.width; G < end; G += WIDTH<T>) store<T>(G, load<T>(G) + grad_den);
        }
    }

    // Pass 1: gradients of v and w, and the sums of G along rows and columns that pass 2 needs.
    void add_value_gradients(int thread, const FieldTile<T>& t) {
        Own& mine = own[thread];
        const T* d = Base::find_distances(thread, t);
        const T* w = Base::tile_weights(t);
        const T least = std::sqrt(T(p.floor));
        for (int s = 0; s < p.widths; ++s) {
            find_affinities_and_gradients(t, s, d, mine);
            T* grad_w = io.grad_w ? io.grad_w + g * p.M + t.key : nullptr;
            T* col = col_flow + s * cols + t.col;
            for (int64_t i = 0; i < t.rows; ++i) {
                Vec<T> row{};
                for (int64_t j = 0; j < t.width; j += WIDTH<T>) {
                    T *A = mine.A + i * t.ld + j, *G = mine.G + i * t.ld + j;
                    const Vec<T> affinity = load<T>(A), grad_weight = affinity * load<T>(G);
                    const Vec<T> weight = w ? load_up_to<T>(w + j, t.cols - j) : splat<T>(1);
                    const Vec<T> flow = affinity <= least ? Vec<T>{} : grad_weight * weight;  // none through the floor
                    if (grad_w) write_row<T>(grad_w + j, grad_weight, t.cols - j, true);
                    store<T>(A, affinity * weight);
                    store<T>(col + j, load<T>(col + j) + flow);
                    row += flow;
                }
                row_flow[s * rows + t.row + i] += horizontal_sum<T>(row);
            }
            pack_tile_rows(io.grad_num + Base::output_row(s, t) * p.D, t.rows, mine, mine.grad_panels);
            multiply<T>(t.cols, p.D, t.rows, mine.A, 1, t.ld, mine.grad_panels, t.rows * PANEL<T>,
                        io.grad_v + (g * p.M + t.key) * p.D, p.D, true);
        }
    }

    // Pass 2: gradients of q and k. dL = G − ½ softmax_j(L)·Σ_j G − ½ softmax_i(L)·Σ_i G, and dL/dq_i = Σ_j h_ij (q_i − k_j).
    void add_point_gradients(int thread, const FieldTile<T>& t) {
        Own& mine = own[thread];
        const T* d = Base::distances_again(thread, t);
        std::fill_n(static_cast<T*>(mine.h), t.rows * t.ld, T(0));
        for (int s = 0; s < p.widths; ++s) {
            find_affinities_and_gradients(t, s, d, mine);
            for (int64_t i = 0; i < t.rows; ++i) add_row_factors(t, s, i, d, mine);
        }
        const T* q = p.q + (g * p.N + t.row) * p.D;
        const T* k = p.k + (g * p.M + t.key) * p.D;
        T* grad_q = io.grad_q + (g * p.N + t.row) * p.D;
        T* grad_k = io.grad_k + (g * p.M + t.key) * p.D;
        T col_sums[TILE_COLS] = {};
        for (int64_t i = 0; i < t.rows; ++i) {
            T* h = mine.h + i * t.ld;  // −h, so that products add
            add_close_pairs(t, i, d + i * t.ld, h, q + i * p.D, k, grad_q + i * p.D, grad_k);
            const T row_sum = sum<T>(h, t.cols);
            for (int64_t j = 0; j < t.cols; ++j) col_sums[j] += h[j];
            for (int64_t e = 0; e < p.D; ++e) grad_q[i * p.D + e] -= row_sum * q[i * p.D + e];
        }
        for (int64_t j = 0; j < t.cols; ++j)
            for (int64_t e = 0; e < p.D; ++e) grad_k[j * p.D + e] -= col_sums[j] * k[j * p.D + e];
        multiply<T>(t.rows, p.D, t.cols, mine.h, t.ld, 1, key_rows_panels + t.key * PANEL<T>, p.M * PANEL<T>, grad_q, p.D, true);
        pack_tile_rows(q, t.rows, mine, mine.query_panels);
        multiply<T>(t.cols, p.D, t.rows, mine.h, 1, t.ld, mine.query_panels, t.rows * PANEL<T>, grad_k, p.D, true);
    }

    // Pairs so close that h·q − h·k would cancel contribute through their difference instead; their h becomes 0.
    void add_close_pairs(const FieldTile<T>& t, int64_t i, const T* d, T* h, const T* q, const T* k, T* grad_q, T* grad_k) const {
        const T q_norm = this->query_norms[t.row + i];
        const T* k_norms = this->key_norms + t.col;
        typename Simd<T>::ivec close{};
        for (int64_t j = 0; j < t.width; j += WIDTH<T>) {
            const Vec<T> distance = load<T>(d + j);
            close |= distance * distance < (q_norm + load<T>(k_norms + j)) * T(CLOSE);
        }
        if (!any<T>(close)) return;
        for (int64_t j = 0; j < t.cols; ++j) {
            if (!(d[j] * d[j] < (q_norm + k_norms[j]) * T(CLOSE))) continue;
            for (int64_t e = 0; e < p.D; ++e) {
                const T pull = h[j] * (q[e] - k[j * p.D + e]);
                grad_q[e] -= pull;
                grad_k[j * p.D + e] += pull;
            }
            h[j] = 0;
        }
    }

    void add_row_factors(const FieldTile<T>& t, int s, int64_t i, const T* d, Own& mine) const {
        const Statistics<T> row = Base::row_statistics(s).at(t.row + i), col = Base::col_statistics(s).at(t.col);
        const T* w = Base::tile_weights(t);
        const T least = std::sqrt(T(p.floor)), row_half = row_flow[s * rows + t.row + i] / 2 * row.sum[0] * row.sum[0];
        const Logits<T> logits = Base::logits(s);
        for (int64_t j = 0; j < t.width; j += WIDTH<T>) {
            const int64_t at = i * t.ld + j;
            const Vec<T> L = load<T>(mine.logits + at), A = load<T>(mine.A + at), factor = load<T>(col.sum + j);
            Vec<T> G = A * load<T>(mine.G + at);
            if (w) G *= load_up_to<T>(w + j, t.cols - j);
            G = A <= least ? Vec<T>{} : G;
            const Vec<T> grad_logit = G - row_half * exp_nonpositive(L - row.max[0])
                                      - T(0.5) * load<T>(col_flow + s * cols + t.col + j) * factor * factor * exp_nonpositive(L - load<T>(col.max + j));
            store<T>(mine.h + at, load<T>(mine.h + at) - logits.point_factor(L, load<T>(d + at), grad_logit));
        }
    }
};

// Small problems: a share of them to every thread. Large ones: one after the other, all threads on each.
template <class T, template <class> class Direction, class Outputs> void run_all(const AffinityProblem<T>& p, const Outputs& out) {
    if (p.N * p.M >= LARGE) {
        Direction<T> direction(p, out, p.threads);
        for (int64_t g = 0; g < p.groups; ++g) direction.run(g);
        return;
    }
    const int parts = int(std::min<int64_t>(threads_for(p.groups * p.N * p.M * p.D, p.threads), p.groups));
    std::vector<Direction<T>> direction;
    direction.reserve(parts);
    for (int part = 0; part < parts; ++part) direction.emplace_back(p, out, 1);
    parallel(parts, [&](int part) {
        for (auto [g, end] = share(p.groups, 1, part, parts); g < end; ++g) direction[part].run(g);
    });
}

template <class T> void affinity_forward(const AffinityProblem<T>& p, const AffinitySums<T>& out) { run_all<T, FieldForward>(p, out); }
template <class T> void affinity_backward(const AffinityProblem<T>& p, const AffinityGradients<T>& io) { run_all<T, FieldBackward>(p, io); }

}  // namespace drift::DRIFT_ISA
