"""The tiles of the streaming kernels: their sizes, and how a problem's plane is cut into rectangles of them."""

import math
from typing import NamedTuple

import triton

from .. import launch
from ..tiles import DIFFERENCES_UP_TO
from .pairs import Pairs
from .rows import WHOLE_UP_TO

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


# Where distances are worked out from differences; by kernel.
FROM_DIFFERENCES = {
    "statistics": Blocks(64, 64, 16, 0, 16, 2),
    "sums": Blocks(64, 64, 16, 16, 8, 2),
    "flows": Blocks(64, 32, 16, 0, 8, 2),
    "differences": Blocks(32, 32, 16, 0, 8, 2),
    "values": Blocks(64, 32, 16, 16, 8, 2),
}
# From products, forward, by kernel and precision: of up to 64 dimensions, and of more.
FORWARD = {
    ("statistics", "high"): (Blocks(64, 64, 64, 0, 4, 3), Blocks(64, 64, 256, 0, 4, 2)),
    ("statistics", "highest"): (Blocks(64, 64, 64, 0, 4, 3), Blocks(64, 64, 64, 0, 4, 3)),
    ("sums", "high"): (Blocks(64, 64, 64, 64, 4, 3), Blocks(64, 64, 256, 256, 4, 2)),
    ("sums", "highest"): (Blocks(64, 64, 64, 64, 4, 2), Blocks(128, 64, 64, 128, 8, 3)),
}
SMALL = {"statistics": Blocks(64, 64, 32, 0, 4, 2), "sums": Blocks(64, 32, 32, 64, 4, 2)}
# Too few rows for products in tensor memory, on which Triton 3.6 fails.
TENSOR_MEMORY = {"statistics": Blocks(32, 32, 64, 0, 4, 3), "sums": Blocks(32, 64, 64, 128, 4, 3)}
ROWS_WITHOUT_TENSOR_MEMORY = 32
LARGE_SHARED_BYTES = 220_000  # what FORWARD is for: Hopper and later
# From products, backward: the largest blocks found whose kernels spill next to nothing on any architecture
# (tests/test_triton_compile.py). The tiles of "differences" and "products" are the same: both must find the same pairs
# close.
BACKWARD = {
    "flows": Blocks(64, 32, 64, 0, 4, 2),
    "differences": Blocks(64, 16, 64, 0, 4, 2),
    "products": Blocks(64, 16, 64, 64, 4, 2),
    "values": Blocks(32, 32, 64, 128, 4, 2),
}


def choose_blocks(kernel: str, pairs: Pairs) -> Blocks:
    """The blocks of a kernel, no larger than the problem."""
    D, limits = pairs.D, launch.limits(pairs.q.device)
    if D <= DIFFERENCES_UP_TO:
        blocks = FROM_DIFFERENCES[kernel]
    elif kernel in BACKWARD:
        blocks = BACKWARD[kernel]
    elif limits.tensor_memory:
        blocks = TENSOR_MEMORY[kernel]
    elif limits.shared_bytes < LARGE_SHARED_BYTES:
        blocks = SMALL[kernel]
    else:
        blocks = FORWARD[kernel, "highest" if launch.splits_products() else "high"][D > 64]
        if D > WHOLE_UP_TO:
            blocks = blocks._replace(depth=64, stages=3)
    if limits.tensor_memory and kernel in BACKWARD:
        blocks = blocks._replace(queries=min(ROWS_WITHOUT_TENSOR_MEMORY, blocks.queries))
    return blocks.within(pairs.N, pairs.M, pairs.DEPTH.value)


class Rectangles(NamedTuple):
    """How the plane of a problem is cut: rectangles along each axis, and the tiles of one."""

    rows: int
    cols: int
    row_tiles: int
    col_tiles: int


def cut_plane(row_tiles: int, col_tiles: int, problems: int) -> Rectangles:
    """Enough rectangles of tiles to fill a GPU, and no more: each has partial results for its rows and columns."""
    wanted = max(1, PROGRAMS // problems)
    rows = max(1, min(row_tiles, wanted, round(math.sqrt(wanted * row_tiles / col_tiles))))
    cols = max(1, min(col_tiles, wanted // rows))
    row_tiles_of_one, col_tiles_of_one = triton.cdiv(row_tiles, rows), triton.cdiv(col_tiles, cols)
    return Rectangles(
        triton.cdiv(row_tiles, row_tiles_of_one),
        triton.cdiv(col_tiles, col_tiles_of_one),
        row_tiles_of_one,
        col_tiles_of_one,
    )


def cut(pairs: Pairs, blocks: Blocks) -> Rectangles:
    return cut_plane(query_tiles(pairs, blocks.queries), key_tiles(pairs, blocks.keys), pairs.G)


def query_tiles(pairs: Pairs, block: int) -> int:
    return triton.cdiv(pairs.N, block)


def key_tiles(pairs: Pairs, block: int) -> int:
    """Those of both sides, which are cut apart."""
    return triton.cdiv(pairs.first_keys, block) + triton.cdiv(pairs.M - pairs.first_keys, block)
