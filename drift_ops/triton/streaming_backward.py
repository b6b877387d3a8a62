"""Large problems, backward: the vector-Jacobian product of the sums of :mod:`.streaming`, and of many small problems.

With the incoming ``g_ij = grad_num_i·v_j + grad_den_i`` (of the side of key j), the flow into a logit's affinity is
``B_ij = w_j A_ij g_ij``, none where the floor holds A, and
``dL = B − ½ softmax_j(L)·Σ_j B − ½ softmax_i(L)·Σ_i B``. dL times the gradient of L w.r.t. q_i is ``h_ij (q_i − k_j)``,
so ``dq_i = Σ_j h_ij (q_i − k_j)`` and ``dk_j = Σ_i h_ij (k_j − q_i)``.

- Flows: Σ_j B and Σ_i B, and the gradient of w, in rectangles of tiles as for the statistics.
- Points: dq, a program walking all keys for a tile of queries; then dk, walking all queries for a tile of keys. Pairs
  so close that ``h q − h k`` would cancel are left to a kernel that works with differences; for small D, all pairs are.
- Values: ``dv_j = w_j Σ_i A_ij grad_num_i``, walking all queries for a tile of keys.

All widths are summed in one walk. Points and values do their work again for every chunk of dimensions.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, streaming_tiles
from .streaming_tiles import (
    add_product,
    common_arguments,
    count_tiles,
    cut,
    distances,
    find_tile,
    products,
    tile_affinities,
    width_of,
)
from .tiles import CLOSE, DIFFERENCES_UP_TO, kernel_logits, load_rows, load_vector


@triton.jit
def add_to_sums(slots, count, sums, fresh, BLOCK: tl.constexpr):
    """Adds ``sums`` [BLOCK] to running sums; to nothing where they are ``fresh``."""
    n = tl.arange(0, BLOCK)
    old = tl.load(slots + n, mask=(n < count) & (fresh == 0), other=0.0)
    tl.store(slots + n, old + sums, mask=n < count)


@triton.jit
def incoming(
    v,  # first row of the tile
    grad_num,
    grad_den,
    q_count,
    k_count,
    D,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``g_ij = grad_num_i·v_j + grad_den_i`` of a tile."""
    g = products(grad_num, v, q_count, k_count, D, PRECISION, BLOCK_Q, BLOCK_K, BLOCK_D)
    return g + load_vector(grad_den, q_count, 0, BLOCK_Q)[:, None]


@triton.jit
def flows_kernel(
    q,  # [G, N, D]
    k,  # [G, M, D]
    v,  # [G, M, D]
    w,  # [G, M] or None
    q_norms,  # [G, N] or None, see distances
    k_norms,
    row_stats,  # [S, G, 2, N]
    col_stats,  # [S, G, 2, M]
    grad_num,  # [S, G, sides, N, D]
    grad_den,  # [S, G, sides, N]
    row_slots,  # [S, G, col_parts, N]
    col_slots,  # [S, G, row_parts, M]
    weight_slots,  # [G, row_parts, M], or None without w
    widths,  # S floats
    temperature,
    least_affinity,
    G,
    N,
    M,
    D,
    split,
    sides,
    row_parts,
    col_parts,
    row_tiles,
    col_tiles,
    GAUSSIAN: tl.constexpr,
    SELF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of B over the rows and columns of one rectangle, and of ``A g`` over its columns."""
    program = tl.program_id(0)
    row_part = program % row_parts
    col_part = program // row_parts % col_parts
    g = (program // row_parts // col_parts).to(tl.int64)
    row_end = tl.minimum((row_part + 1) * row_tiles, tl.cdiv(N, BLOCK_Q))
    col_end = tl.minimum((col_part + 1) * col_tiles, tl.cdiv(split, BLOCK_K) + tl.cdiv(M - split, BLOCK_K))
    for row_tile in range(row_part * row_tiles, row_end):
        i = row_tile * BLOCK_Q
        for col_tile in range(col_part * col_tiles, col_end):
            j, k_count, side = find_tile(col_tile, M, split, BLOCK_K)
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
                0.0,
                None,
                0.0,
                SELF,
                PRECISION,
                BLOCK_Q,
                BLOCK_K,
                BLOCK_D,
            )
            fresh_rows = col_tile == col_part * col_tiles
            fresh_cols = row_tile == row_part * row_tiles
            grad_w = tl.zeros([BLOCK_K], tl.float32)
            for s in range(len(widths)):
                problem = s * G + g
                logits = kernel_logits(d, exists, width_of(widths, s), temperature, GAUSSIAN)
                rows = row_stats + problem * 2 * N + i
                cols = col_stats + problem * 2 * M + j
                A = tile_affinities(logits, exists, rows, cols, N, M, N - i, k_count, least_affinity, BLOCK_Q, BLOCK_K)
                row = (problem * sides + side) * N + i
                B = A * incoming(
                    v + (g * M + j) * D,
                    grad_num + row * D,
                    grad_den + row,
                    N - i,
                    k_count,
                    D,
                    PRECISION,
                    BLOCK_Q,
                    BLOCK_K,
                    BLOCK_D,
                )
                grad_w += tl.sum(B, 0)
                B = tl.where(A > least_affinity, B, 0.0)
                if w is not None:
                    B *= load_vector(w + g * M + j, k_count, 0, BLOCK_K)[None, :]
                row_slot = row_slots + (problem * col_parts + col_part) * N + i
                col_slot = col_slots + (problem * row_parts + row_part) * M + j
                add_to_sums(row_slot, N - i, tl.sum(B, 1), fresh_rows, BLOCK_Q)
                add_to_sums(col_slot, k_count, tl.sum(B, 0), fresh_cols, BLOCK_K)
            if w is not None:
                add_to_sums(weight_slots + (g * row_parts + row_part) * M + j, k_count, grad_w, fresh_cols, BLOCK_K)
            tl.debug_barrier()  # another thread of this program may read what one wrote


@triton.jit
def pulls_of_tile(
    d,
    exists,
    g,
    i,  # first query of the tile
    j,  # first key
    side,
    k_count,
    v,
    w,
    row_stats,
    col_stats,
    row_flows,
    col_flows,
    grad_num,
    grad_den,
    widths,
    temperature,
    least_affinity,
    G,
    N,
    M,
    D,
    sides,
    GAUSSIAN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """h_ij of a tile, summed over the widths."""
    q_count = N - i
    h = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for s in range(len(widths)):
        problem = s * G + g
        width = width_of(widths, s)
        logits = kernel_logits(d, exists, width, temperature, GAUSSIAN)
        rows = row_stats + problem * 2 * N + i
        cols = col_stats + problem * 2 * M + j
        A = tile_affinities(logits, exists, rows, cols, N, M, q_count, k_count, least_affinity, BLOCK_Q, BLOCK_K)
        row = (problem * sides + side) * N + i
        grad = A * incoming(
            v + (g * M + j) * D,
            grad_num + row * D,
            grad_den + row,
            q_count,
            k_count,
            D,
            PRECISION,
            BLOCK_Q,
            BLOCK_K,
            BLOCK_D,
        )
        grad = tl.where(A > least_affinity, grad, 0.0)
        if w is not None:
            grad *= load_vector(w + g * M + j, k_count, 0, BLOCK_K)[None, :]
        top = load_vector(rows, q_count, 0, BLOCK_Q)
        factor = load_vector(rows + N, q_count, 0, BLOCK_Q)
        flow = load_vector(row_flows + problem * N + i, q_count, 0, BLOCK_Q)
        grad -= tl.exp(logits - top[:, None]) * (flow * factor * factor * 0.5)[:, None]
        top = load_vector(cols, k_count, 0, BLOCK_K)
        factor = load_vector(cols + M, k_count, 0, BLOCK_K)
        flow = load_vector(col_flows + problem * M + j, k_count, 0, BLOCK_K)
        grad -= tl.exp(logits - top[None, :]) * (flow * factor * factor * 0.5)[None, :]
        if GAUSSIAN:
            h -= tl.where(exists, grad * logits, 0.0) * (1 / (width * width))
        else:  # the gradient of a distance of 0 is 0
            h -= tl.where(exists & (d > 0), grad / d, 0.0) * (1 / width)
    return h


@triton.jit
def close_pairs(d, q_norms, k_norms, q_count, k_count, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """The pairs so close that ``h q − h k`` would cancel. The norms start at the tile."""
    q_part = load_vector(q_norms, q_count, 0, BLOCK_Q)
    k_part = load_vector(k_norms, k_count, 0, BLOCK_K)
    return d * d < (q_part[:, None] + k_part[None, :]) * CLOSE


@triton.jit
def differences_kernel(
    q,  # [G, N, D]
    k,  # [G, M, D]
    v,  # [G, M, D]
    w,  # [G, M] or None
    q_norms,  # [G, N] or None, see distances
    k_norms,
    row_stats,  # [S, G, 2, N]
    col_stats,  # [S, G, 2, M]
    row_flows,  # [S, G, N]
    col_flows,  # [S, G, M]
    grad_num,  # [S, G, sides, N, D]
    grad_den,  # [S, G, sides, N]
    grad,  # of q or of k, zeroed
    widths,  # S floats
    temperature,
    least_affinity,
    G,
    N,
    M,
    D,
    split,
    sides,
    OF_KEYS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    SELF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What close pairs (all, without norms) give to the gradient of a tile of queries, or of keys with OF_KEYS."""
    row_tiles = tl.cdiv(N, BLOCK_Q)
    col_tiles = tl.cdiv(split, BLOCK_K) + tl.cdiv(M - split, BLOCK_K)
    own_tiles = col_tiles if OF_KEYS else row_tiles
    own = tl.program_id(0) % own_tiles
    g = (tl.program_id(0) // own_tiles).to(tl.int64)
    for other in range(row_tiles if OF_KEYS else col_tiles):
        i = (other if OF_KEYS else own) * BLOCK_Q
        j, k_count, side = find_tile(own if OF_KEYS else other, M, split, BLOCK_K)
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
            0.0,
            None,
            0.0,
            SELF,
            PRECISION,
            BLOCK_Q,
            BLOCK_K,
            BLOCK_D,
        )
        if q_norms is not None:
            exists = exists & close_pairs(d, q_norms + g * N + i, k_norms + g * M + j, N - i, k_count, BLOCK_Q, BLOCK_K)
        if tl.max(exists.to(tl.int32)) > 0:
            h = pulls_of_tile(
                d,
                exists,
                g,
                i,
                j,
                side,
                k_count,
                v,
                w,
                row_stats,
                col_stats,
                row_flows,
                col_flows,
                grad_num,
                grad_den,
                widths,
                temperature,
                least_affinity,
                G,
                N,
                M,
                D,
                sides,
                GAUSSIAN,
                PRECISION,
                BLOCK_Q,
                BLOCK_K,
                BLOCK_D,
            )
            in_q = (g * N + i + tl.arange(0, BLOCK_Q)) * D
            in_k = (g * M + j + tl.arange(0, BLOCK_K)) * D
            q_exists = tl.arange(0, BLOCK_Q) < N - i
            k_exists = tl.arange(0, BLOCK_K) < k_count
            for dim in range(D):
                q_part = tl.load(q + in_q + dim, mask=q_exists, other=0.0)
                k_part = tl.load(k + in_k + dim, mask=k_exists, other=0.0)
                pulls = h * (q_part[:, None] - k_part[None, :])
                if OF_KEYS:
                    old = tl.load(grad + in_k + dim, mask=k_exists)
                    tl.store(grad + in_k + dim, old - tl.sum(pulls, 0), mask=k_exists)
                else:
                    old = tl.load(grad + in_q + dim, mask=q_exists)
                    tl.store(grad + in_q + dim, old + tl.sum(pulls, 1), mask=q_exists)
            tl.debug_barrier()  # another thread of this program may read what one wrote


@triton.jit
def products_kernel(
    q,  # [G, N, D]
    k,  # [G, M, D]
    v,  # [G, M, D]
    w,  # [G, M] or None
    q_norms,  # [G, N]
    k_norms,  # [G, M]
    row_stats,  # [S, G, 2, N]
    col_stats,  # [S, G, 2, M]
    row_flows,  # [S, G, N]
    col_flows,  # [S, G, M]
    grad_num,  # [S, G, sides, N, D]
    grad_den,  # [S, G, sides, N]
    grad,  # of q or of k: what close pairs give
    widths,  # S floats
    temperature,
    least_affinity,
    G,
    N,
    M,
    D,
    split,
    sides,
    OF_KEYS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    SELF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Adds what all other pairs give: a tile of queries, or of keys with OF_KEYS, and a chunk of its dimensions."""
    BLOCK: tl.constexpr = BLOCK_K if OF_KEYS else BLOCK_Q
    row_tiles = tl.cdiv(N, BLOCK_Q)
    col_tiles = tl.cdiv(split, BLOCK_K) + tl.cdiv(M - split, BLOCK_K)
    own_tiles = col_tiles if OF_KEYS else row_tiles
    chunks = tl.cdiv(D, BLOCK_V)
    program = tl.program_id(0)
    own = program % own_tiles
    start = program // own_tiles % chunks * BLOCK_V
    g = (program // own_tiles // chunks).to(tl.int64)
    total = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    factors = tl.zeros([BLOCK], tl.float32)
    for other in range(row_tiles if OF_KEYS else col_tiles):
        i = (other if OF_KEYS else own) * BLOCK_Q
        j, k_count, side = find_tile(own if OF_KEYS else other, M, split, BLOCK_K)
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
            0.0,
            None,
            0.0,
            SELF,
            PRECISION,
            BLOCK_Q,
            BLOCK_K,
            BLOCK_D,
        )
        close = close_pairs(d, q_norms + g * N + i, k_norms + g * M + j, N - i, k_count, BLOCK_Q, BLOCK_K)
        h = pulls_of_tile(
            d,
            exists & (close == 0),
            g,
            i,
            j,
            side,
            k_count,
            v,
            w,
            row_stats,
            col_stats,
            row_flows,
            col_flows,
            grad_num,
            grad_den,
            widths,
            temperature,
            least_affinity,
            G,
            N,
            M,
            D,
            sides,
            GAUSSIAN,
            PRECISION,
            BLOCK_Q,
            BLOCK_K,
            BLOCK_D,
        )
        if OF_KEYS:
            h = tl.trans(h)
            points = load_rows(q + (g * N + i) * D, N - i, start, D, BLOCK_Q, BLOCK_V)
        else:
            points = load_rows(k + (g * M + j) * D, k_count, start, D, BLOCK_K, BLOCK_V)
        factors += tl.sum(h, 1)
        total = add_product(total, h, points, PRECISION)
    if OF_KEYS:
        first, count, _ = find_tile(own, M, split, BLOCK_K)
        points = k
        row = g * M + first
    else:
        points = q
        count = N - own * BLOCK_Q
        row = g * N + own * BLOCK_Q
    total = factors[:, None] * load_rows(points + row * D, count, start, D, BLOCK, BLOCK_V) - total
    total += load_rows(grad + row * D, count, start, D, BLOCK, BLOCK_V)
    n = tl.arange(0, BLOCK)[:, None]
    dim = start + tl.arange(0, BLOCK_V)[None, :]
    tl.store(grad + row * D + n * D + dim, total, mask=(n < count) & (dim < D))


@triton.jit
def values_kernel(
    q,  # [G, N, D]
    k,  # [G, M, D]
    w,  # [G, M] or None
    q_norms,  # [G, N] or None, see distances
    k_norms,
    row_stats,  # [S, G, 2, N]
    col_stats,  # [S, G, 2, M]
    grad_num,  # [S, G, sides, N, D]
    grad_v,  # [G, M, D]
    widths,  # S floats
    temperature,
    least_affinity,
    G,
    N,
    M,
    D,
    split,
    sides,
    GAUSSIAN: tl.constexpr,
    SELF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Gradient of the values of a tile of keys: one chunk of their dimensions."""
    col_tiles = tl.cdiv(split, BLOCK_K) + tl.cdiv(M - split, BLOCK_K)
    chunks = tl.cdiv(D, BLOCK_V)
    program = tl.program_id(0)
    j, k_count, side = find_tile(program % col_tiles, M, split, BLOCK_K)
    start = program // col_tiles % chunks * BLOCK_V
    g = (program // col_tiles // chunks).to(tl.int64)
    total = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for row_tile in range(tl.cdiv(N, BLOCK_Q)):
        i = row_tile * BLOCK_Q
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
            0.0,
            None,
            0.0,
            SELF,
            PRECISION,
            BLOCK_Q,
            BLOCK_K,
            BLOCK_D,
        )
        for s in range(len(widths)):
            problem = s * G + g
            logits = kernel_logits(d, exists, width_of(widths, s), temperature, GAUSSIAN)
            rows = row_stats + problem * 2 * N + i
            cols = col_stats + problem * 2 * M + j
            A = tile_affinities(logits, exists, rows, cols, N, M, N - i, k_count, least_affinity, BLOCK_Q, BLOCK_K)
            row = (problem * sides + side) * N + i
            grads = load_rows(grad_num + row * D, N - i, start, D, BLOCK_Q, BLOCK_V)
            total = add_product(total, tl.trans(A), grads, PRECISION)
    if w is not None:
        total *= load_vector(w + g * M + j, k_count, 0, BLOCK_K)[:, None]
    n = tl.arange(0, BLOCK_K)[:, None]
    dim = start + tl.arange(0, BLOCK_V)[None, :]
    tl.store(grad_v + (g * M + j) * D + n * D + dim, total, mask=(n < k_count) & (dim < D))


def affinity_sums_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    row_stats: Tensor,
    col_stats: Tensor,
    grad_num: Tensor,
    grad_den: Tensor,
    kernel: str,
    widths: Sequence[float],
    temperature: float,
    split: int,
    has_self: bool,
    floor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`drift_ops.ops.affinity_sums_backward`."""
    (G, N, D), M, S, sides = q.shape, k.shape[1], len(widths), 2 if split else 1
    arguments = common_arguments(q, k, kernel, widths, temperature, split, has_self) | {
        "w": w,
        "row_stats": row_stats,
        "col_stats": col_stats,
        "grad_num": grad_num,
        "sides": sides,
        "least_affinity": math.sqrt(floor),
    }
    incoming = arguments | {"v": v, "grad_den": grad_den}
    if D <= DIFFERENCES_UP_TO and launch.splits_products():
        incoming["PRECISION"] = "ieee"  # products of so few dimensions need no tensor cores
    grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.empty_like(v)
    with launch.on_device_of(q):
        blocks = streaming_tiles.choose_blocks("flows", q, k)
        parts = cut(triton.cdiv(N, blocks.queries), count_tiles(M, split or M, blocks.keys), G)
        row_slots, col_slots = q.new_empty(S, G, parts.col_parts, N), q.new_empty(S, G, parts.row_parts, M)
        weight_slots = None if w is None else w.new_empty(G, parts.row_parts, M)
        flows_kernel[parts.row_parts * parts.col_parts * G,](
            row_slots=row_slots,
            col_slots=col_slots,
            weight_slots=weight_slots,
            **incoming,
            **parts._asdict(),
            **blocks.options(),
        )
        flows = {"row_flows": row_slots.sum(2), "col_flows": col_slots.sum(2)}
        for grad, of_keys in ((grad_q, False), (grad_k, True)):
            blocks = streaming_tiles.choose_blocks("differences", q, k)
            tiles = count_tiles(M, split or M, blocks.keys) if of_keys else triton.cdiv(N, blocks.queries)
            points = incoming | flows | {"grad": grad, "OF_KEYS": of_keys}
            differences_kernel[tiles * G,](**points, **blocks.options())
            if arguments["q_norms"] is not None:
                blocks = streaming_tiles.choose_blocks("products", q, k)
                tiles = count_tiles(M, split or M, blocks.keys) if of_keys else triton.cdiv(N, blocks.queries)
                products_kernel[tiles * triton.cdiv(D, blocks.values) * G,](**points, **blocks.options())
        blocks = streaming_tiles.choose_blocks("values", q, k)
        tiles = count_tiles(M, split or M, blocks.keys)
        values_kernel[tiles * triton.cdiv(D, blocks.values) * G,](grad_v=grad_v, **arguments, **blocks.options())
    return grad_q, grad_k, grad_v, q.new_empty(0) if weight_slots is None else weight_slots.sum(1)
