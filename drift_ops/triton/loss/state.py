"""What phase 2 keeps of a group, and the coefficients of the forces, which follow from it.

With softmax statistics a coefficient takes one exponential and no look at other pairs. The state of a group: the row of
its origin, in HEAD floats; by target the exponent of the power of two that scales it, and its weight over that power;
for each R by row the half of the softmax's log-sum, the sums of weighted affinities to negatives and to positives and
the largest coefficient of a scaled target, and by column the half log-sum; then the distances if these are kept.
"""

import triton
import triton.language as tl

from ..group import one_of
from ..halves import exponent, split
from ..tiles import at_least, pairs_within, self_pairs
from .products import HEAD

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def slot_of_state(state, g, R, BLOCKS: tl.constexpr, KEEP: tl.constexpr):
    floats = _statistics_in(HEAD, R, BLOCKS)
    if KEEP:
        for side in tl.static_range(len(BLOCKS)):
            floats += BLOCKS[0] * BLOCKS[side]
    return state + g * floats


@triton.jit
def _statistics_in(slot, r, BLOCKS: tl.constexpr):
    """Where those of the r-th of R start."""
    floats = 4 * BLOCKS[0]
    for side in tl.static_range(len(BLOCKS)):
        slot += 2 * BLOCKS[side]
        floats += BLOCKS[side]
    return slot + r * floats


@triton.jit
def statistics_of(slot, r, BLOCKS: tl.constexpr):
    return _statistics_in(slot + HEAD, r, BLOCKS)


@triton.jit
def distances_in(slot, R, BLOCKS: tl.constexpr):
    return statistics_of(slot, R, BLOCKS)


@triton.jit
def exponents_in(slot, BLOCKS: tl.constexpr, side: tl.constexpr):
    slot += HEAD
    for before in tl.static_range(side):
        slot += 2 * BLOCKS[before]
    return slot + tl.arange(0, BLOCKS[side])


@triton.jit
def load_exponents_of_rows(slot, first, ROWS: tl.constexpr):
    """Of rows [first, first + ROWS) of gen."""
    return tl.load(slot + HEAD + first + tl.arange(0, ROWS))


@triton.jit
def weights_in(slot, BLOCKS: tl.constexpr, side: tl.constexpr):
    """Of scaled targets."""
    return exponents_in(slot, BLOCKS, side) + BLOCKS[side]


@triton.jit
def load_exponents(slot, BLOCKS: tl.constexpr):
    exponents = ()
    for side in tl.static_range(len(BLOCKS)):
        exponents = exponents + (tl.load(exponents_in(slot, BLOCKS, side)),)
    return exponents


@triton.jit
def ready_for_softmax(d, scale, numbers, counts, first, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Distances of rows [first, first + ROWS) with ``self_distance`` units added to self pairs, and infinite where
    there is no pair."""
    ready = ()
    for side in tl.static_range(len(BLOCKS)):
        of_side = d[side]
        if side == 0:
            further = numbers.self_distance * tl.maximum(scale, numbers.least_scale)
            of_side += tl.where(self_pairs(first, ROWS, BLOCKS[0]), further, 0.0)
        exists = pairs_within(counts[0] - first, counts[side], ROWS, BLOCKS[side])
        ready = ready + (tl.where(exists, of_side, float("inf")),)
    return ready


@triton.jit
def slope_of(scale, numbers, r):
    """Of the logits of the r-th R, to the base 2, over d: ``L = −δ/R``, where ``δ = d/max(scale, least_scale)``."""
    return -LOG2_E / (one_of(numbers.R_list, r) * tl.maximum(scale, numbers.least_scale))


@triton.jit
def mean_of_forces(scale, numbers, groups):
    """By what sums over rows and dimensions, of products of forces in the units of points, become means in units of
    ``s = max(scale/√D, least_scale)``."""
    unit = tl.maximum(scale / tl.sqrt(groups.D * 1.0), numbers.least_scale)
    return 1 / (unit * unit * (groups.counts[0] * 1.0) * (groups.D * 1.0))


@triton.jit
def load_rows_of(statistics, first, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of rows [first, first + ROWS) and one R: half log-sums, sums to negatives and to positives, largest
    coefficients."""
    row = first + tl.arange(0, ROWS)
    negative = tl.load(statistics + BLOCK_N + row)
    positive = tl.load(statistics + 2 * BLOCK_N + row)
    return tl.load(statistics + row), negative, positive, tl.load(statistics + 3 * BLOCK_N + row)


@triton.jit
def affinities_of_scaled(d, slot, statistics, row_half, slope, least, BLOCKS: tl.constexpr, side: tl.constexpr):
    """``max(A_ij, least)`` times the weight of the scaled target; 0 where there is no target, finite where there is no
    row."""
    of_columns = statistics + 4 * BLOCKS[0]
    for before in tl.static_range(side):
        of_columns += BLOCKS[before]
    col_half = tl.load(of_columns + tl.arange(0, BLOCKS[side]))
    A = tl.exp2(d[side] * slope - (row_half[:, None] + col_half[None, :]))
    return at_least(A, least) * tl.load(weights_in(slot, BLOCKS, side))[None, :]


@triton.jit
def coefficients(d, slot, r, scale, factor, numbers, first, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """``factor`` times ``c⁻_ij = −A⁻_ij Σ⁺_i`` and ``c⁺_ij = A⁺_ij Σ⁻_i`` of the r-th R and scaled targets, a tuple
    over the sides, and their bound [ROWS].

    0 where there is no target or no row.
    """
    statistics = statistics_of(slot, r, BLOCKS)
    row_half, negative, positive, largest = load_rows_of(statistics, first, ROWS, BLOCKS[0])
    slope = slope_of(scale, numbers, r)
    c = ()
    for side in tl.static_range(len(BLOCKS)):
        A = affinities_of_scaled(d, slot, statistics, row_half, slope, numbers.least, BLOCKS, side)
        if side < len(BLOCKS) - 1:
            c = c + (A * (positive * -factor)[:, None],)
        else:
            c = c + (A * (negative * factor)[:, None],)
    return c, largest * factor


@triton.jit
def split_rows(c, bound, BLOCKS: tl.constexpr):
    """The two parts of coefficients, tuples over the sides, with an exponent for each row; and 2^-exponent [N]."""
    e = exponent(bound)
    hi = ()
    lo = ()
    for side in tl.static_range(len(BLOCKS)):
        parts = split(c[side] * tl.exp2(e)[:, None])
        hi = hi + (parts[0],)
        lo = lo + (parts[1],)
    return hi, lo, tl.exp2(-e)
