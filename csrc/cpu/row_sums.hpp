// What is left to do for the forward of every form once potentials are known: the weighted sums of rows.
#pragma once
#include "problem.hpp"

namespace drift::DRIFT_ISA {

template <class T, class Asked> class RowSums : protected Problem<T, Asked> {
    using Base = Problem<T, Asked>;
    Buffer<const T*> value_rows;
    Buffer<T> value_panels;

  protected:
    using Base::p, Base::g, Base::N, Base::M, Base::D, Base::S;
    std::vector<Buffer<T>> tiles;  // a worker's

    RowSums(const Asked& problem, int threads)
        : Base(problem, threads), value_rows(Base::M), value_panels(Base::M * round_up(Base::D, PANEL<T>)), tiles(Base::tile_buffers()) {}

    const T* const* find_values() {
        Base::point_at(p.summed(), [](const Block& block) { return block.key; }, value_rows);
        return value_rows;
    }
    void pack_values(const T* centre) { pack_rows<T>(M, D, value_rows, centre, value_panels); }

    // num and den of the whole problem, see AffinitySums. Distances were found once before.
    void find_sums(T* num, T* den) {
        Base::for_units(N, ROW_GRAIN, TILE_ROWS, [&](Range r, int worker) { sum_rows(worker, r, num, den); });
    }

  private:
    void sum_rows(int worker, Range r, T* num, T* den) {
        for (int64_t s = 0; s < S; ++s)
            for (int side = 0; side < p.spec.sides; ++side) {
                const int64_t at = Base::output_row(s, side);
                std::fill(num + (at + r.begin) * D, num + (at + r.end) * D, T(0));
                std::fill(den + at + r.begin, den + at + r.end, T(0));
            }
        T* A = tiles[worker];
        Base::for_tiles(r, {0, Base::cols}, [&](const KeyTile<T>& t) {
            const T* d = Base::distances_again(worker, t);
            for (int64_t s = 0; s < S; ++s) {
                const int64_t at = Base::output_row(s, t.side) + t.row;
                find_logits<T>(t, Base::logit(s), d, A);
                Base::find_affinities(t, s, A, A);
                for (int64_t i = 0; i < t.rows; ++i) den[at + i] += weigh<T>(A + i * t.ld, Base::tile_weights(t), t.cols);
                multiply<T>(t.rows, D, t.cols, A, t.ld, 1, value_panels + t.key * PANEL<T>, M * PANEL<T>, num + at * D, D, true);
            }
        });
    }
};

}  // namespace drift::DRIFT_ISA
