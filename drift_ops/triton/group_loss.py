"""Form C for many groups: each program owns one, and its distances stay in registers.

Two scalars over all groups part the work, the scale and λ. Four kernels:

- scale: distances, walking the points once, and their mean. Where it takes less memory than the gradient will, products
  of all targets are kept; otherwise distances are worked out again by those that need them.
- statistics: of both softmaxes and the sums of affinities, for every R, from distances. With them a coefficient of a
  force takes one exponential and no look at other pairs.
- moments: products of the forces. Those are weighted sums of the targets, so that the products of the targets are all
  they take (``gram moments``); where those are not kept, the sums for each R come from a second walk (``moments``).
- gradient: distances once more, the coefficients of all R together, one weighted sum.

The targets ``[gen, neg, pos]`` are not concatenated: a group's *sides* are gen, neg (unless it is empty) and pos, each
a tile of its own, ``[N, count]`` padded to powers of two. Points, weights and counts come as tuples over the sides.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import group, launch
from .group import one_of, zeros
from .halves import add_product, exponent, split
from .tiles import (
    CLOSE,
    DIFFERENCES_UP_TO,
    at_least,
    finite_shift,
    load_rows,
    load_vector,
    pairs_within,
    roots,
    self_pairs,
    squared_differences,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST_DISTANCE = tl.constexpr(1e-4)
SELF_DISTANCE = tl.constexpr(100.0)  # added to the self pairs, in units of the scale
CHAIN_UP_TO = 256  # dimensions, of whose products the tensor cores' sum drifts by a few float32 roundings only
HEADROOM = tl.constexpr(5)  # bits by which an entry may exceed those that the exponent was taken from
MOST_SQUARED = tl.constexpr(65504.0**2)  # of float16
LEAST_TOTAL = tl.constexpr(2.0**-60)  # that sums may come to which are taken from one level
PROGRAMS = 1024  # that fill a GPU of today; where there are fewer groups, several programs share one
LEAST_SHARE = 256  # dimensions of a program then, at least
HEAD = tl.constexpr(32)  # floats for the exponent and the row of the origin of a group


@triton.jit
def _of_group(arrays, counts, width, g):
    """Pointers to the rows of group g of ``[G, count, width]`` arrays."""
    rows = ()
    for side in tl.static_range(len(arrays)):
        rows = rows + (arrays[side] + g * counts[side] * width,)
    return rows


@triton.jit
def _load_centred(points, count, centre, start, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Dimensions [start, start + BLOCK_D) of rows [0, count) about the row ``centre``; zero where there is nothing."""
    x = load_rows(points, count, start, D, BLOCK, BLOCK_D) - load_vector(centre, D, start, BLOCK_D)[None, :]
    return tl.where(tl.arange(0, BLOCK)[:, None] < count, x, 0.0)


@triton.jit
def _find_origin(gen, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The row of the generated sample nearest to their mean in the first dimensions: not a far outlier, which would be
    an origin away from the rest, where the rest would lose digits."""
    x = load_rows(gen, N, 0, D, BLOCK_N, BLOCK_D)
    mean = tl.sum(x, 0) / N
    distance = tl.sum(tl.abs(x - mean[None, :]), 1)
    distance = tl.where((tl.arange(0, BLOCK_N) < N) & (distance == distance), distance, float("inf"))
    return tl.minimum(tl.argmin(distance, 0), N - 1)


@triton.jit
def _largest(points, counts, origin, end, D, BLOCKS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of the entries of all sides about the origin, in dimensions [0, end)."""
    largest = 0.0
    for start in range(0, end, BLOCK_D):
        for side in tl.static_range(len(BLOCKS)):
            x = _load_centred(points[side], counts[side], origin, start, D, BLOCKS[side], BLOCK_D)
            largest = tl.maximum(largest, tl.max(tl.abs(x)))
    return largest


@triton.jit
def _nothing_yet(BLOCKS: tl.constexpr, ALL: tl.constexpr):
    """Zeros for products, of gen and every side, and of the other sides, rows of the later, if ALL; and for norms."""
    products = ()
    norms = ()
    for side in tl.static_range(len(BLOCKS)):
        products = products + (zeros(BLOCKS[0], BLOCKS[side]),)
        norms = norms + (tl.sum(products[side], 0),)
    if ALL:
        for later in tl.static_range(1, len(BLOCKS)):
            for side in tl.static_range(1, later + 1):
                products = products + (zeros(BLOCKS[later], BLOCKS[side]),)
    return products, norms


@triton.jit
def _products(
    points,
    counts,
    origin,
    e,
    D,
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    LONG: tl.constexpr,
    ALL: tl.constexpr,
):
    """Products of points about the origin, as :func:`_nothing_yet` lists them, and squared norms."""
    products, norms = _nothing_yet(BLOCKS, ALL)
    up = tl.exp2(e)
    for start in range(0, D, BLOCK_D):
        hi = ()
        lo = ()
        more_norms = ()
        for side in tl.static_range(len(BLOCKS)):
            x = _load_centred(points[side], counts[side], origin, start, D, BLOCKS[side], BLOCK_D)
            parts = split(x * up)
            hi = hi + (parts[0],)
            lo = lo + (parts[1],)
            more_norms = more_norms + (norms[side] + tl.sum(x * x, 1),)
        more = ()
        for side in tl.static_range(len(BLOCKS)):
            more = more + (
                add_product(products[side], hi[0], lo[0], tl.trans(hi[side]), tl.trans(lo[side]), SPLIT, LONG),
            )
        if ALL:
            for later in tl.static_range(1, len(BLOCKS)):
                for side in tl.static_range(1, later + 1):
                    y_hi, y_lo = tl.trans(hi[side]), tl.trans(lo[side])
                    more = more + (add_product(products[len(more)], hi[later], lo[later], y_hi, y_lo, SPLIT, LONG),)
        products = more
        norms = more_norms
    down = tl.exp2(-2 * e)
    scaled = ()
    for n in tl.static_range(len(products)):
        scaled = scaled + (products[n] * down,)
    return scaled, norms


@triton.jit
def _may_overflow(norms, e, BLOCKS: tl.constexpr):
    """Whether an entry may be too large for its exponent, as far as squared norms can tell; not if one is NaN."""
    largest = 0.0
    for side in tl.static_range(len(BLOCKS)):
        largest = tl.maximum(largest, tl.max(norms[side]))
    return largest * tl.exp2(2 * e) > MOST_SQUARED


@triton.jit
def _squares_from_products(products, norms, points, counts, D, BLOCKS: tl.constexpr):
    """Squared distances of gen to every side, from products, or from differences where the tile holds a close pair; and
    whether any does."""
    found = ()
    any_close = 0
    for side in tl.static_range(len(BLOCKS)):
        both = norms[0][:, None] + norms[side][None, :]
        squared = both - 2 * products[side]
        margin = tl.where(pairs_within(counts[0], counts[side], BLOCKS[0], BLOCKS[side]), squared - both * CLOSE, 0.0)
        if side == 0:
            margin = tl.where(self_pairs(0, BLOCKS[0], BLOCKS[0]), 0.0, margin)
        of_side = (tl.min(margin) < 0).to(tl.int32)
        if of_side > 0:
            squared = squared_differences(points[0], points[side], counts[0], counts[side], D, BLOCKS[0], BLOCKS[side])
        any_close = tl.maximum(any_close, of_side)
        found = found + (squared,)
    return found, any_close


@triton.jit
def _products_and_exponent(
    points,
    counts,
    origin,
    D,
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    LONG: tl.constexpr,
    ALL: tl.constexpr,
):
    """See :func:`_products`; and the exponent of the points."""
    e = exponent(_largest(points, counts, origin, BLOCK_D, D, BLOCKS, BLOCK_D)) - HEADROOM
    products, norms = _nothing_yet(BLOCKS, ALL)
    turns = 2
    while turns > 0:
        products, norms = _products(points, counts, origin, e, D, BLOCKS, BLOCK_D, SPLIT, LONG, ALL)
        turns = tl.where(_may_overflow(norms, e, BLOCKS), turns - 1, 0)
        if turns > 0:
            e = exponent(_largest(points, counts, origin, D, D, BLOCKS, BLOCK_D)) - 1
    return products, norms, e


@triton.jit
def _distances(squares, BLOCKS: tl.constexpr):
    """``max(‖x_i − t_j‖, LEAST_DISTANCE)``, a tuple over the sides."""
    d = ()
    for side in tl.static_range(len(BLOCKS)):
        d = d + (roots(squares[side], LEAST_DISTANCE, 0, side == 0, BLOCKS[0], BLOCKS[side]),)
    return d


@triton.jit
def _distances_of_points(
    points,
    counts,
    e,
    origin_row,
    D,
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    SPLIT: tl.constexpr,
    LONG: tl.constexpr,
):
    """Distances of gen to every side, a tuple of ``[BLOCKS[0], BLOCKS[side]]``; the exponent of the points and the row
    of their origin, found unless they are given."""
    if origin_row is None:
        origin_row = _find_origin(points[0], counts[0], D, BLOCKS[0], BLOCK_D)
    origin = points[0] + origin_row * D
    if DIFFERENCES:
        squares = ()
        for side in tl.static_range(len(BLOCKS)):
            squares = squares + (
                squared_differences(points[0], points[side], counts[0], counts[side], D, BLOCKS[0], BLOCKS[side]),
            )
        if e is None:
            e = exponent(_largest(points, counts, origin, D, D, BLOCKS, BLOCK_D)) - 1
    else:
        if e is None:
            products, norms, e = _products_and_exponent(points, counts, origin, D, BLOCKS, BLOCK_D, SPLIT, LONG, False)
        else:
            products, norms = _products(points, counts, origin, e, D, BLOCKS, BLOCK_D, SPLIT, LONG, False)
        squares, _ = _squares_from_products(products, norms, points, counts, D, BLOCKS)
    return _distances(squares, BLOCKS), e, origin_row


# What is kept of a group: its exponent, the row of its origin and whether pairs are close, in HEAD floats; by target
# its squared norm, a power of two that brings its length to [2^6, 2^7), the inverse of that, and its weight times that;
# products of gen and every side, or squared distances where pairs are close; and products of the other sides with each
# other, so scaled, in two parts. With close pairs the forces may be much shorter than the targets, and too little would
# be left of products that cancel: the moments of such a group come from its points.


@triton.jit
def _slot(kept, g, BLOCKS: tl.constexpr):
    floats = _pairs_of(HEAD, BLOCKS)
    for later in tl.static_range(len(BLOCKS)):
        for side in tl.static_range(later + 1):
            floats += BLOCKS[later] * BLOCKS[side]
    return kept + g * floats


@triton.jit
def _pairs_of(slot, BLOCKS: tl.constexpr):
    """Where the pairs start, after head and vectors."""
    for side in tl.static_range(len(BLOCKS)):
        slot += 4 * BLOCKS[side]
    return slot


@triton.jit
def _vector(slot, kind: tl.constexpr, BLOCKS: tl.constexpr, side: tl.constexpr):
    """Of the targets of a side: 0 squared norms, 1 scales, 2 their inverses, 3 weights over scales."""
    slot += HEAD + kind * BLOCKS[side]
    for before in tl.static_range(side):
        slot += 4 * BLOCKS[before]
    return slot + tl.arange(0, BLOCKS[side])


@triton.jit
def _store_head(slot, e, origin_row):
    tl.store(slot, e)
    tl.store(slot + 1, origin_row.to(tl.float32))


@triton.jit
def _load_head(slot):
    return tl.load(slot), tl.load(slot + 1).to(tl.int32)


@triton.jit
def _has_close(slot):
    return tl.load(slot + 2) > 0


@triton.jit
def _tile(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of a tile."""
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _keep(slot, norms, squares, products, any_close, weights, counts, BLOCKS: tl.constexpr):
    tl.store(slot + 2, any_close.to(tl.float32))
    scales = ()
    for side in tl.static_range(len(BLOCKS)):
        e = exponent(tl.sqrt(norms[side])) - 7
        exists = norms[side] > 0
        scales = scales + (tl.where(exists, tl.exp2(e), 0.0),)
        weight = load_vector(weights[side], counts[side], 0, BLOCKS[side])
        tl.store(_vector(slot, 0, BLOCKS, side), norms[side])
        tl.store(_vector(slot, 1, BLOCKS, side), scales[side])
        inverse = tl.where(exists, tl.exp2(-e), 0.0)
        tl.store(_vector(slot, 2, BLOCKS, side), inverse)
        tl.store(_vector(slot, 3, BLOCKS, side), weight * inverse)
    slot = _pairs_of(slot + HEAD, BLOCKS)
    pairs = ()
    for side in tl.static_range(len(BLOCKS)):
        pairs = pairs + (tl.where(any_close > 0, squares[side], products[side]),)
    _store_tiles(slot, pairs, BLOCKS)
    for side in tl.static_range(len(BLOCKS)):
        slot += BLOCKS[0] * BLOCKS[side]
    for later in tl.static_range(1, len(BLOCKS)):
        for side in tl.static_range(1, later + 1):
            product = products[len(BLOCKS) + later * (later - 1) // 2 + side - 1]
            hi, lo = split(product * scales[later][:, None] * scales[side][None, :])
            halves = slot.to(tl.pointer_type(tl.float16)) + _tile(BLOCKS[later], BLOCKS[side])
            tl.store(halves, hi)
            tl.store(halves + BLOCKS[later] * BLOCKS[side], lo)
            slot += BLOCKS[later] * BLOCKS[side]


@triton.jit
def _zero_product(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros in the registers where a product leaves its result: what they are subtracted from moves there, once."""
    return tl.dot(tl.zeros([ROWS, 16], dtype=tl.float16), tl.zeros([16, COLUMNS], dtype=tl.float16))


@triton.jit
def _store_tiles(place, tiles, BLOCKS: tl.constexpr):
    """Of gen and every side, after each other."""
    for side in tl.static_range(len(BLOCKS)):
        tl.store(place + _tile(BLOCKS[0], BLOCKS[side]), tiles[side])
        place += BLOCKS[0] * BLOCKS[side]


@triton.jit
def _load_tiles(place, BLOCKS: tl.constexpr):
    tiles = ()
    for side in tl.static_range(len(BLOCKS)):
        tiles = tiles + (tl.load(place + _tile(BLOCKS[0], BLOCKS[side])),)
        place += BLOCKS[0] * BLOCKS[side]
    return tiles


@triton.jit
def _load_distances(slot, BLOCKS: tl.constexpr):
    pairs = _load_tiles(_pairs_of(slot + HEAD, BLOCKS), BLOCKS)
    norms = _load_norms(slot, BLOCKS)
    close = _has_close(slot)
    squares = ()
    for side in tl.static_range(len(BLOCKS)):
        from_products = norms[0][:, None] + norms[side][None, :] - 2 * pairs[side]
        squares = squares + (tl.where(close, pairs[side], from_products),)
    return _distances(squares, BLOCKS)


@triton.jit
def _load_norms(slot, BLOCKS: tl.constexpr):
    norms = ()
    for side in tl.static_range(len(BLOCKS)):
        norms = norms + (tl.load(_vector(slot, 0, BLOCKS, side)),)
    return norms


@triton.jit
def _scale_kernel(
    points,
    weights,
    means,  # [G, 2]: mean d·w, mean w
    kept,  # see above, or None
    counts,
    D,
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    SPLIT: tl.constexpr,
    LONG: tl.constexpr,
):
    BLOCK_N: tl.constexpr = BLOCKS[0]
    g = tl.program_id(0).to(tl.int64)
    points = _of_group(points, counts, D, g)
    weights = _of_group(weights, counts, 1, g)
    if kept is None:
        d, e, origin_row = _distances_of_points(
            points, counts, None, None, D, BLOCKS, BLOCK_D, DIFFERENCES, SPLIT, LONG
        )
    else:
        origin_row = _find_origin(points[0], counts[0], D, BLOCKS[0], BLOCK_D)
        origin = points[0] + origin_row * D
        products, norms, e = _products_and_exponent(points, counts, origin, D, BLOCKS, BLOCK_D, SPLIT, LONG, True)
        squares, any_close = _squares_from_products(products, norms, points, counts, D, BLOCKS)
        slot = _slot(kept, g, BLOCKS)
        _store_head(slot, e, origin_row)
        _keep(slot, norms, squares, products, any_close, weights, counts, BLOCKS)
        d = _distances(squares, BLOCKS)
    exists = tl.arange(0, BLOCKS[0])[:, None] < counts[0]
    of_rows = tl.zeros([BLOCK_N], dtype=tl.float32)
    total_weight = 0.0
    targets = 0
    for side in tl.static_range(len(BLOCKS)):
        w = load_vector(weights[side], counts[side], 0, BLOCKS[side])
        of_rows += tl.sum(tl.where(exists, d[side] * w[None, :], 0.0), 1)
        total_weight += tl.sum(w)
        targets += counts[side]
    tl.store(means + 2 * g, tl.sum(of_rows) / (counts[0] * targets))
    tl.store(means + 2 * g + 1, total_weight / targets)


# Statistics of a group: its exponent and the row of its origin, in HEAD floats, then for each R by row the half of the
# softmax's log-sum, the sums of weighted affinities to negatives and to positives, and by column the half log-sum; then
# the distances if these are kept.


@triton.jit
def _statistics_of(state, g, r, R, BLOCKS: tl.constexpr, KEEP: tl.constexpr):
    """Where those of the r-th of R start; for r = R, where distances do."""
    floats = 3 * BLOCKS[0]
    pairs = 0
    for side in tl.static_range(len(BLOCKS)):
        floats += BLOCKS[side]
        if KEEP:
            pairs += BLOCKS[0] * BLOCKS[side]
    return state + g * (HEAD + R * floats + pairs) + HEAD + r * floats


@triton.jit
def _ready_for_softmax(d, scale, counts, BLOCKS: tl.constexpr):
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
def _slope(scale, R):
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
def _statistics_kernel(
    points,
    weights,
    kept,  # or None
    state,  # see above
    scale,
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
    g = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale).to(tl.float32)
    points = _of_group(points, counts, D, g)
    weights = _of_group(weights, counts, 1, g)
    if kept is None:
        d, e, origin_row = _distances_of_points(
            points, counts, None, None, D, BLOCKS, BLOCK_D, DIFFERENCES, SPLIT, LONG
        )
    else:
        slot = _slot(kept, g, BLOCKS)
        e, origin_row = _load_head(slot)
        d = _load_distances(slot, BLOCKS)
    _store_head(_statistics_of(state, g, 0, len(R_list), BLOCKS, KEEP) - HEAD, e, origin_row)
    if KEEP:
        _store_tiles(_statistics_of(state, g, len(R_list), len(R_list), BLOCKS, KEEP), d, BLOCKS)
    d = _ready_for_softmax(d, scale, counts, BLOCKS)
    row = tl.arange(0, BLOCK_N)
    least_distance = tl.min(_least_by_row(d, BLOCKS), 0)
    for r in range(len(R_list)):  # not unrolled: the R would compete for registers
        slope = _slope(scale, one_of(R_list, r))
        out = _statistics_of(state, g, r, len(R_list), BLOCKS, KEEP)
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
def _coefficients(d, statistics, slope, factor, weights, least, counts, BLOCKS: tl.constexpr):
    """``factor`` times ``c⁻_ij = −A⁻_ij Σ⁺_i`` and ``c⁺_ij = A⁺_ij Σ⁻_i`` of an R, a tuple over the sides, 0 where there
    is no pair; and their bound, ``factor Σ⁺_i Σ⁻_i`` [N]."""
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
def _split_rows(c, bound, BLOCKS: tl.constexpr):
    """The two parts of coefficients, tuples over the sides, with an exponent for each row; and 2^-exponent [N]."""
    e = exponent(bound)
    hi = ()
    lo = ()
    for side in tl.static_range(len(BLOCKS)):
        parts = split(c[side] * tl.exp2(e)[:, None])
        hi = hi + (parts[0],)
        lo = lo + (parts[1],)
    return hi, lo, tl.exp2(-e)


@triton.jit
def _moments_of_points(
    g,
    points,
    weights,
    kept,
    state,
    scale,
    R_list,
    moments,
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
    """Of one group, from weighted sums of its targets."""
    BLOCK_N: tl.constexpr = BLOCKS[0]
    scale = tl.load(scale).to(tl.float32)
    points = _of_group(points, counts, D, g)
    weights = _of_group(weights, counts, 1, g)
    e, origin_row = _load_head(_statistics_of(state, g, 0, len(R_list), BLOCKS, KEEP) - HEAD)
    if kept is None:
        d, _, _ = _distances_of_points(points, counts, e, origin_row, D, BLOCKS, BLOCK_D, DIFFERENCES, SPLIT, LONG)
    else:
        d = _load_distances(_slot(kept, g, BLOCKS), BLOCKS)
    d = _ready_for_softmax(d, scale, counts, BLOCKS)
    tables = ()  # of the coefficients of each R
    sums = ()  # of F_r·F_r' over the dimensions, for r' <= r: [N] each
    for r in tl.static_range(len(R_list)):
        statistics = _statistics_of(state, g, r, len(R_list), BLOCKS, KEEP)
        c, bound = _coefficients(d, statistics, _slope(scale, R_list[r]), 1.0, weights, least, counts, BLOCKS)
        tables = tables + (_split_rows(c, bound, BLOCKS),)
        for _ in tl.static_range(r + 1):
            sums = sums + (tl.zeros([BLOCK_N], dtype=tl.float32),)
    centre = points[0] + origin_row * D
    up = tl.exp2(e)
    for start in range(0, D, BLOCK_SUM):
        F = ()
        for _ in tl.static_range(len(R_list)):
            F = F + (zeros(BLOCKS[0], BLOCK_SUM),)
        for side in tl.static_range(len(BLOCKS)):
            t = _load_centred(points[side], counts[side], centre, start, D, BLOCKS[side], BLOCK_SUM)
            t_hi, t_lo = split(t * up)
            more = ()
            for r in tl.static_range(len(R_list)):
                more = more + (add_product(F[r], tables[r][0][side], tables[r][1][side], t_hi, t_lo, SPLIT, False),)
            F = more
        added = ()
        for r in tl.static_range(len(R_list)):
            for other in tl.static_range(r + 1):
                added = added + (sums[r * (r + 1) // 2 + other] + tl.sum(F[r] * F[other], 1),)
        sums = added

    unit = tl.maximum(scale / tl.sqrt(D * 1.0), 1e-3)
    by = tl.exp2(-2 * e) / (unit * unit * (counts[0] * 1.0) * (D * 1.0))
    moments += g * len(R_list) * len(R_list)
    for r in tl.static_range(len(R_list)):
        for other in tl.static_range(r + 1):
            moment = tl.sum(sums[r * (r + 1) // 2 + other] * tables[r][2] * tables[other][2]) * by
            tl.store(moments + r * len(R_list) + other, moment)
            tl.store(moments + other * len(R_list) + r, moment)


@triton.jit
def _moments_kernel(
    points,
    weights,
    kept,  # or None
    state,
    scale,
    R_list,
    moments,  # [G, R, R]
    G,
    counts,
    D,
    least,
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    SPLIT: tl.constexpr,
    LONG: tl.constexpr,
    GROUPS: tl.constexpr,  # of a program
    KEEP: tl.constexpr,  # distances in the state
):
    """Of all groups, or if products are kept, of those with close pairs."""
    first = tl.program_id(0).to(tl.int64) * GROUPS
    for g in range(first, tl.minimum(first + GROUPS, G)):
        wanted = True
        if kept is not None:
            wanted = _has_close(_slot(kept, g, BLOCKS))
        if wanted:
            _moments_of_points(
                g,
                points,
                weights,
                kept,
                state,
                scale,
                R_list,
                moments,
                counts,
                D,
                least,
                BLOCKS,
                BLOCK_D,
                BLOCK_SUM,
                DIFFERENCES,
                SPLIT,
                LONG,
                KEEP,
            )


@triton.jit
def _load_gram(slot, products, BLOCKS: tl.constexpr):
    """Products of all targets, those of gen given, between targets scaled to lengths in [2^6, 2^7): two parts of each,
    as :func:`_nothing_yet` lists them."""
    hi = ()
    lo = ()
    scale = tl.load(_vector(slot, 1, BLOCKS, 0))
    for side in tl.static_range(len(BLOCKS)):
        parts = split(products[side] * scale[:, None] * tl.load(_vector(slot, 1, BLOCKS, side))[None, :])
        hi = hi + (parts[0],)
        lo = lo + (parts[1],)
    slot = _pairs_of(slot + HEAD, BLOCKS)
    for side in tl.static_range(len(BLOCKS)):
        slot += BLOCKS[0] * BLOCKS[side]
    for later in tl.static_range(1, len(BLOCKS)):
        for side in tl.static_range(1, later + 1):
            halves = slot.to(tl.pointer_type(tl.float16)) + _tile(BLOCKS[later], BLOCKS[side])
            hi = hi + (tl.load(halves),)
            lo = lo + (tl.load(halves + BLOCKS[later] * BLOCKS[side]),)
            slot += BLOCKS[later] * BLOCKS[side]
    return hi, lo


@triton.jit
def _of_sides(gram, a: tl.constexpr, b: tl.constexpr, SIDES: tl.constexpr):
    """The tile of the Gram matrix with rows of side a and columns of side b."""
    if a == 0:
        return gram[b]
    elif b == 0:
        return tl.trans(gram[a])
    elif a < b:
        return tl.trans(gram[SIDES + b * (b - 1) // 2 + a - 1])
    else:
        return gram[SIDES + a * (a - 1) // 2 + b - 1]


@triton.jit
def _statistics_by_row(statistics, BLOCK_N: tl.constexpr):
    row = tl.arange(0, BLOCK_N)
    negative = tl.load(statistics + BLOCK_N + row)
    positive = tl.load(statistics + 2 * BLOCK_N + row)
    return tl.load(statistics + row), negative, positive


@triton.jit
def _affinities(d, slot, statistics, row_half, slope, least, BLOCKS: tl.constexpr, side: tl.constexpr):
    """``weight_j max(A_ij, least)``, of weights over scales, for d with SELF_DISTANCE in it; 0 where there is no
    target, whose weight is 0, and finite where there is no row."""
    of_columns = statistics + 3 * BLOCKS[0]
    for before in tl.static_range(side):
        of_columns += BLOCKS[before]
    col_half = tl.load(of_columns + tl.arange(0, BLOCKS[side]))
    A = tl.exp2(d[side] * slope - row_half[:, None] - col_half[None, :])
    weight = tl.load(_vector(slot, 3, BLOCKS, side))
    return at_least(A, least) * weight[None, :]


@triton.jit
def _of_targets(hi, lo, gram_hi, gram_lo, SPLIT: tl.constexpr, BLOCKS: tl.constexpr, b: tl.constexpr):
    """``Σ_j c_ij t_j·t_k`` for targets k of side b, the small parts first."""
    total = zeros(BLOCKS[0], BLOCKS[b])
    for a in tl.static_range(len(BLOCKS) if SPLIT else 0):
        total = tl.dot(lo[a], _of_sides(gram_hi, a, b, len(BLOCKS)), total)
        total = tl.dot(hi[a], _of_sides(gram_lo, a, b, len(BLOCKS)), total)
    for a in tl.static_range(len(BLOCKS)):
        total = tl.dot(hi[a], _of_sides(gram_hi, a, b, len(BLOCKS)), total)
    return total


@triton.jit
def _add_others(
    sums,
    of_side,
    r,
    d,
    slot,
    state,
    g,
    scale,
    R_list,
    least,
    BLOCKS: tl.constexpr,
    KEEP: tl.constexpr,
    side: tl.constexpr,
):
    """To the sums of every R before the r-th: products of ``of_side`` and its coefficients."""
    BLOCK_N: tl.constexpr = BLOCKS[0]
    for other in range(r):
        statistics = _statistics_of(state, g, other, len(R_list), BLOCKS, KEEP)
        row_half, negative, positive = _statistics_by_row(statistics, BLOCK_N)
        slope = _slope(scale, one_of(R_list, other))
        A = _affinities(d, slot, statistics, row_half, slope, least, BLOCKS, side)
        added = tl.sum(of_side * A, 1) * (-positive if side < len(BLOCKS) - 1 else negative)
        more = ()
        for n in tl.static_range(len(R_list)):
            more = more + (sums[n] + tl.where(n == other, added, 0.0),)
        sums = more
    return sums


@triton.jit
def _gram_moments_kernel(
    kept,
    state,
    scale,
    R_list,
    moments,  # [G, R, R]
    counts,
    D,
    least,
    BLOCKS: tl.constexpr,
    SPLIT: tl.constexpr,
    KEEP: tl.constexpr,  # distances in the state
):
    """``Σ_i F_i·F'_i = Σ_ijk c_ij c'_ik t_j·t_k``."""
    BLOCK_N: tl.constexpr = BLOCKS[0]
    SIDES: tl.constexpr = len(BLOCKS)
    g = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale).to(tl.float32)
    slot = _slot(kept, g, BLOCKS)
    if _has_close(slot):
        return
    norms = _load_norms(slot, BLOCKS)
    pairs = _load_tiles(_pairs_of(slot + HEAD, BLOCKS), BLOCKS)
    products = ()
    d = ()
    for side in tl.static_range(SIDES):
        product = pairs[side] - _zero_product(BLOCKS[0], BLOCKS[side])
        squared = norms[0][:, None] + norms[side][None, :] - 2 * product
        of_side = tl.sqrt(at_least(squared, LEAST_DISTANCE * LEAST_DISTANCE))
        if side == 0:
            of_self = LEAST_DISTANCE + SELF_DISTANCE * tl.maximum(scale, 1e-3)
            of_side = tl.where(self_pairs(0, BLOCKS[0], BLOCKS[0]), of_self, of_side)
        products = products + (product,)
        d = d + (of_side,)
    gram_hi, gram_lo = _load_gram(slot, products, BLOCKS)
    longest = 0.0  # of the targets, as far as powers of two say
    for side in tl.static_range(SIDES):
        longest = tl.maximum(longest, tl.max(tl.load(_vector(slot, 2, BLOCKS, side))))
    unit = tl.maximum(scale / tl.sqrt(D * 1.0), 1e-3)
    by = 1 / (unit * unit * (counts[0] * 1.0) * (D * 1.0))
    moments += g * len(R_list) * len(R_list)
    for r in range(len(R_list)):  # not unrolled: the R would compete for registers
        statistics = _statistics_of(state, g, r, len(R_list), BLOCKS, KEEP)
        row_half, negative, positive = _statistics_by_row(statistics, BLOCK_N)
        slope = _slope(scale, one_of(R_list, r))
        e = exponent(negative * positive * longest)
        hi = ()
        lo = ()
        for side in tl.static_range(SIDES):
            A = _affinities(d, slot, statistics, row_half, slope, least, BLOCKS, side)
            by_row = (-positive if side < SIDES - 1 else negative) * tl.exp2(e)
            parts = split(A * by_row[:, None])
            hi = hi + (parts[0],)
            lo = lo + (parts[1],)
        sums = ()  # of F_r·F_r' over the dimensions, for r' <= r: [N] each
        for _ in tl.static_range(len(R_list)):
            sums = sums + (tl.zeros([BLOCK_N], dtype=tl.float32),)
        itself = tl.zeros([BLOCK_N], dtype=tl.float32)
        for b in tl.static_range(SIDES):
            of_b = _of_targets(hi, lo, gram_hi, gram_lo, SPLIT, BLOCKS, b)
            itself += tl.sum(of_b * (hi[b].to(tl.float32) + lo[b].to(tl.float32)), 1)
            sums = _add_others(sums, of_b, r, d, slot, state, g, scale, R_list, least, BLOCKS, KEEP, b)
        down = tl.exp2(-e)
        for other in tl.static_range(len(R_list)):
            moment = tl.sum(tl.where(other == r, itself * down, sums[other]) * down) * by
            if other <= r:
                tl.store(moments + r * len(R_list) + other, moment)
                tl.store(moments + other * len(R_list) + r, moment)


@triton.jit
def _gradient_kernel(
    points,
    weights,
    state,
    scale,
    R_list,
    factors,  # [R]
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
    g = tl.program_id(0).to(tl.int64)
    N = counts[0]
    scale = tl.load(scale).to(tl.float32)
    points = _of_group(points, counts, D, g)
    weights = _of_group(weights, counts, 1, g)
    e, origin_row = _load_head(_statistics_of(state, g, 0, len(R_list), BLOCKS, KEEP) - HEAD)
    if KEEP:
        d = _load_tiles(_statistics_of(state, g, len(R_list), len(R_list), BLOCKS, KEEP), BLOCKS)
    else:
        d, _, _ = _distances_of_points(points, counts, e, origin_row, D, BLOCKS, BLOCK_D, DIFFERENCES, SPLIT, LONG)
    d = _ready_for_softmax(d, scale, counts, BLOCKS)
    total = ()  # Σ_R c_R/λ_R
    bound = tl.zeros([BLOCK_N], dtype=tl.float32)
    for side in tl.static_range(len(BLOCKS)):
        total = total + (zeros(BLOCKS[0], BLOCKS[side]),)
    for r in range(len(R_list)):  # not unrolled: the R would compete for registers
        factor = tl.load(factors + r).to(tl.float32)
        statistics = _statistics_of(state, g, r, len(R_list), BLOCKS, KEEP)
        slope = _slope(scale, one_of(R_list, r))
        c, of_R = _coefficients(d, statistics, slope, factor, weights, least, counts, BLOCKS)
        more = ()
        for side in tl.static_range(len(BLOCKS)):
            more = more + (total[side] + c[side],)
        total = more
        bound += of_R
    hi, lo, down = _split_rows(total, bound, BLOCKS)

    unit = tl.maximum(scale / tl.sqrt(D * 1.0), 1e-3)
    by = (down * (-2 * tl.load(incoming + g) * tl.exp2(-e) / (unit * unit * (N * 1.0) * (D * 1.0))))[:, None]
    centre = points[0] + origin_row * D
    up = tl.exp2(e)
    row = tl.arange(0, BLOCKS[0])[:, None]
    grad += g * N * D
    first = tl.program_id(1) * share
    for start in range(first, tl.minimum(first + share, D), BLOCK_SUM):
        F = zeros(BLOCKS[0], BLOCK_SUM)
        for side in tl.static_range(len(BLOCKS)):
            t = _load_centred(points[side], counts[side], centre, start, D, BLOCKS[side], BLOCK_SUM)
            t_hi, t_lo = split(t * up)
            F = add_product(F, hi[side], lo[side], t_hi, t_lo, SPLIT, False)
        dim = start + tl.arange(0, BLOCK_SUM)[None, :]
        tl.store(grad + row * D + dim, (F * by).to(grad.dtype.element_ty), mask=(row < N) & (dim < D))


def _without_empty(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(t for t in tensors if t.shape[1] > 0)


def _blocks(points: Sequence[Tensor]) -> tuple[int, ...]:
    """Of each side, gen first."""
    return group.padded(points[0].shape[1], tuple(t.shape[1] for t in points))[1:]


def _problem(points: Sequence[Tensor], kernel: str, **numbers: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """gen, neg unless it is empty, and pos; and how a kernel is compiled for them and launched."""
    sides = _without_empty(points)
    splits = launch.splits_products()
    chosen = group.loss_configuration(kernel, launch.limits(sides[0].device))
    counts = tuple(t.shape[1] for t in sides)
    if counts == _blocks(points):  # no mask is needed, and the compiler will see it
        counts = tuple(map(tl.constexpr, counts))
    options = {"counts": counts, "D": sides[0].shape[2], "BLOCKS": _blocks(points), "SPLIT": splits}
    if kernel != "gram":
        options["DIFFERENCES"] = sides[0].shape[2] <= DIFFERENCES_UP_TO
        options["LONG"] = sides[0].shape[2] > CHAIN_UP_TO
    return sides, options | numbers | chosen.options()


def kept_shape(points: Sequence[Tensor]) -> tuple[int, ...]:
    """Shape of what phase 1 keeps for phase 2: nothing where it would take more than the gradient."""
    gen, blocks = points[0], _blocks(points)
    floats = HEAD.value + 4 * sum(blocks) + sum(b * sum(blocks[: n + 1]) for n, b in enumerate(blocks))
    if gen.shape[2] <= DIFFERENCES_UP_TO:
        return (0,)
    return (gen.shape[0], floats) if 4 * floats <= gen.element_size() * gen[0].numel() else (0,)


def _state_floats(points: Sequence[Tensor], R: int, pairs: int) -> int:
    blocks = _blocks(points)
    return HEAD.value + R * (3 * blocks[0] + sum(blocks)) + pairs


def _keeps_distances(points: Sequence[Tensor], R: int) -> bool:
    """Whether phase 2 keeps them for phase 3: where its state stays below a tenth of the points and the gradient."""
    blocks = _blocks(points)
    return 40 * _state_floats(points, R, blocks[0] * sum(blocks)) <= sum(t[0].nbytes for t in (*points, points[0]))


def state_shape(points: Sequence[Tensor], R: int) -> tuple[int, ...]:
    """Shape of what phase 2 keeps for phase 3: statistics, and distances where they are small beside the points."""
    blocks = _blocks(points)
    pairs = blocks[0] * sum(blocks) if _keeps_distances(points, R) else 0
    return points[0].shape[0], _state_floats(points, R, pairs)


def loss_scale(points: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Phase 1 of one map: ``[mean d·w, mean w]`` in float64, and the distances if they are kept."""
    sides, options = _problem(points, "scale")
    G = sides[0].shape[0]
    means = sides[0].new_empty(G, 2, dtype=torch.float32)
    kept = means.new_empty(kept_shape(points))
    with launch.on_device_of(means):
        _scale_kernel[(G,)](sides, _without_empty(weights), means, kept if kept.numel() else None, **options)
    return means.mean(0, dtype=torch.float64), kept


def loss_moments(
    points: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: Tensor,
    scale: Tensor,
    R_list: Sequence[float],
    floor: float,
) -> tuple[Tensor, Tensor]:
    """Phase 2 of one map: statistics of every R, and the means of the forces' products ``[G, R, R]``."""
    G, R = points[0].shape[0], len(R_list)
    moments = points[0].new_empty(G, R, R, dtype=torch.float32)
    state = moments.new_empty(state_shape(points, R))
    numbers = {"least": floor**0.5, "KEEP": _keeps_distances(points, R)}
    pairs = kept if kept.numel() else None
    given = (pairs, state, scale, tuple(map(float, R_list)))
    of_sides = _without_empty(weights)
    with launch.on_device_of(moments):
        sides, options = _problem(points, "statistics", **numbers)
        _statistics_kernel[(G,)](sides, of_sides, *given, **options)
        # With products kept most groups have nothing to do here, and some share a program.
        groups = 1 if pairs is None or G <= PROGRAMS else 16
        sides, options = _problem(points, "moments", GROUPS=groups, **numbers)
        _moments_kernel[(triton.cdiv(G, groups),)](sides, of_sides, *given, moments, G, **options)
        if pairs is not None:
            _, options = _problem(points, "gram", **numbers)
            _gram_moments_kernel[(G,)](*given, moments, **options)
    return state, moments


def loss_gradient(
    points: Sequence[Tensor],
    weights: Sequence[Tensor],
    state: Tensor,
    scale: Tensor,
    factors: Tensor,
    incoming: Tensor,
    R_list: Sequence[float],
    floor: float,
) -> Tensor:
    """Phase 3 of one map: the gradient w.r.t. gen ``[G, N, D]``, in its dtype."""
    keep = _keeps_distances(points, len(R_list))
    kernel = "gradient of kept distances" if keep else "gradient"
    sides, options = _problem(points, kernel, least=floor**0.5, KEEP=keep)
    grad = torch.empty_like(sides[0])
    G, _, D = grad.shape
    shares = max(1, min(PROGRAMS // G, D // LEAST_SHARE)) if keep else 1  # each would work the distances out again
    share = triton.cdiv(D, shares * LEAST_SHARE) * LEAST_SHARE
    given = (_without_empty(weights), state, scale, tuple(map(float, R_list)))
    with launch.on_device_of(grad):
        _gradient_kernel[(G, triton.cdiv(D, share))](sides, *given, factors, incoming, grad, share, **options)
    return grad
