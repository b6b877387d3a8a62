// Phase 3 of form C's groups: the coefficients of all R together, and their weighted sum of the targets.
#include "loss_coefficients.cuh"

namespace drift::cuda {

namespace {

// grad [G, N, D] = −2·incoming[g]·Σ_r factors[r]·F_r / (N·D·s).
template <int R>
__global__ void __launch_bounds__(THREADS, 1)
group_gradient(const __grid_constant__ Loss p, int parts, const double* factors, const float* incoming, Rows<float> grad) {
    constexpr int NT = 4;
    const Layout layout(p.targets(), R, 2);
    const Share share(p, parts);
    float *shared = shared_as<float>(), *strip = shared + layout.first_strip();
    const Targets targets(p, share.group, shared + layout.targets());
    const Coefficients<R> c(p, targets, layout, shared);
    prepare(p, share.group, targets, layout, shared, c);
    const int N = p.count(0);
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
    float* out = first_row(grad, share.group);
    for (int64_t at = share.dims.begin; at < share.dims.end; at += COLS<NT>) {
        Tile<float, NT> F[1];
        F[0].fill(0);
        product_with_strips<float, NT, 1>(F, strip, 0, layout.ld, targets, layout.M, at, p.D, centre, p.split_products, shared);
        F[0].for_each([&](int r, int col) { F[0].value[r][col] *= by; });
        add_tile(out, grad.strides[2], F[0], N, at, p.D, true);
    }
}

}  // namespace

void loss_gradient(const Loss& p, const double* factors, const float* incoming, const Rows<float>& grad, Device device) {
    const OnDevice guard(device);
    const int parts = parts_of_group(p, device);
    with_widths(p.widths, [&](auto R) {
        launch("group_gradient", group_gradient<R()>, device, p.groups * parts, Layout(p.targets(), R(), 2).bytes(), p, parts, factors,
               incoming, grad);
    });
}

}  // namespace drift::cuda
