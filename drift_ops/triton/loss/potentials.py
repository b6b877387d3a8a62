"""What :mod:`.memory` lists of couplings other than the release's, and the details of every sample.

Every coupling is ``A_ij = exp2(L_ij − r_i − c_j)``: potentials r and c of rows and columns are log-sum-exps of logits,
or halves of them, or what Sinkhorn's iterations lead to (:mod:`.sinkhorn`). Logarithms of weights in the kernel are
part of c. What is coupled together are the sides [FIRST, LAST): all, or negatives and positives each on their own.
"""

import triton
import triton.language as tl

from ..tiles import NOTHING, finite_shift
from .coefficients import affinities
from .sinkhorn import log_sums_of_columns, log_sums_of_rows, sinkhorn
from .statistics import store_sums

DETAILS = tl.constexpr(6)  # as drift_ops.spec.DETAILS
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def multiplying(weights, groups):
    """What the weights multiply A with, a tuple over the sides; 0 where there is no target."""
    found = ()
    for side in tl.static_range(len(groups.BLOCKS)):
        w = weights[side]
        if groups.member.KERNEL:
            w = tl.where(w == 0, 0.0, 1.0)
        elif groups.member.MARGINAL:
            w = tl.where(tl.arange(0, groups.BLOCKS[side]) < groups.counts[side], 1.0, 0.0)
        if side == 0 and not groups.member.OWN:
            w = w * 0.0
        found = found + (w,)
    return found


@triton.jit
def _logarithms(weights, groups):
    """What the weights add to logits."""
    found = ()
    for side in tl.static_range(len(groups.BLOCKS)):
        if groups.member.KERNEL:
            found = found + (tl.where(weights[side] == 0, NOTHING, tl.log2(weights[side])),)
        else:
            found = found + (weights[side] * 0.0,)
    return found


@triton.jit
def _shares(weights, groups, FIRST: tl.constexpr, LAST: tl.constexpr):
    """What the columns of Sinkhorn's plan sum to, over the sides that are coupled."""
    of_targets = multiplying(weights, groups)
    shares = ()
    total = 0.0
    for side in tl.static_range(FIRST, LAST):
        share = of_targets[side] * weights[side] if groups.member.MARGINAL else of_targets[side]
        total += tl.sum(share)
        shares = shares + (share,)
    by = tl.where(total > 0, groups.counts[0] / tl.where(total > 0, total, 1.0), 0.0)
    found = ()
    for n in tl.static_range(len(shares)):
        found = found + (shares[n] * by,)
    return found


@triton.jit
def _logits(d, slope, logarithms, groups, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Of sides [FIRST, LAST), with the logarithms of weights in the kernel."""
    L = ()
    for side in tl.static_range(FIRST, LAST):
        of_side = d[side] * slope
        if groups.member.KERNEL:
            of_side += logarithms[side][None, :]
        L = L + (of_side,)
    return L


@triton.jit
def _or_left_out(log_sum, by):
    """The log-sum times ``by``, infinite where nothing is left: affinities are 0 there."""
    return tl.where(log_sum == NOTHING, float("inf"), log_sum * by)


@triton.jit
def _potentials(d, slope, weights, groups, FIRST: tl.constexpr, LAST: tl.constexpr):
    """r, c over the sides that are coupled, and Sinkhorn's residual."""
    logarithms = _logarithms(weights, groups)
    L = _logits(d, slope, logarithms, groups, FIRST, LAST)
    residual = 0.0
    by_column = ()
    if groups.member.SINKHORN:
        shares = _shares(weights, groups, FIRST, LAST)
        targets = 0
        for side in tl.static_range(FIRST, LAST):
            targets += groups.counts[side] if side > 0 or groups.member.OWN else 0
        row, by_column, residual = sinkhorn(L, shares, groups.member.SINKHORN, targets)
    elif groups.member.ROW:
        row = _or_left_out(log_sums_of_rows(L), 1.0)
        for n in tl.static_range(len(L)):
            by_column = by_column + (logarithms[FIRST + n] * 0.0,)
    else:
        row = _or_left_out(log_sums_of_rows(L), 0.5)
        log_sums = log_sums_of_columns(L)
        for n in tl.static_range(len(L)):
            by_column = by_column + (_or_left_out(log_sums[n], 0.5),)
    col = ()
    for n in tl.static_range(len(L)):
        added = logarithms[FIRST + n]
        col = col + (tl.where(added == NOTHING, float("inf"), by_column[n] - added),)
    return row, col, residual


@triton.jit
def _row_alone(d, slope, row, col, least, FIRST: tl.constexpr, LAST: tl.constexpr):
    """r for rows of A that are divided by their sums: without a floor, those with which they sum to 1, for some are too
    small for float32; and by what sums are smaller than those of A."""
    L = ()
    for n in tl.static_range(len(col)):
        L = L + (d[FIRST + n] * slope - col[n][None, :],)
    alone = _or_left_out(log_sums_of_rows(L), 1.0)
    by = tl.where(alone == float("inf"), 0.0, tl.exp2(alone - row))
    return tl.where(least == 0, alone, row), tl.where(least == 0, by, 1.0)


@triton.jit
def _couple(d, slope, weights, lifted, numbers, groups, FIRST: tl.constexpr, LAST: tl.constexpr):
    """r, c over the sides that are coupled; of every side, by row, the sum of A and the largest to a lifted target; by
    what sums are smaller than those of A; Sinkhorn's residual."""
    row, col, residual = _potentials(d, slope, weights, groups, FIRST, LAST)
    by = tl.full([groups.BLOCKS[0]], 1.0, dtype=tl.float32)
    if groups.member.SPLIT:
        row, by = _row_alone(d, slope, row, col, numbers.least, FIRST, LAST)
    of_targets = multiplying(weights, groups)
    sums = ()
    for n in tl.static_range(len(col)):
        A = affinities(d[FIRST + n] * slope, row, col[n], numbers.least, groups, 0, groups.BLOCKS[0], FIRST + n)
        most = tl.max(A * tl.abs(lifted[FIRST + n])[None, :], 1)
        sums = sums + ((tl.sum(A * of_targets[FIRST + n][None, :], 1), most),)
    return row, col, sums, by, residual


@triton.jit
def _sums_of_logits(d, slope, logarithms, groups, FIRST: tl.constexpr, LAST: tl.constexpr):
    """By row over sides [FIRST, LAST): the log-sum-exp of logits, and their mean under the softmax, without weights."""
    L = _logits(d, slope, logarithms, groups, FIRST, LAST)
    level = finite_shift(log_sums_of_rows(L))
    moved = level * 0.0
    total = level * 0.0
    for n in tl.static_range(len(L)):
        E = tl.exp2(L[n] - level[:, None])
        total += tl.sum(E, 1)
        moved += tl.sum(tl.where(E > 0, E * (d[FIRST + n] * slope), 0.0), 1)
    empty = total == 0
    return tl.where(empty, NOTHING, level + tl.log2(tl.where(empty, 1.0, total))), moved / tl.where(empty, 1.0, total)


@triton.jit
def _store_details(out, R: tl.constexpr, d, slope, width, weights, sums_of_A, residual, groups):
    """At ``out``, the first row's entry of the first detail."""
    SIDES: tl.constexpr = len(groups.BLOCKS)
    logarithms = _logarithms(weights, groups)
    negative, mean_negative = _sums_of_logits(d, slope, logarithms, groups, 0, SIDES - 1)
    positive, mean_positive = _sums_of_logits(d, slope, logarithms, groups, SIDES - 1, SIDES)
    top = finite_shift(tl.maximum(negative, positive))
    total = tl.exp2(negative - top) + tl.exp2(positive - top)
    log_sum = tl.where(total == 0, 0.0, top + tl.log2(tl.where(total == 0, 1.0, total)))
    mean = (tl.exp2(negative - log_sum) * mean_negative) + tl.exp2(positive - log_sum) * mean_positive
    slope_of_mass = tl.where(positive == NOTHING, 0.0, (mean - mean_positive) * (LN_2 / width))
    found = (
        log_sum * LN_2, (positive - log_sum) * LN_2, sums_of_A[0], sums_of_A[1], slope_of_mass, residual + log_sum * 0.0
    )  # fmt: skip
    row = tl.arange(0, groups.BLOCKS[0])
    for n in tl.static_range(DETAILS):
        tl.store(out + n * R * groups.counts[0] + row, found[n], mask=row < groups.counts[0])


@triton.jit
def _sum_of_sides(sums, COUNT: tl.constexpr):
    total = sums[0][0]
    for n in tl.static_range(1, COUNT):
        total += sums[n][0]
    return total


@triton.jit
def store_potentials(out, details, R: tl.constexpr, d, slope, width, weights, lifted, numbers, groups):
    """Those of one R at ``out``, and where details are wanted those of this R; ``lifted`` are multiplying weights of
    lifted targets."""
    SIDES: tl.constexpr = len(groups.BLOCKS)
    if groups.member.SPLIT:
        row, col, sums, by, residual = _couple(d, slope, weights, lifted, numbers, groups, 0, SIDES - 1)
        of_pos = _couple(d, slope, weights, lifted, numbers, groups, SIDES - 1, SIDES)
        rows, col, sums = (row, of_pos[0]), col + of_pos[1], sums + of_pos[2]
        by_positive, residual = of_pos[3], (residual + of_pos[4]) * 0.5
    else:
        row, col, sums, by, residual = _couple(d, slope, weights, lifted, numbers, groups, 0, SIDES)
        rows, by_positive = (row,), by
    store_sums(out, rows, col, sums, groups)
    if details is not None:
        sums_of_A = _sum_of_sides(sums, SIDES - 1) * by, sums[SIDES - 1][0] * by_positive
        _store_details(details, R, d, slope, width, weights, sums_of_A, residual, groups)
