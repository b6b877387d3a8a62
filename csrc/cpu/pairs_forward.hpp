// The two sums over pairs of the family of fields: log-sum-exps along either axis, and weighted sums under potentials.
#pragma once
#include "row_sums.hpp"

namespace drift::DRIFT_ISA {

template <class T> class LogSumsForward : Problem<T, PairProblem<T>> {
    using Base = Problem<T, PairProblem<T>>;
    using Base::p, Base::g, Base::N, Base::M, Base::S, Base::cols, Base::rows, Base::blocks;
    const LogSums<T>& out;
    std::vector<Buffer<T>> tiles;  // a worker's

  public:
    LogSumsForward(const PairProblem<T>& problem, const LogSums<T>& out, int threads)
        : Base(problem, threads), out(out), tiles(Base::tile_buffers()) {}

    void run(int64_t group) {
        Base::open(group);
        Base::load_potentials();
        out.by_row ? find_row_sums() : find_column_sums();
    }

  private:
    void find_row_sums() {
        for (int64_t s = 0; s < S; ++s) Base::row_statistics(s).start(rows, -INF<T>);
        Base::for_units(N, ROW_GRAIN, TILE_ROWS, [&](Range r, int worker) {
            Base::for_tiles(r, {0, cols}, [&](const KeyTile<T>& t) {
                const T* d = Base::find_distances(worker, t);
                for (int64_t s = 0; s < S; ++s)
                    add_to_rows<T>(t, Base::logit(s), d, Base::col_statistics(s).level + t.col, Base::row_statistics(s).at(t.row));
            });
        });
        for (int64_t s = 0; s < S; ++s) write(Base::row_statistics(s), N, out.sums + (s * p.groups + g) * N);
    }

    void find_column_sums() {
        for (int64_t s = 0; s < S; ++s) Base::col_statistics(s).start(cols, -INF<T>);
        Base::for_units(cols, PANEL<T>, TILE_COLS, [&](Range c, int worker) {
            Base::for_tiles({0, N}, c, [&](const KeyTile<T>& t) {
                const T* d = Base::find_distances(worker, t);
                for (int64_t s = 0; s < S; ++s)
                    add_to_columns<T>(t, Base::logit(s), d, Base::row_statistics(s).level + t.row, Base::col_statistics(s).at(t.col),
                                      tiles[worker]);
            });
        });
        for (int64_t s = 0; s < S; ++s)
            for (const Block& block : blocks)
                write(Base::col_statistics(s).at(block.col), block.count, out.sums + (s * p.groups + g) * M + block.key);
    }

    static void write(const Statistics<T>& found, int64_t count, T* sums) {
        for (int64_t n = 0; n < count; ++n) sums[n] = found.level[n] + std::log(found.sum[n]);
    }
};

template <class T> class PairsForward : RowSums<T, PairProblem<T>> {
    using Base = RowSums<T, PairProblem<T>>;
    const PairSums<T>& out;

  public:
    PairsForward(const PairProblem<T>& problem, const PairSums<T>& out, int threads) : Base(problem, threads), out(out) {}

    void run(int64_t group) {
        Base::open(group);
        Base::load_potentials();
        Base::find_values();
        Base::pack_values(out.centre ? out.centre + group * Base::D : nullptr);
        if (Base::one_tile) Base::walk([&](const KeyTile<T>& t, int worker) { Base::find_distances(worker, t); });
        Base::find_sums(out.num, out.den);
    }
};

template <class T> void log_sums(const PairProblem<T>& p, const LogSums<T>& out) { run_all<T, LogSumsForward>(p, out); }
template <class T> void weighted_sums(const PairProblem<T>& p, const PairSums<T>& out) { run_all<T, PairsForward>(p, out); }

}  // namespace drift::DRIFT_ISA
