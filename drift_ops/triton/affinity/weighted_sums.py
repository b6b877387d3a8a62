"""Streaming weighted sums of values: a program walks the keys of one side for one tile of queries, one width and one
chunk of dimensions."""

import triton
import triton.language as tl
from torch import Tensor

from .. import autotune
from ..tiles import load_vector
from .blocks import choose_blocks, query_tiles
from .logit import tile_logits
from .pairs import Pairs, distances, key_tiles, keys, keys_of_tile, queries
from .rows import LARGEST_EXPONENT, Halves, add_weighted, chunk_of_rows, power_of_two
from .softmax import Statistics, tile_affinities


@triton.jit
def weighted_sums_kernel(
    pairs,
    stats,
    values,  # [G, M, DEPTH] halves, or None: those of the keys
    num,  # [S, G, sides, N, D]
    den,  # [S, G, sides, N]
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """``Σ_j w_j A_ij v_j`` and ``Σ_j w_j A_ij``."""
    D = pairs.D
    row_tiles = tl.cdiv(pairs.N, BLOCK_Q)
    chunks = tl.cdiv(D, BLOCK_V)
    program = tl.program_id(0)
    i = program % row_tiles * BLOCK_Q
    chunk = program // row_tiles % chunks
    side = program // row_tiles // chunks % pairs.sides
    problem = (program // row_tiles // chunks // pairs.sides).to(tl.int64)  # s * G + g
    g = problem % pairs.G
    s = problem // pairs.G
    own = queries(pairs, g, i, BLOCK_Q, BLOCK_D)
    tiles_of_first = tl.cdiv(pairs.first_keys, BLOCK_K)
    last_tile = tl.where(side == pairs.sides - 1, key_tiles(pairs, BLOCK_K), tiles_of_first)
    weighted = tl.zeros([BLOCK_Q, BLOCK_V], tl.float32)
    e = tl.zeros([BLOCK_Q], tl.float32) + LARGEST_EXPONENT
    total = tl.zeros([BLOCK_Q], tl.float32)
    for of_keys in range(side * tiles_of_first, last_tile):
        tile = keys_of_tile(pairs, of_keys, BLOCK_K)
        j = tile.first
        others = keys(pairs, g, tile, BLOCK_K, BLOCK_D)
        d = distances(pairs, own, others, i - j, BLOCK_Q, BLOCK_K, BLOCK_D)
        L = tile_logits(pairs, d, s, g, i - j, BLOCK_Q, BLOCK_K)
        A = tile_affinities(pairs, stats, L, problem, i, j, own.count, tile.count, BLOCK_Q, BLOCK_K)
        if pairs.w is not None:
            A *= load_vector(pairs.w + g * pairs.M + j, tile.count, 0, BLOCK_K)[None, :]
        total += tl.sum(A, 1)
        if values is None and BLOCK_V == BLOCK_D and BLOCK_D >= pairs.DEPTH:
            v = others.rows
        else:
            v = chunk_of_rows(
                pairs.k_halves if values is None else values, g * pairs.M + j, tile.count, chunk * BLOCK_V,
                pairs.EXACT, pairs.DEPTH, BLOCK_K, BLOCK_V,
            )  # fmt: skip
        weighted, e = add_weighted(weighted, e, A * v.powers[None, :], v.hi, v.lo, pairs.EXACT)
    row = i + tl.arange(0, BLOCK_Q)
    dim = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
    out = (problem * pairs.sides + side) * pairs.N + row
    weighted *= power_of_two(-e)[:, None]
    tl.store(num + out[:, None] * D + dim[None, :], weighted, mask=(row < pairs.N)[:, None] & (dim < D)[None, :])
    if chunk == 0:
        tl.store(den + out, total, mask=row < pairs.N)


def find_weighted_sums(pairs: Pairs, stats: Statistics, values: Halves | None) -> tuple[Tensor, Tensor]:
    """num and den; ``values`` are halves ``[G·M, depth]``, None those of the keys."""
    S, G, sides, N, D = pairs.S.value, pairs.G, pairs.sides, pairs.N, pairs.D
    num, den = pairs.q.new_empty(S, G, sides, N, D), pairs.q.new_empty(S, G, sides, N)
    autotune.start(
        weighted_sums_kernel,
        lambda by: (query_tiles(pairs, by["BLOCK_Q"]) * triton.cdiv(D, by["BLOCK_V"]) * sides * S * G,),
        pairs,
        stats,
        values,
        num,
        den,
        configuration=choose_blocks("sums", pairs).options(),
    )
    return num, den
