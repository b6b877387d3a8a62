"""Real samples as generated ones are compared with them, and what cannot be compared."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.svm import SVC

from . import measures
from .archives import Labels
from .features import Features
from .measures import NEIGHBOURS, Gaussian, Manifold, Points

Quality = dict[str, float]
MANIFOLD_SAMPLES = 10_000  # Precision and recall take at most so many real samples, as ADM does.
ROUNDING = 1e-6  # Less than this share of the spread of the data is no distance.


@dataclass
class RealSamples:
    """Features of real samples, and the measures of generated ones beside them. Rank 0 alone has these.

    Measures that the features or the real samples do not have are left out; ``lacking`` says which and why.
    """

    distance: str  # The Fréchet distance, which is low for good samples, has this name.
    statistics: Gaussian  # They describe the points of real samples …
    spatial: Gaussian | None = None  # … and these their spatial features.
    manifold: Manifold | None = None  # Precision and recall need the points of real samples …
    train: Points | None = None  # … and the nearest distance those of training samples.
    classifier: SVC | None = None  # It recognises small samples, whose features have no classes.
    count: int | None = None  # They are so many, where that is known.
    copies: int = 0  # So many of them are training samples too.
    of_data: Quality = field(default_factory=dict)  # Measures of real samples are told beside those of generated ones.
    floors: dict[str, tuple[str, float]] = field(default_factory=dict)  # Ratios are of these measures to these floors.
    lacking: list[str] = field(default_factory=list)

    def measure(self, seen: Features, labels: Labels | None) -> Quality:
        """Measures of samples that are seen so, and were generated for ``labels [N]`` if these are known."""
        quality = {self.distance: measures.frechet_distance(measures.fit_gaussian(seen.points), self.statistics)}
        if self.spatial is not None and seen.spatial is not None:
            quality["sfid"] = measures.frechet_distance(measures.fit_gaussian(seen.spatial), self.spatial)
        if seen.logits is not None:
            quality["inception_score"], quality["inception_score_std"] = measures.inception_score(seen.logits.cpu())
        if self.manifold is not None and len(seen.points) > NEIGHBOURS:
            quality["precision"], quality["recall"] = self.manifold.precision_and_recall(seen.points)
        if self.train is not None:
            quality["nearest_distance"] = measures.nearest_distance(seen.points.numpy(), self.train)
        classes = self.classes(seen)
        if classes is not None and labels is not None:
            quality["recognised_share"] = float((classes == labels).mean())
        ratios = {name: quality[measure] / floor for name, (measure, floor) in self.floors.items()}
        return quality | ratios | self.of_data

    def classes(self, seen: Features) -> Labels | None:
        """What a classifier takes the samples for ``[N]``, if there is one."""
        if self.classifier is not None:
            return self.classifier.predict(seen.points.numpy())
        return None if seen.classes is None else seen.classes.cpu().numpy()

    def add_floor(self, ratio: str, measure: str, split: str, spread: float) -> None:
        """Tell from now on what ``measure`` is over that of the split's samples, unless that is about 0."""
        floor = self.of_data[f"{measure}_{split}"]
        if floor > ROUNDING * spread:
            self.floors[ratio] = (measure, floor)
        else:
            self.lacking.append(f"{ratio} ({measure}_{split} is about 0)")


def of_files(distance: str, seen: Features | None, given: tuple[Gaussian, Gaussian | None] | None) -> RealSamples:
    """Those of reference files: images that are ``seen``, statistics that are ``given``, or both."""
    if seen is not None:
        return _compared(distance, seen, given)
    assert given is not None
    return RealSamples(distance, *given, lacking=["precision and recall (the reference has no images)"])


def of_splits(
    distance: str, train: Features, train_labels: Labels, test: Features, test_labels: Labels, machine: SVC | None
) -> RealSamples:
    """Test samples; what training samples measure is what can be had.

    Where samples are small, their own values are the features, and the ``machine`` is fitted to recognise them.
    """
    real, of_train = _compared(distance, test), measures.fit_gaussian(train.points)
    spread = float(max(np.trace(gaussian.covariance) for gaussian in (of_train, real.statistics)))
    if train.digests is not None and test.digests is not None:
        real.copies = int(torch.isin(test.digests, train.digests).sum())
    real.of_data[f"{distance}_train"] = measures.frechet_distance(of_train, real.statistics)
    real.add_floor("frechet_ratio", distance, "train", spread)
    if real.manifold is not None and len(train.points) > NEIGHBOURS:
        real.of_data["precision_train"], real.of_data["recall_train"] = real.manifold.precision_and_recall(train.points)
    if machine is not None:
        real.train = train.points.numpy()
        real.of_data["nearest_distance_test"] = measures.nearest_distance(test.points.numpy(), real.train)
        real.add_floor("nearest_ratio", "nearest_distance", "test", spread**0.5)
        if len(np.unique(train_labels)) > 1:
            real.classifier = machine.fit(train.points, train_labels)
        else:
            real.lacking.append("recognised_share (the data have one class)")
    classes = real.classes(test)
    if classes is not None:
        real.of_data["recognised_share_test"] = float((classes == test_labels).mean())
    return real


def _compared(distance: str, seen: Features, given: tuple[Gaussian, Gaussian | None] | None = None) -> RealSamples:
    spatial = None if seen.spatial is None or given else measures.fit_gaussian(seen.spatial)
    real, count = RealSamples(distance, *(given or (measures.fit_gaussian(seen.points), spatial))), len(seen.points)
    real.count = None if given else count  # Statistics may be of more samples.
    if count > NEIGHBOURS:
        real.manifold = Manifold(spread_out(seen.points, MANIFOLD_SAMPLES))
    else:
        real.lacking.append(f"precision and recall ({count} real samples, expected {NEIGHBOURS + 1} or more)")
    return real


def spread_out(samples: Any, most: int) -> Any:
    """Choose evenly spaced samples where there are more than ``most``."""
    return samples[:: max(1, -(-len(samples) // most))]
