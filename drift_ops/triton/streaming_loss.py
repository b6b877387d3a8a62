"""Form C for groups too large for the group kernels: the distances that its scale is the mean of.

Phases 2 and 3 are :mod:`drift_ops.streamed_loss`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import streamed_loss
from . import launch, streaming_tiles
from .streaming_tiles import common_arguments, count_tiles, cut, distances, find_tile
from .tiles import load_vector


@triton.jit
def scale_kernel(
    q,  # [G, N, D]
    k,  # [G, M, D]
    w,  # [G, M]
    q_norms,  # [G, N] or None, see distances
    k_norms,
    sums,  # [G · col_parts · row_parts] float64
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
    PRECISION: tl.constexpr,
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
    total = tl.zeros([1], tl.float64)
    for row_tile in range(row_part * row_tiles, row_end):
        i = row_tile * BLOCK_Q
        for col_tile in range(col_part * col_tiles, col_end):
            j, k_count, _ = find_tile(col_tile, M, split, BLOCK_K)
            d, exists = distances(
                q,
                k,
                q_norms,
                k_norms,
                g * N + i,
                g * M + j,
                N - i,
                k_count,
                i - j,
                D,
                least,
                None,
                0.0,
                SELF,
                PRECISION,
                BLOCK_Q,
                BLOCK_K,
                BLOCK_D,
            )
            of_keys = tl.sum(tl.where(exists, d, 0.0), 0) * load_vector(w + g * M + j, k_count, 0, BLOCK_K)
            total += tl.sum(of_keys, 0).to(tl.float64)
    tl.store(sums + program + tl.arange(0, 1), total)


def loss_scale(points: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Phase 1: ``[mean d·w, mean w]`` in float64; nothing is kept."""
    gen, targets, w = streamed_loss.centred(points, weights)
    G, N, M = *gen.shape[:2], targets.shape[1]
    arguments = common_arguments(gen, targets, "laplace", (), 1.0, 0, True, streamed_loss.SELF_DISTANCE)
    with launch.on_device_of(gen):
        blocks = streaming_tiles.choose_blocks("statistics", gen, targets)
        parts = cut(triton.cdiv(N, blocks.queries), count_tiles(M, M, blocks.keys), G)
        sums = gen.new_empty(G * parts.row_parts * parts.col_parts, dtype=torch.float64)
        scale_kernel[sums.numel(),](
            w=w,
            sums=sums,
            least=streamed_loss.LEAST_DISTANCE,
            **{n: arguments[n] for n in ("q", "k", "q_norms", "k_norms", "N", "M", "D", "split", "SELF", "PRECISION")},
            **parts._asdict(),
            **blocks.options(),
        )
    return torch.stack([sums.sum() / (G * N * M), w.mean(dtype=torch.float64)]), gen.new_empty(0)
