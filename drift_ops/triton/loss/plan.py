"""How a map is served: by which kernels, what they keep for each other, how they are configured.

A matter of shapes, dtype and the limits of the device alone, so that it is known where nothing runs.
"""

import functools
from dataclasses import dataclass

import triton

from ...spec import LossMap, LossSpec
from .. import group, launch
from ..tiles import DIFFERENCES_UP_TO
from .memory import HEAD, OF_ROWS, OF_SPLIT_ROWS

MOST_PAIRS, AMD_MOST_PAIRS = 64 * 160, 64 * 144  # padded: what the registers of a program hold
MOST_R = 8  # whose products of forces the moments sum up at a time
MOMENTS_SHARE = 0.75  # of the shared memory, for all that _coefficients_fit counts
LEAST_SLICE, UNIT = 1024, 256  # dimensions, and what slices are multiples of, as every block divides
ROWS_OF_CLOSE = 16  # at a time, in groups with close pairs: more would leave less shared memory to all others
BYTES_OF_PRODUCT = 5.8  # of the moments kernel's shared memory, for each product of two targets


@dataclass(frozen=True)
class Plan:
    """For a map whose groups the group kernels hold."""

    blocks: tuple[int, ...]  # of each side, gen first
    D: int
    of_rows: int  # vectors over the rows that the state has for each R
    floats_kept: int  # of a group by phase 1 for phase 2: products, or nothing
    floats_of_state: int  # of a group by phase 2 for phase 3
    keeps_distances: bool  # in the state
    share: int  # dimensions of a program in phase 1

    @property
    def slices(self) -> int:
        return triton.cdiv(self.D, self.share)


def plan_of(spec: LossSpec, of_map: LossMap) -> Plan | None:
    """None: the groups are streamed."""
    gen, counts = of_map.gen, tuple(map(int, of_map.counts))  # under torch.compile they may be symbols
    of_rows = OF_SPLIT_ROWS if spec.sides == "split" else OF_ROWS
    of_member = len(spec.R_list), of_rows, spec.include_self
    return _plan(*of_member, counts, int(gen.shape[3]), gen.element_size(), launch.limits(gen.device))


@functools.cache
def _plan(
    R: int, of_rows: int, own: bool, counts: tuple[int, ...], D: int, bytes_of_entry: int, limits: launch.Limits
) -> Plan | None:
    blocks = group.padded(*counts)
    pairs, most = blocks[0] * sum(blocks), AMD_MOST_PAIRS if limits.amd else MOST_PAIRS
    coupled = pairs if own else pairs - blocks[0] ** 2
    if coupled > most or not _coefficients_fit(R, blocks, limits):
        return None
    of_gen, of_all = (bytes_of_entry * D * count for count in (counts[0], sum(counts)))
    kept = HEAD.value + sum(blocks) + _products_of_targets(blocks)
    if D <= DIFFERENCES_UP_TO or 4 * kept > of_gen or pairs > most or not _products_fit(blocks, limits):
        kept = 0
    state = HEAD.value + 2 * sum(blocks) + R * (of_rows * blocks[0] + sum(blocks))
    keeps_distances = 40 * (state + pairs) <= of_all + of_gen  # a tenth of what is read and written
    # not by the number of groups, on which the bits of the result would depend
    share = triton.cdiv(D, D // LEAST_SLICE * UNIT) * UNIT if kept and D >= 2 * LEAST_SLICE else D
    return Plan(blocks, D, of_rows, kept, state + pairs * keeps_distances, keeps_distances, share)


def _coefficients_fit(R: int, blocks: tuple[int, ...], limits: launch.Limits) -> bool:
    """Whether the moments kernel, with the smallest blocks, has room for the coefficients of all R and for targets."""
    of_row = 4 * (R * sum(blocks) + max(blocks))
    return R <= MOST_R and (limits.amd or launch.LEAST_BLOCK * of_row <= MOMENTS_SHARE * limits.shared_bytes)


def _products_fit(blocks: tuple[int, ...], limits: launch.Limits) -> bool:
    """Whether the moments kernel has the room for products of all targets."""
    if limits.tensor_memory:  # of which it wants more than there is
        return False
    return limits.amd or BYTES_OF_PRODUCT * _products_of_targets(blocks) <= limits.shared_bytes


def _products_of_targets(blocks: tuple[int, ...]) -> int:
    return sum(block * sum(blocks[: n + 1]) for n, block in enumerate(blocks))


@functools.cache
def configuration(kernel: str, plan: Plan, limits: launch.Limits) -> launch.Configuration:
    """Of one of the group kernels."""
    pipelined = not limits.amd and limits.shared_bytes >= group.OPERANDS_IN_SHARED
    most = launch.padded_block(plan.D)
    block_d, block_sum = min(32, most), min(64, most)
    return {
        "scale": {"BLOCK_D": block_d, "num_warps": 4, "num_stages": 3 if pipelined else 1},
        "moments": {"ROWS": ROWS_OF_CLOSE, "BLOCK_D": block_d, "BLOCK_SUM": block_d, "num_warps": 4, "num_stages": 1}
        if plan.floats_kept
        else {"ROWS": plan.blocks[0], "BLOCK_D": block_d, "BLOCK_SUM": block_d}
        | {"num_warps": 4 if limits.amd else 8, "num_stages": 2 if pipelined else 1},
        "gradient": {"BLOCK_D": block_d, "BLOCK_SUM": block_sum, "num_warps": 4}
        | {"num_stages": 1 if not pipelined else 2 if plan.keeps_distances else 3},
    }[kernel]
