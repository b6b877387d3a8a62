"""What the streaming kernels share: how problems are cut into tiles and rectangles, and what tiles are worth a look.

The keys of a problem are cut into tiles side by side, so that no tile holds keys of both.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .tiles import DIFFERENCES_UP_TO, affinities, load_rows, load_vector

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
# (tests/test_triton_compile.py): where distances are worked out from differences, and where from products. The tiles of
# "differences" and "products" are the same: both must find the same pairs close.
BLOCKS = {
    "flows": (Blocks(64, 32, 16, 0, 8, 2), Blocks(64, 32, 64, 0, 4, 2)),
    "differences": (Blocks(32, 32, 16, 0, 8, 2), Blocks(64, 16, 64, 0, 4, 2)),
    "products": (None, Blocks(64, 16, 64, 64, 4, 2)),
    "values": (Blocks(64, 32, 16, 16, 8, 2), Blocks(32, 32, 64, 128, 4, 2)),
}
ROWS_WITHOUT_TENSOR_MEMORY = 32  # of a product at most: Triton fails on these kernels' products in tensor memory


def choose_blocks(kernel: str, q: Tensor, k: Tensor) -> Blocks:
    """The blocks of a kernel of the backward, no larger than the problem."""
    (N, D), M = q.shape[1:], k.shape[1]
    blocks = BLOCKS[kernel][D > DIFFERENCES_UP_TO]
    assert blocks is not None, "there are no products of so few dimensions"
    if launch.limits(q.device).tensor_memory:
        blocks = blocks._replace(queries=min(ROWS_WITHOUT_TENSOR_MEMORY, blocks.queries))
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
