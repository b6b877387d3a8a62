"""Large problems, forward: tiles over both axes. Nothing of size N×M is kept, and no sum depends on timing.

- Statistics: the plane of a problem is cut into rectangles of tiles. A program walks one of them and keeps the running
  maxima and sums of its rows and of its columns in slots that are its alone; a second kernel merges the slots in order.
- Weighted sums: a program walks the keys of one side for one tile of queries, one width and one chunk of dimensions.

Both work the distances out from the points.
"""

import math
from collections.abc import Sequence
from typing import Any

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
    tile_affinities,
    width_of,
)
from .tiles import finish_statistics, finite_shift, kernel_logits, load_rows, load_vector


@triton.jit
def add_to_statistics(slots, size, count, logits, fresh, AXIS: tl.constexpr, BLOCK: tl.constexpr):
    """Adds a tile of logits to the running maxima and sums of its rows or columns, kept in ``slots`` [2, size]."""
    n = tl.arange(0, BLOCK)
    old_top = tl.load(slots + n, mask=(n < count) & (fresh == 0), other=float("-inf"))
    old_total = tl.load(slots + size + n, mask=(n < count) & (fresh == 0), other=0.0)
    top = tl.maximum(old_top, tl.max(logits, AXIS))
    shift = finite_shift(top)
    total = tl.sum(tl.exp(logits - tl.expand_dims(shift, AXIS)), AXIS)
    tl.store(slots + n, top, mask=n < count)
    tl.store(slots + size + n, old_total * tl.exp(old_top - shift) + total, mask=n < count)


@triton.jit
def statistics_kernel(
    q,  # [G, N, D]
    k,  # [G, M, D]
    q_norms,  # [G, N] or None, see distances
    k_norms,
    row_slots,  # [S, G, col_parts, 2, N]
    col_slots,  # [S, G, row_parts, 2, M]
    unit,  # [] or None
    widths,  # S floats
    temperature,
    least,
    self_distance,
    G,
    N,
    M,
    D,
    split,  # keys of the first side
    row_parts,
    col_parts,
    row_tiles,  # of a rectangle
    col_tiles,
    GAUSSIAN: tl.constexpr,
    SELF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Softmax statistics of the logits in one rectangle, by row and by column, for all widths."""
    program = tl.program_id(0)
    row_part = program % row_parts
    col_part = program // row_parts % col_parts
    g = (program // row_parts // col_parts).to(tl.int64)
    row_end = tl.minimum((row_part + 1) * row_tiles, tl.cdiv(N, BLOCK_Q))
    col_end = tl.minimum((col_part + 1) * col_tiles, tl.cdiv(split, BLOCK_K) + tl.cdiv(M - split, BLOCK_K))
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
                unit,
                self_distance,
                SELF,
                PRECISION,
                BLOCK_Q,
                BLOCK_K,
                BLOCK_D,
            )
            for s in range(len(widths)):
                logits = kernel_logits(d, exists, width_of(widths, s), temperature, GAUSSIAN)
                rows = row_slots + ((s * G + g) * col_parts + col_part) * 2 * N + i
                cols = col_slots + ((s * G + g) * row_parts + row_part) * 2 * M + j
                add_to_statistics(rows, N, N - i, logits, col_tile == col_part * col_tiles, 1, BLOCK_Q)
                add_to_statistics(cols, M, k_count, logits, row_tile == row_part * row_tiles, 0, BLOCK_K)
            tl.debug_barrier()  # another thread of this program may read what one wrote


@triton.jit
def merge_kernel(
    slots,  # [problems, parts, 2, size]
    stats,  # [problems, 2, size]
    parts,
    size,
    BLOCK: tl.constexpr,
):
    """Merges the statistics of rectangles, in order, and finishes them: (maximum, sum^-½)."""
    blocks = tl.cdiv(size, BLOCK)
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        slot = slots + (problem * parts + part) * 2 * size
        part_top = tl.load(slot + n, mask=n < size, other=float("-inf"))
        part_total = tl.load(slot + size + n, mask=n < size, other=0.0)
        new_top = tl.maximum(top, part_top)
        shift = finite_shift(new_top)
        total = total * tl.exp(top - shift) + part_total * tl.exp(part_top - shift)
        top = new_top
    top, factor = finish_statistics(top, total)
    tl.store(stats + problem * 2 * size + n, top, mask=n < size)
    tl.store(stats + (problem * 2 + 1) * size + n, factor, mask=n < size)


@triton.jit
def weighted_sums_kernel(
    q,  # [G, N, D]
    k,  # [G, M, D]
    v,  # [G, M, D]
    w,  # [G, M] or None
    q_norms,  # [G, N] or None, see distances
    k_norms,
    row_stats,  # [S, G, 2, N]
    col_stats,  # [S, G, 2, M]
    num,  # [S, G, sides, N, D]
    den,  # [S, G, sides, N]
    unit,  # [] or None
    widths,  # S floats
    temperature,
    least_affinity,
    least,
    self_distance,
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
    """``Σ_j w_j A_ij v_j`` and ``Σ_j w_j A_ij`` over one side: a tile of queries, a width, a chunk of dimensions."""
    row_tiles = tl.cdiv(N, BLOCK_Q)
    chunks = tl.cdiv(D, BLOCK_V)
    program = tl.program_id(0)
    i = program % row_tiles * BLOCK_Q
    chunk = program // row_tiles % chunks
    side = program // row_tiles // chunks % sides
    problem = (program // row_tiles // chunks // sides).to(tl.int64)  # s * G + g
    g = problem % G
    width = width_of(widths, problem // G)
    tiles_of_first = tl.cdiv(split, BLOCK_K)
    tiles = tiles_of_first + tl.cdiv(M - split, BLOCK_K)
    weighted = tl.zeros([BLOCK_Q, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for tile in range(side * tiles_of_first, tl.where(side == sides - 1, tiles, tiles_of_first)):
        j, k_count, _ = find_tile(tile, M, split, BLOCK_K)
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
            unit,
            self_distance,
            SELF,
            PRECISION,
            BLOCK_Q,
            BLOCK_K,
            BLOCK_D,
        )
        logits = kernel_logits(d, exists, width, temperature, GAUSSIAN)
        rows = row_stats + problem * 2 * N + i
        cols = col_stats + problem * 2 * M + j
        A = tile_affinities(logits, exists, rows, cols, N, M, N - i, k_count, least_affinity, BLOCK_Q, BLOCK_K)
        if w is not None:
            A *= load_vector(w + g * M + j, k_count, 0, BLOCK_K)[None, :]
        total += tl.sum(A, 1)
        values = load_rows(v + (g * M + j) * D, k_count, chunk * BLOCK_V, D, BLOCK_K, BLOCK_V)
        weighted = add_product(weighted, A, values, PRECISION)
    row = i + tl.arange(0, BLOCK_Q)
    dim = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
    out = (problem * sides + side) * N + row
    tl.store(num + out[:, None] * D + dim[None, :], weighted, mask=(row < N)[:, None] & (dim < D)[None, :])
    if chunk == 0:
        tl.store(den + out, total, mask=row < N)


def affinity_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    kernel: str,
    widths: Sequence[float],
    temperature: float,
    split: int,
    has_self: bool,
    floor: float,
    least_distance: float = 0.0,
    self_distance: float = math.inf,
    unit: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`drift_ops.ops.affinity_sums`.

    Distances are ``max(d, least_distance)/unit`` (``unit``: 0-d, on the device; None means 1), and ``self_distance`` is
    added to those of the self pairs: infinity masks them.
    """
    (G, N, D), S, sides = q.shape, len(widths), 2 if split else 1
    arguments = common_arguments(q, k, kernel, widths, temperature, split, has_self, self_distance)
    arguments |= {"least": least_distance, "self_distance": self_distance}
    arguments["unit"] = None if unit is None else unit.float()
    num, den = q.new_empty(S, G, sides, N, D), q.new_empty(S, G, sides, N)
    with launch.on_device_of(q):
        row_stats, col_stats = _statistics(arguments)
        blocks = streaming_tiles.choose_blocks("sums", q, k)
        programs = triton.cdiv(N, blocks.queries) * triton.cdiv(D, blocks.values) * sides * S * G
        weighted_sums_kernel[programs,](
            v=v,
            w=w,
            row_stats=row_stats,
            col_stats=col_stats,
            num=num,
            den=den,
            sides=sides,
            least_affinity=math.sqrt(floor),
            **arguments,
            **blocks.options(),
        )
    return num, den, row_stats, col_stats


def _statistics(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    q, k, G, N, M = (arguments[name] for name in ("q", "k", "G", "N", "M"))
    S = len(arguments["widths"])
    blocks = streaming_tiles.choose_blocks("statistics", q, k)
    parts = cut(triton.cdiv(N, blocks.queries), count_tiles(M, arguments["split"], blocks.keys), G)
    row_slots, col_slots = q.new_empty(S, G, parts.col_parts, 2, N), q.new_empty(S, G, parts.row_parts, 2, M)
    statistics_kernel[parts.row_parts * parts.col_parts * G,](
        row_slots=row_slots, col_slots=col_slots, **parts._asdict(), **arguments, **blocks.options()
    )
    return _merge(row_slots), _merge(col_slots)


def _merge(slots: Tensor) -> Tensor:
    S, G, parts, _, size = slots.shape
    stats = slots.new_empty(S, G, 2, size)
    block = min(1024, launch.padded_block(size))
    merge_kernel[triton.cdiv(size, block) * S * G,](slots, stats, parts, size, BLOCK=block, num_warps=4)
    return stats
