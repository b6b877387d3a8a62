"""Form C for groups too large for the group kernels: the distances that its scale is the mean of.

Phases 2 and 3 are :mod:`drift_ops.streamed_loss`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import streamed_loss
from ...spec import AffinitySpec, LossMap, LossSpec
from .. import autotune, launch
from ..affinity.blocks import choose_blocks, cut
from ..affinity.pairs import FAR, distances, keys, keys_of_tile, pairs_of, queries, walk_of_program
from ..tiles import load_vector


@triton.jit
def streamed_scale_kernel(
    pairs,
    sums,  # [G · rectangles.cols · rectangles.rows] float64
    rectangles,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``Σ d_ij w_j`` over one rectangle."""
    walk = walk_of_program(pairs, rectangles, BLOCK_Q, BLOCK_K)
    total = tl.zeros([1], tl.float64)
    for row_tile in range(walk.first_row_tile, walk.row_end):
        i = row_tile * BLOCK_Q
        own = queries(pairs, walk.g, i, BLOCK_Q, BLOCK_D)
        for col_tile in range(walk.first_col_tile, walk.col_end):
            tile = keys_of_tile(pairs, col_tile, BLOCK_K)
            others = keys(pairs, walk.g, tile, BLOCK_K, BLOCK_D)
            d = distances(pairs, own, others, i - tile.first, BLOCK_Q, BLOCK_K, BLOCK_D)
            w = load_vector(pairs.w + walk.g * pairs.M + tile.first, tile.count, 0, BLOCK_K)
            total += tl.sum(tl.sum(tl.where(d == FAR, 0.0, d), 0) * w, 0).to(tl.float64)
    tl.store(sums + tl.program_id(0) + tl.arange(0, 1), total)


def streamed_scale(spec: LossSpec, of_map: LossMap) -> Tensor:
    """Phase 1: ``[mean d·w, mean w]`` in float64, ``[1, 2]``."""
    gen, targets, w = streamed_loss.centred(of_map)
    G, N, M = *gen.shape[:2], targets.shape[1]
    with launch.on_device_of(gen):
        lengths = AffinitySpec("laplace", (), has_self=True, least_distance=spec.least_distance, self_distance=0.0)
        pairs = pairs_of(lengths, gen, targets, w, M)
        blocks = choose_blocks("statistics", pairs)
        rectangles = cut(pairs, blocks)
        sums = gen.new_empty(G * rectangles.rows * rectangles.cols, dtype=torch.float64)
        autotune.start(streamed_scale_kernel, (sums.numel(),), pairs, sums, rectangles, configuration=blocks.options())
    return torch.stack([sums.sum() / (G * N * M), w.mean(dtype=torch.float64)]).unsqueeze(0)
