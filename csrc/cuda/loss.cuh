// Form C, the release's training loss, for groups whose pairs fit into shared memory: a block has a group, or where there are
// few groups a part of one's dimensions. Nothing but the global statistics lives between the phases, and the distances where
// there is memory for them. Here is what the phases share; they are loss_scale.cu, loss_moments.cu and loss_gradient.cu.
#pragma once
#include "affinity.cuh"

namespace drift::cuda {

constexpr int GROUP_NT = 5;  // the ablation's 144 targets in one tile of distances
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

// The first row of a group. Blocks are fewer than 2^32, and a division of 64 bits would take their registers.
template <class T> __device__ __forceinline__ T* first_row(const Rows<T>& rows, int64_t g) {
    const unsigned group = unsigned(g), inner = unsigned(rows.inner);
    return rows.first + group / inner * rows.strides[0] + group % inner * rows.strides[1];
}

// gen, neg, pos of one group. Where each point lies, and its weight, is in shared memory.
struct Targets {
    const float* gen;
    int64_t* offset;  // of a point from gen, in bytes
    float* weight;
    int N, total;
    bool vectors;
    static __host__ __device__ int size(int total) { return 3 * total; }  // floats of shared memory

    __device__ Targets(const Loss& p, int64_t g, float* shared)
        : gen(first_row(p.points[0], g)), offset(reinterpret_cast<int64_t*>(shared)), weight(shared + 2 * p.targets()), N(p.count(0)),
          total(p.targets()), vectors(p.D % VECTOR<float> == 0) {
        for (int kind = 0, first = 0; kind < 3; first += p.count(kind), ++kind) {
            const float *points = first_row(p.points[kind], g), *weights = first_row(p.weights[kind], g);
            const int64_t stride = p.points[kind].strides[2], weight_stride = p.weights[kind].strides[2];
            vectors &= aligned(points) && stride % VECTOR<float> == 0;
            for (int j = threadIdx.x; j < p.count(kind); j += THREADS) {
                offset[first + j] = int64_t(reinterpret_cast<uintptr_t>(points + j * stride) - reinterpret_cast<uintptr_t>(gen));
                weight[first + j] = weights[j * weight_stride];
            }
        }
        __syncthreads();
    }
    __device__ __forceinline__ bool in_vectors() const { return vectors; }
    __device__ __forceinline__ const float* operator()(int j) const {  // the last one for any past it
        return reinterpret_cast<const float*>(reinterpret_cast<const char*>(gen) + offset[std::min(j, total - 1)]);
    }
    struct Samples : Matrix<float> {
        bool vectors;
        __device__ __forceinline__ bool in_vectors() const { return vectors; }
    };
    __device__ Samples samples(const Loss& p) const { return {{gen, N, p.points[0].strides[2]}, vectors}; }
};

// Calls store(i, j, ‖x_i − t_j‖²) in some dimensions for all pairs of samples and targets. The points are taken relative to a
// positive; pairs too close for products are worked out from differences, with their tile. `norms` has ROWS + COLS floats of
// shared memory.
template <class Store>
__device__ __forceinline__ void find_squares(const Loss& p, const Targets& targets, Range dims, float* stage, float* norms, Store store) {
    constexpr int NT = GROUP_NT;
    const int M = targets.total;
    const float* centre = targets(p.count(0) + p.count(1));
    for (int first = 0; first < M; first += COLS<NT>) {
        Tile<float, NT> d;
        const Span xs{0, targets.N, 0}, ys{first, M - first < COLS<NT> ? M - first : COLS<NT>, 0};
        for (bool by_differences = p.D <= DIFFERENCES_UP_TO;; by_differences = true) {
            RowNorms<2> x_norms;
            RowNorms<NT> y_norms;
            product_of_rows(d, targets.samples(p), targets, first, dims, centre, by_differences, p.split_products, stage,
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

__device__ __forceinline__ float distance_of(float square, int i, int j, float least) {
    const float distance = std::sqrt(square);
    return i == j || distance < least ? least : distance;
}

// Blocks that share a group, as long as each has a multiprocessor. Each finds all the coefficients of its group, which costs
// little only where the distances are kept.
inline int parts_of_group(const Loss& p, Device device) {
    if (!p.kept || p.groups == 0) return 1;
    const int64_t parts = attribute(cudaDevAttrMultiProcessorCount, device) / p.groups;
    return int(std::clamp<int64_t>(parts, 1, std::max<int64_t>(1, p.D / LEAST_DIMS)));
}

}  // namespace drift::cuda
