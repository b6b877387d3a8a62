"""What the streaming kernels share: how problems are cut into tiles and rectangles, and the distances of a tile.

The keys of a problem are cut into tiles side by side, so that no tile holds keys of both.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from torch.linalg import vector_norm

from . import launch
from .tiles import (
    CLOSE,
    DIFFERENCES_UP_TO,
    affinities,
    load_rows,
    load_vector,
    pairs_within,
    roots,
    self_pairs,
    squared_differences,
)

PROGRAMS = 512  # to cut rectangles for: some four on each multiprocessor of the GPUs of today
LARGEST_BLOCK = 256  # of a tile, along any axis


class Blocks(NamedTuple):
    """Sizes of a program's tiles, and how it runs."""

    queries: int
    keys: int
    depth: int  # dimensions of a step of the products
    values: int  # dimensions of an accumulator; 0 for none
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """What a kernel is launched with."""
        tile = {"BLOCK_Q": self.queries, "BLOCK_K": self.keys, "BLOCK_D": self.depth}
        values = {"BLOCK_V": self.values} if self.values else {}
        return tile | values | {"num_warps": self.warps, "num_stages": self.stages}

    def within(self, queries: int, keys: int, dimensions: int) -> "Blocks":
        """No larger than a problem of such a size needs."""
        counts = (queries, keys, dimensions, dimensions)
        fitting = (min(most, LARGEST_BLOCK, launch.padded_block(n)) for most, n in zip(self, counts, strict=False))
        return self._replace(**dict(zip(self._fields, fitting, strict=False)))


# Of the backward: the largest blocks found whose kernels spill next to nothing on any architecture
# (tests/test_triton_compile.py): where distances are worked out from differences, and where from products.
BLOCKS = {
    "flows": (Blocks(64, 32, 16, 0, 8, 2), Blocks(64, 32, 32, 0, 4, 2)),
    "differences": (Blocks(32, 32, 16, 0, 8, 2), Blocks(64, 16, 32, 0, 4, 2)),
    "products": (None, Blocks(64, 16, 32, 64, 4, 2)),
    "values": (Blocks(64, 32, 16, 16, 8, 2), Blocks(32, 32, 16, 128, 4, 2)),
}


def choose_blocks(kernel: str, q: Tensor, k: Tensor) -> Blocks:
    """The blocks of a kernel of the backward, no larger than the problem."""
    (N, D), M = q.shape[1:], k.shape[1]
    blocks = BLOCKS[kernel][D > DIFFERENCES_UP_TO]
    assert blocks is not None, "there are no products of so few dimensions"
    return blocks.within(N, M, D)


class Rectangles(NamedTuple):
    """How the plane of a problem is cut: the parts of each axis, and the tiles of a part."""

    row_parts: int
    col_parts: int
    row_tiles: int
    col_tiles: int


def cut(row_tiles: int, col_tiles: int, problems: int) -> Rectangles:
    """Enough rectangles of tiles to fill a GPU, and no more: each has partial results for its rows and columns."""
    wanted = max(1, PROGRAMS // problems)
    row_parts = max(1, min(row_tiles, wanted, round(math.sqrt(wanted * row_tiles / col_tiles))))
    col_parts = max(1, min(col_tiles, wanted // row_parts))
    rows, cols = triton.cdiv(row_tiles, row_parts), triton.cdiv(col_tiles, col_parts)
    return Rectangles(triton.cdiv(row_tiles, rows), triton.cdiv(col_tiles, cols), rows, cols)


def common_arguments(
    q: Tensor,
    k: Tensor,
    kernel: str,
    widths: Sequence[float],
    temperature: float,
    split: int,
    has_self: bool,
    self_distance: float = math.inf,
) -> dict[str, Any]:
    """Arguments of the same name and meaning in all kernels."""
    (G, N, D), M = q.shape, k.shape[1]
    return {
        "q": q,
        "k": k,
        "q_norms": squared_norms(q),
        "k_norms": squared_norms(k),
        "widths": tuple(map(float, widths)),
        "temperature": float(temperature),
        "G": G,
        "N": N,
        "M": M,
        "D": D,
        "split": split or M,
        "GAUSSIAN": kernel == "gaussian",
        "SELF": "none" if not has_self else "masked" if self_distance == math.inf else "apart",
        "PRECISION": launch.product_precision(launch.limits(q.device).amd),
    }


def squared_norms(points: Tensor) -> Tensor | None:
    """``[G, count]`` of points ``[G, count, D]``; None where D is so small that differences serve all pairs."""
    return None if points.shape[2] <= DIFFERENCES_UP_TO else vector_norm(points, dim=2).square_()


def count_tiles(count: int, split: int, block: int) -> int:
    """Tiles of an axis whose sides ``[0, split)`` and ``[split, count)`` are cut apart."""
    return triton.cdiv(split, block) + triton.cdiv(count - split, block)


@triton.jit
def find_tile(tile, count, split, BLOCK: tl.constexpr):
    """First entry of a tile of such an axis, the entries from there to the end of the side, and the side."""
    tiles_of_first = tl.cdiv(split, BLOCK)
    side = (tile >= tiles_of_first).to(tl.int32)
    start = tile * BLOCK + side * (split - tiles_of_first * BLOCK)
    return start, split + side * (count - split) - start, side


@triton.jit
def coarse(x):
    """``x`` rounded to the ten bits of mantissa that TF32 has."""
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def add_product(total, a, b, PRECISION: tl.constexpr):
    """``total + a @ b``. For TF32x3 Triton's own way needs three accumulators and more registers than there are.

    The tensor cores cut what they add: there, only the product of these two tiles runs through them, small parts first.
    """
    if PRECISION == "tf32x3":
        a_coarse = coarse(a)
        b_coarse = coarse(b)
        product = tl.dot(a - a_coarse, b_coarse, input_precision="tf32")
        product = tl.dot(a_coarse, b - b_coarse, product, input_precision="tf32")
        return total + tl.dot(a_coarse, b_coarse, product, input_precision="tf32")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def products(
    a,
    b,
    a_count,
    b_count,
    D,
    PRECISION: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``a_i·b_j`` [BLOCK_A, BLOCK_B] of two tiles of rows."""
    total = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    for start in range(0, D, BLOCK_D):
        a_part = load_rows(a, a_count, start, D, BLOCK_A, BLOCK_D)
        b_part = load_rows(b, b_count, start, D, BLOCK_B, BLOCK_D)
        total = add_product(total, a_part, tl.trans(b_part), PRECISION)
    return total


@triton.jit
def distances(
    q,  # [G, N, D]
    k,  # [G, M, D]
    q_norms,  # squared norms [G, N], or None: D is so small that differences serve all pairs
    k_norms,  # [G, M] or None
    q_start,  # first row of the tile among all G·N
    k_start,
    q_count,  # rows from there to the end
    k_count,
    shift,  # first query − first key
    D,
    least,
    unit,
    self_distance,
    SELF: tl.constexpr,  # key i is query i, and "masked", or "apart" by self_distance; else "none"
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``δ = max(d, least)/unit``, plus ``self_distance`` on self pairs, of a tile; and which of its pairs count."""
    q += q_start * D
    k += k_start * D
    exists = pairs_within(q_count, k_count, BLOCK_Q, BLOCK_K)
    if q_norms is None:
        squared = squared_differences(q, k, q_count, k_count, D, BLOCK_Q, BLOCK_K)
    else:
        squared = products(q, k, q_count, k_count, D, PRECISION, BLOCK_Q, BLOCK_K, BLOCK_D)
        q_part = load_vector(q_norms + q_start, q_count, 0, BLOCK_Q)
        k_part = load_vector(k_norms + k_start, k_count, 0, BLOCK_K)
        norms = q_part[:, None] + k_part[None, :]
        squared = norms - 2 * squared
        close = squared < norms * CLOSE
        if SELF != "none":
            close = close & (self_pairs(shift, BLOCK_Q, BLOCK_K) == 0)
        squared = correct_close_keys(squared, close, q, k, q_count, D, BLOCK_Q, BLOCK_K, BLOCK_D)
    d = roots(squared, least, shift, SELF != "none", BLOCK_Q, BLOCK_K)
    if unit is not None:
        d = d / tl.load(unit)
    if SELF == "masked":
        exists = exists & (self_pairs(shift, BLOCK_Q, BLOCK_K) == 0)
    if SELF == "apart":
        d = tl.where(self_pairs(shift, BLOCK_Q, BLOCK_K), d + self_distance, d)
    return d, exists


@triton.jit
def width_of(widths, s):
    """``widths[s]`` for an ``s`` known at run time. (Loops over widths that are unrolled need too many registers.)"""
    width = widths[0]
    for n in tl.static_range(1, len(widths)):
        width = tl.where(s == n, widths[n], width)
    return width


@triton.jit
def correct_close_keys(
    squared, close, q, k, q_count, D, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Works out from differences the distances to every key of the tile that is close to a query."""
    left = tl.max(close.to(tl.int32), 0)
    while tl.max(left, 0) > 0:
        j = tl.argmax(left, 0)
        exact = tl.zeros([BLOCK_Q], tl.float32)
        for start in range(0, D, BLOCK_D):
            difference = load_rows(q, q_count, start, D, BLOCK_Q, BLOCK_D) - load_vector(k + j * D, D, start, BLOCK_D)
            exact += tl.sum(difference * difference, 1)
        chosen = tl.arange(0, BLOCK_K) == j
        squared = tl.where(chosen[None, :], exact[:, None], squared)
        left = tl.where(chosen, 0, left)
    return squared


@triton.jit
def tile_affinities(
    logits, exists, row_stats, col_stats, N, M, q_count, k_count, least, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):
    """``max(A, least)`` of a tile, 0 where no pair counts. The statistics [2, N] and [2, M] start at the tile."""
    A = affinities(
        logits,
        load_vector(row_stats, q_count, 0, BLOCK_Q),
        load_vector(row_stats + N, q_count, 0, BLOCK_Q),
        load_vector(col_stats, k_count, 0, BLOCK_K),
        load_vector(col_stats + M, k_count, 0, BLOCK_K),
        least,
    )
    return tl.where(exists, A, 0.0)
