"""Distances and products of the points of a group, on tiles that stay in registers.

Queries are the rows [first, first + ROWS) of gen; targets are those of every side, each padded to a power of two. The
origin is a generated sample amid the others: every pair holds a generated sample, and these tend to be close to each
other. Products are of float16 halves (see :mod:`..halves`), for which every target has an exponent of its own, so that
one far away takes no digits from the others. A member of the family whose costs are squared distances has these
wherever distances are named. The ``points`` of a group are for every side a pointer to the first point
and the stride to the next, its ``origin`` a pointer.
"""

import triton
import triton.language as tl

from ..group import zeros
from ..halves import add_product, exponent, split
from ..tiles import CLOSE, at_least, pairs_within, roots, self_pairs, squared_differences

CHAIN_UP_TO = 256  # dimensions, of whose products the tensor cores' sum drifts by a few float32 roundings only
HEADROOM = tl.constexpr(6)  # bits by which an entry may exceed those that the exponent was taken from
MOST_SQUARED = tl.constexpr(65504.0**2)  # of float16


@triton.jit
def load_points(place, stride, count, start, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Dimensions [start, start + BLOCK_D) of rows [0, count), float32 [BLOCK, BLOCK_D]; zero where there is nothing."""
    row = tl.arange(0, BLOCK)[:, None]
    dim = start + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(place + row * stride + dim, mask=(row < count) & (dim < D), other=0.0).to(tl.float32)


@triton.jit
def load_centred(
    groups, points, side: tl.constexpr, origin, start, BLOCK_D: tl.constexpr, first=0, ROWS: tl.constexpr = None
):
    """The same of a side, from row ``first`` on, about the origin."""
    BLOCK: tl.constexpr = groups.BLOCKS[side] if ROWS is None else ROWS
    dim = start + tl.arange(0, BLOCK_D)
    centre = tl.load(origin + dim, mask=dim < groups.D, other=0.0).to(tl.float32)
    place, count = points[side][0] + first * points[side][1], groups.counts[side] - first
    x = load_points(place, points[side][1], count, start, groups.D, BLOCK, BLOCK_D) - centre[None, :]
    return tl.where(tl.arange(0, BLOCK)[:, None] < count, x, 0.0)


@triton.jit
def load_lifted(
    groups, points, side: tl.constexpr, origin, e, start, BLOCK_D: tl.constexpr, first=0, ROWS: tl.constexpr = None
):
    """The same, and the two parts of it times 2^e, row by row."""
    x = load_centred(groups, points, side, origin, start, BLOCK_D, first, ROWS)
    hi, lo = split(x * tl.exp2(e)[:, None])
    return x, hi, lo


@triton.jit
def find_origin(groups, points, BLOCK_D: tl.constexpr):
    """The row of the generated sample nearest to their mean in the first dimensions: not a far outlier, which would be
    an origin away from the rest, where the rest would lose digits."""
    N = groups.counts[0]
    x = load_points(points[0][0], points[0][1], N, 0, groups.D, groups.BLOCKS[0], BLOCK_D)
    mean = tl.sum(x, 0) / N
    from_mean = tl.sum(tl.abs(x - mean[None, :]), 1)
    usable = (tl.arange(0, groups.BLOCKS[0]) < N) & (from_mean == from_mean)
    return tl.minimum(tl.argmin(tl.where(usable, from_mean, float("inf")), 0), N - 1)


@triton.jit
def _squared_norms(groups, points, origin, BLOCK_D: tl.constexpr):
    """Of all targets about the origin, a tuple over the sides."""
    norms = ()
    for side in tl.static_range(len(groups.BLOCKS)):
        of_side = tl.sum(zeros(groups.BLOCKS[side], BLOCK_D), 1)
        for start in range(0, groups.D, BLOCK_D):
            x = load_centred(groups, points, side, origin, start, BLOCK_D)
            of_side += tl.sum(x * x, 1)
        norms = norms + (of_side,)
    return norms


@triton.jit
def _largest(groups, points, origin, begin, end, BLOCK_D: tl.constexpr):
    """Of the entries of each target about the origin, in dimensions [begin, end)."""
    largest = ()
    for side in tl.static_range(len(groups.BLOCKS)):
        of_side = tl.sum(zeros(groups.BLOCKS[side], BLOCK_D), 1)
        for start in range(begin, end, BLOCK_D):
            x = load_centred(groups, points, side, origin, start, BLOCK_D)
            of_side = tl.maximum(of_side, tl.max(tl.abs(x), 1))
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
def _nothing_yet(groups, ROWS: tl.constexpr, ALL: tl.constexpr):
    """Zeros for products, of the queries and every side, and if ALL of the other sides, rows of the later, and for
    norms."""
    SIDES: tl.constexpr = len(groups.BLOCKS)
    products = ()
    norms = ()
    for a in tl.static_range(SIDES if ALL else 1):
        for b in tl.static_range(1 if a > 0 else 0, a + 1 if a > 0 else SIDES):
            products = products + (zeros(groups.BLOCKS[a] if a > 0 else ROWS, groups.BLOCKS[b]),)
    for side in tl.static_range(SIDES):
        norms = norms + (tl.sum(products[side], 0),)
    return products, norms


@triton.jit
def _add_products(products, q_hi, q_lo, hi, lo, groups, ALL: tl.constexpr):
    """To the products of :func:`_nothing_yet`, those of the parts of queries and targets."""
    SIDES: tl.constexpr = len(hi)
    more = ()
    for a in tl.static_range(SIDES if ALL else 1):
        for b in tl.static_range(1 if a > 0 else 0, a + 1 if a > 0 else SIDES):
            a_hi, a_lo = (hi[a], lo[a]) if a > 0 else (q_hi, q_lo)
            b_hi, b_lo = tl.trans(hi[b]), tl.trans(lo[b])
            more = more + (add_product(products[len(more)], a_hi, a_lo, b_hi, b_lo, groups.EXACT, groups.LONG),)
    return more


@triton.jit
def _without_powers(products, of_queries, exponents, ALL: tl.constexpr):
    """Products of points, from those of points times the powers of two that the exponents are of."""
    SIDES: tl.constexpr = len(exponents)
    found = ()
    for a in tl.static_range(SIDES if ALL else 1):
        for b in tl.static_range(1 if a > 0 else 0, a + 1 if a > 0 else SIDES):
            by_row = tl.exp2(-(exponents[a] if a > 0 else of_queries))
            found = found + (products[len(found)] * by_row[:, None] * tl.exp2(-exponents[b])[None, :],)
    return found


@triton.jit
def _products(
    groups, points, first, origin, begin, end, exponents, of_queries, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    ALL: tl.constexpr,
):  # fmt: skip
    """Products of points about the origin in dimensions [begin, end), as :func:`_nothing_yet` lists them, and squared
    norms of all targets and of the queries. The exponents, of targets and of the queries, bring them into float16's
    range."""
    products, norms = _nothing_yet(groups, ROWS, ALL)
    query_norms = tl.sum(products[0], 1)
    for start in range(begin, end, BLOCK_D):
        hi = ()
        lo = ()
        more_norms = ()
        for side in tl.static_range(len(groups.BLOCKS)):
            x, of_hi, of_lo = load_lifted(groups, points, side, origin, exponents[side], start, BLOCK_D)
            hi = hi + (of_hi,)
            lo = lo + (of_lo,)
            more_norms = more_norms + (norms[side] + tl.sum(x * x, 1),)
        norms = more_norms
        if ROWS == groups.BLOCKS[0]:
            products = _add_products(products, hi[0], lo[0], hi, lo, groups, ALL)
        else:
            q, q_hi, q_lo = load_lifted(groups, points, 0, origin, of_queries, start, BLOCK_D, first, ROWS)
            query_norms += tl.sum(q * q, 1)
            products = _add_products(products, q_hi, q_lo, hi, lo, groups, ALL)
    if ROWS == groups.BLOCKS[0]:
        query_norms = norms[0]
    return _without_powers(products, of_queries, exponents, ALL), norms, query_norms


@triton.jit
def _may_overflow(norms, exponents):
    """Whether an entry may be too large for its exponent, as far as squared norms can tell; not if one is NaN."""
    largest = 0.0
    for side in tl.static_range(len(norms)):
        largest = tl.maximum(largest, tl.max(norms[side] * tl.exp2(2 * exponents[side])))
    return largest > MOST_SQUARED


@triton.jit
def find_products(groups, points, origin, begin, end, BLOCK_D: tl.constexpr, ALL: tl.constexpr):
    """:func:`_products` of all rows of gen, and squared norms of the targets, with exponents that are found here."""
    BLOCK_N: tl.constexpr = groups.BLOCKS[0]
    e = _exponents(_largest(groups, points, origin, begin, begin + BLOCK_D, BLOCK_D), HEADROOM)
    products, norms = _nothing_yet(groups, BLOCK_N, ALL)
    turns = 2
    while turns > 0:
        products, norms, _ = _products(groups, points, 0, origin, begin, end, e, e[0], BLOCK_N, BLOCK_D, ALL)
        turns = tl.where(_may_overflow(norms, e), turns - 1, 0)
        if turns > 0:
            e = _exponents(_largest(groups, points, origin, begin, end, BLOCK_D), 1)
    return products, norms


@triton.jit
def _differences(groups, points, first, side: tl.constexpr, ROWS: tl.constexpr):
    """Squared distances of the queries to a side, from differences."""
    q, q_stride = points[0][0] + first * points[0][1], points[0][1]
    counts = groups.counts[0] - first, groups.counts[side]
    return squared_differences(
        q, points[side][0], *counts, groups.D, ROWS, groups.BLOCKS[side], q_stride, points[side][1]
    )


@triton.jit
def _all_differences(groups, points, first, ROWS: tl.constexpr):
    squares = ()
    for side in tl.static_range(len(groups.BLOCKS)):
        squares = squares + (_differences(groups, points, first, side, ROWS),)
    return squares


@triton.jit
def squared_distances(products, query_norms, norms, groups, points, first, ROWS: tl.constexpr):
    """Squared distances of the queries to every side, from products, or from differences where the tile holds a close
    pair; and whether any does."""
    found = ()
    any_close = 0
    for side in tl.static_range(len(groups.BLOCKS)):
        both = query_norms[:, None] + norms[side][None, :]
        squared = both - 2 * products[side]
        if side > 0 or groups.member.OWN:
            exists = pairs_within(groups.counts[0] - first, groups.counts[side], ROWS, groups.BLOCKS[side])
            margin = tl.where(exists, squared - both * CLOSE, 0.0)
            if side == 0:
                margin = tl.where(self_pairs(first, ROWS, groups.BLOCKS[0]), 0.0, margin)
            of_side = (tl.min(margin) < 0).to(tl.int32)
            if of_side > 0:
                squared = _differences(groups, points, first, side, ROWS)
            any_close = tl.maximum(any_close, of_side)
        found = found + (squared,)
    return found, any_close


@triton.jit
def roots_of_squares(squares, least, first, ROWS: tl.constexpr, groups):
    """Costs ``max(‖x_i − t_j‖, least)``, or their squares, a tuple over the sides."""
    d = ()
    for side in tl.static_range(len(groups.BLOCKS)):
        if groups.member.SQUARED:
            of_side = at_least(squares[side], least * least)
            if side == 0:
                of_side = tl.where(self_pairs(first, ROWS, groups.BLOCKS[0]), least * least, of_side)
        else:
            of_side = roots(squares[side], least, first, side == 0, ROWS, groups.BLOCKS[side])
        d = d + (of_side,)
    return d


@triton.jit
def find_distances(groups, points, least, BLOCK_D: tl.constexpr):
    """Distances of gen to every side, a tuple of ``[BLOCKS[0], BLOCKS[side]]``; squared norms of the targets, and the
    row of gen that is the origin."""
    ROWS: tl.constexpr = groups.BLOCKS[0]
    origin_row = find_origin(groups, points, BLOCK_D)
    origin = points[0][0] + origin_row * points[0][1]
    if groups.DIFFERENCES:
        squares, norms = _all_differences(groups, points, 0, ROWS), _squared_norms(groups, points, origin, BLOCK_D)
    else:
        products, norms = find_products(groups, points, origin, 0, groups.D, BLOCK_D, False)
        squares, _ = squared_distances(products, norms[0], norms, groups, points, 0, ROWS)
    return roots_of_squares(squares, least, 0, ROWS, groups), norms, origin_row


@triton.jit
def find_distances_again(
    groups, points, first, origin, exponents, of_queries, least, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Distances of ROWS rows of gen to every side, when the exponents of all targets and of these are known."""
    if groups.DIFFERENCES:
        squares = _all_differences(groups, points, first, ROWS)
    else:
        products, norms, query_norms = _products(
            groups, points, first, origin, 0, groups.D, exponents, of_queries, ROWS, BLOCK_D, False
        )
        squares, _ = squared_distances(products, query_norms, norms, groups, points, first, ROWS)
    return roots_of_squares(squares, least, first, ROWS, groups)
