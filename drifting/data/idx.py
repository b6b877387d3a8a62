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
FILES = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


class IdxFiles(NamedTuple):
    """A data set published as IDX files: its classes, where it is looked for, and what to do where it is not there."""

    class_names: tuple[str, ...]
    folders: tuple[str, ...]
    remedy: str

    def load(self, config: DataConfig, seed: int = 0) -> Dataset:
        """The data set; 60,000 training and 10,000 test images are published."""
        folders = [Path(folder) for folder in ((config.path,) if config.path else self.folders)]
        found = [[_file(folder / name) for name in FILES] for folder in folders]
        files = next(([file for file in files if file] for files in found if all(files)), None)
        if files is None:
            raise UserError(
                f"data.name is {config.name}, but {', '.join(FILES)} (or .gz) are not in "
                f"{' or '.join(map(str, folders))}: {self.remedy}"
            )
        train, test = (_read_split(files[at], files[at + 1], len(self.class_names)) for at in (0, 2))
        height, width = train[0].shape[1:]
        if height != width and config.image_size is None:
            raise UserError(f"the images in {files[0]} are {height} × {width}: set data.image_size")
        return image_dataset(config, seed, train, test, self.class_names, 1, height)


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


def _file(path: Path) -> Path | None:
    return next((file for file in (path, path.with_name(f"{path.name}.gz")) if file.is_file()), None)


def _read_split(
    images_file: Path, labels_file: Path, num_classes: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images ``[N, H, W]`` and labels ``[N]``."""
    images, labels = read_idx(images_file), read_idx(labels_file)
    if images.ndim != 3 or labels.shape != images.shape[:1] or not images.size:
        raise UserError(
            f"{images_file} holds {list(images.shape)} values and {labels_file} {list(labels.shape)}, expected "
            "[N, H, W] and [N]"
        )
    if labels.max() >= num_classes:
        raise UserError(f"{labels_file} holds the label {labels.max()}, expected labels from 0 to {num_classes - 1}")
    return images, labels
