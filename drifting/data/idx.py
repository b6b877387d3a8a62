"""IDX files, the format of MNIST and Fashion-MNIST: 28 × 28 grey images."""

import gzip
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config.schema import DataConfig
from ..errors import UserError, explained
from .dataset import Dataset
from .image_split import find_files, image_dataset

MOST_BYTES = 2**30  # The training images of MNIST have 47 MB, uncompressed.
UINT8, MOST_DIMENSIONS = 8, 4  # These data sets have unsigned bytes only, of which 8 is the format's code.
FILES = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


class IdxFiles(NamedTuple):
    """A data set published as IDX files: its classes, where it is looked for, and what to do where it is not there."""

    class_names: tuple[str, ...]
    folders: tuple[str, ...]
    remedy: str

    def load(self, config: DataConfig, seed: int = 0) -> Dataset:
        """Load the data set, as published 60,000 training and 10,000 test images of 28 × 28 grey pixels."""
        files = find_files(config, self.folders, FILES, f"{', '.join(FILES)} (or .gz)", self.remedy)
        splits, most = [], len(self.class_names) - 1
        for images_file, labels_file in (files[:2], files[2:]):
            images, labels = read_idx(images_file), read_idx(labels_file)
            if images.ndim != 3 or labels.shape != images.shape[:1] or not images.size:
                held = f"{images_file} holds {list(images.shape)} values and {labels_file} {list(labels.shape)}"
                raise UserError(f"{held}, expected [N, H, W] and [N]")
            if labels.max() > most:
                raise UserError(f"{labels_file} holds the label {labels.max()}, expected labels from 0 to {most}")
            splits.append((images, labels))
        height, width = splits[0][0].shape[1:]
        if height != width and config.image_size is None:
            raise UserError(f"the images in {files[0]} are {height} × {width}: set data.image_size")
        return image_dataset(config, seed, splits, self.class_names, 1, height)


FOLDER = "set data.path to the folder that holds them"
MNIST = IdxFiles(tuple("0123456789"), ("data/mnist", "data/MNIST/raw", "/usr/share/datasets/mnist"), FOLDER)
FASHION_MNIST = IdxFiles(
    ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ("data/fashion_mnist", "data/FashionMNIST/raw", "/usr/share/datasets/fashion-mnist"),
    f"install the Debian package dataset-fashion-mnist, or {FOLDER}",
)


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, which may be compressed; raises UserError where it holds anything else."""
    with explained(f"{path} cannot be read as an IDX file"):
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
        values = values.reshape(shape)
    return values
