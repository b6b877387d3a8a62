"""Products of the forces from weighted sums of the targets, in a second walk over the points."""

import triton
import triton.language as tl

from ..group import one_of, zeros
from ..halves import add_product, split
from .kept import HEAD, has_close, load_head, load_kept_distances, slot_of
from .points import distances_of_points, find_map, load_centred, rows_of_group
from .statistics import coefficients, ready_for_softmax, slope_of, split_rows, statistics_of


@triton.jit
def _moments_of_points(
    maps,
    program,
    points,
    weights,
    kept,
    state,
    scale,
    R_list,
    moments,
    counts,
    D,
    least,
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    SPLIT: tl.constexpr,
    LONG: tl.constexpr,
    KEEP: tl.constexpr,  # distances in the state
):
    """Of one group, from weighted sums of its targets."""
    BLOCK_N: tl.constexpr = BLOCKS[0]
    n, place, g = find_map(maps, program)
    scale = tl.load(scale + place).to(tl.float32)
    points = rows_of_group(points, n, counts, D, g)
    weights = rows_of_group(weights, n, counts, 1, g)
    state = one_of(state, n)
    e, origin_row = load_head(statistics_of(state, g, 0, len(R_list), BLOCKS, KEEP) - HEAD)
    if kept is None:
        d, _, _ = distances_of_points(points, counts, e, origin_row, D, BLOCKS, BLOCK_D, DIFFERENCES, SPLIT, LONG)
    else:
        d = load_kept_distances(slot_of(one_of(kept, n), g, BLOCKS), BLOCKS)
    d = ready_for_softmax(d, scale, counts, BLOCKS)
    tables = ()  # of the coefficients of each R
    sums = ()  # of F_r·F_r' over the dimensions, for r' <= r: [N] each
    for r in tl.static_range(len(R_list)):
        statistics = statistics_of(state, g, r, len(R_list), BLOCKS, KEEP)
        c, bound = coefficients(d, statistics, slope_of(scale, R_list[r]), 1.0, weights, least, counts, BLOCKS)
        tables = tables + (split_rows(c, bound, BLOCKS),)
        for _ in tl.static_range(r + 1):
            sums = sums + (tl.zeros([BLOCK_N], dtype=tl.float32),)
    centre = points[0] + origin_row * D
    up = tl.exp2(e)
    for start in range(0, D, BLOCK_SUM):
        F = ()
        for _ in tl.static_range(len(R_list)):
            F = F + (zeros(BLOCKS[0], BLOCK_SUM),)
        for side in tl.static_range(len(BLOCKS)):
            t = load_centred(points[side], counts[side], centre, start, D, BLOCKS[side], BLOCK_SUM)
            t_hi, t_lo = split(t * up)
            more = ()
            for r in tl.static_range(len(R_list)):
                more = more + (add_product(F[r], tables[r][0][side], tables[r][1][side], t_hi, t_lo, SPLIT, False),)
            F = more
        added = ()
        for r in tl.static_range(len(R_list)):
            for other in tl.static_range(r + 1):
                added = added + (sums[r * (r + 1) // 2 + other] + tl.sum(F[r] * F[other], 1),)
        sums = added

    unit = tl.maximum(scale / tl.sqrt(D * 1.0), 1e-3)
    by = tl.exp2(-2 * e) / (unit * unit * (counts[0] * 1.0) * (D * 1.0))
    moments = one_of(moments, n) + g * len(R_list) * len(R_list)
    for r in tl.static_range(len(R_list)):
        for other in tl.static_range(r + 1):
            moment = tl.sum(sums[r * (r + 1) // 2 + other] * tables[r][2] * tables[other][2]) * by
            tl.store(moments + r * len(R_list) + other, moment)
            tl.store(moments + other * len(R_list) + r, moment)


@triton.jit
def moments_kernel(
    maps,  # see .points.find_map
    points,
    weights,
    kept,  # or None
    state,
    scale,  # [maps of the call]
    R_list,
    moments,  # [G, R, R]
    total,  # groups of all maps
    counts,
    D,
    least,
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    SPLIT: tl.constexpr,
    LONG: tl.constexpr,
    GROUPS: tl.constexpr,  # of a program
    KEEP: tl.constexpr,  # distances in the state
):
    """Of all groups, or if products are kept, of those with close pairs."""
    first = tl.program_id(0) * GROUPS
    if kept is None:
        _moments_of_points(
            maps,
            first,
            points,
            weights,
            kept,
            state,
            scale,
            R_list,
            moments,
            counts,
            D,
            least,
            BLOCKS,
            BLOCK_D,
            BLOCK_SUM,
            DIFFERENCES,
            SPLIT,
            LONG,
            KEEP,
        )
    else:
        programs = first + tl.arange(0, GROUPS)
        n, _, g = find_map(maps, programs)
        close = has_close(slot_of(one_of(kept, n), g, BLOCKS), programs < total).to(tl.int32)
        if tl.max(close) > 0:
            for other in range(GROUPS):
                program = first + other
                if tl.sum(tl.where(programs == program, close, 0)) > 0:
                    _moments_of_points(
                        maps,
                        program,
                        points,
                        weights,
                        kept,
                        state,
                        scale,
                        R_list,
                        moments,
                        counts,
                        D,
                        least,
                        BLOCKS,
                        BLOCK_D,
                        BLOCK_SUM,
                        DIFFERENCES,
                        SPLIT,
                        LONG,
                        KEEP,
                    )
