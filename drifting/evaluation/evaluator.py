"""How close generated samples are to real ones: images in the features of a network, small samples as they are."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.svm import SVC
from torch import Tensor
from tqdm import tqdm

from ..config.schema import EvaluationConfig
from ..data import Dataset, Split
from ..errors import UserError
from ..generation import Generator
from ..utils.images import to_uint8
from .archives import Labels, Samples, read_reference
from .drawing import draw_samples
from .features import INCEPTION, Features, ImageFeatures, concatenate, open_features
from .measures import Gaussian, Manifold, Points, fit_gaussian, frechet_distance, inception_score, nearest_distance

Quality = dict[str, float]

REFERENCE_SAMPLES = 50_000  # So many images are generated where the reference is a file, as is the field's custom.
FEATURE_SAMPLES = 5000  # So many are generated, and taken of the training images, where it is a data set.
MANIFOLD_IMAGES = 10_000  # Precision and recall take at most so many real images, as ADM does.
PER_FEATURE = 4  # With fewer samples for each feature, a Fréchet distance says little.
SPLIT_BATCH = 1000  # So many images of a data set are read at once.

FLAT_SAMPLES = 1300  # So many small samples are generated.
MOST_VALUES = 1024  # Without features, measures of larger samples mean little and cost much.
MOST_REAL = 2000  # Of a split, at most so many small samples are measured.
PIXEL_MAX = 16  # Small images are measured on the scale of the digits, 0 … 16.
ROUNDING = 1e-6  # Less than this share of a distance is taken for 0.
GAMMA = 0.064  # The support vector machine's γ on that scale is this over the number of values of an image.


class Evaluator(ABC):
    """Judges generated samples by real ones; build it once and call it often."""

    distance: str  # The name of the measure that says how good samples are by how low it is.
    num_samples: int  # It is meant to be given so many samples, since Fréchet distances depend on their number.
    fewest: int  # A Fréchet distance of fewer samples says little.
    shape: tuple[int, ...] | None  # That of a sample, (H, W, C) of an image; None where images of any shape are taken.
    dtype: str = "uint8"  # The samples' type: uint8 of images, else float32.
    of_data: Quality  # Measures of real samples, which are told beside those of generated ones.

    def __call__(self, samples: Samples, labels: Labels | None) -> Quality:
        """Measures of ``samples [N, *shape]`` that were generated for ``labels [N]``, and those of real samples.

        ``frechet_ratio`` is the Fréchet distance over that of training samples, where the latter is known. Without
        labels, measures that need them are left out.

        Raises:
            UserError: there are fewer than 2 samples, they have another shape or type, or they are not finite.
        """
        if len(samples) < 2 or samples.dtype != self.dtype or self.shape not in (None, samples.shape[1:]):
            expected = "[H, W, C]" if self.shape is None else f"{list(self.shape)}, as the real ones"
            raise UserError(
                f"received {len(samples)} samples {samples.dtype} {list(samples.shape[1:])}, "
                f"expected at least 2 {self.dtype} {expected}"
            )
        if self.dtype == "float32" and not np.isfinite(samples).all():
            raise UserError("received samples with NaN or infinity, expected finite ones")
        quality = self.measure(samples, labels)
        quality |= _ratio("frechet_ratio", quality[self.distance], self.of_data.get(f"{self.distance}_train"))
        return quality | self.of_data

    @abstractmethod
    def measure(self, samples: Samples, labels: Labels | None) -> Quality:
        """The measures of samples of the right shape and type."""


def open_evaluator(config: EvaluationConfig, dataset: Dataset | None) -> Evaluator | None:
    """The evaluator for the configured reference files and features; without files, for the data set.

    Without files and features small samples are measured as they are; it is None for latents, samples of more than
    ``MOST_VALUES`` values and data of which there is not enough to compare with.

    Raises:
        UserError: a file or network cannot be read, or does not go with the data.
    """
    if config.reference:
        return _evaluator_of_files([Path(path) for path in config.reference], config.features or INCEPTION)
    if dataset is None:
        raise ValueError("received neither reference files nor a data set, expected one of them")
    if config.features is None:
        enough = min(len(dataset.train), len(dataset.test)) > 1
        small = not dataset.latent and prod(dataset.sample_shape) <= MOST_VALUES
        return FlatEvaluator(dataset) if small and enough else None
    if dataset.pixel_range is None:
        raise UserError(f"evaluation.features is {config.features}, but samples of {dataset.name} are no images")
    if dataset.latent:
        raise UserError("latents have no images to compare with: evaluation.reference must name a file of them")
    features = open_features(config.features)
    if features.classifier is not None and features.classifier.config["num_classes"] != dataset.num_classes:
        raise UserError(f"evaluation.features is {config.features}, trained on other data")
    return _evaluator_of_data(dataset, features)


def evaluate_model(
    evaluator: Evaluator, generator: Generator, numbers: Tensor, cfg_scale: float, seed: int = 0
) -> tuple[Quality, Samples]:
    """Measures of samples generated for the classes ``numbers [N]``, with ``cfg_scale`` among them, and the samples.

    50,000 images of ImageNet are 10 GB: let go of them before the next call.
    """
    samples = draw_samples(generator, numbers, cfg_scale, seed)
    return {"cfg_scale": cfg_scale} | evaluator(samples, numbers.numpy()), samples


def check_evaluation(evaluator: Evaluator, generator: Generator) -> None:
    """Raise :class:`UserError` if samples of ``generator`` cannot be evaluated, before much time is spent on them."""
    evaluate_model(evaluator, generator, torch.arange(2) % len(generator.class_names), 1.0)


def warn_of_few(evaluator: Evaluator, num: int) -> None:
    """Say on stderr if ``num`` samples are so few that their number matters."""
    if num < evaluator.fewest:
        print(
            f"warning: {num} samples are few, {evaluator.distance} is too high with fewer than {evaluator.fewest}: "
            "compare equal numbers only",
            file=sys.stderr,
        )


def best_quality(qualities: Sequence[Quality], distance: str) -> Quality:
    """The measures with the lowest ``distance``."""
    return min(qualities, key=lambda quality: quality[distance])


@dataclass
class FeatureEvaluator(Evaluator):
    """An :class:`Evaluator` of images in the features of a network.

    The Fréchet distance is ``fid`` in Inception's features, ``fd_dinov2`` in DINOv2's and else ``frechet_distance``.
    ``precision`` and ``recall`` are the improved ones of Kynkäänniemi et al.; Inception gives its score too, and
    ``sfid``, the distance in its spatial features; a classifier of the data gives ``recognised_share``, the share that
    it takes for their label.

    Args:
        features: the network.
        statistics: the Gaussian of real images' features.
        spatial: the Gaussian of their spatial features; without it there is no ``sfid``.
        points: features ``[M, D]`` of some of the real images; without them there is no precision and recall.
    """

    features: ImageFeatures
    statistics: Gaussian
    spatial: Gaussian | None = None
    points: Tensor | None = None
    shape: tuple[int, ...] | None = None
    num_samples: int = REFERENCE_SAMPLES
    of_data: Quality = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.distance, self.fewest = self.features.distance, PER_FEATURE * len(self.statistics.mean)
        self.points = None if self.points is None else self.points[_spread(len(self.points), MANIFOLD_IMAGES)]
        self.real = None if self.points is None else Manifold(self.points)

    def measure(self, samples: Samples, labels: Labels | None) -> Quality:
        points, logits, spatial = self.features(samples)
        quality = {self.distance: frechet_distance(fit_gaussian(points), self.statistics)}
        if self.spatial is not None and spatial is not None:
            quality["sfid"] = frechet_distance(fit_gaussian(spatial), self.spatial)
        if self.features.classifier is not None:
            quality |= _recognised(logits, labels)
        elif logits is not None:
            quality["inception_score"], quality["inception_score_std"] = inception_score(logits.cpu())
        if self.points is not None and self.real is not None:
            quality["precision"] = self.real.share_inside(points)
            quality["recall"] = Manifold(points).share_inside(self.points)
        return quality


def _evaluator_of_data(dataset: Dataset, features: ImageFeatures) -> FeatureEvaluator:
    """Compares with the test images; the distance of as many training images as are generated is the floor."""
    train = _split_features(features, dataset, dataset.train, FEATURE_SAMPLES)
    test = _split_features(features, dataset, dataset.test, len(dataset.test))
    statistics, spatial = _fit_both(test)
    of_data = {f"{features.distance}_train": frechet_distance(fit_gaussian(train.points), statistics)}
    if features.classifier is not None:
        share = _recognised(test.logits, dataset.test.labels.numpy())
        of_data["recognised_share_test"] = share["recognised_share"]
    return FeatureEvaluator(features, statistics, spatial, test.points, _shape(dataset), FEATURE_SAMPLES, of_data)


def _evaluator_of_files(paths: Sequence[Path], source: str) -> FeatureEvaluator:
    """Compares with the first of ``paths`` that has statistics, or else images; precision and recall need images."""
    references = [read_reference(path) for path in paths]
    statistics, spatial = next(
        ((r.statistics, r.spatial_statistics) for r in references if r.statistics is not None), (None, None)
    )
    images = next((r.images for r in references if r.images is not None), None)
    features = open_features(source)
    if statistics is not None and len(statistics.mean) != features.dim:
        dim = len(statistics.mean)
        raise UserError(f"the reference's statistics are of {dim} features, {features.name} has {features.dim}")
    if images is None:
        assert statistics is not None  # Each file has statistics or images.
        return FeatureEvaluator(features, statistics, spatial)
    real = features(images if statistics is None else images[_spread(len(images), MANIFOLD_IMAGES)])
    if statistics is None:
        statistics, spatial = _fit_both(real)
    return FeatureEvaluator(features, statistics, spatial, real.points, images.shape[1:])


def _fit_both(features: Features) -> tuple[Gaussian, Gaussian | None]:
    """The Gaussians of features and of spatial ones, where there are any."""
    return fit_gaussian(features.points), None if features.spatial is None else fit_gaussian(features.spatial)


def _split_features(features: ImageFeatures, dataset: Dataset, split: Split, most: int) -> Features:
    """The features of a split's images, of evenly spaced ones where there are more than ``most``."""
    assert dataset.pixel_range is not None  # The samples are images.
    parts = torch.tensor(_spread(len(split), most)).split(SPLIT_BATCH)
    bar = tqdm(parts, desc="real images", unit="part", delay=1, leave=False, disable=None)
    return concatenate([features(to_uint8(split.samples(part.tolist()), dataset.pixel_range)) for part in bar])


def _recognised(logits: Tensor | None, labels: Labels | None) -> Quality:
    if logits is None or labels is None:
        return {}
    return {"recognised_share": float((logits.argmax(1).cpu().numpy() == labels).mean())}


class FlatEvaluator(Evaluator):
    """An :class:`Evaluator` of small samples as points: images in pixels on a scale of 0 … 16, others on their own.

    ``frechet_distance`` is the distance to the test samples and ``frechet_distance_train`` that of the training samples
    to these, the floor. ``nearest_distance`` is the mean distance to the nearest training sample and ``nearest_ratio``
    is this over the same of the test samples: near 0, the generator has memorised. Where there are several classes,
    ``recognised_share`` is the share of samples that a support vector machine fitted on the training samples takes for
    their label. Of a split with more than ``MOST_REAL`` samples, evenly spaced ones are taken.
    """

    distance, num_samples = "frechet_distance", FLAT_SAMPLES

    def __init__(self, dataset: Dataset) -> None:
        self.shape, self.pixel_range = _shape(dataset), dataset.pixel_range
        self.dtype = "float32" if self.pixel_range is None else "uint8"
        self.train, train_labels = self._real_points(dataset.train)
        self.test, test_labels = self._real_points(dataset.test)
        values = self.train.shape[1]
        self.fewest, self.statistics = PER_FEATURE * values, fit_gaussian(self.test)
        self.of_data = {
            "frechet_distance_train": frechet_distance(fit_gaussian(self.train), self.statistics),
            "nearest_distance_test": nearest_distance(self.test, self.train),
        }
        self.classifier = None
        if len(np.unique(train_labels)) > 1:
            gamma = "scale" if self.pixel_range is None else GAMMA / values
            self.classifier = SVC(gamma=gamma, C=10).fit(self.train, train_labels)
            self.of_data["recognised_share_test"] = float(self.classifier.score(self.test, test_labels))

    def measure(self, samples: Samples, labels: Labels | None) -> Quality:
        scale = 1 if self.pixel_range is None else PIXEL_MAX / 255
        points = samples.reshape(len(samples), -1).astype(np.float64) * scale
        nearest = nearest_distance(points, self.train)
        quality = {
            "frechet_distance": frechet_distance(fit_gaussian(points), self.statistics),
            "nearest_distance": nearest,
        } | _ratio("nearest_ratio", nearest, self.of_data["nearest_distance_test"])
        if self.classifier is not None and labels is not None:
            quality["recognised_share"] = float((self.classifier.predict(points) == labels).mean())
        return quality

    def _real_points(self, split: Split) -> tuple[Points, NDArray[np.int64]]:
        """Points ``[N, D]`` and labels ``[N]``; the values of an image are in the order ``[H, W, C]``."""
        indices = _spread(len(split), MOST_REAL)
        samples = split.samples(indices).double()
        if not samples.isfinite().all():
            raise UserError("the data set has samples with NaN or infinity, expected finite ones")
        if self.pixel_range is not None:
            low, high = self.pixel_range
            samples = (samples.movedim(1, -1) - low) * (PIXEL_MAX / (high - low))
        return samples.reshape(len(indices), -1).numpy(), split.labels[indices].numpy()


def _shape(dataset: Dataset) -> tuple[int, ...]:
    """The shape of a sample as it is measured: ``(H, W, C)`` of an image."""
    if dataset.pixel_range is None:
        return dataset.sample_shape
    channels, *size = dataset.sample_shape
    return (*size, channels)


def _ratio(name: str, value: float, floor: float | None) -> Quality:
    """The measure ``name``, ``value`` over ``floor``; nothing where the latter is not known or is only rounding."""
    return {name: value / floor} if floor is not None and floor > ROUNDING * abs(value) else {}


def _spread(count: int, most: int) -> list[int]:
    """The indices below ``count``, evenly spaced ones where there are more than ``most``."""
    return list(range(0, count, max(1, -(-count // most))))
