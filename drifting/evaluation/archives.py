"""Samples and statistics in ``.npz`` files, as the field's evaluators exchange them.

Samples are ``arr_0``: images as uint8 ``[N, H, W, C]``, others as float32 ``[N, ...]``. Their labels, if they have any,
are ``arr_1``. Statistics of features are ``mu [D]`` and ``sigma [D, D]``, those of spatial features ``mu_s`` and
``sigma_s``. ADM's reference batches hold images and both kinds of statistics.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError, reason
from ..utils.images import Pixels
from .measures import Gaussian

SAMPLES, LABELS = "arr_0", "arr_1"
STATISTICS = (("mu", "sigma"), ("ref_mu", "ref_sigma"))
SPATIAL_STATISTICS = (("mu_s", "sigma_s"),)
MOST_BYTES = 3 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4  # All arrays of a file fit into these.
MOST_HEADER = 1000  # An array's header has about 100 bytes; Python takes long to read damaged ones of many more.
MOST_STATISTIC = 1e30  # Products of greater means and covariances could overflow.

Samples = NDArray[Any]  # uint8 images [N, H, W, C], or float32 [N, *sample_shape]
Labels = NDArray[np.int64]  # [N]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Reference:
    """What a file holds to compare generated images with: images, statistics of the features of images, or both."""

    images: Pixels | None
    statistics: Gaussian | None  # They may be of more images than these.
    spatial_statistics: Gaussian | None = None  # They are of features before the network's pooling.


def write_samples(path: Path, samples: Samples, labels: Labels) -> None:
    """Write samples and their labels to ``path``, whose folder is made where it is missing.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, samples, labels)
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from error


def read_samples(path: Path) -> tuple[Samples, Labels | None]:
    """The samples of ``path``, and their labels if it has them.

    Raises:
        UserError: the file cannot be read, or holds no samples.
    """
    arrays, names = _read(path, (SAMPLES, LABELS))
    if SAMPLES not in arrays:
        raise UserError(f"{path} holds {names}, expected samples {SAMPLES}")
    samples = arrays[SAMPLES]
    if samples.dtype != np.float32 or not samples.ndim or not samples.size:
        _check_images(path, samples, ", or float32 [N, ...] of samples that are no images")
    return samples, _labels(path, arrays[LABELS], len(samples)) if LABELS in arrays else None


def read_reference(path: Path) -> Reference:
    """The images and statistics of ``path``.

    Raises:
        UserError: the file cannot be read, or holds neither.
    """
    arrays, names = _read(path, (SAMPLES, *sum(STATISTICS + SPATIAL_STATISTICS, ())))
    statistics, spatial = (
        next((_gaussian(path, arrays, *keys) for keys in pairs if keys[0] in arrays), None)
        for pairs in (STATISTICS, SPATIAL_STATISTICS)
    )
    images = arrays.get(SAMPLES)
    if images is None and statistics is None:
        raise UserError(f"{path} holds {names}, expected statistics (mu and sigma), images ({SAMPLES}), or both")
    if images is not None:
        _check_images(path, images)
    return Reference(images, statistics, spatial)


def _read(path: Path, keys: Collection[str]) -> tuple[Arrays, str]:
    """Those arrays of ``path`` that ``keys`` name, and in words the names of all that it holds."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        if not is_zipfile(path):
            raise UserError("expected a zip archive of arrays, as numpy.savez writes it")
        with np.load(path, allow_pickle=False, max_header_size=MOST_HEADER) as archive:
            size = sum(entry.file_size for entry in archive.zip.infolist())
            if size > MOST_BYTES:
                raise UserError(f"its arrays take {size} bytes, expected at most {MOST_BYTES} on this machine")
            names = ", ".join(archive.files) or "nothing"
            return {key: np.asarray(archive[key]) for key in archive.files if key in keys}, names
    except Exception as error:  # Of damaged files, zipfile and numpy raise errors of many classes.
        raise UserError(f"{path} cannot be read as an .npz file: {reason(error)}") from error


def _gaussian(path: Path, arrays: Arrays, mean_key: str, covariance_key: str) -> Gaussian:
    if covariance_key not in arrays:
        raise UserError(f"{path} holds {mean_key}, but no {covariance_key}")
    mean, covariance = arrays[mean_key], arrays[covariance_key]
    for key, values, shape in ((mean_key, mean, (mean.size,)), (covariance_key, covariance, 2 * (mean.size,))):
        is_finite = values.dtype.kind == "f" and (np.abs(values) < MOST_STATISTIC).all()
        if values.shape != shape or not values.size or not is_finite:
            raise UserError(f"{path}: {key} is {_kind(values)}, expected finite floats, mu [D] and sigma [D, D]")
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))


def _check_images(path: Path, images: NDArray[Any], otherwise: str = "") -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
        expected = f"uint8 [N, H, W, C] of 1 or 3 channels{otherwise}"
        raise UserError(f"{path}: {SAMPLES} is {_kind(images)}, expected {expected}")


def _labels(path: Path, labels: NDArray[Any], count: int) -> Labels:
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= 2**31:
        raise UserError(f"{path}: {LABELS} is {_kind(labels)}, expected integers from 0 to 2147483647 [{count}]")
    return labels.astype(np.int64)


def _kind(values: NDArray[Any]) -> str:
    return f"{values.dtype} {list(values.shape)}"
