"""The pieces that :func:`drift_ops.compute_V` fuses, which form the matrix of pairs that training never forms."""

from torch import Tensor

from drift_ops import compute_V, compute_V_multiscale
from drift_ops.reference import affinity, distances, unit_features

__all__ = ["compute_V", "compute_V_multiscale", "compute_kernel", "drifting_loss", "softmax_normalize_2d"]


def compute_kernel(x: Tensor, y: Tensor, sigma: float = 1.0, normalize: bool = True) -> Tensor:
    """Gaussian kernel ``[..., N, M]`` of points ``[..., N, D]`` and ``[..., M, D]``, at norm √D if ``normalize``."""
    if normalize:
        x, y = unit_features(x), unit_features(y)
    return (-distances(x, y).square() / (2 * sigma**2)).exp()


def softmax_normalize_2d(matrix: Tensor, temperature: float = 1.0) -> Tensor:
    """Geometric mean of the row and the column softmax of ``matrix / temperature [..., N, M]``, scaled to sum to 1."""
    A = affinity(matrix / temperature)
    return A / A.sum((-2, -1), keepdim=True)


def drifting_loss(x_gen: Tensor, V: Tensor, target: Tensor | None = None) -> Tensor:
    """``mean((x − stopgrad(target))²)``, where None stands for ``x + V``: its descent moves ``x_gen`` along ``V``."""
    return (x_gen - (x_gen + V if target is None else target).detach()).square().mean()
