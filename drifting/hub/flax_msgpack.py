"""Read and write trees of arrays in the msgpack format of ``flax.serialization``, without flax.

Arrays are msgpack extensions of type 1 around (shape, dtype name, bytes); those above 2³⁰ bytes are split in chunks,
dictionaries marked ``__msgpack_chunked_array__``. Nothing is unpickled: a file can hold numbers, text and arrays only.
"""

import mmap
from pathlib import Path
from typing import Any

import msgpack
import torch
from torch import Tensor

from ..errors import UserError, reason
from ..utils.files import atomic_write

ARRAY, SCALAR = 1, 3  # These are extension types; SCALAR is a numpy scalar, written like an array.
CHUNKED = "__msgpack_chunked_array__"
CHUNK_BYTES = 2**30
MOST_DIMENSIONS = 32  # Shapes are the only lists in these files.
DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}


def read_arrays(path: Path) -> dict[str, Tensor]:
    """Read the arrays of a file; their names are paths in its tree, such as ``encoder/conv1/kernel``.

    Raises:
        UserError: the file cannot be read, or is no tree of arrays whose bytes fit their shapes and dtypes.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            # Without the limit, a file of nested lists that announce a million items each would fill the memory.
            return _flatten(msgpack.unpackb(content, ext_hook=_unpack_array, max_array_len=MOST_DIMENSIONS))
    except Exception as error:  # msgpack, mmap and torch raise errors of many classes.
        raise UserError(f"{path} is no tree of arrays in flax's msgpack format: {reason(error)}") from error


def _flatten(tree: Any) -> dict[str, Tensor]:
    arrays: dict[str, Tensor] = {}
    pending: list[tuple[str, Any]] = [("", tree)]
    while pending:
        name, node = pending.pop()
        if isinstance(node, dict) and CHUNKED in node:
            node = _join_chunks(node)
        if isinstance(node, dict):
            pending += [(f"{name}/{key}" if name else str(key), child) for key, child in node.items()]
        elif not isinstance(node, Tensor):
            raise UserError(f"{name or 'all of it'} is {type(node).__name__}, expected arrays in dictionaries")
        elif name in arrays:
            raise UserError(f"two arrays are called {name}")
        else:
            arrays[name] = node
    return arrays


def _unpack_array(code: int, data: bytes) -> Tensor:
    if code not in (ARRAY, SCALAR):
        raise UserError(f"extension type {code}, expected arrays ({ARRAY}) and scalars ({SCALAR}) only")
    shape, name, content = msgpack.unpackb(data, max_array_len=MOST_DIMENSIONS)
    if name not in DTYPES:
        raise UserError(f"an array of dtype {name!r}, expected one of: {', '.join(DTYPES)}")
    dtype = DTYPES[name]
    values = torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)
    return values.reshape(shape)


def _join_chunks(node: dict[str, Any]) -> Tensor:
    shape, chunks = ([node[key][str(index)] for index in range(len(node[key]))] for key in ("shape", "chunks"))
    if len({chunk.dtype for chunk in chunks}) > 1:
        raise UserError("the chunks of an array are of several dtypes")
    return torch.cat(chunks).reshape(shape)


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
    """Write one array at a time, so that the file is never in memory as a whole."""
    if isinstance(node, Tensor) and node.nbytes > CHUNK_BYTES:
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
