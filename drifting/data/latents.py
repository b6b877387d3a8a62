"""Latents on disk, written once by ``python -m drifting.cache_latents`` and read memory-mapped in training. Each split
has shards ``SPLIT/00000.npy`` of float16 ``[N, 2, C, h, w]``: the latent of each image and of its mirror image,
multiplied by ``scaling_factor``. ``index.json`` says what the latents were made from and how, and lists the shards,
labels and skipped images of each split."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.schema import DataConfig
from ..errors import UserError, explained, reason
from ..utils.files import read_object
from .dataset import Dataset, Draw, Split

COMMAND, INDEX = "`python -m drifting.cache_latents`", "index.json"


class LatentSplit(Split):
    """The latents of one split, ``[C, h, w]``; with ``flip``, a draw takes either of the two variants."""

    dtype = torch.float16

    def __init__(self, root: Path, name: str, index: dict[str, Any], flip: bool, seed: int) -> None:
        content = index["splits"][name]
        labels, files = np.array(content["labels"]), [shard["file"] for shard in content["shards"]]
        if labels.dtype != np.int64 or labels.min() < 0 or labels.max() >= len(index["class_names"]):
            raise ValueError(f"the labels of {name} are not those of its classes")
        if not all(re.fullmatch(rf"{name}/\d+\.npy", file) for file in files):
            raise ValueError(f"the shards of {name} are not files in its folder")
        super().__init__(torch.from_numpy(labels))
        self.files, self.shape, self.flip, self.seed = [root / file for file in files], index["shape"], flip, seed
        self.shards: dict[int, np.ndarray] = {}
        self.ends = np.cumsum([0, *(len(self._shard(number)) for number in range(len(files)))])
        if labels.shape != (self.ends[-1],):
            raise ValueError(f"{name} has {self.ends[-1]} latents and labels {list(labels.shape)}")

    def sample(self, index: int, draw: Draw | None) -> Tensor:
        mirrored = draw is not None and self.flip and np.random.default_rng([self.seed, *draw]).random() < 0.5
        number = int(np.searchsorted(self.ends, index, side="right")) - 1
        return torch.from_numpy(self._shard(number)[index - self.ends[number], int(mirrored)].copy())

    def _shard(self, number: int) -> np.ndarray:
        if number in self.shards:
            return self.shards[number]
        file = self.files[number]
        if not file.is_file():
            raise UserError(f"{file} is missing")
        shard = self.shards[number] = np.load(file, mmap_mode="r", allow_pickle=False)
        if shard.dtype != np.float16 or list(shard.shape[1:]) != [2, *self.shape]:
            held = f"{file} holds {shard.dtype} {list(shard.shape)}"
            raise UserError(f"{held}, expected float16 [N, 2, {str(self.shape)[1:]}")
        return shard

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"shards": {}}  # Open shards would be sent to workers as copies of the files.


def load_latents(config: DataConfig, seed: int = 0) -> Dataset:
    """Load the latents in ``config.path``; raises UserError where they are not there, incomplete or damaged."""
    root = Path(config.path or "")
    if not (root / INDEX).exists():
        raise UserError(f"data.path is {root}, which holds no {INDEX} of {COMMAND}")
    index = read_index(root)
    if not index["complete"]:
        raise UserError(f"{root} does not hold all latents yet: run the same {COMMAND} again")
    try:
        train, test = (LatentSplit(root, name, index, config.flip, seed) for name in ("train", "test"))
        names, shape = tuple(map(str, index["class_names"])), tuple(train[0][0].shape)
    except Exception as error:  # What a damaged index or shard ends in may be of any class.
        raise UserError(f"{root} is damaged ({reason(error)}): empty it and run {COMMAND} again") from error
    return Dataset(config.name, train, test, names, shape, latent=True)


def read_index(root: Path) -> dict[str, Any]:
    with explained(f"{root / INDEX} cannot be read"):
        index = read_object(root / INDEX)
        if not isinstance(index.get("complete"), bool) or not isinstance(index.get("settings"), dict):
            raise UserError(f"it is no index of {COMMAND}")
    return index
