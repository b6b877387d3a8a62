"""Classifier-free guidance at training time: which scale a label gets, and what weight that gives its negatives."""

import math

import torch
from torch import Tensor


def sample_cfg_scale(
    num: int,
    scale_range: tuple[float, float],
    exponent: float,
    unguided_share: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Guidance scales α ``[num]``: p(α) ∝ α^-exponent on ``scale_range``, or 1 (``train.py`` of the release).

    Args:
        num: how many.
        scale_range: least and greatest α, ``1 <= least <= greatest``.
        exponent: of the power law; 0 is uniform, larger favours small α.
        unguided_share: probability in [0, 1] of α = 1 instead.
        generator: CPU generator.
    """
    low, high = scale_range
    u, v = torch.rand(2, num, generator=generator, dtype=torch.float64)
    power = 1 - exponent
    if abs(power) < 1e-6:  # the law is 1/α, its inverse distribution function exponential
        alpha = low * torch.exp(u * math.log(high / low))
    else:
        alpha = (low**power + u * (high**power - low**power)) ** (1 / power)
    return torch.where(v < unguided_share, 1.0, alpha).float()


def uncond_weight(cfg_scale: Tensor, num_gen: int, num_uncond: int) -> Tensor:
    """Weight of each unconditional negative, w = (α - 1)(G - 1)/N_unc, of the shape of ``cfg_scale``.

    With it the unconditional negatives together weigh α - 1 times the G - 1 generated negatives of a sample.
    """
    return (cfg_scale - 1) * (num_gen - 1) / num_uncond
