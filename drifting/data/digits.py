"""scikit-learn's 8 × 8 handwritten digits: 1,797 grey images of ten classes that come with that package."""

import numpy as np
import torch
from sklearn import datasets

from .dataset import Dataset

PIXEL_MAX = 16  # the data's own scale is 0 … 16
NUM_TRAIN = 1297


def load_digits() -> Dataset:
    """The digits, shuffled by ``default_rng(0)``: 1,297 training and 500 test images ``[1, 8, 8]`` in [-1, 1]."""
    digits = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = torch.from_numpy(digits.images[order] / (PIXEL_MAX / 2) - 1).float().unsqueeze(1)
    labels = torch.from_numpy(digits.target[order]).long()
    return Dataset(
        name="digits",
        train_images=images[:NUM_TRAIN],
        train_labels=labels[:NUM_TRAIN],
        test_images=images[NUM_TRAIN:],
        test_labels=labels[NUM_TRAIN:],
        num_classes=10,
        pixel_range=(-1.0, 1.0),
    )
