"""The scale: distances, walking the points once, and their mean."""

import triton
import triton.language as tl

from ..group import one_of
from ..tiles import load_vector
from .kept import keep_others, keep_pairs, slot_of, store_head
from .points import (
    distances_of_points,
    find_map,
    find_origin,
    find_products,
    roots_of_squares,
    rows_of_group,
    squared_distances,
)


@triton.jit
def scale_kernel(
    maps,  # see .points.find_map
    points,
    weights,
    means,  # [G, 2]: mean d·w, mean w
    kept,  # see .kept, or None
    counts,
    D,
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    SPLIT: tl.constexpr,
    LONG: tl.constexpr,
):
    BLOCK_N: tl.constexpr = BLOCKS[0]
    n, _, g = find_map(maps, tl.program_id(0))
    points = rows_of_group(points, n, counts, D, g)
    weights = rows_of_group(weights, n, counts, 1, g)
    if kept is None:
        d, e, origin_row = distances_of_points(points, counts, None, None, D, BLOCKS, BLOCK_D, DIFFERENCES, SPLIT, LONG)
    else:
        origin_row = find_origin(points[0], counts[0], D, BLOCKS[0], BLOCK_D)
        origin = points[0] + origin_row * D
        products, norms, e = find_products(points, counts, origin, D, BLOCKS, BLOCK_D, SPLIT, LONG, True)
        slot = slot_of(one_of(kept, n), g, BLOCKS)
        keep_others(slot, norms, products, weights, counts, BLOCKS)  # first: they would compete for registers
        squares, any_close = squared_distances(products, norms, points, counts, D, BLOCKS)
        store_head(slot, e, origin_row, any_close)
        keep_pairs(slot, squares, products, any_close, BLOCKS)
        d = roots_of_squares(squares, BLOCKS)
    exists = tl.arange(0, BLOCKS[0])[:, None] < counts[0]
    of_rows = tl.zeros([BLOCK_N], dtype=tl.float32)
    total_weight = 0.0
    targets = 0
    for side in tl.static_range(len(BLOCKS)):
        w = load_vector(weights[side], counts[side], 0, BLOCKS[side])
        of_rows += tl.sum(tl.where(exists, d[side] * w[None, :], 0.0), 1)
        total_weight += tl.sum(w)
        targets += counts[side]
    means = one_of(means, n) + 2 * g
    tl.store(means, tl.sum(of_rows) / (counts[0] * targets))
    tl.store(means + 1, total_weight / targets)
