"""Read and write trees of arrays in the msgpack format of ``flax.serialization``, without flax. Nothing is unpickled.
Arrays are msgpack extensions of type 1 around (shape, dtype name, bytes); those above 2³⁰ bytes are split in chunks."""

import mmap
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import torch
from torch import Tensor

from ..errors import UserError, explained, shown
from ..utils.files import atomic_write

ARRAY, SCALAR = 1, 3  # These are extension types; SCALAR is a numpy scalar, written like an array.
CHUNKED, CHUNK_BYTES = "__msgpack_chunked_array__", 2**30
MOST_DIMENSIONS = 32  # Shapes are the only lists in these files.
NAMES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool"
DTYPES = {name: getattr(torch, name) for name in NAMES.split()}


def read_arrays(path: Path) -> dict[str, Tensor]:
    """Read the arrays of a file; their names are paths in its tree, such as ``encoder/conv1/kernel``."""
    with explained(f"{path} is no tree of arrays in flax's msgpack format"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            # Without the limit, a file of nested lists that announce a million items each would fill the memory.
            limits = {"max_array_len": MOST_DIMENSIONS}
            tree = msgpack.unpackb(content, ext_hook=_unpack_array, object_hook=_flatten, **limits)
        arrays = tree if isinstance(tree, dict) else {"all of it": tree}
        for name, array in arrays.items():
            if not isinstance(array, Tensor):
                raise UserError(f"{shown(name)} is {type(array).__name__}, expected arrays in dictionaries")
    return arrays


def _unpack_array(code: int, data: bytes) -> Tensor:
    if code not in (ARRAY, SCALAR):
        raise UserError(f"extension type {code}, expected arrays ({ARRAY}) and scalars ({SCALAR}) only")
    shape, name, content = msgpack.unpackb(data, max_array_len=MOST_DIMENSIONS)
    if name not in DTYPES:
        raise UserError(f"an array of dtype {shown(repr(name))}, expected one of: {', '.join(DTYPES)}")
    values = torch.frombuffer(bytearray(content), dtype=DTYPES[name]) if content else torch.empty(0, dtype=DTYPES[name])
    return values.reshape(shape)


def _flatten(node: dict[str, Any]) -> Any:
    """Return the array whose chunks ``node`` has, or its items by path; dictionaries in it are flat already."""
    if CHUNKED in node:
        shape, chunks = ([node[key][str(index)] for index in range(len(node[key]))] for key in ("shape", "chunks"))
        if len({chunk.dtype for chunk in chunks}) > 1:
            raise UserError("the chunks of an array are of several dtypes")
        return torch.cat(chunks).reshape(shape)
    items: dict[str, Any] = {}
    for key, child in node.items():
        inner = {f"{key}/{name}": item for name, item in child.items()} if isinstance(child, dict) else {key: child}
        if items.keys() & inner.keys():
            raise UserError(f"two arrays are called {shown(min(items.keys() & inner.keys()))}")
        items |= inner
    return items


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
        _write(file, msgpack.Packer(default=_pack_array), tree)


def _write(file: BinaryIO, packer: msgpack.Packer, node: Any) -> None:
    """Write one array at a time, so that the file is never in memory as a whole."""
    is_tree = isinstance(node, dict)
    file.write(packer.pack_map_header(len(node)) if is_tree else packer.pack(node))
    for key, child in node.items() if is_tree else ():
        file.write(packer.pack(key))
        _write(file, packer, child)


def _pack_array(array: Tensor) -> Any:
    if array.nbytes > CHUNK_BYTES:
        chunks = array.contiguous().flatten().split(CHUNK_BYTES // array.element_size())
        shape, parts = ({str(index): item for index, item in enumerate(items)} for items in (array.shape, chunks))
        return {CHUNKED: True, "shape": shape, "chunks": parts}
    content = array.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return msgpack.ExtType(ARRAY, msgpack.packb((tuple(array.shape), str(array.dtype).removeprefix("torch."), content)))
