"""Streaming backward, the gradients of queries and keys.

``dL = B − ½ softmax_j(L)·Σ_j B − ½ softmax_i(L)·Σ_i B``, with the flows B of :mod:`.flows`. dL times the gradient of L
w.r.t. q_i is ``h_ij (q_i − k_j)``, so ``dq_i = Σ_j h_ij (q_i − k_j)`` and ``dk_j = Σ_i h_ij (k_j − q_i)``: a program
walks all keys for a tile of queries, or all queries for a tile of keys, with all widths in one walk. Pairs so close
that ``h q − h k`` would cancel are left to a kernel that works with differences; for small D, all pairs are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import CLOSE, load_rows, load_vector
from .blocks import Blocks, choose_blocks, query_tiles
from .blocks import key_tiles as count_key_tiles
from .flows import Flows, Incoming, flow_of_tile
from .logit import slopes, tile_logits, width_of
from .pairs import FAR, Pairs, distances_of_tile, key_tiles, keys_of_tile
from .rows import LARGEST_EXPONENT, add_weighted, chunk_of_rows, power_of_two
from .softmax import Statistics


@triton.jit
def _returned(L, stats, flows, size, count, BLOCK: tl.constexpr, AXIS: tl.constexpr):
    """``½ softmax(L)·Σ B`` of a tile, over rows (AXIS 1) or columns (0), whose statistics and flows start there."""
    top = tl.expand_dims(load_vector(stats, count, 0, BLOCK), AXIS)
    factor = load_vector(stats + size, count, 0, BLOCK)
    flow = load_vector(flows, count, 0, BLOCK)
    return tl.exp2(L - top) * tl.expand_dims(flow * factor * factor * 0.5, AXIS)


@triton.jit
def pulls_of_tile(
    pairs, stats, flows, incoming, d, g, i, tile,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h_ij of a tile, summed over the widths; 0 where d is FAR."""
    N, M = pairs.N, pairs.M
    h = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for s in range(pairs.S):
        problem = s * pairs.G + g
        L = tile_logits(pairs, d, s, g, i - tile.first, BLOCK_Q, BLOCK_K)
        _, grad = flow_of_tile(pairs, stats, incoming, L, problem, g, i, tile, BLOCK_Q, BLOCK_K, BLOCK_D)
        if flows is not None:
            grad -= _returned(L, stats.rows + problem * 2 * N + i, flows.rows + problem * N + i, N, N - i, BLOCK_Q, 1)
            j = tile.first
            cols = stats.cols + problem * 2 * M + j
            grad -= _returned(L, cols, flows.cols + problem * M + j, M, tile.count, BLOCK_K, 0)
        h += tl.where(d == FAR, 0.0, grad * slopes(L, d, width_of(pairs, s, g), pairs.LOGIT))
    if pairs.least_distance is not None:
        h = tl.where(d > pairs.least_distance, h, 0.0)
    return h


@triton.jit
def close_pairs(pairs, d, g, i, tile, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """The pairs so close that ``h q − h k`` would cancel."""
    q_norms = load_vector(pairs.q_norms + g * pairs.N + i, pairs.N - i, 0, BLOCK_Q)
    k_norms = load_vector(pairs.k_norms + g * pairs.M + tile.first, tile.count, 0, BLOCK_K)
    return d * d < (q_norms[:, None] + k_norms[None, :]) * CLOSE


@triton.jit
def differences_kernel(
    pairs,
    stats,
    flows,  # None where the affinities' potentials are constants
    incoming,
    grad,  # of q or of k, zeroed
    OF_KEYS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What close pairs (all, with DIFFERENCES) give to the gradient of a tile of queries, or of keys with OF_KEYS."""
    D = pairs.D
    row_tiles = tl.cdiv(pairs.N, BLOCK_Q)
    col_tiles = key_tiles(pairs, BLOCK_K)
    own_tiles = col_tiles if OF_KEYS else row_tiles
    own = tl.program_id(0) % own_tiles
    g = (tl.program_id(0) // own_tiles).to(tl.int64)
    for other in range(row_tiles if OF_KEYS else col_tiles):
        i = (other if OF_KEYS else own) * BLOCK_Q
        tile = keys_of_tile(pairs, own if OF_KEYS else other, BLOCK_K)
        d = distances_of_tile(pairs, g, i, tile, BLOCK_Q, BLOCK_K, BLOCK_D)
        if not pairs.DIFFERENCES:
            d = tl.where(close_pairs(pairs, d, g, i, tile, BLOCK_Q, BLOCK_K), d, FAR)
        if tl.max(tl.max((d != FAR).to(tl.int32), 1), 0) > 0:
            h = pulls_of_tile(pairs, stats, flows, incoming, d, g, i, tile, BLOCK_Q, BLOCK_K, BLOCK_D)
            in_q = (g * pairs.N + i + tl.arange(0, BLOCK_Q)) * D
            in_k = (g * pairs.M + tile.first + tl.arange(0, BLOCK_K)) * D
            q_exists = tl.arange(0, BLOCK_Q) < pairs.N - i
            k_exists = tl.arange(0, BLOCK_K) < tile.count
            for dim in range(D):
                q = tl.load(pairs.q + in_q + dim, mask=q_exists, other=0.0)
                k = tl.load(pairs.k + in_k + dim, mask=k_exists, other=0.0)
                pulls = h * (q[:, None] - k[None, :])
                if OF_KEYS:
                    old = tl.load(grad + in_k + dim, mask=k_exists)
                    tl.store(grad + in_k + dim, old - tl.sum(pulls, 0), mask=k_exists)
                else:
                    old = tl.load(grad + in_q + dim, mask=q_exists)
                    tl.store(grad + in_q + dim, old + tl.sum(pulls, 1), mask=q_exists)
            tl.debug_barrier()  # another thread of this program may read what one wrote


@triton.jit
def products_kernel(
    pairs,
    stats,
    flows,
    incoming,
    grad,  # of q or of k: what close pairs give
    OF_KEYS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Adds what all other pairs give: a tile of queries, or of keys with OF_KEYS, and a chunk of its dimensions."""
    BLOCK: tl.constexpr = BLOCK_K if OF_KEYS else BLOCK_Q
    D = pairs.D
    row_tiles = tl.cdiv(pairs.N, BLOCK_Q)
    col_tiles = key_tiles(pairs, BLOCK_K)
    own_tiles = col_tiles if OF_KEYS else row_tiles
    chunks = tl.cdiv(D, BLOCK_V)
    program = tl.program_id(0)
    own = program % own_tiles
    start = program // own_tiles % chunks * BLOCK_V
    g = (program // own_tiles // chunks).to(tl.int64)
    total = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    e = tl.zeros([BLOCK], tl.float32) + LARGEST_EXPONENT
    factors = tl.zeros([BLOCK], tl.float32)
    for other in range(row_tiles if OF_KEYS else col_tiles):
        i = (other if OF_KEYS else own) * BLOCK_Q
        tile = keys_of_tile(pairs, own if OF_KEYS else other, BLOCK_K)
        d = distances_of_tile(pairs, g, i, tile, BLOCK_Q, BLOCK_K, BLOCK_D)
        d = tl.where(close_pairs(pairs, d, g, i, tile, BLOCK_Q, BLOCK_K), FAR, d)
        h = pulls_of_tile(pairs, stats, flows, incoming, d, g, i, tile, BLOCK_Q, BLOCK_K, BLOCK_D)
        if OF_KEYS:
            h = tl.trans(h)
            x = chunk_of_rows(
                pairs.q_halves, g * pairs.q_rows + i, pairs.N - i, start, pairs.EXACT, pairs.DEPTH, BLOCK_Q, BLOCK_V
            )
        else:
            x = chunk_of_rows(
                pairs.k_halves, g * pairs.M + tile.first, tile.count, start, pairs.EXACT, pairs.DEPTH, BLOCK_K, BLOCK_V
            )
        factors += tl.sum(h, 1)
        total, e = add_weighted(total, e, h * x.powers[None, :], x.hi, x.lo, pairs.EXACT)
    if OF_KEYS:
        tile = keys_of_tile(pairs, own, BLOCK_K)
        count = tile.count
        points = pairs.k
        row = g * pairs.M + tile.first
    else:
        count = pairs.N - own * BLOCK_Q
        points = pairs.q
        row = g * pairs.N + own * BLOCK_Q
    total *= power_of_two(-e)[:, None]
    total = factors[:, None] * load_rows(points + row * D, count, start, D, BLOCK, BLOCK_V) - total
    total += load_rows(grad + row * D, count, start, D, BLOCK, BLOCK_V)
    n = tl.arange(0, BLOCK)[:, None]
    dim = start + tl.arange(0, BLOCK_V)[None, :]
    tl.store(grad + row * D + n * D + dim, total, mask=(n < count) & (dim < D))


def find_point_gradients(
    pairs: Pairs, stats: Statistics, flows: Flows | None, incoming: Incoming
) -> tuple[Tensor, Tensor]:
    """Of q and k."""
    grads = torch.zeros_like(pairs.q), torch.zeros_like(pairs.k)
    for grad, of_keys in zip(grads, (False, True), strict=True):  # no autotuning: both must find the same pairs close

        def tiles(blocks: Blocks, of_keys: bool = of_keys) -> int:
            return count_key_tiles(pairs, blocks.keys) if of_keys else query_tiles(pairs, blocks.queries)

        blocks = choose_blocks("differences", pairs)
        arguments = (pairs, stats, flows, incoming, grad, of_keys)
        differences_kernel[tiles(blocks) * pairs.G,](*arguments, **blocks.options())
        if not pairs.DIFFERENCES.value:
            blocks = choose_blocks("products", pairs)
            programs = tiles(blocks) * triton.cdiv(pairs.D, blocks.values) * pairs.G
            products_kernel[programs,](*arguments, **blocks.options())
    return grads
