"""What training needs of a data set, and the order in which it is read."""

import signal
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import data
from torch.utils.data import DataLoader, Sampler

from ..errors import UserError


class Draw(NamedTuple):
    """A training sample as it is seen in one epoch: flip and crop follow from the data's seed, epoch and sample."""

    epoch: int
    sample: int


class Split(data.Dataset[tuple[Tensor, int]], ABC):
    """Labelled samples, as a map-style data set for :class:`torch.utils.data.DataLoader`.

    ``split[index]`` is sample and label without augmentation, ``split[Draw(epoch, index)]`` as that epoch sees it.
    Samples are float32 ``[C, H, W]``; ``labels`` is int64 ``[N]`` on the CPU.
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
        """Samples ``[N, C, H, W]`` without augmentation, all of them by default."""
        chosen = range(len(self)) if indices is None else indices
        return torch.stack([self.sample(index, None) for index in chosen])


@dataclass(frozen=True)
class Dataset:
    """Training and test samples of classes ``0 … num_classes - 1``.

    Images are normalised to ``pixel_range``, the two values that stand for black and white. Where ``latent`` is true
    the samples are latents of the Stable Diffusion VAE (:mod:`drifting.vae`), and it is what they decode to that has
    this range.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    sample_shape: tuple[int, int, int]  # C, H, W
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    latent: bool = False

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


class EndlessShuffle(Sampler[Draw]):
    """Indices ``0 … size - 1`` in a new random order every epoch, without end, each with its epoch.

    The order depends on ``seed`` and the epoch only, so that a run resumed at ``start`` (samples already drawn) sees
    what it would have seen.
    """

    def __init__(self, size: int, seed: int, start: int = 0) -> None:
        self.size, self.seed, self.start = size, seed, start

    def __iter__(self) -> Iterator[Draw]:
        epoch, offset = divmod(self.start, self.size)
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.size)
            for index in order[offset:].tolist():
                yield Draw(epoch, index)
            epoch, offset = epoch + 1, 0


class Batches(Sampler[list[Draw]]):
    """The ``part`` of each ``batch_size`` draws of an endless ``order``."""

    def __init__(self, order: EndlessShuffle, batch_size: int, part: slice) -> None:
        self.order, self.batch_size, self.part = order, batch_size, part

    def __iter__(self) -> Iterator[list[Draw]]:
        draws = iter(self.order)
        while True:
            yield list(islice(draws, self.batch_size))[self.part]


def training_batches(
    split: Split,
    batch_size: int,
    seed: int,
    start: int = 0,
    workers: int = 0,
    part: slice = slice(None),  # noqa: B008
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of samples ``[B, C, H, W]`` and labels ``[B]`` in the order of :class:`EndlessShuffle`, without end.

    They depend on ``seed`` and ``start`` (samples drawn before) but not on ``workers``; only the ``part`` of each is
    read. Raises as :func:`load_batches`.
    """
    order = Batches(EndlessShuffle(len(split), seed, start), batch_size, part)
    return load_batches(DataLoader(split, batch_sampler=order, **worker_settings(workers)))


def worker_settings(workers: int) -> dict[str, Any]:
    """Arguments of a DataLoader that reads with that many processes, which leave it to this one when they end."""
    return {"num_workers": workers, "worker_init_fn": _ignore_ctrl_c, "pin_memory": torch.cuda.is_available()}


def load_batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of ``loader``.

    Raises:
        UserError: a sample cannot be read, or a worker died; the message is one line, whether a worker read it or this
            process.
    """
    try:
        with telling_of_dead_workers():
            yield from loader
    except UserError as error:  # in a worker, the DataLoader puts the traceback before its message
        kind = type(error)
        reason = str(error).rstrip().splitlines()[-1].removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")
        raise UserError(reason) from error


@contextmanager
def telling_of_dead_workers() -> Iterator[None]:
    """Inside, a worker that died raises UserError: the DataLoader raises where it is noticed, in whatever is done."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).partition("\n")[0].rstrip(". ")
        raise UserError(f"a process that reads data died ({reason}): fewer data.workers need less memory") from error


def _ignore_ctrl_c(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
