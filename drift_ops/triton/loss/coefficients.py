"""The coefficients of the forces, which follow from distances and the state, and weighted sums with them.

With softmax statistics a coefficient takes one exponential and no look at other pairs.
"""

import triton
import triton.language as tl

from ..group import one_of, zeros
from ..halves import add_product, exponent, split
from ..tiles import at_least, pairs_within, self_pairs
from .distances import load_lifted
from .memory import HEAD, OF_ROWS, after_vector, entries, statistics_of

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def ready_for_softmax(d, scale, numbers, groups, first, ROWS: tl.constexpr):
    """Distances of rows [first, first + ROWS) with ``self_distance`` units added to self pairs, and infinite where
    there is no pair."""
    ready = ()
    for side in tl.static_range(len(groups.BLOCKS)):
        of_side = d[side]
        if side == 0:
            further = numbers.self_distance * tl.maximum(scale, numbers.least_scale)
            of_side += tl.where(self_pairs(first, ROWS, groups.BLOCKS[0]), further, 0.0)
        exists = pairs_within(groups.counts[0] - first, groups.counts[side], ROWS, groups.BLOCKS[side])
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
def coefficients(d, state, r, scale, numbers, groups, first, ROWS: tl.constexpr, side: tl.constexpr):
    """``c⁻_ij = −A⁻_ij Σ⁺_i`` or ``c⁺_ij = A⁺_ij Σ⁻_i`` of the r-th R, of rows [first, first + ROWS) and the lifted
    targets of a side; 0 where there is no target or no row."""
    BLOCK_N: tl.constexpr = groups.BLOCKS[0]
    statistics = statistics_of(state, r, groups)
    of_rows = statistics + first + tl.arange(0, ROWS)
    by_row = tl.load(of_rows + (2 if side == len(groups.BLOCKS) - 1 else 1) * BLOCK_N)
    col_half = tl.load(entries(statistics + OF_ROWS * BLOCK_N, groups, side))
    A = tl.exp2(d[side] * slope_of(scale, numbers, r) - (tl.load(of_rows)[:, None] + col_half[None, :]))
    weight = tl.load(entries(after_vector(state + HEAD, groups), groups, side))
    return at_least(A, numbers.least) * weight[None, :] * by_row[:, None]


@triton.jit
def largest_coefficients(state, r, groups, first, ROWS: tl.constexpr):
    """In each of the rows [first, first + ROWS), for the r-th R."""
    return tl.load(statistics_of(state, r, groups) + 3 * groups.BLOCKS[0] + first + tl.arange(0, ROWS))


@triton.jit
def split_rows(c, largest):
    """A table of coefficients, a tuple over the sides, with an exponent for each row: its two parts, tuples over the
    sides, and 2^-exponent."""
    e = exponent(largest)
    hi = ()
    lo = ()
    for side in tl.static_range(len(c)):
        parts = split(c[side] * tl.exp2(e)[:, None])
        hi = hi + (parts[0],)
        lo = lo + (parts[1],)
    return hi, lo, tl.exp2(-e)


@triton.jit
def weighted_sums(tables, groups, points, origin, exponents, start, ROWS: tl.constexpr, BLOCK_SUM: tl.constexpr):
    """Of the lifted targets by each table of :func:`split_rows`, in dimensions [start, start + BLOCK_SUM)."""
    sums = ()
    for _ in tl.static_range(len(tables)):
        sums = sums + (zeros(ROWS, BLOCK_SUM),)
    for side in tl.static_range(len(groups.BLOCKS)):
        _, t_hi, t_lo = load_lifted(groups, points, side, origin, exponents[side], start, BLOCK_SUM)
        more = ()
        for n in tl.static_range(len(tables)):
            c_hi, c_lo = tables[n][0][side], tables[n][1][side]
            more = more + (add_product(sums[n], c_hi, c_lo, t_hi, t_lo, groups.EXACT, False),)
        sums = more
    return sums
