"""Streaming statistics of both softmaxes.

The plane of a problem is cut into rectangles of tiles. A program walks one of them, the keys in the inner loop, and
exponentiates every pair once, relative to a level, for the sums by query (in registers) and by key (in slots that are
its alone). Where a sum by key leaves the range around the level in which float32 loses nothing, the tile is worked out
again, relative to its own maxima; where a sum by query turns out to have, the whole walk. A second kernel merges the
slots in order. No sum depends on timing.
"""

import triton
import triton.language as tl
from torch import Tensor

from .. import autotune, launch
from ..tiles import NOTHING, finite_shift
from .blocks import choose_blocks, cut
from .logit import LOG2E, better_level, first_level, logits
from .pairs import Pairs, distances, keys, keys_of_tile, queries, walk_of_program
from .softmax import Statistics, entries_of_program, finish, merge

# Sums of exponentials relative to a level in which nothing is lost: their terms are normal float32 numbers or too small
# to count, and as many sums as there may be cannot overflow.
LEAST_SUM = tl.constexpr(2.0**-80)
LARGEST_SUM = tl.constexpr(2.0**90)

WIDTHS_OF_LAUNCH = 3  # whose sums by query the registers of a program hold, with some on the stack


@triton.jit
def _first_levels(pairs):
    levels = ()
    for _ in tl.static_range(len(pairs.widths)):
        levels = levels + (first_level(pairs.temperature, pairs.LOGIT),)
    return levels


@triton.jit
def _no_sums(WIDTHS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    sums = ()
    for _ in tl.static_range(WIDTHS):
        sums = sums + (tl.zeros([BLOCK_K, BLOCK_Q], tl.float32),)
    return sums


@triton.jit(noinline=True)
def _wait_for_all():
    """A barrier. Triton pipelines no loop that it finds one in, which it would where this were inlined."""
    tl.debug_barrier()


@triton.jit
def _add_rows(slots, N, count, L, BLOCK: tl.constexpr):
    """Adds the exponentials of a tile [keys, BLOCK], by query, to the sums in slots."""
    m = tl.arange(0, BLOCK)
    top = tl.max(L, 0)
    total = tl.sum(tl.exp2(L - finite_shift(top)[None, :]), 0)
    old_top = tl.load(slots + m, mask=m < count, other=0.0)
    old_total = tl.load(slots + N + m, mask=m < count, other=0.0)
    top, total = merge(old_top, old_total, top, total)
    tl.store(slots + m, top, mask=m < count)
    tl.store(slots + N + m, total, mask=m < count)
    _wait_for_all()  # another thread of this program may read, at the next tile, what one wrote


@triton.jit
def statistics_kernel(
    pairs,  # with the widths of this launch
    row_slots,  # [S, G, rectangles.cols, 2, N]
    col_slots,  # [S, G, rectangles.rows, 2, M]
    rectangles,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of exponentials in one rectangle, by row and by column, for all widths."""
    N, M = pairs.N, pairs.M
    walk = walk_of_program(pairs, rectangles, BLOCK_Q, BLOCK_K)
    g = walk.g
    n = tl.arange(0, BLOCK_K)
    m = tl.arange(0, BLOCK_Q)
    levels = _first_levels(pairs)
    row_tile = walk.first_row_tile
    careful = row_tile < 0  # no
    while row_tile < walk.row_end:
        i = row_tile * BLOCK_Q
        own = queries(pairs, g, i, BLOCK_Q, BLOCK_D)
        q_count = own.count
        # relative to the levels; of tiles that do not fit, in the slots
        sums = _no_sums(len(pairs.widths), BLOCK_Q, BLOCK_K)
        for s in tl.static_range(len(pairs.widths)):  # noqa: B007 (another name would be a variable of the loop below)
            slots = row_slots + ((s * pairs.G + g) * rectangles.cols + walk.col) * 2 * N + i
            tl.store(slots + m, tl.full([BLOCK_Q], float("-inf"), tl.float32), mask=m < q_count)
            tl.store(slots + N + m, tl.zeros([BLOCK_Q], tl.float32), mask=m < q_count)
        tl.debug_barrier()
        for col_tile in range(walk.first_col_tile, walk.col_end):
            tile = keys_of_tile(pairs, col_tile, BLOCK_K)
            j = tile.first
            k_count = tile.count
            d = distances(pairs, keys(pairs, g, tile, BLOCK_K, BLOCK_D), own, j - i, BLOCK_K, BLOCK_Q, BLOCK_D)
            new_levels = ()
            new_sums = ()
            for s in tl.static_range(len(pairs.widths)):
                slots = col_slots + ((s * pairs.G + g) * rectangles.rows + walk.row) * 2 * M + j
                known = (n < k_count) & (row_tile > walk.first_row_tile)
                old_top = tl.load(slots + n, mask=known, other=float("-inf"))
                old_total = tl.load(slots + M + n, mask=known, other=0.0)
                L = logits(d, pairs.widths[s], pairs.temperature, pairs.LOGIT)
                E = tl.exp2(L - levels[s])
                total = tl.sum(E, 1)
                level = levels[s]
                of_width = sums[s]
                outside = ((total > LEAST_SUM) & (total < LARGEST_SUM)) == 0
                if (tl.max((outside & (n < k_count)).to(tl.int32), 0) == 1) | careful:
                    top = tl.max(L, 1)
                    total = tl.sum(tl.exp2(L - finite_shift(top)[:, None]), 1)
                    if tl.max(tl.max(of_width, 1), 0) == 0:  # nothing is relative to the level yet
                        level = better_level(level, top, pairs.LOGIT)
                    top, total = merge(old_top, old_total, top, total)
                    tl.store(slots + n, top, mask=(n < k_count) & (careful == 0))
                    tl.store(slots + M + n, total, mask=(n < k_count) & (careful == 0))
                    slots = row_slots + ((s * pairs.G + g) * rectangles.cols + walk.col) * 2 * N + i
                    _add_rows(slots, N, q_count, L, BLOCK_Q)
                else:
                    of_width += E
                    top, total = merge(old_top, old_total, tl.zeros([BLOCK_K], tl.float32) + levels[s], total)
                    tl.store(slots + n, top, mask=n < k_count)
                    tl.store(slots + M + n, total, mask=n < k_count)
                new_levels = new_levels + (level,)
                new_sums = new_sums + (of_width,)
            levels = new_levels
            sums = new_sums
        tl.debug_barrier()
        lost = row_tile < 0  # no
        for s in tl.static_range(len(pairs.widths)):
            row_total = tl.sum(sums[s], 0)
            some_lost = tl.max(((row_total < LEAST_SUM) & (m < q_count)).to(tl.int32), 0) == 1
            lost = lost | (some_lost & (tl.max(row_total, 0) > 0))
            slots = row_slots + ((s * pairs.G + g) * rectangles.cols + walk.col) * 2 * N + i
            old_top = tl.load(slots + m, mask=m < q_count, other=0.0)
            old_total = tl.load(slots + N + m, mask=m < q_count, other=0.0)
            top, total = merge(old_top, old_total, tl.where(row_total > 0, levels[s], NOTHING), row_total)
            tl.store(slots + m, top, mask=m < q_count)
            tl.store(slots + N + m, total, mask=m < q_count)
        careful = lost & (careful == 0)
        row_tile += 1 - careful.to(tl.int32)
        tl.debug_barrier()


@triton.jit
def merge_kernel(
    slots,  # [problems, rectangles, 2, size]
    sums,  # [problems, 2, size], or [problems, size]
    rectangles,
    size,
    AS_LOGARITHM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merges the sums of rectangles, in order, to statistics or to natural logarithms."""
    problem, n = entries_of_program(size, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for rectangle in range(rectangles):
        slot = slots + (problem * rectangles + rectangle) * 2 * size
        more_top = tl.load(slot + n, mask=n < size, other=float("-inf"))
        more_total = tl.load(slot + size + n, mask=n < size, other=0.0)
        top, total = merge(top, total, more_top, more_total)
    if AS_LOGARITHM:
        tl.store(sums + problem * size + n, (top + tl.log2(total)) * (1 / LOG2E), mask=n < size)
    else:
        top, factor = finish(top, total)
        tl.store(sums + problem * 2 * size + n, top, mask=n < size)
        tl.store(sums + (problem * 2 + 1) * size + n, factor, mask=n < size)


def find_statistics(pairs: Pairs) -> Statistics:
    """Of all widths, some at a time."""
    S, G, N, M = len(pairs.widths), pairs.G, pairs.N, pairs.M
    blocks = choose_blocks("statistics", pairs)
    rectangles = cut(pairs, blocks)
    new = pairs.q.new_empty
    row_slots, col_slots = new(S, G, rectangles.cols, 2, N), new(S, G, rectangles.rows, 2, M)
    launches = triton.cdiv(S, WIDTHS_OF_LAUNCH)
    for n in range(launches):
        some = slice(S * n // launches, S * (n + 1) // launches)
        autotune.start(
            statistics_kernel,
            (rectangles.rows * rectangles.cols * G,),
            pairs._replace(widths=pairs.widths[some]),
            row_slots[some],
            col_slots[some],
            rectangles,
            configuration=blocks.options(),
        )
    return Statistics(merge_slots(row_slots), merge_slots(col_slots))


def merge_slots(slots: Tensor, as_logarithm: bool = False) -> Tensor:
    """Statistics ``[S, G, 2, size]`` of ``slots [S, G, rectangles, 2, size]``, or logarithms ``[S, G, size]``."""
    S, G, rectangles, _, size = slots.shape
    sums = slots.new_empty((S, G, size) if as_logarithm else (S, G, 2, size))
    block = min(1024, launch.padded_block(size))
    grid = (triton.cdiv(size, block) * S * G,)
    merge_kernel[grid](slots, sums, rectangles, size, AS_LOGARITHM=as_logarithm, BLOCK=block, num_warps=4)
    return sums
