"""The tensors of a checkpoint, through torch.distributed.checkpoint (DCP), which shards them over ranks and back."""

import io
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.futures import Future

from ..utils.files import sync
from .checkpoint_index import DamagedCheckpoint
from .distributed import Ranks

ZIP = b"PK\x03\x04"  # how an archive begins, or torch.load takes it for something else


def write_tensors(folder: Path, tensors: dict[str, Tensor], ranks: Ranks) -> Metadata:
    """Write and sync ``__RANK_0.distcp`` of each rank, and ``.metadata``; every rank calls this.

    What all ranks hold alike is written by one of them.

    Raises:
        OSError: of whichever rank; all raise it.
    """
    writer = dcp.FileSystemWriter(folder, sync_files=False)
    writer.fs = _Files()
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _errors_of_ranks():
        return dcp.save(
            tensors, storage_writer=writer, planner=planner, process_group=ranks.host, no_dist=ranks.size == 1
        )


def read_tensors(folder: Path, described: dict[str, Any], tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Overwrite ``tensors`` with those of the checkpoint; every rank calls this.

    Args:
        described: by ``checkpoint.json``, and checked against ``tensors``.

    Raises:
        DamagedCheckpoint: a file holds something else.
    """
    reader = _Reader(folder, described, {name: tensor.dtype for name, tensor in tensors.items()})
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _errors_of_ranks():
        dcp.load(tensors, storage_reader=reader, planner=planner, process_group=ranks.host, no_dist=ranks.size == 1)


@contextmanager
def _errors_of_ranks() -> Iterator[None]:
    """Inside, what failed on some rank is raised on all as it was there; and being alone is nothing to warn of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None


class _Stream(io.BufferedWriter):
    """Remembers what the system said, of which torch.save makes "unexpected pos"."""

    refusal: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.refusal = error
            raise


class _Files(FileSystem):
    """DCP's files, synced when all is written, which its own writer may do before; errors name file and reason."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:  # type: ignore[override]
        stream = _Stream(open(path, mode, buffering=0))  # type: ignore[arg-type]
        try:
            with stream:
                yield stream
            sync(Path(path))
        except Exception as error:
            refusal = stream.refusal or (error if isinstance(error, OSError) else None)
            if refusal is None:
                raise
            refusal.filename = refusal.filename or os.fspath(path)
            raise refusal from None


class _Reader(dcp.FileSystemReader):
    """Goes by ``checkpoint.json``: DCP's own index is a pickle, which could execute anything, and is not read."""

    def __init__(self, folder: Path, described: dict[str, Any], dtypes: dict[str, torch.dtype]) -> None:
        super().__init__(folder)
        self.folder, self.described, self.dtypes = folder, described, dtypes

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, dict[str, Any]] = {}
        for name, entry in self.described.items():
            chunks = [ChunkStorageMetadata(torch.Size(c["offsets"]), torch.Size(c["sizes"])) for c in entry["chunks"]]
            properties = TensorProperties(self.dtypes[name])
            tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
            for chunk, place in zip(chunks, entry["chunks"], strict=True):
                places[MetadataIndex(name, chunk.offsets)] = place
        return Metadata(tensors, storage_data=places)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            name = item.storage_index.fqn
            chunk = self._read_chunk(name, self.storage_data[item.storage_index])
            part = tuple(
                slice(start, start + n) for start, n in zip(item.storage_offsets, item.lengths, strict=True)
            )
            planner.resolve_tensor(item).detach().copy_(chunk[part])
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_chunk(self, name: str, place: dict[str, Any]) -> Tensor:
        """What torch.save wrote there, an archive of no more bytes than are read."""
        try:
            with (self.folder / place["file"]).open("rb") as file:
                file.seek(place["start"])
                content = io.BytesIO(file.read(place["length"]))
            with zipfile.ZipFile(content) as archive:
                entries = archive.infolist()
            if content.getbuffer()[:4] != ZIP or sum(entry.file_size for entry in entries) > place["length"]:
                raise ValueError("no archive, or one that unpacks to more than it is")
            content.seek(0)
            chunk = torch.load(content, map_location="cpu", weights_only=True)
            if type(chunk) is not Tensor or chunk.dtype != self.dtypes[name] or list(chunk.shape) != place["sizes"]:
                raise ValueError("another tensor")
        except Exception as error:
            raise DamagedCheckpoint(f"{place['file']} does not hold {name} ({type(error).__name__})") from error
        return chunk
