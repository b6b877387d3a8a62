"""Products of the forces from products of the targets, without the points.

``Σ_i F_i·F'_i = Σ_ijk c_ij c'_ik t_j·t_k``, whatever the number of dimensions.
"""

import triton
import triton.language as tl

from ..group import one_of, zeros
from ..halves import exponent, split
from ..tiles import at_least, self_pairs
from .kept import HEAD, has_close, load_norms, load_tiles, pairs_in, slot_of, tile_offsets, vector_in
from .points import LEAST_DISTANCE, find_map
from .statistics import SELF_DISTANCE, slope_of, statistics_of


@triton.jit
def _zero_product(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Zeros in the registers where a product leaves its result: what they are subtracted from moves there, once."""
    return tl.dot(tl.zeros([ROWS, 16], dtype=tl.float16), tl.zeros([16, COLUMNS], dtype=tl.float16))


@triton.jit
def _load_gram(slot, products, BLOCKS: tl.constexpr):
    """Products of all targets, those of gen given, between targets scaled to lengths in [2^6, 2^7): two parts of each,
    in the order of `.points._nothing_yet`."""
    hi = ()
    lo = ()
    scale = tl.load(vector_in(slot, 1, BLOCKS, 0))
    for side in tl.static_range(len(BLOCKS)):
        parts = split(products[side] * scale[:, None] * tl.load(vector_in(slot, 1, BLOCKS, side))[None, :])
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
    weight = tl.load(vector_in(slot, 3, BLOCKS, side))
    return at_least(A, least) * weight[None, :]


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
def _products_with_others(
    of_targets, r, d, slot, state, g, scale, R_list, least, BLOCKS: tl.constexpr, KEEP: tl.constexpr
):
    """Products of ``of_targets`` and the coefficients of every R before the r-th, summed over the targets: [N] each."""
    BLOCK_N: tl.constexpr = BLOCKS[0]
    sums = ()
    for _ in tl.static_range(len(R_list)):
        sums = sums + (tl.zeros([BLOCK_N], dtype=tl.float32),)
    for other in range(r):
        statistics = statistics_of(state, g, other, len(R_list), BLOCKS, KEEP)
        row_half, negative, positive = _statistics_by_row(statistics, BLOCK_N)
        slope = slope_of(scale, one_of(R_list, other))
        added = tl.zeros([BLOCK_N], dtype=tl.float32)
        for side in tl.static_range(len(BLOCKS)):
            A = _affinities(d, slot, statistics, row_half, slope, least, BLOCKS, side)
            added += tl.sum(of_targets[side] * A, 1) * (-positive if side < len(BLOCKS) - 1 else negative)
        more = ()
        for n in tl.static_range(len(R_list)):
            more = more + (sums[n] + tl.where(n == other, added, 0.0),)
        sums = more
    return sums


@triton.jit
def gram_moments_kernel(
    maps,  # see .points.find_map
    kept,
    state,
    scale,  # [maps of the call]
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
    n, place, g = find_map(maps, tl.program_id(0))
    slot = slot_of(one_of(kept, n), g, BLOCKS)
    if has_close(slot):
        return
    scale = tl.load(scale + place).to(tl.float32)
    state = one_of(state, n)
    norms = load_norms(slot, BLOCKS)
    pairs = load_tiles(pairs_in(slot + HEAD, BLOCKS), BLOCKS)
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
        longest = tl.maximum(longest, tl.max(tl.load(vector_in(slot, 2, BLOCKS, side))))
    unit = tl.maximum(scale / tl.sqrt(D * 1.0), 1e-3)
    by = 1 / (unit * unit * (counts[0] * 1.0) * (D * 1.0))
    moments = one_of(moments, n) + g * len(R_list) * len(R_list)
    for r in range(len(R_list)):  # not unrolled: the R would compete for registers
        statistics = statistics_of(state, g, r, len(R_list), BLOCKS, KEEP)
        row_half, negative, positive = _statistics_by_row(statistics, BLOCK_N)
        slope = slope_of(scale, one_of(R_list, r))
        e = exponent(negative * positive * longest)
        of_targets = ()  # Σ_j c_ij t_j·t_k
        for side in tl.static_range(SIDES):
            of_targets = of_targets + (zeros(BLOCKS[0], BLOCKS[side]),)
        itself = tl.zeros([BLOCK_N], dtype=tl.float32)
        for side in tl.static_range(SIDES):
            A = _affinities(d, slot, statistics, row_half, slope, least, BLOCKS, side)
            by_row = (-positive if side < SIDES - 1 else negative) * tl.exp2(e)
            hi, lo = split(A * by_row[:, None])
            itself += tl.sum(of_targets[side] * (hi.to(tl.float32) + lo.to(tl.float32)), 1)
            of_targets = _add_products(of_targets, hi, lo, gram_hi, gram_lo, SPLIT, side, SIDES)
            itself += tl.sum(of_targets[side] * (hi.to(tl.float32) + lo.to(tl.float32)), 1)
        # of F_r·F_r' for r' < r; after the products, with whose coefficients these would compete for registers
        sums = _products_with_others(of_targets, r, d, slot, state, g, scale, R_list, least, BLOCKS, KEEP)
        down = tl.exp2(-e)
        for other in tl.static_range(len(R_list)):
            moment = tl.sum(tl.where(other == r, itself * down, sums[other]) * down) * by
            if other <= r:
                tl.store(moments + r * len(R_list) + other, moment)
                tl.store(moments + other * len(R_list) + r, moment)
