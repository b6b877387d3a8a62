// What the backward of every form ends with: the gradients of queries and keys, from those of their logits.
#pragma once
#include "problem.hpp"

namespace drift::DRIFT_ISA {

template <class T, class Asked> class PointGradients : protected Problem<T, Asked> {
    using Base = Problem<T, Asked>;
    const int64_t depth;  // D, padded to whole panels
    Buffer<const T*> value_rows;
    Buffer<T> value_panels;     // transposed
    Buffer<T> key_rows_panels;  // not transposed

  protected:
    using Base::p, Base::g, Base::N, Base::M, Base::D, Base::cols, Base::blocks;
    struct Own {  // a worker's
        Buffer<T> logits, A, G, h, query_panels, grad_panels;
        Buffer<const T*> pointers;
    };
    std::vector<Own> own;

    PointGradients(const Asked& problem, int threads)
        : Base(problem, threads), depth(round_up(D, PANEL<T>)), value_rows(cols), value_panels(cols * D), key_rows_panels(M * depth) {
        auto tile = [&] { return Buffer<T>(TILE_ROWS * this->ld); };
        auto panels = [&] { return Buffer<T>(TILE_ROWS * depth); };
        for (int t = 0; t < threads; ++t) own.push_back({tile(), tile(), tile(), tile(), panels(), panels(), Buffer<const T*>(TILE_ROWS)});
    }

    // Makes `group` the problem being worked on, its values about `centre` (null: 0).
    void open(int64_t group, const T* centre) {
        Base::open(group);
        std::fill_n(static_cast<const T**>(value_rows), cols, nullptr);
        Base::point_at(p.summed(), [](const Block& block) { return block.col; }, value_rows);
        pack_transposed<T>(cols, D, value_rows, centre, value_panels);
        Base::point_at(p.keys, [](const Block& block) { return block.key; }, value_rows);
        pack_rows<T>(M, D, value_rows, Base::centre, key_rows_panels);
    }

    // Gradients of the keys, or values, of a tile.
    T* grad_rows(const std::vector<T*>& grads, const KeyTile<T>& t) const {
        return grads[t.array] + (g * blocks[t.array].count + t.in_array) * D;
    }

    // A of the tile, and G_ij = grad_num_i·(v_j − centre) + grad_den_i, with a null for 0.
    void find_affinities_and_gradients(const KeyTile<T>& t, int64_t s, const T* d, const T* grad_num, const T* grad_den, Own& mine) const {
        const int64_t at = Base::output_row(s, t.side) + t.row;
        find_logits<T>(t, Base::logit(s), d, mine.logits);
        Base::find_affinities(t, s, mine.logits, mine.A);
        if (grad_num)
            multiply<T>(t.rows, t.width, D, grad_num + at * D, D, 1, value_panels + t.col * D, D * PANEL<T>, mine.G, t.ld, false);
        for (int64_t i = 0; i < t.rows; ++i) {
            const Vec<T> of_row = splat<T>(grad_den ? grad_den[at + i] : T(0));
            for (T *G = mine.G + i * t.ld, *end = G + t.width; G < end; G += WIDTH<T>) store<T>(G, grad_num ? load<T>(G) + of_row : of_row);
        }
    }

    // dv_j = Σ_i A_ij grad_num_i, with A in its place.
    void add_value_gradients(const KeyTile<T>& t, int64_t s, const T* grad_num, Own& mine, const std::vector<T*>& grads) const {
        pack_tile_rows(grad_num + (Base::output_row(s, t.side) + t.row) * D, t.rows, mine, mine.grad_panels);
        multiply<T>(t.cols, D, t.rows, mine.A, 1, t.ld, mine.grad_panels, t.rows * PANEL<T>, grad_rows(grads, t), D, true);
    }

    // Gradients of q and k, where mine.h is −h, so that products add: dq_i = Σ_j h_ij (q_i − k_j).
    void add_point_gradients(const KeyTile<T>& t, const T* d, Own& mine, T* grad_q, const std::vector<T*>& grad_keys) const {
        const T* q = Base::centred + t.row * D;
        T* grad_k = grad_rows(grad_keys, t);
        T col_sums[TILE_COLS] = {};
        grad_q += (g * N + t.row) * D;
        for (int64_t i = 0; i < t.rows; ++i) {
            T* h = mine.h + i * t.ld;
            const int64_t self = t.row + i - t.col;
            if (p.spec.has_self && self >= 0 && self < t.cols) h[self] = 0;  // one point, wherever it is
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

  private:
    // Rows [row, row + rows) of a matrix [N, D] as the right-hand side of a product.
    void pack_tile_rows(const T* matrix, int64_t count, Own& mine, T* panels) const {
        for (int64_t i = 0; i < count; ++i) mine.pointers[i] = matrix + i * D;
        pack_rows<T>(count, D, mine.pointers, nullptr, panels);
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
};

}  // namespace drift::DRIFT_ISA
