"""Measures of generated images in the features of some network, each as the field defines it."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import pairwise_distances_argmin_min
from torch import Tensor

Points = NDArray[np.float64]  # [N, D]

NEIGHBOURS = 3  # of precision and recall
SCORE_SPLITS = 10  # of the Inception score
SCORE_SEED = 2020  # of the order that is split, as in torch-fidelity and the official release
BLOCK = 1000  # rows of a matrix of distances that are held at once


@dataclass(frozen=True)
class Gaussian:
    """Mean ``[D]`` and covariance ``[D, D]``, float64."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]


def fit_gaussian(points: Points) -> Gaussian:
    """Sample mean and covariance of ``points [N, D]``, N at least 2."""
    return Gaussian(points.mean(0), np.atleast_2d(np.cov(points, rowvar=False)))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance (Heusel et al., arXiv 1706.08500, eq. 6); singular covariances are fine.

    ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a^½ Σ_b Σ_a^½)^½). This product is symmetric, unlike Σ_a Σ_b.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root_a = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root_a @ b.covariance @ root_a).clip(0)).sum()
    mean = np.square(a.mean - b.mean).sum()
    return float(mean + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def nearest_distance(a: Points, b: Points) -> float:
    """Mean Euclidean distance of each point of ``a [N, D]`` to its nearest in ``b [M, D]``."""
    return float(pairwise_distances_argmin_min(a, b)[1].mean())


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Mean and standard deviation over ten splits of exp E KL(p(y|x) ‖ p(y)) (Salimans et al., arXiv 1606.03498).

    Images usually come class by class: ``logits [N, K]`` are shuffled before they are split.
    """
    order = np.random.RandomState(SCORE_SEED).permutation(len(logits))
    parts = np.array_split(order, min(SCORE_SPLITS, len(logits)))
    log_p = logits.double().log_softmax(1)
    scores = [_score(log_p[torch.from_numpy(part)]) for part in parts]
    return float(np.mean(scores)), float(np.std(scores))


def _score(log_p: Tensor) -> float:
    log_marginal = log_p.logsumexp(0) - np.log(len(log_p))  # [K]
    return float((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())


class Manifold:
    """The space around ``points [N, D]``, N at least 2: balls that reach to their third-nearest neighbour.

    With real images' features inside those of generated ones and the reverse it gives improved precision and recall
    (Kynkäänniemi et al., arXiv 1904.06991).
    """

    def __init__(self, points: Tensor) -> None:
        self.points = points.float()
        self.centre = self.points.mean(0)  # distances far from the origin lose digits
        self.points = self.points - self.centre
        rank = min(NEIGHBOURS + 1, len(points))  # a point is its own nearest
        rows = [torch.cdist(block, self.points).kthvalue(rank, dim=1).values for block in self.points.split(BLOCK)]
        self.radii = torch.cat(rows)

    def share_inside(self, points: Tensor) -> float:
        """Share of ``points [M, D]`` that lie inside."""
        blocks = (points.float() - self.centre).split(BLOCK)
        inside = [(torch.cdist(block, self.points) <= self.radii).any(1) for block in blocks]
        return float(torch.cat(inside).double().mean())
