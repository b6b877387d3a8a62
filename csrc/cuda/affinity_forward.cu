// Forms A and B: softmax statistics, then weighted sums. Nothing of size N×M is kept; the distances are found in both passes.
//
//   squared_norms      of all points
//   find_statistics    a block walks a range of queries × a range of keys and leaves partial statistics of both
//   finish_statistics  the parts together
//   weighted_sums      a block has 64 queries and walks the keys of one side, or a part of them
//   sum_parts          where the keys were cut into parts
#include "statistics.cuh"

namespace drift::cuda {

namespace {

// row_parts [col_parts, S, G, 2, N] and col_parts [row_parts, S, G, 2, M].
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
find_statistics(const __grid_constant__ Affinity<T> p, const __grid_constant__ Cut cut, Known<T> known, T* row_parts, T* col_parts) {
    constexpr int NT = COLUMN_TILES<T>;
    T* stage = shared_as<T>();
    auto& found = *reinterpret_cast<TileStatistics<T, NT>*>(stage + STAGE<T, NT>);
    const Rectangle<T> block(p, cut, known);
    const int thread = threadIdx.x;

    auto add = [&](T* parts, int64_t count, int64_t n, bool first, auto add_found) {
        T max = first ? -INF<T> : parts[n], sum = first ? T(0) : parts[count + n];
        add_found(max, sum);
        parts[n] = max, parts[count + n] = sum;
    };
    for (int64_t a = block.rows.begin; a < block.rows.end; ++a)
        for (int64_t b = block.cols.begin; b < block.cols.end; ++b) {
            const Span xs = cut.queries_down(a), ys = cut.keys_across(b);
            Tile<T, NT> d;
            find_distances<false>(d, p, block.group, block.x, xs, block.y, ys, stage);
            for (int s = 0; s < p.widths; ++s) {
                const Logit<T> logit_of = logit<false>(p, s, block.group);
                Tile<T, NT> logits;
                logits.fill(-INF<T>);
                for_pairs<T, NT>(xs, ys, [&](int r, int c, int, int) { logits.value[r][c] = logit_of.at(d.value[r][c]); });
                found.put_rows(logits), found.put_cols(logits);
                __syncthreads();
                const int64_t rows_at = (block.col_part * p.widths + s) * p.groups + block.group;
                const int64_t cols_at = (block.row_part * p.widths + s) * p.groups + block.group;
                if (thread < xs.count)
                    add(row_parts + rows_at * 2 * p.N, p.N, xs.first + thread, b == block.cols.begin,
                        [&](T& max, T& sum) { found.add_row(thread, max, sum); });
                else if (thread >= ROWS && thread - ROWS < ys.count)
                    add(col_parts + cols_at * 2 * p.M, p.M, ys.first + thread - ROWS, a == block.rows.begin,
                        [&](T& max, T& sum) { found.add_col(thread - ROWS, max, sum); });
                __syncthreads();
            }
        }
}

// stats [problems, 2, count] of parts [parts, problems, 2, count], for both axes.
template <class T>
__global__ void __launch_bounds__(THREADS) finish_statistics(int64_t problems, int64_t N, int64_t M, const T* row_parts, int of_rows,
                                                             const T* col_parts, int of_cols, T* row_stats, T* col_stats) {
    int64_t n = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (n >= problems * (N + M)) return;
    const bool is_row = n < problems * N;
    if (!is_row) n -= problems * N;
    const int64_t count = is_row ? N : M, at = n + n / count * count;
    const T* parts = is_row ? row_parts : col_parts;
    T max = -INF<T>, sum = 0;
    for (int part = 0; part < (is_row ? of_rows : of_cols); ++part, parts += problems * 2 * count)
        merge(max, sum, parts[at], parts[at + count]);
    drift::finish_statistics<T>(max, sum);
    T* stats = is_row ? row_stats : col_stats;
    stats[at] = max, stats[at + count] = sum;
}

// num [key_parts, S, G, sides, N, D] and den [key_parts, S, G, sides, N].
template <class T, bool PAIRS>
__global__ void __launch_bounds__(THREADS, 1)
weighted_sums(const __grid_constant__ Affinity<T> p, const __grid_constant__ Cut cut, Known<T> known, T* num, T* den) {
    constexpr int NT = COLUMN_TILES<T>;
    T *stage = shared_as<T>(), *strip = stage + STAGE<T, NT>, *row_sums = strip + ROWS * STRIP_LD<T, NT>;
    const int64_t down = cut.queries_down.count();
    const int64_t ranges = int64_t(p.sides) * cut.key_parts, range = blockIdx.x / down % ranges, g = blockIdx.x / (down * ranges);
    const int side = int(range / cut.key_parts), part = int(range % cut.key_parts);
    const Axis<T> x = queries(p, known, g), y = keys(p, known, g);
    const Span xs = cut.queries_down(blockIdx.x % down);
    const Range cols = side_range(cut.keys_across, side, p.sides).part(part, cut.key_parts);
    for (int64_t b = cols.begin; b < cols.end; ++b) {
        const Span ys = cut.keys_across(b);
        const T *v = p.v + (g * p.M + ys.first) * p.D, *w = p.w ? p.w + g * p.M + ys.first : nullptr;
        Tile<T, NT> d;
        find_distances<PAIRS>(d, p, g, x, xs, y, ys, stage);
        for (int s = 0; s < p.widths; ++s) {
            const auto logit_of = logit<PAIRS>(p, s, g);
            const Affinities<PAIRS, T> affinity(p, x, xs, y, ys, s);
            Tile<T, NT> A;
            T mine[4] = {};
            A.fill(0);
            for_pairs<T, NT>(xs, ys, [&](int r, int c, int i, int j) {
                A.value[r][c] = affinity(i, j, logit_of.at(d.value[r][c])) * (w ? w[j] : T(1));
                mine[r] += A.value[r][c];
            });
            __syncthreads();  // everyone is done with the strip
            put_strip(strip, A);
            put_row_sums<T, NT>(mine, row_sums);
            __syncthreads();
            const int64_t at = (((int64_t(part) * p.widths + s) * p.groups + g) * p.sides + side) * p.N + xs.first;
            if (threadIdx.x < xs.count) {
                const T sum = total_of_row(row_sums, threadIdx.x);
                den[at + threadIdx.x] = b == cols.begin ? sum : den[at + threadIdx.x] + sum;
            }
            add_product<T, NT>(num + at * p.D, xs.count, strip, Matrix<T>{v, ys.count, p.D}, b == cols.begin, p.split_products, stage);
        }
    }
}

template <class T, bool PAIRS>
void launch_weighted_sums(const Affinity<T>& p, const Cut& cut, const Known<T>& known, const Parts<T>& num, const Parts<T>& den, Device device) {
    constexpr int NT = COLUMN_TILES<T>;
    launch("weighted_sums", weighted_sums<T, PAIRS>, device, p.groups * p.sides * cut.key_parts * cut.queries_down.count(),
           (STAGE<T, NT> + ROWS * STRIP_LD<T, NT> + 4 * ROWS) * sizeof(T), p, cut, known, num.parts, den.parts);
    num.sum(device), den.sum(device);
}

}  // namespace

template <class T> int64_t affinity_forward(const Affinity<T>& p, const Sums<T>& out, double* memory, Device device) {
    constexpr int NT = COLUMN_TILES<T>;
    const OnDevice guard(device);
    const Cut cut(p, COLS<NT>, device);
    const int64_t problems = p.widths * p.groups, outputs = problems * p.sides * p.N;
    Scratch scratch{memory};
    T *norms = scratch.take<T>(p.groups * (p.N + p.M));
    T *row_parts = scratch.take<T>(cut.col_parts * problems * 2 * p.N), *col_parts = scratch.take<T>(cut.row_parts * problems * 2 * p.M);
    const Parts<T> num(scratch, out.num, cut.key_parts, outputs * p.D), den(scratch, out.den, cut.key_parts, outputs);
    if (!memory) return scratch.doubles;
    const Known<T> known{norms, norms + p.groups * p.N, out.row_stats, out.col_stats};
    launch_squared_norms(p, norms, device);
    launch("find_statistics", find_statistics<T>, device, p.groups * cut.rectangles(), STAGE<T, NT> * sizeof(T) + sizeof(TileStatistics<T, NT>),
           p, cut, known, row_parts, col_parts);
    launch("finish_statistics", finish_statistics<T>, device, ceil_div(problems * (p.N + p.M), THREADS), 0, problems, p.N, p.M, row_parts,
           cut.col_parts, col_parts, cut.row_parts, out.row_stats, out.col_stats);
    launch_weighted_sums<T, false>(p, cut, known, num, den, device);
    return scratch.doubles;
}

template <class T> int64_t pair_weighted_sums(const Affinity<T>& p, const Sums<T>& io, double* memory, Device device) {
    const OnDevice guard(device);
    const Cut cut(p, COLS<COLUMN_TILES<T>>, device);
    const int64_t outputs = p.widths * p.groups * p.sides * p.N;
    Scratch scratch{memory};
    T* norms = scratch.take<T>(p.groups * (p.N + p.M));
    const Parts<T> num(scratch, io.num, cut.key_parts, outputs * p.D), den(scratch, io.den, cut.key_parts, outputs);
    if (!memory) return scratch.doubles;
    launch_squared_norms(p, norms, device);
    launch_weighted_sums<T, true>(p, cut, {norms, norms + p.groups * p.N, io.row_stats, io.col_stats}, num, den, device);
    return scratch.doubles;
}

template int64_t affinity_forward(const Affinity<float>&, const Sums<float>&, double*, Device);
template int64_t affinity_forward(const Affinity<double>&, const Sums<double>&, double*, Device);
template int64_t pair_weighted_sums(const Affinity<float>&, const Sums<float>&, double*, Device);
template int64_t pair_weighted_sums(const Affinity<double>&, const Sums<double>&, double*, Device);

}  // namespace drift::cuda
