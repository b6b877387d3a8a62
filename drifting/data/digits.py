"""scikit-learn's 8 × 8 handwritten digits: 1,797 grey images of ten classes that come with that package."""

import numpy as np
from sklearn import datasets

from ..config.schema import DataConfig
from .dataset import Dataset
from .image_split import ArrayImages, ImageTransform

SIZE = 8
WHITE = 16  # the data's own scale is 0 … 16
NUM_TRAIN = 1297


def load_digits(config: DataConfig | None = None, seed: int = 0) -> Dataset:
    """The digits, shuffled by ``default_rng(0)``: 1,297 training and 500 test images ``[1, 8, 8]`` in [-1, 1]."""
    config = config or DataConfig()
    digits = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = digits.images[order].astype(np.uint8), digits.target[order]
    transform = ImageTransform(config.image_size or SIZE, config.flip, config.crop, seed, WHITE)
    return Dataset(
        name="digits",
        train=ArrayImages(images[:NUM_TRAIN], labels[:NUM_TRAIN], transform),
        test=ArrayImages(images[NUM_TRAIN:], labels[NUM_TRAIN:], transform),
        class_names=tuple(str(digit) for digit in range(10)),
        sample_shape=(1, transform.size, transform.size),
    )
