"""How close generated images are to a data set: in pixels, or in the features of a classifier of such images."""

from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import pairwise_distances_argmin_min
from sklearn.svm import SVC
from torch import Tensor

from .cli import UserError
from .config import Config
from .data import Dataset, Split
from .images import Pixels
from .models import Classifier
from .run_directory import read_classifier

Points = NDArray[np.float64]  # [N, D]

FEATURE_SAMPLES = 5000  # images that are generated, and of a split that are measured, with a classifier's features
FEATURE_BATCH = 500

PIXEL_SAMPLES = 1300  # images that are generated to be measured in pixels
PIXEL_MAX = 16  # pixels are measured on the scale of the digits, 0 … 16
GAMMA = 0.064  # of the support vector machine, over the number of values of an image
MOST_VALUES = 1024  # of an image: with more, measures in pixels mean little and cost much
MOST_IMAGES = 2000  # of a split that are measured


class Evaluator(Protocol):
    """Judges generated images by the training and test images of a data set; build once, call often.

    Called with uint8 ``images [N, H, W, C]`` generated for ``labels [N]``, it returns measures, and what real images
    would score; it raises ValueError for fewer than 2 images or those of another size. It is meant to be given
    ``num_samples`` of them, as Fréchet distances depend on their number.
    """

    num_samples: int

    def __call__(self, images: Pixels, labels: NDArray[np.int64]) -> dict[str, float]: ...


def open_evaluator(config: Config, dataset: Dataset) -> Evaluator | None:
    """That of the configured classifier; without one, pixels for small images, and None for large ones and latents."""
    if config.evaluation.classifier is not None:
        classifier = read_classifier(Path(config.evaluation.classifier))
        if dataset.latent or classifier.config["num_classes"] != dataset.num_classes:
            raise UserError(f"evaluation.classifier is {config.evaluation.classifier}, trained on other data")
        return FeatureEvaluator(dataset, classifier)
    return None if dataset.latent or prod(dataset.sample_shape) > MOST_VALUES else PixelEvaluator(dataset)


class FeatureEvaluator:
    """An :class:`Evaluator` in the features of ``classifier``, which knows images of this kind.

    ``frechet_distance`` is to the test images (``frechet_distance_train``: of as many training images, the floor) and
    ``frechet_ratio`` their quotient; ``recognised_share`` is the share that the classifier takes for their label.
    """

    num_samples = FEATURE_SAMPLES

    def __init__(self, dataset: Dataset, classifier: Classifier) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.classifier, self.dataset = classifier.to(self.device).eval(), dataset
        self.train, _ = self._measure(*_spread_samples(dataset.train, FEATURE_SAMPLES))
        self.test, recognised = self._measure(*_spread_samples(dataset.test, len(dataset.test)))
        self.of_data = {
            "frechet_distance_train": frechet_distance(self.train, self.test),
            "recognised_share_test": recognised,
        }

    def __call__(self, images: Pixels, labels: NDArray[np.int64]) -> dict[str, float]:
        C, H, W = self.dataset.sample_shape
        if len(images) < 2 or images.shape[1:] != (H, W, C):
            raise ValueError(
                f"received {len(images)} images {list(images.shape[1:])}, expected at least 2 {[H, W, C]}, "
                "as in the data set"
            )
        low, high = self.dataset.pixel_range
        samples = torch.from_numpy(images).permute(0, 3, 1, 2) * ((high - low) / 255) + low
        points, recognised = self._measure(samples, torch.from_numpy(labels))
        frechet = frechet_distance(points, self.test)
        return {
            "frechet_distance": frechet,
            "frechet_ratio": frechet / self.of_data["frechet_distance_train"],
            "recognised_share": recognised,
        } | self.of_data

    @torch.no_grad()
    def _measure(self, samples: Tensor, labels: Tensor) -> tuple[Points, float]:
        """Features of samples ``[N, C, H, W]``, and the share recognised as ``labels [N]``."""
        features = torch.cat([self.classifier.features(x.to(self.device)) for x in samples.split(FEATURE_BATCH)])
        predicted = self.classifier.fc(features).argmax(1).cpu()
        return features.double().cpu().numpy(), float((predicted == labels).double().mean())


class PixelEvaluator:
    """An :class:`Evaluator` of small images in pixels on the digits' 0 … 16 scale.

    Of a split with more than ``MOST_IMAGES`` images, evenly spaced ones are taken.
    """

    num_samples = PIXEL_SAMPLES

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
    samples, labels = _spread_samples(split, MOST_IMAGES)
    low, high = pixel_range
    return ((samples.double().flatten(1) - low) * (PIXEL_MAX / (high - low))).numpy(), labels.numpy()


def _spread_samples(split: Split, most: int) -> tuple[Tensor, Tensor]:
    """Samples and labels of a split, evenly spaced ones where it has more than ``most``."""
    indices = list(range(0, len(split), -(-len(split) // most)))
    return split.samples(indices), split.labels[indices]
