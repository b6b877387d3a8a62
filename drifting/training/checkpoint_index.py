"""``checkpoint.json``: what a checkpoint holds, where it is, and how each file of it is recognised as undamaged."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from ..errors import reason
from ..utils.files import atomic_write, is_count, read_object, sha256

INDEX = "checkpoint.json"
FORMAT = 1
FILES = re.compile(r"__\d+_\d+\.distcp|\.metadata")
OVERHEAD = 2**16  # bytes that torch.save may add to those of a tensor; it adds some 1,500
NOT_FINITE = ("nan", "inf", "-inf")

Leaves = dict[str, Any]  # of a nested dictionary, by name


class DamagedCheckpoint(ValueError):
    """It is not what was written."""


# --------------------------------------------------------------------------------------------------------- leaves


def flat(state: dict[str, Any], prefix: str = "") -> Leaves:
    """The leaves of ``state`` by the keys that lead to them, joined by "/" as in JSON pointers (RFC 6901)."""
    leaves: Leaves = {}
    for key, value in state.items():
        name = _join(prefix, key)
        leaves |= flat(value, f"{name}/") if isinstance(value, dict) else {name: value}
    return leaves


def filled(state: dict[str, Any], leaves: Leaves, prefix: str = "") -> dict[str, Any]:
    """``state`` with these leaves instead of its own."""
    return {
        key: filled(value, leaves, f"{_join(prefix, key)}/") if isinstance(value, dict) else leaves[_join(prefix, key)]
        for key, value in state.items()
    }


def tensors_of(leaves: Leaves) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}


def values_of(leaves: Leaves) -> dict[str, Any]:
    return {name: leaf for name, leaf in leaves.items() if not isinstance(leaf, Tensor)}


def _join(prefix: str, key: str) -> str:
    return prefix + key.replace("~", "~0").replace("/", "~1")


# -------------------------------------------------------------------------------------------------------- writing


def describe_files(files: list[Path]) -> dict[str, Any]:
    """Size and checksum of each, by its name."""
    return {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}


def describe_tensors(metadata: Metadata) -> dict[str, Any]:
    """Of each tensor its dtype and shape, and of its chunks where they are in it and in the files."""
    tensors: dict[str, Any] = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        chunks = []
        for chunk in tensor.chunks:
            stored = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            place = {"file": stored.relative_path, "start": stored.offset, "length": stored.length}
            chunks.append({"offsets": list(chunk.offsets), "sizes": list(chunk.sizes)} | place)
        tensors[name] = {"dtype": _name(tensor.properties.dtype), "shape": list(tensor.size), "chunks": chunks}
    return tensors


def describe_values(values: dict[str, Any]) -> dict[str, Any]:
    """The values as JSON.

    Raises:
        TypeError: one is of another kind.
    """
    return {name: _to_json(name, value) for name, value in values.items()}


def write_index(folder: Path, files: Leaves, tensors: Leaves, values: Leaves) -> None:
    """Write and sync ``checkpoint.json``, with a checksum over itself."""
    content = {"format": FORMAT, "files": files, "tensors": tensors, "values": values}
    with atomic_write(folder / INDEX) as part:
        part.write_text(json.dumps({"sha256": _digest(content), "content": content}))


def _to_json(name: str, value: Any) -> Any:
    """JSON has no NaN and no infinity: these become ``{"float": "inf"}``."""
    if isinstance(value, (list, tuple)):
        return [_to_json(name, entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(float(value))}
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a tensor, number, text, None or a list of them")
    return value


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -------------------------------------------------------------------------------------------------------- reading


def read_index(folder: Path, step: int) -> dict[str, Any]:
    """``files``, ``tensors`` and ``values`` of the checkpoint of that step in ``folder``.

    Raises:
        DamagedCheckpoint: it cannot be read, or is not what was written.
        ValueError: it is of another version.
    """
    try:
        document = read_object(folder / INDEX)
        content = document.get("content")
        if _digest(content) != document.get("sha256"):
            raise ValueError("its checksum is another")
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{INDEX} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{INDEX} cannot be read: {reason(error)}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"checkpoint {folder} is of another version of this program: expected format {FORMAT}")
    if not _is_index(content, step):
        raise DamagedCheckpoint(f"{INDEX} is not one of step {step} with files, tensors and values")
    return content


def _is_index(content: dict[str, Any], step: int) -> bool:
    files, tensors, values = (content.get(name) for name in ("files", "tensors", "values"))
    if not isinstance(files, dict) or not isinstance(tensors, dict) or not isinstance(values, dict):
        return False
    described = all(isinstance(entry, dict) and is_count(entry.get("bytes")) for entry in files.values())
    return described and all(map(FILES.fullmatch, files)) and repr(values.get("step")) == repr(step)


def check_files(folder: Path, described: dict[str, Any]) -> None:
    """Raise :class:`DamagedCheckpoint` if the files are not those that :func:`describe_files` described."""
    for name, entry in described.items():
        file = folder / name
        try:
            if not file.is_file():
                raise DamagedCheckpoint(f"{name} is missing")
            if (size := file.stat().st_size) != entry["bytes"]:
                raise DamagedCheckpoint(f"{name} has {size} bytes, expected {entry['bytes']}")
            if (digest := sha256(file)) != (expected := entry.get("sha256")):
                raise DamagedCheckpoint(f"{name} has the SHA-256 {digest:.12}…, expected {expected!s:.12}…")
        except OSError as error:
            raise DamagedCheckpoint(f"{name} cannot be read: {reason(error)}") from error


def check_tensors(content: dict[str, Any], expected: dict[str, Tensor]) -> None:
    """Raise ValueError unless these tensors are there, each whole, of its dtype and shape, and inside of the files."""
    _check_names("tensors", content["tensors"], expected)
    for name, tensor in expected.items():
        entry = content["tensors"][name]
        if not isinstance(entry, dict):
            raise ValueError(f"{name} is no description of a tensor")
        found, wanted = [entry.get("dtype"), entry.get("shape")], [_name(tensor.dtype), list(tensor.shape)]
        if found != wanted:
            raise ValueError(f"{name} is {found!s:.100}, expected {wanted}")
        if not _is_whole(tensor, entry.get("chunks"), content["files"]):
            raise ValueError(f"{name} is not whole in its files")


def _is_whole(tensor: Tensor, chunks: Any, files: dict[str, Any]) -> bool:
    if not isinstance(chunks, list) or not all(isinstance(chunk, dict) for chunk in chunks):
        return False
    for chunk in chunks:
        offsets, sizes = chunk.get("offsets"), chunk.get("sizes")
        for place in (offsets, sizes):
            if not isinstance(place, list) or len(place) != tensor.dim() or not all(map(is_count, place)):
                return False
        if any(offset + size > n for offset, size, n in zip(offsets, sizes, tensor.shape, strict=True)):
            return False
        start, length, file = chunk.get("start"), chunk.get("length"), chunk.get("file")
        if not isinstance(file, str) or file not in files or not is_count(start) or not is_count(length):
            return False
        if start + length > files[file]["bytes"] or length > math.prod(sizes) * tensor.element_size() + OVERHEAD:
            return False
    return sum(math.prod(chunk["sizes"]) for chunk in chunks) == tensor.numel()


def read_values(content: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """The values, each of the kind of the expected one; None may stand for any, and any for None.

    Raises:
        ValueError: some are missing, left over or of another kind.
    """
    _check_names("values", content["values"], expected)
    return {name: _from_json(name, content["values"][name], value) for name, value in expected.items()}


def _check_names(what: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    for names, problem in ((expected.keys() - found, "it lacks"), (found.keys() - expected, "it has, unexpected,")):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
            raise ValueError(f"{problem} {len(names)} of the {what}: {shown}")


def _from_json(name: str, value: Any, expected: Any) -> Any:
    if isinstance(value, list) and isinstance(expected, (list, tuple, type(None))):
        entries = [_from_json(name, entry, None) for entry in value]
        return tuple(entries) if isinstance(expected, tuple) else entries
    if isinstance(value, dict) and value.get("float") in NOT_FINITE:
        value = float(value["float"])
    kinds = {type(value), type(expected)}
    if isinstance(value, (dict, list)) or not (len(kinds) == 1 or type(None) in kinds or kinds == {int, float}):
        raise ValueError(f"{name} is {value!r:.100}, expected a {type(expected).__name__}")
    return value
