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
from ..errors import UserError, reason
from ..utils.files import read_object
from .dataset import Dataset, Draw, Split

INDEX = "index.json"
SPLITS = ("train", "test")


class LatentSplit(Split):
    """The latents of one split, float32 ``[C, h, w]``; with ``flip``, a draw takes either of the two variants.

    ``index`` describes the folder ``root``. An error of any class is raised where it and the files do not fit.
    """

    def __init__(self, root: Path, name: str, index: dict[str, Any], flip: bool, seed: int) -> None:
        content = index["splits"][name]
        labels = np.array(content["labels"])
        if labels.dtype != np.int64 or labels.min() < 0 or labels.max() >= len(index["class_names"]):
            raise ValueError(f"the labels of {name} are not those of its classes")
        super().__init__(torch.from_numpy(labels))
        files = [shard["file"] for shard in content["shards"]]
        if not all(re.fullmatch(rf"{name}/\d+\.npy", file) for file in files):
            raise ValueError(f"the shards of {name} are not files in its folder")
        self.files = [root / file for file in files]
        self.shape = (2, *index["shape"])
        self.shards: dict[int, NDArray[np.float16]] = {}
        self.ends = list(accumulate(len(self._shard(number)) for number in range(len(files))))
        self.flip, self.seed = flip, seed
        if (self.ends[-1],) != labels.shape:
            raise ValueError(f"{name} has {self.ends[-1]} latents and labels {list(labels.shape)}")

    def sample(self, index: int, draw: Draw | None) -> Tensor:
        variant = 0
        if draw is not None and self.flip:
            variant = int(np.random.default_rng([self.seed, *draw]).random() < 0.5)
        number = bisect_right(self.ends, index)
        start = self.ends[number - 1] if number else 0
        return torch.from_numpy(self._shard(number)[index - start, variant].astype(np.float32))

    def _shard(self, number: int) -> NDArray[np.float16]:
        """Latents ``[N, 2, C, h, w]``, memory-mapped."""
        if number not in self.shards:
            file = self.files[number]
            if not file.is_file():
                raise ValueError(f"{file} is missing")
            shard = np.load(file, mmap_mode="r", allow_pickle=False)
            if shard.dtype != np.float16 or shard.shape[1:] != self.shape:
                expected = f"float16 [N, {str(self.shape)[1:-1]}]"
                raise ValueError(f"{file} holds {shard.dtype} {list(shard.shape)}, expected {expected}")
            self.shards[number] = shard
        return self.shards[number]

    def __getstate__(self) -> dict[str, Any]:
        """Without the open shards, which would be sent to workers as copies of the files."""
        return self.__dict__ | {"shards": {}}


def load_latents(config: DataConfig, seed: int = 0) -> Dataset:
    """The latents in ``config.path``; with ``config.flip``, half of the draws are of the mirror image.

    Raises:
        UserError: that folder holds no latents, or not yet all, or some that are damaged.
    """
    root = Path(config.path or "")
    index = read_index(root)
    if index is None:
        raise UserError(f"data.path is {root}, which holds no {INDEX} of `python -m drifting.cache_latents`")
    if not index["complete"]:
        raise UserError(f"{root} does not hold all latents yet: run the same `python -m drifting.cache_latents` again")
    try:
        train, test = (LatentSplit(root, name, index, config.flip, seed) for name in SPLITS)
        names, shape = tuple(map(str, index["class_names"])), tuple(train.samples([0]).shape[1:])
    except Exception as error:  # What a damaged index or shard ends in may be of any class.
        raise UserError(
            f"{root} is damaged ({reason(error)}): empty it and run `python -m drifting.cache_latents` again"
        ) from error
    return Dataset(config.name, train, test, names, shape, latent=True)


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
