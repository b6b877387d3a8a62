"""The scale: distances, walking the points once, and their mean.

Where there are many dimensions there are few groups, too few for a GPU. Then the products of a group come from several
programs, each of which takes a slice of the dimensions, and are added up in the order of the slices.
"""

import triton
import triton.language as tl

from ..group import one_of
from ..tiles import self_pairs
from .distances import find_distances, find_origin, find_products, roots_of_squares, squared_distances
from .maps import find_map, points_of_group, weights_of_group
from .memory import (
    HEAD,
    after_vector,
    load_origin_row,
    load_products,
    load_vectors,
    store_head,
    store_products,
    store_tiles,
    store_vectors,
)


@triton.jit
def slices_kernel(
    groups,
    maps,
    slices,  # of every group and slice what is kept of a group, see .memory
    share,  # dimensions of a slice
    KEPT: tl.constexpr,  # floats of a slice
    BLOCK_D: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    n, _, g = find_map(maps, tl.program_id(0))
    points = points_of_group(groups, maps, n, g, ALIGNED)
    origin_row = find_origin(groups, points, BLOCK_D)
    origin = points[0][0] + origin_row * points[0][1]
    begin = tl.program_id(1) * share
    products, norms = find_products(groups, points, origin, begin, tl.minimum(begin + share, groups.D), BLOCK_D, True)
    place = slices + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * KEPT
    store_head(place, origin_row, origin_row * 0)
    store_vectors(place + HEAD, norms, groups)
    store_products(after_vector(place + HEAD, groups), products, groups)


@triton.jit
def _add(tensors, others):
    total = ()
    for n in tl.static_range(len(tensors)):
        total = total + (tensors[n] + others[n],)
    return total


@triton.jit
def _sum_of_slices(place, COUNT: tl.constexpr, KEPT: tl.constexpr, groups):
    """Products and norms of a group, in all dimensions."""
    norms = load_vectors(place + HEAD, groups)
    products = load_products(after_vector(place + HEAD, groups), groups)
    for _ in range(1, COUNT):
        place += KEPT
        norms = _add(norms, load_vectors(place + HEAD, groups))
        products = _add(products, load_products(after_vector(place + HEAD, groups), groups))
    return products, norms


@triton.jit
def _keep(kept, origin_row, products, norms, groups, points, least):
    """Distances; what :mod:`.memory` lists is stored."""
    pairs = after_vector(kept + HEAD, groups)
    store_vectors(kept + HEAD, norms, groups)
    store_products(pairs, products, groups)  # first: those of the other sides would compete for registers
    squares, any_close = squared_distances(products, norms[0], norms, groups, points, 0, groups.BLOCKS[0])
    store_head(kept, origin_row, any_close)
    if any_close > 0:
        tl.debug_barrier()  # these come where other threads have stored products
        store_tiles(pairs, squares, groups)
    return roots_of_squares(squares, least, 0, groups.BLOCKS[0], groups)


@triton.jit
def scale_kernel(
    groups,
    numbers,
    maps,
    weights,
    weight_strides,
    means,  # [G, 2]: mean d·w, mean w
    kept,  # see .memory, or None
    slices,  # of slices_kernel, or None
    SLICES: tl.constexpr,  # of a group
    KEPT: tl.constexpr,  # floats of a group
    BLOCK_D: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    N = groups.counts[0]
    n, _, g = find_map(maps, tl.program_id(0))
    points = points_of_group(groups, maps, n, g, ALIGNED)
    weights = weights_of_group(weights, weight_strides, groups, maps, n, g)
    if kept is None:
        d, _, _ = find_distances(groups, points, numbers.least_distance, BLOCK_D)
    else:
        if slices is None:
            origin_row = find_origin(groups, points, BLOCK_D)
            origin = points[0][0] + origin_row * points[0][1]
            products, norms = find_products(groups, points, origin, 0, groups.D, BLOCK_D, True)
        else:
            place = slices + tl.program_id(0).to(tl.int64) * SLICES * KEPT
            origin_row = load_origin_row(place)
            products, norms = _sum_of_slices(place, SLICES, KEPT, groups)
        d = _keep(one_of(kept, n) + g * KEPT, origin_row, products, norms, groups, points, numbers.least_distance)
    OF_ROW: tl.constexpr = groups.BLOCKS[0]
    exists = tl.arange(0, OF_ROW)[:, None] < N
    of_rows = tl.zeros([OF_ROW], dtype=tl.float32)
    total_weight = 0.0
    targets = 0
    for side in tl.static_range(0 if groups.member.OWN else 1, len(groups.BLOCKS)):
        weighted, of_side = d[side] * weights[side][None, :], tl.sum(weights[side])
        if side == 0 and not groups.member.SCALE_SELF:
            weighted, of_side = tl.where(self_pairs(0, OF_ROW, OF_ROW), 0.0, weighted), of_side * (N - 1) / N
        of_rows += tl.sum(tl.where(exists, weighted, 0.0), 1)
        total_weight += of_side
        targets += groups.counts[side]
    means = one_of(means, n) + 2 * g
    tl.store(means, tl.sum(of_rows) / (N * targets))
    tl.store(means + 1, total_weight / targets)
