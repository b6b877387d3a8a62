"""IDX files, the format of MNIST and Fashion-MNIST: 28 × 28 grey images."""

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..config.schema import DataConfig
from ..errors import UserError
from ..utils.npy import DEFLATE
from .dataset import Dataset
from .image_split import ArrayImages, ImageTransform

UINT8 = 8  # the format's code of the only type these data sets use
MOST_BYTES = 2**31  # of one file's values; the training images of MNIST are 47 MB
MOST_DIMENSIONS = 4

IMAGES, LABELS = "{}-images-idx3-ubyte", "{}-labels-idx1-ubyte"
TRAIN, TEST = "train", "t10k"


@dataclass(frozen=True)
class IdxFiles:
    """A data set published as IDX files: its classes and where it is looked for."""

    class_names: tuple[str, ...]
    folders: tuple[str, ...]
    remedy: str  # what to do where it is in none of the folders


MNIST = IdxFiles(
    class_names=tuple(str(digit) for digit in range(10)),
    folders=("data/mnist", "data/MNIST/raw", "/usr/share/datasets/mnist"),
    remedy="set data.path to the folder that holds them",
)
FASHION_MNIST = IdxFiles(
    class_names=(
        "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    ),
    folders=("data/fashion_mnist", "data/FashionMNIST/raw", "/usr/share/datasets/fashion-mnist"),
    remedy="install the Debian package dataset-fashion-mnist, or set data.path to the folder that holds them",
)  # fmt: skip


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
            magic = file.read(4)
            if magic[:3] != bytes([0, 0, UINT8]) or len(magic) < 4:
                raise ValueError("it does not begin as one of unsigned bytes does")
            sizes = file.read(4 * magic[3])
            if not 1 <= magic[3] <= MOST_DIMENSIONS or len(sizes) < 4 * magic[3]:
                raise ValueError(f"its header ends before its {magic[3]} sizes, or they are not 1 to {MOST_DIMENSIONS}")
            shape = np.frombuffer(sizes, ">u4").tolist()
            size = math.prod(shape)
            if size > MOST_BYTES:
                raise ValueError(f"its header speaks of {size} values, expected at most {MOST_BYTES}")
            most = path.stat().st_size * (DEFLATE if path.suffix == ".gz" else 1)
            if size > most:
                raise ValueError(f"its header speaks of {size} values, it holds at most {most}")
            values = np.frombuffer(file.read(size + 1), np.uint8)
            if len(values) != size:
                found = "more" if len(values) > size else len(values)
                raise ValueError(f"its header speaks of {size} values, it holds {found}")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path} cannot be read as an IDX file: {error}") from error
    return values.reshape(shape)


def _load(files: IdxFiles, config: DataConfig, seed: int) -> Dataset:
    folder = _find(files, config)
    arrays = {split: _read_split(folder, split, len(files.class_names)) for split in (TRAIN, TEST)}
    own_size = arrays[TRAIN][0].shape[1:]
    if own_size[0] != own_size[1] and config.image_size is None:
        raise UserError(f"the images in {folder} are {own_size[0]} × {own_size[1]}: set data.image_size")
    transform = ImageTransform(config.image_size or own_size[0], config.flip, config.crop, seed)
    return Dataset(
        name=config.name,
        train=ArrayImages(*arrays[TRAIN], transform),
        test=ArrayImages(*arrays[TEST], transform),
        class_names=files.class_names,
        sample_shape=(1, transform.size, transform.size),
    )


def _find(files: IdxFiles, config: DataConfig) -> Path:
    """The folder that has all four files."""
    folders = [Path(folder) for folder in ((config.path,) if config.path else files.folders)]
    names = [name.format(split) for split in (TRAIN, TEST) for name in (IMAGES, LABELS)]
    for folder in folders:
        if all(_file(folder, name) for name in names):
            return folder
    looked = " or ".join(map(str, folders))
    raise UserError(f"data.name is {config.name}, but {', '.join(names)} (or .gz) are not in {looked}: {files.remedy}")


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_split(folder: Path, split: str, num_classes: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
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
