"""Measures of generated samples as points ``[N, D]``, each as the field defines it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import pairwise_distances_argmin_min
from torch import Tensor

from ..errors import UserError
from ..utils.progress import progress

Points = NDArray[np.float64]  # [N, D]

NEIGHBOURS = 3  # A ball of precision and recall reaches as far as a point's third-nearest neighbour.
BLOCK = 1000  # So many rows of a matrix are held in float64, or of distances, at once.


@dataclass(frozen=True)
class Gaussian:
    """Mean ``[D]`` and covariance ``[D, D]``, float64."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @cached_property
    def root(self) -> Tensor:
        """Σ^½ ``[D, D]``, float64, which is computed once however much is compared with it."""
        values, vectors = torch.linalg.eigh(torch.from_numpy(self.covariance))  # numpy takes four times as long.
        return vectors * values.clamp(min=0).sqrt() @ vectors.T


def fit_gaussian(points: Tensor | Points) -> Gaussian:
    """Sample mean and covariance of ``points [N, D]``, computed in float64; UserError for fewer than 2, NaN and
    infinity."""
    if len(points) < 2:
        raise UserError(f"received {len(points)} samples, expected at least 2 to compare")
    blocks, zero = torch.as_tensor(points).split(BLOCK), torch.zeros((), dtype=torch.float64)
    mean = sum((block.double().sum(0) / len(points) for block in blocks), zero)
    centred = (block.double() - mean for block in blocks)
    covariance = sum((block.T @ block / (len(points) - 1) for block in centred), zero)
    if not covariance.isfinite().all():
        raise UserError("received samples with NaN or infinity among their features, expected finite ones")
    return Gaussian(mean.cpu().numpy(), covariance.cpu().numpy())


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_b^½ Σ_a Σ_b^½)^½) (arXiv 1706.08500, eq. 6).

    It is at least 0, which rounding alone would not see to.
    """
    if len(a.mean) != len(b.mean):
        raise UserError(f"received {len(a.mean)} features, but the reference's statistics are of {len(b.mean)}")
    product = b.root @ torch.from_numpy(a.covariance) @ b.root  # It is symmetric, unlike Σ_a Σ_b.
    cross = float(torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum())
    distance = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(0.0, float(distance))


def nearest_distance(a: Points, b: Points) -> float:
    """Mean Euclidean distance of each point of ``a [N, D]`` to its nearest in ``b [M, D]``."""
    centre = b.mean(0)  # Far from the origin, distances would lose digits.
    return float(pairwise_distances_argmin_min(a - centre, b - centre)[1].mean())


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of exp E KL(p(y|x) ‖ p(y)) over ten parts (Salimans et al., arXiv 1606.03498)."""
    # The order is that of torch-fidelity and the release: images usually come class by class.
    order, scores = torch.from_numpy(np.random.RandomState(2020).permutation(len(logits))), []
    for part in order.tensor_split(min(10, len(logits))):
        log_p = logits[part].double().log_softmax(1)
        log_marginal = log_p.logsumexp(0) - np.log(len(log_p))  # [K]
        scores.append(float((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


class Manifold:
    """Balls around ``points [N, D]``, N > 3, as far as each one's third-nearest neighbour (arXiv 1904.06991)."""

    def __init__(self, points: Tensor) -> None:
        self.points = points.float()
        rank = 1 + NEIGHBOURS  # A point is its own nearest.
        self.radii = torch.cat([block.kthvalue(rank, dim=1).values for block in self._distances(self.points)])

    def precision_and_recall(self, points: Tensor) -> tuple[float, float]:
        """The share of ``points [M, D]``, M > 3, in this manifold, and the share of its own points in theirs."""
        return self.share_inside(points), Manifold(points).share_inside(self.points)

    def share_inside(self, points: Tensor) -> float:
        inside = [(block <= self.radii).any(1) for block in self._distances(points.float())]
        return float(torch.cat(inside).double().mean())

    def _distances(self, points: Tensor) -> Iterator[Tensor]:
        """Distances of blocks of ``points`` to the centres of the balls. Far from the origin they would lose digits."""
        centre = self.points.mean(0)
        centres = self.points - centre
        for block in progress(points.split(BLOCK), "neighbours", "block"):
            yield torch.cdist(block - centre, centres)
