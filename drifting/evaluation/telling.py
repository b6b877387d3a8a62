"""How measures of samples are told to people."""

from collections.abc import Iterator, Mapping
from typing import Any

DISTANCES = ("fid", "fd_dinov2", "frechet_distance")  # A Fréchet distance has one of these names.


def told_measures(quality: Mapping[str, Any], distance: str, noun: str) -> Iterator[tuple[str, str, str, str]]:
    """The title and the value of each measure that there is, the value of real samples, which it can hardly be better
    than, or else "", and the split that these are of. All values are as wide."""
    reference = f"test {noun}s" if f"{distance}_train" in quality else "reference"
    rows = [
        (f"Fréchet distance to the {reference}", distance, "8.2f", "train"),
        ("recognised as their class", "recognised_share", "8.1%", "test"),
        (f"distance to the nearest training {noun}", "nearest_distance", "8.2f", "test"),
        ("sFID", "sfid", "8.2f", "train"),
        ("Inception score", "inception_score", "8.1f", "test"),
        ("precision", "precision", "8.1%", "train"),
        ("recall", "recall", "8.1%", "train"),
    ]
    for title, measure, form, split in rows:
        if measure in quality:
            real = quality.get(f"{measure}_{split}")
            yield title, f"{quality[measure]:{form}}", "" if real is None else f"{real:{form}}", split
