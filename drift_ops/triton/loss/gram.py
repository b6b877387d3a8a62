"""Products of the forces from the kept products of the targets, without the points.

``Σ_i F_i·F'_i = Σ_ijk c_ij c'_ik t_j·t_k``, whatever the number of dimensions.
"""

import triton
import triton.language as tl

from ..group import zeros
from ..halves import exponent, split
from .coefficients import coefficients, largest_coefficients, ready_for_softmax
from .memory import GRAM, HEAD, load_distances, load_gram, load_vectors


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
def _add_products(total, hi, lo, gram_hi, gram_lo, EXACT: tl.constexpr, a: tl.constexpr):
    """To ``Σ_j c_ij t_j·t_k`` of every side, that of the targets j of side a; the small parts first."""
    SIDES: tl.constexpr = len(total)
    more = ()
    for b in tl.static_range(SIDES):
        of_b = total[b]
        if EXACT:
            of_b = tl.dot(lo, _of_sides(gram_hi, a, b, SIDES), of_b)
            of_b = tl.dot(hi, _of_sides(gram_lo, a, b, SIDES), of_b)
        more = more + (tl.dot(hi, _of_sides(gram_hi, a, b, SIDES), of_b),)
    return more


@triton.jit
def _products_with_others(of_targets, r, d, state, scale, numbers, groups):
    """Products of ``of_targets`` and the coefficients of every R before the r-th, summed over the targets: [N] each."""
    R: tl.constexpr = len(numbers.R_list)
    BLOCK_N: tl.constexpr = groups.BLOCKS[0]
    sums = ()
    for _ in tl.static_range(R):
        sums = sums + (tl.zeros([BLOCK_N], dtype=tl.float32),)
    for other in range(r):
        added = tl.zeros([BLOCK_N], dtype=tl.float32)
        for side in tl.static_range(len(groups.BLOCKS)):
            c = coefficients(d, state, other, scale, numbers, groups, 0, BLOCK_N, side)
            added += tl.sum(of_targets[side] * c, 1)
        more = ()
        for n in tl.static_range(R):
            more = more + (sums[n] + tl.where(n == other, added, 0.0),)
        sums = more
    return sums


@triton.jit
def _where_products_are(d, groups):
    """``d``, in the registers where a product leaves its result: it moves there once, and not for every R."""
    moved = ()
    for side in tl.static_range(len(groups.BLOCKS)):
        zero = tl.dot(
            tl.zeros([groups.BLOCKS[0], 16], dtype=tl.float16), tl.zeros([16, groups.BLOCKS[side]], dtype=tl.float16)
        )
        moved = moved + (d[side] - zero,)
    return moved


@triton.jit
def moments_of_products(moments, kept, state, scale, by, numbers, groups):
    """Stores ``by`` times the products of the forces of all R, of a group without close pairs."""
    R: tl.constexpr = len(numbers.R_list)
    BLOCK_N: tl.constexpr = groups.BLOCKS[0]
    SIDES: tl.constexpr = len(groups.BLOCKS)
    # loaded again: those of the statistics lie elsewhere, and would compete for registers
    d = _where_products_are(load_distances(kept, numbers.least_distance, groups, 0, BLOCK_N), groups)
    d = ready_for_softmax(d, scale, numbers, groups, 0, BLOCK_N)
    gram_hi, gram_lo = load_gram(kept, load_vectors(state + HEAD, groups), groups)
    for r in range(R):  # not unrolled: the R would compete for registers
        e = exponent(largest_coefficients(state, r, groups, 0, BLOCK_N))
        of_targets = ()  # Σ_j c_ij t_j·t_k
        for side in tl.static_range(SIDES):
            of_targets = of_targets + (zeros(BLOCK_N, groups.BLOCKS[side]),)
        itself = tl.zeros([BLOCK_N], dtype=tl.float32)
        for side in tl.static_range(SIDES):
            c = coefficients(d, state, r, scale, numbers, groups, 0, BLOCK_N, side)
            hi, lo = split(c * tl.exp2(e)[:, None])
            itself += tl.sum(of_targets[side] * (hi.to(tl.float32) + lo.to(tl.float32)), 1)
            of_targets = _add_products(of_targets, hi, lo, gram_hi, gram_lo, groups.EXACT, side)
            itself += tl.sum(of_targets[side] * (hi.to(tl.float32) + lo.to(tl.float32)), 1)
        # of F_r·F_r' for r' < r; after the products, with whose coefficients these would compete for registers
        sums = _products_with_others(of_targets, r, d, state, scale, numbers, groups)
        down = tl.exp2(-e)
        for other in tl.static_range(R):
            moment = tl.sum(tl.where(other == r, itself * down, sums[other]) * down) * by / GRAM
            if other <= r:
                tl.store(moments + r * R + other, moment)
                tl.store(moments + other * R + r, moment)
