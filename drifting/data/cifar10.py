"""CIFAR-10's "python version" (https://www.cs.toronto.edu/~kriz/cifar.html): 32 × 32 RGB images of ten classes."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config.schema import DataConfig
from ..errors import UserError, reason
from .dataset import Dataset
from .image_split import image_dataset

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN = [f"data_batch_{number}" for number in range(1, 6)]
TEST = ["test_batch"]
SIZE = 32
ROW = 3 * SIZE * SIZE  # The bytes of an image: channels, rows, columns.
MOST_BYTES = 64 * 2**20  # The published files have 31 MB.
FOLDERS = ("data/cifar10", "data/cifar-10-batches-py")

REFUSED = (pickle.BYTEARRAY8[0], pickle.DUP[0])  # Instructions of pickles that no image needs.


def load_cifar10(config: DataConfig, seed: int = 0) -> Dataset:
    """CIFAR-10: 50,000 training and 10,000 test images."""
    folders = [Path(folder) for folder in ((config.path,) if config.path else FOLDERS)]
    folder = next((f for f in folders if all((f / name).is_file() for name in TRAIN + TEST)), None)
    if folder is None:
        raise UserError(
            f"data.name is cifar10, but data_batch_1 to 5 and test_batch are not in {' or '.join(map(str, folders))}: "
            "unpack cifar-10-python.tar.gz of www.cs.toronto.edu/~kriz/cifar.html, and set data.path to its folder"
        )
    return image_dataset(config, seed, _read_split(folder, TRAIN), _read_split(folder, TEST), CLASS_NAMES, 3, SIZE)


class Bytes:
    """Stands for an array of bytes and for its dtype in a pickle; numpy itself may crash on damaged ones."""

    array: NDArray[np.uint8] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if len(state) == 5:  # A dtype has more, which does not matter for bytes.
            _, shape, _, column_order, content = state
            self.array = np.frombuffer(content, np.uint8).reshape(shape, order="F" if column_order else "C")


def _dtype(name: str | bytes, *_: Any) -> Bytes:
    if name not in ("u1", b"u1"):
        raise pickle.UnpicklingError(f"an array of type {name!r:.80}, expected bytes")
    return Bytes()


PIECES: dict[str, Any] = {  # What the pickle of an array refers to, and what stands for it.
    "numpy.core.multiarray._reconstruct": lambda *_: Bytes(),
    "numpy._core.multiarray._reconstruct": lambda *_: Bytes(),
    "numpy.ndarray": Bytes,
    "numpy.dtype": _dtype,
    "_codecs.encode": lambda text, _: text.encode("latin1"),  # Python 3 writes bytes for Python 2 in this way.
}


class Memo(dict[int, Any]):
    """The values that a pickle uses again. Nested values that hold each other twice would take 2**depth steps."""

    def __getitem__(self, key: int) -> Any:
        if isinstance(value := super().__getitem__(key), (tuple, list, dict, set, frozenset)):
            raise pickle.UnpicklingError(f"uses a {type(value).__name__} twice, which no image needs")
        return value


class ArrayUnpickler(pickle._Unpickler):
    """Reads plain data and arrays. A pickle can call whatever it refers to, so everything else is refused.

    The unpickler in C takes as much memory as a few bytes of a file ask it to; this one in Python only for bytearrays.
    """

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code not in REFUSED}

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="bytes")
        self.memo = Memo()

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in PIECES:
            raise pickle.UnpicklingError(f"refers to {module}.{name}, which no image needs")
        return PIECES[f"{module}.{name}"]


def read_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images ``[N, 32, 32, 3]`` and labels ``[N]`` of one file.

    Raises:
        UserError: it is too large, refers to anything but plain data, or does not hold images and labels.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes, expected at most {MOST_BYTES}")
        batch = ArrayUnpickler(io.BytesIO(path.read_bytes())).load()
        content = batch if isinstance(batch, dict) else {}
        pixels, numbers = getattr(content.get(b"data"), "array", None), content.get(b"labels")
        if pixels is None or type(numbers) is not list or {*map(type, numbers)} != {int}:
            raise ValueError("expected an array of bytes as data and a list of labels")
        labels = np.array(numbers, dtype=np.int64)
        if pixels.shape != (len(labels), ROW):
            raise ValueError(f"{list(pixels.shape)} bytes as data, expected [{len(labels)}, {ROW}] for its labels")
        if labels.min() < 0 or labels.max() >= len(CLASS_NAMES):
            raise ValueError(f"labels from {labels.min()} to {labels.max()}, expected 0 to 9")
    except Exception as error:  # A damaged pickle raises errors of any class.
        raise UserError(f"{path} is no batch of CIFAR-10 ({reason(error)})") from error
    return pixels.reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1), labels


def _read_split(folder: Path, names: list[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images, labels = zip(*(read_batch(folder / name) for name in names), strict=True)
    return np.concatenate(images), np.concatenate(labels)
