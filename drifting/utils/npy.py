"""Arrays in numpy's ``.npy`` format, alone or in ``.npz`` archives, that take no more memory than their file holds.

numpy's own reader makes the array that a header speaks of before it looks whether the file has that many bytes, and
parses the header as Python, which takes more than ten seconds for some damaged ones.
"""

import math
import os
import re
from pathlib import Path
from typing import IO, Any
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.typing import NDArray

MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
MOST_BYTES = 3 * MEMORY // 4  # of one array
DEFLATE = 1032  # what compression can make out of a byte, at most

MAGIC = b"\x93NUMPY\x01\x00"
HEADER = re.compile(
    rb"\{'descr': '(?P<dtype>[^']{0,20})', 'fortran_order': (?P<fortran>True|False), "
    rb"'shape': \((?P<shape>(?:\d{1,19}, ?)*(?:\d{1,19})?)\),? ?\}[ \n]*"
)
DTYPE = re.compile("[|]b1|[|][iu]1|[<>][iu][248]|[<>]f[248]")
MOST_DIMENSIONS = 32

Header = tuple[tuple[int, ...], bool, np.dtype[Any]]  # shape, whether in Fortran's order, dtype


def read_header(file: IO[bytes], size: int) -> Header:
    """The header of an array that takes ``size`` bytes in ``file``, header included, where they begin.

    Raises:
        ValueError: it is no ``.npy`` file of numbers, or not of that many.
    """
    start = file.read(len(MAGIC) + 2)
    text = file.read(int.from_bytes(start[len(MAGIC) :], "little"))
    header = HEADER.fullmatch(text)
    if not start.startswith(MAGIC) or header is None:
        raise ValueError("it does not begin as an array in version 1.0 of numpy's format does")
    dtype = header["dtype"].decode("latin1")
    if dtype.endswith("O"):
        raise ValueError("Object arrays would have to be unpickled")
    if not DTYPE.fullmatch(dtype):
        raise ValueError(f"values of type {dtype!r}, expected numbers")
    shape = tuple(int(count) for count in header["shape"].replace(b" ", b"").split(b",") if count)
    if len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"{len(shape)} dimensions, expected at most {MOST_DIMENSIONS}")
    expected, held = math.prod(shape) * np.dtype(dtype).itemsize, size - len(start) - len(text)
    if expected != held:
        raise ValueError(f"its header speaks of {expected} bytes, it holds {held}")
    return shape, header["fortran"] == b"True", np.dtype(dtype)


class ArrayArchive:
    """The arrays of the ``.npz`` file ``path``, a regular file, by name; a context manager.

    Raises:
        ValueError: it is no such file (here), an array cannot be read (in ``[]``); the message says why.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._zip = ZipFile(path)
        except OSError:
            raise
        except Exception as error:  # of a broken directory, zipfile makes errors of many classes
            raise ValueError(f"which cannot be opened: {_one_line(error)}") from error
        names = self._zip.namelist()
        if len(set(names)) < len(names):
            raise ValueError("which has two entries of one name")
        self.names = [name.removesuffix(".npy") for name in names]

    def __enter__(self) -> "ArrayArchive":
        return self

    def __exit__(self, *error: object) -> None:
        self._zip.close()

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> NDArray[Any]:
        entry = self._zip.getinfo(f"{name}.npy")
        if entry.file_size > min(MOST_BYTES, DEFLATE * entry.compress_size):
            raise ValueError(f"{entry.file_size} bytes out of {entry.compress_size}, expected at most {MOST_BYTES}")
        try:
            with self._zip.open(entry) as file:
                shape, fortran, dtype = read_header(file, entry.file_size)
                array = np.empty(shape, dtype, order="F" if fortran else "C")
                _fill(array.reshape(-1, order="A").view(np.uint8), file)
        except ValueError:
            raise
        except Exception as error:  # damaged compression, unknown compression, a password, not enough memory
            raise ValueError(_one_line(error)) from error
        return array


def _fill(target: NDArray[np.uint8], file: IO[bytes]) -> None:
    """Read ``target [bytes]`` and the end of ``file``, at which its checksum is compared."""
    start = 0
    while start < len(target):
        part = file.read(min(len(target) - start, 2**20))
        if not part:
            raise BadZipFile("the file is cut short")
        target[start : start + len(part)] = np.frombuffer(part, np.uint8)
        start += len(part)
    if file.read(1):
        raise BadZipFile("the file goes on behind the array")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
