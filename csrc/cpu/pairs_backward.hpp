// The vector-Jacobian product of the sums over pairs, log-sum-exps as well as weighted sums.
#pragma once
#include "point_gradients.hpp"

namespace drift::DRIFT_ISA {

template <class T> class PairsBackward : PointGradients<T, PairProblem<T>> {
    using Base = PointGradients<T, PairProblem<T>>;
    using typename Base::Own;
    using Base::p, Base::g, Base::N, Base::M, Base::S, Base::own;
    const PairGradients<T>& io;

  public:
    PairsBackward(const PairProblem<T>& problem, const PairGradients<T>& io, int threads) : Base(problem, threads), io(io) {}

    void run(int64_t group) {
        Base::open(group, io.centre ? io.centre + group * Base::D : nullptr);
        Base::load_potentials();
        Base::walk([&](const KeyTile<T>& t, int worker) { add_gradients(worker, t); });
    }

  private:
    void add_gradients(int worker, const KeyTile<T>& t) {
        Own& mine = own[worker];
        const T* d = Base::find_distances(worker, t);
        std::fill_n(static_cast<T*>(mine.h), t.rows * t.ld, T(0));
        for (int64_t s = 0; s < S; ++s) {
            Base::find_affinities_and_gradients(t, s, d, io.grad_num, io.grad_den, mine);
            add_flows(t, s, d, mine);
            if (io.grad_num) Base::add_value_gradients(t, s, io.grad_num, mine, io.grad_keys);
        }
        Base::add_point_gradients(t, d, mine, io.grad_q, io.grad_keys);
    }

    // flow_ij = A_ij (w_j G_ij + grad_columns_j) where A is above its floor: its sums, and what it adds to h. Leaves w·A.
    void add_flows(const KeyTile<T>& t, int64_t s, const T* d, Own& mine) const {
        const int64_t row = (s * p.groups + g) * N + t.row, col = (s * p.groups + g) * M + t.key;
        const T *w = Base::tile_weights(t), *grad_columns = io.grad_columns ? io.grad_columns + col : nullptr;
        const T least = std::sqrt(T(p.spec.floor));
        const CostLogit<T> logit = Base::logit(s);
        T flow_sums[TILE_COLS] = {}, weight_sums[TILE_COLS] = {};
        for (int64_t i = 0; i < t.rows; ++i) {
            Vec<T> of_row{}, of_width{};
            for (int64_t j = 0; j < t.width; j += WIDTH<T>) {
                const int64_t at = i * t.ld + j;
                const Vec<T> A = load<T>(mine.A + at), L = load<T>(mine.logits + at), grad_weight = A * load<T>(mine.G + at);
                const Vec<T> weight = w ? load_up_to<T>(w + j, t.cols - j) : splat<T>(1);
                const Vec<T> of_column = grad_columns ? load_up_to<T>(grad_columns + j, t.cols - j) : Vec<T>{};
                const Vec<T> flow = A <= least ? Vec<T>{} : weight * grad_weight + A * of_column;
                of_row += flow;
                of_width += L < std::numeric_limits<T>::lowest() ? Vec<T>{} : flow * L;
                store<T>(flow_sums + j, load<T>(flow_sums + j) + flow);
                store<T>(weight_sums + j, load<T>(weight_sums + j) + grad_weight);
                store<T>(mine.h + at, load<T>(mine.h + at) - logit.point_factor(load<T>(d + at), flow));
                store<T>(mine.A + at, A * weight);
            }
            io.row_flow[row + i] += horizontal_sum<T>(of_row);
            io.width_flow[row + i] += horizontal_sum<T>(of_width);
        }
        for (int64_t j = 0; j < t.cols; ++j) io.col_flow[col + j] += flow_sums[j];
        if (!io.grad_w) return;
        for (int64_t j = 0; j < t.cols; ++j) io.grad_w[g * M + t.key + j] += weight_sums[j];
    }
};

template <class T> void pair_gradients(const PairProblem<T>& p, const PairGradients<T>& io) { run_all<T, PairsBackward>(p, io); }

}  // namespace drift::DRIFT_ISA
