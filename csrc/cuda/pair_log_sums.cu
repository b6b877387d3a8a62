// Log-sum-exps over one axis of L − potential.
//
//   squared_norms      of all points
//   find_log_sums      a block has 64 queries and walks the keys, or a part of them; or has 64 keys and walks the queries
//   finish_log_sums    the parts together
#include "statistics.cuh"

namespace drift::cuda {

namespace {

// sums [parts, S, G, 2, owners]: maxima and sums of exponentials. The potential [S, G, others] may be null for 0.
template <class T, bool KEYS>
__global__ void __launch_bounds__(THREADS, 1)
find_log_sums(const __grid_constant__ Affinity<T> p, const __grid_constant__ Cut cut, Known<T> known, const T* potential, int parts, T* sums) {
    constexpr int NT = COLUMN_TILES<T>;
    T* stage = shared_as<T>();
    auto& found = *reinterpret_cast<TileStatistics<T, NT>*>(stage + STAGE<T, NT>);
    const Spans down = KEYS ? cut.keys_down : cut.queries_down, across = KEYS ? cut.queries_across : cut.keys_across;
    const int64_t spans = down.count(), part = blockIdx.x / spans % parts, g = blockIdx.x / (spans * parts);
    const Axis<T> x = KEYS ? keys(p, known, g) : queries(p, known, g), y = KEYS ? queries(p, known, g) : keys(p, known, g);
    const Span xs = down(blockIdx.x % spans);
    const Range cols = Range{0, across.count()}.part(part, parts);
    const int thread = threadIdx.x;
    for (int64_t b = cols.begin; b < cols.end; ++b) {
        const Span ys = across(b);
        Tile<T, NT> d;
        find_distances<true>(d, p, g, x, xs, y, ys, stage);
        for (int s = 0; s < p.widths; ++s) {
            const int64_t problem = s * p.groups + g;
            const T* of_others = potential ? potential + problem * y.count + ys.first : nullptr;
            const auto logit_of = logit<true>(p, s, g);
            Tile<T, NT> logits;
            logits.fill(-INF<T>);
            for_pairs<T, NT>(xs, ys, [&](int r, int c, int, int j) {
                logits.value[r][c] = logit_of.at(d.value[r][c]) - (of_others ? of_others[j] : T(0));
            });
            found.put_rows(logits);
            __syncthreads();
            if (thread < xs.count) {
                T* at = sums + ((part * p.widths * p.groups + problem) * 2 * x.count + xs.first + thread);
                T max = b == cols.begin ? -INF<T> : at[0], sum = b == cols.begin ? T(0) : at[x.count];
                found.add_row(thread, max, sum);
                at[0] = max, at[x.count] = sum;
            }
            __syncthreads();
        }
    }
}

// out [problems, count] of sums [parts, problems, 2, count].
template <class T>
__global__ void __launch_bounds__(THREADS) finish_log_sums(int64_t problems, int64_t count, const T* sums, int parts, T* out) {
    const int64_t n = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (n >= problems * count) return;
    const int64_t at = n + n / count * count;
    T max = -INF<T>, sum = 0;
    for (int part = 0; part < parts; ++part, sums += problems * 2 * count) merge(max, sum, sums[at], sums[at + count]);
    out[n] = max + std::log(sum);
}

}  // namespace

template <class T>
int64_t pair_log_sums(const Affinity<T>& p, const T* potential, bool by_row, T* out, double* memory, Device device) {
    constexpr int NT = COLUMN_TILES<T>;
    const OnDevice guard(device);
    const Cut cut(p, COLS<NT>, device);
    const int64_t problems = p.widths * p.groups, owners = by_row ? p.N : p.M;
    const int parts = by_row ? cut.gradient_key_parts : cut.query_parts;
    Scratch scratch{memory};
    T *norms = scratch.take<T>(p.groups * (p.N + p.M)), *sums = scratch.take<T>(parts * problems * 2 * owners);
    if (!memory) return scratch.doubles;
    const Known<T> known{norms, norms + p.groups * p.N, nullptr, nullptr};
    launch_squared_norms(p, norms, device);
    launch("find_log_sums", by_row ? find_log_sums<T, false> : find_log_sums<T, true>, device,
           p.groups * parts * (by_row ? cut.queries_down : cut.keys_down).count(), STAGE<T, NT> * sizeof(T) + sizeof(TileStatistics<T, NT>), p,
           cut, known, potential, parts, sums);
    launch("finish_log_sums", finish_log_sums<T>, device, ceil_div(problems * owners, THREADS), 0, problems, owners, sums, parts, out);
    return scratch.doubles;
}

template int64_t pair_log_sums(const Affinity<float>&, const float*, bool, float*, double*, Device);
template int64_t pair_log_sums(const Affinity<double>&, const double*, bool, double*, double*, Device);

}  // namespace drift::cuda
