"""What a phase keeps of a group for the next one, and where it lies.

Phase 1 keeps, where it keeps anything: the row of the origin and whether pairs are close, in HEAD floats; the squared
norm of every target; products of gen and every side, or squared distances where pairs are close; and products of the
other sides with each other.

A target is lifted by the power of two that brings its length to [2^13, 2^14), so that no target takes digits from
another. Phase 2 keeps, as the state: the row of the origin and, for members with details, the R, in HEAD floats; by
target the exponent that lifts it, and its weight over that power; for each R by row the potential r (the half of the
softmax's log-sum, in the release), what turns affinities to negatives and to positives into coefficients, the largest
coefficient of a lifted target and, where sides are split, the r of positives, and by column the potential c: affinities
are ``exp2(L − r − c)``; then the distances if these are kept.
"""

import triton
import triton.language as tl

from ..halves import exponent, split
from .distances import roots_of_squares

HEAD = tl.constexpr(32)  # floats for what a group has one of
BEFORE_WIDTHS = tl.constexpr(2)  # of these
OF_ROWS, OF_SPLIT_ROWS = 4, 5  # vectors over the rows, for each R
GRAM = tl.constexpr(2.0**-14)  # brings products of lifted targets into float16's range


@triton.jit
def exponents_of(norms):
    """Of the powers of two that lift targets with these squared norms."""
    return exponent(tl.sqrt(norms))


@triton.jit
def entries(vector, groups, side: tl.constexpr):
    """Where those of a side lie in a vector over all targets."""
    for before in tl.static_range(side):
        vector += groups.BLOCKS[before]
    return vector + tl.arange(0, groups.BLOCKS[side])


@triton.jit
def after_vector(place, groups):
    for side in tl.static_range(len(groups.BLOCKS)):
        place += groups.BLOCKS[side]
    return place


@triton.jit
def statistics_of(state, r, groups):
    """Those of the r-th R, from the rows' on; of as many as there are, the distances."""
    return after_vector(after_vector(state + HEAD, groups), groups) + r * after_vector(
        groups.member.OF_ROWS * groups.BLOCKS[0], groups
    )


@triton.jit
def load_vectors(place, groups):
    """One over all targets, a tuple over the sides."""
    found = ()
    for side in tl.static_range(len(groups.BLOCKS)):
        found = found + (tl.load(entries(place, groups, side)),)
    return found


@triton.jit
def store_vectors(place, vectors, groups):
    for side in tl.static_range(len(groups.BLOCKS)):
        tl.store(entries(place, groups, side), vectors[side])


@triton.jit
def store_head(place, origin_row, any_close):
    n = tl.arange(0, HEAD)
    head = tl.where(n == 0, origin_row.to(tl.float32), tl.where(n == 1, any_close.to(tl.float32), 0.0))
    tl.store(place + n, head)


@triton.jit
def store_head_with_widths(place, origin_row, R_list, widths):
    """The same with the R, which come from memory unless ``widths`` is None."""
    n = tl.arange(0, HEAD)
    head = tl.where(n == 0, origin_row.to(tl.float32), 0.0)
    for r in tl.static_range(len(R_list)):
        width = R_list[r] if widths is None else tl.load(widths + r).to(tl.float32)
        head = tl.where(n == BEFORE_WIDTHS + r, width, head)
    tl.store(place + n, head)
    tl.debug_barrier()  # the R are loaded by other threads


@triton.jit
def load_origin_row(place):
    return tl.load(place).to(tl.int32)


@triton.jit
def has_close(kept):
    return tl.load(kept + 1) > 0


@triton.jit
def tile_offsets(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def store_tiles(place, tiles, groups):
    """Of gen and every side, after each other."""
    for side in tl.static_range(len(groups.BLOCKS)):
        tl.store(place + tile_offsets(groups.BLOCKS[0], groups.BLOCKS[side]), tiles[side])
        place += groups.BLOCKS[0] * groups.BLOCKS[side]


@triton.jit
def load_tiles(place, groups, first, ROWS: tl.constexpr):
    """Rows [first, first + ROWS) of what :func:`store_tiles` stored."""
    tiles = ()
    for side in tl.static_range(len(groups.BLOCKS)):
        tiles = tiles + (tl.load(place + first * groups.BLOCKS[side] + tile_offsets(ROWS, groups.BLOCKS[side])),)
        place += groups.BLOCKS[0] * groups.BLOCKS[side]
    return tiles


@triton.jit
def store_products(place, products, groups):
    """Products in the order of :func:`.distances.find_products`."""
    SIDES: tl.constexpr = len(groups.BLOCKS)
    for a in tl.static_range(SIDES):
        for b in tl.static_range(1 if a > 0 else 0, a + 1 if a > 0 else SIDES):
            tl.store(
                place + tile_offsets(groups.BLOCKS[a], groups.BLOCKS[b]),
                products[b if a == 0 else SIDES + a * (a - 1) // 2 + b - 1],
            )
            place += groups.BLOCKS[a] * groups.BLOCKS[b]


@triton.jit
def load_products(place, groups):
    SIDES: tl.constexpr = len(groups.BLOCKS)
    products = ()
    for a in tl.static_range(SIDES):
        for b in tl.static_range(1 if a > 0 else 0, a + 1 if a > 0 else SIDES):
            products = products + (tl.load(place + tile_offsets(groups.BLOCKS[a], groups.BLOCKS[b])),)
            place += groups.BLOCKS[a] * groups.BLOCKS[b]
    return products


@triton.jit
def load_distances(kept, least, groups, first, ROWS: tl.constexpr):
    """Of rows [first, first + ROWS), from what phase 1 keeps."""
    norms, close = load_vectors(kept + HEAD, groups), has_close(kept)
    of_rows = tl.load(kept + HEAD + first + tl.arange(0, ROWS))
    pairs = load_tiles(after_vector(kept + HEAD, groups), groups, first, ROWS)
    squares = ()
    for side in tl.static_range(len(groups.BLOCKS)):
        from_products = of_rows[:, None] + norms[side][None, :] - 2 * pairs[side]
        squares = squares + (tl.where(close, pairs[side], from_products),)
    return roots_of_squares(squares, least, first, ROWS, groups)


@triton.jit
def load_gram(kept, exponents, groups):
    """Products of all lifted targets times GRAM, in the order of :func:`store_products`: two parts of each."""
    SIDES: tl.constexpr = len(groups.BLOCKS)
    products = load_products(after_vector(kept + HEAD, groups), groups)
    hi = ()
    lo = ()
    for a in tl.static_range(SIDES):
        for b in tl.static_range(1 if a > 0 else 0, a + 1 if a > 0 else SIDES):
            by_row, by_column = tl.exp2(exponents[a]) * GRAM, tl.exp2(exponents[b])
            parts = split(products[len(hi)] * by_row[:, None] * by_column[None, :])
            hi = hi + (parts[0],)
            lo = lo + (parts[1],)
    return hi, lo
