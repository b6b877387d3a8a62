// Forms A and B: softmax statistics, then weighted sums.
#pragma once
#include "problem.hpp"

namespace drift::DRIFT_ISA {

template <class T> class AffinityForward : Problem<T> {
    using Base = Problem<T>;
    using Base::p, Base::g, Base::N, Base::M, Base::D, Base::S, Base::threads, Base::cols, Base::rows, Base::blocks;
    const AffinitySums<T>& out;
    Buffer<const T*> value_rows;
    Buffer<T> value_panels;
    std::vector<Buffer<T>> tiles;

  public:
    AffinityForward(const AffinityProblem<T>& problem, const AffinitySums<T>& out, int threads)
        : Base(problem, threads), out(out), value_rows(M), value_panels(M * round_up(D, PANEL<T>)), tiles(Base::tile_buffers()) {}

    void run(int64_t group) {
        Base::open(group);
        pack_values();
        if (!find_statistics_of_one_level()) find_statistics();
        finish_statistics();
        const int64_t size = Base::parts == 1 ? TILE_ROWS : std::clamp(round_up(N / (4 * threads), ROW_GRAIN), ROW_GRAIN, TILE_ROWS);
        parallel(Base::units_of(N, size), threads,
                 [&](int64_t unit, int worker) { sum_rows(worker, {unit * size, std::min(N, (unit + 1) * size)}); });
    }

  private:
    void pack_values() {
        Base::point_at(Base::values(), [](const Block& block) { return block.key; }, value_rows);
        const T* centre = find_centre<T>(value_rows, M, D, Base::mean);
        std::copy_n(centre, D, out.centre + g * D);
        pack_rows<T>(M, D, value_rows, centre, value_panels);
    }

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
                                    Base::col_statistics(s).sum + t.col, nullptr);
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

    void sum_rows(int worker, Range r) {
        for (int64_t s = 0; s < S; ++s)
            for (int side = 0; side < p.spec.sides; ++side) {
                const int64_t at = Base::output_row(s, side);
                std::fill(out.num + (at + r.begin) * D, out.num + (at + r.end) * D, T(0));
                std::fill(out.den + at + r.begin, out.den + at + r.end, T(0));
            }
        T* A = tiles[worker];
        Base::for_tiles(r, {0, cols}, [&](const KeyTile<T>& t) {
            const T* d = Base::distances_again(worker, t);
            for (int64_t s = 0; s < S; ++s) {
                const int64_t at = Base::output_row(s, t.side) + t.row;
                find_logits<T>(t, Base::logit(s), d, A);
                Base::find_affinities(t, s, A, A);
                for (int64_t i = 0; i < t.rows; ++i) out.den[at + i] += weigh<T>(A + i * t.ld, Base::tile_weights(t), t.cols);
                multiply<T>(t.rows, D, t.cols, A, t.ld, 1, value_panels + t.key * PANEL<T>, M * PANEL<T>, out.num + at * D, D, true);
            }
        });
    }
};

template <class T> void affinity_forward(const AffinityProblem<T>& p, const AffinitySums<T>& out) { run_all<T, AffinityForward>(p, out); }

}  // namespace drift::DRIFT_ISA
