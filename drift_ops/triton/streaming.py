"""Large problems, forward: tiles over both axes. Nothing of size N×M is kept, and no sum depends on timing.

- Parts: points and values as float16 numbers (:mod:`.streaming_parts`), which the tensor cores multiply.
- Statistics: the plane of a problem is cut into rectangles of tiles. A program walks one of them, the keys in the inner
  loop, and exponentiates every pair once, relative to a level, for the sums by query (in registers) and by key (in
  slots that are its alone). Where a sum by key leaves the range around the level in which float32 loses nothing, the
  tile is worked out again, relative to its own maxima; where a sum by query turns out to have, the whole walk. A second
  kernel merges the slots in order.
- Weighted sums: a program walks the keys of one side for one tile of queries, one width and one chunk of dimensions.

Both work the distances out from the points.
"""

import math
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import autotune, launch, streaming_parts
from .halves import product
from .halves import split as in_halves
from .streaming_parts import (
    AFFINITY_BITS,
    AFFINITY_SCALE,
    LOG2E,
    forward_arguments,
    has_diagonal,
    hide_missing,
    inverse_of,
    load_parts,
    load_whole,
    power_of_two,
    rows_of,
    scale_of,
    scale_of_products,
    tile_distances,
    tile_logits,
)
from .streaming_tiles import count_tiles, cut, find_tile, width_of
from .tiles import NOTHING, finite_shift, load_vector, self_pairs

# Sums of exponentials relative to a level in which nothing is lost: their terms are normal float32 numbers or too small
# to count, and as many sums as there may be cannot overflow.
LEAST_SUM = tl.constexpr(2.0**-80)
LARGEST_SUM = tl.constexpr(2.0**90)


@triton.jit
def first_levels(temperature, GAUSSIAN: tl.constexpr, WIDTHS: tl.constexpr):
    """A first guess at logits (base 2), for every width."""
    levels = ()
    for _ in tl.static_range(WIDTHS):
        levels = levels + ((0.5 * LOG2E / temperature) if GAUSSIAN else 0.0,)
    return levels


@triton.jit
def no_sums(WIDTHS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    sums = ()
    for _ in tl.static_range(WIDTHS):
        sums = sums + (tl.zeros([BLOCK_K, BLOCK_Q], tl.float32),)
    return sums


@triton.jit
def typical_level(tops):
    """The geometric mean of negative logits, which outliers hardly move."""
    sizes = tl.where(tops == NOTHING, 0.0, tl.log2(tl.maximum(-tops, 1.0)))
    counts = tl.where(tops == NOTHING, 0.0, 1.0)
    return -tl.exp2(tl.sum(sizes, 0) / tl.maximum(tl.sum(counts, 0), 1.0))


@triton.jit
def merge(top, total, other_top, other_total):
    """Two sums of ``2^(L - top)`` as one."""
    both = tl.maximum(top, other_top)
    shift = finite_shift(both)
    return both, total * tl.exp2(top - shift) + other_total * tl.exp2(other_top - shift)


@triton.jit
def add_rows(slots, N, count, logits, BLOCK: tl.constexpr):
    """Adds the exponentials of a tile [keys, BLOCK], by query, to the sums in slots."""
    m = tl.arange(0, BLOCK)
    top = tl.max(logits, 0)
    total = tl.sum(tl.exp2(logits - finite_shift(top)[None, :]), 0)
    old_top = tl.load(slots + m, mask=m < count, other=0.0)
    old_total = tl.load(slots + N + m, mask=m < count, other=0.0)
    top, total = merge(old_top, old_total, top, total)
    tl.store(slots + m, top, mask=m < count)
    tl.store(slots + N + m, total, mask=m < count)


@triton.jit
def finish(top, total):
    """``(m, s^-½)`` with ``s·e^m`` the sum ``total·2^top`` of exponentials, and s near 1; (0, 0) where it is empty."""
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    whole = tl.floor(tl.log2(total))
    exact = tl.where(empty, 0.0, top + whole).to(tl.float64) / LOG2E
    rounded = exact.to(tl.float32)
    left = tl.exp2(((exact - rounded) * LOG2E).to(tl.float32))
    return rounded, tl.where(empty, 0.0, tl.rsqrt(total * power_of_two(-whole) * left))


@triton.jit
def statistics_kernel(
    q,  # [G, N, D]
    k,  # [G, M, D]
    norms,  # of q [G, N] and of k [G, M], unless DIFFERENCES
    q_halves,  # [G, q_rows, DEPTH], unless DIFFERENCES
    k_halves,  # [G, M, DEPTH]
    row_slots,  # [S, G, col_parts, 2, N]
    col_slots,  # [S, G, row_parts, 2, M]
    unit,  # [] or None
    widths,  # S floats
    temperature,
    least,
    self_distance,
    q_rows,
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
    SPLIT: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Softmax statistics of the logits (base 2) in one rectangle, by row and by column, for all widths."""
    program = tl.program_id(0)
    row_part = program % row_parts
    col_part = program // row_parts % col_parts
    g = (program // row_parts // col_parts).to(tl.int64)
    row_end = tl.minimum((row_part + 1) * row_tiles, tl.cdiv(N, BLOCK_Q))
    col_end = tl.minimum((col_part + 1) * col_tiles, tl.cdiv(split, BLOCK_K) + tl.cdiv(M - split, BLOCK_K))
    n = tl.arange(0, BLOCK_K)
    m = tl.arange(0, BLOCK_Q)
    undo = scale_of_products(q_halves[2] + g, DIFFERENCES)
    per_unit = inverse_of(unit)
    levels = first_levels(temperature, GAUSSIAN, len(widths))
    row_tile = row_part * row_tiles
    careful = row_tile < 0  # no
    while row_tile < row_end:
        i = row_tile * BLOCK_Q
        q_count = N - i
        q_parts = load_whole(q_halves, g * q_rows + i, q_count, SPLIT, DIFFERENCES, DEPTH, BLOCK_Q, BLOCK_D)
        sums = no_sums(len(widths), BLOCK_Q, BLOCK_K)  # relative to the levels; of tiles that do not fit, in the slots
        for s in tl.static_range(len(widths)):  # noqa: B007 (a name of its own would be a variable of the loop below)
            slots = row_slots + ((s * G + g) * col_parts + col_part) * 2 * N + i
            tl.store(slots + m, tl.full([BLOCK_Q], float("-inf"), tl.float32), mask=m < q_count)
            tl.store(slots + N + m, tl.zeros([BLOCK_Q], tl.float32), mask=m < q_count)
        tl.debug_barrier()
        for col_tile in range(col_part * col_tiles, col_end):
            j, k_count, side = find_tile(col_tile, M, split, BLOCK_K)
            k_parts = load_whole(k_halves, g * M + j, k_count, SPLIT, DIFFERENCES, DEPTH, BLOCK_K, BLOCK_D)
            d = tile_distances(
                k_parts, q_parts, k + (g * M + j) * D, q + (g * N + i) * D, norms[1] + (g * M + j),
                norms[0] + (g * N + i), undo, k_count, q_count, j - i, D, least, per_unit, self_distance,
                SELF, SPLIT, DIFFERENCES, DEPTH, BLOCK_K, BLOCK_Q, BLOCK_D,
            )  # fmt: skip
            if not GAUSSIAN:  # once for all widths: their logits are then minus infinity
                d = hide_missing(d, float("inf"), k_count, q_count, j - i, SELF, BLOCK_K, BLOCK_Q)
            new_levels = ()
            new_sums = ()
            for s in tl.static_range(len(widths)):
                slots = col_slots + ((s * G + g) * row_parts + row_part) * 2 * M + j
                known = (n < k_count) & (row_tile > row_part * row_tiles)
                old_top = tl.load(slots + n, mask=known, other=float("-inf"))
                old_total = tl.load(slots + M + n, mask=known, other=0.0)
                logits = tile_logits(d, widths[s], temperature, GAUSSIAN)
                if GAUSSIAN:
                    logits = hide_missing(logits, NOTHING, k_count, q_count, j - i, SELF, BLOCK_K, BLOCK_Q)
                E = tl.exp2(logits - levels[s])
                total = tl.sum(E, 1)
                level = levels[s]
                part = sums[s]
                outside = ((total > LEAST_SUM) & (total < LARGEST_SUM)) == 0
                if (tl.max((outside & (n < k_count)).to(tl.int32), 0) == 1) | careful:
                    top = tl.max(logits, 1)
                    total = tl.sum(tl.exp2(logits - finite_shift(top)[:, None]), 1)
                    if not GAUSSIAN:
                        if tl.max(tl.max(part, 1), 0) == 0:  # nothing is relative to the level yet
                            level = typical_level(top)
                    top, total = merge(old_top, old_total, top, total)
                    tl.store(slots + n, top, mask=(n < k_count) & (careful == 0))
                    tl.store(slots + M + n, total, mask=(n < k_count) & (careful == 0))
                    slots = row_slots + ((s * G + g) * col_parts + col_part) * 2 * N + i
                    add_rows(slots, N, q_count, logits, BLOCK_Q)
                else:
                    part += E
                    top, total = merge(old_top, old_total, tl.zeros([BLOCK_K], tl.float32) + levels[s], total)
                    tl.store(slots + n, top, mask=n < k_count)
                    tl.store(slots + M + n, total, mask=n < k_count)
                new_levels = new_levels + (level,)
                new_sums = new_sums + (part,)
            levels = new_levels
            sums = new_sums
        tl.debug_barrier()
        lost = row_tile < 0  # no
        for s in tl.static_range(len(widths)):
            part = tl.sum(sums[s], 0)
            some_lost = tl.max(((part < LEAST_SUM) & (m < q_count)).to(tl.int32), 0) == 1
            lost = lost | (some_lost & (tl.max(part, 0) > 0))
            slots = row_slots + ((s * G + g) * col_parts + col_part) * 2 * N + i
            old_top = tl.load(slots + m, mask=m < q_count, other=0.0)
            old_total = tl.load(slots + N + m, mask=m < q_count, other=0.0)
            top, total = merge(old_top, old_total, tl.where(part > 0, levels[s], NOTHING), part)
            tl.store(slots + m, top, mask=m < q_count)
            tl.store(slots + N + m, total, mask=m < q_count)
        careful = lost & (careful == 0)
        row_tile += 1 - careful.to(tl.int32)
        tl.debug_barrier()  # another thread of this program may read what one wrote


@triton.jit
def merge_kernel(
    slots,  # [problems, parts, 2, size]
    stats,  # [problems, 2, size]
    parts,
    size,
    BLOCK: tl.constexpr,
):
    """Merges the statistics of rectangles, in order, and finishes them."""
    blocks = tl.cdiv(size, BLOCK)
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        slot = slots + (problem * parts + part) * 2 * size
        part_top = tl.load(slot + n, mask=n < size, other=float("-inf"))
        part_total = tl.load(slot + size + n, mask=n < size, other=0.0)
        top, total = merge(top, total, part_top, part_total)
    top, factor = finish(top, total)
    tl.store(stats + problem * 2 * size + n, top, mask=n < size)
    tl.store(stats + (problem * 2 + 1) * size + n, factor, mask=n < size)


@triton.jit
def load_shift(stats, size, count, BLOCK: tl.constexpr):
    """``r`` of a tile of statistics (m, s^-½) [2, size], with ``2^-r = e^-m/2 · s^-½``: infinite where they are 0."""
    m = load_vector(stats, count, 0, BLOCK)
    factor = load_vector(stats + size, count, 0, BLOCK)
    return m * (0.5 * LOG2E) - tl.log2(factor)


@triton.jit
def weighted_sums_kernel(
    q,  # [G, N, D]
    k,  # [G, M, D]
    w,  # [G, M] or None
    norms,  # of q [G, N] and of k [G, M], unless DIFFERENCES
    q_halves,  # [G, q_rows, DEPTH], unless DIFFERENCES
    k_halves,  # [G, M, DEPTH]
    v_halves,  # of w v [G, M, DEPTH]
    row_stats,  # [S, G, 2, N]
    col_stats,  # [S, G, 2, M]
    num,  # [S, G, sides, N, D]
    den,  # [S, G, sides, N]
    unit,  # [] or None
    widths,  # S floats
    temperature,
    least_affinity,  # or None for 0
    least,
    self_distance,
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
    SAME: tl.constexpr,  # v is k
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
    q_count = N - i
    q_parts = load_whole(q_halves, g * q_rows + i, q_count, SPLIT, DIFFERENCES, DEPTH, BLOCK_Q, BLOCK_D)
    rows = row_stats + problem * 2 * N + i
    row_shift = load_shift(rows, N, q_count, BLOCK_Q) - AFFINITY_BITS
    undo = scale_of_products(q_halves[2] + g, DIFFERENCES)
    per_unit = inverse_of(unit)
    tiles_of_first = tl.cdiv(split, BLOCK_K)
    tiles = tiles_of_first + tl.cdiv(M - split, BLOCK_K)
    weighted = tl.zeros([BLOCK_Q, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for tile in range(side * tiles_of_first, tl.where(side == sides - 1, tiles, tiles_of_first)):
        j, k_count, _ = find_tile(tile, M, split, BLOCK_K)
        cols = col_stats + problem * 2 * M + j
        col_shift = load_shift(cols, M, k_count, BLOCK_K)
        k_parts = load_whole(k_halves, g * M + j, k_count, SPLIT, DIFFERENCES, DEPTH, BLOCK_K, BLOCK_D)
        d = tile_distances(
            q_parts, k_parts, q + (g * N + i) * D, k + (g * M + j) * D, norms[0] + (g * N + i),
            norms[1] + (g * M + j), undo, q_count, k_count, i - j, D, least, per_unit, self_distance,
            SELF, SPLIT, DIFFERENCES, DEPTH, BLOCK_Q, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        logits = tile_logits(d, width, temperature, GAUSSIAN)
        A = tl.exp2(logits - row_shift[:, None] - col_shift[None, :])  # 0 where there is no pair
        if least_affinity is not None:
            A = tl.where(A < least_affinity * AFFINITY_SCALE, least_affinity * AFFINITY_SCALE, A)
            A = hide_missing(A, 0.0, q_count, k_count, i - j, SELF, BLOCK_Q, BLOCK_K)
        elif SELF == "masked":
            if has_diagonal(i - j, SELF, BLOCK_Q, BLOCK_K):
                A = tl.where(self_pairs(i - j, BLOCK_Q, BLOCK_K), 0.0, A)
        if w is None:
            total += tl.sum(A, 1)
        else:
            total += tl.sum(A * load_vector(w + g * M + j, k_count, 0, BLOCK_K)[None, :], 1)
        A_hi, A_lo = in_halves(A)
        if SAME and BLOCK_V == BLOCK_D and BLOCK_D >= DEPTH:
            v_parts = k_parts
        else:
            v_rows = rows_of(v_halves, g * M + j, DEPTH)
            v_parts = load_parts(v_rows, k_count, chunk * BLOCK_V, SPLIT, DEPTH, BLOCK_K, BLOCK_V)
        if SPLIT:  # the tensor cores cut what they add: a long sum must not run through them
            weighted += product(A_hi, A_lo, v_parts[0], v_parts[1], True)
        else:
            weighted = tl.dot(A_hi, v_parts[0], weighted)
    weighted *= scale_of(v_halves, g) / AFFINITY_SCALE
    row = i + tl.arange(0, BLOCK_Q)
    dim = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
    out = (problem * sides + side) * N + row
    tl.store(num + out[:, None] * D + dim[None, :], weighted, mask=(row < N)[:, None] & (dim < D)[None, :])
    if chunk == 0:
        tl.store(den + out, total / AFFINITY_SCALE, mask=row < N)


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
    with launch.on_device_of(q):
        arguments = forward_arguments(q, k, split, has_self, least_distance, self_distance, unit)
        arguments |= {"widths": tuple(map(float, widths)), "temperature": float(temperature), "G": G}
        arguments["GAUSSIAN"] = kernel == "gaussian"
        row_stats, col_stats = _statistics(arguments)
        if v is k and w is None and not arguments["DIFFERENCES"]:
            v_halves = arguments["k_halves"]
        else:
            largest = streaming_parts.largest_entries(v)
            if w is not None:
                largest = largest * streaming_parts.largest_entries(w)
            v_halves = streaming_parts.split_points(v, w, largest)
        num, den = q.new_empty(S, G, sides, N, D), q.new_empty(S, G, sides, N)
        autotune.start(
            weighted_sums_kernel,
            lambda by: (triton.cdiv(N, by["BLOCK_Q"]) * triton.cdiv(D, by["BLOCK_V"]) * sides * S * G,),
            w=w,
            v_halves=v_halves,
            row_stats=row_stats,
            col_stats=col_stats,
            num=num,
            den=den,
            sides=sides,
            SAME=v_halves is arguments["k_halves"],
            least_affinity=math.sqrt(floor) or None,
            **arguments,
            configuration=streaming_parts.choose_blocks("sums", q, k).options(),
        )
    return num, den, row_stats, col_stats


def _statistics(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    q, k, G, N, M = (arguments[name] for name in ("q", "k", "G", "N", "M"))
    S = len(arguments["widths"])
    blocks = streaming_parts.choose_blocks("statistics", q, k)
    parts = cut(triton.cdiv(N, blocks.queries), count_tiles(M, arguments["split"], blocks.keys), G)
    row_slots, col_slots = q.new_empty(S, G, parts.col_parts, 2, N), q.new_empty(S, G, parts.row_parts, 2, M)
    autotune.start(
        statistics_kernel,
        (parts.row_parts * parts.col_parts * G,),
        row_slots=row_slots,
        col_slots=col_slots,
        **parts._asdict(),
        **arguments,
        configuration=blocks.options(),
    )
    return _merge(row_slots), _merge(col_slots)


def _merge(slots: Tensor) -> Tensor:
    S, G, parts, _, size = slots.shape
    stats = slots.new_empty(S, G, 2, size)
    block = min(1024, launch.padded_block(size))
    merge_kernel[triton.cdiv(size, block) * S * G,](slots, stats, parts, size, BLOCK=block, num_warps=4)
    return stats
