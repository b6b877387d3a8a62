"""Folders of image files with one sub-directory a class."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..config.schema import DataConfig
from ..errors import UserError
from .dataset import Dataset
from .image_split import ImageSplit, ImageTransform, held_out, read_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
TEST_FOLDERS = ("val", "test")


class FolderImages(ImageSplit):
    """Image files below ``root``, decoded to RGB when they are asked for."""

    def __init__(self, root: Path, files: list[tuple[str, int]], transform: ImageTransform) -> None:
        super().__init__(torch.tensor([label for _, label in files], dtype=torch.int64), transform)
        self.root = root
        # One array rather than a million strings: workers that touch reference counts would copy every page of them.
        self.files = np.array([os.fsencode(file) for file, _ in files])

    def image(self, index: int) -> Image.Image:
        return read_image(self.root / os.fsdecode(self.files[index]))


def load_folder(config: DataConfig, seed: int = 0) -> Dataset:
    """``path/train/CLASS/…`` and ``path/val/CLASS/…`` (or ``test``), or ``path/CLASS/…`` split by the hash of the name.

    Classes are numbered in the order of their names. Images are decoded to RGB.
    """
    if config.path is None:
        raise UserError("data.path is not set, expected the folder of the images")
    if config.image_size is None:
        raise UserError("data.image_size is not set, expected the size to bring the images to, for example 256")
    root = Path(config.path)
    if not root.is_dir():
        raise UserError(f"data.path is {root}, where there is no folder")
    train_root = root / "train" if (root / "train").is_dir() else root
    class_names = _sub_folders(train_root)
    files = _list_images(train_root, class_names)
    if train_root == root:
        test_root = root
        train, test = ([file for file in files if held_out(file[0]) == held] for held in (False, True))
    else:
        test_root = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), root / TEST_FOLDERS[0])
        train, test = files, _list_images(test_root, class_names)
    for place, found in ((train_root, train), (test_root, test)):
        if not found:
            raise UserError(
                f"there are too few images in {place}: expected a sub-directory for each class, with files that end in "
                f"{' '.join(SUFFIXES)}"
            )
    transform = ImageTransform(config.image_size, config.flip, config.crop, seed)
    return Dataset(
        name="folder",
        train=FolderImages(train_root, train, transform),
        test=FolderImages(test_root, test, transform),
        class_names=tuple(class_names),
        sample_shape=(3, transform.size, transform.size),
    )


def _list_images(root: Path, class_names: list[str]) -> list[tuple[str, int]]:
    """Paths relative to ``root`` with their labels, by class and name."""
    if not root.is_dir():
        return []
    for name in _sub_folders(root):
        if name not in class_names:
            raise UserError(f"{root / name} is a class that the training images do not have")
    return [(file, label) for label, name in enumerate(class_names) for file in sorted(_image_files(root, name))]


def _sub_folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def _image_files(root: Path, class_name: str) -> Iterator[str]:
    seen = set()  # links may lead back to a folder that is above them
    for folder, links, names in os.walk(root / class_name, followlinks=True):
        if (place := os.path.realpath(folder)) in seen:
            links.clear()
            continue
        seen.add(place)
        relative = os.path.relpath(folder, root)
        yield from (os.path.join(relative, name) for name in names if name.lower().endswith(SUFFIXES))
