"""How close generated samples are to real ones: images in the features of a network, small samples as they are."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from math import prod
from pathlib import Path

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor

from ..config.schema import EvaluationConfig
from ..data import Dataset, Split
from ..errors import UserError
from ..generation import Generator, label_numbers
from ..training.distributed import Ranks
from .archives import Labels, Samples, read_reference
from .drawing import draw_batches
from .features import INCEPTION, Features, ImageFeatures, Values, batches, open_features, see
from .measures import NEIGHBOURS
from .real_samples import MANIFOLD_SAMPLES, Quality, RealSamples, of_files, of_splits, spread_out

FEATURE_SAMPLES = 5000  # So many are generated, and taken of the training images, where it is a data set.
MOST_REAL = 2000  # Of a split, at most so many small samples are measured.
MOST_VALUES = 2048  # Samples of more say little in a Fréchet distance; Inception has as many features.


class NotMeasurable(UserError):
    """There is nothing to measure samples by; the message says why, and what to do."""


@dataclass
class Evaluator:
    """Judges generated samples by real ones; build it once and call it often, on all ``ranks`` together.

    It leaves out the measures that its features or the real samples do not have. ``recognised_share`` is the share of
    samples that a classifier of the data takes for their label. ``frechet_ratio`` is relative to the Fréchet distance
    of training samples, and ``nearest_ratio`` to the nearest distance of test samples: near 0, the generator memorised.
    A generator that has collapsed to a part of the data has a low ``recall``, whatever its ``precision``.
    """

    features: ImageFeatures | Values
    real: RealSamples | None  # Rank 0 has them.
    shape: tuple[int, ...] | None = None  # That of a sample, (H, W, C) of an image; None takes images of any shape.
    dtype: str = "uint8"  # Images are uint8, other samples float32.
    num_samples: int = 50_000  # This many are judged, by the field's custom: Fréchet distances depend on their number.
    labels: tuple[int, ...] | None = None  # What files of samples call the classes of the data.
    ranks: Ranks = Ranks()  # noqa: RUF009

    def __post_init__(self) -> None:
        self.distance = self.features.distance  # The name of the Fréchet distance, which is low for good samples.
        self.fewest = 4 * self.features.dim  # With fewer samples, this distance says little.

    def class_numbers(self, labels: Labels | None) -> Labels | None:
        """The class numbers of labels ``[N]`` as a file has them; -1 for those that the data do not have, and None,
        which is said on stderr, where they have none of them."""
        if labels is None or self.labels is None:
            return labels
        place = {label: number for number, label in enumerate(self.labels)}
        numbers = np.array([place.get(label, -1) for label in labels.tolist()])
        if numbers.max() < 0 and self.real is not None:
            print("not measured: recognised_share (the data have none of the labels)", file=sys.stderr)
        return None if numbers.max() < 0 else numbers

    def __call__(self, samples: Samples, labels: Labels | None) -> Quality:
        """Measures of ``samples [N, *shape]``, which were generated for ``labels [N]`` if these are known."""
        if len(samples) < 2:
            raise UserError(f"received {len(samples)} samples, expected at least 2 to compare")
        parts = batches(len(samples), samples.shape[1:], self.features.name, self.ranks)
        return self.measure((samples[part] for part in parts), labels)

    def measure(self, samples: Iterable[Samples], labels: Labels | None) -> Quality:
        """The same of samples in batches, of which each rank gives its own; ``labels`` are of them all."""
        seen, real = see(self.features, map(self._checked, samples), self.features.device, self.ranks), self.real
        quality = self.ranks.on_main(lambda: real.measure(seen, labels) if real and seen else {})
        return self.ranks.on_all(lambda: quality or {})[0]

    def _checked(self, samples: Samples) -> Samples:
        if samples.dtype != self.dtype or self.shape not in (None, samples.shape[1:]):
            received = f"samples {samples.dtype} {list(samples.shape[1:])}"
            expected = "[H, W, C]" if self.shape is None else f"{list(self.shape)}, as the real ones"
            raise UserError(f"received {received}, expected {self.dtype} {expected}")
        if self.dtype == "float32" and not np.isfinite(samples).all():
            raise UserError("received samples with NaN or infinity, expected finite ones")
        return samples

    def tell(self, num: int) -> None:
        """Say on stderr, in a line each, what of ``num`` samples is not measured, and what measures say little."""
        if self.real is None:
            return
        lacking, count, copies = [*self.real.lacking], self.real.count, self.real.copies
        if num <= NEIGHBOURS and self.real.manifold is not None:
            lacking.append(f"precision and recall ({num} generated samples, expected {NEIGHBOURS + 1} or more)")
        if lacking:
            print(f"not measured: {'; '.join(lacking)}", file=sys.stderr)
        few = [f"{n} {name}" for n, name in ((num, "samples"), (count, "real ones")) if n and n < self.fewest]
        if few:
            warning = f"{' and '.join(few)} are few, {self.distance} is too high with fewer than {self.fewest}"
            print(f"warning: {warning}: compare equal numbers only", file=sys.stderr)
        if copies:
            warning = f"{copies} of {count} test samples are training samples too: hold out others"
            print(f"warning: {warning}, or no measure tells copies from new samples", file=sys.stderr)


def open_evaluator(config: EvaluationConfig, dataset: Dataset | None, ranks: Ranks = Ranks()) -> Evaluator:  # noqa: B008
    """The evaluator for the configured reference files and features; without files, for the data set.

    Without both, samples are measured as they are: it raises NotMeasurable for latents, large samples, and too few to
    compare with. All ranks open it together.
    """
    if config.reference:
        return _evaluator_of_files(config.reference, config.features or INCEPTION, ranks)
    assert dataset is not None
    if min(len(dataset.train), len(dataset.test)) < 2:
        counts = f"{len(dataset.train)} training and {len(dataset.test)} test samples"
        raise NotMeasurable(f"there are {counts}, expected at least 2 of each to compare with")
    if config.features is not None:
        return _evaluator_of_data(dataset, ranks.together(partial(_network, config.features, dataset)), ranks)
    if dataset.latent:
        advice = "evaluation.reference=FILE.npz names images to compare with (docs/evaluation.md)"
        raise NotMeasurable(f"nothing will be measured of latents: {advice}")
    if prod(dataset.sample_shape) > MOST_VALUES:
        what = f"samples are compared as they are up to {MOST_VALUES} values, these have {prod(dataset.sample_shape)}"
        raise NotMeasurable(f"{what}: evaluation.features must name a network, such as inception")
    return _evaluator_of_data(dataset, Values(dataset), ranks)


def _network(source: str, dataset: Dataset) -> ImageFeatures:
    if dataset.pixel_range is None:
        raise UserError(f"evaluation.features is {source}, but samples of {dataset.name} are no images")
    if dataset.latent:
        raise UserError("latents have no images to compare with: evaluation.reference must name a file of them")
    features = open_features(source)
    if features.num_classes not in (None, dataset.num_classes):
        raise UserError(f"evaluation.features is {source}, trained on other data")
    return features


def evaluate_model(
    evaluator: Evaluator, generator: Generator, numbers: Tensor, cfg_scale: float, seed: int = 0,
    kept: list[Samples] | None = None,
) -> Quality:  # fmt: skip
    """Measures of samples generated for the classes ``numbers [N]``, with ``cfg_scale`` among them.

    This rank's batches of samples are added to ``kept``, where there is such a list.
    """
    samples: Iterable[Samples] = draw_batches(generator, numbers, cfg_scale, seed, evaluator.ranks)
    if kept is not None:
        kept += evaluator.ranks.together(lambda: list(samples))
        samples = kept
    labels = numbers.numpy() if len(generator.class_names) > 1 else None  # One label says nothing of the samples.
    return {"cfg_scale": cfg_scale} | evaluator.measure(samples, labels)


def check_evaluation(evaluator: Evaluator, generator: Generator) -> None:
    """Raise :class:`UserError` if samples of ``generator`` cannot be evaluated, before much time is spent on them."""
    evaluate_model(evaluator, generator, torch.arange(2) % len(generator.class_names), 1.0)


def best_quality(qualities: Sequence[Quality], distance: str) -> Quality:
    return min(qualities, key=lambda quality: quality[distance])


def _evaluator_of_data(dataset: Dataset, features: ImageFeatures | Values, ranks: Ranks) -> Evaluator:
    """Compares with the test samples; what training samples measure is what can be had."""
    small, is_image, shape = isinstance(features, Values), dataset.pixel_range is not None, dataset.sample_shape
    machine = SVC(gamma=0.064 / features.dim if is_image else "scale", C=10) if small else None
    train, train_labels = _real(features, dataset, dataset.train, MOST_REAL if small else FEATURE_SAMPLES, ranks)
    test, test_labels = _real(features, dataset, dataset.test, MOST_REAL if small else len(dataset.test), ranks)

    def compare() -> RealSamples | None:
        return train and test and of_splits(features.distance, train, train_labels, test, test_labels, machine)

    return Evaluator(
        features, ranks.on_main(compare), shape=(*shape[1:], shape[0]) if is_image else shape,
        dtype="uint8" if is_image else "float32", num_samples=1300 if small else FEATURE_SAMPLES,
        labels=label_numbers(dataset.class_names), ranks=ranks,
    )  # fmt: skip


def _real(
    features: ImageFeatures | Values, dataset: Dataset, split: Split, most: int, ranks: Ranks
) -> tuple[Features | None, Labels]:
    """Features and labels of a split's samples, of evenly spaced ones where there are more than ``most``."""
    indices = spread_out(torch.arange(len(split)), most)

    def read() -> Iterator[Samples]:
        for part in batches(len(indices), dataset.sample_shape, "real samples", ranks):
            samples = split.samples(indices[part].tolist()).float()
            if not samples.isfinite().all():
                raise UserError("the data set has samples with NaN or infinity, expected finite ones")
            if dataset.pixel_range is not None:
                low, high = dataset.pixel_range
                samples = ((samples - low) * (255 / (high - low))).movedim(1, -1)
            yield samples.numpy()

    def look(samples: Samples) -> Features:
        digests = [blake2b(sample.tobytes(), digest_size=8).digest() for sample in samples]
        return features(samples)._replace(digests=torch.from_numpy(np.frombuffer(b"".join(digests), np.int64).copy()))

    return see(look, read(), features.device, ranks), split.labels[indices].numpy()


def _evaluator_of_files(paths: Sequence[str], source: str, ranks: Ranks) -> Evaluator:
    """Compares with the first of ``paths`` that has statistics, or else images; precision and recall need images."""
    references = ranks.together(lambda: [read_reference(Path(path)) for path in paths])
    given = next(((r.statistics, r.spatial_statistics) for r in references if r.statistics is not None), None)
    images = next((r.images for r in references if r.images is not None), None)
    features, seen = ranks.together(lambda: open_features(source)), None
    if given and len(given[0].mean) != features.dim:
        dim = len(given[0].mean)
        raise UserError(f"the reference's statistics are of {dim} features, {features.name} has {features.dim}")
    if images is not None:
        images = spread_out(images, MANIFOLD_SAMPLES) if given else images
        parts = batches(len(images), images.shape[1:], features.name, ranks)
        seen = see(features, (images[part] for part in parts), features.device, ranks)
    real = ranks.on_main(lambda: of_files(features.distance, seen, given))
    return Evaluator(features, real, shape=None if images is None else images.shape[1:], ranks=ranks)
