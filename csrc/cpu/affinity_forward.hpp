// Forms A and B: softmax statistics, then weighted sums.
#pragma once
#include "row_sums.hpp"

namespace drift::DRIFT_ISA {

template <class T> class AffinityForward : RowSums<T, AffinityProblem<T>> {
    using Base = RowSums<T, AffinityProblem<T>>;
    using Base::p, Base::g, Base::N, Base::M, Base::D, Base::S, Base::cols, Base::rows, Base::blocks, Base::tiles;
    const AffinitySums<T>& out;

  public:
    AffinityForward(const AffinityProblem<T>& problem, const AffinitySums<T>& out, int threads) : Base(problem, threads), out(out) {}

    void run(int64_t group) {
        Base::open(group);
        const T* centre = find_centre<T>(Base::find_values(), M, D, Base::mean);
        std::copy_n(centre, D, out.centre + g * D);
        Base::pack_values(centre);
        if (!find_statistics_of_one_level()) find_statistics();
        finish_statistics();
        Base::find_sums(out.num, out.den);
    }

  private:
    void start(int64_t s, T level) { Base::row_statistics(s).start(rows, level), Base::col_statistics(s).start(cols, level); }

    // With one level for all logits, one exponential serves a row and a column; false where some sums would lose their terms.
    bool find_statistics_of_one_level() {
        for (int64_t s = 0; s < S; ++s) start(s, Base::logit(s).largest());
        const auto some_counted = [&] {  // where none is, the rest of the walk would be in vain
            return std::any_of(Base::row_statistics(0).sum, Base::row_statistics(0).sum + N, [](T sum) { return sum >= LEAST_SUM<T>; });
        };
        const auto add = [&](const KeyTile<T>& t, int worker) {
            const T* d = Base::find_distances(worker, t);
            for (int64_t s = 0; s < S; ++s)
                add_exponentials<T>(t, Base::logit(s), Base::logit(s).largest(), d, Base::row_statistics(s).sum + t.row,
                                    Base::col_statistics(s).sum + t.col);
        };
        if (!Base::walk(add, some_counted)) return false;
        bool all = true;
        for (int64_t s = 0; s < S; ++s) {
            all &= all_counted<T>(Base::row_statistics(s).sum, N);
            for (const Block& block : blocks) all &= all_counted<T>(Base::col_statistics(s).sum + block.col, block.count);
        }
        return all;
    }

    void find_statistics() {
        for (int64_t s = 0; s < S; ++s) start(s, -INF<T>);
        Base::walk([&](const KeyTile<T>& t, int worker) {
            const T* d = Base::find_distances(worker, t);
            for (int64_t s = 0; s < S; ++s) {
                find_logits<T>(t, Base::logit(s), d, tiles[worker]);
                add_to_statistics<T>(t, tiles[worker], Base::row_statistics(s).at(t.row), Base::col_statistics(s).at(t.col));
            }
        });
    }

    void finish_statistics() {
        for (int64_t s = 0; s < S; ++s) {
            const Statistics<T> of_rows = Base::row_statistics(s), of_cols = Base::col_statistics(s);
            of_rows.finish(rows), of_cols.finish(cols);
            const int64_t at = (s * p.groups + g) * 2;
            std::copy_n(of_rows.level, N, out.row_stats + at * N);
            std::copy_n(of_rows.sum, N, out.row_stats + (at + 1) * N);
            for (const Block& block : blocks) {
                std::copy_n(of_cols.level + block.col, block.count, out.col_stats + at * M + block.key);
                std::copy_n(of_cols.sum + block.col, block.count, out.col_stats + (at + 1) * M + block.key);
            }
        }
    }
};

template <class T> void affinity_forward(const AffinityProblem<T>& p, const AffinitySums<T>& out) { run_all<T, AffinityForward>(p, out); }

}  // namespace drift::DRIFT_ISA
