"""CIFAR-10's "python version" (https://www.cs.toronto.edu/~kriz/cifar.html), whose files are pickles."""

import pickletools
from pathlib import Path

import numpy as np

from ..config.schema import DataConfig
from ..errors import explained
from .dataset import Dataset
from .image_split import find_files, image_dataset

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FILES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
SIZE = 32
REMEDY = "unpack cifar-10-python.tar.gz of www.cs.toronto.edu/~kriz/cifar.html, and set data.path to its folder"
MOST_BYTES = 64 * 2**20  # The published files have 31 MB.


def load_cifar10(config: DataConfig, seed: int = 0) -> Dataset:
    """Load CIFAR-10's "python version": 50,000 training and 10,000 test images of 32 × 32 RGB pixels."""
    folders = ("data/cifar10", "data/cifar-10-batches-py")
    files = find_files(config, folders, FILES, "data_batch_1 to 5 and test_batch", REMEDY)
    *batches, test = map(read_batch, files)
    images, labels = map(np.concatenate, zip(*batches, strict=True))
    return image_dataset(config, seed, [(images, labels), test], CLASS_NAMES, 3, SIZE)


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read images ``[N, 32, 32, 3]`` and labels ``[N]`` of one file; raises UserError where it holds anything else.

    A pickle is instructions, which may call any function. None of them is carried out here: pixels are the longest text
    among them, and labels the numbers that follow the word "labels".
    """
    pixels, labels, text = b"", list[int](), b""
    with explained(f"{path} is no batch of CIFAR-10"):
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes, expected at most {MOST_BYTES}")
        for instruction, value, _ in pickletools.genops(path.read_bytes()):
            if isinstance(value, (bytes, str)) and value != "latin1":  # Python 3 writes that behind the bytes.
                text = value.encode("latin1") if isinstance(value, str) else value
                pixels = max(pixels, text, key=len)
            elif isinstance(value, int) and text == b"labels" and instruction.name.startswith("BININT"):
                labels.append(value)
        if not labels or len(pixels) != len(labels) * 3 * SIZE**2:
            expected = f"{3 * SIZE**2} bytes of pixels for each label"
            raise ValueError(f"it has {len(pixels)} bytes of pixels and {len(labels)} labels, expected {expected}")
        if min(labels) < 0 or max(labels) >= len(CLASS_NAMES):
            raise ValueError(f"labels from {min(labels)} to {max(labels)}, expected 0 to 9")
    images = np.frombuffer(pixels, np.uint8).reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1)
    return images, np.array(labels, np.int64)
