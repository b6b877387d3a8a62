"""How far a long loop is, as a terminal shows it."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], what: str, unit: str) -> Iterable[T]:
    """The same items, with a bar on stderr after a second, where that is a terminal."""
    nowhere = True if sys.stderr is None else None  # None has tqdm look whether it is a terminal.
    return tqdm(items, desc=what, unit=unit, delay=1, leave=False, disable=nowhere)
