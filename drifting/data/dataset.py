"""What training needs of a data set, and the order in which it is read."""

import hashlib
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import data
from torch.utils.data import DataLoader

from ..errors import UserError

HELD_OUT = 10  # One sample in so many is for testing, where a data set has no such split of its own.


class Draw(NamedTuple):
    """A training sample as one epoch sees it: flip and crop follow from the data's seed, epoch and sample."""

    epoch: int
    sample: int


class Split(data.Dataset[tuple[Tensor, int]], ABC):
    """Samples with their class numbers, as a map-style data set for :class:`torch.utils.data.DataLoader`.

    ``split[index]`` is a sample, float32 of any shape, and its class number, without augmentation;
    ``split[Draw(epoch, index)]`` is the same as that epoch sees it. ``labels`` is int64 ``[N]`` on the CPU.
    """

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, at: int | Draw) -> tuple[Tensor, int]:
        index, draw = (at.sample, at) if isinstance(at, Draw) else (at, None)
        return self.sample(index, draw), int(self.labels[index])

    @abstractmethod
    def sample(self, index: int, draw: Draw | None) -> Tensor:
        """The sample of that index: without augmentation, or as ``draw`` has it."""

    def samples(self, indices: Iterable[int] | None = None) -> Tensor:
        """Samples ``[N, *sample_shape]`` without augmentation, all of them by default."""
        chosen = range(len(self)) if indices is None else indices
        return torch.stack([self.sample(index, None) for index in chosen])


@dataclass(frozen=True)
class Dataset:
    """Training and test samples of classes ``0 … num_classes - 1``; samples without labels have one class, "all".

    ``pixel_range`` holds the values of black and white in images ``[C, H, W]``; it is None where samples are no images.
    Where ``latent`` is true, samples are latents of the Stable Diffusion VAE, which decode to images of this range.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    sample_shape: tuple[int, ...]
    pixel_range: tuple[float, float] | None = (-1.0, 1.0)
    latent: bool = False

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def hold_out(names: Iterable[str | bytes]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices of the training and of the test samples among those of these names.

    A hash of its name decides on each, so that a sample stays where it is when others are added.
    """
    digests = (hashlib.blake2b(os.fsencode(name), digest_size=8).digest() for name in names)
    held = np.array([int.from_bytes(digest, "big") % HELD_OUT == 0 for digest in digests], dtype=bool)
    return np.flatnonzero(~held), np.flatnonzero(held)


def endless_shuffle(size: int, seed: int, start: int = 0) -> Iterator[Draw]:
    """Samples ``0 … size - 1`` in a new random order every epoch, without end.

    The order depends on ``seed`` and the epoch only, so that a run that is resumed at ``start`` (the number of samples
    already drawn) sees what it would have seen.
    """
    epoch, offset = divmod(start, size)
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(size)
        for index in order[offset:].tolist():
            yield Draw(epoch, index)
        epoch, offset = epoch + 1, 0


def training_batches(
    split: Split,
    batch_size: int,
    seed: int,
    start: int = 0,
    workers: int = 0,
    part: slice = slice(None),  # noqa: B008
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of samples ``[B, *sample_shape]`` and labels ``[B]`` without end, ordered by :func:`endless_shuffle`.

    They depend on ``seed`` and ``start`` (the number of samples drawn before) but not on ``workers``. Only the ``part``
    of each batch is read. Raises as :func:`load_batches`.
    """
    draws = endless_shuffle(len(split), seed, start)
    batches: Any = (list(islice(draws, batch_size))[part] for _ in repeat(None))
    return load_batches(DataLoader(split, batch_sampler=batches, **worker_settings(workers)))


def worker_settings(workers: int) -> dict[str, Any]:
    """Arguments of a DataLoader that reads with that many processes, which leave Ctrl-C to this one."""
    return {"num_workers": workers, "worker_init_fn": _ignore_ctrl_c, "pin_memory": torch.cuda.is_available()}


def load_batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of ``loader``; raises :class:`UserError` in one line if a sample cannot be read or a worker dies."""
    try:
        with telling_of_dead_workers():
            yield from loader
    except UserError as error:  # The DataLoader puts the traceback of a worker before its message.
        kind = type(error)
        message = str(error).rstrip().splitlines()[-1].removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")
        raise UserError(message) from error


@contextmanager
def telling_of_dead_workers() -> Iterator[None]:
    """Inside, a worker that died raises UserError. The DataLoader raises where it notices that, in any statement."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        message = str(error).partition("\n")[0].rstrip(". ")
        raise UserError(f"a process that reads data died ({message}): fewer data.workers need less memory") from error


def _ignore_ctrl_c(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
