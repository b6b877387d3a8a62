"""Form C for groups too large for the group kernels: the distances that its scale is the mean of.

Phases 2 and 3 are :mod:`drift_ops.streamed_loss`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import streamed_loss
from ..spec import LossMap, LossSpec
from . import autotune, launch, streaming_parts
from .streaming_parts import (
    forward_arguments,
    hide_missing,
    inverse_of,
    load_whole,
    scale_of_products,
    tile_distances,
)
from .streaming_tiles import count_tiles, cut, find_tile
from .tiles import load_vector


@triton.jit
def scale_kernel(
    q,  # [G, N, D]
    k,  # [G, M, D]
    w,  # [G, M]
    norms,  # of q [G, N] and of k [G, M], unless DIFFERENCES
    q_halves,  # [G, q_rows, DEPTH], unless DIFFERENCES
    k_halves,  # [G, M, DEPTH]
    sums,  # [G · col_parts · row_parts] float64
    unit,
    self_distance,
    q_rows,
    N,
    M,
    D,
    split,
    least,
    row_parts,
    col_parts,
    row_tiles,  # of a rectangle
    col_tiles,
    SELF: tl.constexpr,
    SPLIT: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``Σ d_ij w_j`` over one rectangle."""
    program = tl.program_id(0)
    row_part = program % row_parts
    col_part = program // row_parts % col_parts
    g = (program // row_parts // col_parts).to(tl.int64)
    row_end = tl.minimum((row_part + 1) * row_tiles, tl.cdiv(N, BLOCK_Q))
    col_end = tl.minimum((col_part + 1) * col_tiles, tl.cdiv(split, BLOCK_K) + tl.cdiv(M - split, BLOCK_K))
    undo = scale_of_products(q_halves[2] + g, DIFFERENCES)
    per_unit = inverse_of(unit)
    total = tl.zeros([1], tl.float64)
    for row_tile in range(row_part * row_tiles, row_end):
        i = row_tile * BLOCK_Q
        q_parts = load_whole(q_halves, g * q_rows + i, N - i, SPLIT, DIFFERENCES, DEPTH, BLOCK_Q, BLOCK_D)
        for col_tile in range(col_part * col_tiles, col_end):
            j, k_count, side = find_tile(col_tile, M, split, BLOCK_K)
            k_parts = load_whole(k_halves, g * M + j, k_count, SPLIT, DIFFERENCES, DEPTH, BLOCK_K, BLOCK_D)
            d = tile_distances(
                q_parts, k_parts, q + (g * N + i) * D, k + (g * M + j) * D, norms[0] + (g * N + i),
                norms[1] + (g * M + j), undo, N - i, k_count, i - j, D, least, per_unit, self_distance,
                SELF, SPLIT, DIFFERENCES, DEPTH, BLOCK_Q, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            d = hide_missing(d, 0.0, N - i, k_count, i - j, SELF, BLOCK_Q, BLOCK_K)
            of_keys = tl.sum(d, 0) * load_vector(w + g * M + j, k_count, 0, BLOCK_K)
            total += tl.sum(of_keys, 0).to(tl.float64)
    tl.store(sums + program + tl.arange(0, 1), total)


def loss_scale(spec: LossSpec, of_map: LossMap) -> tuple[Tensor, Tensor]:
    """Phase 1: ``[mean d·w, mean w]`` in float64; nothing is kept."""
    gen, targets, w = streamed_loss.centred(of_map)
    G, N, M = *gen.shape[:2], targets.shape[1]
    with launch.on_device_of(gen):
        arguments = forward_arguments(gen, targets, 0, True, spec.least_distance, 0.0, None)
        blocks = streaming_parts.choose_blocks("statistics", gen, targets)
        parts = cut(triton.cdiv(N, blocks.queries), count_tiles(M, M, blocks.keys), G)
        sums = gen.new_empty(G * parts.row_parts * parts.col_parts, dtype=torch.float64)
        autotune.start(
            scale_kernel,
            (sums.numel(),),
            w=w,
            sums=sums,
            **arguments,
            **parts._asdict(),
            configuration=blocks.options(),
        )
    return torch.stack([sums.sum() / (G * N * M), w.mean(dtype=torch.float64)]), gen.new_empty(0)
