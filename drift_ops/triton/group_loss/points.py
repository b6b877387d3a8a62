"""Distances and products of the points of a group, on tiles that stay in registers.

A group's *sides* are gen, neg (unless it is empty) and pos, each padded to a power of two; points, weights and counts
come as tuples over the sides. The origin is a generated sample amid the others: every pair holds a generated sample,
and these tend to be close to each other.

A launch serves several feature maps of the same shape: what each has of its own comes as a tuple over them.
"""

import triton
import triton.language as tl

from ..group import one_of, zeros
from ..halves import add_product, exponent, split
from ..tiles import CLOSE, load_rows, load_vector, pairs_within, roots, self_pairs, squared_differences

LEAST_DISTANCE = tl.constexpr(1e-4)
CHAIN_UP_TO = 256  # dimensions, of whose products the tensor cores' sum drifts by a few float32 roundings only
HEADROOM = tl.constexpr(5)  # bits by which an entry may exceed those that the exponent was taken from
MOST_SQUARED = tl.constexpr(65504.0**2)  # of float16


@triton.jit
def find_map(maps, program):
    """What ``program`` of a launch works on: the map's place in the launch and in the call, and the group of the map.

    ``maps`` has the first program of each map and its place in the call, n as 2·n + 3: Triton compiles no variants for
    odd numbers above 1.
    """
    n, place, first = 0, (maps[0][1] - 3) // 2, 0
    for other in tl.static_range(1, len(maps)):
        start = (maps[other][0] - 3) // 2
        n = tl.where(program >= start, other, n)
        place = tl.where(program >= start, (maps[other][1] - 3) // 2, place)
        first = tl.where(program >= start, start, first)
    return n, place, (program - first).to(tl.int64)


@triton.jit
def rows_of_group(arrays, n, counts, width, g):
    """Pointers to the rows of group g of the n-th map's ``[G, count, width]`` arrays."""
    rows = ()
    for side in tl.static_range(len(arrays)):
        rows = rows + (one_of(arrays[side], n) + g * counts[side] * width,)
    return rows


@triton.jit
def load_centred(points, count, centre, start, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Dimensions [start, start + BLOCK_D) of rows [0, count) about the row ``centre``; zero where there is nothing."""
    x = load_rows(points, count, start, D, BLOCK, BLOCK_D) - load_vector(centre, D, start, BLOCK_D)[None, :]
    return tl.where(tl.arange(0, BLOCK)[:, None] < count, x, 0.0)


@triton.jit
def find_origin(gen, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
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
            x = load_centred(points[side], counts[side], origin, start, D, BLOCKS[side], BLOCK_D)
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
            x = load_centred(points[side], counts[side], origin, start, D, BLOCKS[side], BLOCK_D)
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
def squared_distances(products, norms, points, counts, D, BLOCKS: tl.constexpr):
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
def find_products(
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
def roots_of_squares(squares, BLOCKS: tl.constexpr):
    """``max(‖x_i − t_j‖, LEAST_DISTANCE)``, a tuple over the sides."""
    d = ()
    for side in tl.static_range(len(BLOCKS)):
        d = d + (roots(squares[side], LEAST_DISTANCE, 0, side == 0, BLOCKS[0], BLOCKS[side]),)
    return d


@triton.jit
def distances_of_points(
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
        origin_row = find_origin(points[0], counts[0], D, BLOCKS[0], BLOCK_D)
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
            products, norms, e = find_products(points, counts, origin, D, BLOCKS, BLOCK_D, SPLIT, LONG, False)
        else:
            products, norms = _products(points, counts, origin, e, D, BLOCKS, BLOCK_D, SPLIT, LONG, False)
        squares, _ = squared_distances(products, norms, points, counts, D, BLOCKS)
    return roots_of_squares(squares, BLOCKS), e, origin_row
