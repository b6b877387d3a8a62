// Phase 1 of form C for groups too large for one block, whose other phases are the forward of affinity_forward.cu.
#include "affinity.cuh"
#include "means.cuh"

namespace drift::cuda {

namespace {

// parts [blocks, 2]: Σ d·w and Σ w of a block's pairs; the weights are counted with the first queries.
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
pair_sums(const __grid_constant__ Affinity<T> p, const __grid_constant__ Cut cut, Known<T> known, double* parts) {
    constexpr int NT = COLUMN_TILES<T>;
    T* stage = shared_as<T>();
    double* sums = reinterpret_cast<double*>(stage + STAGE<T, NT>);
    const Rectangle<T> block(p, cut, known);
    double total = 0, weight = 0;
    for (int64_t b = block.cols.begin; b < block.cols.end; ++b) {
        const Span ys = cut.keys_across(b);
        const T* w = p.w + block.group * p.M + ys.first;
        if (block.row_part == 0 && threadIdx.x < ys.count) weight += w[threadIdx.x];
        for (int64_t a = block.rows.begin; a < block.rows.end; ++a) {
            const Span xs = cut.queries_down(a);
            Tile<T, NT> d;
            find_distances<false>(d, p, block.group, block.x, xs, block.y, ys, stage);
            T of_tile = 0;
            for_pairs<T, NT>(xs, ys, [&](int r, int c, int, int j) { of_tile += d.value[r][c] * w[j]; });
            total += of_tile;
        }
    }
    const double all = sum_over_block(total, sums), all_weight = sum_over_block(weight, sums);
    if (threadIdx.x == 0) parts[2 * int64_t(blockIdx.x)] = all, parts[2 * int64_t(blockIdx.x) + 1] = all_weight;
}

}  // namespace

template <class T> int64_t affinity_scale(const Affinity<T>& p, double* means, double* memory, Device device) {
    constexpr int NT = COLUMN_TILES<T>;
    const OnDevice guard(device);
    const Cut cut(p, COLS<NT>, device);
    const int64_t blocks = p.groups * cut.rectangles();
    Scratch scratch{memory};
    double* sums = scratch.take<double>(2 * blocks);
    T* norms = scratch.take<T>(p.groups * (p.N + p.M));
    if (!memory) return scratch.doubles;
    launch_squared_norms(p, norms, device);
    launch("pair_sums", pair_sums<T>, device, blocks, STAGE<T, NT> * sizeof(T) + WARPS * sizeof(double), p, cut,
           Known<T>{norms, norms + p.groups * p.N, nullptr, nullptr}, sums);
    launch_finish_means(sums, blocks, double(p.groups) * p.N * p.M, double(p.groups) * p.M, means, device);
    return scratch.doubles;
}

template int64_t affinity_scale(const Affinity<float>&, double*, double*, Device);
template int64_t affinity_scale(const Affinity<double>&, double*, double*, Device);

}  // namespace drift::cuda
