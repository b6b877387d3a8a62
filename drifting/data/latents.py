"""Latents on disk, written once by ``python -m drifting.cache_latents`` and read memory-mapped in training.

A folder of them has ``index.json`` and, for each split, shards ``SPLIT/00000.npy`` of float16 ``[N, 2, C, h, w]``: the
latent of each image and of its mirror image, multiplied by the index's ``scaling_factor``. The index holds
``complete``, ``settings`` (what they were made from and how), ``dtype``, ``shape`` (``[C, h, w]``), ``scaling_factor``,
``class_names`` and ``splits``: for each the ``shards`` (``file`` and ``count``), the ``labels`` of all its latents, and
the images ``skipped`` with the reason.
"""

import json
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cli import UserError
from .dataset import DataConfig, Dataset, Draw, Split

INDEX = "index.json"
SPLITS = ("train", "test")


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
    train, test = (LatentSplit(root, index["splits"][name], config.flip, seed) for name in SPLITS)
    for file in train.files + test.files:
        if not file.is_file():
            raise UserError(f"{file} is missing: empty {root} and run `python -m drifting.cache_latents` again")
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
        index = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(index, dict) or "complete" not in index:
        raise UserError(f"{path} is no index of `python -m drifting.cache_latents`")
    return index
