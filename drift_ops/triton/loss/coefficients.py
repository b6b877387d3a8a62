"""The coefficients of the forces, which follow from distances and the state, and weighted sums with them.

With the potentials r and c of rows and columns a coefficient takes one exponential and no look at other pairs.
"""

import triton
import triton.language as tl

from ..group import one_of, zeros
from ..halves import add_product, exponent, split
from ..tiles import at_least, pairs_within, self_pairs
from .distances import load_lifted
from .memory import BEFORE_WIDTHS, HEAD, after_vector, entries, statistics_of

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def ready_for_softmax(d, scale, numbers, groups, first, ROWS: tl.constexpr):
    """Distances of rows [first, first + ROWS) with ``self_distance`` units added to self pairs, and infinite where
    there is no pair, or none that counts."""
    ready = ()
    for side in tl.static_range(len(groups.BLOCKS)):
        of_side = d[side]
        if side == 0:
            further = numbers.self_distance * tl.maximum(scale, numbers.least_scale)
            of_side += tl.where(self_pairs(first, ROWS, groups.BLOCKS[0]), further, 0.0)
        targets = groups.counts[side] if side > 0 or groups.member.OWN else 0
        exists = pairs_within(groups.counts[0] - first, targets, ROWS, groups.BLOCKS[side])
        ready = ready + (tl.where(exists, of_side, float("inf")),)
    return ready


@triton.jit
def width_of(numbers, state, r, groups):
    """The r-th R."""
    if groups.member.DETAILS:
        return tl.load(state + BEFORE_WIDTHS + r)
    else:
        return one_of(numbers.R_list, r)


@triton.jit
def slope_of(scale, numbers, width):
    """Of the logits of an R, to the base 2, over d: ``L = −δ/R``, where ``δ = d/max(scale, least_scale)``."""
    return -LOG2_E / (width * tl.maximum(scale, numbers.least_scale))


@triton.jit
def affinities(L, r, c, least, groups, first, ROWS: tl.constexpr, side: tl.constexpr):
    """``max(exp2(L − r − c), least)`` of rows [first, first + ROWS) and a side; 0 for self pairs that are left out."""
    A = at_least(tl.exp2(L - (r[:, None] + c[None, :])), least)
    if side == 0 and groups.member.MASKED:
        A = tl.where(self_pairs(first, ROWS, groups.BLOCKS[0]), 0.0, A)
    return A


@triton.jit
def mean_of_forces(scale, numbers, groups):
    """By what sums over rows and dimensions, of products of forces in the units of points, become means in units of
    ``s = max(scale/√D, least_scale)``."""
    unit = tl.maximum(scale / tl.sqrt(groups.D * 1.0), numbers.least_scale)
    return 1 / (unit * unit * (groups.counts[0] * 1.0) * (groups.D * 1.0))


@triton.jit
def coefficients(d, state, r, scale, numbers, groups, first, ROWS: tl.constexpr, side: tl.constexpr):
    """``c⁻_ij = −A⁻_ij Σ⁺_i`` or ``c⁺_ij = A⁺_ij Σ⁻_i`` of the r-th R, of rows [first, first + ROWS) and the lifted
    targets of a side, where sides are split with 1/Σ⁻ and 1/Σ⁺; 0 where there is no target or no row."""
    if side == 0 and not groups.member.OWN:
        return zeros(ROWS, groups.BLOCKS[0])
    BLOCK_N: tl.constexpr = groups.BLOCKS[0]
    POSITIVE: tl.constexpr = side == len(groups.BLOCKS) - 1
    statistics = statistics_of(state, r, groups)
    of_rows = statistics + first + tl.arange(0, ROWS)
    by_row = tl.load(of_rows + (2 if POSITIVE else 1) * BLOCK_N)
    col = tl.load(entries(statistics + groups.member.OF_ROWS * BLOCK_N, groups, side))
    L = d[side] * slope_of(scale, numbers, width_of(numbers, state, r, groups))
    row = tl.load(of_rows + (4 * BLOCK_N if POSITIVE and groups.member.SPLIT else 0))
    A = affinities(L, row, col, numbers.least, groups, first, ROWS, side)
    weight = tl.load(entries(after_vector(state + HEAD, groups), groups, side))
    return A * weight[None, :] * by_row[:, None]


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
