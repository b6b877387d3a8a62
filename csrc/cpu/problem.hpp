// One problem of forms A and B or of sums over pairs, prepared for products, and how its pairs are walked: in tiles, nothing of size N×M is kept.
//
// Small problems are spread over the threads whole. A large one is cut into `parts` row ranges × `parts` column ranges, as
// many as its size says, so that no result depends on the number of threads; in phase p unit t works on row range t and column range (t + p) mod parts, so that every row and
// every column has one writer at a time: no locks, no atomics, one fixed order of summation, and whoever is free takes the
// next unit.
//
// Keys are laid out in columns, each array of them padded to whole panels, so that a tile holds keys of one array.
#pragma once
#include <type_traits>

#include "buffer.hpp"
#include "functions.hpp"
#include "parallel.hpp"
#include "tiles.hpp"

namespace drift::DRIFT_ISA {

constexpr int64_t LARGE = int64_t(1) << 19;  // N·M above which one problem is worth all threads
constexpr int64_t ROW_GRAIN = 16;            // row ranges start at multiples of every vector width

struct Range {
    int64_t begin, end;
};
inline Range share(int64_t count, int64_t grain, int64_t part, int64_t parts) {
    const int64_t grains = (count + grain - 1) / grain;
    return {std::min(count, grains * part / parts * grain), std::min(count, grains * (part + 1) / parts * grain)};
}

// An array of keys: columns [col, col + count) hold keys [key, key + count) of all.
struct Block {
    int64_t col, key, count;
    int side;
};

template <class T> struct KeyTile : Tile<T> {
    int64_t array;
    int side;
    int64_t key;     // of the first column, of all keys
    int64_t in_array;  // the same, of its array
};

// Asked: AffinityProblem<T> or PairProblem<T>.
template <class T, class Asked = AffinityProblem<T>> class Problem {
  protected:
    const Asked& p;
    const int threads;
    const int64_t N, M, D, S, parts;
    const int64_t rows;  // N, padded to whole vectors
    int64_t cols = 0;  // of all blocks, padding included
    std::vector<Block> blocks;
    bool one_tile;     // small enough to keep the distances between passes
    int64_t ld;        // of a worker's tile matrices
    int64_t g = 0;     // the problem being worked on
    const T* centre = nullptr;  // of its queries and keys
    Buffer<const T*> query_rows, key_rows;
    Buffer<T> centred, key_panels, query_norms, key_norms;
    Buffer<T> row_stats, col_stats;         // [S, 2, rows], [S, 2, cols]; of pairs, potentials are levels
    Buffer<T> mean;
    std::vector<Buffer<T>> kept_distances;  // a worker's

    Problem(const Asked& problem, int threads)
        : p(problem), threads(threads), N(p.q.count), M(p.M()), D(p.D), S(p.S()),
          parts(parts_of(N * M)), rows(round_up(N, ROW_GRAIN)), blocks(find_blocks()),
          one_tile(parts == 1 && N <= TILE_ROWS && cols <= 2 * TILE_COLS), ld(one_tile ? cols : TILE_COLS), query_rows(N), key_rows(cols),
          centred(N * D), key_panels(cols * D), query_norms(rows), key_norms(cols), row_stats(S * 2 * rows), col_stats(S * 2 * cols),
          mean(D), kept_distances(tile_buffers()) {}

    // A power of two, as many counts are, whose ranges are whole tiles then.
    static int64_t parts_of(int64_t pairs) {
        int64_t parts = pairs >= LARGE ? 8 : 1;
        while (parts > 1 && parts < 64 && pairs >= 4 * parts * parts * 128 * 128) parts *= 2;
        return parts;
    }
    std::vector<Block> find_blocks() {
        std::vector<Block> found;
        int64_t key = 0;
        for (const auto& array : p.keys) {
            const bool last = found.size() + 1 == p.keys.size();
            found.push_back({cols, key, array.count, last ? p.spec.sides - 1 : 0});
            cols += round_up(array.count, PANEL<T>), key += array.count;
        }
        return found;
    }
    std::vector<Buffer<T>> tile_buffers() const {
        std::vector<Buffer<T>> all;
        for (int t = 0; t < threads; ++t) all.emplace_back(TILE_ROWS * ld);
        return all;
    }

    Statistics<T> row_statistics(int64_t s) const { return {row_stats + s * 2 * rows, row_stats + (s * 2 + 1) * rows}; }
    Statistics<T> col_statistics(int64_t s) const { return {col_stats + s * 2 * cols, col_stats + (s * 2 + 1) * cols}; }
    int64_t output_row(int64_t s, int side) const { return ((s * p.groups + g) * p.spec.sides + side) * N; }
    auto logit(int64_t s) const { return p.logit(s, g); }

    // Makes `group` the problem being worked on, its points about one of them.
    void open(int64_t group) {
        g = group;
        std::fill_n(static_cast<const T**>(key_rows), cols, nullptr);
        std::fill_n(static_cast<T*>(key_norms), cols, INF<T>);
        for (int64_t i = 0; i < N; ++i) query_rows[i] = p.q(g, i);
        point_at(p.keys, [&](const Block& block) { return block.col; }, key_rows);
        centre = find_centre<T>(query_rows, N, D, mean);
        parallel(units_of(N, TILE_ROWS), threads, [&](int64_t unit, int) {
            for (int64_t i = unit * TILE_ROWS; i < std::min(N, (unit + 1) * TILE_ROWS); ++i) {
                for (int64_t e = 0; e < D; ++e) centred[i * D + e] = query_rows[i][e] - centre[e];
                query_norms[i] = squared_norm(centred + i * D, D);
            }
        });
        parallel(units_of(cols, TILE_COLS), threads, [&](int64_t unit, int) {
            const int64_t col = unit * TILE_COLS, count = std::min(TILE_COLS, cols - col);
            pack_transposed<T>(count, D, key_rows + col, centre, key_panels + col * D);
            for (const Block& block : blocks)
                for (int64_t j = std::max(col, block.col); j < std::min(col + count, block.col + block.count); j += PANEL<T>)
                    find_panel_norms<T>(key_panels + j * D, D, std::min<int64_t>(PANEL<T>, block.col + block.count - j), key_norms + j);
        });
    }
    static int64_t units_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

    // Where the points of this problem lie, each array's from its place on.
    template <class Place> void point_at(const std::vector<Rows<const T>>& arrays, Place place, const T** out) const {
        for (size_t n = 0; n < arrays.size(); ++n)
            for (int64_t j = 0; j < arrays[n].count; ++j) out[place(blocks[n]) + j] = arrays[n](g, j);
    }
    // The potentials of pairs; 0 where there are none, and in the padding.
    void load_potentials() {
        for (int64_t s = 0; s < S; ++s) {
            T *alpha = row_statistics(s).level, *beta = col_statistics(s).level;
            std::fill_n(alpha, rows, T(0));
            std::fill_n(beta, cols, T(0));
            if (p.alpha) std::copy_n(p.alpha + (s * p.groups + g) * N, N, alpha);
            if (!p.beta) continue;
            for (const Block& block : blocks) std::copy_n(p.beta + (s * p.groups + g) * M + block.key, block.count, beta + block.col);
        }
    }
    // Calls body(tile) for every tile of the ranges, all of a row block before the next.
    template <class Body> void for_tiles(Range r, Range c, Body body) const {
        for (int64_t i = r.begin; i < r.end; i += TILE_ROWS)
            for (size_t n = 0; n < blocks.size(); ++n) {
                const Block& block = blocks[n];
                const int64_t end = std::min(c.end, block.col + block.count);
                for (int64_t j = std::max(c.begin, block.col); j < end; j += TILE_COLS) {
                    const Tile<T> tile{i, std::min(TILE_ROWS, r.end - i), j, std::min(TILE_COLS, end - j), ld};
                    body(KeyTile<T>{tile, int64_t(n), block.side, block.key + j - block.col, j - block.col});
                }
            }
    }

    // Calls body(tile, worker) for all tiles; no two calls at a time share a row or a column. After each phase ends the walk
    // unless go_on().
    template <class Body, class GoOn> bool walk(Body body, GoOn go_on) const {
        const int64_t row_grain = N < parts * TILE_ROWS ? ROW_GRAIN : TILE_ROWS, col_grain = cols < parts * TILE_COLS ? PANEL<T> : TILE_COLS;
        for (int64_t phase = 0; phase < parts; ++phase) {
            parallel(parts, threads, [&](int64_t t, int worker) {
                const Range columns = share(cols, col_grain, (t + phase) % parts, parts);
                for_tiles(share(N, row_grain, t, parts), columns, [&](const KeyTile<T>& tile) { body(tile, worker); });
            });
            if (!go_on()) return false;
        }
        return true;
    }
    template <class Body> void walk(Body body) const {
        walk(body, [] { return true; });
    }

    // Calls body(range, worker) for ranges of rows or columns that start at multiples of the grain, each on one thread; they are
    // so small that there are some for every thread.
    template <class Body> void for_units(int64_t count, int64_t grain, int64_t largest, Body body) const {
        const int64_t size = threads == 1 ? largest : std::clamp(round_up(count / (4 * threads), grain), grain, largest);
        parallel(units_of(count, size), threads,
                 [&](int64_t unit, int worker) { body(Range{unit * size, std::min(count, (unit + 1) * size)}, worker); });
    }

    T* tile_distances(int worker, const KeyTile<T>& t) const { return kept_distances[worker] + (one_tile ? t.col : 0); }
    const T* find_distances(int worker, const KeyTile<T>& t) const {
        T* d = tile_distances(worker, t);
        distances<T>(t, D, {query_rows, centred, query_norms}, {key_rows, key_panels, key_norms}, p.spec.has_self,
                     T(p.spec.least_distance), d);
        if (p.spec.has_self) add_to_self_pairs(t, T(p.self_distance(g)), d);
        return d;
    }
    const T* distances_again(int worker, const KeyTile<T>& t) const {
        return one_tile ? tile_distances(worker, t) : find_distances(worker, t);
    }
    void find_affinities(const KeyTile<T>& t, int64_t s, const T* logits, T* A) const {
        const Statistics<T> of_rows = row_statistics(s).at(t.row), of_cols = col_statistics(s).at(t.col);
        if constexpr (std::is_same_v<Asked, PairProblem<T>>) {
            affinities_of_potentials<T>(t, logits, of_rows.level, of_cols.level, T(p.spec.floor), A);
        } else {
            const bool masked_self = p.spec.has_self && p.spec.self_distance == INF<double>;
            affinities<T>(t, logits, of_rows, of_cols, T(p.spec.floor), masked_self, A);
        }
    }
    const T* tile_weights(const KeyTile<T>& t) const { return p.w ? p.w + g * M + t.key : nullptr; }
};

// Small problems: the next one to whoever is free. Large ones: one after the other, all threads on each.
template <class T, template <class> class Direction, class Asked, class Outputs> void run_all(const Asked& p, const Outputs& out) {
    const int64_t pairs = p.q.count * p.M();
    const int threads = pairs >= LARGE ? 1 : int(std::min<int64_t>(threads_for(p.groups * pairs * p.D, p.threads), p.groups));
    std::vector<Direction<T>> of_worker;
    of_worker.reserve(threads);
    for (int worker = 0; worker < threads; ++worker) of_worker.emplace_back(p, out, pairs >= LARGE ? p.threads : 1);
    parallel(p.groups, threads, [&](int64_t g, int worker) { of_worker[worker].run(g); });
}

}  // namespace drift::DRIFT_ISA
