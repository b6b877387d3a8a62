"""Published data sets of small images: scikit-learn's digits, MNIST and Fashion-MNIST (IDX files), and CIFAR-10."""

import gzip
import io
import math
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn import datasets

from ..config.schema import DataConfig
from ..errors import UserError, explained
from .dataset import Dataset
from .image_split import image_dataset

NUM_TRAIN = 1297  # The other 500 of scikit-learn's digits are for testing.
DIGITS = tuple("0123456789")

MOST_IDX_BYTES = 2**30  # The training images of MNIST have 47 MB, uncompressed.
UINT8, MOST_DIMENSIONS = 8, 4  # These data sets have unsigned bytes only, of which 8 is the format's code.
IDX_FILES = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_FILES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
CIFAR10_SIZE = 32
CIFAR10_REMEDY = "unpack cifar-10-python.tar.gz of www.cs.toronto.edu/~kriz/cifar.html, and set data.path to its folder"
MOST_CIFAR10_BYTES = 64 * 2**20  # The published files have 31 MB.


def find_files(config: DataConfig, folders: tuple[str, ...], names: list[str], what: str, remedy: str) -> list[Path]:
    """Find files of those names, compressed (``.gz``) or not, in ``config.path`` or one of the usual ``folders``."""
    places = [Path(folder) for folder in ((config.path,) if config.path else folders)]
    for folder in places:
        files = [folder / name if (folder / name).is_file() else folder / f"{name}.gz" for name in names]
        if all(file.is_file() for file in files):
            return files
    raise UserError(f"data.name is {config.name}, but {what} are not in {' or '.join(map(str, places))}: {remedy}")


def load_digits(config: DataConfig | None = None, seed: int = 0) -> Dataset:
    """Load the digits, shuffled by ``default_rng(0)``: 1,297 training and 500 test images ``[1, 8, 8]`` in [-1, 1]."""
    digits = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = digits.images[order].astype(np.uint8), digits.target[order]
    splits = [(images[rows], labels[rows]) for rows in (slice(NUM_TRAIN), slice(NUM_TRAIN, None))]
    return image_dataset(config or DataConfig(), seed, splits, DIGITS, 1, 8, white=16)


class IdxFiles(NamedTuple):
    """A data set published as IDX files: its classes, where it is looked for, and what to do where it is not there."""

    class_names: tuple[str, ...]
    folders: tuple[str, ...]
    remedy: str

    def load(self, config: DataConfig, seed: int = 0) -> Dataset:
        """Load the data set, as published 60,000 training and 10,000 test images of 28 × 28 grey pixels."""
        files = find_files(config, self.folders, IDX_FILES, f"{', '.join(IDX_FILES)} (or .gz)", self.remedy)
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
MNIST = IdxFiles(DIGITS, ("data/mnist", "data/MNIST/raw", "/usr/share/datasets/mnist"), FOLDER)
FASHION_MNIST = IdxFiles(
    ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ("data/fashion_mnist", "data/FashionMNIST/raw", "/usr/share/datasets/fashion-mnist"),
    f"install the Debian package dataset-fashion-mnist, or {FOLDER}",
)


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, which may be compressed; raises UserError where it holds anything else."""
    with explained(f"{path} cannot be read as an IDX file"):
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MOST_IDX_BYTES + 1)
        if len(content) > MOST_IDX_BYTES:
            raise ValueError(f"it holds more than {MOST_IDX_BYTES} bytes")
        if content[:3] != bytes([0, 0, UINT8]) or not 1 <= content[3] <= MOST_DIMENSIONS:
            raise ValueError(f"it does not begin as one of unsigned bytes, of up to {MOST_DIMENSIONS} dimensions, does")
        shape = np.frombuffer(content, ">u4", content[3], offset=4).tolist()
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
        if math.prod(shape) != len(values):
            raise ValueError(f"its header speaks of {math.prod(shape)} values, it holds {len(values)}")
        values = values.reshape(shape)
    return values


def load_cifar10(config: DataConfig, seed: int = 0) -> Dataset:
    """Load CIFAR-10's "python version": 50,000 training and 10,000 test images of 32 × 32 RGB pixels."""
    folders = ("data/cifar10", "data/cifar-10-batches-py")
    files = find_files(config, folders, CIFAR10_FILES, "data_batch_1 to 5 and test_batch", CIFAR10_REMEDY)
    *batches, test = map(read_batch, files)
    images, labels = map(np.concatenate, zip(*batches, strict=True))
    return image_dataset(config, seed, [(images, labels), test], CIFAR10_CLASSES, 3, CIFAR10_SIZE)


class Array:
    """Stands for numpy's arrays and their dtypes in a pickle; numpy itself may crash where one is damaged."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if len(state) == 5:  # The state of a dtype is longer, and means nothing for bytes.
            _, shape, dtype, column_order, content = state
            if dtype.arguments[0] not in ("u1", b"u1"):
                raise pickle.UnpicklingError(f"an array of type {dtype.arguments[0]!r:.80}, expected bytes")
            self.pixels = np.frombuffer(content, np.uint8).reshape(shape, order="F" if column_order else "C")


PIECES: dict[str, Any] = {  # What the pickle of an array refers to, and what stands for it.
    "numpy.core.multiarray._reconstruct": Array, "numpy._core.multiarray._reconstruct": Array, "numpy.ndarray": Array,
    "numpy.dtype": Array, "_codecs.encode": lambda text, _: text.encode("latin1"),  # This is how Python 3 writes bytes.
}  # fmt: skip


class Memo(dict[int, Any]):
    """The values that a pickle uses again. Nested values that hold each other twice would take 2**depth steps."""

    def __getitem__(self, key: int) -> Any:
        if isinstance(value := super().__getitem__(key), (tuple, list, dict, set, frozenset)):
            raise pickle.UnpicklingError(f"uses a {type(value).__name__} twice, which no image needs")
        return value


class ArrayUnpickler(pickle._Unpickler):
    """Reads plain data and arrays, and refuses whatever else a pickle refers to, which it could call. The unpickler in
    C takes as much memory as a few bytes of a file ask it to; this one in Python only for bytearrays."""

    dispatch = pickle._Unpickler.dispatch | dict.fromkeys((pickle.BYTEARRAY8[0], pickle.DUP[0]))

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in PIECES:
            raise pickle.UnpicklingError(f"refers to {module}.{name}, which no image needs")
        return PIECES[f"{module}.{name}"]


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read images ``[N, 32, 32, 3]`` and labels ``[N]`` of one file; raises UserError where it holds anything else."""
    with explained(f"{path} is no batch of CIFAR-10"):
        if path.stat().st_size > MOST_CIFAR10_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes, expected at most {MOST_CIFAR10_BYTES}")
        unpickler: Any = ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes")
        unpickler.memo = Memo()
        batch = unpickler.load()
        content = batch if isinstance(batch, dict) else {}
        pixels, numbers = getattr(content.get(b"data"), "pixels", None), content.get(b"labels")
        if pixels is None or type(numbers) is not list or {*map(type, numbers)} != {int}:
            raise ValueError("expected an array of bytes as data and a list of labels")
        expected = (len(numbers), 3 * CIFAR10_SIZE**2)
        if pixels.shape != expected:
            raise ValueError(f"{list(pixels.shape)} bytes as data, expected {list(expected)} for its labels")
        if min(numbers) < 0 or max(numbers) >= len(CIFAR10_CLASSES):
            raise ValueError(f"labels from {min(numbers)} to {max(numbers)}, expected 0 to 9")
    return pixels.reshape(-1, 3, CIFAR10_SIZE, CIFAR10_SIZE).transpose(0, 2, 3, 1), np.array(numbers, np.int64)
