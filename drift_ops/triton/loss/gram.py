"""Products of the forces from products of the targets, without the points.

``Σ_i F_i·F'_i = Σ_ijk c_ij c'_ik t_j·t_k``, whatever the number of dimensions.
"""

import triton
import triton.language as tl

from ..group import one_of, zeros
from ..halves import exponent, split
from ..tiles import at_least, self_pairs
from .maps import find_map
from .products import GRAM, HEAD, has_close, load_norms, load_tiles, pairs_in, slot_of, tile_offsets
from .state import (
    affinities_of_scaled,
    load_exponents,
    load_rows_of,
    mean_of_forces,
    slope_of,
    slot_of_state,
    statistics_of,
)


@triton.jit
def _zero_product(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros in the registers where a product leaves its result: what they are subtracted from moves there, once."""
    return tl.dot(tl.zeros([ROWS, 16], dtype=tl.float16), tl.zeros([16, COLUMNS], dtype=tl.float16))


@triton.jit
def _load_gram(slot, products, exponents, BLOCKS: tl.constexpr):
    """Products of all scaled targets times GRAM, those of gen given: two parts of each, in the order of
    `.distances._nothing_yet`."""
    hi = ()
    lo = ()
    for side in tl.static_range(len(BLOCKS)):
        by_row, by_column = tl.exp2(exponents[0]) * GRAM, tl.exp2(exponents[side])
        parts = split(products[side] * by_row[:, None] * by_column[None, :])
        hi = hi + (parts[0],)
        lo = lo + (parts[1],)
    slot = pairs_in(slot + HEAD, BLOCKS)
    for side in tl.static_range(len(BLOCKS)):
        slot += BLOCKS[0] * BLOCKS[side]
    for later in tl.static_range(1, len(BLOCKS)):
        for side in tl.static_range(1, later + 1):
            halves = slot.to(tl.pointer_type(tl.float16)) + tile_offsets(BLOCKS[later], BLOCKS[side])
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
def _add_products(total, hi, lo, gram_hi, gram_lo, SPLIT: tl.constexpr, a: tl.constexpr, SIDES: tl.constexpr):
    """To ``Σ_j c_ij t_j·t_k`` of every side, that of the targets j of side a; the small parts first."""
    more = ()
    for b in tl.static_range(SIDES):
        of_b = total[b]
        if SPLIT:
            of_b = tl.dot(lo, _of_sides(gram_hi, a, b, SIDES), of_b)
            of_b = tl.dot(hi, _of_sides(gram_lo, a, b, SIDES), of_b)
        more = more + (tl.dot(hi, _of_sides(gram_hi, a, b, SIDES), of_b),)
    return more


@triton.jit
def _products_with_others(of_targets, r, d, slot, scale, numbers, BLOCKS: tl.constexpr):
    """Products of ``of_targets`` and the coefficients of every R before the r-th, summed over the targets: [N] each."""
    BLOCK_N: tl.constexpr = BLOCKS[0]
    sums = ()
    for _ in tl.static_range(len(numbers.R_list)):
        sums = sums + (tl.zeros([BLOCK_N], dtype=tl.float32),)
    for other in range(r):
        statistics = statistics_of(slot, other, BLOCKS)
        row_half, negative, positive, largest = load_rows_of(statistics, 0, BLOCK_N, BLOCK_N)
        slope = slope_of(scale, numbers, other)
        added = tl.zeros([BLOCK_N], dtype=tl.float32)
        for side in tl.static_range(len(BLOCKS)):
            A = affinities_of_scaled(d, slot, statistics, row_half, slope, numbers.least, BLOCKS, side)
            added += tl.sum(of_targets[side] * A, 1) * (-positive if side < len(BLOCKS) - 1 else negative)
        more = ()
        for n in tl.static_range(len(numbers.R_list)):
            more = more + (sums[n] + tl.where(n == other, added, 0.0),)
        sums = more
    return sums


@triton.jit
def gram_kernel(
    groups,
    numbers,
    maps,
    kept,  # see .products
    state,  # see .state
    scale,  # [maps of the call]
    moments,  # [G, R, R]
    BLOCKS: tl.constexpr,
    KEEP: tl.constexpr,  # distances in the state
):
    """``Σ_i F_i·F'_i = Σ_ijk c_ij c'_ik t_j·t_k``, unless the group has close pairs."""
    R: tl.constexpr = len(numbers.R_list)
    BLOCK_N: tl.constexpr = BLOCKS[0]
    SIDES: tl.constexpr = len(BLOCKS)
    n, place, g = find_map(maps, tl.program_id(0))
    of_group = slot_of(one_of(kept, n), g, BLOCKS)
    if has_close(of_group):
        return
    scale = tl.load(scale + place).to(tl.float32)
    slot = slot_of_state(one_of(state, n), g, R, BLOCKS, KEEP)
    norms = load_norms(of_group, BLOCKS)
    pairs = load_tiles(pairs_in(of_group + HEAD, BLOCKS), 0, BLOCK_N, BLOCKS)
    products = ()
    d = ()
    for side in tl.static_range(SIDES):
        product = pairs[side] - _zero_product(BLOCKS[0], BLOCKS[side])
        squared = norms[0][:, None] + norms[side][None, :] - 2 * product
        of_side = tl.sqrt(at_least(squared, numbers.least_distance * numbers.least_distance))
        if side == 0:
            of_self = numbers.least_distance + numbers.self_distance * tl.maximum(scale, numbers.least_scale)
            of_side = tl.where(self_pairs(0, BLOCKS[0], BLOCKS[0]), of_self, of_side)
        products = products + (product,)
        d = d + (of_side,)
    gram_hi, gram_lo = _load_gram(of_group, products, load_exponents(slot, BLOCKS), BLOCKS)
    by = mean_of_forces(scale, numbers, groups) / GRAM
    moments = one_of(moments, n) + g * R * R
    for r in range(R):  # not unrolled: the R would compete for registers
        statistics = statistics_of(slot, r, BLOCKS)
        row_half, negative, positive, largest = load_rows_of(statistics, 0, BLOCK_N, BLOCK_N)
        slope = slope_of(scale, numbers, r)
        e = exponent(largest)
        of_targets = ()  # Σ_j c_ij t_j·t_k
        for side in tl.static_range(SIDES):
            of_targets = of_targets + (zeros(BLOCKS[0], BLOCKS[side]),)
        itself = tl.zeros([BLOCK_N], dtype=tl.float32)
        for side in tl.static_range(SIDES):
            A = affinities_of_scaled(d, slot, statistics, row_half, slope, numbers.least, BLOCKS, side)
            by_row = (-positive if side < SIDES - 1 else negative) * tl.exp2(e)
            hi, lo = split(A * by_row[:, None])
            itself += tl.sum(of_targets[side] * (hi.to(tl.float32) + lo.to(tl.float32)), 1)
            of_targets = _add_products(of_targets, hi, lo, gram_hi, gram_lo, groups.SPLIT, side, SIDES)
            itself += tl.sum(of_targets[side] * (hi.to(tl.float32) + lo.to(tl.float32)), 1)
        # of F_r·F_r' for r' < r; after the products, with whose coefficients these would compete for registers
        sums = _products_with_others(of_targets, r, d, slot, scale, numbers, BLOCKS)
        down = tl.exp2(-e)
        for other in tl.static_range(R):
            moment = tl.sum(tl.where(other == r, itself * down, sums[other]) * down) * by
            if other <= r:
                tl.store(moments + r * R + other, moment)
                tl.store(moments + other * R + r, moment)
