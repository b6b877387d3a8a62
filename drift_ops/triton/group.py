"""What the group kernels share: each program owns one problem, and its distances stay in registers.

The targets of a problem come in one to three *sides*, each a register tile of its own, ``[N, count]`` padded to powers
of two; arrays and counts are passed as tuples over the sides.
"""

import functools
from dataclasses import dataclass

import triton
import triton.language as tl

from . import launch

FIELD_PAIRS = 64 * 64  # of padded queries and targets: what the registers of a program hold
OPERANDS_IN_SHARED = 200_000  # bytes: with less, tensor cores read both operands from registers, and few are left


def fits_field(N: int, *counts: int) -> bool:
    """Whether problems of N queries and so many keys on each side are for the group kernel of forms A and B."""
    rows, *blocks = padded(N, *counts)
    return max(rows, *blocks) <= 64 and rows * sum(blocks) <= FIELD_PAIRS


def padded(*counts: int) -> tuple[int, ...]:
    """Blocks of the queries and of the sides, those that are not empty."""
    return _padded(tuple(map(int, counts)))


@functools.cache
def _padded(counts: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(launch.padded_block(count) for count in counts if count > 0)


@dataclass(frozen=True)
class Configuration:
    """How a kernel is compiled."""

    block_d: int  # dimensions a step of the distances
    block_sum: int  # dimensions a step of the weighted sums
    num_warps: int
    num_stages: int

    @functools.cached_property
    def options(self) -> dict[str, int]:
        """What a kernel is launched with."""
        blocks = {"BLOCK_D": self.block_d, "BLOCK_SUM": self.block_sum}
        used = {name: size for name, size in blocks.items() if size}
        return used | {"num_warps": self.num_warps, "num_stages": self.num_stages}


@functools.cache
def configuration(blocks: tuple[int, ...], limits: launch.Limits, pairs_of_lane: int) -> Configuration:
    """For blocks of the queries and of each side, and how many pairs a lane of a warp may hold."""
    lanes, most_warps = (64, 4) if limits.amd else (32, 8)
    num_warps = 2 * triton.next_power_of_2(triton.cdiv(blocks[0] * sum(blocks[1:]), pairs_of_lane * lanes))
    pipelined = not limits.amd and limits.shared_bytes >= OPERANDS_IN_SHARED
    return Configuration(16, 32, min(most_warps, num_warps), 3 if pipelined else 1)


@triton.jit
def zeros(BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    return tl.zeros([BLOCK_Q, BLOCK_K], dtype=tl.float32)


@triton.jit
def one_of(values, n):
    """``values[n]`` of a tuple of scalars, for an index known at run time."""
    value = values[0]
    for other in tl.static_range(1, len(values)):
        value = tl.where(n == other, values[other], value)
    return value
