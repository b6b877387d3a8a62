"""What training needs of a data set, and the order in which it is read."""

import hashlib
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice, repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import data

from ..errors import UserError, reason, shown, some_of

# Folders and tables are called so, in any case; of several with test samples, the first of these is taken.
TRAIN_SPLITS = ("train", "training")
TEST_SPLITS = ("val", "valid", "validation", "dev", "test", "testing")  # Many keep the labels of "test" to themselves.


class Draw(NamedTuple):
    """A training sample as one epoch sees it: flip and crop follow from the data's seed, epoch and sample."""

    epoch: int
    sample: int


class Split(data.Dataset[tuple[Tensor, int]], ABC):
    """Samples with their class numbers, as a map-style data set for :class:`torch.utils.data.DataLoader`.
    ``split[index]`` is a sample, float32 of any shape, and its class number, without augmentation; ``split[Draw(epoch,
    index)]`` is the same as that epoch sees it. ``labels`` is int64 ``[N]`` on the CPU. Samples come in ``dtype``, in
    which they are kept where many are, and :meth:`values` makes float32 of them."""

    dtype = torch.float32

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def broken(self) -> list[int]:
        """These samples were found broken, and others have taken their places; most data sets know of none."""
        return []

    def __getitem__(self, at: int | Draw) -> tuple[Tensor, int]:
        sample, label = self.stored(at)
        return self.values(sample), label

    def stored(self, at: int | Draw) -> tuple[Tensor, int]:
        """Return what indexing does, with the sample in ``dtype``."""
        index, draw = (at.sample, at) if isinstance(at, Draw) else (at, None)
        return self.sample(index, draw), int(self.labels[index])

    @abstractmethod
    def sample(self, index: int, draw: Draw | None) -> Tensor:
        """Return the sample of that index in ``dtype``, without augmentation or as ``draw`` has it."""

    def values(self, samples: Tensor) -> Tensor:
        """Make float32 of samples ``[…, *sample_shape]`` in ``dtype``, on any device."""
        return samples.float()

    def samples(self, indices: Iterable[int] | None = None) -> Tensor:
        """Return samples ``[N, *sample_shape]``, float32 without augmentation, all of them by default."""
        indices = range(len(self)) if indices is None else indices
        return self.values(torch.stack([self.sample(index, None) for index in indices]))


class Stored(data.Dataset[tuple[Tensor, int]]):
    """What a split stores, as a map-style data set."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __getitem__(self, at: int | Draw) -> tuple[Tensor, int]:
        return self.split.stored(at)


@dataclass(frozen=True)
class Dataset:
    """Training and test samples of classes ``0 … num_classes - 1``; samples without labels have one class, "all".
    ``pixel_range`` holds the values of black and white in images ``[C, H, W]``; it is None where samples are no images.
    Where ``latent`` is true, samples are latents of the Stable Diffusion VAE, which decode to images of this range."""

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    sample_shape: tuple[int, ...]
    pixel_range: tuple[float, float] | None = (-1.0, 1.0)
    latent: bool = False
    notes: tuple[str, ...] = ()  # A run says these lines once, before its first step.

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def describe(self) -> str:
        """Word how many samples and classes there are, with the first names of these, and the ``notes``."""
        noun = "latents" if self.latent else "samples" if self.pixel_range is None else "images"
        classes = f"{self.num_classes} {'class' if self.num_classes == 1 else 'classes'}: {some_of(self.class_names)}"
        told = f"{self.name}: {len(self.train)} training and {len(self.test)} test {noun} of {classes}"
        return "\n".join([told, *self.notes])

    def without_ghosts(self) -> "Dataset":
        """Leave out classes that have a name but no training samples: they would be drawn, though nothing shows them.
        The others are renumbered, in the splits themselves. Test samples of such classes raise UserError."""
        present = self.train.labels.unique()  # [K], in ascending order
        for split in (self.train, self.test):
            strange = split.labels[~torch.isin(split.labels, present[(present >= 0) & (present < self.num_classes)])]
            if len(strange):
                name = dict(enumerate(self.class_names)).get(int(strange[0]), "without a name")
                told = f"{len(strange)} samples have the class {int(strange[0])}, {name}"
                raise UserError(f"{told}, expected classes that have names and training samples: take these away")
        if len(present) == self.num_classes:
            return self
        kept = [self.class_names[number] for number in present.tolist()]
        for split in (self.train, self.test):
            split.labels = torch.searchsorted(present, split.labels)
        lacking = some_of([name for name in self.class_names if name not in kept])
        notes = (*self.notes, f"left out, without training samples: {lacking}")
        return replace(self, class_names=tuple(kept), notes=notes)


def called(splits: Sequence[str], names: Iterable[str]) -> list[str]:
    """Return those of ``names`` that are one of ``splits``, in any case, in the order of these."""
    return [name for split in splits for name in sorted(names) if name.lower() == split]


def hold_out(names: Iterable[str | bytes], labels: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of training samples and of one test sample in ten, on which a hash of its name decides. Where
    that takes all samples of one of the ``labels`` (one a sample, or none), they stay training samples."""
    digests = (hashlib.blake2b(os.fsencode(name), digest_size=8).digest() for name in names)
    held = np.array([int.from_bytes(digest, "big") % 10 == 0 for digest in digests], dtype=bool)
    if len(labels):
        texts = list(map(repr, labels))  # Not every label is hashable.
        trained = {text for text, is_held in zip(texts, held, strict=True) if not is_held}
        held &= [text in trained for text in texts]
    return np.flatnonzero(~held), np.flatnonzero(held)


def endless_shuffle(size: int, seed: int, start: int = 0) -> Iterator[Draw]:
    """Draw samples ``0 … size - 1`` in a new random order every epoch, without end, from the draw ``start`` on. The
    order depends on ``seed`` and the epoch only, so that a run that is resumed sees what it would have seen."""
    first, offset = divmod(start, size)
    for epoch in count(first):
        for index in shuffled(size, seed, epoch)[offset if epoch == first else 0 :].tolist():
            yield Draw(epoch, index)


def shuffled(size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the samples ``0 … size - 1`` in the random order of an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def training_batches(
    split: Split, batch_size: int, seed: int, start: int = 0, workers: int = 0, part: slice | None = None,
    stored: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Read batches of samples ``[B, *sample_shape]`` and labels ``[B]``, or ``part`` of each, from sample ``start`` on.
    Their order is that of :func:`endless_shuffle`, whatever the ``workers``. Samples are float32, or as ``stored``."""
    draws = endless_shuffle(len(split), seed, start)
    batches = (list(islice(draws, batch_size))[part or slice(None)] for _ in repeat(None))
    return read_batches(Stored(split) if stored else split, workers, batch_sampler=batches)


def read_batches(samples: Any, workers: int, **settings: Any) -> Iterator[Any]:
    """Read batches of a DataLoader with those ``settings``, whose processes leave Ctrl-C to this one. Whatever fails
    in reading, or in a process that reads, raises UserError in one line, and does so when the next batch is due."""
    settings |= {"num_workers": workers, "worker_init_fn": _ignore_ctrl_c, "pin_memory": torch.cuda.is_available()}
    try:
        batches = iter(data.DataLoader(samples, **settings))
        if workers and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch would raise a worker's death in any statement.
        yield from batches
    except Exception as error:  # A data set may raise errors of any class.
        raise UserError(_told_in_one_line(error)) from error


def _ignore_ctrl_c(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _told_in_one_line(error: Exception) -> str:
    lines = str(error).rstrip().splitlines() or [""]
    if "Original Traceback" in str(error):  # A worker says so, and then "drifting.errors.UserError: MESSAGE".
        told = lines[-1].partition(": ")[2] if isinstance(error, UserError) else shown(lines[-1])
    elif "DataLoader worker" in str(error):
        died = f"a process that reads data died ({lines[0].rstrip('. ')})"
        return f"{died}: fewer data.workers need less memory"
    else:
        told = reason(error)
    return told if isinstance(error, UserError) else f"the data cannot be read: {told}"
