"""Trees of arrays in the msgpack format of ``flax.serialization``, read and written without flax.

Arrays are msgpack extensions of type 1 around (shape, dtype name, bytes); those above 2³⁰ bytes are split in chunks,
dictionaries marked ``__msgpack_chunked_array__``. Nothing is unpickled: a file can hold numbers, text and arrays only.
"""

import math
import mmap
from pathlib import Path
from typing import Any

import msgpack
import torch
from torch import Tensor

from ..utils.files import atomic_write

ARRAY, SCALAR = 1, 3  # extension types; SCALAR is a numpy scalar, written like an array
CHUNKED = "__msgpack_chunked_array__"
CHUNK_BYTES = 2**30
MOST_DIMENSIONS = 32  # of an array; no other lists are in these files
DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}


def read_arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of the file by path in the tree, such as ``encoder/conv1/kernel``.

    Raises:
        ValueError: not a msgpack file of a tree of arrays, or an array whose bytes do not fit its shape and dtype.
        OSError: the file cannot be read.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            # No length in it may exceed the file's, of which lists are made before their items are there.
            tree = msgpack.unpackb(
                content, ext_hook=_unpack_array, object_pairs_hook=_unique, max_array_len=MOST_DIMENSIONS
            )
    except (msgpack.UnpackException, ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{path} is no tree of arrays in flax's msgpack format: {error}") from error
    arrays: dict[str, Tensor] = {}
    pending: list[tuple[str, Any]] = [("", tree)]
    while pending:
        name, node = pending.pop()
        if isinstance(node, dict) and CHUNKED in node:
            node = _join_chunks(name, node)
        if isinstance(node, dict):
            pending += [(f"{name}/{key}" if name else str(key), child) for key, child in node.items()]
        elif isinstance(node, Tensor) and name not in arrays:
            arrays[name] = node
        elif isinstance(node, Tensor):
            raise ValueError(f"{path}: two arrays are called {name}")
        else:
            raise ValueError(f"{path}: {name or 'all of it'} is {type(node).__name__}, expected arrays in dictionaries")
    return arrays


def write_arrays(path: Path, arrays: dict[str, Tensor]) -> None:
    """Write arrays by their paths so that ``flax.serialization.msgpack_restore`` reads them."""
    tree: dict[str, Any] = {}
    for name in sorted(arrays, key=lambda name: name.split("/")):
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = arrays[name]
    with atomic_write(path) as part, part.open("wb") as file:
        _write_node(file, msgpack.Packer(), tree)


def _write_node(file: Any, packer: msgpack.Packer, node: Any) -> None:
    """One array at a time, so that the file is never in memory as a whole."""
    if isinstance(node, Tensor) and node.numel() * node.element_size() > CHUNK_BYTES:
        chunks = node.contiguous().flatten().split(CHUNK_BYTES // node.element_size())
        parts = {str(index): chunk for index, chunk in enumerate(chunks)}
        shape = {str(index): size for index, size in enumerate(node.shape)}
        node = {CHUNKED: True, "shape": shape, "chunks": parts}
    if isinstance(node, dict):
        file.write(packer.pack_map_header(len(node)))
        for key, child in node.items():
            file.write(packer.pack(key))
            _write_node(file, packer, child)
    elif isinstance(node, Tensor):
        content = node.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        name = str(node.dtype).removeprefix("torch.")
        file.write(packer.pack(msgpack.ExtType(ARRAY, packer.pack((tuple(node.shape), name, content)))))
    else:
        file.write(packer.pack(node))


def _unpack_array(code: int, data: bytes) -> Tensor:
    if code not in (ARRAY, SCALAR):
        raise ValueError(f"extension type {code}, expected arrays ({ARRAY}) and scalars ({SCALAR}) only")
    shape, name, content = msgpack.unpackb(data, max_array_len=MOST_DIMENSIONS)
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"an array of dtype {name!r}, expected one of: {', '.join(DTYPES)}")
    dtype = DTYPES[name]
    _check_shape(shape)
    if not isinstance(content, bytes) or len(content) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of shape {shape} and dtype {name} does not have {len(content)} bytes")
    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype).view(shape)


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a dictionary has a key twice")
    return content


def _join_chunks(name: str, node: dict) -> Tensor:
    try:
        shape = [node["shape"][str(index)] for index in range(len(node["shape"]))]
        _check_shape(shape)
        chunks = [node["chunks"][str(index)] for index in range(len(node["chunks"]))]
        if len({chunk.dtype for chunk in chunks}) > 1:
            raise ValueError("they are of several dtypes")
        return torch.cat(chunks).view(shape)
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"the chunks of {name} do not make up an array: {error}") from error


def _check_shape(shape: Any) -> None:
    if not isinstance(shape, (list, tuple)) or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise ValueError(f"an array of shape {shape!r}, expected whole numbers")
