"""How close generated images are to a data set, in pixels on its 0 … 16 scale."""

from math import prod

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import pairwise_distances_argmin_min
from sklearn.svm import SVC

from .data import Dataset, Split
from .images import Pixels

Points = NDArray[np.float64]  # [N, D]

PIXEL_MAX = 16
GAMMA = 0.064  # of the support vector machine, over the number of values of an image
MOST_VALUES = 1024  # of an image: with more, measures in pixels mean little and cost much
MOST_IMAGES = 2000  # of a split that are measured


def pixel_evaluator(dataset: Dataset) -> "Evaluator | None":
    """The evaluator of a data set of small images, and None for large ones and latents."""
    return None if dataset.latent or prod(dataset.sample_shape) > MOST_VALUES else Evaluator(dataset)


class Evaluator:
    """Judges generated images by the training and test images of ``dataset``; build once, call often.

    Of a split with more than ``MOST_IMAGES`` images, evenly spaced ones are taken.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.train, train_labels = _data_points(dataset.train, dataset.pixel_range)
        self.test, test_labels = _data_points(dataset.test, dataset.pixel_range)
        self.classifier = SVC(gamma=GAMMA / self.train.shape[1], C=10).fit(self.train, train_labels)
        self.of_data = {
            "frechet_distance_train": frechet_distance(self.train, self.test),
            "recognised_share_test": float(self.classifier.score(self.test, test_labels)),
            "nearest_distance_test": nearest_distance(self.test, self.train),
        }

    def __call__(self, images: Pixels, labels: NDArray[np.int64]) -> dict[str, float]:
        """Measures of uint8 ``images [N, H, W, C]`` generated for ``labels [N]``, and what real images would score.

        ``frechet_distance`` is to the test images (``frechet_distance_train``: of the training images, the floor) and
        ``frechet_ratio`` their quotient; ``recognised_share`` is the share that a support vector machine fitted on the
        training images takes for their label; ``nearest_distance`` is the mean distance to the nearest training image
        and ``nearest_ratio`` that over the test images' own: near 0, the generator has memorised.

        Raises:
            ValueError: fewer than 2 images, or images of another size.
        """
        points = images.reshape(len(images), -1).astype(np.float64) * (PIXEL_MAX / 255)
        if len(points) < 2 or points.shape[1] != self.test.shape[1]:
            raise ValueError(
                f"received {len(points)} images of {points.shape[1]} values, "
                f"expected at least 2 of {self.test.shape[1]}, as in the data set"
            )
        frechet, nearest = frechet_distance(points, self.test), nearest_distance(points, self.train)
        return {
            "frechet_distance": frechet,
            "frechet_ratio": frechet / self.of_data["frechet_distance_train"],
            "recognised_share": float((self.classifier.predict(points) == labels).mean()),
            "nearest_distance": nearest,
            "nearest_ratio": nearest / self.of_data["nearest_distance_test"],
        } | self.of_data


def frechet_distance(a: Points, b: Points) -> float:
    """Squared Fréchet distance of the Gaussians fitted to ``a [N, D]`` and ``b [M, D]``.

    ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a^½ Σ_b Σ_a^½)^½), with sample covariances; singular ones are fine.
    """
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cov_a, cov_b = np.atleast_2d(cov_a), np.atleast_2d(cov_b)
    values, vectors = np.linalg.eigh(cov_a)
    root_a = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)).sum()
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    return float(mean + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def nearest_distance(a: Points, b: Points) -> float:
    """Mean Euclidean distance of each point of ``a [N, D]`` to its nearest in ``b [M, D]``."""
    return float(pairwise_distances_argmin_min(a, b)[1].mean())


def _data_points(split: Split, pixel_range: tuple[float, float]) -> tuple[Points, NDArray[np.int64]]:
    indices = range(0, len(split), -(-len(split) // MOST_IMAGES))
    low, high = pixel_range
    images = split.samples(indices).double().flatten(1)
    return ((images - low) * (PIXEL_MAX / (high - low))).numpy(), split.labels[list(indices)].numpy()
