"""What the group kernels share: each program owns one problem, and its distances stay in registers.

The targets of a problem come in one to three *sides*, each a register tile of its own, ``[N, count]`` padded to powers
of two; arrays and counts are passed as tuples over the sides.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from . import launch

MOST_PAIRS = 64 * 160  # of padded queries and targets: what the registers of a program hold
MOST_QUERIES = 128
OPERANDS_IN_SHARED = 200_000  # bytes: with less, tensor cores read both operands from registers, and few are left


def fits(N: int, *counts: int) -> bool:
    """Whether a problem of N queries and so many targets on each side is one for the group kernels."""
    blocks = padded(N, counts)
    return blocks[0] <= MOST_QUERIES and blocks[0] * sum(blocks[1:]) <= MOST_PAIRS


def padded(N: int, counts: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks of the queries and of each side that is not empty."""
    return tuple(launch.padded_block(count) for count in (N, *counts) if count > 0)


@dataclass(frozen=True)
class Configuration:
    """How a kernel is compiled."""

    block_d: int  # dimensions a step of the distances
    block_sum: int  # dimensions a step of the weighted sums
    num_warps: int
    num_stages: int


def configuration(blocks: tuple[int, ...], limits: launch.Limits) -> Configuration:
    """For blocks of the queries and of each side: distances take about 36 registers a thread, work takes the rest."""
    pairs = blocks[0] * sum(blocks[1:])
    pairs_of_warp, most_warps = (4096, 4) if limits.amd else (2048, 8)  # 64 lanes or 32
    num_warps = min(most_warps, 2 * triton.next_power_of_2(triton.cdiv(pairs, pairs_of_warp)))
    wide = not limits.amd and limits.shared_bytes >= OPERANDS_IN_SHARED
    return Configuration(
        block_d=16, block_sum=32 if wide or limits.amd else 16, num_warps=num_warps, num_stages=3 if wide else 1
    )



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
