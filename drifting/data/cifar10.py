"""CIFAR-10's "python version" (https://www.cs.toronto.edu/~kriz/cifar.html): 32 × 32 RGB images of ten classes.

Its files are pickles, and a pickle can run any code: :mod:`drifting.data.plain_pickle` reads them without.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..config.schema import DataConfig
from ..errors import UserError
from .dataset import Dataset
from .image_split import ArrayImages, ImageTransform
from .plain_pickle import Array, read_plain

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN = [f"data_batch_{number}" for number in range(1, 6)]
TEST = ["test_batch"]
SIZE = 32
ROW = 3 * SIZE * SIZE  # bytes of an image: channels, rows, columns
MOST_BYTES = 64 * 2**20  # of a file; the published ones are 31 MB
FOLDERS = ("data/cifar10", "data/cifar-10-batches-py")


def load_cifar10(config: DataConfig, seed: int = 0) -> Dataset:
    """CIFAR-10: 50,000 training and 10,000 test images."""
    folders = [Path(folder) for folder in ((config.path,) if config.path else FOLDERS)]
    folder = next((f for f in folders if all((f / name).is_file() for name in TRAIN + TEST)), None)
    if folder is None:
        raise UserError(
            f"data.name is cifar10, but data_batch_1 to 5 and test_batch are not in {' or '.join(map(str, folders))}: "
            "unpack cifar-10-python.tar.gz of www.cs.toronto.edu/~kriz/cifar.html, and set data.path to its folder"
        )
    transform = ImageTransform(config.image_size or SIZE, config.flip, config.crop, seed)
    return Dataset(
        name="cifar10",
        train=ArrayImages(*_read_split(folder, TRAIN), transform),
        test=ArrayImages(*_read_split(folder, TEST), transform),
        class_names=CLASS_NAMES,
        sample_shape=(3, transform.size, transform.size),
    )


def read_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images ``[N, 32, 32, 3]`` and labels ``[N]`` of one file.

    Raises:
        UserError: it is too large, refers to anything but plain data, or does not hold images and labels.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes, expected at most {MOST_BYTES}")
        batch = read_plain(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no batch of CIFAR-10: {error}") from error
    content = batch if isinstance(batch, dict) else {}
    array, numbers = content.get(b"data"), content.get(b"labels")
    if not isinstance(array, Array) or not isinstance(numbers, list) or not all(type(n) is int for n in numbers):
        raise UserError(f"{path} is no batch of CIFAR-10: expected an array of bytes as data and a list of labels")
    pixels, labels = array.values, np.array(numbers, dtype=np.int64)
    if pixels.ndim != 2 or pixels.shape[1] != ROW or labels.shape != pixels.shape[:1] or not len(labels):
        raise UserError(
            f"{path} holds images {list(pixels.shape)} and labels {list(labels.shape)}, expected [N, {ROW}] and [N]"
        )
    if not (0 <= labels.min() and labels.max() < len(CLASS_NAMES)):
        raise UserError(f"{path} holds labels from {labels.min()} to {labels.max()}, expected 0 to 9")
    return pixels.reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1), labels


def _read_split(folder: Path, names: list[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images, labels = zip(*(read_batch(folder / name) for name in names), strict=True)
    return np.concatenate(images), np.concatenate(labels)
