"""Statistics of both softmaxes for every R, and the coefficients of the forces.

With the statistics a coefficient takes one exponential and no look at other pairs. Of a group: its exponent and the row
of its origin, in HEAD floats, then for each R by row the half of the softmax's log-sum, the sums of weighted affinities
to negatives and to positives, and by column the half log-sum; then the distances if these are kept.
"""

import triton
import triton.language as tl

from ..group import one_of
from ..halves import exponent, split
from ..tiles import at_least, finite_shift, load_vector, pairs_within, self_pairs
from .kept import HEAD, load_head, load_kept_distances, slot_of, store_head, store_tiles
from .points import distances_of_points, find_map, rows_of_group

LOG2_E = tl.constexpr(1.4426950408889634)
SELF_DISTANCE = tl.constexpr(100.0)  # added to the self pairs, in units of the scale
LEAST_TOTAL = tl.constexpr(2.0**-60)  # that sums may come to which are taken from one level


@triton.jit
def statistics_of(state, g, r, R, BLOCKS: tl.constexpr, KEEP: tl.constexpr):
    """Where those of the r-th of R start; for r = R, where distances do."""
    floats = 3 * BLOCKS[0]
    pairs = 0
    for side in tl.static_range(len(BLOCKS)):
        floats += BLOCKS[side]
        if KEEP:
            pairs += BLOCKS[0] * BLOCKS[side]
    return state + g * (HEAD + R * floats + pairs) + HEAD + r * floats


@triton.jit
def ready_for_softmax(d, scale, counts, BLOCKS: tl.constexpr):
    """Distances with 100 units added to self pairs, and infinite where there is no pair."""
    ready = ()
    for side in tl.static_range(len(BLOCKS)):
        of_side = d[side]
        if side == 0:
            further = SELF_DISTANCE * tl.maximum(scale, 1e-3)
            of_side += tl.where(self_pairs(0, BLOCKS[0], BLOCKS[0]), further, 0.0)
        exists = pairs_within(counts[0], counts[side], BLOCKS[0], BLOCKS[side])
        ready = ready + (tl.where(exists, of_side, float("inf")),)
    return ready


@triton.jit
def slope_of(scale, R):
    """Of the logits to the base 2 over d: ``L = −δ/R``, where ``δ = d/max(scale, 1e-3)``."""
    return -LOG2_E / (R * tl.maximum(scale, 1e-3))


@triton.jit
def _half_logsumexp(top, total):
    """To the base 2; infinite where nothing is unmasked. With these r and c, ``A_ij = exp2(L_ij − r_i − c_j)``."""
    return tl.where(total == 0, float("inf"), 0.5 * (top + tl.log2(tl.where(total == 0, 1.0, total))))


@triton.jit
def _least_by_row(d, BLOCKS: tl.constexpr):
    BLOCK_N: tl.constexpr = BLOCKS[0]
    least = tl.full([BLOCK_N], float("inf"), dtype=tl.float32)
    for side in tl.static_range(len(BLOCKS)):
        least = tl.minimum(least, tl.min(d[side], 1))
    return least


@triton.jit
def _store_sums(out, E, level, row_total, col_totals, weights, least, counts, BLOCKS: tl.constexpr):
    """Statistics of one R, from ``E = exp2(L − level)`` and its sums."""
    BLOCK_N: tl.constexpr = BLOCKS[0]
    row = tl.arange(0, BLOCK_N)
    tl.store(out + row, _half_logsumexp(level, row_total))
    by_row = tl.rsqrt(tl.where(row_total == 0, 1.0, row_total))
    negative = tl.zeros([BLOCK_N], dtype=tl.float32)
    positive = tl.zeros([BLOCK_N], dtype=tl.float32)
    of_columns = out + 3 * BLOCK_N
    for side in tl.static_range(len(BLOCKS)):
        column = tl.arange(0, BLOCKS[side])
        tl.store(of_columns + column, _half_logsumexp(level, col_totals[side]))
        of_columns += BLOCKS[side]
        by_column = tl.rsqrt(tl.where(col_totals[side] == 0, 1.0, col_totals[side]))
        A = at_least(E[side] * by_row[:, None] * by_column[None, :], least)
        w = load_vector(weights[side], counts[side], 0, BLOCKS[side])  # 0 in columns that do not exist
        weighted = tl.sum(A * w[None, :], 1)
        if side < len(BLOCKS) - 1:
            negative += weighted
        else:
            positive += weighted
    tl.store(out + BLOCK_N + row, tl.where(row < counts[0], negative, 0.0))
    tl.store(out + 2 * BLOCK_N + row, tl.where(row < counts[0], positive, 0.0))


@triton.jit
def _store_sums_of_far_apart(out, d, slope, weights, least, counts, BLOCKS: tl.constexpr):
    """The same where logits are too far apart for one level: every row and column has its own."""
    BLOCK_N: tl.constexpr = BLOCKS[0]
    row = tl.arange(0, BLOCK_N)
    level = finite_shift(_least_by_row(d, BLOCKS) * slope)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    for side in tl.static_range(len(BLOCKS)):
        total += tl.sum(tl.exp2(d[side] * slope - level[:, None]), 1)
    row_half = _half_logsumexp(level, total)
    tl.store(out + row, row_half)
    negative = tl.zeros([BLOCK_N], dtype=tl.float32)
    positive = tl.zeros([BLOCK_N], dtype=tl.float32)
    of_columns = out + 3 * BLOCK_N
    for side in tl.static_range(len(BLOCKS)):
        level = finite_shift(tl.min(d[side], 0) * slope)
        col_half = _half_logsumexp(level, tl.sum(tl.exp2(d[side] * slope - level[None, :]), 0))
        tl.store(of_columns + tl.arange(0, BLOCKS[side]), col_half)
        of_columns += BLOCKS[side]
        A = at_least(tl.exp2(d[side] * slope - (row_half[:, None] + col_half[None, :])), least)
        w = load_vector(weights[side], counts[side], 0, BLOCKS[side])
        weighted = tl.sum(A * w[None, :], 1)
        if side < len(BLOCKS) - 1:
            negative += weighted
        else:
            positive += weighted
    tl.store(out + BLOCK_N + row, tl.where(row < counts[0], negative, 0.0))
    tl.store(out + 2 * BLOCK_N + row, tl.where(row < counts[0], positive, 0.0))


@triton.jit
def statistics_kernel(
    maps,  # see .points.find_map
    points,
    weights,
    kept,  # or None
    state,  # see above
    scale,  # [maps of the call]
    R_list,
    counts,
    D,
    least,
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    SPLIT: tl.constexpr,
    LONG: tl.constexpr,
    KEEP: tl.constexpr,  # distances in the state
):
    BLOCK_N: tl.constexpr = BLOCKS[0]
    n, place, g = find_map(maps, tl.program_id(0))
    scale = tl.load(scale + place).to(tl.float32)
    points = rows_of_group(points, n, counts, D, g)
    weights = rows_of_group(weights, n, counts, 1, g)
    state = one_of(state, n)
    if kept is None:
        d, e, origin_row = distances_of_points(points, counts, None, None, D, BLOCKS, BLOCK_D, DIFFERENCES, SPLIT, LONG)
    else:
        slot = slot_of(one_of(kept, n), g, BLOCKS)
        e, origin_row = load_head(slot)
        d = load_kept_distances(slot, BLOCKS)
    store_head(statistics_of(state, g, 0, len(R_list), BLOCKS, KEEP) - HEAD, e, origin_row, origin_row * 0)
    if KEEP:
        store_tiles(statistics_of(state, g, len(R_list), len(R_list), BLOCKS, KEEP), d, BLOCKS)
    d = ready_for_softmax(d, scale, counts, BLOCKS)
    row = tl.arange(0, BLOCK_N)
    least_distance = tl.min(_least_by_row(d, BLOCKS), 0)
    for r in range(len(R_list)):  # not unrolled: the R would compete for registers
        slope = slope_of(scale, one_of(R_list, r))
        out = statistics_of(state, g, r, len(R_list), BLOCKS, KEEP)
        # With the largest of all logits for everyone's maximum, one exponential serves the row and the column.
        level = least_distance * slope
        E = ()
        row_total = tl.zeros([BLOCK_N], dtype=tl.float32)
        for side in tl.static_range(len(BLOCKS)):
            E = E + (tl.exp2(d[side] * slope - level),)
            row_total += tl.sum(E[side], 1)
        smallest = tl.min(tl.where(row < counts[0], row_total, 1.0), 0)
        col_totals = ()
        for side in tl.static_range(len(BLOCKS)):
            col_totals = col_totals + (tl.sum(E[side], 0),)
            exists = tl.arange(0, BLOCKS[side]) < counts[side]
            smallest = tl.minimum(smallest, tl.min(tl.where(exists, col_totals[side], 1.0), 0))
        if smallest > LEAST_TOTAL:
            _store_sums(out, E, level, row_total, col_totals, weights, least, counts, BLOCKS)
        else:
            _store_sums_of_far_apart(out, d, slope, weights, least, counts, BLOCKS)


@triton.jit
def coefficients(d, statistics, slope, factor, weights, least, counts, BLOCKS: tl.constexpr):
    """``factor`` times ``c⁻_ij = −A⁻_ij Σ⁺_i`` and ``c⁺_ij = A⁺_ij Σ⁻_i`` of an R, a tuple over the sides.

    0 where there is no target, whatever where there is no row. And their bound, ``factor Σ⁺_i Σ⁻_i`` [N].
    """
    BLOCK_N: tl.constexpr = BLOCKS[0]
    row = tl.arange(0, BLOCK_N)
    row_half = tl.load(statistics + row)
    negative = tl.load(statistics + BLOCK_N + row) * factor
    positive = tl.load(statistics + 2 * BLOCK_N + row)
    of_columns = statistics + 3 * BLOCK_N
    c = ()
    for side in tl.static_range(len(BLOCKS)):
        col_half = tl.load(of_columns + tl.arange(0, BLOCKS[side]))
        of_columns += BLOCKS[side]
        A = at_least(tl.exp2(d[side] * slope - (row_half[:, None] + col_half[None, :])), least)
        A *= load_vector(weights[side], counts[side], 0, BLOCKS[side])[None, :]  # 0 in columns that do not exist
        if side < len(BLOCKS) - 1:
            c = c + (A * (positive * -factor)[:, None],)
        else:
            c = c + (A * negative[:, None],)
    return c, negative * positive


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
