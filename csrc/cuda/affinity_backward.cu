// The vector-Jacobian product of forms A and B. With G = w·A·dA where A is above the floor, else 0, the gradient of a logit is
// dL_ij = G_ij − ½ softmax_j(L)·Σ_j G − ½ softmax_i(L)·Σ_i G, and that of its points ±h_ij (q_i − k_j), h a factor of dL.
//
// Tiles have 32·NT columns: half as many as in the forward where the device's shared memory does not take more.
//
//   squared_norms       of all points
//   find_flows          Σ_j G and Σ_i G; a block walks a range of queries × a range of keys
//   gradients           once with 64 queries a block for grad_q, once with 64 keys a block for grad_k, grad_v and grad_w
//   sum_parts           where one of these was cut into parts
//
// With PAIRS, sums over pairs: there dL_ij = G_ij = A·(w·dA + grad_columns), since potentials are inputs of their own, whose
// gradients are the flows.
#include "affinity.cuh"

namespace drift::cuda {

namespace {

template <class T> struct Incoming {
    const T *num, *den;  // [S, G, sides, N, D], [S, G, sides, N]
    const T* columns;    // with PAIRS, where any may be null: [S, G, M]
};

// The gradient of a sum of A over a row; and over a column.
template <bool PAIRS, class T> __device__ __forceinline__ T of_den(const Incoming<T>& grad, int64_t at) {
    return PAIRS && !grad.den ? T(0) : grad.den[at];
}
template <bool PAIRS, class T> __device__ __forceinline__ T of_column(const Incoming<T>& grad, int64_t at) {
    return PAIRS && grad.columns ? grad.columns[at] : T(0);
}

// A row of the [S, G, sides, N] arrays.
template <class T> __device__ int64_t output_row(const Affinity<T>& p, int s, int64_t g, int side) {
    return ((s * p.groups + g) * p.sides + side) * p.N;
}

// row_parts [col_parts, S, G, N] and col_parts [row_parts, S, G, M]; with PAIRS logit_parts, of Σ_j G L, like row_parts.
template <class T, int NT, bool PAIRS>
__global__ void __launch_bounds__(THREADS, 1)
find_flows(const __grid_constant__ Affinity<T> p, const __grid_constant__ Cut cut, Known<T> known, Incoming<T> grad, T* row_parts,
           T* col_parts, T* logit_parts) {
    T *stage = shared_as<T>(), *row_sums = stage + STAGE<T, NT>, *logit_sums = row_sums + 4 * ROWS;  // [4][ROWS]
    T* col_sums = logit_sums + 4 * ROWS;                                                             // [2][COLS]
    const Rectangle<T> block(p, cut, known);
    const Axis<T>&x = block.x, &y = block.y;
    const int64_t g = block.group;
    const int thread = threadIdx.x;
    for (int64_t a = block.rows.begin; a < block.rows.end; ++a)
        for (int64_t b = block.cols.begin; b < block.cols.end; ++b) {
            const Span xs = cut.queries_down(a), ys = cut.keys_across(b);
            const T* w = p.w ? p.w + g * p.M + ys.first : nullptr;
            Tile<T, NT> d, dA;
            find_distances<PAIRS>(d, p, g, x, xs, y, ys, stage);
            for (int s = 0; s < p.widths; ++s) {
                const int64_t from = output_row(p, s, g, ys.side) + xs.first;
                const int64_t problem = s * p.groups + g;
                if (PAIRS && !grad.num)
                    dA.fill(0);
                else
                    product_of_rows(dA, Matrix<T>{grad.num + from * p.D, xs.count, p.D},
                                    Matrix<T>{p.v + (g * p.M + ys.first) * p.D, ys.count, p.D}, false, p.split_products, stage);
                const auto logit_of = logit<PAIRS>(p, s, g);
                const Affinities<PAIRS, T> affinity(p, x, xs, y, ys, s);
                T of_row[4] = {}, of_logit[4] = {}, of_col[2 * NT] = {};
                for_pairs<T, NT>(xs, ys, [&](int r, int c, int i, int j) {
                    const T L = logit_of.at(d.value[r][c]), A = affinity(i, j, L);
                    if (A <= affinity.least) return;  // nothing flows through the floor
                    T flow = A * (dA.value[r][c] + of_den<PAIRS>(grad, from + i)) * (w ? w[j] : T(1));
                    if (PAIRS) flow += A * of_column<PAIRS>(grad, problem * p.M + ys.first + j);
                    of_row[r] += flow, of_col[c] += flow;
                    if (PAIRS) of_logit[r] += flow * L;
                });
                put_row_sums<T, NT>(of_row, row_sums);
                if (PAIRS) put_row_sums<T, NT>(of_logit, logit_sums);
#pragma unroll
                for (int c = 0; c < 2 * NT; ++c) {
                    const T sum = sum_over_col(of_col[c]);
                    if (thread % 32 < 4) col_sums[Tile<T, NT>::warp_row() * COLS<NT> + Tile<T, NT>::col(c)] = sum;
                }
                __syncthreads();
                auto add = [](T& there, T sum, bool first) { there = first ? sum : there + sum; };
                const int64_t in_row = ((block.col_part * p.widths + s) * p.groups + g) * p.N + xs.first + thread;
                if (thread < xs.count) {
                    add(row_parts[in_row], total_of_row(row_sums, thread), b == block.cols.begin);
                    if (PAIRS) add(logit_parts[in_row], total_of_row(logit_sums, thread), b == block.cols.begin);
                } else if (const int j = thread - ROWS; j >= 0 && j < ys.count)
                    add(col_parts[((block.row_part * p.widths + s) * p.groups + g) * p.M + ys.first + j], col_sums[j] + col_sums[COLS<NT> + j],
                        a == block.rows.begin);
                __syncthreads();
            }
        }
}

template <class T> struct Flows {
    const T *rows, *cols;  // [S, G, N], [S, G, M]
};
template <class T> struct PointGradients {  // of the axis that blocks own; [parts, G, count, D] and [parts, G, count]
    T *points, *values, *weights;  // the last two for keys only, weights where keys have any
};

// The elements of a strip that belong to this thread, one after the other so as to need few registers: body(i, j, at) with
// `at` their place in the strip, and end_of_row(i).
template <class T, int NT, class Body, class EndOfRow> __device__ __forceinline__ void for_own(Body body, EndOfRow end_of_row) {
#pragma unroll 1
    for (int r = 0; r < 4; ++r) {
        const int i = Tile<T, NT>::row(r);
#pragma unroll 2
        for (int c = 0; c < 2 * NT; ++c) body(i, Tile<T, NT>::col(c), i * STRIP_LD<T, NT> + Tile<T, NT>::col(c));
        end_of_row(i);
    }
}
template <class T, int NT, class Body> __device__ __forceinline__ void for_own(Body body) {
    for_own<T, NT>(body, [](int) {});
}

// sums [4][ROWS] += a thread's share of row i.
template <class T, int NT> __device__ __forceinline__ void add_to_row(T* sums, int i, T mine) {
    const T sum = sum_over_row(mine);
    if (threadIdx.x % 4 == 0) sums[Tile<T, NT>::warp_col() * ROWS + i] += sum;
}

// Pairs so close that h·x − h·y would cancel: their h moves from `h` to `apart`. Whether there is any.
template <class T, int NT>
__device__ bool part_close_pairs(T* h, T* apart, const T* d, const Axis<T>& x, Span xs, const Axis<T>& y, Span ys) {
    auto is_close = [&](int i, int j, int at) {
        return i < xs.count && j < ys.count && d[at] * d[at] < (x.norms[xs.first + i] + y.norms[ys.first + j]) * T(CLOSE);
    };
    bool any = false;
    for_own<T, NT>([&](int i, int j, int at) { any |= is_close(i, j, at); });
    if (!__syncthreads_or(any)) return false;
    for_own<T, NT>([&](int i, int j, int at) {
        const bool moves = is_close(i, j, at);
        apart[at] = moves ? h[at] : T(0);
        if (moves) h[at] = 0;
    });
    return true;
}

// out_i −= Σ_j apart_ij (x_i − y_j); a warp has a row.
template <class T, int NT> __device__ void add_close_pairs(T* out, const T* apart, const Matrix<T>& x, const Matrix<T>& y) {
    __syncthreads();
    for (int i = threadIdx.x / 32; i < x.count; i += THREADS / 32)
        for (int j = 0; j < y.count; ++j) {
            const T h = apart[i * STRIP_LD<T, NT> + j];
            if (h == 0) continue;
            for (int64_t e = threadIdx.x % 32; e < x.depth; e += 32) out[i * x.depth + e] -= h * (x(i)[e] - y(j)[e]);
        }
    __syncthreads();
}

// Blocks own ROWS queries, or with KEYS as many keys, and walk the other axis or a part of it.
template <class T, int NT, bool KEYS, bool PAIRS>
__global__ void __launch_bounds__(THREADS, 1)
gradients(const __grid_constant__ Affinity<T> p, const __grid_constant__ Cut cut, Known<T> known, Incoming<T> grad, Flows<T> flows,
          int parts, PointGradients<T> out) {
    constexpr int STRIP = ROWS * STRIP_LD<T, NT>;
    T *stage = shared_as<T>(), *d_strip = stage + STAGE<T, NT>, *h_strip = d_strip + STRIP, *A_strip = h_strip + STRIP;
    T *h_sums = A_strip + STRIP, *weight_sums = h_sums + 4 * ROWS;
    const Spans down = KEYS ? cut.keys_down : cut.queries_down, across = KEYS ? cut.queries_across : cut.keys_across;
    const int64_t spans = down.count(), part = blockIdx.x / spans % parts, g = blockIdx.x / (spans * parts);
    const Axis<T> x = KEYS ? keys(p, known, g) : queries(p, known, g), y = KEYS ? queries(p, known, g) : keys(p, known, g);
    const Span xs = down(blockIdx.x % spans);
    const Range cols = Range{0, across.count()}.part(part, parts);
    const int64_t at = (part * p.groups + g) * x.count + xs.first;
    const Matrix<T> x_rows = x.rows(xs, p.D);
    for (int n = threadIdx.x; n < 8 * ROWS; n += THREADS) h_sums[n] = 0;
    for (int64_t b = cols.begin; b < cols.end; ++b) {
        const Span ys = across(b), &q_span = KEYS ? ys : xs, &k_span = KEYS ? xs : ys;
        const Matrix<T> values{p.v + (g * p.M + k_span.first) * p.D, k_span.count, p.D};
        const T* w = p.w ? p.w + g * p.M + k_span.first : nullptr;
        const int64_t self_first = p.has_self ? ys.first : int64_t(1) << 40;  // a query and itself are in one place
        Tile<T, NT> tile;
        find_distances<PAIRS>(tile, p, g, x, xs, y, ys, stage);
        put_strip(d_strip, tile);
        for (int s = 0; s < p.widths; ++s) {
            const int64_t from = output_row(p, s, g, k_span.side) + q_span.first;
            const Matrix<T> incoming{grad.num + from * p.D, q_span.count, p.D};
            if (PAIRS && !grad.num)
                tile.fill(0);
            else
                product_of_rows(tile, KEYS ? values : incoming, KEYS ? incoming : values, false, p.split_products, stage);
            put_strip(A_strip, tile);  // until A takes its place
            const auto logit_of = logit<PAIRS>(p, s, g);
            const Affinities<PAIRS, T> affinity(p, x, xs, y, ys, s);
            const int64_t problem = s * p.groups + g;
            const T *x_flow = KEYS ? flows.cols + problem * p.M : flows.rows + problem * p.N;
            const T *y_flow = KEYS ? flows.rows + problem * p.N : flows.cols + problem * p.M;
            if (!PAIRS) x_flow += xs.first, y_flow += ys.first;
            T of_row = 0;
            for_own<T, NT>(
                [&](int i, int j, int at) {
                    T h = 0, weighted = 0;
                    if (i < xs.count && j < ys.count) {
                        const int query = KEYS ? j : i, key = KEYS ? i : j;
                        const T d = d_strip[at], L = logit_of.at(d), A = affinity(i, j, L), weight = w ? w[key] : T(1);
                        const T grad_weight = A * (A_strip[at] + of_den<PAIRS>(grad, from + query));
                        if constexpr (PAIRS) {
                            const T of_sums = grad_weight * weight + A * of_column<PAIRS>(grad, problem * p.M + k_span.first + key);
                            const T flow = A <= affinity.least || xs.first + i == self_first + j ? T(0) : of_sums;
                            h = logit_of.point_factor(d, flow);
                        } else {
                            const T x_softmax = std::exp(L - affinity.x_max[i]) * affinity.x_factor[i] * affinity.x_factor[i];
                            const T y_softmax = std::exp(L - affinity.y_max[j]) * affinity.y_factor[j] * affinity.y_factor[j];
                            const T flow = A <= affinity.least ? T(0) : grad_weight * weight;  // none through the floor
                            h = logit_of.point_factor(L, d, flow - (x_softmax * x_flow[i] + y_softmax * y_flow[j]) * T(0.5));
                        }
                        weighted = A * weight;
                        of_row += grad_weight;
                    }
                    h_strip[at] = s == 0 ? h : h_strip[at] + h;
                    A_strip[at] = weighted;
                },
                [&](int i) {
                    if (KEYS) add_to_row<T, NT>(weight_sums, i, of_row);
                    of_row = 0;
                });
            if (KEYS && !(PAIRS && !grad.num))
                add_product<T, NT>(out.values + at * p.D, xs.count, A_strip, incoming, b == cols.begin && s == 0, p.split_products, stage);
        }
        __syncthreads();  // everyone is done with A_strip
        const bool close = part_close_pairs<T, NT>(h_strip, A_strip, d_strip, x, xs, y, ys);
        T of_row = 0;
        for_own<T, NT>([&](int, int, int at) { of_row += h_strip[at]; },
                   [&](int i) {
                       add_to_row<T, NT>(h_sums, i, of_row);
                       of_row = 0;
                   });
        add_product<T, NT>(out.points + at * p.D, xs.count, h_strip, y.rows(ys, p.D), b == cols.begin, p.split_products, stage);
        if (close) add_close_pairs<T, NT>(out.points + at * p.D, A_strip, x_rows, y.rows(ys, p.D));
    }
    __syncthreads();
    for (int i = threadIdx.x / 32; i < xs.count; i += THREADS / 32) {
        const T sum = total_of_row(h_sums, i);
        for (int64_t e = threadIdx.x % 32; e < p.D; e += 32) {
            T& there = out.points[(at + i) * p.D + e];
            there = sum * x_rows(i)[e] - there;
        }
    }
    if (KEYS && p.w && threadIdx.x < xs.count) out.weights[at + threadIdx.x] = total_of_row(weight_sums, threadIdx.x);
}

template <class T, int NT> constexpr size_t GRADIENTS_BYTES = (STAGE<T, NT> + 3 * ROWS * STRIP_LD<T, NT> + 8 * ROWS) * sizeof(T);

template <class T, int NT, bool PAIRS> int64_t backward(const Affinity<T>& p, const Gradients<T>& io, double* memory, Device device) {
    const Cut cut(p, COLS<NT>, device);
    const int64_t queries = p.groups * p.N, keys = p.groups * p.M;
    Scratch scratch{memory};
    T* norms = scratch.take<T>(queries + keys);
    T *row_flows = PAIRS ? io.row_flow : scratch.take<T>(p.widths * queries), *col_flows = PAIRS ? io.col_flow : scratch.take<T>(p.widths * keys);
    const Parts<T> rows(scratch, row_flows, cut.col_parts, p.widths * queries), cols(scratch, col_flows, cut.row_parts, p.widths * keys);
    const Parts<T> logits(scratch, io.width_flow, cut.col_parts, PAIRS ? p.widths * queries : 0);
    const Parts<T> grad_q(scratch, io.grad_q, cut.gradient_key_parts, queries * p.D), grad_k(scratch, io.grad_k, cut.query_parts, keys * p.D);
    const Parts<T> grad_v(scratch, io.grad_v, cut.query_parts, io.grad_v ? keys * p.D : 0), grad_w(scratch, io.grad_w, cut.query_parts, p.w ? keys : 0);
    if (!memory) return scratch.doubles;
    const Known<T> known{norms, norms + queries, io.row_stats, io.col_stats};
    const Incoming<T> incoming{io.grad_num, io.grad_den, io.grad_columns};
    const Flows<T> flows{row_flows, col_flows};
    launch_squared_norms(p, norms, device);
    launch("find_flows", find_flows<T, NT, PAIRS>, device, p.groups * cut.rectangles(), (STAGE<T, NT> + 8 * ROWS + 2 * COLS<NT>) * sizeof(T),
           p, cut, known, incoming, rows.parts, cols.parts, logits.parts);
    rows.sum(device), cols.sum(device), logits.sum(device);
    launch("gradients of queries", gradients<T, NT, false, PAIRS>, device, p.groups * cut.queries_down.count() * cut.gradient_key_parts,
           GRADIENTS_BYTES<T, NT>, p, cut, known, incoming, flows, cut.gradient_key_parts, PointGradients<T>{grad_q.parts, nullptr, nullptr});
    launch("gradients of keys", gradients<T, NT, true, PAIRS>, device, p.groups * cut.keys_down.count() * cut.query_parts, GRADIENTS_BYTES<T, NT>, p,
           cut, known, incoming, flows, cut.query_parts, PointGradients<T>{grad_k.parts, grad_v.parts, grad_w.parts});
    for (const Parts<T>* parts : {&grad_q, &grad_k, &grad_v, &grad_w}) parts->sum(device);
    return scratch.doubles;
}

}  // namespace

template <class T> int64_t affinity_backward(const Affinity<T>& p, const Gradients<T>& io, double* memory, Device device) {
    constexpr int NT = COLUMN_TILES<T>;
    const OnDevice guard(device);
    return fits(GRADIENTS_BYTES<T, NT>, device) ? backward<T, NT, false>(p, io, memory, device) : backward<T, NT / 2, false>(p, io, memory, device);
}

template <class T> int64_t pair_gradients(const Affinity<T>& p, const Gradients<T>& io, double* memory, Device device) {
    constexpr int NT = COLUMN_TILES<T>;
    const OnDevice guard(device);
    return fits(GRADIENTS_BYTES<T, NT>, device) ? backward<T, NT, true>(p, io, memory, device) : backward<T, NT / 2, true>(p, io, memory, device);
}

template int64_t affinity_backward(const Affinity<float>&, const Gradients<float>&, double*, Device);
template int64_t affinity_backward(const Affinity<double>&, const Gradients<double>&, double*, Device);
template int64_t pair_gradients(const Affinity<float>&, const Gradients<float>&, double*, Device);
template int64_t pair_gradients(const Affinity<double>&, const Gradients<double>&, double*, Device);

}  // namespace drift::cuda
