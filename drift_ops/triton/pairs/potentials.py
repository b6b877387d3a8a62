"""Potentials α of ``exp(L − α_i − β_j)``, as the statistics that :mod:`..affinity.softmax` makes affinities of.

``2^(−α·log2(e)) = 2^(−m/2)·f`` with a whole number m, so that the exponent of a pair is rounded once. A potential of ∞,
which leaves its pairs out, has m = ∞ and f = 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..affinity.logit import LOG2E
from ..affinity.softmax import entries_of_program


@triton.jit
def statistics_of_potentials_kernel(
    potentials,  # [problems, size]
    stats,  # [problems, 2, size]
    size,
    BLOCK: tl.constexpr,
):
    problem, n = entries_of_program(size, BLOCK)
    twice = tl.load(potentials + problem * size + n, mask=n < size, other=0.0) * (2 * LOG2E)
    whole = tl.floor(twice + 0.5)
    factor = tl.where(tl.abs(twice) == float("inf"), 1.0, tl.exp2((whole - twice) * 0.5))
    tl.store(stats + problem * 2 * size + n, whole, mask=n < size)
    tl.store(stats + (problem * 2 + 1) * size + n, factor, mask=n < size)


def as_statistics(potentials: Tensor) -> Tensor:
    """``[S, G, 2, size]`` of ``[S, G, size]``."""
    S, G, size = potentials.shape
    stats = torch.empty(S, G, 2, size, dtype=potentials.dtype, device=potentials.device)
    block = min(1024, launch.padded_block(size))
    grid = (triton.cdiv(size, block) * S * G,)
    statistics_of_potentials_kernel[grid](potentials.contiguous(), stats, size, BLOCK=block, num_warps=4)
    return stats
