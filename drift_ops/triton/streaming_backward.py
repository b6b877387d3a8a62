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

from . import autotune, launch, streaming_tiles
from .halves import exponent, product
from .halves import split as in_halves
from .streaming_parts import (
    AFFINITY_SCALE,
    Halves,
    common_arguments,
    largest_entries,
    load_parts,
    load_whole,
    power_of_two,
    products_of_parts,
    rows_of,
    scale_of,
    scale_of_products,
    split_points,
    tile_distances,
)
from .streaming_tiles import count_tiles, cut, find_tile, tile_affinities, width_of
from .tiles import CLOSE, kernel_logits, load_rows, load_vector, pairs_within, self_pairs


@triton.jit
def add_to_sums(slots, count, sums, fresh, BLOCK: tl.constexpr):
    """Adds ``sums`` [BLOCK] to running sums; to nothing where they are ``fresh``."""
    n = tl.arange(0, BLOCK)
    old = tl.load(slots + n, mask=(n < count) & (fresh == 0), other=0.0)
    tl.store(slots + n, old + sums, mask=n < count)


@triton.jit
def distances(
    q,
    k,
    norms,
    q_halves,
    k_halves,
    q_rows,
    g,
    i,  # first query of the tile
    j,  # first key
    k_count,
    N,
    M,
    D,
    SELF: tl.constexpr,
    SPLIT: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Distances of a tile, and which of its pairs exist and are not masked."""
    d = tile_distances(
        load_whole(q_halves, g * q_rows + i, N - i, SPLIT, DIFFERENCES, DEPTH, BLOCK_Q, BLOCK_D),
        load_whole(k_halves, g * M + j, k_count, SPLIT, DIFFERENCES, DEPTH, BLOCK_K, BLOCK_D), q + (g * N + i) * D,
        k + (g * M + j) * D, norms[0] + (g * N + i), norms[1] + (g * M + j),
        scale_of_products(q_halves[2] + g, DIFFERENCES), N - i, k_count, i - j, D, None, 1.0, 0.0,
        SELF, SPLIT, DIFFERENCES, DEPTH, BLOCK_Q, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    exists = pairs_within(N - i, k_count, BLOCK_Q, BLOCK_K)
    if SELF == "masked":
        exists = exists & (self_pairs(i - j, BLOCK_Q, BLOCK_K) == 0)
    return d, exists


@triton.jit
def incoming(
    v_halves,
    grad_halves,
    grad_den,
    g,
    problem_side,  # among those of grads and grad_den
    i,  # first query of the tile
    j,  # first key
    k_count,
    N,
    M,
    SPLIT: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``g_ij = grad_num_i·v_j + grad_den_i`` of a tile."""
    row = problem_side * N + i
    a = load_whole(grad_halves, row, N - i, SPLIT, False, DEPTH, BLOCK_Q, BLOCK_D)
    b = load_whole(v_halves, g * M + j, k_count, SPLIT, False, DEPTH, BLOCK_K, BLOCK_D)
    products = products_of_parts(a, b, N - i, k_count, SPLIT, DEPTH, BLOCK_Q, BLOCK_K, BLOCK_D)
    products = products * scale_of(v_halves, g) * scale_of(grad_halves, problem_side)
    return products + load_vector(grad_den + row, N - i, 0, BLOCK_Q)[:, None]


@triton.jit
def flows_kernel(
    q,  # [G, N, D]
    k,  # [G, M, D]
    w,  # [G, M] or None
    norms,  # of q [G, N] and of k [G, M], unless DIFFERENCES
    q_halves,  # [G, q_rows, DEPTH], unless DIFFERENCES
    k_halves,  # [G, M, DEPTH]
    row_stats,  # [S, G, 2, N]
    col_stats,  # [S, G, 2, M]
    v_halves,  # [G, M, DEPTH]
    grad_halves,  # of grad_num [S, G, sides, N, DEPTH]
    grad_den,  # [S, G, sides, N]
    row_slots,  # [S, G, col_parts, N]
    col_slots,  # [S, G, row_parts, M]
    weight_slots,  # [G, row_parts, M], or None without w
    widths,  # S floats
    temperature,
    least_affinity,
    q_rows,
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
    SPLIT: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    DEPTH: tl.constexpr,
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
                q, k, norms, q_halves, k_halves, q_rows, g, i, j, k_count, N, M, D,
                SELF, SPLIT, DIFFERENCES, DEPTH, BLOCK_Q, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            fresh_rows = col_tile == col_part * col_tiles
            fresh_cols = row_tile == row_part * row_tiles
            grad_w = tl.zeros([BLOCK_K], tl.float32)
            for s in range(len(widths)):
                problem = s * G + g
                logits = kernel_logits(d, exists, width_of(widths, s), temperature, GAUSSIAN)
                rows = row_stats + problem * 2 * N + i
                cols = col_stats + problem * 2 * M + j
                A = tile_affinities(logits, exists, rows, cols, N, M, N - i, k_count, least_affinity, BLOCK_Q, BLOCK_K)
                B = A * incoming(
                    v_halves, grad_halves, grad_den, g, problem * sides + side, i, j, k_count, N, M,
                    SPLIT, DEPTH, BLOCK_Q, BLOCK_K, BLOCK_D,
                )  # fmt: skip
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
    w,
    row_stats,
    col_stats,
    row_flows,
    col_flows,
    v_halves,
    grad_halves,
    grad_den,
    widths,
    temperature,
    least_affinity,
    G,
    N,
    M,
    sides,
    GAUSSIAN: tl.constexpr,
    SPLIT: tl.constexpr,
    DEPTH: tl.constexpr,
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
        grad = A * incoming(
            v_halves, grad_halves, grad_den, g, problem * sides + side, i, j, k_count, N, M,
            SPLIT, DEPTH, BLOCK_Q, BLOCK_K, BLOCK_D,
        )  # fmt: skip
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
    w,  # [G, M] or None
    norms,  # of q [G, N] and of k [G, M], unless DIFFERENCES
    q_halves,  # [G, q_rows, DEPTH], unless DIFFERENCES
    k_halves,  # [G, M, DEPTH]
    row_stats,  # [S, G, 2, N]
    col_stats,  # [S, G, 2, M]
    row_flows,  # [S, G, N]
    col_flows,  # [S, G, M]
    v_halves,  # [G, M, DEPTH]
    grad_halves,  # of grad_num [S, G, sides, N, DEPTH]
    grad_den,  # [S, G, sides, N]
    grad,  # of q or of k, zeroed
    widths,  # S floats
    temperature,
    least_affinity,
    q_rows,
    G,
    N,
    M,
    D,
    split,
    sides,
    OF_KEYS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    SELF: tl.constexpr,
    SPLIT: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    DEPTH: tl.constexpr,
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
            q, k, norms, q_halves, k_halves, q_rows, g, i, j, k_count, N, M, D,
            SELF, SPLIT, DIFFERENCES, DEPTH, BLOCK_Q, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        if not DIFFERENCES:
            close = close_pairs(d, norms[0] + g * N + i, norms[1] + g * M + j, N - i, k_count, BLOCK_Q, BLOCK_K)
            exists = exists & close
        if tl.max(exists.to(tl.int32)) > 0:
            h = pulls_of_tile(
                d, exists, g, i, j, side, k_count, w, row_stats, col_stats, row_flows, col_flows, v_halves,
                grad_halves, grad_den, widths, temperature, least_affinity, G, N, M, sides,
                GAUSSIAN, SPLIT, DEPTH, BLOCK_Q, BLOCK_K, BLOCK_D,
            )  # fmt: skip
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
    w,  # [G, M] or None
    norms,  # of q [G, N] and of k [G, M], unless DIFFERENCES
    q_halves,  # [G, q_rows, DEPTH], unless DIFFERENCES
    k_halves,  # [G, M, DEPTH]
    row_stats,  # [S, G, 2, N]
    col_stats,  # [S, G, 2, M]
    row_flows,  # [S, G, N]
    col_flows,  # [S, G, M]
    v_halves,  # [G, M, DEPTH]
    grad_halves,  # of grad_num [S, G, sides, N, DEPTH]
    grad_den,  # [S, G, sides, N]
    grad,  # of q or of k: what close pairs give
    widths,  # S floats
    temperature,
    least_affinity,
    q_rows,
    G,
    N,
    M,
    D,
    split,
    sides,
    OF_KEYS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    SELF: tl.constexpr,
    SPLIT: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    DEPTH: tl.constexpr,
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
            q, k, norms, q_halves, k_halves, q_rows, g, i, j, k_count, N, M, D,
            SELF, SPLIT, DIFFERENCES, DEPTH, BLOCK_Q, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        close = close_pairs(d, norms[0] + g * N + i, norms[1] + g * M + j, N - i, k_count, BLOCK_Q, BLOCK_K)
        h = pulls_of_tile(
            d, exists & (close == 0), g, i, j, side, k_count, w, row_stats, col_stats, row_flows, col_flows, v_halves,
            grad_halves, grad_den, widths, temperature, least_affinity, G, N, M, sides,
            GAUSSIAN, SPLIT, DEPTH, BLOCK_Q, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        if OF_KEYS:
            h = tl.trans(h)
            rows = rows_of(q_halves, g * q_rows + i, DEPTH)
            parts = load_parts(rows, N - i, start, SPLIT, DEPTH, BLOCK_Q, BLOCK_V)
        else:
            rows = rows_of(k_halves, g * M + j, DEPTH)
            parts = load_parts(rows, k_count, start, SPLIT, DEPTH, BLOCK_K, BLOCK_V)
        factors += tl.sum(h, 1)
        e = exponent(tl.max(tl.abs(h), 1))
        h_hi, h_lo = in_halves(h * power_of_two(e)[:, None])
        total += product(h_hi, h_lo, parts[0], parts[1], SPLIT) * power_of_two(-e)[:, None]
    if OF_KEYS:
        first, count, _ = find_tile(own, M, split, BLOCK_K)
        points = k
        row = g * M + first
    else:
        points = q
        count = N - own * BLOCK_Q
        row = g * N + own * BLOCK_Q
    total *= scale_of(q_halves, g)
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
    norms,  # of q [G, N] and of k [G, M], unless DIFFERENCES
    q_halves,  # [G, q_rows, DEPTH], unless DIFFERENCES
    k_halves,  # [G, M, DEPTH]
    row_stats,  # [S, G, 2, N]
    col_stats,  # [S, G, 2, M]
    grad_halves,  # of grad_num [S, G, sides, N, DEPTH]
    grad_v,  # [G, M, D]
    widths,  # S floats
    temperature,
    least_affinity,
    q_rows,
    G,
    N,
    M,
    D,
    split,
    sides,
    GAUSSIAN: tl.constexpr,
    SELF: tl.constexpr,
    SPLIT: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    DEPTH: tl.constexpr,
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
            q, k, norms, q_halves, k_halves, q_rows, g, i, j, k_count, N, M, D,
            SELF, SPLIT, DIFFERENCES, DEPTH, BLOCK_Q, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        for s in range(len(widths)):
            problem = s * G + g
            logits = kernel_logits(d, exists, width_of(widths, s), temperature, GAUSSIAN)
            rows = row_stats + problem * 2 * N + i
            cols = col_stats + problem * 2 * M + j
            A = tile_affinities(logits, exists, rows, cols, N, M, N - i, k_count, least_affinity, BLOCK_Q, BLOCK_K)
            grad_rows = rows_of(grad_halves, (problem * sides + side) * N + i, DEPTH)
            parts = load_parts(grad_rows, N - i, start, SPLIT, DEPTH, BLOCK_Q, BLOCK_V)
            A_hi, A_lo = in_halves(tl.trans(A) * AFFINITY_SCALE)
            undo = scale_of(grad_halves, problem * sides + side) / AFFINITY_SCALE
            total += product(A_hi, A_lo, parts[0], parts[1], SPLIT) * undo
    if w is not None:
        total *= load_vector(w + g * M + j, k_count, 0, BLOCK_K)[:, None]
    n = tl.arange(0, BLOCK_K)[:, None]
    dim = start + tl.arange(0, BLOCK_V)[None, :]
    tl.store(grad_v + (g * M + j) * D + n * D + dim, total, mask=(n < k_count) & (dim < D))


def _halves(x: Tensor) -> Halves:
    return split_points(x, None, largest_entries(x))


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
    with launch.on_device_of(q):
        arguments = common_arguments(q, k, split, has_self) | {
            "w": w,
            "row_stats": row_stats,
            "col_stats": col_stats,
            "grad_halves": _halves(grad_num.reshape(S * G * sides, N, D)),
            "widths": tuple(map(float, widths)),
            "temperature": float(temperature),
            "least_affinity": math.sqrt(floor),
            "G": G,
            "sides": sides,
            "GAUSSIAN": kernel == "gaussian",
        }
        incoming = arguments | {"v_halves": _halves(v), "grad_den": grad_den}
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.empty_like(v)
        blocks = streaming_tiles.choose_blocks("flows", q, k)
        parts = cut(triton.cdiv(N, blocks.queries), count_tiles(M, split or M, blocks.keys), G)
        row_slots, col_slots = q.new_empty(S, G, parts.col_parts, N), q.new_empty(S, G, parts.row_parts, M)
        weight_slots = None if w is None else w.new_empty(G, parts.row_parts, M)
        autotune.start(
            flows_kernel,
            (parts.row_parts * parts.col_parts * G,),
            row_slots=row_slots,
            col_slots=col_slots,
            weight_slots=weight_slots,
            **incoming,
            **parts._asdict(),
            configuration=blocks.options(),
        )
        flows = {"row_flows": row_slots.sum(2), "col_flows": col_slots.sum(2)}
        for grad, of_keys in ((grad_q, False), (grad_k, True)):  # no autotuning: both must find the same pairs close
            blocks = streaming_tiles.choose_blocks("differences", q, k)
            tiles = count_tiles(M, split or M, blocks.keys) if of_keys else triton.cdiv(N, blocks.queries)
            points = incoming | flows | {"grad": grad, "OF_KEYS": of_keys}
            differences_kernel[tiles * G,](**points, **blocks.options())
            if not arguments["DIFFERENCES"]:
                blocks = streaming_tiles.choose_blocks("products", q, k)
                tiles = count_tiles(M, split or M, blocks.keys) if of_keys else triton.cdiv(N, blocks.queries)
                products_kernel[tiles * triton.cdiv(D, blocks.values) * G,](**points, **blocks.options())
        autotune.start(
            values_kernel,
            lambda by: (count_tiles(M, split or M, by["BLOCK_K"]) * triton.cdiv(D, by["BLOCK_V"]) * G,),
            grad_v=grad_v,
            **arguments,
            configuration=streaming_tiles.choose_blocks("values", q, k).options(),
        )
    return grad_q, grad_k, grad_v, q.new_empty(0) if weight_slots is None else weight_slots.sum(1)
