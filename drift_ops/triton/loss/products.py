"""What phase 1 keeps of a group for phase 2, where it keeps anything.

The row of its origin and whether pairs are close, in HEAD floats; the squared norm of every target; products of gen and
every side, or squared distances where pairs are close; and products of the other sides with each other, of targets
scaled to one length, in two parts.
With close pairs the forces may be much shorter than the targets, and too little would be left of products that cancel:
the moments of such a group come from its points.
"""

import triton
import triton.language as tl

from ..halves import exponent, split
from .distances import roots_of_squares

HEAD = tl.constexpr(32)  # floats for what a group has one of
GRAM = tl.constexpr(2.0**-14)  # brings products of scaled targets (see exponents_of) into float16's range


@triton.jit
def exponents_of(norms):
    """Of the powers of two that scale targets with these squared norms to lengths in [2^13, 2^14)."""
    return exponent(tl.sqrt(norms))


@triton.jit
def slot_of(kept, g, BLOCKS: tl.constexpr):
    floats = pairs_in(HEAD, BLOCKS)
    for later in tl.static_range(len(BLOCKS)):
        for side in tl.static_range(later + 1):
            floats += BLOCKS[later] * BLOCKS[side]
    return kept + g * floats


@triton.jit
def pairs_in(slot, BLOCKS: tl.constexpr):
    """Where the pairs start, after head and norms."""
    for side in tl.static_range(len(BLOCKS)):
        slot += BLOCKS[side]
    return slot


@triton.jit
def norms_in(slot, BLOCKS: tl.constexpr, side: tl.constexpr):
    slot += HEAD
    for before in tl.static_range(side):
        slot += BLOCKS[before]
    return slot + tl.arange(0, BLOCKS[side])


@triton.jit
def load_norms(slot, BLOCKS: tl.constexpr):
    norms = ()
    for side in tl.static_range(len(BLOCKS)):
        norms = norms + (tl.load(norms_in(slot, BLOCKS, side)),)
    return norms


@triton.jit
def store_head(slot, origin_row, any_close):
    n = tl.arange(0, HEAD)
    head = tl.where(n == 0, origin_row.to(tl.float32), tl.where(n == 1, any_close.to(tl.float32), 0.0))
    tl.store(slot + n, head)


@triton.jit
def load_origin_row(slot):
    return tl.load(slot).to(tl.int32)


@triton.jit
def has_close(slot, exists=True):
    return tl.load(slot + 1, mask=exists, other=0.0) > 0


@triton.jit
def tile_offsets(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of a tile."""
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def keep_others(slot, norms, products, BLOCKS: tl.constexpr):
    """Norms, and the products of the sides but gen."""
    for side in tl.static_range(len(BLOCKS)):
        tl.store(norms_in(slot, BLOCKS, side), norms[side])
    slot = pairs_in(slot + HEAD, BLOCKS)
    for side in tl.static_range(len(BLOCKS)):
        slot += BLOCKS[0] * BLOCKS[side]
    for later in tl.static_range(1, len(BLOCKS)):
        for side in tl.static_range(1, later + 1):
            product = products[len(BLOCKS) + later * (later - 1) // 2 + side - 1]
            by_row, by_column = tl.exp2(exponents_of(norms[later])) * GRAM, tl.exp2(exponents_of(norms[side]))
            hi, lo = split(product * by_row[:, None] * by_column[None, :])
            halves = slot.to(tl.pointer_type(tl.float16)) + tile_offsets(BLOCKS[later], BLOCKS[side])
            tl.store(halves, hi)
            tl.store(halves + BLOCKS[later] * BLOCKS[side], lo)
            slot += BLOCKS[later] * BLOCKS[side]


@triton.jit
def keep_pairs(slot, squares, products, any_close, BLOCKS: tl.constexpr):
    """Products of gen and every side, or squared distances."""
    pairs = ()
    for side in tl.static_range(len(BLOCKS)):
        pairs = pairs + (tl.where(any_close > 0, squares[side], products[side]),)
    store_tiles(pairs_in(slot + HEAD, BLOCKS), pairs, BLOCKS)


@triton.jit
def store_tiles(place, tiles, BLOCKS: tl.constexpr):
    """Of gen and every side, after each other."""
    for side in tl.static_range(len(BLOCKS)):
        tl.store(place + tile_offsets(BLOCKS[0], BLOCKS[side]), tiles[side])
        place += BLOCKS[0] * BLOCKS[side]


@triton.jit
def load_tiles(place, first, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Rows [first, first + ROWS) of what :func:`store_tiles` stored."""
    tiles = ()
    for side in tl.static_range(len(BLOCKS)):
        tiles = tiles + (tl.load(place + first * BLOCKS[side] + tile_offsets(ROWS, BLOCKS[side])),)
        place += BLOCKS[0] * BLOCKS[side]
    return tiles


@triton.jit
def load_kept_distances(slot, least, first, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    pairs = load_tiles(pairs_in(slot + HEAD, BLOCKS), first, ROWS, BLOCKS)
    of_rows = tl.load(slot + HEAD + first + tl.arange(0, ROWS))
    norms = load_norms(slot, BLOCKS)
    close = has_close(slot)
    squares = ()
    for side in tl.static_range(len(BLOCKS)):
        from_products = of_rows[:, None] + norms[side][None, :] - 2 * pairs[side]
        squares = squares + (tl.where(close, pairs[side], from_products),)
    return roots_of_squares(squares, least, first, ROWS, BLOCKS)
