"""A user's own data set, by the name ``module:Name``, as one of ours."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from ..config.schema import DataConfig
from ..errors import UserError, reason
from ..utils.named import check_arguments, import_named
from .dataset import Dataset, Draw, Split, hold_out
from .labels import all_labels, number_splits, sample_of, tell_numbers

PROBED = 1000  # At most so many training samples tell the range of pixels.
PIXEL_RANGES = ((0.0, 1.0), (-1.0, 1.0))  # The first that holds all values is that of images.
UNSAID = object()
PASSED_ON = ("path", "image_size", "flip", "crop", "subset", "label_column")


class OwnSplit(Split):
    """The items ``x``, ``(x,)`` or ``(x, y)`` of a user's map-style data set; ``name`` is "training" or "test".

    Samples become float32 and must all have the shape of the first one. ``labels`` are to be set.
    """

    def __init__(self, items: Any, name: str) -> None:
        if not len(items):
            raise UserError(f"the {name} data are empty")
        super().__init__(torch.zeros(len(items), dtype=torch.int64))
        self.items, self.name = items, name
        self.shape = self._read(0).shape

    def sample(self, index: int, draw: Draw | None) -> Tensor:
        sample = self._read(index)
        if sample.shape != self.shape:
            raise UserError(
                f"sample {index} of the {self.name} data has the shape {list(sample.shape)}, the first one "
                f"{list(self.shape)}: bring all to one shape"
            )
        return sample

    def _read(self, index: int) -> Tensor:
        try:
            x = sample_of(self.items[index])
            if not isinstance(x, (Tensor, np.ndarray, np.generic, int, float)):
                raise UserError(f"it is a {type(x).__name__}, expected a tensor, an array or a number")
            sample = x.detach().cpu() if isinstance(x, Tensor) else torch.from_numpy(np.array(x))
            if sample.is_complex():
                raise UserError("it has complex numbers, expected real ones")
            return sample.float()
        except Exception as error:  # The user's code may raise anything.
            raise UserError(f"sample {index} of the {self.name} data cannot be used: {reason(error)}") from error


def load_own(config: DataConfig) -> Dataset:
    """What the function or class ``config.name`` gives when it is called with ``config.arguments``.

    That is a pair (training, test) of map-style data sets; or one of them, of which one sample in ten is for testing;
    or a :class:`Dataset`. Keys of ``data`` that are not left as they are by default are arguments as well. Samples may
    have any shape. Labels are integers or text, of which stderr tells the class numbers, or are left out.

    Raises:
        UserError: there is no such function, it lacks an argument or raises an error, or gives anything else.
    """
    target = import_named(config.name, "data.name")
    changed = {key: getattr(config, key) for key in PASSED_ON if getattr(config, key) != getattr(DataConfig(), key)}
    arguments = changed | config.arguments
    check_arguments(target, arguments, "data")
    try:
        made = target(**arguments)
        return made if isinstance(made, Dataset) else _dataset(config.name, made)
    except Exception as error:  # The user's code may raise anything.
        raise UserError(f"data.name is {config.name}: {reason(error)}") from error


def _dataset(name: str, made: Any) -> Dataset:
    sources: tuple[Any, ...] = made if isinstance(made, tuple) and len(made) == 2 else (made,)
    for source in sources:
        if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
            raise UserError(f"it gives a {type(source).__name__}, expected a map-style data set or a pair of them")
    said = getattr(sources[0], "pixel_range", UNSAID)
    if len(sources) == 1:
        parts = hold_out(map(str, range(len(made))))
        if not len(parts[1]):
            raise UserError(f"{len(made)} samples are too few to test with some: give a pair (training, test)")
        sources = tuple(Subset(made, part.tolist()) for part in parts)
    train, test = (OwnSplit(source, part) for source, part in zip(sources, ("training", "test"), strict=True))
    if train.shape != test.shape:
        raise UserError(f"training samples have the shape {list(train.shape)}, test samples {list(test.shape)}")
    class_names = _number_labels(train, test)
    return Dataset(name, train, test, class_names, tuple(train.shape), _pixel_range(train, said))


def _number_labels(train: OwnSplit, test: OwnSplit) -> tuple[str, ...]:
    """Set the labels of both splits to class numbers; returns the names of the classes."""
    labels: list[list[Any]] = []
    for split in (train, test):
        of_split = [label.tolist() if hasattr(label, "tolist") else label for label in all_labels(split.items)]
        if len(of_split) != len(split) and (of_split or any(labels)):
            raise UserError(f"it has {len(of_split)} labels of {len(split)} {split.name} samples, expected one of each")
        labels.append(of_split)
    names, numbers, test_numbers = number_splits(labels[0], labels[1], "it has the label")
    if labels[0]:
        train.labels, test.labels = torch.tensor(numbers), torch.tensor(test_numbers)
        tell_numbers(names)
    return tuple(map(str, names))


def _pixel_range(train: OwnSplit, said: Any) -> tuple[float, float] | None:
    """The values of black and white in images ``[1 or 3, H, W]``; None of other samples.

    Some samples tell it unless the data set has ``said`` it.
    """
    values = [train.sample(index, None).aminmax() for index in range(0, len(train), -(-len(train) // PROBED))]
    low, high = float(min(pair.min for pair in values)), float(max(pair.max for pair in values))
    is_image = len(train.shape) == 3 and train.shape[0] in (1, 3)
    if said is UNSAID:
        ranges = PIXEL_RANGES if is_image else ()
        return next((pair for pair in ranges if pair[0] <= low and high <= pair[1]), None)
    if said is None:
        return None
    black, white = said
    if not is_image or not black < white:
        raise UserError(f"its pixel_range is {said}, expected (black, white) of images [1 or 3, H, W], or None")
    return float(black), float(white)
