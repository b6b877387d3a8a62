"""Phase 2 in one kernel: statistics of the couplings, and then products of the forces, mean F_r·F_r'.

These come from products of the targets where phase 1 has kept them (:mod:`.gram`), otherwise from weighted sums
(:mod:`.weighted`). So do those of groups with close pairs: there the forces may be much shorter than the targets, and
too little would be left of products that cancel.
"""

import triton
import triton.language as tl

from ..group import one_of
from .coefficients import mean_of_forces, ready_for_softmax, slope_of, width_of
from .distances import find_distances
from .gram import moments_of_products
from .maps import find_map, points_of_group, statistics_of_group, weights_of_group
from .memory import (
    HEAD,
    after_vector,
    exponents_of,
    has_close,
    load_distances,
    load_origin_row,
    load_vectors,
    statistics_of,
    store_head,
    store_head_with_widths,
    store_tiles,
    store_vectors,
)
from .potentials import DETAILS, multiplying, store_potentials
from .statistics import nearest, store_statistics
from .weighted import moments_of_points


@triton.jit
def _store_lifts(state, norms, weights, groups):
    """Stores the exponents of targets and their weights when lifted, which it returns; 0 for the origin itself."""
    exponents = ()
    lifted = ()
    for side in tl.static_range(len(groups.BLOCKS)):
        exponents = exponents + (exponents_of(norms[side]),)
        lifted = lifted + (tl.where(norms[side] == 0, 0.0, weights[side] * tl.exp2(-exponents[side])),)
    store_vectors(state + HEAD, exponents, groups)
    store_vectors(after_vector(state + HEAD, groups), lifted, groups)
    return lifted


@triton.jit
def moments_kernel(
    groups,
    numbers,
    maps,
    weights,
    weight_strides,
    kept,  # see .memory, or None
    state,
    scale,  # [maps of the call], or of all their groups
    widths,  # [R], or None: those of the numbers
    moments,  # [G, R, R]
    details,  # [G, 6, R, N], or None
    KEPT: tl.constexpr,  # floats of a group
    STATE: tl.constexpr,
    KEEP: tl.constexpr,  # distances in the state
    ROWS: tl.constexpr,  # of gen that a program has tables of coefficients for at a time
    BLOCK_D: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    OF_GROUPS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    R: tl.constexpr = len(numbers.R_list)
    n, place, g = find_map(maps, tl.program_id(0))
    scale = tl.load(scale + statistics_of_group(place, g, OF_GROUPS)).to(tl.float32)
    weights = weights_of_group(weights, weight_strides, groups, maps, n, g)
    state = one_of(state, n) + g * STATE
    if kept is None:
        points = points_of_group(groups, maps, n, g, ALIGNED)
        d, norms, origin_row = find_distances(groups, points, numbers.least_distance, BLOCK_D)
    else:
        kept = one_of(kept, n) + g * KEPT
        norms, origin_row = load_vectors(kept + HEAD, groups), load_origin_row(kept)
        d = load_distances(kept, numbers.least_distance, groups, 0, groups.BLOCKS[0])
    if groups.member.DETAILS:
        store_head_with_widths(state, origin_row, numbers.R_list, widths)
    else:
        store_head(state, origin_row, origin_row * 0)
    lifted = _store_lifts(state, norms, multiplying(weights, groups), groups)
    if KEEP:
        store_tiles(statistics_of(state, R, groups), d, groups)
    d = ready_for_softmax(d, scale, numbers, groups, 0, groups.BLOCKS[0])
    least = nearest(d)
    for r in range(R):  # not unrolled: the R would compete for registers
        width, out = width_of(numbers, state, r, groups), statistics_of(state, r, groups)
        slope = slope_of(scale, numbers, width)
        if groups.member.OF_RELEASE:
            store_statistics(out, d, least * slope, slope, weights, lifted, numbers.least, groups)
        else:
            of_R = None if details is None else one_of(details, n) + (g * DETAILS * R + r) * groups.counts[0]
            store_potentials(out, of_R, R, d, slope, width, weights, lifted, numbers, groups)
    tl.debug_barrier()  # for what other threads have stored
    moments, by = one_of(moments, n) + g * R * R, mean_of_forces(scale, numbers, groups)
    if kept is None:
        moments_of_points(moments, d, kept, state, scale, by, numbers, groups, points, ROWS, BLOCK_D, BLOCK_SUM)
    elif not has_close(kept):
        moments_of_products(moments, kept, state, scale, by, numbers, groups)
    else:
        points = points_of_group(groups, maps, n, g, ALIGNED)
        moments_of_points(moments, d, kept, state, scale, by, numbers, groups, points, ROWS, BLOCK_D, BLOCK_SUM)
