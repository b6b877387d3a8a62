"""scikit-learn's 8 × 8 handwritten digits: 1,797 grey images of ten classes that come with that package."""

import numpy as np
from sklearn import datasets

from ..config.schema import DataConfig
from .dataset import Dataset
from .image_split import image_dataset

NUM_TRAIN = 1297  # The other 500 digits are for testing.
CLASS_NAMES = tuple("0123456789")


def load_digits(config: DataConfig | None = None, seed: int = 0) -> Dataset:
    """Load the digits, shuffled by ``default_rng(0)``: 1,297 training and 500 test images ``[1, 8, 8]`` in [-1, 1]."""
    digits = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = digits.images[order].astype(np.uint8), digits.target[order]
    splits = [(images[rows], labels[rows]) for rows in (slice(NUM_TRAIN), slice(NUM_TRAIN, None))]
    return image_dataset(config or DataConfig(), seed, splits, CLASS_NAMES, 1, 8, white=16)
