"""The gradient: distances once more, the coefficients of all R together, one weighted sum of the points."""

import triton
import triton.language as tl

from ..group import one_of, zeros
from .coefficients import (
    coefficients,
    largest_coefficients,
    mean_of_forces,
    ready_for_softmax,
    split_rows,
    weighted_sums,
)
from .distances import find_distances_again
from .maps import find_map, points_of_group, statistics_of_group
from .memory import HEAD, load_origin_row, load_tiles, load_vectors, statistics_of


@triton.jit
def gradient_kernel(
    groups,  # whose last side is the gradient
    numbers,
    maps,
    state,  # see .memory
    scale,  # [maps of the call], or of all their groups
    factors,  # [the same, R]
    incoming,  # [G]
    share,  # dimensions of a program
    STATE: tl.constexpr,  # floats of a group
    KEEP: tl.constexpr,  # distances in the state
    BLOCK_D: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    OF_GROUPS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    R: tl.constexpr = len(numbers.R_list)
    SIDES: tl.constexpr = len(groups.BLOCKS)
    BLOCK_N: tl.constexpr = groups.BLOCKS[0]
    n, place, g = find_map(maps, tl.program_id(0))
    place = statistics_of_group(place, g, OF_GROUPS)
    scale = tl.load(scale + place).to(tl.float32)
    factors += place * R
    points = points_of_group(groups, maps, n, g, ALIGNED)
    state = one_of(state, n) + g * STATE
    origin = points[0][0] + load_origin_row(state) * points[0][1]
    exponents = load_vectors(state + HEAD, groups)
    if KEEP:
        d = load_tiles(statistics_of(state, R, groups), groups, 0, BLOCK_N)
    else:
        d = find_distances_again(
            groups, points, 0, origin, exponents, exponents[0], numbers.least_distance, BLOCK_N, BLOCK_D
        )
    d = ready_for_softmax(d, scale, numbers, groups, 0, BLOCK_N)
    total = ()  # Σ_R c_R/λ_R
    for side in tl.static_range(SIDES):
        total = total + (zeros(BLOCK_N, groups.BLOCKS[side]),)
    bound = tl.zeros([BLOCK_N], dtype=tl.float32)
    for r in range(R):  # not unrolled: the R would compete for registers
        factor = tl.load(factors + r).to(tl.float32)
        more = ()
        for side in tl.static_range(SIDES):
            c = coefficients(d, state, r, scale, numbers, groups, 0, BLOCK_N, side)
            more = more + (total[side] + c * factor,)
        total = more
        bound += largest_coefficients(state, r, groups, 0, BLOCK_N) * factor
    table = split_rows(total, bound)

    exponents = load_vectors(state + HEAD, groups)
    by = (table[2] * (-2 * tl.load(one_of(incoming, n) + g) * mean_of_forces(scale, numbers, groups)))[:, None]
    row = tl.arange(0, BLOCK_N)[:, None]
    grad, stride = points[SIDES][0], points[SIDES][1]
    first = tl.program_id(1) * share
    for start in range(first, tl.minimum(first + share, groups.D), BLOCK_SUM):
        F = weighted_sums((table,), groups, points, origin, exponents, start, BLOCK_N, BLOCK_SUM)[0]
        dim = start + tl.arange(0, BLOCK_SUM)[None, :]
        exists = (row < groups.counts[0]) & (dim < groups.D)
        tl.store(grad + row * stride + dim, (F * by).to(grad.dtype.element_ty), mask=exists)
