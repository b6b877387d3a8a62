"""How close generated samples are to real ones: images in the features of a network, small samples as they are."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor

from ..config.schema import EvaluationConfig
from ..data import Dataset, Split
from ..errors import UserError
from ..generation import Generator, label_numbers
from ..utils.progress import progress
from .archives import Labels, Samples, read_reference
from .drawing import draw_samples
from .features import FRECHET_DISTANCE, INCEPTION, Features, ImageFeatures, concatenate, open_features
from .measures import Gaussian, Manifold, Points, fit_gaussian, frechet_distance, inception_score, nearest_distance

Quality = dict[str, float]
FEATURE_SAMPLES = 5000  # So many are generated, and taken of the training images, where it is a data set.
MANIFOLD_SAMPLES = 10_000  # Precision and recall take at most so many real samples, as ADM does.
MOST_REAL = 2000  # Of a split, at most so many small samples are measured.
MOST_VALUES = 2048  # Samples of more say little in a Fréchet distance; Inception has as many features.
ROUNDING = 1e-6  # Less than this share of a distance is taken for 0.


@dataclass
class Evaluator:
    """Judges generated samples by real ones; build it once and call it often.

    It leaves out the measures that its features or the real samples do not have. ``recognised_share`` is the share of
    samples that a classifier of the data takes for their label. ``frechet_ratio`` is relative to the Fréchet distance
    of training samples, and ``nearest_ratio`` to the nearest distance of test samples: near 0, the generator memorised.
    A generator that has collapsed to a part of the data has a low ``recall``, whatever its ``precision``.
    """

    features: "ImageFeatures | Values"
    statistics: Gaussian  # They describe the points of real samples …
    spatial: Gaussian | None = None  # … and these their spatial features.
    real: Manifold | None = None  # Precision and recall need the points of real samples …
    train: Points | None = None  # … and the nearest distance those of training samples.
    shape: tuple[int, ...] | None = None  # That of a sample, (H, W, C) of an image; None takes images of any shape.
    dtype: str = "uint8"  # Images are uint8, other samples float32.
    num_samples: int = 50_000  # This many are judged, by the field's custom: Fréchet distances depend on their number.
    labels: tuple[int, ...] | None = None  # What files of samples call the classes of the data.
    of_data: Quality = field(default_factory=dict)  # Measures of real samples are told beside those of generated ones.

    def __post_init__(self) -> None:
        self.distance = self.features.distance  # The name of the Fréchet distance, which is low for good samples.
        self.fewest = 4 * len(self.statistics.mean)  # With fewer samples, this distance says little.

    def class_numbers(self, labels: Labels | None) -> Labels | None:
        """The class numbers of labels ``[N]`` as a file has them; -1 for those that the data do not have."""
        if labels is None or self.labels is None:
            return labels
        place = {label: number for number, label in enumerate(self.labels)}
        return np.array([place.get(label, -1) for label in labels.tolist()])

    def __call__(self, samples: Samples, labels: Labels | None) -> Quality:
        """Measures of ``samples [N, *shape]``, which were generated for ``labels [N]`` if these are known."""
        if len(samples) < 2 or samples.dtype != self.dtype or self.shape not in (None, samples.shape[1:]):
            received = f"{len(samples)} samples {samples.dtype} {list(samples.shape[1:])}"
            expected = "[H, W, C]" if self.shape is None else f"{list(self.shape)}, as the real ones"
            raise UserError(f"received {received}, expected at least 2 {self.dtype} {expected}")
        if self.dtype == "float32" and not np.isfinite(samples).all():
            raise UserError("received samples with NaN or infinity, expected finite ones")
        seen = self.features(samples)
        quality = {self.distance: frechet_distance(fit_gaussian(seen.points), self.statistics)}
        if self.spatial is not None and seen.spatial is not None:
            quality["sfid"] = frechet_distance(fit_gaussian(seen.spatial), self.spatial)
        if seen.logits is not None:
            quality["inception_score"], quality["inception_score_std"] = inception_score(seen.logits.cpu())
        if self.real is not None:
            quality["precision"], quality["recall"] = self.real.precision_and_recall(seen.points)
        if self.train is not None:
            quality["nearest_distance"] = nearest_distance(seen.points.numpy(), self.train)
        if seen.classes is not None and labels is not None:
            quality["recognised_share"] = float((seen.classes.cpu().numpy() == labels).mean())
        for ratio, measure, split in (("frechet", self.distance, "train"), ("nearest", "nearest_distance", "test")):
            value, floor = quality.get(measure, 0.0), self.of_data.get(f"{measure}_{split}", 0.0)
            if floor > ROUNDING * abs(value):
                quality[f"{ratio}_ratio"] = value / floor
        return quality | self.of_data


def open_evaluator(config: EvaluationConfig, dataset: Dataset | None) -> Evaluator | None:
    """The evaluator for the configured reference files and features; without files, for the data set.

    Without both, samples are measured as they are; it is None for latents, large samples, and too few to compare with.
    """
    if config.reference:
        return _evaluator_of_files(config.reference, config.features or INCEPTION)
    assert dataset is not None
    if config.features is None:
        enough = min(len(dataset.train), len(dataset.test)) > 1
        small = not dataset.latent and prod(dataset.sample_shape) <= MOST_VALUES
        return _evaluator_of_data(dataset, Values(dataset)) if small and enough else None
    if dataset.pixel_range is None:
        raise UserError(f"evaluation.features is {config.features}, but samples of {dataset.name} are no images")
    if dataset.latent:
        raise UserError("latents have no images to compare with: evaluation.reference must name a file of them")
    features = open_features(config.features)
    if features.num_classes not in (None, dataset.num_classes):
        raise UserError(f"evaluation.features is {config.features}, trained on other data")
    return _evaluator_of_data(dataset, features)


def evaluate_model(
    evaluator: Evaluator, generator: Generator, numbers: Tensor, cfg_scale: float, seed: int = 0
) -> tuple[Quality, Samples]:
    """Measures of samples generated for the classes ``numbers [N]``, with ``cfg_scale`` among them, and the samples."""
    samples = draw_samples(generator, numbers, cfg_scale, seed)
    labels = numbers.numpy() if len(generator.class_names) > 1 else None  # One label says nothing of the samples.
    return {"cfg_scale": cfg_scale} | evaluator(samples, labels), samples


def check_evaluation(evaluator: Evaluator, generator: Generator) -> None:
    """Raise :class:`UserError` if samples of ``generator`` cannot be evaluated, before much time is spent on them."""
    evaluate_model(evaluator, generator, torch.arange(2) % len(generator.class_names), 1.0)


def warn_of_few(evaluator: Evaluator, num: int) -> None:
    """Say on stderr if ``num`` samples are so few that their number matters."""
    if num < evaluator.fewest:
        warning = f"{num} samples are few, {evaluator.distance} is too high with fewer than {evaluator.fewest}"
        print(f"warning: {warning}: compare equal numbers only", file=sys.stderr)


def best_quality(qualities: Sequence[Quality], distance: str) -> Quality:
    return min(qualities, key=lambda quality: quality[distance])


class Values:
    """Small samples as points: images on a scale of 0 … 16, others as they are; a fitted machine recognises classes."""

    distance = FRECHET_DISTANCE

    def __init__(self, dataset: Dataset) -> None:
        is_image = dataset.pixel_range is not None
        self.scale, gamma = (16 / 255, 0.064 / prod(dataset.sample_shape)) if is_image else (1.0, "scale")
        self.classifier = None
        train, labels = _real(self, dataset, dataset.train, MOST_REAL)
        if len(np.unique(labels)) > 1:
            self.classifier = SVC(gamma=gamma, C=10).fit(train.points, labels)

    def __call__(self, samples: Samples) -> Features:
        points = samples.reshape(len(samples), -1).astype(np.float64) * self.scale
        classes = None if self.classifier is None else torch.from_numpy(self.classifier.predict(points))
        return Features(torch.from_numpy(points), classes=classes)


def _evaluator_of_data(dataset: Dataset, features: ImageFeatures | Values) -> Evaluator:
    """Compares with the test samples; what training samples measure is what can be had."""
    small, is_image, shape = isinstance(features, Values), dataset.pixel_range is not None, dataset.sample_shape
    train = _real(features, dataset, dataset.train, MOST_REAL if small else FEATURE_SAMPLES)[0].points
    test, labels = _real(features, dataset, dataset.test, MOST_REAL if small else len(dataset.test))
    evaluator = Evaluator(
        features, *_fit_both(test), shape=(*shape[1:], shape[0]) if is_image else shape,
        dtype="uint8" if is_image else "float32", num_samples=1300 if small else FEATURE_SAMPLES,
        labels=label_numbers(dataset.class_names),
    )  # fmt: skip
    of_data = evaluator.of_data
    of_data[f"{features.distance}_train"] = frechet_distance(fit_gaussian(train), evaluator.statistics)
    evaluator.real = Manifold(_spread(test.points, MANIFOLD_SAMPLES))
    of_data["precision_train"], of_data["recall_train"] = evaluator.real.precision_and_recall(train)
    if small:
        evaluator.train = train.numpy()
        of_data["nearest_distance_test"] = nearest_distance(test.points.numpy(), evaluator.train)
    if test.classes is not None:
        of_data["recognised_share_test"] = float((test.classes.cpu().numpy() == labels).mean())
    return evaluator


def _real(features: ImageFeatures | Values, dataset: Dataset, split: Split, most: int) -> tuple[Features, Labels]:
    """Features and labels of a split's samples, of evenly spaced ones where there are more than ``most``."""
    indices, parts = _spread(torch.arange(len(split)), most), []
    for part in progress(indices.split(1000), "real samples", "part"):
        samples = split.samples(part.tolist()).float()
        if not samples.isfinite().all():
            raise UserError("the data set has samples with NaN or infinity, expected finite ones")
        if dataset.pixel_range is not None:
            low, high = dataset.pixel_range
            samples = ((samples - low) * (255 / (high - low))).movedim(1, -1)
        parts.append(features(samples.numpy()))
    return concatenate(parts), split.labels[indices].numpy()


def _evaluator_of_files(paths: Sequence[str], source: str) -> Evaluator:
    """Compares with the first of ``paths`` that has statistics, or else images; precision and recall need images."""
    references = [read_reference(Path(path)) for path in paths]
    given = next(((r.statistics, r.spatial_statistics) for r in references if r.statistics is not None), None)
    images = next((r.images for r in references if r.images is not None), None)
    features = open_features(source)
    if given and len(given[0].mean) != features.dim:
        dim = len(given[0].mean)
        raise UserError(f"the reference's statistics are of {dim} features, {features.name} has {features.dim}")
    if images is None:
        assert given is not None
        return Evaluator(features, *given)
    seen = features(_spread(images, MANIFOLD_SAMPLES) if given else images)
    real = Manifold(_spread(seen.points, MANIFOLD_SAMPLES))
    return Evaluator(features, *(given or _fit_both(seen)), real=real, shape=images.shape[1:])


def _fit_both(features: Features) -> tuple[Gaussian, Gaussian | None]:
    return fit_gaussian(features.points), None if features.spatial is None else fit_gaussian(features.spatial)


def _spread(samples: Any, most: int) -> Any:
    """Choose evenly spaced samples where there are more than ``most``."""
    return samples[:: max(1, -(-len(samples) // most))]
