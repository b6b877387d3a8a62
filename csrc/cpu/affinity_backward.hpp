// The vector-Jacobian product of forms A and B.
#pragma once
#include "problem.hpp"

namespace drift::DRIFT_ISA {

template <class T> class AffinityBackward : Problem<T> {
    using Base = Problem<T>;
    using Base::p, Base::g, Base::N, Base::M, Base::D, Base::S, Base::threads, Base::cols, Base::rows, Base::blocks;
    const AffinityGradients<T>& io;
    const int64_t depth;  // D, padded to whole panels
    Buffer<const T*> value_rows;
    Buffer<T> value_panels;        // transposed
    Buffer<T> key_rows_panels;     // not transposed
    Buffer<T> row_flow, col_flow;  // [S, rows], [S, cols]: Σ_j G_ij and Σ_i G_ij, with G = w·A·dA where A is above the floor
    struct Own {                   // a worker's
        Buffer<T> logits, A, G, h, query_panels, grad_panels;
        Buffer<const T*> pointers;
    };
    std::vector<Own> own;

  public:
    AffinityBackward(const AffinityProblem<T>& problem, const AffinityGradients<T>& io, int threads)
        : Base(problem, threads), io(io), depth(round_up(D, PANEL<T>)), value_rows(cols), value_panels(cols * D), key_rows_panels(M * depth),
          row_flow(S * rows), col_flow(S * cols) {
        auto tile = [&] { return Buffer<T>(TILE_ROWS * this->ld); };
        auto panels = [&] { return Buffer<T>(TILE_ROWS * depth); };
        for (int t = 0; t < threads; ++t) own.push_back({tile(), tile(), tile(), tile(), panels(), panels(), Buffer<const T*>(TILE_ROWS)});
    }

    void run(int64_t group) {
        Base::open(group);
        std::fill_n(static_cast<const T**>(value_rows), cols, nullptr);
        Base::point_at(Base::values(), [](const Block& block) { return block.col; }, value_rows);
        pack_transposed<T>(cols, D, value_rows, io.centre + g * D, value_panels);
        Base::point_at(p.keys, [](const Block& block) { return block.key; }, value_rows);
        pack_rows<T>(M, D, value_rows, Base::centre, key_rows_panels);
        load_statistics();
        std::fill_n(static_cast<T*>(row_flow), S * rows, T(0));
        std::fill_n(static_cast<T*>(col_flow), S * cols, T(0));
        Base::walk([&](const KeyTile<T>& t, int worker) { add_value_gradients(worker, t); });
        Base::walk([&](const KeyTile<T>& t, int worker) { add_point_gradients(worker, t); });
    }

  private:
    void load_statistics() {
        std::fill_n(static_cast<T*>(Base::row_stats), S * 2 * rows, T(0));
        std::fill_n(static_cast<T*>(Base::col_stats), S * 2 * cols, T(0));
        for (int64_t s = 0; s < S; ++s)
            for (int n = 0; n < 2; ++n) {
                const int64_t at = (s * p.groups + g) * 2 + n;
                std::copy_n(io.row_stats + at * N, N, Base::row_stats + (s * 2 + n) * rows);
                for (const Block& block : blocks)
                    std::copy_n(io.col_stats + at * M + block.key, block.count, Base::col_stats + (s * 2 + n) * cols + block.col);
            }
    }

    // Gradients of the keys, or values, of a tile.
    T* grad_rows(const std::vector<T*>& grads, const KeyTile<T>& t) const {
        return grads[t.array] + (g * blocks[t.array].count + t.in_array) * D;
    }

    // Rows [row, row + rows) of a matrix [N, D] as the right-hand side of a product.
    void pack_tile_rows(const T* matrix, int64_t count, Own& mine, T* panels) const {
        for (int64_t i = 0; i < count; ++i) mine.pointers[i] = matrix + i * D;
        pack_rows<T>(count, D, mine.pointers, nullptr, panels);
    }

    // A of the tile, and G = dA_ij = dnum_i·(v_j − centre) + dden_i (not yet times A and w).
    void find_affinities_and_gradients(const KeyTile<T>& t, int64_t s, const T* d, Own& mine) const {
        const int64_t at = Base::output_row(s, t.side) + t.row;
        find_logits<T>(t, Base::logit(s), d, mine.logits);
        Base::find_affinities(t, s, mine.logits, mine.A);
        multiply<T>(t.rows, t.width, D, io.grad_num + at * D, D, 1, value_panels + t.col * D, D * PANEL<T>, mine.G, t.ld, false);
        for (int64_t i = 0; i < t.rows; ++i) {
            const Vec<T> grad_den = splat<T>(io.grad_den[at + i]);
            for (T *G = mine.G + i * t.ld, *end = G + t.width; G < end; G += WIDTH<T>) store<T>(G, load<T>(G) + grad_den);
        }
    }

    // Pass 1: gradients of v and w, and the sums of G along rows and columns that pass 2 needs.
    void add_value_gradients(int worker, const KeyTile<T>& t) {
        Own& mine = own[worker];
        const T* d = Base::find_distances(worker, t);
        const T* w = Base::tile_weights(t);
        const T least = std::sqrt(T(p.spec.floor));
        for (int64_t s = 0; s < S; ++s) {
            find_affinities_and_gradients(t, s, d, mine);
            T* grad_w = io.grad_w ? io.grad_w + g * M + t.key : nullptr;
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
            pack_tile_rows(io.grad_num + (Base::output_row(s, t.side) + t.row) * D, t.rows, mine, mine.grad_panels);
            T* grad_v = grad_rows(io.grad_values.empty() ? io.grad_keys : io.grad_values, t);
            multiply<T>(t.cols, D, t.rows, mine.A, 1, t.ld, mine.grad_panels, t.rows * PANEL<T>, grad_v, D, true);
        }
    }

    // Pass 2: gradients of q and k. dL = G − ½ softmax_j(L)·Σ_j G − ½ softmax_i(L)·Σ_i G, and dL/dq_i = Σ_j h_ij (q_i − k_j).
    void add_point_gradients(int worker, const KeyTile<T>& t) {
        Own& mine = own[worker];
        const T* d = Base::distances_again(worker, t);
        std::fill_n(static_cast<T*>(mine.h), t.rows * t.ld, T(0));
        for (int64_t s = 0; s < S; ++s) {
            find_affinities_and_gradients(t, s, d, mine);
            for (int64_t i = 0; i < t.rows; ++i) add_row_factors(t, s, i, d, mine);
        }
        const T* q = Base::centred + t.row * D;
        T *grad_q = io.grad_q + (g * N + t.row) * D, *grad_k = grad_rows(io.grad_keys, t);
        T col_sums[TILE_COLS] = {};
        for (int64_t i = 0; i < t.rows; ++i) {
            T* h = mine.h + i * t.ld;  // −h, so that products add
            add_close_pairs(t, i, d + i * t.ld, h, grad_q + i * D, grad_k);
            const T row_sum = sum<T>(h, t.cols);
            for (int64_t j = 0; j < t.cols; ++j) col_sums[j] += h[j];
            for (int64_t e = 0; e < D; ++e) grad_q[i * D + e] -= row_sum * q[i * D + e];
        }
        for (int64_t j = 0; j < t.cols; ++j)
            for (int64_t e = 0; e < D; ++e) grad_k[j * D + e] -= col_sums[j] * (Base::key_rows[t.col + j][e] - Base::centre[e]);
        multiply<T>(t.rows, D, t.cols, mine.h, t.ld, 1, key_rows_panels + t.key * PANEL<T>, M * PANEL<T>, grad_q, D, true);
        pack_tile_rows(q, t.rows, mine, mine.query_panels);
        multiply<T>(t.cols, D, t.rows, mine.h, 1, t.ld, mine.query_panels, t.rows * PANEL<T>, grad_k, D, true);
    }

    // Pairs so close that h·q − h·k would cancel contribute through their difference instead; their h becomes 0.
    void add_close_pairs(const KeyTile<T>& t, int64_t i, const T* d, T* h, T* grad_q, T* grad_k) const {
        const T q_norm = Base::query_norms[t.row + i];
        const T* k_norms = Base::key_norms + t.col;
        typename Simd<T>::ivec close{};
        for (int64_t j = 0; j < t.width; j += WIDTH<T>) {
            const Vec<T> distance = load<T>(d + j);
            close |= distance * distance < (q_norm + load<T>(k_norms + j)) * T(CLOSE);
        }
        if (!any<T>(close)) return;
        const T* q = Base::query_rows[t.row + i];
        for (int64_t j = 0; j < t.cols; ++j) {
            if (!(d[j] * d[j] < (q_norm + k_norms[j]) * T(CLOSE))) continue;
            const T* k = Base::key_rows[t.col + j];
            for (int64_t e = 0; e < D; ++e) {
                const T pull = h[j] * (q[e] - k[e]);
                grad_q[e] -= pull;
                grad_k[j * D + e] += pull;
            }
            h[j] = 0;
        }
    }

    void add_row_factors(const KeyTile<T>& t, int64_t s, int64_t i, const T* d, Own& mine) const {
        const Statistics<T> row = Base::row_statistics(s).at(t.row + i), col = Base::col_statistics(s).at(t.col);
        const T* w = Base::tile_weights(t);
        const T least = std::sqrt(T(p.spec.floor)), row_half = row_flow[s * rows + t.row + i] / 2 * row.sum[0] * row.sum[0];
        const Logit<T> logit = Base::logit(s);
        for (int64_t j = 0; j < t.width; j += WIDTH<T>) {
            const int64_t at = i * t.ld + j;
            const Vec<T> L = load<T>(mine.logits + at), A = load<T>(mine.A + at), factor = load<T>(col.sum + j);
            Vec<T> G = A * load<T>(mine.G + at);
            if (w) G *= load_up_to<T>(w + j, t.cols - j);
            G = A <= least ? Vec<T>{} : G;
            const Vec<T> grad_logit = G - row_half * exp_nonpositive(L - row.level[0])
                                      - T(0.5) * load<T>(col_flow + s * cols + t.col + j) * factor * factor * exp_nonpositive(L - load<T>(col.level + j));
            store<T>(mine.h + at, load<T>(mine.h + at) - logit.point_factor(L, load<T>(d + at), grad_logit));
        }
    }
};

template <class T> void affinity_backward(const AffinityProblem<T>& p, const AffinityGradients<T>& io) {
    run_all<T, AffinityBackward>(p, io);
}

}  // namespace drift::DRIFT_ISA
