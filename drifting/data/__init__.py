"""Data sets and the queue that training draws its real samples from."""

from collections.abc import Callable

from .dataset import Dataset, EndlessShuffle
from .digits import load_digits
from .sample_queue import SampleQueue

DATASETS: dict[str, Callable[[], Dataset]] = {"digits": load_digits}

__all__ = ["DATASETS", "Dataset", "EndlessShuffle", "SampleQueue", "load_digits"]
