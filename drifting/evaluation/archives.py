"""Images and statistics in ``.npz`` files, as the field's evaluators exchange them.

Images are ``arr_0``, uint8 ``[N, H, W, C]``, with labels ``arr_1`` where there are any; statistics of features ``mu``
``[D]`` and ``sigma`` ``[D, D]``, those of spatial features ``mu_s`` and ``sigma_s``. ADM's reference batches have all.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import MAGIC_PREFIX
from numpy.typing import NDArray

from ..errors import UserError
from ..utils.images import Pixels
from ..utils.npy import ArrayArchive
from .measures import Gaussian

IMAGES, LABELS = "arr_0", "arr_1"
STATISTICS = (("mu", "sigma"), ("ref_mu", "ref_sigma"))
SPATIAL_STATISTICS = (("mu_s", "sigma_s"),)

Labels = NDArray[np.int64]  # [N]


@dataclass(frozen=True)
class Reference:
    """What generated images are compared with: images, statistics of the features of more, or both.

    Beside ``statistics`` there may be ``spatial_statistics``, of features before the network's pooling.
    """

    images: Pixels | None
    statistics: Gaussian | None
    spatial_statistics: Gaussian | None = None


def write_images(path: Path, images: Pixels, labels: Labels) -> None:
    """Write ``path``, in a folder that is made if need be. Raises :class:`UserError` if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, images, labels)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def read_images(path: Path) -> tuple[Pixels, Labels | None]:
    """Images of ``path``, and their labels if it has them."""
    with _open(path) as archive:
        if IMAGES not in archive:
            raise UserError(f"{path} holds {_keys(archive)}, expected images {IMAGES} [N, H, W, C]")
        images = _images(path, archive)
        labels = _labels(path, archive, images) if LABELS in archive else None
    return images, labels


def read_reference(path: Path) -> Reference:
    """What ``path`` holds of a reference."""
    with _open(path) as archive:
        statistics, spatial = (
            next((_statistics(path, archive, keys) for keys in names if keys[0] in archive), None)
            for names in (STATISTICS, SPATIAL_STATISTICS)
        )
        images = _images(path, archive) if IMAGES in archive else None
        if images is None and statistics is None:
            raise UserError(
                f"{path} holds {_keys(archive)}, expected statistics (mu and sigma), images ({IMAGES}), or both"
            )
    return Reference(images, statistics, spatial)


def _statistics(path: Path, archive: ArrayArchive, keys: tuple[str, str]) -> Gaussian:
    if keys[1] not in archive:
        raise UserError(f"{path} holds {_keys(archive)}: {keys[0]}, but no {keys[1]}")
    mean, covariance = (_array(path, archive, key) for key in keys)
    if mean.ndim != 1 or not mean.size or covariance.shape != 2 * mean.shape:
        raise UserError(
            f"{path}: {keys[0]} is {list(mean.shape)} and {keys[1]} {list(covariance.shape)}, expected [D] and [D, D]"
        )
    for key, values in zip(keys, (mean, covariance), strict=True):
        if values.dtype.kind != "f" or not np.isfinite(values).all():
            raise UserError(f"{path}: {key} is {values.dtype} with NaN or infinity, expected finite floats")
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))


def _images(path: Path, archive: ArrayArchive) -> Pixels:
    images = _array(path, archive, IMAGES)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
        raise UserError(
            f"{path}: {IMAGES} is {images.dtype} {list(images.shape)}, expected uint8 [N, H, W, C] of 1 or 3 channels"
        )
    return images


def _labels(path: Path, archive: ArrayArchive, images: Pixels) -> Labels:
    labels = _array(path, archive, LABELS)
    if labels.shape != images.shape[:1]:
        raise UserError(f"{path}: {LABELS} is {list(labels.shape)}, expected {list(images.shape[:1])} as {IMAGES}")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= 2**31:
        raise UserError(f"{path}: {LABELS} is {labels.dtype}, or has labels out of range; expected integers from 0")
    return labels.astype(np.int64)


def _open(path: Path) -> ArrayArchive:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC_PREFIX)) == MAGIC_PREFIX:
                raise ValueError("but a single array")
        return ArrayArchive(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no .npz file, {error}") from error


def _array(path: Path, archive: ArrayArchive, key: str) -> NDArray[Any]:
    try:
        return archive[key]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {key} cannot be read: {error}") from error


def _keys(archive: ArrayArchive) -> str:
    return ", ".join(archive.names) or "nothing"
