"""A user's own data: its labels and their class numbers, and data sets by the name ``module:Name`` as ours are."""

import random
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset, default_collate

from ..config.schema import DataConfig
from ..errors import UserError, explained, some_of
from ..generation import plain_labels
from ..utils.named import check_arguments, import_named
from ..utils.progress import progress
from .dataset import Dataset, Draw, Split, hold_out

ALL = ("all",)  # The one class of samples without labels.
COMPACT = (torch.uint8, torch.float16)
PROBED = 1000  # So many training samples tell the range of pixels.
PASSED_ON = ("path", "image_size", "flip", "crop", "subset", "label_column", "background", "skip_broken")


def sample_of(item: Any) -> Any:
    """Return the samples of ``x``, ``(x,)`` or ``(x, y)``."""
    return item[0] if isinstance(item, (tuple, list)) else item


def label_of(item: Any) -> Any:
    """Return the label or labels of ``x``, ``(x,)`` or ``(x, y)``, or None."""
    return item[1] if isinstance(item, (tuple, list)) and len(item) > 1 else None


def distinct_labels(source: Any) -> set[Any] | None:
    """Return the labels that occur in what :func:`all_labels` takes, None where it returns None."""
    labels = all_labels(source)
    return labels if labels is None else set(checked_labels(labels))


def all_labels(source: Any) -> list[Any] | None:
    """List the label of each sample of a map-style data set or of its DataLoader, or in a list of batches. A data set
    that does not tell them is read once. The list is empty where samples have no labels, and None for what can be read
    only once, or has no end."""
    if isinstance(source, DataLoader):
        labels = all_labels(source.dataset)  # A collate_fn of the user's own may make labels of anything.
        return labels if labels or source.collate_fn is default_collate else None
    if isinstance(source, IterableDataset) or not hasattr(source, "__len__"):
        return None
    if isinstance(source, Subset):
        labels = all_labels(source.dataset)
        return labels and [labels[index] for index in source.indices]
    if isinstance(source, ConcatDataset):
        return [label for part in source.datasets for label in all_labels(part) or []]
    if isinstance(source, TensorDataset):
        return plain_labels(label_of(source.tensors))
    if not len(source) or label_of(source[0]) is None:
        return []
    for name in ("targets", "labels"):  # They are believed only if samples have them: a transform may change labels.
        told = plain_labels(getattr(source, name, None))
        probed = {0, len(source) // 2, len(source) - 1}
        if len(told) == len(source) and all(plain_labels(label_of(source[index])) == [told[index]] for index in probed):
            return told
    indices = progress(range(len(source)), "labels", "sample")
    return [label for index in indices for label in plain_labels(label_of(source[index]))]


def checked_labels(labels: Iterable[Any], found: str = "a label is") -> list[int | str]:
    """List these labels, integers or text; others raise UserError: "FOUND None …"."""
    labels = list(labels)
    wrong = [label for label in labels if type(label) not in (int, str)]
    if wrong:
        raise UserError(f"{found} {wrong[0]!r:.80}, expected an integer or text")
    return labels


def number_labels(labels: Iterable[Any], found: str = "a label is") -> tuple[int | str, ...]:
    """Return the different ones of :func:`checked_labels` by class number: integers, then text, which is in the order
    of numbers where all of it are numbers."""
    different = set(checked_labels(labels, found))
    texts = {label for label in different if isinstance(label, str)}
    are_numbers = all(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", text) for text in texts)
    ordered = sorted(texts, key=lambda text: (float(text) if are_numbers else 0, text))
    return (*sorted(different - texts), *ordered) or ALL


def number_splits(
    splits: Sequence[list[Any]], found: str, names: Sequence[int | str] | None = None
) -> tuple[tuple[int | str, ...], list[list[int]]]:
    """Return the training data's labels by class number, which are ``names`` if these are given, and the class numbers
    of the training and the test data."""
    names = number_labels(splits[0], found) if names is None else tuple(names)
    number = {label: place for place, label in enumerate(names)}
    for label in (label for labels in splits for label in labels):
        if type(label) not in (int, str) or label not in number:
            raise UserError(f"{found} {label!r:.80} in the test data, which the training data lack")
    return names, [[number[label] for label in labels] for labels in splits]


def tell_numbers(names: tuple[int | str, ...]) -> None:
    """Say on stderr which class numbers labels have, where these are others than the labels."""
    if names not in (ALL, tuple(range(len(names)))):
        print(f"labels {some_of(names)} are classes 0 to {len(names) - 1}", file=sys.stderr)


class OwnSplit(Split):
    """The items ``x``, ``(x,)`` or ``(x, y)`` of a user's map-style data set, of one shape; its labels begin as 0. They
    are stored as they come where that is uint8 or float16, and then all are of that type."""

    def __init__(self, items: Any, name: str) -> None:
        if not len(items):
            raise UserError(f"the {name} data are empty")
        super().__init__(torch.zeros(len(items), dtype=torch.int64, device="cpu"))
        self.items, self.name = items, name
        with explained(f"sample 0 of the {name} data cannot be used"):
            first = _tensor(sample_of(items[0]))
        self.shape, self.dtype = first.shape, first.dtype if first.dtype in COMPACT else torch.float32

    def sample(self, index: int, draw: Draw | None) -> Tensor:
        with explained(f"sample {index} of the {self.name} data cannot be used"):
            return self._like_the_first(_tensor(sample_of(self.items[index])), index)

    def _like_the_first(self, sample: Tensor, index: int) -> Tensor:
        which = f"sample {index} of the {self.name} data has the"
        if self.shape != sample.shape:
            shapes = f"{which} shape {list(sample.shape)}, the first one {list(self.shape)}"
            raise UserError(f"{shapes}: bring all to one shape")
        if self.dtype != sample.dtype and self.dtype in COMPACT:
            raise UserError(f"{which} type {sample.dtype}, the first one {self.dtype}: bring all to one type")
        return sample.to(self.dtype)


class PairSplit(OwnSplit):
    """The items ``(x, condition)`` of a user's map-style data set; conditions are tensors of any one shape."""

    def __getitem__(self, at: int | Draw) -> tuple[Tensor, Any]:
        index = at.sample if isinstance(at, Draw) else at
        with explained(f"sample {index} of the {self.name} data cannot be used"):
            item = self.items[index]
            if label_of(item) is None:
                raise UserError("it has no condition, expected (x, condition) with step.groups=pairs")
            sample = self._like_the_first(_tensor(sample_of(item)), index)
            return self.values(sample), _tensor(label_of(item))


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, (Tensor, np.ndarray, np.generic, int, float)):
        raise UserError(f"it is a {type(value).__name__}, expected a tensor, an array or a number")
    tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    if tensor.is_complex():
        raise UserError("it has complex numbers, expected real ones")
    return tensor


def load_own(config: DataConfig, seed: int, pairs: bool = False) -> Dataset:
    """Load what the function or class ``config.name`` gives for ``config.arguments`` and the changed keys of ``data``.
    That is a pair (training, test) of map-style data sets; or one of them, of which one sample in ten is for testing;
    or a :class:`Dataset`. Labels are integers or text, or left out; with ``pairs`` there are conditions instead. What
    the function draws at random follows from ``seed``, on every rank. Whatever goes wrong raises UserError."""
    target = import_named(config.name, "data.name")
    changed = {key: getattr(config, key) for key in PASSED_ON if getattr(config, key) != getattr(DataConfig(), key)}
    check_arguments(target, arguments := changed | config.arguments, "data")
    for set_seed in (torch.manual_seed, random.seed, np.random.seed):
        set_seed(seed % 2**32)
    with explained(f"data.name is {config.name}"):
        made = target(**arguments)
        dataset = made if isinstance(made, Dataset) else _dataset(config.name, made, pairs)
    return dataset


def _dataset(name: str, made: Any, pairs: bool) -> Dataset:
    sources: tuple[Any, ...] = made if isinstance(made, tuple) and len(made) == 2 else (made,)
    first = sources[0]
    for source in sources:
        if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
            raise UserError(f"it gives a {type(source).__name__}, expected a map-style data set or a pair of them")
    numbered = [getattr(source, "classes", None) for source in sources]  # torchvision's data sets have it.
    if any(isinstance(of_source, list) and of_source != numbered[0] for of_source in numbered):
        raise UserError("its training and test data number their classes differently: give both the same classes")
    labels: list[list[Any]] = []
    if len(sources) == 1:
        found = [] if pairs else all_labels(made) or []
        if len(found) not in (0, len(made)):
            raise UserError(f"it has {len(found)} labels of {len(made)} samples, expected one of each")
        parts = hold_out(map(str, range(len(made))), found)
        if not all(map(len, parts)):
            raise UserError(f"{len(made)} samples are too few to test with some: give a pair (training, test)")
        sources = tuple(Subset(made, part.tolist()) for part in parts)
        labels = [[found[n] for n in part] if found else [] for part in parts]
    kind = PairSplit if pairs else OwnSplit
    train, test = splits = kind(sources[0], "training"), kind(sources[1], "test")
    if train.shape != test.shape:
        raise UserError(f"training samples have the shape {list(train.shape)}, test samples {list(test.shape)}")
    labels = labels or [[] if pairs else all_labels(source) or [] for source in sources]
    for split, found in zip(splits, labels, strict=True):
        if len(found) != len(split) and (labels[0] or found):
            raise UserError(f"it has {len(found)} labels of {len(split)} {split.name} samples, expected one of each")
    names, numbers = number_splits(labels, "it has the label")
    if labels[0]:
        train.labels, test.labels = map(torch.tensor, numbers)
        tell_numbers(names)
    return Dataset(name, train, test, tuple(map(str, names)), tuple(train.shape), _pixel_range(train, first))


def _pixel_range(train: OwnSplit, source: Any) -> tuple[float, float] | None:
    """Return the black and white of images ``[1 or 3, H, W]`` as ``source`` or else some samples tell them."""
    probed = range(0, len(train), -(-len(train) // PROBED))
    values = torch.stack([extreme for index in probed for extreme in train.sample(index, None).aminmax()])
    is_image = len(train.shape) == 3 and train.shape[0] in (1, 3)
    if not hasattr(source, "pixel_range"):
        # The first of [0, 1] and [-1, 1] that holds all values is the range of images.
        black = next((low for low in (0.0, -1.0) if low <= values.min() and values.max() <= 1), None)
        return None if black is None or not is_image else (black, 1.0)
    if source.pixel_range is None:
        return None
    black, white = source.pixel_range
    if not is_image or not black < white:
        expected = "(black, white) of images [1 or 3, H, W], or None"
        raise UserError(f"its pixel_range is {source.pixel_range}, expected {expected}")
    return float(black), float(white)
