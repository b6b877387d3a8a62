"""Folders of image files with one sub-directory a class."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ..config.schema import DataConfig
from ..errors import UserError
from .dataset import Dataset, hold_out
from .image_split import image_dataset, read_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


def load_folder(config: DataConfig, seed: int = 0) -> Dataset:
    """Load ``path/train/CLASS/…`` and ``path/val/CLASS/…`` (or ``test``), or else hold out some of ``path/CLASS/…``."""
    root = Path(config.path or "")
    if not root.is_dir():
        raise UserError(f"data.path is {root}, where there is no folder")
    places = [root / "train", next(filter(Path.is_dir, (root / "val", root / "test")), root / "val")]
    if not places[0].is_dir():
        places = [root, root]
    class_names = _sub_folders(places[0])
    names, labels = _list_images(places[0], class_names)
    if root in places:
        found = [(names[rows], labels[rows]) for rows in hold_out(names)]
    else:
        found = [(names, labels), _list_images(places[1], class_names)]
    for place, (names, _) in zip(places, found, strict=True):
        if not len(names):
            expected = f"a sub-directory for each class, with files that end in {' '.join(SUFFIXES)}"
            raise UserError(f"there are too few images in {place}: expected {expected}")
    splits = [(partial(_file, place, names), labels) for place, (names, labels) in zip(places, found, strict=True)]
    return image_dataset(config, seed, splits, tuple(class_names), 3)


def _file(root: Path, names: np.ndarray, index: int) -> Image.Image:
    return read_image(root / os.fsdecode(names[index]))


def _sub_folders(root: Path) -> list[str]:
    entries = os.scandir(root) if root.is_dir() else ()
    return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _list_images(root: Path, class_names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """List paths relative to ``root`` with their labels, by class and name."""
    for name in _sub_folders(root):
        if name not in class_names:
            raise UserError(f"{root / name} is a class that the training images do not have")
    found = [(file, label) for label, name in enumerate(class_names) for file in sorted(_image_files(root, name))]
    # Workers that count references to a million strings would copy every page of them.
    names = np.array([os.fsencode(file) for file, _ in found], dtype=bytes)
    return names, np.array([label for _, label in found], dtype=np.int64)


def _image_files(root: Path, class_name: str) -> Iterator[str]:
    seen = set()  # Links may lead back to a folder that is above them.
    for folder, links, names in os.walk(root / class_name, followlinks=True):
        if (place := os.path.realpath(folder)) in seen:
            links.clear()
            continue
        seen.add(place)
        yield from (f"{os.path.relpath(folder, root)}/{name}" for name in names if name.lower().endswith(SUFFIXES))
