"""What phase 1 keeps of a group for phase 2.

Its exponent, the row of its origin and whether pairs are close, in HEAD floats; by target its squared norm, a power of
two that brings its length to [2^6, 2^7), the inverse of that, and its weight times that; products of gen and every
side, or squared distances where pairs are close; and products of the other sides with each other, so scaled, in two
parts.
With close pairs the forces may be much shorter than the targets, and too little would be left of products that cancel:
the moments of such a group come from its points.
"""

import triton
import triton.language as tl

from ..halves import exponent, split
from ..tiles import load_vector
from .points import roots_of_squares

HEAD = tl.constexpr(32)  # floats for what a group has one of


@triton.jit
def slot_of(kept, g, BLOCKS: tl.constexpr):
    floats = pairs_in(HEAD, BLOCKS)
    for later in tl.static_range(len(BLOCKS)):
        for side in tl.static_range(later + 1):
            floats += BLOCKS[later] * BLOCKS[side]
    return kept + g * floats


@triton.jit
def pairs_in(slot, BLOCKS: tl.constexpr):
    """Where the pairs start, after head and vectors."""
    for side in tl.static_range(len(BLOCKS)):
        slot += 4 * BLOCKS[side]
    return slot


@triton.jit
def vector_in(slot, kind: tl.constexpr, BLOCKS: tl.constexpr, side: tl.constexpr):
    """Of the targets of a side: 0 squared norms, 1 scales, 2 their inverses, 3 weights over scales."""
    slot += HEAD + kind * BLOCKS[side]
    for before in tl.static_range(side):
        slot += 4 * BLOCKS[before]
    return slot + tl.arange(0, BLOCKS[side])


@triton.jit
def store_head(slot, e, origin_row, any_close):
    n = tl.arange(0, HEAD)
    head = tl.where(n == 0, e, tl.where(n == 1, origin_row.to(tl.float32), 0.0))
    tl.store(slot + n, tl.where(n == 2, any_close.to(tl.float32), head))


@triton.jit
def load_head(slot):
    return tl.load(slot), tl.load(slot + 1).to(tl.int32)


@triton.jit
def has_close(slot, exists=True):
    return tl.load(slot + 2, mask=exists, other=0.0) > 0


@triton.jit
def tile_offsets(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of a tile."""
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def keep_others(slot, norms, products, weights, counts, BLOCKS: tl.constexpr):
    """What is kept by target, and the products of the sides but gen."""
    scales = ()
    for side in tl.static_range(len(BLOCKS)):
        e = exponent(tl.sqrt(norms[side])) - 7
        exists = norms[side] > 0
        scales = scales + (tl.where(exists, tl.exp2(e), 0.0),)
        weight = load_vector(weights[side], counts[side], 0, BLOCKS[side])
        tl.store(vector_in(slot, 0, BLOCKS, side), norms[side])
        tl.store(vector_in(slot, 1, BLOCKS, side), scales[side])
        inverse = tl.where(exists, tl.exp2(-e), 0.0)
        tl.store(vector_in(slot, 2, BLOCKS, side), inverse)
        tl.store(vector_in(slot, 3, BLOCKS, side), weight * inverse)
    slot = pairs_in(slot + HEAD, BLOCKS)
    for side in tl.static_range(len(BLOCKS)):
        slot += BLOCKS[0] * BLOCKS[side]
    for later in tl.static_range(1, len(BLOCKS)):
        for side in tl.static_range(1, later + 1):
            product = products[len(BLOCKS) + later * (later - 1) // 2 + side - 1]
            hi, lo = split(product * scales[later][:, None] * scales[side][None, :])
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
def load_tiles(place, BLOCKS: tl.constexpr):
    tiles = ()
    for side in tl.static_range(len(BLOCKS)):
        tiles = tiles + (tl.load(place + tile_offsets(BLOCKS[0], BLOCKS[side])),)
        place += BLOCKS[0] * BLOCKS[side]
    return tiles


@triton.jit
def load_kept_distances(slot, BLOCKS: tl.constexpr):
    pairs = load_tiles(pairs_in(slot + HEAD, BLOCKS), BLOCKS)
    norms = load_norms(slot, BLOCKS)
    close = has_close(slot)
    squares = ()
    for side in tl.static_range(len(BLOCKS)):
        from_products = norms[0][:, None] + norms[side][None, :] - 2 * pairs[side]
        squares = squares + (tl.where(close, pairs[side], from_products),)
    return roots_of_squares(squares, BLOCKS)


@triton.jit
def load_norms(slot, BLOCKS: tl.constexpr):
    norms = ()
    for side in tl.static_range(len(BLOCKS)):
        norms = norms + (tl.load(vector_in(slot, 0, BLOCKS, side)),)
    return norms
