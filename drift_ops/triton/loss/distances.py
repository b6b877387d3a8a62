"""Distances and products of the points of a groups, rows, on tiles that stay in registers.

Queries are the rows [first, first + ROWS) of gen; targets are those of every side, each padded to a power of two. The
origin is a generated sample amid the others: every pair holds a generated sample, and these tend to be close to each
other. Products are of float16 halves (see :mod:`..halves`), for which every target has an exponent of its own, so that
one far away takes no digits from the others.
"""

import triton
import triton.language as tl

from ..group import zeros
from ..halves import add_product, exponent, split
from ..tiles import CLOSE, pairs_within, roots, self_pairs, squared_differences

CHAIN_UP_TO = 256  # dimensions, of whose products the tensor cores' sum drifts by a few float32 roundings only
HEADROOM = tl.constexpr(6)  # bits by which an entry may exceed those that the exponent was taken from
MOST_SQUARED = tl.constexpr(65504.0**2)  # of float16


@triton.jit
def load_points(points, stride, count, start, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Dimensions [start, start + BLOCK_D) of rows [0, count), float32 [BLOCK, BLOCK_D]; zero where there is nothing."""
    row = tl.arange(0, BLOCK)[:, None]
    dim = start + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(points + row * stride + dim, mask=(row < count) & (dim < D), other=0.0).to(tl.float32)


@triton.jit
def load_centred(
    groups,
    rows,
    side: tl.constexpr,
    origin,
    start,
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    first=0,
    ROWS: tl.constexpr = None,
):
    """The same of a side, from row ``first`` on, about the point ``origin``."""
    BLOCK: tl.constexpr = BLOCKS[side] if ROWS is None else ROWS
    dim = start + tl.arange(0, BLOCK_D)
    centre = tl.load(origin + dim, mask=dim < groups.D, other=0.0).to(tl.float32)
    points, count = rows[side][0] + first * rows[side][1], groups.counts[side] - first
    x = load_points(points, rows[side][1], count, start, groups.D, BLOCK, BLOCK_D) - centre[None, :]
    return tl.where(tl.arange(0, BLOCK)[:, None] < count, x, 0.0)


@triton.jit
def find_origin(groups, rows, BLOCKS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The row of the generated sample nearest to their mean in the first dimensions: not a far outlier, which would be
    an origin away from the rest, where the rest would lose digits."""
    N = groups.counts[0]
    x = load_points(rows[0][0], rows[0][1], N, 0, groups.D, BLOCKS[0], BLOCK_D)
    mean = tl.sum(x, 0) / N
    distance = tl.sum(tl.abs(x - mean[None, :]), 1)
    distance = tl.where((tl.arange(0, BLOCKS[0]) < N) & (distance == distance), distance, float("inf"))
    return tl.minimum(tl.argmin(distance, 0), N - 1)


@triton.jit
def squared_norms(groups, rows, origin, BLOCKS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of all targets about the origin, a tuple over the sides."""
    norms = ()
    for side in tl.static_range(len(BLOCKS)):
        of_side = tl.sum(zeros(BLOCKS[side], BLOCK_D), 1)
        for start in range(0, groups.D, BLOCK_D):
            x = load_centred(groups, rows, side, origin, start, BLOCKS, BLOCK_D)
            of_side += tl.sum(x * x, 1)
        norms = norms + (of_side,)
    return norms


@triton.jit
def _largest(groups, rows, origin, end, BLOCKS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of the entries of each target about the origin, in dimensions [0, end)."""
    largest = ()
    for side in tl.static_range(len(BLOCKS)):
        of_side = tl.sum(zeros(BLOCKS[side], BLOCK_D), 1)
        for start in range(0, end, BLOCK_D):
            of_side = tl.maximum(
                of_side, tl.max(tl.abs(load_centred(groups, rows, side, origin, start, BLOCKS, BLOCK_D)), 1)
            )
        largest = largest + (of_side,)
    return largest


@triton.jit
def _exponents(largest, headroom):
    """Of targets with such largest entries, and no more than their mean: in the dimensions looked at, a target may have
    less than in others."""
    total = 0.0
    targets = 0.0
    for side in tl.static_range(len(largest)):
        total += tl.sum(tl.where(largest[side] > 0, exponent(largest[side]), 0.0))
        targets += tl.sum((largest[side] > 0).to(tl.float32))
    mean = tl.floor(total / tl.maximum(targets, 1.0))
    found = ()
    for side in tl.static_range(len(largest)):
        e = tl.where(largest[side] > 0, tl.minimum(exponent(largest[side]), mean), mean)
        found = found + (e - headroom,)
    return found


@triton.jit
def _nothing_yet(ROWS: tl.constexpr, BLOCKS: tl.constexpr, ALL: tl.constexpr):
    """Zeros for products, of the queries and every side, and of the other sides, rows of the later, if ALL; and for
    norms."""
    products = ()
    norms = ()
    for side in tl.static_range(len(BLOCKS)):
        products = products + (zeros(ROWS, BLOCKS[side]),)
        norms = norms + (tl.sum(products[side], 0),)
    if ALL:
        for later in tl.static_range(1, len(BLOCKS)):
            for side in tl.static_range(1, later + 1):
                products = products + (zeros(BLOCKS[later], BLOCKS[side]),)
    return products, norms


@triton.jit
def _products(
    groups,
    rows,
    first,
    origin,
    exponents,
    of_queries,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALL: tl.constexpr,
):
    """Products of points about the origin, as :func:`_nothing_yet` lists them, and squared norms of all targets and of
    the queries. The exponents, of targets and of the queries, bring them into float16's range."""
    products, norms = _nothing_yet(ROWS, BLOCKS, ALL)
    query_norms = tl.sum(products[0], 1)
    for start in range(0, groups.D, BLOCK_D):
        hi = ()
        lo = ()
        more_norms = ()
        for side in tl.static_range(len(BLOCKS)):
            x = load_centred(groups, rows, side, origin, start, BLOCKS, BLOCK_D)
            parts = split(x * tl.exp2(exponents[side])[:, None])
            hi = hi + (parts[0],)
            lo = lo + (parts[1],)
            more_norms = more_norms + (norms[side] + tl.sum(x * x, 1),)
        if ROWS == BLOCKS[0]:
            q_hi, q_lo = hi[0], lo[0]
        else:
            q = load_centred(groups, rows, 0, origin, start, BLOCKS, BLOCK_D, first, ROWS)
            q_hi, q_lo = split(q * tl.exp2(of_queries)[:, None])
            query_norms += tl.sum(q * q, 1)
        more = ()
        for side in tl.static_range(len(BLOCKS)):
            y_hi, y_lo = tl.trans(hi[side]), tl.trans(lo[side])
            more = more + (add_product(products[side], q_hi, q_lo, y_hi, y_lo, groups.SPLIT, groups.LONG),)
        if ALL:
            for later in tl.static_range(1, len(BLOCKS)):
                for side in tl.static_range(1, later + 1):
                    y_hi, y_lo = tl.trans(hi[side]), tl.trans(lo[side])
                    of_sides = add_product(
                        products[len(more)], hi[later], lo[later], y_hi, y_lo, groups.SPLIT, groups.LONG
                    )
                    more = more + (of_sides,)
        products = more
        norms = more_norms
    if ROWS == BLOCKS[0]:
        query_norms = norms[0]
    scaled = ()
    for side in tl.static_range(len(BLOCKS)):
        scaled = scaled + (products[side] * tl.exp2(-of_queries)[:, None] * tl.exp2(-exponents[side])[None, :],)
    if ALL:
        for later in tl.static_range(1, len(BLOCKS)):
            for side in tl.static_range(1, later + 1):
                by_row, by_column = tl.exp2(-exponents[later]), tl.exp2(-exponents[side])
                scaled = scaled + (products[len(scaled)] * by_row[:, None] * by_column[None, :],)
    return scaled, norms, query_norms


@triton.jit
def _may_overflow(norms, exponents):
    """Whether an entry may be too large for its exponent, as far as squared norms can tell; not if one is NaN."""
    largest = 0.0
    for side in tl.static_range(len(norms)):
        largest = tl.maximum(largest, tl.max(norms[side] * tl.exp2(2 * exponents[side])))
    return largest > MOST_SQUARED


@triton.jit
def find_products(groups, rows, origin, BLOCKS: tl.constexpr, BLOCK_D: tl.constexpr, ALL: tl.constexpr):
    """:func:`_products` of all rows of gen, and squared norms of the targets, with exponents that are found here."""
    e = _exponents(_largest(groups, rows, origin, BLOCK_D, BLOCKS, BLOCK_D), HEADROOM)
    products, norms = _nothing_yet(BLOCKS[0], BLOCKS, ALL)
    turns = 2
    while turns > 0:
        products, norms, _ = _products(groups, rows, 0, origin, e, e[0], BLOCKS[0], BLOCKS, BLOCK_D, ALL)
        turns = tl.where(_may_overflow(norms, e), turns - 1, 0)
        if turns > 0:
            e = _exponents(_largest(groups, rows, origin, groups.D, BLOCKS, BLOCK_D), 1)
    return products, norms


@triton.jit
def _differences(groups, rows, first, side: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Squared distances of the queries to a side, from differences."""
    q, q_stride = rows[0][0] + first * rows[0][1], rows[0][1]
    counts = groups.counts[0] - first, groups.counts[side]
    return squared_differences(q, rows[side][0], *counts, groups.D, ROWS, BLOCKS[side], q_stride, rows[side][1])


@triton.jit
def squared_distances(products, query_norms, norms, groups, rows, first, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Squared distances of the queries to every side, from products, or from differences where the tile holds a close
    pair; and whether any does."""
    found = ()
    any_close = 0
    for side in tl.static_range(len(BLOCKS)):
        both = query_norms[:, None] + norms[side][None, :]
        squared = both - 2 * products[side]
        exists = pairs_within(groups.counts[0] - first, groups.counts[side], ROWS, BLOCKS[side])
        margin = tl.where(exists, squared - both * CLOSE, 0.0)
        if side == 0:
            margin = tl.where(self_pairs(first, ROWS, BLOCKS[0]), 0.0, margin)
        of_side = (tl.min(margin) < 0).to(tl.int32)
        if of_side > 0:
            squared = _differences(groups, rows, first, side, ROWS, BLOCKS)
        any_close = tl.maximum(any_close, of_side)
        found = found + (squared,)
    return found, any_close


@triton.jit
def roots_of_squares(squares, least, first, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """``max(‖x_i − t_j‖, least)``, a tuple over the sides."""
    d = ()
    for side in tl.static_range(len(BLOCKS)):
        d = d + (roots(squares[side], least, first, side == 0, ROWS, BLOCKS[side]),)
    return d


@triton.jit
def _all_differences(groups, rows, first, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    squares = ()
    for side in tl.static_range(len(BLOCKS)):
        squares = squares + (_differences(groups, rows, first, side, ROWS, BLOCKS),)
    return squares


@triton.jit
def find_distances(groups, rows, least, BLOCKS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Distances of gen to every side, a tuple of ``[BLOCKS[0], BLOCKS[side]]``; squared norms of the targets, and the
    row of gen that is the origin."""
    ROWS: tl.constexpr = BLOCKS[0]
    origin_row = find_origin(groups, rows, BLOCKS, BLOCK_D)
    origin = rows[0][0] + origin_row * rows[0][1]
    if groups.DIFFERENCES:
        squares, norms = (
            _all_differences(groups, rows, 0, ROWS, BLOCKS),
            squared_norms(groups, rows, origin, BLOCKS, BLOCK_D),
        )
    else:
        products, norms = find_products(groups, rows, origin, BLOCKS, BLOCK_D, False)
        squares, _ = squared_distances(products, norms[0], norms, groups, rows, 0, ROWS, BLOCKS)
    return roots_of_squares(squares, least, 0, ROWS, BLOCKS), norms, origin_row


@triton.jit
def find_distances_again(
    groups,
    rows,
    first,
    origin,
    exponents,
    of_queries,
    least,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Distances of ROWS rows of gen to every side, when the exponents of all targets and of these are known."""
    if groups.DIFFERENCES:
        squares = _all_differences(groups, rows, first, ROWS, BLOCKS)
    else:
        products, norms, query_norms = _products(
            groups, rows, first, origin, exponents, of_queries, ROWS, BLOCKS, BLOCK_D, False
        )
        squares, _ = squared_distances(products, query_norms, norms, groups, rows, first, ROWS, BLOCKS)
    return roots_of_squares(squares, least, first, ROWS, BLOCKS)
