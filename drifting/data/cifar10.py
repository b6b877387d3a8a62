"""CIFAR-10's "python version" (https://www.cs.toronto.edu/~kriz/cifar.html): 32 × 32 RGB images of ten classes.

Its files are pickles, and a pickle can run any code. These are read by an unpickler that knows dictionaries, lists,
numbers, bytes and arrays of bytes, and refuses everything else.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cli import UserError
from .dataset import DataConfig, Dataset
from .image_split import ArrayImages, ImageTransform

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
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} has {path.stat().st_size} bytes, expected at most {MOST_BYTES}")
    try:
        with path.open("rb") as file:
            batch = _PlainUnpickler(file, encoding="bytes").load()
        pixels, labels = batch[b"data"].array, np.asarray(batch[b"labels"], dtype=np.int64)
    except Exception as error:  # on broken files, unpicklers raise errors of any class
        raise UserError(f"{path} is no batch of CIFAR-10: {type(error).__name__}: {error}") from error
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


class _PickledArray:
    """Stands in for numpy's array and its factory: takes over shape and bytes, and calls nothing of numpy's."""

    array: NDArray[np.uint8]

    def __init__(self, *arguments: Any) -> None:
        pass  # of numpy's factory: an empty array, filled by the state

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, column_order, values = state
        if not isinstance(dtype, _PickledDtype) or column_order:
            raise pickle.UnpicklingError("an array of another kind than rows of bytes")
        self.array = np.frombuffer(values, np.uint8).reshape(shape)


class _PickledDtype:
    """Stands in for numpy's dtype, of which only unsigned bytes are allowed."""

    def __init__(self, code: Any, *arguments: Any) -> None:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of type {code!r}, expected bytes")

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and the like, of no matter for bytes


def _encode_latin1(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into a pickle that Python 2 can read."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in encoding {encoding!r}")
    return text.encode("latin1")


class _PlainUnpickler(pickle.Unpickler):
    ALLOWED = {
        ("numpy", "dtype"): _PickledDtype,
        ("numpy", "ndarray"): _PickledArray,
        ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
        ("_codecs", "encode"): _encode_latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"refers to {module}.{name}, which no image needs")
        return self.ALLOWED[module, name]
