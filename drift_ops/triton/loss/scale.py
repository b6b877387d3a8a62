"""The scale: distances, walking the points once, and their mean."""

import triton
import triton.language as tl

from ..group import one_of
from .distances import find_distances, find_origin, find_products, roots_of_squares, squared_distances
from .maps import find_map, points_of_group, weights_of_group
from .products import keep_others, keep_pairs, slot_of, store_head


@triton.jit
def scale_kernel(
    groups,
    numbers,
    maps,
    weights,
    weight_strides,
    means,  # [G, 2]: mean d·w, mean w
    kept,  # see .products, or None
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    BLOCK_N: tl.constexpr = BLOCKS[0]
    counts, least = groups.counts, numbers.least_distance
    n, _, g = find_map(maps, tl.program_id(0))
    rows = points_of_group(groups, maps, n, g, ALIGNED)
    weights = weights_of_group(weights, weight_strides, groups.counts, maps, n, g, BLOCKS)
    if kept is None:
        d, _, _ = find_distances(groups, rows, least, BLOCKS, BLOCK_D)
    else:
        origin_row = find_origin(groups, rows, BLOCKS, BLOCK_D)
        products, norms = find_products(groups, rows, rows[0][0] + origin_row * rows[0][1], BLOCKS, BLOCK_D, True)
        slot = slot_of(one_of(kept, n), g, BLOCKS)
        keep_others(slot, norms, products, BLOCKS)  # first: they would compete for registers
        squares, any_close = squared_distances(products, norms[0], norms, groups, rows, 0, BLOCK_N, BLOCKS)
        store_head(slot, origin_row, any_close)
        keep_pairs(slot, squares, products, any_close, BLOCKS)
        d = roots_of_squares(squares, least, 0, BLOCK_N, BLOCKS)
    exists = tl.arange(0, BLOCK_N)[:, None] < counts[0]
    of_rows = tl.zeros([BLOCK_N], dtype=tl.float32)
    total_weight = 0.0
    targets = 0
    for side in tl.static_range(len(BLOCKS)):
        of_rows += tl.sum(tl.where(exists, d[side] * weights[side][None, :], 0.0), 1)
        total_weight += tl.sum(weights[side])
        targets += counts[side]
    means = one_of(means, n) + 2 * g
    tl.store(means, tl.sum(of_rows) / (counts[0] * targets))
    tl.store(means + 1, total_weight / targets)
