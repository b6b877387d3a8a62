"""The labels of a user's data: which there are, and which class number each has."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from tqdm import tqdm

from ..errors import UserError

ALL = ("all",)  # The one class of samples without labels.
MOST_NAMED = 10  # This many labels are named in a message.


def distinct_labels(source: Iterable[Any] | Dataset[Any]) -> set[Any] | None:
    """The labels that occur in a data set, in the one of a DataLoader, or in a list of batches.

    Where the data set does not tell them, it is read once. The set is empty where samples have no labels. It is None
    for what can be read only once, or has no end.
    """
    if isinstance(source, DataLoader):
        return distinct_labels(source.dataset)
    if isinstance(source, Sequence):  # These are batches.
        return {label for batch in source for label in _plain(label_of(batch))}
    if isinstance(source, IterableDataset) or not hasattr(source, "__len__"):
        return None
    return set(all_labels(source))


def all_labels(dataset: Any) -> list[Any]:
    """The label of each sample of a map-style data set, in order; none where samples have no labels."""
    if isinstance(dataset, Subset):
        labels = all_labels(dataset.dataset)
        return [labels[index] for index in dataset.indices] if labels else []
    if isinstance(dataset, TensorDataset):
        return _plain(label_of(dataset.tensors))
    for name in ("targets", "labels"):
        if hasattr(dataset, name):
            return _plain(getattr(dataset, name))
    if not len(dataset) or label_of(dataset[0]) is None:
        return []
    indices = tqdm(range(len(dataset)), desc="labels", unit="sample", delay=1, leave=False, disable=None)
    return [label for index in indices for label in _plain(label_of(dataset[index]))]


def label_of(item: Any) -> Any:
    """The label or labels of a sample or batch, which is ``x``, ``(x,)`` or ``(x, y)``; None without."""
    return item[1] if isinstance(item, (tuple, list)) and len(item) > 1 else None


def sample_of(item: Any) -> Any:
    """The samples of ``x``, ``(x,)`` or ``(x, y)``."""
    return item[0] if isinstance(item, (tuple, list)) else item


def number_labels(labels: set[Any]) -> tuple[int | str, ...]:
    """The labels in the order of their class numbers: integers by size, text by the alphabet.

    Raises:
        UserError: a label is neither an integer nor text.
    """
    wrong = [label for label in labels if type(label) not in (int, str)]
    if wrong:
        raise UserError(f"a label is {wrong[0]!r}, expected integers or text")
    return tuple(sorted(labels, key=lambda label: (isinstance(label, str), label))) or ALL


def number_splits(
    labels: Sequence[Any], test_labels: Sequence[Any], found: str
) -> tuple[tuple[int | str, ...], list[int], list[int]]:
    """The labels in the order of their class numbers, and the class numbers of training and of test samples.

    Raises:
        UserError: a label is neither an integer nor text, or is one of the test samples alone; the message begins with
            the words ``found``.
    """
    wrong = [label for label in (*labels, *test_labels) if not isinstance(label, (int, str))]
    if wrong:
        raise UserError(f"{found} {wrong[0]!r:.80}, expected an integer or text")
    names = number_labels(set(labels))
    number = {label: place for place, label in enumerate(names)}
    lacking = [label for label in test_labels if label not in number]
    if lacking:
        raise UserError(f"{found} {lacking[0]!r} in the test data, which the training data lack")
    return names, [number[label] for label in labels], [number[label] for label in test_labels]


def tell_numbers(names: tuple[int | str, ...]) -> None:
    """Say on stderr which class numbers labels have, where these are others than the labels."""
    if names != ALL and names != tuple(range(len(names))):
        shown = ", ".join(map(str, names[:MOST_NAMED])) + (", …" if len(names) > MOST_NAMED else "")
        print(f"labels {shown} are classes 0 to {len(names) - 1}", file=sys.stderr)


def _plain(labels: Any) -> list[Any]:
    """Labels as a list of Python's own values."""
    if labels is None:
        return []
    if isinstance(labels, Tensor) or hasattr(labels, "tolist"):
        labels = labels.tolist()
    return list(labels) if isinstance(labels, (list, tuple)) else [labels]
