"""The gradient: distances once more, the coefficients of all R together, one weighted sum of the points."""

import triton
import triton.language as tl

from ..group import one_of, zeros
from ..halves import add_product, split
from .distances import find_distances_again, load_centred
from .maps import find_map, points_of_group
from .products import load_origin_row, load_tiles
from .state import (
    coefficients,
    distances_in,
    load_exponents,
    mean_of_forces,
    ready_for_softmax,
    slot_of_state,
    split_rows,
)


@triton.jit
def gradient_kernel(
    groups,  # whose last side is the gradient
    numbers,
    maps,
    state,  # see .state
    scale,  # [maps of the call]
    factors,  # [maps of the call, R]
    incoming,  # [G]
    share,  # dimensions of a program
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    KEEP: tl.constexpr,  # distances in the state
    ALIGNED: tl.constexpr,
):
    R: tl.constexpr = len(numbers.R_list)
    BLOCK_N: tl.constexpr = BLOCKS[0]
    N, D = groups.counts[0], groups.D
    n, place, g = find_map(maps, tl.program_id(0))
    scale = tl.load(scale + place).to(tl.float32)
    factors += place * R
    rows = points_of_group(groups, maps, n, g, ALIGNED)
    slot = slot_of_state(one_of(state, n), g, R, BLOCKS, KEEP)
    origin = rows[0][0] + load_origin_row(slot) * rows[0][1]
    if KEEP:
        d = load_tiles(distances_in(slot, R, BLOCKS), 0, BLOCK_N, BLOCKS)
    else:
        exponents = load_exponents(slot, BLOCKS)
        d = find_distances_again(
            groups, rows, 0, origin, exponents, exponents[0], numbers.least_distance, BLOCK_N, BLOCKS, BLOCK_D
        )
    d = ready_for_softmax(d, scale, numbers, groups.counts, 0, BLOCK_N, BLOCKS)
    total = ()  # Σ_R c_R/λ_R
    bound = tl.zeros([BLOCK_N], dtype=tl.float32)
    for side in tl.static_range(len(BLOCKS)):
        total = total + (zeros(BLOCKS[0], BLOCKS[side]),)
    for r in range(R):  # not unrolled: the R would compete for registers
        factor = tl.load(factors + r).to(tl.float32)
        c, of_R = coefficients(d, slot, r, scale, factor, numbers, 0, BLOCK_N, BLOCKS)
        more = ()
        for side in tl.static_range(len(BLOCKS)):
            more = more + (total[side] + c[side],)
        total = more
        bound += of_R
    hi, lo, down = split_rows(total, bound, BLOCKS)

    exponents = load_exponents(slot, BLOCKS)
    by = (down * (-2 * tl.load(one_of(incoming, n) + g) * mean_of_forces(scale, numbers, groups)))[:, None]
    row = tl.arange(0, BLOCK_N)[:, None]
    grad, stride = rows[len(BLOCKS)][0], rows[len(BLOCKS)][1]
    first = tl.program_id(1) * share
    for start in range(first, tl.minimum(first + share, D), BLOCK_SUM):
        F = zeros(BLOCKS[0], BLOCK_SUM)
        for side in tl.static_range(len(BLOCKS)):
            t_hi, t_lo = split(
                load_centred(groups, rows, side, origin, start, BLOCKS, BLOCK_SUM) * tl.exp2(exponents[side])[:, None]
            )
            F = add_product(F, hi[side], lo[side], t_hi, t_lo, groups.SPLIT, False)
        dim = start + tl.arange(0, BLOCK_SUM)[None, :]
        tl.store(grad + row * stride + dim, (F * by).to(grad.dtype.element_ty), mask=(row < N) & (dim < D))
