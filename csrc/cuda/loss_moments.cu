// Phase 2 of form C's groups: mean F_r F_r' of the forces F_r = c_r (t/s), a few dimensions at a time.
#include "loss_coefficients.cuh"

namespace drift::cuda {

namespace {

template <int R> constexpr int MOMENTS_NT = R < 4 ? 4 : 2;  // 32 times as many dimensions of every R at a time

// moments [parts, G, R, R], whose sums over the parts are mean_{i, dim} F_r F_r'.
template <int R> __global__ void __launch_bounds__(THREADS, 1) group_moments(const __grid_constant__ Loss p, int parts, float* moments) {
    const Layout layout(p.targets(), R, R);
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
        for (int r = 0; r < R; ++r) F[r].fill(0);
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
            const float mean = float(sum_over_block(products[r][other], sums) / (double(p.count(0)) * double(p.D)));
            if (threadIdx.x == 0) out[r * R + other] = out[other * R + r] = mean;
        }
}

}  // namespace

bool group_fits(int samples, int targets, int widths, Device device) {
    if (samples > MAX_LOSS_SAMPLES || widths > MAX_LOSS_WIDTHS) return false;
    return fits(Layout(targets, widths, std::max(2, widths)).bytes(), device);
}

int64_t loss_moments(const Loss& p, float* moments, double* memory, Device device) {
    const OnDevice guard(device);
    Scratch scratch{memory};
    const Parts<float> found(scratch, moments, parts_of_group(p, device), p.groups * p.widths * p.widths);
    if (!memory) return scratch.doubles;
    with_widths(p.widths, [&](auto R) {
        launch("group_moments", group_moments<R()>, device, p.groups * found.count, Layout(p.targets(), R(), R()).bytes(), p, found.count,
               found.parts);
    });
    found.sum(device);
    return scratch.doubles;
}

}  // namespace drift::cuda
