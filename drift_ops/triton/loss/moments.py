"""Products of the forces from weighted sums of the targets, in a second walk over the points."""

import triton
import triton.language as tl

from ..group import one_of, zeros
from ..halves import add_product, split
from .distances import find_distances_again, load_centred
from .maps import find_map, points_of_group
from .products import has_close, load_kept_distances, load_origin_row, slot_of
from .state import (
    coefficients,
    load_exponents,
    load_exponents_of_rows,
    mean_of_forces,
    ready_for_softmax,
    slot_of_state,
    split_rows,
)


@triton.jit
def _add_rows(
    totals,
    d,
    slot,
    scale,
    numbers,
    groups,
    rows,
    origin,
    first,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
):
    """To the sums of F_r·F_r', r' <= r, over the dimensions, those of rows [first, first + ROWS)."""
    R: tl.constexpr = len(numbers.R_list)
    tables = ()  # of the coefficients of each R
    sums = ()
    for r in tl.static_range(R):
        c, bound = coefficients(d, slot, r, scale, 1.0, numbers, first, ROWS, BLOCKS)
        tables = tables + (split_rows(c, bound, BLOCKS),)
        for _ in tl.static_range(r + 1):
            sums = sums + (tl.zeros([ROWS], dtype=tl.float32),)
    exponents = load_exponents(slot, BLOCKS)
    for start in range(0, groups.D, BLOCK_SUM):
        F = ()
        for _ in tl.static_range(R):
            F = F + (zeros(ROWS, BLOCK_SUM),)
        for side in tl.static_range(len(BLOCKS)):
            t_hi, t_lo = split(
                load_centred(groups, rows, side, origin, start, BLOCKS, BLOCK_SUM) * tl.exp2(exponents[side])[:, None]
            )
            more = ()
            for r in tl.static_range(R):
                of_R = add_product(F[r], tables[r][0][side], tables[r][1][side], t_hi, t_lo, groups.SPLIT, False)
                more = more + (of_R,)
            F = more
        added = ()
        for r in tl.static_range(R):
            for other in tl.static_range(r + 1):
                added = added + (sums[len(added)] + tl.sum(F[r] * F[other], 1),)
        sums = added
    more_totals = ()
    for r in tl.static_range(R):
        for other in tl.static_range(r + 1):
            down = tables[r][2] * tables[other][2]  # type: ignore[var-annotated]
            more_totals = more_totals + (totals[len(more_totals)] + sums[len(more_totals)] * down,)
    return more_totals


@triton.jit
def _moments_of_points(
    program,
    groups,
    numbers,
    maps,
    kept,
    state,
    scale,
    moments,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    KEEP: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Of one groups, rows, from weighted sums of its targets."""
    R: tl.constexpr = len(numbers.R_list)
    n, place, g = find_map(maps, program)
    scale = tl.load(scale + place).to(tl.float32)
    rows = points_of_group(groups, maps, n, g, ALIGNED)
    slot = slot_of_state(one_of(state, n), g, R, BLOCKS, KEEP)
    origin = rows[0][0] + load_origin_row(slot) * rows[0][1]
    totals = ()  # of F_r·F_r', r' <= r, over the dimensions, and over rows that are ROWS apart
    for r in tl.static_range(R):
        for _ in tl.static_range(r + 1):
            totals = totals + (tl.zeros([ROWS], dtype=tl.float32),)
    for first in range(0, groups.counts[0], ROWS):
        if kept is None:
            exponents, of_rows = load_exponents(slot, BLOCKS), load_exponents_of_rows(slot, first, ROWS)
            d = find_distances_again(
                groups, rows, first, origin, exponents, of_rows, numbers.least_distance, ROWS, BLOCKS, BLOCK_D
            )
        else:
            of_group = slot_of(one_of(kept, n), g, BLOCKS)
            d = load_kept_distances(of_group, numbers.least_distance, first, ROWS, BLOCKS)
        d = ready_for_softmax(d, scale, numbers, groups.counts, first, ROWS, BLOCKS)
        totals = _add_rows(totals, d, slot, scale, numbers, groups, rows, origin, first, ROWS, BLOCKS, BLOCK_SUM)
    by = mean_of_forces(scale, numbers, groups)
    moments = one_of(moments, n) + g * R * R
    for r in tl.static_range(R):
        for other in tl.static_range(r + 1):
            moment = tl.sum(totals[r * (r + 1) // 2 + other]) * by
            tl.store(moments + r * R + other, moment)
            tl.store(moments + other * R + r, moment)


@triton.jit
def moments_kernel(
    groups,
    numbers,
    maps,
    kept,  # see .products, or None
    state,  # see .state
    scale,  # [maps of the call]
    moments,  # [G, R, R]
    total,  # groups of all maps
    GROUPS: tl.constexpr,  # of a program
    ROWS: tl.constexpr,  # of gen that it has tables of coefficients for at a time
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    KEEP: tl.constexpr,  # distances in the state
    ALIGNED: tl.constexpr,
):
    """Of all groups, or if products are kept, of those with close pairs."""
    first = tl.program_id(0) * GROUPS
    if kept is None:
        _moments_of_points(
            first, groups, numbers, maps, kept, state, scale, moments, ROWS, BLOCKS, BLOCK_D, BLOCK_SUM, KEEP, ALIGNED
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
                        program, groups, numbers, maps, kept, state, scale, moments, ROWS, BLOCKS, BLOCK_D, BLOCK_SUM,
                        KEEP, ALIGNED,
                    )  # fmt: skip
