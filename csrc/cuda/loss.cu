// Form C, the release's training loss, for groups whose pairs fit into shared memory: a block has a group. Nothing but the
// global statistics lives between the phases, and the distances where there is memory for them.
//
//   group_scale     Σ d·w of every group;  finish_means adds them up
//   group_moments   the coefficients c of every R, and mean F_r F_r' with F_r = c_r (t/s), a few dimensions at a time
//   group_gradient  the coefficients of all R together, and their weighted sum of the targets
// Phase 1 of larger groups is pair_sums; the rest of them is forms A and B's forward.
#include "affinity.cuh"

namespace drift::cuda {

namespace {

using Float4 = Tile<float, 4>;
constexpr int GROUP_NT = 5;  // the ablation's 144 targets in one tile of distances
constexpr int MOMENTS_NT = 2;  // 64 dimensions of every R at a time

struct Targets {  // gen, neg, pos of one group
    const float *points[3], *weights[3];
    int count[3];
    int64_t D;

    __device__ Targets(const Loss& p, int64_t g) : D(p.D) {
        for (int kind = 0; kind < 3; ++kind) {
            count[kind] = p.count[kind];
            points[kind] = p.points[kind] + g * p.count[kind] * D;
            weights[kind] = p.weights[kind] + g * p.count[kind];
        }
    }
    __device__ __forceinline__ const float* operator()(int j) const {
        if (j < count[0]) return points[0] + j * D;
        j -= count[0];
        if (j < count[1]) return points[1] + j * D;
        j -= count[1];
        return j < count[2] ? points[2] + j * D : nullptr;
    }
    __device__ __forceinline__ float weight(int j) const {
        if (j < count[0]) return weights[0][j];
        j -= count[0];
        return j < count[1] ? weights[1][j] : weights[2][j - count[1]];
    }
    __device__ Matrix<float> samples() const { return {points[0], count[0], D}; }
};

// Shared memory of a block: a place to stage products, `strips` matrices [64][ld] of which the last holds the distances (its
// predecessors are free while distances are found, and the stage extends into them), statistics.
struct Layout {
    int M, ld, strips, widths;
    __host__ __device__ Layout(const int* counts, int widths, int strips)
        : M(counts[0] + counts[1] + counts[2]), ld((M + 31) / 32 * 32 + 4), strips(strips), widths(widths) {}
    __host__ __device__ int first_strip() const {
        const int others = (strips - 1) * ROWS * ld, least = CHUNK<float> * VALUES_LD<float, 4>;
        return others + least < STAGE<float, GROUP_NT> ? STAGE<float, GROUP_NT> - others : least;
    }
    __host__ __device__ int statistics() const { return first_strip() + strips * ROWS * ld; }
    __host__ __device__ int size() const { return statistics() + ROWS + COLS<GROUP_NT> + (2 + widths) * ROWS + (1 + widths) * M + 32; }
};

__device__ __forceinline__ float sum_over_warp(float x) { return sum_over_col(sum_over_row(x)); }
__device__ __forceinline__ double sum_over_warp(double x) { return sum_over_col(sum_over_row(x)); }
__device__ __forceinline__ float min_over_warp(float x) {
    for (int lanes = 1; lanes < 32; lanes *= 2) x = fminf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
    return x;
}

// Σ of all threads' x, known to thread 0; `shared` has a double for every warp.
__device__ __forceinline__ double sum_over_block(double x, double* shared) {
    x = sum_over_warp(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    if (threadIdx.x != 0) return 0;
    for (int w = 1; w < THREADS / 32; ++w) x += shared[w];
    return x;
}

// Calls store(i, j, d_ij) for all pairs of samples and targets. The points are taken relative to a positive; pairs too close
// for products are worked out from differences, with their tile. `norms` has ROWS + COLS floats of shared memory.
template <class Store> __device__ __forceinline__ void find_distances(const Loss& p, const Targets& targets, float* stage, float* norms, Store store) {
    constexpr int NT = GROUP_NT;
    const int M = targets.count[0] + targets.count[1] + targets.count[2];
    const float* centre = targets.points[2];
    for (int first = 0; first < M; first += COLS<NT>) {
        Tile<float, NT> d;
        const Span xs{0, targets.count[0], 0}, ys{first, M - first < COLS<NT> ? M - first : COLS<NT>, 0};
        for (bool by_differences = p.D <= DIFFERENCES_UP_TO;; by_differences = true) {
            RowNorms<2> x_norms;
            RowNorms<NT> y_norms;
            product_of_rows(d, targets.samples(), targets, first, p.D, centre, by_differences, p.split_products, stage,
                            [&](const auto& x, const auto& y) { x_norms.add(x), y_norms.add(y); });
            if (by_differences) break;
            x_norms.put(norms), y_norms.put(norms + ROWS);
            __syncthreads();
            bool close = false;
            for_pairs<float, NT>(xs, ys, [&](int r, int c, int i, int j) {
                const float both = norms[i] + norms[ROWS + j], square = both - 2 * d.value[r][c];
                close |= square < both * float(CLOSE) && i != first + j;
                d.value[r][c] = square;
            });
            if (!__syncthreads_or(close)) break;
        }
        constexpr float LEAST = float(LEAST_LOSS_DISTANCE);
        for_pairs<float, NT>(xs, ys, [&](int r, int c, int i, int j) {
            const float distance = std::sqrt(d.value[r][c]);
            store(i, first + j, i == first + j || distance < LEAST ? LEAST : distance);
        });
    }
}

// parts [G, 2]: Σ d·w and Σ w of every group.
__global__ void __launch_bounds__(THREADS, 1) group_scale(const __grid_constant__ Loss p, double* parts) {
    float *stage = shared_as<float>(), *norms = stage + STAGE<float, GROUP_NT>;
    double* sums = reinterpret_cast<double*>(norms + ROWS + COLS<GROUP_NT>);
    const Targets targets(p, blockIdx.x);
    float total = 0, weight = 0;
    const int M = targets.count[0] + targets.count[1] + targets.count[2];
    float* kept = p.kept ? p.kept + int64_t(blockIdx.x) * p.count[0] * M : nullptr;
    find_distances(p, targets, stage, norms, [&](int i, int j, float d) {
        total += d * targets.weight(j);
        if (kept) kept[i * M + j] = d;
    });
    for (int j = threadIdx.x; j < M; j += THREADS) weight += targets.weight(j);
    const double all = sum_over_block(total, sums), all_weight = sum_over_block(weight, sums);
    if (threadIdx.x == 0) parts[2 * int64_t(blockIdx.x)] = all, parts[2 * int64_t(blockIdx.x) + 1] = all_weight;
}

// As group_scale, for blocks that walk a range of queries × a range of keys; weights are counted with the first queries.
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
pair_sums(const __grid_constant__ Affinity<T> p, const __grid_constant__ Cut<T> cut, Known<T> known, double* parts) {
    constexpr int NT = COLUMN_TILES<T>;
    T* stage = shared_as<T>();
    double* sums = reinterpret_cast<double*>(stage + STAGE<T, NT>);
    const int64_t g = blockIdx.x / (cut.row_parts * cut.col_parts);
    const int part = blockIdx.x % (cut.row_parts * cut.col_parts), row_part = part / cut.col_parts, col_part = part % cut.col_parts;
    const Axis<T> x = queries(p, known, g), y = keys(p, known, g);
    const Range rows = Range{0, cut.queries_down.count()}.part(row_part, cut.row_parts);
    const Range cols = Range{0, cut.keys_across.count()}.part(col_part, cut.col_parts);
    double total = 0, weight = 0;
    for (int64_t b = cols.begin; b < cols.end; ++b) {
        const Span ys = cut.keys_across(b);
        const T* w = p.w + g * p.M + ys.first;
        if (row_part == 0 && threadIdx.x < ys.count) weight += w[threadIdx.x];
        for (int64_t a = rows.begin; a < rows.end; ++a) {
            const Span xs = cut.queries_down(a);
            Tile<T, NT> d;
            find_distances(d, p, x, xs, y, ys, stage);
            T of_tile = 0;
            for_pairs<T, NT>(xs, ys, [&](int r, int c, int, int j) { of_tile += d.value[r][c] * w[j]; });
            total += of_tile;
        }
    }
    const double all = sum_over_block(total, sums), all_weight = sum_over_block(weight, sums);
    if (threadIdx.x == 0) parts[2 * int64_t(blockIdx.x)] = all, parts[2 * int64_t(blockIdx.x) + 1] = all_weight;
}

// means[n] = Σ_part parts[part, n] / counts of n; one block.
__global__ void __launch_bounds__(THREADS) finish_means(const double* parts, int64_t count, double pairs, double targets, double* means) {
    double* shared = shared_as<double>();
    double sum[2] = {};
    for (int64_t n = threadIdx.x; n < count; n += THREADS) sum[0] += parts[2 * n], sum[1] += parts[2 * n + 1];
    const double total = sum_over_block(sum[0], shared), weight = sum_over_block(sum[1], shared);
    if (threadIdx.x == 0) means[0] = total / pairs, means[1] = weight / targets;
}

// The coefficients c of a group. δ·scale is the distance, with 100 scales on the self pairs; the maximum of a row's logits is at
// its least δ whatever R, so one minimum a row and a column serves every R.
struct Coefficients {
    static constexpr int R = MAX_LOSS_WIDTHS;
    const Loss& p;
    const Targets& targets;
    const Layout layout;
    const float *d, kernel_scale, inverse_unit, least;
    float *row_min, *row_total, *row_factor, *col_min, *col_factor;  // [64], [64], [R, 64], [M], [R, M]
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, N, M;

    __device__ Coefficients(const Loss& p, const Targets& targets, const Layout& layout, float* shared)
        : p(p), targets(targets), layout(layout), d(shared + layout.first_strip() + (layout.strips - 1) * ROWS * layout.ld),
          kernel_scale(fmaxf(float(*p.scale), float(LEAST_SCALE))),
          inverse_unit(1 / fmaxf(float(*p.scale / std::sqrt(double(p.D))), float(LEAST_SCALE))), least(std::sqrt(float(p.floor))),
          row_min(shared + layout.statistics() + ROWS + COLS<GROUP_NT>), row_total(row_min + ROWS), row_factor(row_total + ROWS),
          col_min(row_factor + layout.widths * ROWS), col_factor(col_min + layout.M), N(p.count[0]), M(layout.M) {}

    __device__ __forceinline__ float distance(int i, int j) const {
        return d[i * layout.ld + j] + (i == j ? float(LOSS_SELF_DISTANCE) * kernel_scale : 0.0f);
    }
    // Calls body(r, width) for all r < R, the last widths again and again where there are fewer: without branches, the work on
    // one does not wait for that on another.
    template <class Body> __device__ __forceinline__ void for_widths(Body body) const {
#pragma unroll
        for (int r = 0; r < R; ++r) body(r, r < p.widths ? r : p.widths - 1);
    }
    static __device__ __forceinline__ void add_exponentials(float (&sum)[R], float difference, const float (&rate)[R]) {
#pragma unroll
        for (int r = 0; r < R; ++r) sum[r] += std::exp(difference * rate[r]);
    }

    // After this and a __syncthreads, all but `d` is known.
    __device__ void find_statistics() const {
        float rate[R];
        for_widths([&](int r, int width) { rate[r] = 1 / (float(p.R[width]) * kernel_scale); });
        for (int i = warp; i < N; i += THREADS / 32) {
            float min = INF<float>, total = 0, sum[R] = {};
            for (int j = lane; j < M; j += 32) min = fminf(min, distance(i, j)), total += d[i * layout.ld + j];
            min = min_over_warp(min), total = sum_over_warp(total);
            for (int j = lane; j < M; j += 32) add_exponentials(sum, min - distance(i, j), rate);
            for_widths([&](int r, int width) { row_factor[width * ROWS + i] = 1 / std::sqrt(sum_over_warp(sum[r])); });
            row_min[i] = min, row_total[i] = total;  // all lanes agree
        }
        for (int j = threadIdx.x; j < M; j += THREADS) {
            float min = INF<float>, sum[R] = {};
            for (int i = 0; i < N; ++i) min = fminf(min, distance(i, j));
            for (int i = 0; i < N; ++i) add_exponentials(sum, min - distance(i, j), rate);
            for_widths([&](int r, int width) { col_factor[width * M + j] = 1 / std::sqrt(sum[r]); });
            col_min[j] = min;
        }
    }

    // The sample nearest to all targets together: an origin that a few far outliers do not move away from the rest.
    __device__ const float* medoid() const {
        int best = 0;
        float least_total = row_total[0];
        for (int i = 1; i < N; ++i) {
            const float total = row_total[i];
            if (total < least_total) best = i, least_total = total;
        }
        return targets.points[0] + best * p.D;
    }

    // w_j A_ij of every R.
    __device__ __forceinline__ void weighted_affinities(float (&A)[R], int i, int j, const float (&rate)[R]) const {
        const float difference = (row_min[i] + col_min[j]) * 0.5f - distance(i, j), weight = targets.weight(j);
        for_widths([&](int r, int width) {
            const float value = std::exp(difference * rate[r]) * (row_factor[width * ROWS + i] * col_factor[width * M + j]);
            A[r] = (value < least ? least : value) * weight;
        });
    }

    // Calls body(i, j, c_ij / s of every R) for all pairs; a warp has a row, and a pair's distance is not read after its call.
    template <class Body> __device__ __forceinline__ void for_pairs(Body body) const {
        const int split = p.count[0] + p.count[1];
        float rate[R], A[R];
        for_widths([&](int r, int width) { rate[r] = 1 / (float(p.R[width]) * kernel_scale); });
        for (int i = warp; i < N; i += THREADS / 32) {
            float negative[R] = {}, positive[R] = {};
            for (int j = lane; j < M; j += 32) {
                weighted_affinities(A, i, j, rate);
#pragma unroll
                for (int r = 0; r < R; ++r) negative[r] += j < split ? A[r] : 0, positive[r] += j < split ? 0 : A[r];
            }
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const float of_negatives = -sum_over_warp(positive[r]) * inverse_unit;
                positive[r] = sum_over_warp(negative[r]) * inverse_unit, negative[r] = of_negatives;
            }
            for (int j = lane; j < M; j += 32) {
                weighted_affinities(A, i, j, rate);
#pragma unroll
                for (int r = 0; r < R; ++r) A[r] *= j < split ? negative[r] : positive[r];
                body(i, j, A);
            }
        }
    }
};

// Distances into the last strip, and the statistics. Afterwards the strips before it are zero.
__device__ __forceinline__ void prepare(const Loss& p, const Targets& targets, const Layout& layout, float* shared, const Coefficients& c) {
    float* strips = shared + layout.first_strip();
    float* d = strips + (layout.strips - 1) * ROWS * layout.ld;
    for (int n = threadIdx.x; n < ROWS * layout.ld; n += THREADS) d[n] = 0;  // beyond the pairs, too
    __syncthreads();
    if (p.kept) {
        const int N = p.count[0], M = layout.M;
        const float* kept = p.kept + int64_t(blockIdx.x) * N * M;
        for (int i = threadIdx.x / 32; i < N; i += THREADS / 32)
            for (int j = threadIdx.x % 32; j < M; j += 32) d[i * layout.ld + j] = kept[i * M + j];
    } else {
        find_distances(p, targets, shared, shared + layout.statistics(), [&](int i, int j, float distance) { d[i * layout.ld + j] = distance; });
    }
    __syncthreads();
    c.find_statistics();
    for (int n = threadIdx.x; n < (layout.strips - 1) * ROWS * layout.ld; n += THREADS) strips[n] = 0;
    __syncthreads();
}

// moments [G, R, R] = mean_{i, dim} F_r F_r'.
__global__ void __launch_bounds__(THREADS, 1) group_moments(const __grid_constant__ Loss p, float* moments) {
    constexpr int R = MAX_LOSS_WIDTHS;
    const Layout layout(p.count, p.widths, p.widths);
    const Targets targets(p, blockIdx.x);
    float *shared = shared_as<float>(), *strips = shared + layout.first_strip();
    const Coefficients c(p, targets, layout, shared);
    prepare(p, targets, layout, shared, c);
    c.for_pairs([&](int i, int j, const float(&of_pair)[R]) {  // those of the last R in place of the distances
#pragma unroll
        for (int r = 0; r < R; ++r)
            if (r < p.widths) strips[(r * ROWS + i) * layout.ld + j] = of_pair[r];
    });
    const float* centre = c.medoid();
    float products[R][R] = {};
    for (int64_t at = 0; at < p.D; at += COLS<MOMENTS_NT>) {
        Tile<float, MOMENTS_NT> F[R];
#pragma unroll
        for (int r = 0; r < R; ++r) F[r].clear();
        product_with_strips<float, MOMENTS_NT, R>(F, p.widths, strips, ROWS * layout.ld, layout.ld, targets, layout.M, at, p.D, centre,
                                                  p.split_products, shared);
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int other = 0; other <= r; ++other)
#pragma unroll
                for (int n = 0; n < 4 * 2 * MOMENTS_NT; ++n)
                    products[r][other] += F[r].value[n % 4][n / 4] * F[other].value[n % 4][n / 4];
    }
    double* sums = reinterpret_cast<double*>(shared);
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
        for (int other = 0; other <= r; ++other) {
            if (r >= p.widths) break;
            const float mean = float(sum_over_block(products[r][other], sums) / (double(p.count[0]) * double(p.D)));
            float* of_group = moments + int64_t(blockIdx.x) * p.widths * p.widths;
            if (threadIdx.x == 0) of_group[r * p.widths + other] = of_group[other * p.widths + r] = mean;
        }
}

// grad [G, N, D] = −2·incoming[g]·Σ_r factors[r]·F_r / (N·D·s).
__global__ void __launch_bounds__(THREADS, 1) group_gradient(const __grid_constant__ Loss p, const double* factors, const float* incoming, float* grad) {
    const Layout layout(p.count, p.widths, 2);
    const Targets targets(p, blockIdx.x);
    float *shared = shared_as<float>(), *strip = shared + layout.first_strip();
    const Coefficients c(p, targets, layout, shared);
    prepare(p, targets, layout, shared, c);
    const int N = p.count[0];
    float factor[Coefficients::R];
    for (int r = 0; r < Coefficients::R; ++r) factor[r] = r < p.widths ? float(factors[r]) : 0;
    c.for_pairs([&](int i, int j, const float(&of_pair)[Coefficients::R]) {
        float sum = 0;
        for (int r = 0; r < Coefficients::R; ++r) sum += of_pair[r] * factor[r];
        strip[i * layout.ld + j] = sum;
    });
    const float* centre = c.medoid();
    const float by = -2 * incoming[blockIdx.x] * c.inverse_unit / (float(N) * float(p.D));
    float* out = grad + int64_t(blockIdx.x) * N * p.D;
    for (int64_t at = 0; at < p.D; at += COLS<4>) {
        Float4 F[1];
        F[0].clear();
        product_with_strips<float, 4, 1>(F, 1, strip, 0, layout.ld, targets, layout.M, at, p.D, centre, p.split_products, shared);
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int col = 0; col < 8; ++col) F[0].value[r][col] *= by;
        add_tile(out, F[0], N, at, p.D, true);
    }
}

size_t bytes(const int* counts, int widths, int strips) { return Layout(counts, widths, strips).size() * sizeof(float); }

void launch_finish_means(const double* parts, int64_t count, double groups, double N, double M, double* means, Device device) {
    launch("finish_means", finish_means, device, 1, THREADS / 32 * sizeof(double), parts, count, groups * N * M, groups * M, means);
}

}  // namespace

bool group_fits(const int* counts, int widths, Device device) {
    if (counts[0] > MAX_LOSS_SAMPLES || widths > MAX_LOSS_WIDTHS) return false;
    return bytes(counts, widths, std::max(2, widths)) <= size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
}

void loss_scale(const Loss& p, double* means, double* scratch, Device device) {
    const OnDevice guard(device);
    const size_t shared = (STAGE<float, GROUP_NT> + ROWS + COLS<GROUP_NT>)*sizeof(float) + THREADS / 32 * sizeof(double);
    launch("group_scale", group_scale, device, p.groups, shared, p, scratch);
    launch_finish_means(scratch, p.groups, p.groups, p.count[0], p.count[0] + p.count[1] + p.count[2], means, device);
}

void loss_moments(const Loss& p, float* moments, Device device) {
    const OnDevice guard(device);
    launch("group_moments", group_moments, device, p.groups, bytes(p.count, p.widths, p.widths), p, moments);
}

void loss_gradient(const Loss& p, const double* factors, const float* incoming, float* grad, Device device) {
    const OnDevice guard(device);
    launch("group_gradient", group_gradient, device, p.groups, bytes(p.count, p.widths, 2), p, factors, incoming, grad);
}

template <class T> int64_t scale_scratch(const Affinity<T>& p, Device device) {
    const OnDevice guard(device);
    const Cut<T> cut(p, device);
    return 2 * p.groups * cut.row_parts * cut.col_parts + p.groups * (p.N + p.M);  // the norms are no wider than doubles
}

template <class T> void scale(const Affinity<T>& p, double* means, double* scratch, Device device) {
    const OnDevice guard(device);
    const Cut<T> cut(p, device);
    const int64_t blocks = p.groups * cut.row_parts * cut.col_parts;
    T* norms = reinterpret_cast<T*>(scratch + 2 * blocks);
    launch_squared_norms(p, norms, device);
    launch("pair_sums", pair_sums<T>, device, blocks, STAGE<T, COLUMN_TILES<T>> * sizeof(T) + THREADS / 32 * sizeof(double), p, cut,
           Known<T>{norms, norms + p.groups * p.N, nullptr, nullptr}, scratch);
    launch_finish_means(scratch, blocks, double(p.groups), double(p.N), double(p.M), means, device);
}

template int64_t scale_scratch(const Affinity<float>&, Device);
template int64_t scale_scratch(const Affinity<double>&, Device);
template void scale(const Affinity<float>&, double*, double*, Device);
template void scale(const Affinity<double>&, double*, double*, Device);

}  // namespace drift::cuda
