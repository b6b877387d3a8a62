"""Distributions in the plane, and the distance between two sets of points."""

from collections.abc import Callable

import torch
from torch import Tensor

Distribution = Callable[[int, torch.Generator], Tensor]  # (count, source of randomness) -> points [count, 2]


def bimodal(count: int, generator: torch.Generator) -> Tensor:
    """Draw from two Gaussians of standard deviation 0.5 at (±2, 0), which are equally likely. ``[count, 2]``."""
    side = 2.0 * torch.randint(2, (count, 1), generator=generator) - 1
    centers = torch.cat([2 * side, torch.zeros_like(side)], 1)
    return centers + 0.5 * torch.randn(count, 2, generator=generator)


def checkerboard(count: int, generator: torch.Generator) -> Tensor:
    """Draw uniformly from the eight dark squares of a 4 × 4 board on [-3, 3]². ``[count, 2]``."""
    column = torch.randint(4, (count,), generator=generator)
    row = 2 * torch.randint(2, (count,), generator=generator) + column % 2
    corner = torch.stack([column, row], 1)
    return 1.5 * (corner + torch.rand(count, 2, generator=generator)) - 3


def swiss_roll(count: int, generator: torch.Generator) -> Tensor:
    """Draw from a spiral of one and a half turns, with a little noise and a radius of up to 3.2. ``[count, 2]``."""
    angle = 1.5 * torch.pi * (1 + 2 * torch.rand(count, generator=generator))
    spiral = torch.stack([angle * angle.cos(), angle * angle.sin()], 1) / 4.5
    return spiral + 0.06 * torch.randn(count, 2, generator=generator)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Return ``2 E‖x−y‖ − E‖x−x'‖ − E‖y−y'‖`` for ``x [N, D]`` and ``y [M, D]``: 0 for the same distribution."""
    return (2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()).item()
