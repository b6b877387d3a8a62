"""The Gaussian drifting field by its pieces: the small functions that :func:`drift_ops.compute_V` fuses.

They show what happens to a matrix of pairs; training goes through :mod:`drift_ops`, which never forms one.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from drift_ops import compute_V, compute_V_multiscale
from drift_ops.reference import affinity, distances, unit_features

__all__ = ["compute_V", "compute_V_multiscale", "compute_kernel", "drifting_loss", "softmax_normalize_2d"]


def compute_kernel(x: Tensor, y: Tensor, sigma: float = 1.0, normalize: bool = True) -> Tensor:
    """Gaussian kernel ``exp(−‖x_i − y_j‖² / (2σ²))`` of ``x [..., N, D]`` and ``y [..., M, D]``, ``[..., N, M]``.

    With ``normalize``, of the points scaled to norm √D.
    """
    if normalize:
        x, y = unit_features(x), unit_features(y)
    return torch.exp(-distances(x, y).square() / (2 * sigma**2))


def softmax_normalize_2d(matrix: Tensor, temperature: float = 1.0) -> Tensor:
    """Geometric mean of the row and the column softmax of ``matrix / temperature [..., N, M]``, scaled to sum to 1."""
    A = affinity(matrix / temperature)
    return A / A.sum((-2, -1), keepdim=True)


def drifting_loss(x_gen: Tensor, V: Tensor, target: Tensor | None = None) -> Tensor:
    """``mean((x − stopgrad(x + V))²)``: descending it moves ``x_gen`` along the field ``V`` (both ``[..., N, D]``).

    ``target`` replaces ``x_gen + V`` where it is at hand already.
    """
    target = x_gen + V if target is None else target
    return F.mse_loss(x_gen, target.detach())
