"""What training needs of a data set, and the order in which it is read."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.utils.data import Sampler


@dataclass(frozen=True)
class Dataset:
    """Labelled images in memory, split into training and test images.

    Images are float32 ``[N, C, H, W]``, labels int64 ``[N]`` in ``[0, num_classes)``. ``pixel_range`` holds the two
    values that stand for black (0) and white (255).
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    pixel_range: tuple[float, float]


class EndlessShuffle(Sampler[int]):
    """Indices ``0 … size - 1`` in a new random order every epoch, without end.

    The order depends on ``seed`` and the epoch only, so that a run resumed at ``start`` (samples already drawn) sees
    what it would have seen.
    """

    def __init__(self, size: int, seed: int, start: int = 0) -> None:
        self.size, self.seed, self.start = size, seed, start

    def __iter__(self) -> Iterator[int]:
        epoch, offset = divmod(self.start, self.size)
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.size)
            yield from order[offset:].tolist()
            epoch, offset = epoch + 1, 0
