"""Statistics of the release's softmaxes and sums of affinities, as :mod:`.memory` lists them."""

import triton
import triton.language as tl

from ..tiles import at_least, finite_shift
from .memory import store_vectors

LEAST_TOTAL = tl.constexpr(2.0**-60)  # that sums may come to which are taken from one level


@triton.jit
def _half_logsumexp(top, total):
    """To the base 2; infinite where nothing is unmasked. With these r and c, ``A_ij = exp2(L_ij − r_i − c_j)``."""
    return tl.where(total == 0, float("inf"), 0.5 * (top + tl.log2(tl.where(total == 0, 1.0, total))))


@triton.jit
def _least_by_row(d):
    least = tl.min(d[0], 1)
    for side in tl.static_range(1, len(d)):
        least = tl.minimum(least, tl.min(d[side], 1))
    return least


@triton.jit
def nearest(d):
    """The least of all distances."""
    return tl.min(_least_by_row(d), 0)


@triton.jit
def _sums_by_row(A, weights, lifted, least):
    """Of weighted affinities to the targets of a side, and the largest to a lifted one."""
    A = at_least(A, least)
    return tl.sum(A * weights[None, :], 1), tl.max(A * tl.abs(lifted)[None, :], 1)


@triton.jit
def store_sums(out, rows, col, sums, groups):
    """Potentials and what follows from the sums of affinities. ``rows`` are r or, where sides are split, those of
    negatives and positives; ``sums`` are those of :func:`_sums_by_row` for every side."""
    row = tl.arange(0, groups.BLOCKS[0])
    negative, most_negative = sums[0]
    for side in tl.static_range(1, len(sums) - 1):
        negative += sums[side][0]
        most_negative = tl.maximum(most_negative, sums[side][1])
    positive, most_positive = sums[len(sums) - 1]
    by_negative, by_positive = -positive, negative
    if groups.member.SPLIT:
        empty = (negative == 0) | (positive == 0)
        by_negative = tl.where(empty, 0.0, -1 / tl.where(empty, 1.0, negative))
        by_positive = tl.where(empty, 0.0, 1 / tl.where(empty, 1.0, positive))
        tl.store(out + 4 * groups.BLOCKS[0] + row, rows[1])
    largest = tl.maximum(most_negative * tl.abs(by_negative), most_positive * tl.abs(by_positive))
    exists = row < groups.counts[0]
    tl.store(out + row, rows[0])
    tl.store(out + groups.BLOCKS[0] + row, tl.where(exists, by_negative, 0.0))
    tl.store(out + 2 * groups.BLOCKS[0] + row, tl.where(exists, by_positive, 0.0))
    tl.store(out + 3 * groups.BLOCKS[0] + row, tl.where(exists, largest, 0.0))
    store_vectors(out + groups.member.OF_ROWS * groups.BLOCKS[0], col, groups)


@triton.jit
def _store_from_one_level(out, E, top, row_total, col_totals, weights, lifted, least, groups):
    """Statistics of one R, from ``E = exp2(L − top)`` and its sums."""
    by_row = tl.rsqrt(tl.where(row_total == 0, 1.0, row_total))
    col_half = ()
    sums = ()
    for side in tl.static_range(len(E)):
        by_column = tl.rsqrt(tl.where(col_totals[side] == 0, 1.0, col_totals[side]))
        A = E[side] * by_row[:, None] * by_column[None, :]
        col_half = col_half + (_half_logsumexp(top, col_totals[side]),)
        sums = sums + (_sums_by_row(A, weights[side], lifted[side], least),)
    store_sums(out, (_half_logsumexp(top, row_total),), col_half, sums, groups)


@triton.jit
def _store_from_levels(out, d, slope, weights, lifted, least, groups):
    """The same where logits are too far apart for one level: every row and column has its own."""
    level = finite_shift(_least_by_row(d) * slope)
    total = level * 0.0
    for side in tl.static_range(len(d)):
        total += tl.sum(tl.exp2(d[side] * slope - level[:, None]), 1)
    row_half = _half_logsumexp(level, total)
    col_half = ()
    sums = ()
    for side in tl.static_range(len(d)):
        level = finite_shift(tl.min(d[side], 0) * slope)
        of_side = _half_logsumexp(level, tl.sum(tl.exp2(d[side] * slope - level[None, :]), 0))
        A = tl.exp2(d[side] * slope - (row_half[:, None] + of_side[None, :]))
        col_half = col_half + (of_side,)
        sums = sums + (_sums_by_row(A, weights[side], lifted[side], least),)
    store_sums(out, (row_half,), col_half, sums, groups)


@triton.jit
def store_statistics(out, d, top, slope, weights, lifted, least, groups):
    """Those of one R at ``out``; ``top`` is the largest logit, ``lifted`` the weights of lifted targets.

    With the largest of all logits for everyone's maximum, one exponential serves the row, the column and the affinity.
    """
    E = ()
    row_total = tl.zeros([groups.BLOCKS[0]], dtype=tl.float32)
    for side in tl.static_range(len(d)):
        E = E + (tl.exp2(d[side] * slope - top),)
        row_total += tl.sum(E[side], 1)
    smallest = tl.min(tl.where(tl.arange(0, groups.BLOCKS[0]) < groups.counts[0], row_total, 1.0), 0)
    col_totals = ()
    for side in tl.static_range(len(d)):
        col_totals = col_totals + (tl.sum(E[side], 0),)
        exists = tl.arange(0, groups.BLOCKS[side]) < groups.counts[side]
        smallest = tl.minimum(smallest, tl.min(tl.where(exists, col_totals[side], 1.0), 0))
    if smallest > LEAST_TOTAL:
        _store_from_one_level(out, E, top, row_total, col_totals, weights, lifted, least, groups)
    else:
        _store_from_levels(out, d, slope, weights, lifted, least, groups)
