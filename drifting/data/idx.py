"""IDX files, the format of MNIST and Fashion-MNIST: 28 × 28 grey images."""

import gzip
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..config.schema import DataConfig
from ..errors import UserError, reason
from .dataset import Dataset
from .image_split import image_dataset

UINT8 = 8  # The format's code of the only type that these data sets use.
MOST_BYTES = 2**30  # The training images of MNIST have 47 MB, uncompressed.
MOST_DIMENSIONS = 4

IMAGES, LABELS = "{}-images-idx3-ubyte", "{}-labels-idx1-ubyte"
TRAIN, TEST = "train", "t10k"


class IdxFiles(NamedTuple):
    """A data set published as IDX files: its classes, where it is looked for, and what to do where it is not there."""

    class_names: tuple[str, ...]
    folders: tuple[str, ...]
    remedy: str


MNIST = IdxFiles(
    tuple(str(digit) for digit in range(10)),
    ("data/mnist", "data/MNIST/raw", "/usr/share/datasets/mnist"),
    "set data.path to the folder that holds them",
)
FASHION_MNIST = IdxFiles(
    ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ("data/fashion_mnist", "data/FashionMNIST/raw", "/usr/share/datasets/fashion-mnist"),
    "install the Debian package dataset-fashion-mnist, or set data.path to the folder that holds them",
)


def load_mnist(config: DataConfig, seed: int = 0) -> Dataset:
    """MNIST: 60,000 training and 10,000 test images."""
    return _load(MNIST, config, seed)


def load_fashion_mnist(config: DataConfig, seed: int = 0) -> Dataset:
    """Fashion-MNIST: 60,000 training and 10,000 test images."""
    return _load(FASHION_MNIST, config, seed)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes, which may be compressed (``.gz``).

    Raises:
        UserError: it is no such file, holds another type, more than ``MOST_BYTES``, or not what its header says.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it holds more than {MOST_BYTES} bytes")
        if content[:3] != bytes([0, 0, UINT8]) or not 1 <= content[3] <= MOST_DIMENSIONS:
            raise ValueError(f"it does not begin as one of unsigned bytes, of up to {MOST_DIMENSIONS} dimensions, does")
        shape = np.frombuffer(content, ">u4", content[3], offset=4).tolist()
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
        if math.prod(shape) != len(values):
            raise ValueError(f"its header speaks of {math.prod(shape)} values, it holds {len(values)}")
        return values.reshape(shape)
    except Exception as error:  # A damaged file raises errors of many classes.
        raise UserError(f"{path} cannot be read as an IDX file: {reason(error)}") from error


def _load(files: IdxFiles, config: DataConfig, seed: int) -> Dataset:
    folders = [Path(folder) for folder in ((config.path,) if config.path else files.folders)]
    names = [name.format(split) for split in (TRAIN, TEST) for name in (IMAGES, LABELS)]
    folder = next((folder for folder in folders if all(_file(folder, name) for name in names)), None)
    if folder is None:
        looked = " or ".join(map(str, folders))
        raise UserError(
            f"data.name is {config.name}, but {', '.join(names)} (or .gz) are not in {looked}: {files.remedy}"
        )
    train, test = (_read_split(folder, split, len(files.class_names)) for split in (TRAIN, TEST))
    height, width = train[0].shape[1:]
    if height != width and config.image_size is None:
        raise UserError(f"the images in {folder} are {height} × {width}: set data.image_size")
    return image_dataset(config, seed, train, test, files.class_names, 1, height)


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_split(folder: Path, split: str, num_classes: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images ``[N, H, W]`` and labels ``[N]``."""
    paths = [_file(folder, name.format(split)) for name in (IMAGES, LABELS)]
    images, labels = (read_idx(path) for path in paths if path is not None)
    if images.ndim != 3 or labels.shape != images.shape[:1] or not images.size:
        raise UserError(
            f"{paths[0]} holds {list(images.shape)} values and {paths[1]} {list(labels.shape)}, expected [N, H, W] "
            "and [N]"
        )
    if labels.max() >= num_classes:
        raise UserError(f"{paths[1]} holds the label {labels.max()}, expected labels from 0 to {num_classes - 1}")
    return images, labels
