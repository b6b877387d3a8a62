"""Folders of image files with one sub-directory a class, or with labels in a ``dataset.json`` as StyleGAN has it."""

import os
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..config.schema import DataConfig
from ..errors import UserError, explained, some_of
from ..utils.files import read_object
from .dataset import TEST_SPLITS, TRAIN_SPLITS, Dataset, called, hold_out
from .image_split import EncodedImages, image_dataset, read_content
from .own import ALL, number_splits

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".gif", ".webp", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff")
JUNK = {  # File managers, archives and servers leave these.
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "@recycle", "#recycle", "#snapshot",
    "$recycle.bin", "system volume information", "lost+found", "__pycache__",
}  # fmt: skip
TOLD = "dataset.json"


def load_folder(config: DataConfig, seed: int = 0) -> Dataset:
    """Load ``path/train/CLASS/…`` and ``path/val/CLASS/…`` (or another name of a split), or else hold out some of
    ``path/CLASS/…``. It raises UserError where it is unclear which of these it is, or a class has no images."""
    root = Path(config.path or "")
    if not root.is_dir():
        raise UserError(f"data.path is {root}, where there is no folder")
    places, skipped = _places(root), Counter[str]()
    files, labels = _list_images(root, places[0], skipped)
    if len(places) == 1:
        listed = [([files[n] for n in part], [labels[n] for n in part]) for part in hold_out(files, labels)]
        places = [root, root]
    else:
        listed = [(files, labels), _list_images(root, places[1], skipped, {*labels})]
    for place, (files, _) in zip(places, listed, strict=True):
        if not files:
            expected = f"a sub-directory for each class, with files that end in {' '.join(SUFFIXES)}"
            raise UserError(f"there are too few images in {place}: expected {expected}")
    class_names, numbers = number_splits([labels for _, labels in listed], f"{root} holds the label")
    images = [Files(place, files, config.background) for place, (files, _) in zip(places, listed, strict=True)]
    notes = (f"passed over, as no images in the folder of a class: {_worded(skipped)}",) if skipped else ()
    return image_dataset(config, seed, zip(images, numbers, strict=True), tuple(map(str, class_names)), 3, notes=notes)


class Files(EncodedImages):
    """Image files with paths relative to ``root``."""

    def __init__(self, root: Path, files: list[str], background: str) -> None:
        self.root, self.background = root, background
        # Workers that count references to a million strings would copy every page of them.
        self.names = np.array([os.fsencode(file) for file in files], dtype=bytes)

    def content(self, index: int) -> tuple[bytes, str]:
        path = self.root / os.fsdecode(self.names[index])
        return read_content(path), str(path)


def _places(root: Path) -> list[Path]:
    """Find the folders of training and of test images, or the one folder that has both."""
    folders = _sub_folders(root)
    inside = {name: _sub_folders(root / name) for name in folders if _is_split_like(root / name)}
    train, test = (called(of, folders) for of in (TRAIN_SPLITS, TEST_SPLITS))
    if (train and test) or any(name in inside for name in train + test):  # Else it is a class that is called train.
        for names, what, known in ((train, "training", TRAIN_SPLITS), (test, "test", TEST_SPLITS)):
            if not names:
                there = ", ".join(train + test)
                raise UserError(f"{root} has {there}, but a folder of {what} images is missing: call it {known[0]}")
            if names[1:] and (names is train or names[0].lower() == names[1].lower()):
                raise UserError(f"{root} has {' and '.join(names)}, expected one folder of {what} images")
        return [root / train[0], root / test[0]]
    for name, names in inside.items():
        if called(TRAIN_SPLITS, names) and called(TEST_SPLITS, names):
            raise UserError(f"{root / name} has the folders {some_of(names)}: set data.path to it")
    common = inside.get(folders[0], []) if folders[1:] else []
    if common[1:] and all(inside.get(name) == common for name in folders):
        each = f"each of the folders {some_of(folders)} in {root} holds the folders {some_of(common)}"
        raise UserError(f"{each}: call them train and val if they are splits, or set data.path to one of them")
    return [root]


def _is_split_like(folder: Path) -> bool:
    """Tell whether a folder holds folders and no images, or tells the labels of its images."""
    holds_folders = False
    for entry in os.scandir(folder):
        if entry.name == TOLD:
            return True
        if not entry.is_dir() and entry.name.lower().endswith(SUFFIXES) and not _is_junk(entry.name):
            return False
        holds_folders |= entry.is_dir() and not _is_junk(entry.name)
    return holds_folders


def _sub_folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not _is_junk(entry.name))


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in JUNK


def _list_images(
    root: Path, place: Path, skipped: Counter[str], known: Collection[Any] | None = None
) -> tuple[list[str], list[Any]]:
    """List the image files in ``place``, relative to it, with their labels; ``skipped`` counts others by suffix. Each
    class has images, or else is one of those ``known``."""
    told, files, labels = _told_labels(root, place), list[str](), list[Any]()
    if told is not None:
        return _list_told(place, told, skipped)
    skipped.update(_suffix(entry.name) for entry in os.scandir(place) if entry.is_file() and not _is_junk(entry.name))
    for name in _sub_folders(place):
        others = Counter[str]()
        found = sorted(_image_files(place, name, others))
        if known is None and not found:
            there = f", it holds {_worded(others)}" if others else ""
            raise UserError(f"{place / name} is a class without an image{there}: fill it or take it away")
        if known is not None and name not in known:
            raise UserError(f"{place / name} is a class that the training images do not have")
        files += found
        labels += [name] * len(found)
        skipped.update(others)
    return files, labels


def _list_told(place: Path, told: dict[str, Any], skipped: Counter[str]) -> tuple[list[str], list[Any]]:
    files = sorted(_image_files(place, ".", skipped))
    labels = [told.get(os.path.normpath(place / file)) for file in files] if told else [*ALL] * len(files)
    unknown = [file for file, label in zip(files, labels, strict=True) if label is None]
    if unknown:
        which = f"{len(unknown)} of the {len(files)} images in {place}, such as {unknown[0]}"
        raise UserError(f"{TOLD} has no label of {which}: add them to it, or take these images away")
    return files, labels


def _told_labels(root: Path, place: Path) -> dict[str, Any] | None:
    """Read the label of each path from the file that tells them, if there is one; none has a label if it is empty."""
    for folder in dict.fromkeys((place, root)):
        with explained(f"{folder / TOLD} cannot be read as the labels of images"):
            content = read_object(folder / TOLD) if (folder / TOLD).is_file() else {}
            if "labels" in content:
                return {os.path.normpath(folder / name.replace("\\", "/")): n for name, n in content["labels"] or ()}
    return None


def _image_files(root: Path, class_name: str, skipped: Counter[str]) -> Iterator[str]:
    seen = set()  # Links may lead back to a folder that is above them.
    for folder, links, names in os.walk(root / class_name, followlinks=True):
        if (place := os.path.realpath(folder)) in seen:
            links.clear()
            continue
        seen.add(place)
        links[:] = [name for name in links if not _is_junk(name)]
        for name in names:
            if name.lower().endswith(SUFFIXES) and not _is_junk(name):
                yield os.path.normpath(f"{os.path.relpath(folder, root)}/{name}")
            elif not _is_junk(name) and name != TOLD:
                skipped[_suffix(name)] += 1


def _suffix(name: str) -> str:
    return Path(name).suffix.lower() or "without a suffix"


def _worded(skipped: Counter[str]) -> str:
    ordered = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    return some_of([f"{count} {suffix}" for suffix, count in ordered])
