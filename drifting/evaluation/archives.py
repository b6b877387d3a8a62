"""Samples and statistics in ``.npz`` files, as the field's evaluators exchange them.

Samples are ``arr_0``: images as uint8 ``[N, H, W, C]``, others as float32 ``[N, ...]``; ``arr_1`` are their labels, if
any. Statistics of features are ``mu [D]`` and ``sigma [D, D]``, those of spatial features ``mu_s`` and ``sigma_s``.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError, explained
from ..utils.files import atomic_write
from .measures import Gaussian

MOST_BYTES = 3 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4  # All arrays of a file fit into these.
MOST_HEADER = 1000  # An array's header has about 100 bytes; Python takes long to read damaged ones of many more.
Samples = NDArray[Any]  # uint8 images [N, H, W, C], or float32 [N, *sample_shape]
Labels = NDArray[np.int64]  # [N]


class Reference(NamedTuple):
    """What a file holds to compare generated images with: images, statistics of the features of images, or both."""

    images: Samples | None
    statistics: Gaussian | None  # They may be of more images than these.
    spatial_statistics: Gaussian | None  # They are of features before the network's pooling.


def write_samples(path: Path, samples: Samples, labels: NDArray[Any], name: str = "arr_1") -> None:
    arrays: dict[str, Any] = {"arr_0": samples, name: labels}
    with atomic_write(path) as part, part.open("wb") as file:
        np.savez(file, **arrays)


def read_samples(path: Path) -> tuple[Samples, Labels | None]:
    """The samples of ``path``, and their labels if it has them; UserError if it holds no samples."""
    arrays = _read(path, "samples arr_0", "arr_0", "arr_1")
    samples, labels = arrays["arr_0"], arrays.get("arr_1")
    if samples.dtype != np.float32 or not samples.ndim or not samples.size:
        _check_images(path, samples, ", or float32 [N, ...] of samples that are no images")
    if labels is not None:
        is_right = labels.shape == (len(samples),) and labels.dtype.kind in "iu"
        is_right = is_right and bool(labels.min() >= -(2**31) and labels.max() < 2**31)
        _check(path, "arr_1", labels, is_right, f"integers below 2147483648 [{len(samples)}]")
    return samples, None if labels is None else labels.astype(np.int64)


def read_reference(path: Path) -> Reference:
    """The images and statistics of ``path``; UserError if it holds neither."""
    expected = "statistics (mu and sigma), images (arr_0), or both"
    arrays = _read(path, expected, "arr_0", "mu", "ref_mu", "sigma", "ref_sigma", "mu_s", "sigma_s")
    if "arr_0" in arrays:
        _check_images(path, arrays["arr_0"])
    statistics = _gaussian(path, arrays, "mu", "sigma") or _gaussian(path, arrays, "ref_mu", "ref_sigma")
    return Reference(arrays.get("arr_0"), statistics, _gaussian(path, arrays, "mu_s", "sigma_s"))


def _read(path: Path, expected: str, *keys: str) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    with explained(f"{path} cannot be read as an .npz file"):
        if not is_zipfile(path):
            raise UserError("expected a zip archive of arrays, as numpy.savez writes it")
        with np.load(path, allow_pickle=False, max_header_size=MOST_HEADER) as archive:
            size = sum(entry.file_size for entry in archive.zip.infolist())
            if size > MOST_BYTES:
                raise UserError(f"its arrays take {size} bytes, expected at most {MOST_BYTES} on this machine")
            names = archive.files
            arrays = {key: np.asarray(archive[key]) for key in names if key in keys}
    if not arrays.keys() & {"arr_0", "mu", "ref_mu"}:
        raise UserError(f"{path} holds {', '.join(names) or 'nothing'}, expected {expected}")
    return arrays


def _gaussian(path: Path, arrays: dict[str, NDArray[Any]], mean_key: str, covariance_key: str) -> Gaussian | None:
    if mean_key not in arrays:
        return None
    if covariance_key not in arrays:
        raise UserError(f"{path} holds {mean_key}, but no {covariance_key}")
    for rank, key in enumerate((mean_key, covariance_key), start=1):
        values, shape = arrays[key], rank * (arrays[mean_key].size,)
        is_right = values.shape == shape and values.size > 0 and values.dtype.kind == "f"
        is_right = is_right and bool((np.abs(values) < 1e30).all())  # Products of greater ones could overflow.
        _check(path, key, values, is_right, "finite floats, mu [D] and sigma [D, D]")
    return Gaussian(arrays[mean_key].astype(np.float64), arrays[covariance_key].astype(np.float64))


def _check_images(path: Path, images: NDArray[Any], otherwise: str = "") -> None:
    is_right = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] in (1, 3) and images.size > 0
    _check(path, "arr_0", images, is_right, f"uint8 [N, H, W, C] of 1 or 3 channels{otherwise}")


def _check(path: Path, key: str, values: NDArray[Any], is_right: bool, expected: str) -> None:
    if not is_right:
        raise UserError(f"{path}: {key} is {values.dtype} {list(values.shape)}, expected {expected}")
