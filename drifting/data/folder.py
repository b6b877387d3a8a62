"""Folders of image files with one sub-directory a class."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..config.schema import DataConfig
from ..errors import UserError
from .dataset import Dataset, hold_out
from .image_split import image_dataset, read_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
TEST_FOLDERS = ("val", "test")


@dataclass(frozen=True)
class Files:
    """Image files below ``root``, decoded to RGB when they are asked for.

    Their names are one array rather than a million strings: workers that touch reference counts would copy every page
    of these.
    """

    root: Path
    names: NDArray[np.bytes_]

    def __getitem__(self, index: int) -> Image.Image:
        return read_image(self.root / os.fsdecode(self.names[index]))


def load_folder(config: DataConfig, seed: int = 0) -> Dataset:
    """``path/train/CLASS/…`` and ``path/val/CLASS/…`` (or ``test``), or ``path/CLASS/…`` split by the hash of the name.

    Classes are numbered in the order of their names. Images are decoded to RGB.
    """
    root = Path(config.path or "")
    if not root.is_dir():
        raise UserError(f"data.path is {root}, where there is no folder")
    train_root = test_root = root
    if (root / "train").is_dir():
        train_root = root / "train"
        test_root = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), root / TEST_FOLDERS[0])
    class_names = _sub_folders(train_root)
    train, train_labels = _list_images(train_root, class_names)
    if train_root == root:
        rows, held = hold_out(train)
        train, train_labels, test, test_labels = train[rows], train_labels[rows], train[held], train_labels[held]
    else:
        test, test_labels = _list_images(test_root, class_names)
    for place, found in ((train_root, train), (test_root, test)):
        if not len(found):
            raise UserError(
                f"there are too few images in {place}: expected a sub-directory for each class, with files that end in "
                f"{' '.join(SUFFIXES)}"
            )
    splits = (Files(train_root, train), train_labels), (Files(test_root, test), test_labels)
    return image_dataset(config, seed, *splits, tuple(class_names), 3)


def _list_images(root: Path, class_names: list[str]) -> tuple[NDArray[np.bytes_], NDArray[np.int64]]:
    """Paths relative to ``root`` with their labels, by class and name."""
    for name in _sub_folders(root):
        if name not in class_names:
            raise UserError(f"{root / name} is a class that the training images do not have")
    files = [sorted(_image_files(root, name)) for name in class_names]
    names = np.array([os.fsencode(file) for of_class in files for file in of_class], dtype=bytes)
    return names, np.array([label for label, of_class in enumerate(files) for _ in of_class], dtype=np.int64)


def _sub_folders(root: Path) -> list[str]:
    if not root.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def _image_files(root: Path, class_name: str) -> Iterator[str]:
    seen = set()  # Links may lead back to a folder that is above them.
    for folder, links, names in os.walk(root / class_name, followlinks=True):
        if (place := os.path.realpath(folder)) in seen:
            links.clear()
            continue
        seen.add(place)
        relative = os.path.relpath(folder, root)
        yield from (os.path.join(relative, name) for name in names if name.lower().endswith(SUFFIXES))
