// The vector-Jacobian product of forms A and B.
#pragma once
#include "point_gradients.hpp"

namespace drift::DRIFT_ISA {

template <class T> class AffinityBackward : PointGradients<T, AffinityProblem<T>> {
    using Base = PointGradients<T, AffinityProblem<T>>;
    using typename Base::Own;
    using Base::p, Base::g, Base::N, Base::M, Base::D, Base::S, Base::cols, Base::rows, Base::blocks, Base::own;
    const AffinityGradients<T>& io;
    Buffer<T> row_flow, col_flow;  // [S, rows], [S, cols]: Σ_j G_ij and Σ_i G_ij, with G = w·A·dA where A is above the floor

  public:
    AffinityBackward(const AffinityProblem<T>& problem, const AffinityGradients<T>& io, int threads)
        : Base(problem, threads), io(io), row_flow(S * rows), col_flow(S * cols) {}

    void run(int64_t group) {
        Base::open(group, io.centre + group * D);
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

    // A of the tile, and G = dA_ij, not yet times A and w.
    void find_affinities_and_gradients(const KeyTile<T>& t, int64_t s, const T* d, Own& mine) const {
        Base::find_affinities_and_gradients(t, s, d, io.grad_num, io.grad_den, mine);
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
            Base::add_value_gradients(t, s, io.grad_num, mine, io.grad_values.empty() ? io.grad_keys : io.grad_values);
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
        Base::add_point_gradients(t, d, mine, io.grad_q, io.grad_keys);
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
