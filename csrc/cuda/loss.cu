// Form C, the release's training loss, for groups whose pairs fit into shared memory: a block has a group, or where there are
// few groups a part of one's dimensions. Nothing but the global statistics lives between the phases, and the distances where
// there is memory for them.
//
//   group_scale     Σ d·w of every group;  finish_means adds them up
//   group_squares, scale_of_squares   the same in parts: squared distances in some dimensions, and their sums
//   group_moments   the coefficients c of every R, and mean F_r F_r' with F_r = c_r (t/s), a few dimensions at a time
//   sum_parts       where they were found in parts
//   group_gradient  the coefficients of all R together, and their weighted sum of the targets
// Phase 1 of larger groups is pair_sums; the rest of them is forms A and B's forward.
#include "affinity.cuh"

namespace drift::cuda {

namespace {

using Float4 = Tile<float, 4>;
constexpr int GROUP_NT = 5;  // the ablation's 144 targets in one tile of distances
template <int R> constexpr int MOMENTS_NT = R < 4 ? 4 : 2;  // 32 times as many dimensions of every R at a time
constexpr int DIMS = 128, LEAST_DIMS = 2 * DIMS;  // where blocks share a group, each has a multiple of 128 dimensions, and 256 or more

// A block's group and its range of dimensions, where `parts` blocks share a group.
struct Share {
    int64_t group, part;
    Range dims;
    __device__ Share(const Loss& p, int parts) : group(blockIdx.x / parts), part(blockIdx.x % parts) {
        const Range blocks = Range{0, (p.D + DIMS - 1) / DIMS}.part(part, parts);
        dims = {blocks.begin * DIMS, std::min(blocks.end * DIMS, p.D)};
    }
};

// gen, neg, pos of one group. Where each point lies, and its weight, is in shared memory.
struct Targets {
    const float *gen, *pos;
    int64_t *offset, D;  // of a point from gen, in bytes
    float* weight;
    int N, total;
    bool vectors;
    static __host__ __device__ int size(int total) { return 3 * total; }  // floats of shared memory

    __device__ Targets(const Loss& p, int64_t g, float* shared)
        : gen(p.points[0] + g * p.count[0] * p.D), pos(p.points[2] + g * p.count[2] * p.D), offset(reinterpret_cast<int64_t*>(shared)),
          D(p.D), N(p.count[0]), total(p.count[0] + p.count[1] + p.count[2]), vectors(D % VECTOR<float> == 0) {
        weight = shared + 2 * total;
        for (int kind = 0, first = 0; kind < 3; first += p.count[kind], ++kind) {
            const float* points = p.points[kind] + g * p.count[kind] * D;
            vectors &= aligned(points);
            for (int j = threadIdx.x; j < p.count[kind]; j += THREADS) {
                offset[first + j] = int64_t(reinterpret_cast<uintptr_t>(points + j * D) - reinterpret_cast<uintptr_t>(gen));
                weight[first + j] = p.weights[kind][g * p.count[kind] + j];
            }
        }
        __syncthreads();
    }
    __device__ __forceinline__ bool in_vectors() const { return vectors; }
    __device__ __forceinline__ const float* operator()(int j) const {  // the last one for any past it
        return reinterpret_cast<const float*>(reinterpret_cast<const char*>(gen) + offset[std::min(j, total - 1)]);
    }
    __device__ Matrix<float> samples() const { return {gen, N, D}; }
};

// Shared memory of a block: a place to stage products, `strips` matrices [64][ld] of which the last holds the distances (its
// predecessors are free while distances are found, and the stage extends into them), statistics.
struct Layout {
    int M, ld, strips, widths;
    __host__ __device__ Layout(const int* counts, int widths, int strips)
        : M(counts[0] + counts[1] + counts[2]), ld((M + 31) / 32 * 32 + 4), strips(strips), widths(widths) {}
    __host__ __device__ int first_strip() const {
        const int others = (strips - 1) * ROWS * ld, least = VALUES_STAGE<float, 4>;
        return others + least < STAGE<float, GROUP_NT> ? STAGE<float, GROUP_NT> - others : least;
    }
    __host__ __device__ int statistics() const { return first_strip() + strips * ROWS * ld; }
    __host__ __device__ int targets() const { return statistics() + ROWS + COLS<GROUP_NT>; }
    __host__ __device__ int coefficients() const { return targets() + Targets::size(M); }
    __host__ __device__ int size() const { return coefficients() + (2 + widths) * ROWS + (1 + widths) * M; }
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

// Calls store(i, j, ‖x_i − t_j‖²) in some dimensions for all pairs of samples and targets. The points are taken relative to a
// positive; pairs too close for products are worked out from differences, with their tile. `norms` has ROWS + COLS floats of
// shared memory.
template <class Store>
__device__ __forceinline__ void find_squares(const Loss& p, const Targets& targets, Range dims, float* stage, float* norms, Store store) {
    constexpr int NT = GROUP_NT;
    const int M = targets.total;
    const float* centre = targets.pos;
    for (int first = 0; first < M; first += COLS<NT>) {
        Tile<float, NT> d;
        const Span xs{0, targets.N, 0}, ys{first, M - first < COLS<NT> ? M - first : COLS<NT>, 0};
        for (bool by_differences = p.D <= DIFFERENCES_UP_TO;; by_differences = true) {
            RowNorms<2> x_norms;
            RowNorms<NT> y_norms;
            product_of_rows(d, targets.samples(), targets, first, dims, centre, by_differences, p.split_products, stage,
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
        for_pairs<float, NT>(xs, ys, [&](int r, int c, int i, int j) { store(i, first + j, d.value[r][c]); });
    }
}

__device__ __forceinline__ float distance_of(float square, int i, int j) {
    constexpr float LEAST = float(LEAST_LOSS_DISTANCE);
    const float distance = std::sqrt(square);
    return i == j || distance < LEAST ? LEAST : distance;
}

// Phase 1 of a group, as its pairs' squared distances come: Σ d·w, and the distances kept.
struct ScaleSums {
    const Targets& targets;
    float *kept, total = 0;
    __device__ ScaleSums(const Loss& p, const Targets& targets, int64_t g)
        : targets(targets), kept(p.kept ? p.kept + g * p.count[0] * targets.total : nullptr) {}

    __device__ __forceinline__ void add(int i, int j, float square) {
        const float d = distance_of(square, i, j);
        total += d * targets.weight[j];
        if (kept) kept[i * targets.total + j] = d;
    }
    __device__ __forceinline__ void finish(double* sums, double* shared) const {  // sums [2]: Σ d·w and Σ w
        float weight = 0;
        for (int j = threadIdx.x; j < targets.total; j += THREADS) weight += targets.weight[j];
        const double all = sum_over_block(total, shared), all_weight = sum_over_block(weight, shared);
        if (threadIdx.x == 0) sums[0] = all, sums[1] = all_weight;
    }
};

// Shared memory of the next three kernels.
struct ScaleLayout {
    static constexpr int SUMS = 0, STAGED = SUMS + 2 * WARPS, NORMS = STAGED + STAGE<float, GROUP_NT>, TARGETS = NORMS + ROWS + COLS<GROUP_NT>;
    static size_t bytes(const Loss& p) { return (TARGETS + Targets::size(p.count[0] + p.count[1] + p.count[2])) * sizeof(float); }
};

// sums [G, 2].
__global__ void __launch_bounds__(THREADS, 1) group_scale(const __grid_constant__ Loss p, double* sums) {
    using At = ScaleLayout;
    float* shared = shared_as<float>();
    const Targets targets(p, blockIdx.x, shared + At::TARGETS);
    ScaleSums found(p, targets, blockIdx.x);
    find_squares(p, targets, Range{0, p.D}, shared + At::STAGED, shared + At::NORMS,
                 [&](int i, int j, float square) { found.add(i, j, square); });
    found.finish(sums + 2 * int64_t(blockIdx.x), shared_as<double>());
}

// squares [parts, G, N, targets].
__global__ void __launch_bounds__(THREADS, 1) group_squares(const __grid_constant__ Loss p, int parts, float* squares) {
    using At = ScaleLayout;
    float* shared = shared_as<float>();
    const Share share(p, parts);
    const Targets targets(p, share.group, shared + At::TARGETS);
    float* out = squares + (share.part * p.groups + share.group) * targets.N * targets.total;
    find_squares(p, targets, share.dims, shared + At::STAGED, shared + At::NORMS,
                 [&](int i, int j, float square) { out[i * targets.total + j] = square; });
}

// As group_scale, from squares [parts, G, N, targets].
__global__ void __launch_bounds__(THREADS) scale_of_squares(const __grid_constant__ Loss p, int parts, const float* squares, double* sums) {
    const Targets targets(p, blockIdx.x, shared_as<float>() + ScaleLayout::TARGETS);
    ScaleSums found(p, targets, blockIdx.x);
    const int M = targets.total, pairs = targets.N * M;
    for (int n = threadIdx.x; n < pairs; n += THREADS) {
        float square = 0;
        for (int part = 0; part < parts; ++part) square += squares[(part * p.groups + blockIdx.x) * pairs + n];
        found.add(n / M, n % M, square);
    }
    found.finish(sums + 2 * int64_t(blockIdx.x), shared_as<double>());
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
template <int R> struct Coefficients {
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
          row_min(shared + layout.coefficients()), row_total(row_min + ROWS), row_factor(row_total + ROWS),
          col_min(row_factor + R * ROWS), col_factor(col_min + layout.M), N(p.count[0]), M(layout.M) {}

    __device__ __forceinline__ float distance(int i, int j) const {
        return d[i * layout.ld + j] + (i == j ? float(LOSS_SELF_DISTANCE) * kernel_scale : 0.0f);
    }
    struct Rates {
        float of[R];
        __device__ __forceinline__ Rates(const Coefficients& c) {
#pragma unroll
            for (int r = 0; r < R; ++r) of[r] = 1 / (float(c.p.R[r]) * c.kernel_scale);
        }
    };
    static __device__ __forceinline__ void add_exponentials(float (&sum)[R], float difference, const Rates& rate) {
#pragma unroll
        for (int r = 0; r < R; ++r) sum[r] += std::exp(difference * rate.of[r]);
    }

    // After this and a __syncthreads, all but `d` is known.
    __device__ void find_statistics() const {
        const Rates rate(*this);
        for (int i = warp; i < N; i += THREADS / 32) {
            float min = INF<float>, total = 0, sum[R] = {};
            for (int j = lane; j < M; j += 32) min = fminf(min, distance(i, j)), total += d[i * layout.ld + j];
            min = min_over_warp(min), total = sum_over_warp(total);
            for (int j = lane; j < M; j += 32) add_exponentials(sum, min - distance(i, j), rate);
#pragma unroll
            for (int r = 0; r < R; ++r) row_factor[r * ROWS + i] = 1 / std::sqrt(sum_over_warp(sum[r]));
            row_min[i] = min, row_total[i] = total;  // all lanes agree
        }
        for (int j = threadIdx.x; j < M; j += THREADS) {
            float min = INF<float>, sum[R] = {};
            for (int i = 0; i < N; ++i) min = fminf(min, distance(i, j));
            for (int i = 0; i < N; ++i) add_exponentials(sum, min - distance(i, j), rate);
#pragma unroll
            for (int r = 0; r < R; ++r) col_factor[r * M + j] = 1 / std::sqrt(sum[r]);
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
        return targets.gen + best * p.D;
    }

    // w_j A_ij of every R.
    __device__ __forceinline__ void weighted_affinities(float (&A)[R], int i, int j, const Rates& rate) const {
        const float difference = (row_min[i] + col_min[j]) * 0.5f - distance(i, j), weight = targets.weight[j];
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const float value = std::exp(difference * rate.of[r]) * (row_factor[r * ROWS + i] * col_factor[r * M + j]);
            A[r] = (value < least ? least : value) * weight;
        }
    }

    // Calls body(i, j, c_ij / s of every R) for all pairs; a warp has a row, and a pair's distance is not read after its call.
    template <class Body> __device__ __forceinline__ void for_pairs(Body body) const {
        const int split = p.count[0] + p.count[1];
        const Rates rate(*this);
        float A[R];
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

// Distances of group g into the last strip, and the statistics. Afterwards the strips before it are zero.
template <int R>
__device__ __forceinline__ void prepare(const Loss& p, int64_t g, const Targets& targets, const Layout& layout, float* shared,
                                        const Coefficients<R>& c) {
    float* strips = shared + layout.first_strip();
    float* d = strips + (layout.strips - 1) * ROWS * layout.ld;
    for (int n = threadIdx.x; n < ROWS * layout.ld; n += THREADS) d[n] = 0;  // beyond the pairs, too
    __syncthreads();
    if (p.kept) {
        const int N = p.count[0], M = layout.M;
        const float* kept = p.kept + g * N * M;
        for (int i = threadIdx.x / 32; i < N; i += THREADS / 32)
            for (int j = threadIdx.x % 32; j < M; j += 32) d[i * layout.ld + j] = kept[i * M + j];
    } else {
        find_squares(p, targets, Range{0, p.D}, shared, shared + layout.statistics(),
                     [&](int i, int j, float square) { d[i * layout.ld + j] = distance_of(square, i, j); });
    }
    __syncthreads();
    c.find_statistics();
    for (int n = threadIdx.x; n < (layout.strips - 1) * ROWS * layout.ld; n += THREADS) strips[n] = 0;
    __syncthreads();
}

// moments [parts, G, R, R], whose sums over the parts are mean_{i, dim} F_r F_r'.
template <int R> __global__ void __launch_bounds__(THREADS, 1) group_moments(const __grid_constant__ Loss p, int parts, float* moments) {
    const Layout layout(p.count, R, R);
    const Share share(p, parts);
    float *shared = shared_as<float>(), *strips = shared + layout.first_strip();
    const Targets targets(p, share.group, shared + layout.targets());
    const Coefficients<R> c(p, targets, layout, shared);
    prepare(p, share.group, targets, layout, shared, c);
    c.for_pairs([&](int i, int j, const float(&of_pair)[R]) {  // those of the last R in place of the distances
#pragma unroll
        for (int r = 0; r < R; ++r) strips[(r * ROWS + i) * layout.ld + j] = of_pair[r];
    });
    __syncthreads();
    for (int r = 0; r < R; ++r) split_strip(strips + r * ROWS * layout.ld, layout.ld);
    const float* centre = c.medoid();
    float products[R][R] = {};
    constexpr int NT = MOMENTS_NT<R>;
    for (int64_t at = share.dims.begin; at < share.dims.end; at += COLS<NT>) {
        Tile<float, NT> F[R];
#pragma unroll
        for (int r = 0; r < R; ++r) F[r].clear();
        product_with_strips<float, NT, R>(F, strips, ROWS * layout.ld, layout.ld, targets, layout.M, at, p.D, centre, p.split_products,
                                                  shared);
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int other = 0; other <= r; ++other)
#pragma unroll
                for (int n = 0; n < 4 * 2 * NT; ++n)
                    products[r][other] += F[r].value[n % 4][n / 4] * F[other].value[n % 4][n / 4];
    }
    double* sums = reinterpret_cast<double*>(shared);
    float* out = moments + (share.part * p.groups + share.group) * R * R;
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
        for (int other = 0; other <= r; ++other) {
            const float mean = float(sum_over_block(products[r][other], sums) / (double(p.count[0]) * double(p.D)));
            if (threadIdx.x == 0) out[r * R + other] = out[other * R + r] = mean;
        }
}

// grad [G, N, D] = −2·incoming[g]·Σ_r factors[r]·F_r / (N·D·s).
template <int R>
__global__ void __launch_bounds__(THREADS, 1)
group_gradient(const __grid_constant__ Loss p, int parts, const double* factors, const float* incoming, float* grad) {
    const Layout layout(p.count, R, 2);
    const Share share(p, parts);
    float *shared = shared_as<float>(), *strip = shared + layout.first_strip();
    const Targets targets(p, share.group, shared + layout.targets());
    const Coefficients<R> c(p, targets, layout, shared);
    prepare(p, share.group, targets, layout, shared, c);
    const int N = p.count[0];
    float factor[R];
    for (int r = 0; r < R; ++r) factor[r] = float(factors[r]);
    c.for_pairs([&](int i, int j, const float(&of_pair)[R]) {
        float sum = 0;
        for (int r = 0; r < R; ++r) sum += of_pair[r] * factor[r];
        strip[i * layout.ld + j] = sum;
    });
    __syncthreads();
    split_strip(strip, layout.ld);
    const float* centre = c.medoid();
    const float by = -2 * incoming[share.group] * c.inverse_unit / (float(N) * float(p.D));
    float* out = grad + share.group * N * p.D;
    for (int64_t at = share.dims.begin; at < share.dims.end; at += COLS<4>) {
        Float4 F[1];
        F[0].clear();
        product_with_strips<float, 4, 1>(F, strip, 0, layout.ld, targets, layout.M, at, p.D, centre, p.split_products, shared);
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int col = 0; col < 8; ++col) F[0].value[r][col] *= by;
        add_tile(out, F[0], N, at, p.D, true);
    }
}

// Calls body(std::integral_constant<int, widths>()).
template <int R = 1, class Body> void with_widths(int widths, Body body) {
    if constexpr (R < MAX_LOSS_WIDTHS)
        if (widths != R) return with_widths<R + 1>(widths, body);
    body(std::integral_constant<int, R>());
}

// Blocks that share a group, as long as each has a multiprocessor. Each finds all the coefficients of its group, which costs
// little only where the distances are kept.
int parts_of_group(const Loss& p, Device device) {
    if (!p.kept || p.groups == 0) return 1;
    const int64_t parts = attribute(cudaDevAttrMultiProcessorCount, device) / p.groups;
    return int(std::clamp<int64_t>(parts, 1, std::max<int64_t>(1, p.D / LEAST_DIMS)));
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

int64_t loss_scratch(const Loss& p, Device device) {
    const OnDevice guard(device);
    const int64_t N = p.count[0], M = N + p.count[1] + p.count[2];
    const int parts = parts_of_group(p, device);
    const int64_t floats = parts > 1 ? parts * p.groups * std::max<int64_t>(N * M, p.widths * p.widths) : 0;
    return 2 * p.groups + ceil_div(floats, 2);
}

void loss_scale(const Loss& p, double* means, double* scratch, Device device) {
    const OnDevice guard(device);
    const size_t shared = ScaleLayout::bytes(p);
    if (const int parts = parts_of_group(p, device); parts > 1) {
        float* squares = reinterpret_cast<float*>(scratch + 2 * p.groups);
        launch("group_squares", group_squares, device, p.groups * parts, shared, p, parts, squares);
        launch("scale_of_squares", scale_of_squares, device, p.groups, shared, p, parts, squares, scratch);
    } else {
        launch("group_scale", group_scale, device, p.groups, shared, p, scratch);
    }
    launch_finish_means(scratch, p.groups, p.groups, p.count[0], p.count[0] + p.count[1] + p.count[2], means, device);
}

void loss_moments(const Loss& p, float* moments, double* scratch, Device device) {
    const OnDevice guard(device);
    const int parts = parts_of_group(p, device);
    float* found = parts > 1 ? reinterpret_cast<float*>(scratch) : moments;
    with_widths(p.widths, [&](auto R) {
        launch("group_moments", group_moments<R()>, device, p.groups * parts, bytes(p.count, R(), R()), p, parts, found);
    });
    if (parts > 1) launch_sum_parts(found, parts, p.groups * p.widths * p.widths, moments, device);
}

void loss_gradient(const Loss& p, const double* factors, const float* incoming, float* grad, Device device) {
    const OnDevice guard(device);
    const int parts = parts_of_group(p, device);
    with_widths(p.widths, [&](auto R) {
        launch("group_gradient", group_gradient<R()>, device, p.groups * parts, bytes(p.count, R(), 2), p, parts, factors, incoming, grad);
    });
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
