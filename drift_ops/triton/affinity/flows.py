"""Streaming backward, first: how the incoming gradients flow through the affinities.

With ``g_ij = grad_num_i·v_j + grad_den_i`` (of the side of key j), the flow into the affinity of a logit is
``B_ij = w_j A_ij g_ij``, none where the floor holds A. Its sums by row and by column are what the softmaxes take back;
``Σ_i A_ij g_ij`` is the gradient of w_j. All come from rectangles of tiles, as the statistics do.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import autotune
from ..tiles import NOTHING, load_vector
from .blocks import choose_blocks, cut
from .logit import LOG2E, tile_logits
from .pairs import Pairs, distances_of_tile, keys_of_tile, walk_of_program
from .rows import products, rows_of
from .softmax import Statistics, tile_affinities


class Incoming(NamedTuple):
    """The incoming gradients, None for 0, and the values they belong to."""

    v: Any  # halves [G, M, DEPTH]
    grad_num: Any  # halves [S, G, sides, N, DEPTH]
    grad_den: Any  # [S, G, sides, N]
    grad_columns: Any = None  # of Σ_i A, [S, G, M]


class Flows(NamedTuple):
    rows: Any  # Σ_j B [S, G, N]
    cols: Any  # Σ_i B [S, G, M]
    of_logits: Any = None  # Σ_j B L [S, G, N]


@triton.jit
def incoming_of_tile(
    pairs, incoming, problem, g, i, tile, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    """g_ij of a tile."""
    row = (problem * pairs.sides + tile.side) * pairs.N + i
    if incoming.grad_num is not None:
        a = rows_of(incoming.grad_num, row, pairs.N - i, pairs.EXACT, pairs.DEPTH, BLOCK_Q, BLOCK_D)
        b = rows_of(incoming.v, g * pairs.M + tile.first, tile.count, pairs.EXACT, pairs.DEPTH, BLOCK_K, BLOCK_D)
    of_den = tl.zeros([BLOCK_Q], tl.float32)
    if incoming.grad_den is not None:
        of_den = load_vector(incoming.grad_den + row, pairs.N - i, 0, BLOCK_Q)
    if incoming.grad_num is not None:
        return products(a, b, pairs.EXACT, pairs.DEPTH, BLOCK_Q, BLOCK_K, BLOCK_D) + of_den[:, None]
    else:
        return tl.zeros([BLOCK_Q, BLOCK_K], tl.float32) + of_den[:, None]


@triton.jit
def flow_of_tile(
    pairs, stats, incoming, L, problem, g, i, tile, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    """``A g`` and B of a tile of logits."""
    A = tile_affinities(pairs, stats, L, problem, i, tile.first, pairs.N - i, tile.count, BLOCK_Q, BLOCK_K)
    unweighted = A * incoming_of_tile(pairs, incoming, problem, g, i, tile, BLOCK_Q, BLOCK_K, BLOCK_D)
    B = unweighted
    if pairs.w is not None:
        B *= load_vector(pairs.w + g * pairs.M + tile.first, tile.count, 0, BLOCK_K)[None, :]
    if incoming.grad_columns is not None:
        B += A * load_vector(incoming.grad_columns + problem * pairs.M + tile.first, tile.count, 0, BLOCK_K)[None, :]
    if pairs.least_affinity is not None:
        B = tl.where(A > pairs.least_affinity, B, 0.0)
    return unweighted, B


@triton.jit
def _add_to_sums(slots, count, sums, fresh, BLOCK: tl.constexpr):
    """Adds ``sums`` [BLOCK] to running sums; to nothing where they are ``fresh``."""
    n = tl.arange(0, BLOCK)
    old = tl.load(slots + n, mask=(n < count) & (fresh == 0), other=0.0)
    tl.store(slots + n, old + sums, mask=n < count)


@triton.jit
def flows_kernel(
    pairs,
    stats,
    incoming,
    row_slots,  # [S, G, rectangles.cols, N]
    col_slots,  # [S, G, rectangles.rows, M]
    weight_slots,  # [G, rectangles.rows, M], or None without w
    logit_slots,  # as row_slots, or None where it is not wanted
    rectangles,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """In one rectangle, sums of B over rows and columns, of ``A g`` over columns, and of ``B L`` over rows."""
    N, M = pairs.N, pairs.M
    walk = walk_of_program(pairs, rectangles, BLOCK_Q, BLOCK_K)
    g = walk.g
    for row_tile in range(walk.first_row_tile, walk.row_end):
        i = row_tile * BLOCK_Q
        for col_tile in range(walk.first_col_tile, walk.col_end):
            tile = keys_of_tile(pairs, col_tile, BLOCK_K)
            j = tile.first
            d = distances_of_tile(pairs, g, i, tile, BLOCK_Q, BLOCK_K, BLOCK_D)
            fresh_rows = col_tile == walk.first_col_tile
            fresh_cols = row_tile == walk.first_row_tile
            grad_w = tl.zeros([BLOCK_K], tl.float32)
            for s in range(pairs.S):
                problem = s * pairs.G + g
                L = tile_logits(pairs, d, s, g, i - j, BLOCK_Q, BLOCK_K)
                unweighted, B = flow_of_tile(pairs, stats, incoming, L, problem, g, i, tile, BLOCK_Q, BLOCK_K, BLOCK_D)
                grad_w += tl.sum(unweighted, 0)
                row_slot = (problem * rectangles.cols + walk.col) * N + i
                col_slot = col_slots + (problem * rectangles.rows + walk.row) * M + j
                _add_to_sums(row_slots + row_slot, N - i, tl.sum(B, 1), fresh_rows, BLOCK_Q)
                _add_to_sums(col_slot, tile.count, tl.sum(B, 0), fresh_cols, BLOCK_K)
                if logit_slots is not None:
                    of_logits = tl.sum(tl.where(L == NOTHING, 0.0, B * L), 1) * (1 / LOG2E)
                    _add_to_sums(logit_slots + row_slot, N - i, of_logits, fresh_rows, BLOCK_Q)
            if pairs.w is not None:
                slot = weight_slots + (g * rectangles.rows + walk.row) * M + j
                _add_to_sums(slot, tile.count, grad_w, fresh_cols, BLOCK_K)
            tl.debug_barrier()  # another thread of this program may read what one wrote


def find_flows(
    pairs: Pairs, stats: Statistics, incoming: Incoming, with_logits: bool = False
) -> tuple[Flows, Tensor | None]:
    """And the gradient of w ``[G, M]``, if there is one."""
    S, G = pairs.S.value, pairs.G
    blocks = choose_blocks("flows", pairs)
    rectangles = cut(pairs, blocks)
    new = pairs.q.new_empty
    row_slots, col_slots = new(S, G, rectangles.cols, pairs.N), new(S, G, rectangles.rows, pairs.M)
    weight_slots = None if pairs.w is None else new(G, rectangles.rows, pairs.M)
    logit_slots = torch.empty_like(row_slots) if with_logits else None
    autotune.start(
        flows_kernel,
        (rectangles.rows * rectangles.cols * G,),
        pairs,
        stats,
        incoming,
        row_slots,
        col_slots,
        weight_slots,
        logit_slots,
        rectangles,
        configuration=blocks.options(),
    )
    flows = Flows(row_slots.sum(2), col_slots.sum(2), None if logit_slots is None else logit_slots.sum(2))
    return flows, None if weight_slots is None else weight_slots.sum(1)
