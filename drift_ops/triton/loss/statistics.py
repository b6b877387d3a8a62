"""Statistics of both softmaxes for every R, and what else :mod:`.state` lists."""

import triton
import triton.language as tl

from ..group import one_of
from ..tiles import at_least, finite_shift
from .distances import find_distances
from .maps import find_map, points_of_group, weights_of_group
from .products import exponents_of, load_kept_distances, load_norms, load_origin_row, slot_of, store_head, store_tiles
from .state import distances_in, exponents_in, ready_for_softmax, slope_of, slot_of_state, statistics_of, weights_in

LEAST_TOTAL = tl.constexpr(2.0**-60)  # that sums may come to which are taken from one level


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
def _scale_targets(slot, norms, weights, BLOCKS: tl.constexpr):
    """Stores the exponents of targets and their weights when scaled, which it returns; 0 for the origin itself."""
    scaled = ()
    for side in tl.static_range(len(BLOCKS)):
        e = exponents_of(norms[side])
        tl.store(exponents_in(slot, BLOCKS, side), e)
        scaled = scaled + (tl.where(norms[side] == 0, 0.0, weights[side] * tl.exp2(-e)),)
        tl.store(weights_in(slot, BLOCKS, side), scaled[side])
    return scaled


@triton.jit
def _sums_by_row(A, weights, scaled):
    """Of weighted affinities to the targets of a side, and the largest to a scaled one."""
    return tl.sum(A * weights[None, :], 1), tl.max(A * tl.abs(scaled)[None, :], 1)


@triton.jit
def _store_sums_by_row(out, sums, N, BLOCKS: tl.constexpr):
    """``sums`` are those of :func:`_sums_by_row` for every side."""
    row = tl.arange(0, BLOCKS[0])
    negative, most_negative = sums[0]
    for side in tl.static_range(1, len(BLOCKS) - 1):
        negative += sums[side][0]
        most_negative = tl.maximum(most_negative, sums[side][1])
    positive, most_positive = sums[len(BLOCKS) - 1]
    largest = tl.maximum(most_negative * tl.abs(positive), most_positive * tl.abs(negative))
    tl.store(out + BLOCKS[0] + row, tl.where(row < N, negative, 0.0))
    tl.store(out + 2 * BLOCKS[0] + row, tl.where(row < N, positive, 0.0))
    tl.store(out + 3 * BLOCKS[0] + row, tl.where(row < N, largest, 0.0))


@triton.jit
def _store_from_one_level(out, E, level, row_total, col_totals, weights, scaled, least, N, BLOCKS: tl.constexpr):
    """Statistics of one R, from ``E = exp2(L − level)`` and its sums."""
    row = tl.arange(0, BLOCKS[0])
    tl.store(out + row, _half_logsumexp(level, row_total))
    by_row = tl.rsqrt(tl.where(row_total == 0, 1.0, row_total))
    of_columns = out + 4 * BLOCKS[0]
    sums = ()
    for side in tl.static_range(len(BLOCKS)):
        tl.store(of_columns + tl.arange(0, BLOCKS[side]), _half_logsumexp(level, col_totals[side]))
        of_columns += BLOCKS[side]
        by_column = tl.rsqrt(tl.where(col_totals[side] == 0, 1.0, col_totals[side]))
        A = at_least(E[side] * by_row[:, None] * by_column[None, :], least)
        sums = sums + (_sums_by_row(A, weights[side], scaled[side]),)
    _store_sums_by_row(out, sums, N, BLOCKS)


@triton.jit
def _store_from_levels(out, d, slope, weights, scaled, least, N, BLOCKS: tl.constexpr):
    """The same where logits are too far apart for one level: every row and column has its own."""
    row = tl.arange(0, BLOCKS[0])
    level = finite_shift(_least_by_row(d, BLOCKS) * slope)
    total = level * 0.0
    for side in tl.static_range(len(BLOCKS)):
        total += tl.sum(tl.exp2(d[side] * slope - level[:, None]), 1)
    row_half = _half_logsumexp(level, total)
    tl.store(out + row, row_half)
    of_columns = out + 4 * BLOCKS[0]
    sums = ()
    for side in tl.static_range(len(BLOCKS)):
        level = finite_shift(tl.min(d[side], 0) * slope)
        col_half = _half_logsumexp(level, tl.sum(tl.exp2(d[side] * slope - level[None, :]), 0))
        tl.store(of_columns + tl.arange(0, BLOCKS[side]), col_half)
        of_columns += BLOCKS[side]
        A = at_least(tl.exp2(d[side] * slope - (row_half[:, None] + col_half[None, :])), least)
        sums = sums + (_sums_by_row(A, weights[side], scaled[side]),)
    _store_sums_by_row(out, sums, N, BLOCKS)


@triton.jit
def statistics_kernel(
    groups,
    numbers,
    maps,
    weights,
    weight_strides,
    kept,  # see .products, or None
    state,  # see .state
    scale,  # [maps of the call]
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEEP: tl.constexpr,  # distances in the state
    ALIGNED: tl.constexpr,
):
    R: tl.constexpr = len(numbers.R_list)
    BLOCK_N: tl.constexpr = BLOCKS[0]
    n, place, g = find_map(maps, tl.program_id(0))
    scale = tl.load(scale + place).to(tl.float32)
    weights = weights_of_group(weights, weight_strides, groups.counts, maps, n, g, BLOCKS)
    slot = slot_of_state(one_of(state, n), g, R, BLOCKS, KEEP)
    if kept is None:
        rows = points_of_group(groups, maps, n, g, ALIGNED)
        d, norms, origin_row = find_distances(groups, rows, numbers.least_distance, BLOCKS, BLOCK_D)
    else:
        of_group = slot_of(one_of(kept, n), g, BLOCKS)
        norms, origin_row = load_norms(of_group, BLOCKS), load_origin_row(of_group)
        d = load_kept_distances(of_group, numbers.least_distance, 0, BLOCK_N, BLOCKS)
    store_head(slot, origin_row, origin_row * 0)
    scaled = _scale_targets(slot, norms, weights, BLOCKS)
    if KEEP:
        store_tiles(distances_in(slot, R, BLOCKS), d, BLOCKS)
    d = ready_for_softmax(d, scale, numbers, groups.counts, 0, BLOCK_N, BLOCKS)
    row, N = tl.arange(0, BLOCK_N), groups.counts[0]
    nearest = tl.min(_least_by_row(d, BLOCKS), 0)
    for r in range(R):  # not unrolled: the R would compete for registers
        slope = slope_of(scale, numbers, r)
        out = statistics_of(slot, r, BLOCKS)
        # With the largest of all logits for everyone's maximum, one exponential serves the row and the column.
        level = nearest * slope
        E = ()
        row_total = tl.zeros([BLOCK_N], dtype=tl.float32)
        for side in tl.static_range(len(BLOCKS)):
            E = E + (tl.exp2(d[side] * slope - level),)
            row_total += tl.sum(E[side], 1)
        smallest = tl.min(tl.where(row < N, row_total, 1.0), 0)
        col_totals = ()
        for side in tl.static_range(len(BLOCKS)):
            col_totals = col_totals + (tl.sum(E[side], 0),)
            exists = tl.arange(0, BLOCKS[side]) < groups.counts[side]
            smallest = tl.minimum(smallest, tl.min(tl.where(exists, col_totals[side], 1.0), 0))
        if smallest > LEAST_TOTAL:
            _store_from_one_level(out, E, level, row_total, col_totals, weights, scaled, numbers.least, N, BLOCKS)
        else:
            _store_from_levels(out, d, slope, weights, scaled, numbers.least, N, BLOCKS)
