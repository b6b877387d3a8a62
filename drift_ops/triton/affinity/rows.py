"""Rows of points or values as float16 halves (:mod:`..halves`), made once a call for the streaming kernels.

Every row has a power of two of its own, so that neither an outlier nor a weight costs other rows digits. The halves lie
in memory as the kernels want them: dimensions padded with zeros to ``depth``, so that loads are aligned and go straight
to where the tensor cores read.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..halves import LARGEST, add_product, product, split
from ..tiles import load_vector

WHOLE_UP_TO = 256  # dimensions of a tile of rows that is loaded as one
LARGEST_EXPONENT = tl.constexpr(120.0)


class Halves(NamedTuple):
    """Rows ``x = (hi + lo)·power``; at "high" lo is hi, and unused."""

    hi: Any  # float16 [rows, depth]
    lo: Any
    powers: Any  # float32 [rows]


def padded_depth(D: int) -> int:
    """Dimensions of the halves of rows of D dimensions."""
    return launch.padded_block(D) if D <= WHOLE_UP_TO else triton.cdiv(D, 64) * 64


def split_rows(x: Tensor) -> Halves:
    """The halves of contiguous ``x [..., D]``."""
    D, rows = x.shape[-1], x.numel() // x.shape[-1]
    exact, depth = launch.splits_products(), padded_depth(D)
    hi = x.new_empty(rows, depth, dtype=torch.float16)
    halves = Halves(hi, torch.empty_like(hi) if exact else hi, x.new_empty(rows))
    block_d = min(256, launch.padded_block(D))
    block = max(1, 4096 // block_d)
    split_kernel[triton.cdiv(rows, block),](
        x, halves, rows, D, DEPTH=depth, EXACT=exact, BLOCK=block, BLOCK_D=block_d, num_warps=4
    )
    return halves


@triton.jit
def power_of_two(e):
    """``2^e`` of a whole number e from -126 to 127."""
    return ((e.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def row_exponent(largest):
    """``e`` with ``2^13 <= largest·2^e < 2^14``, for which nothing of a row exceeds ``largest``; that of a row of zeros
    is the largest, since nothing limits it, and 0 where ``largest`` is not finite."""
    bits = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    e = (-bits + (LARGEST + 126)).to(tl.float32)
    return tl.where(bits == 255, 0.0, tl.minimum(e, LARGEST_EXPONENT))


@triton.jit
def split_kernel(
    x,  # [rows, D]
    halves,  # [rows, DEPTH]
    rows,
    D,
    DEPTH: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    given = (row < rows)[:, None]
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK_D):
        dim = start + tl.arange(0, BLOCK_D)[None, :]
        values = tl.load(x + row[:, None] * D + dim, mask=given & (dim < D), other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(values), 1))
    e = row_exponent(largest)
    tl.store(halves.powers + row, power_of_two(-e), mask=row < rows)
    for start in range(0, DEPTH, BLOCK_D):
        dim = start + tl.arange(0, BLOCK_D)[None, :]
        values = tl.load(x + row[:, None] * D + dim, mask=given & (dim < D), other=0.0)
        hi, lo = split(values * power_of_two(e)[:, None])
        tl.store(halves.hi + row[:, None] * DEPTH + dim, hi, mask=given & (dim < DEPTH))
        if EXACT:
            tl.store(halves.lo + row[:, None] * DEPTH + dim, lo, mask=given & (dim < DEPTH))


@triton.jit
def load_half(half, count, start, DEPTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Dimensions [start, start + BLOCK_D) of rows [0, count); zero where there is nothing."""
    row = tl.arange(0, BLOCK)[:, None]
    dim = start + tl.arange(0, BLOCK_D)[None, :]
    inside = row < count
    if DEPTH % BLOCK_D != 0:
        inside = inside & (dim < DEPTH)
    return tl.load(half + row * DEPTH + dim, mask=inside, other=0.0)


class Rows(NamedTuple):
    """The halves of the rows of a tile."""

    hi: Any  # all dimensions, if a block holds them; else where they are
    lo: Any
    powers: Any  # [BLOCK]
    count: Any  # of the rows that exist


@triton.jit
def chunk_of_rows(
    halves, first, count, start, EXACT: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Dimensions [start, start + BLOCK_D) of rows [first, first + count); hi twice unless EXACT."""
    hi = load_half(halves.hi + first * DEPTH, count, start, DEPTH, BLOCK, BLOCK_D)
    lo = hi
    if EXACT:
        lo = load_half(halves.lo + first * DEPTH, count, start, DEPTH, BLOCK, BLOCK_D)
    return Rows(hi, lo, load_vector(halves.powers + first, count, 0, BLOCK), count)


@triton.jit
def rows_of(halves, first, count, EXACT: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """All dimensions of rows [first, first + count), or where they are."""
    if BLOCK_D >= DEPTH:
        return chunk_of_rows(halves, first, count, 0, EXACT, DEPTH, BLOCK, BLOCK_D)
    else:
        powers = load_vector(halves.powers + first, count, 0, BLOCK)
        return Rows(halves.hi + first * DEPTH, halves.lo + first * DEPTH, powers, count)


@triton.jit
def products(
    a,  # Rows
    b,
    EXACT: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``a_i·b_j`` [BLOCK_A, BLOCK_B] of the rows of two tiles."""
    if BLOCK_D >= DEPTH:
        total = product(a.hi, a.lo, tl.trans(b.hi), tl.trans(b.lo), EXACT)
    else:
        total = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
        for start in range(0, DEPTH, BLOCK_D):
            a_hi = load_half(a.hi, a.count, start, DEPTH, BLOCK_A, BLOCK_D)
            b_hi = tl.trans(load_half(b.hi, b.count, start, DEPTH, BLOCK_B, BLOCK_D))
            a_lo = a_hi
            b_lo = b_hi
            if EXACT:
                a_lo = load_half(a.lo, a.count, start, DEPTH, BLOCK_A, BLOCK_D)
                b_lo = tl.trans(load_half(b.lo, b.count, start, DEPTH, BLOCK_B, BLOCK_D))
            total = add_product(total, a_hi, a_lo, b_hi, b_lo, EXACT, False)
    return total * a.powers[:, None] * b.powers[None, :]


@triton.jit
def add_weighted(total, e, coefficients, hi, lo, EXACT: tl.constexpr):
    """Adds ``coefficients @ (hi + lo)`` to the sum ``total·2^-e``, and returns total and e.

    Every row of the sum has an exponent e, LARGEST_EXPONENT at first, which the largest coefficients met so far allow.
    """
    allowed = tl.minimum(e, row_exponent(tl.max(tl.abs(coefficients), 1)))
    if tl.min(allowed - e, 0) < 0:
        total *= power_of_two(tl.maximum(allowed - e, -126.0))[:, None]
    c_hi, c_lo = split(coefficients * power_of_two(allowed)[:, None])
    if EXACT:  # the tensor cores cut what they add: a long sum must not run through them
        total += product(c_hi, c_lo, hi, lo, True)
    else:
        total = tl.dot(c_hi, hi, total)
    return total, allowed
