"""Products of the forces from weighted sums of the targets, in a second walk over the points."""

import triton
import triton.language as tl

from .coefficients import coefficients, largest_coefficients, ready_for_softmax, split_rows, weighted_sums
from .distances import find_distances_again
from .memory import HEAD, load_distances, load_origin_row, load_vectors


@triton.jit
def _add_rows(
    totals, d, state, scale, numbers, groups, points, origin, first, ROWS: tl.constexpr, BLOCK_SUM: tl.constexpr
):
    """To the sums of F_r·F_r', r' <= r, over the dimensions, those of rows [first, first + ROWS)."""
    R: tl.constexpr = len(numbers.R_list)
    tables = ()
    sums = ()
    for r in tl.static_range(R):
        c = ()
        for side in tl.static_range(len(groups.BLOCKS)):
            c = c + (coefficients(d, state, r, scale, numbers, groups, first, ROWS, side),)
        tables = tables + (split_rows(c, largest_coefficients(state, r, groups, first, ROWS)),)
        for _ in tl.static_range(r + 1):
            sums = sums + (tl.zeros([ROWS], dtype=tl.float32),)
    exponents = load_vectors(state + HEAD, groups)
    for start in range(0, groups.D, BLOCK_SUM):
        F = weighted_sums(tables, groups, points, origin, exponents, start, ROWS, BLOCK_SUM)
        added = ()
        for r in tl.static_range(R):
            for other in tl.static_range(r + 1):
                added = added + (sums[len(added)] + tl.sum(F[r] * F[other], 1),)
        sums = added
    more = ()
    for r in tl.static_range(R):
        for other in tl.static_range(r + 1):
            down = tables[r][2] * tables[other][2]  # type: ignore[var-annotated]
            more = more + (totals[len(more)] + sums[len(more)] * down,)
    return more


@triton.jit
def moments_of_points(
    moments, d, kept, state, scale, by, numbers, groups, points, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
):  # fmt: skip
    """Stores ``by`` times the products of the forces of all R, from weighted sums of the targets."""
    R: tl.constexpr = len(numbers.R_list)
    origin = points[0][0] + load_origin_row(state) * points[0][1]
    totals = ()  # of F_r·F_r', r' <= r, over the dimensions, and over rows that are ROWS apart
    for r in tl.static_range(R):
        for _ in tl.static_range(r + 1):
            totals = totals + (tl.zeros([ROWS], dtype=tl.float32),)
    for first in range(0, groups.counts[0], ROWS):
        of_rows = d
        if ROWS < groups.BLOCKS[0]:  # a part of a tile in registers cannot be had
            if kept is None:
                exponents = load_vectors(state + HEAD, groups)
                e = tl.load(state + HEAD + first + tl.arange(0, ROWS))
                of_rows = find_distances_again(
                    groups, points, first, origin, exponents, e, numbers.least_distance, ROWS, BLOCK_D
                )
            else:
                of_rows = load_distances(kept, numbers.least_distance, groups, first, ROWS)
            of_rows = ready_for_softmax(of_rows, scale, numbers, groups, first, ROWS)
        totals = _add_rows(totals, of_rows, state, scale, numbers, groups, points, origin, first, ROWS, BLOCK_SUM)
    for r in tl.static_range(R):
        for other in tl.static_range(r + 1):
            moment = tl.sum(totals[r * (r + 1) // 2 + other]) * by
            tl.store(moments + r * R + other, moment)
            tl.store(moments + other * R + r, moment)
