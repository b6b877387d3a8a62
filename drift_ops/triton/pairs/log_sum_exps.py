"""Streaming log-sum-exps along one axis: a program walks the other axis, or a part of it, for one tile of its own.

Its distances serve some widths at once, whose sums are relative to the largest logit met so far. The parts of a walk
are merged in order by the kernel that merges the statistics of forms A and B.
"""

import triton
import triton.language as tl
from torch import Tensor

from .. import autotune
from ..affinity import blocks
from ..affinity.logit import LOG2E, tile_logits
from ..affinity.pairs import Keys, Pairs, distances, keys, queries
from ..affinity.softmax import merge
from ..affinity.statistics import merge_slots
from ..tiles import finite_shift, load_vector

WIDTHS_OF_PROGRAM = 4


@triton.jit
def _points(pairs, g, first, OF_KEYS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """The keys, or the queries, from the first on."""
    if OF_KEYS:
        return keys(pairs, g, Keys(first, pairs.M - first, 0), BLOCK, BLOCK_D)
    else:
        return queries(pairs, g, first, BLOCK, BLOCK_D)


@triton.jit
def log_sums_kernel(
    pairs,
    potential,  # of the axis that is summed over [S, G, others], or None for 0
    slots,  # [S, G, parts, 2, owners]
    parts,
    tiles_of_part,
    OF_KEYS: tl.constexpr,  # a sum for every key, over the queries; else the other way round
    WIDTHS: tl.constexpr,  # of a program
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of exponentials over a part of the other axis, for one tile of owners and some of the widths."""
    BLOCK: tl.constexpr = BLOCK_K if OF_KEYS else BLOCK_Q
    BLOCK_OTHER: tl.constexpr = BLOCK_Q if OF_KEYS else BLOCK_K
    owners = pairs.M if OF_KEYS else pairs.N
    others = pairs.N if OF_KEYS else pairs.M
    own_tiles = tl.cdiv(owners, BLOCK)
    program = tl.program_id(0)
    own_first = program % own_tiles * BLOCK
    part = program // own_tiles % parts
    first_width = program // own_tiles // parts % tl.cdiv(pairs.S, WIDTHS) * WIDTHS
    g = (program // own_tiles // parts // tl.cdiv(pairs.S, WIDTHS)).to(tl.int64)
    own = _points(pairs, g, own_first, OF_KEYS, BLOCK, BLOCK_D)
    tops = ()
    totals = ()
    for _ in tl.static_range(WIDTHS):
        tops = tops + (tl.full([BLOCK], float("-inf"), tl.float32),)
        totals = totals + (tl.zeros([BLOCK], tl.float32),)
    last_tile = tl.minimum((part + 1) * tiles_of_part, tl.cdiv(others, BLOCK_OTHER))
    for tile in range(part * tiles_of_part, last_tile):
        first = tile * BLOCK_OTHER
        other = _points(pairs, g, first, not OF_KEYS, BLOCK_OTHER, BLOCK_D)
        d = distances(pairs, own, other, own_first - first, BLOCK, BLOCK_OTHER, BLOCK_D)
        new_tops = ()
        new_totals = ()
        for n in tl.static_range(WIDTHS):
            s = tl.minimum(first_width + n, pairs.S - 1)  # the last width again where some are left over
            L = tile_logits(pairs, d, s, g, own_first - first, BLOCK, BLOCK_OTHER)
            if potential is not None:
                at = potential + (s * pairs.G + g) * others + first
                L -= load_vector(at, other.count, 0, BLOCK_OTHER)[None, :] * LOG2E
            top = tl.max(L, 1)
            total = tl.sum(tl.exp2(L - finite_shift(top)[:, None]), 1)
            top, total = merge(tops[n], totals[n], top, total)
            new_tops = new_tops + (top,)
            new_totals = new_totals + (total,)
        tops = new_tops
        totals = new_totals
    m = tl.arange(0, BLOCK)
    for n in tl.static_range(WIDTHS):
        s = tl.minimum(first_width + n, pairs.S - 1)
        slot = slots + ((s * pairs.G + g) * parts + part) * 2 * owners + own_first
        tl.store(slot + m, tops[n], mask=m < own.count)
        tl.store(slot + owners + m, totals[n], mask=m < own.count)


def find_log_sums(pairs: Pairs, potential: Tensor | None, by_row: bool) -> Tensor:
    """``[S, G, N]`` by row, else ``[S, G, M]``."""
    S, G = pairs.S.value, pairs.G
    chosen = blocks.choose_blocks("statistics", pairs)
    tiles = blocks.query_tiles(pairs, chosen.queries), blocks.key_tiles(pairs, chosen.keys)
    own_tiles, other_tiles = tiles if by_row else tiles[::-1]
    chunks = triton.cdiv(S, WIDTHS_OF_PROGRAM)
    programs = own_tiles * chunks * G
    tiles_of_part = triton.cdiv(other_tiles, max(1, min(other_tiles, blocks.PROGRAMS // programs)))
    parts = triton.cdiv(other_tiles, tiles_of_part)
    slots = pairs.q.new_empty(S, G, parts, 2, pairs.N if by_row else pairs.M)
    autotune.start(
        log_sums_kernel,
        (programs * parts,),
        pairs,
        None if potential is None else potential.contiguous(),
        slots,
        parts,
        tiles_of_part,
        not by_row,
        triton.cdiv(S, chunks),
        configuration=chosen.options(),
    )
    return merge_slots(slots, as_logarithm=True)
