"""The statistics of both softmaxes, and the affinities they give.

A row's or column's sum ``s·2^m`` of exponentials ``2^L`` is kept as ``(m, s^-½)``, m whole and s near 1, and (0, 0)
where nothing is unmasked. ``A_ij = sqrt(softmax_j(L)·softmax_i(L)) = 2^(L_ij − (m_i + n_j)/2)·(s_i·t_j)^-½`` then takes
one exponential, whose argument is rounded once, and no look at other pairs.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..tiles import NOTHING, finite_shift, load_vector


class Statistics(NamedTuple):
    """Of rows and columns, for S widths and G problems."""

    rows: Any  # [S, G, 2, N]
    cols: Any  # [S, G, 2, M]


@triton.jit
def entries_of_program(size, BLOCK: tl.constexpr):
    """The problem of a program of those that share ``problems [problems, size]`` out, and its entries."""
    blocks = tl.cdiv(size, BLOCK)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    return problem, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def merge(top, total, other_top, other_total):
    """Two sums of ``2^(L − top)`` as one."""
    both = tl.maximum(top, other_top)
    shift = finite_shift(both)
    return both, total * tl.exp2(top - shift) + other_total * tl.exp2(other_top - shift)


@triton.jit
def finish(top, total):
    """The statistics of a sum ``total·2^top``."""
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    top = tl.where(empty, 0.0, top)
    whole = tl.floor(top + tl.log2(total) + 0.5)
    return whole, tl.where(empty, 0.0, tl.rsqrt(total * tl.exp2(top - whole)))


@triton.jit
def affinities(L, row_top, row_factor, col_top, col_factor, least):
    """``max(A, least)``, 0 where the exponent is −∞; ``least`` is the root of the affinity floor, or None for 0."""
    exponent = L - (row_top * 0.5)[:, None] - (col_top * 0.5)[None, :]
    A = tl.exp2(exponent) * (row_factor[:, None] * col_factor[None, :])
    if least is not None:
        A = tl.where(exponent == NOTHING, 0.0, tl.where(A < least, least, A))
    return A


@triton.jit
def tile_affinities(pairs, stats, L, problem, i, j, q_count, k_count, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """``max(A, least_affinity)`` of the logits of a tile, from its first query and key on."""
    rows = stats.rows + problem * 2 * pairs.N + i
    cols = stats.cols + problem * 2 * pairs.M + j
    return affinities(
        L,
        load_vector(rows, q_count, 0, BLOCK_Q),
        load_vector(rows + pairs.N, q_count, 0, BLOCK_Q),
        load_vector(cols, k_count, 0, BLOCK_K),
        load_vector(cols + pairs.M, k_count, 0, BLOCK_K),
        pairs.least_affinity,
    )
