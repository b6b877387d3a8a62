"""How close generated images are to real ones: in the features of a network, or small ones in pixels."""

import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Protocol

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
from ..utils.images import Pixels, to_uint8
from .archives import Labels, read_reference
from .drawing import draw_samples
from .features import INCEPTION, SPATIAL_DIM, Features, ImageFeatures, concatenate, open_features
from .measures import Gaussian, Manifold, Points, fit_gaussian, frechet_distance, inception_score, nearest_distance

Quality = dict[str, float]

REFERENCE_SAMPLES = 50_000  # images that are generated where the reference is a file: the field's custom
FEATURE_SAMPLES = 5000  # images that are generated, and of the training images, where it is a data set
MANIFOLD_IMAGES = 10_000  # real images that precision and recall are measured with at most, as ADM does
PER_FEATURE = 4  # images for each feature, with fewer of which a Fréchet distance says little
SPLIT_BATCH = 1000  # images of a data set that are read at once

PIXEL_SAMPLES = 1300  # images that are generated to be measured in pixels
PIXEL_MAX = 16  # pixels are measured on the scale of the digits, 0 … 16
GAMMA = 0.064  # of the support vector machine, over the number of values of an image
MOST_VALUES = 1024  # of an image: with more, measures in pixels mean little and cost much
MOST_IMAGES = 2000  # of a split that are measured


class Evaluator(Protocol):
    """Judges generated images by real ones; build once, call often.

    Called with uint8 ``images [N, H, W, C]`` generated for ``labels [N]`` (None: unknown), it returns measures, and
    what real images would score; it raises ValueError for fewer than 2 images or those of another size. It is meant to
    be given ``num_samples`` of them, as Fréchet distances depend on their number; ``distance`` is the measure that says
    how good they are, by how low it is. Of fewer than ``fewest`` images it says little.
    """

    num_samples: int
    fewest: int
    distance: str

    def __call__(self, images: Pixels, labels: Labels | None) -> Quality: ...


def open_evaluator(config: EvaluationConfig, dataset: Dataset | None) -> Evaluator | None:
    """That of the configured reference files and features; without files, of the data set.

    Without either files or features it measures small images in pixels, and is None for large ones and latents.

    Raises:
        UserError: a file or network cannot be read, or does not go with the data.
    """
    if config.reference:
        return _archive_evaluator([Path(path) for path in config.reference], config.features or INCEPTION)
    if dataset is None:
        raise ValueError("received neither reference files nor a data set, expected one of them")
    if config.features is None:
        return None if dataset.latent or prod(dataset.sample_shape) > MOST_VALUES else PixelEvaluator(dataset)
    features = open_features(config.features)
    if dataset.latent:
        raise UserError("latents have no images to compare with: evaluation.reference must name a file of them")
    if features.classifier is not None and features.classifier.config["num_classes"] != dataset.num_classes:
        raise UserError(f"evaluation.features is {config.features}, trained on other data")
    return _dataset_evaluator(dataset, features)


def evaluate_model(
    evaluator: Evaluator,
    generator: Generator,
    labels: Tensor,
    cfg_scale: float,
    seed: int = 0,
) -> tuple[Quality, Pixels]:
    """Measures of images generated for ``labels``, with ``cfg_scale`` among them, and the images.

    50,000 of ImageNet are 10 GB: let go of them before the next call.
    """
    images = draw_samples(generator, labels, cfg_scale, seed)
    return {"cfg_scale": cfg_scale} | evaluator(images, labels.numpy()), images


def check_evaluation(evaluator: Evaluator, generator: Generator) -> None:
    """Raise :class:`UserError` if images of ``generator`` cannot be evaluated, before much time is spent on them."""
    labels = torch.arange(2) % len(generator.class_names)
    try:
        evaluator(draw_samples(generator, labels), labels.numpy())
    except ValueError as error:
        raise UserError(str(error)) from error


def warn_of_few(evaluator: Evaluator, num: int) -> None:
    """Say on stderr if ``num`` images are too few for their number not to matter."""
    if num < evaluator.fewest:
        print(
            f"warning: {num} images are few, {evaluator.distance} is too high with fewer than {evaluator.fewest}: "
            "compare equal numbers only",
            file=sys.stderr,
        )


def best_quality(qualities: Sequence[Quality], distance: str) -> Quality:
    """That of the lowest ``distance``."""
    return min(qualities, key=lambda quality: quality[distance])


class FeatureEvaluator:
    """An :class:`Evaluator` in the features of a network.

    The Fréchet distance is ``fid`` in Inception's features, ``fd_dinov2`` in DINOv2's and else ``frechet_distance``.
    ``precision`` and ``recall`` are the improved ones of Kynkäänniemi et al.; Inception gives its score too, and
    ``sfid``, the distance in its spatial features; a classifier of the data gives ``recognised_share``, the share that
    it takes for their label.

    Args:
        features: the network.
        statistics: Gaussian of the features of real images.
        spatial: Gaussian of their spatial features; None leaves out ``sfid``.
        points: features ``[M, D]`` of real images, not all of them perhaps; None leaves out precision and recall.
        image_shape: H, W and C that images must have; None takes any.
        num_samples: images it is meant to be given.
        of_data: what real images score, which is added to the measures. With the Fréchet distance of training images
            among them, ``frechet_ratio`` is that of the generated ones over it.
    """

    def __init__(
        self,
        features: ImageFeatures,
        statistics: Gaussian,
        spatial: Gaussian | None,
        points: Tensor | None,
        image_shape: tuple[int, ...] | None,
        num_samples: int,
        of_data: Quality,
    ) -> None:
        self.features, self.statistics, self.spatial, self.image_shape = features, statistics, spatial, image_shape
        self.points = None if points is None else points[_spread(len(points), MANIFOLD_IMAGES)]
        self.real = None if self.points is None else Manifold(self.points)
        self.num_samples, self.of_data, self.distance = num_samples, of_data, features.distance
        self.fewest = PER_FEATURE * len(statistics.mean)

    def __call__(self, images: Pixels, labels: Labels | None) -> Quality:
        if len(images) < 2 or self.image_shape not in (None, images.shape[1:]):
            expected = "" if self.image_shape is None else f" {list(self.image_shape)}, as the real ones"
            raise ValueError(f"received {len(images)} images {list(images.shape[1:])}, expected at least 2{expected}")
        points, logits, spatial = self.features(images)
        distance = frechet_distance(fit_gaussian(points), self.statistics)
        quality = {self.distance: distance}
        if self.spatial is not None and spatial is not None:
            quality["sfid"] = frechet_distance(fit_gaussian(spatial), self.spatial)
        if f"{self.distance}_train" in self.of_data:
            quality["frechet_ratio"] = distance / self.of_data[f"{self.distance}_train"]
        if self.features.classifier is not None:
            quality |= _recognised(logits, labels)
        elif logits is not None:
            quality["inception_score"], quality["inception_score_std"] = inception_score(logits.cpu())
        if self.points is not None and self.real is not None:
            quality["precision"] = self.real.share_inside(points)
            quality["recall"] = Manifold(points).share_inside(self.points)
        return quality | self.of_data


def _dataset_evaluator(dataset: Dataset, features: ImageFeatures) -> FeatureEvaluator:
    """Against the test images; ``…_train`` is the distance of as many training images as are generated, the floor."""
    train = _split_features(features, dataset, dataset.train, FEATURE_SAMPLES)
    test = _split_features(features, dataset, dataset.test, len(dataset.test))
    statistics, spatial = _fit_both(test)
    of_data = {f"{features.distance}_train": frechet_distance(fit_gaussian(train.points), statistics)}
    if features.classifier is not None:
        share = _recognised(test.logits, dataset.test.labels.numpy())
        of_data["recognised_share_test"] = share["recognised_share"]
    C, H, W = dataset.sample_shape
    return FeatureEvaluator(features, statistics, spatial, test.points, (H, W, C), FEATURE_SAMPLES, of_data)


def _archive_evaluator(paths: Sequence[Path], source: str) -> FeatureEvaluator:
    """Against the first of ``paths`` with statistics, or else with images; precision and recall need images."""
    references = [read_reference(path) for path in paths]
    known = next((r for r in references if r.statistics is not None), None)
    images = next((r.images for r in references if r.images is not None), None)
    features = open_features(source)
    real = None
    if images is not None:
        if known is not None:
            images = images[_spread(len(images), MANIFOLD_IMAGES)]
        if len(images) < 2:
            raise UserError(f"the reference has {len(images)} images, expected at least 2")
        real = features(images)
    if known is not None and known.statistics is not None:
        statistics, spatial = known.statistics, known.spatial_statistics
    else:
        assert real is not None  # each file has one or the other
        statistics, spatial = _fit_both(real)
    _check_dim(statistics, features.dim, features.name)
    if features.name == INCEPTION and spatial is not None:
        _check_dim(spatial, SPATIAL_DIM, features.name)
    shape = None if images is None else images.shape[1:]
    points = None if real is None else real.points
    return FeatureEvaluator(features, statistics, spatial, points, shape, REFERENCE_SAMPLES, {})


def _check_dim(statistics: Gaussian, dim: int, name: str) -> None:
    if len(statistics.mean) != dim:
        raise UserError(f"the reference's statistics are of {len(statistics.mean)} features, {name} has {dim}")


def _split_features(features: ImageFeatures, dataset: Dataset, split: Split, most: int) -> Features:
    """Those of a split's images, evenly spaced ones of more than ``most``."""
    indices = _spread(len(split), most)
    parts = [indices[start : start + SPLIT_BATCH] for start in range(0, len(indices), SPLIT_BATCH)]
    bar = tqdm(parts, desc="real images", unit="part", delay=1, leave=False, disable=None)
    return concatenate([features(to_uint8(split.samples(part), dataset.pixel_range)) for part in bar])


def _recognised(logits: Tensor | None, labels: Labels | None) -> Quality:
    if logits is None or labels is None:
        return {}
    return {"recognised_share": float((logits.argmax(1).cpu().numpy() == labels).mean())}


def _fit_both(features: Features) -> tuple[Gaussian, Gaussian | None]:
    """The Gaussians of the features and of the spatial ones, where there are any."""
    return fit_gaussian(features.points), None if features.spatial is None else fit_gaussian(features.spatial)


class PixelEvaluator:
    """An :class:`Evaluator` of small images in pixels on the digits' 0 … 16 scale.

    Of a split with more than ``MOST_IMAGES`` images, evenly spaced ones are taken.
    """

    num_samples = PIXEL_SAMPLES
    distance = "frechet_distance"

    def __init__(self, dataset: Dataset) -> None:
        self.train, train_labels = _data_points(dataset.train, dataset.pixel_range)
        self.test, test_labels = _data_points(dataset.test, dataset.pixel_range)
        self.fewest = PER_FEATURE * self.test.shape[1]
        self.statistics = fit_gaussian(self.test)
        self.classifier = SVC(gamma=GAMMA / self.train.shape[1], C=10).fit(self.train, train_labels)
        self.of_data = {
            "frechet_distance_train": frechet_distance(fit_gaussian(self.train), self.statistics),
            "recognised_share_test": float(self.classifier.score(self.test, test_labels)),
            "nearest_distance_test": nearest_distance(self.test, self.train),
        }

    def __call__(self, images: Pixels, labels: Labels | None) -> Quality:
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
        frechet, nearest = frechet_distance(fit_gaussian(points), self.statistics), nearest_distance(points, self.train)
        quality = {
            "frechet_distance": frechet,
            "frechet_ratio": frechet / self.of_data["frechet_distance_train"],
            "nearest_distance": nearest,
            "nearest_ratio": nearest / self.of_data["nearest_distance_test"],
        }
        if labels is not None:
            quality["recognised_share"] = float((self.classifier.predict(points) == labels).mean())
        return quality | self.of_data


def _data_points(split: Split, pixel_range: tuple[float, float]) -> tuple[Points, NDArray[np.int64]]:
    indices = _spread(len(split), MOST_IMAGES)
    low, high = pixel_range
    points = (split.samples(indices).double().flatten(1) - low) * (PIXEL_MAX / (high - low))
    return points.numpy(), split.labels[indices].numpy()


def _spread(count: int, most: int) -> list[int]:
    """The indices below ``count``, evenly spaced ones where there are more than ``most``."""
    return list(range(0, count, -(-count // most)))
