"""Latents on disk, written once by ``python -m drifting.cache_latents`` and read memory-mapped in training.

A folder of them has ``index.json`` and, for each split, shards ``SPLIT/00000.npy`` of float16 ``[N, 2, C, h, w]``: the
latent of each image and of its mirror image, multiplied by the index's ``scaling_factor``. The index holds
``complete``, ``settings`` (what they were made from and how), ``dtype``, ``shape`` (``[C, h, w]``), ``scaling_factor``,
``class_names`` and ``splits``: for each the ``shards`` (``file`` and ``count``), the ``labels`` of all its latents, and
the images ``skipped`` with the reason.
"""

import re
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config.schema import DataConfig
from ..errors import UserError
from ..utils.files import is_count, read_object
from ..utils.npy import read_header
from .dataset import Dataset, Draw, Split

INDEX = "index.json"
SPLITS = ("train", "test")
DTYPE = np.dtype(np.float16)


class LatentSplit(Split):
    """The latents of one split, float32 ``[C, h, w]``; with ``flip``, a draw takes either of the two variants."""

    def __init__(self, root: Path, description: dict[str, Any], flip: bool, seed: int) -> None:
        super().__init__(torch.tensor(description["labels"], dtype=torch.int64))
        self.files = [root / shard["file"] for shard in description["shards"]]
        self.ends = list(accumulate(shard["count"] for shard in description["shards"]))
        self.flip, self.seed = flip, seed
        self.shards: dict[int, NDArray[np.float16]] = {}

    def sample(self, index: int, draw: Draw | None) -> Tensor:
        variant = 0
        if draw is not None and self.flip:
            variant = int(np.random.default_rng([self.seed, *draw]).random() < 0.5)
        number = bisect_right(self.ends, index)
        start = self.ends[number - 1] if number else 0
        return torch.from_numpy(self._shard(number)[index - start, variant].astype(np.float32))

    def _shard(self, number: int) -> NDArray[np.float16]:
        if number not in self.shards:
            self.shards[number] = np.load(self.files[number], mmap_mode="r")
        return self.shards[number]

    def __getstate__(self) -> dict[str, Any]:
        """Without the open shards, which would be sent to workers as copies of the files."""
        return self.__dict__ | {"shards": {}}


def load_latents(config: DataConfig, seed: int = 0) -> Dataset:
    """The latents in ``config.path``; with ``config.flip``, half of the draws are of the mirror image.

    Raises:
        UserError: that folder holds no latents, or not yet all.
    """
    if config.path is None:
        raise UserError("data.path is not set, expected a folder that `python -m drifting.cache_latents` has written")
    root = Path(config.path)
    index = read_index(root)
    if index is None:
        raise UserError(f"data.path is {root}, which holds no {INDEX} of `python -m drifting.cache_latents`")
    if not index["complete"]:
        raise UserError(f"{root} does not hold all latents yet: run the same `python -m drifting.cache_latents` again")
    try:
        _check_index(index)
        train, test = (LatentSplit(root, index["splits"][name], config.flip, seed) for name in SPLITS)
        for split in (train, test):
            for file, start, end in zip(split.files, [0, *split.ends], split.ends, strict=False):
                _check_shard(file, (end - start, 2, *index["shape"]))
    except (OSError, ValueError) as error:
        raise UserError(f"{error}: empty {root} and run `python -m drifting.cache_latents` again") from error
    channels, height, width = index["shape"]
    return Dataset(
        name="latents",
        train=train,
        test=test,
        class_names=tuple(index["class_names"]),
        sample_shape=(channels, height, width),
        latent=True,
    )


def read_index(root: Path) -> dict[str, Any] | None:
    """The index in ``root``, or None where there is none; raises UserError if it cannot be read."""
    path = root / INDEX
    try:
        index = read_object(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(index.get("complete"), bool) or not isinstance(index.get("settings"), dict):
        raise UserError(f"{path} is no index of `python -m drifting.cache_latents`")
    return index


def _check_index(index: dict[str, Any]) -> None:
    """Raises ValueError unless a complete index holds all that training reads, as this module's head describes it."""
    shape, names, splits = index.get("shape"), index.get("class_names"), index.get("splits")
    if not isinstance(shape, list) or len(shape) != 3 or not all(is_count(size, 1) for size in shape):
        raise ValueError(f"{INDEX} has the shape {shape!r}")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{INDEX} has no names of classes")
    for split in SPLITS:
        content = splits.get(split) if isinstance(splits, dict) else None
        labels, shards = (content.get(key) if isinstance(content, dict) else None for key in ("labels", "shards"))
        if not isinstance(labels, list) or not all(is_count(n) and n < len(names) for n in labels) or not labels:
            raise ValueError(f"{INDEX} has no labels of its split {split}, or some that are of none of its classes")
        if not isinstance(shards, list) or not all(_is_shard(split, shard) for shard in shards):
            raise ValueError(f"{INDEX} has no shards of its split {split}, or some that are not files and counts")
        if sum(shard["count"] for shard in shards) != len(labels):
            raise ValueError(f"{INDEX} has {len(labels)} labels of its split {split}, its shards have another number")


def _is_shard(split: str, shard: Any) -> bool:
    """Whether ``shard`` has the count of a file in the folder of its split, and in no other place."""
    return (
        isinstance(shard, dict) and is_count(shard.get("count"), 1) and isinstance(shard.get("file"), str)
        and re.fullmatch(rf"{split}/\d+\.npy", shard["file"]) is not None
    )  # fmt: skip


def _check_shard(path: Path, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the file has float16 latents of that shape, and nothing else."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    with path.open("rb") as file:
        try:
            got, fortran, dtype = read_header(file, path.stat().st_size)
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    if got != shape or dtype != DTYPE or fortran:
        raise ValueError(f"{path} holds {dtype} {list(got)}, expected {DTYPE} {list(shape)}")
