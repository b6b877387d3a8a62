"""The gradient: distances once more, the coefficients of all R together, one weighted sum of the points."""

import triton
import triton.language as tl

from ..group import one_of, zeros
from ..halves import add_product, split
from .kept import HEAD, load_head, load_tiles
from .points import distances_of_points, find_map, load_centred, rows_of_group
from .statistics import coefficients, ready_for_softmax, slope_of, split_rows, statistics_of


@triton.jit
def gradient_kernel(
    maps,  # see .points.find_map
    points,
    weights,
    state,
    scale,  # [maps of the call]
    R_list,
    factors,  # [maps of the call, R]
    incoming,  # [G]
    grad,
    share,  # dimensions of a program
    counts,
    D,
    least,
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    SPLIT: tl.constexpr,
    LONG: tl.constexpr,
    KEEP: tl.constexpr,  # distances in the state
):
    BLOCK_N: tl.constexpr = BLOCKS[0]
    n, place, g = find_map(maps, tl.program_id(0))
    N = counts[0]
    scale = tl.load(scale + place).to(tl.float32)
    factors += place * len(R_list)
    points = rows_of_group(points, n, counts, D, g)
    weights = rows_of_group(weights, n, counts, 1, g)
    state = one_of(state, n)
    e, origin_row = load_head(statistics_of(state, g, 0, len(R_list), BLOCKS, KEEP) - HEAD)
    if KEEP:
        d = load_tiles(statistics_of(state, g, len(R_list), len(R_list), BLOCKS, KEEP), BLOCKS)
    else:
        d, _, _ = distances_of_points(points, counts, e, origin_row, D, BLOCKS, BLOCK_D, DIFFERENCES, SPLIT, LONG)
    d = ready_for_softmax(d, scale, counts, BLOCKS)
    total = ()  # Σ_R c_R/λ_R
    bound = tl.zeros([BLOCK_N], dtype=tl.float32)
    for side in tl.static_range(len(BLOCKS)):
        total = total + (zeros(BLOCKS[0], BLOCKS[side]),)
    for r in range(len(R_list)):  # not unrolled: the R would compete for registers
        factor = tl.load(factors + r).to(tl.float32)
        statistics = statistics_of(state, g, r, len(R_list), BLOCKS, KEEP)
        slope = slope_of(scale, one_of(R_list, r))
        c, of_R = coefficients(d, statistics, slope, factor, weights, least, counts, BLOCKS)
        more = ()
        for side in tl.static_range(len(BLOCKS)):
            more = more + (total[side] + c[side],)
        total = more
        bound += of_R
    hi, lo, down = split_rows(total, bound, BLOCKS)

    unit = tl.maximum(scale / tl.sqrt(D * 1.0), 1e-3)
    by = (down * (-2 * tl.load(one_of(incoming, n) + g) * tl.exp2(-e) / (unit * unit * (N * 1.0) * (D * 1.0))))[:, None]
    centre = points[0] + origin_row * D
    up = tl.exp2(e)
    row = tl.arange(0, BLOCKS[0])[:, None]
    grad = one_of(grad, n) + g * N * D
    first = tl.program_id(1) * share
    for start in range(first, tl.minimum(first + share, D), BLOCK_SUM):
        F = zeros(BLOCKS[0], BLOCK_SUM)
        for side in tl.static_range(len(BLOCKS)):
            t = load_centred(points[side], counts[side], centre, start, D, BLOCKS[side], BLOCK_SUM)
            t_hi, t_lo = split(t * up)
            F = add_product(F, hi[side], lo[side], t_hi, t_lo, SPLIT, False)
        dim = start + tl.arange(0, BLOCK_SUM)[None, :]
        tl.store(grad + row * D + dim, (F * by).to(grad.dtype.element_ty), mask=(row < N) & (dim < D))
