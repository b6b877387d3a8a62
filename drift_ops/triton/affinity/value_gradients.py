"""Streaming backward, the gradient of values: ``dv_j = w_j Σ_i A_ij grad_num_i``, a program walking all queries for a
tile of keys and a chunk of dimensions, with all widths in one walk."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import autotune
from ..tiles import load_vector
from .blocks import choose_blocks
from .blocks import key_tiles as count_key_tiles
from .logit import tile_logits
from .pairs import Pairs, distances_of_tile, key_tiles, keys_of_tile
from .rows import LARGEST_EXPONENT, Halves, add_weighted, chunk_of_rows, power_of_two
from .softmax import Statistics, tile_affinities


@triton.jit
def values_kernel(
    pairs,
    stats,
    grad_num,  # halves [S, G, sides, N, DEPTH]
    grad_v,  # [G, M, D]
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    N, M, D = pairs.N, pairs.M, pairs.D
    col_tiles = key_tiles(pairs, BLOCK_K)
    chunks = tl.cdiv(D, BLOCK_V)
    program = tl.program_id(0)
    tile = keys_of_tile(pairs, program % col_tiles, BLOCK_K)
    start = program // col_tiles % chunks * BLOCK_V
    g = (program // col_tiles // chunks).to(tl.int64)
    total = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    e = tl.zeros([BLOCK_K], tl.float32) + LARGEST_EXPONENT
    for row_tile in range(tl.cdiv(N, BLOCK_Q)):
        i = row_tile * BLOCK_Q
        d = distances_of_tile(pairs, g, i, tile, BLOCK_Q, BLOCK_K, BLOCK_D)
        for s in range(pairs.S):
            problem = s * pairs.G + g
            L = tile_logits(pairs, d, s, g, i - tile.first, BLOCK_Q, BLOCK_K)
            A = tile_affinities(pairs, stats, L, problem, i, tile.first, N - i, tile.count, BLOCK_Q, BLOCK_K)
            row = (problem * pairs.sides + tile.side) * N + i
            x = chunk_of_rows(grad_num, row, N - i, start, pairs.EXACT, pairs.DEPTH, BLOCK_Q, BLOCK_V)
            total, e = add_weighted(total, e, tl.trans(A) * x.powers[None, :], x.hi, x.lo, pairs.EXACT)
    total *= power_of_two(-e)[:, None]
    if pairs.w is not None:
        total *= load_vector(pairs.w + g * M + tile.first, tile.count, 0, BLOCK_K)[:, None]
    n = tl.arange(0, BLOCK_K)[:, None]
    dim = start + tl.arange(0, BLOCK_V)[None, :]
    tl.store(grad_v + (g * M + tile.first) * D + n * D + dim, total, mask=(n < tile.count) & (dim < D))


def find_value_gradients(pairs: Pairs, stats: Statistics, grad_num: Halves) -> Tensor:
    grad_v = torch.empty_like(pairs.k)
    autotune.start(
        values_kernel,
        lambda by: (count_key_tiles(pairs, by["BLOCK_K"]) * triton.cdiv(pairs.D, by["BLOCK_V"]) * pairs.G,),
        pairs,
        stats,
        grad_num,
        grad_v,
        configuration=choose_blocks("values", pairs).options(),
    )
    return grad_v
