"""CIFAR-10's "python version" (https://www.cs.toronto.edu/~kriz/cifar.html), whose files are pickles."""

import io
import pickle
from pathlib import Path
from typing import Any

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
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes, expected at most {MOST_BYTES}")
        unpickler: Any = ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes")
        unpickler.memo = Memo()
        batch = unpickler.load()
        content = batch if isinstance(batch, dict) else {}
        pixels, numbers = getattr(content.get(b"data"), "pixels", None), content.get(b"labels")
        if pixels is None or type(numbers) is not list or {*map(type, numbers)} != {int}:
            raise ValueError("expected an array of bytes as data and a list of labels")
        expected = (len(numbers), 3 * SIZE**2)
        if pixels.shape != expected:
            raise ValueError(f"{list(pixels.shape)} bytes as data, expected {list(expected)} for its labels")
        if min(numbers) < 0 or max(numbers) >= len(CLASS_NAMES):
            raise ValueError(f"labels from {min(numbers)} to {max(numbers)}, expected 0 to 9")
    return pixels.reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1), np.array(numbers, np.int64)
