"""Data sets that Hugging Face's ``datasets`` loads, from disk or from the hub."""

from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..config.schema import DataConfig
from ..errors import UserError, explained, require
from .dataset import Dataset, hold_out
from .image_split import ImageError, decode_image, image_dataset, read_image
from .own import number_splits

TEST_SPLITS = ("validation", "valid", "val", "test")  # ImageNet and others keep the labels of "test" to themselves.


def load_huggingface(config: DataConfig, seed: int = 0) -> Dataset:
    """Load the splits ``train`` and ``validation``, ``val`` or ``test``; without those, some rows are held out. The
    image column is the only one of that type. The label column is ``config.label_column`` if that is set, else the only
    one of type ``ClassLabel``, else the one called ``label``."""
    datasets: Any = require("datasets", "data.name=huggingface", "huggingface")
    tables = _load_tables(datasets, config)
    origin, features = f"data.path is {config.path}", tables[0].features
    names = ", ".join(features)
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(images) != 1:
        raise UserError(f"{origin}, which has {len(images)} columns of images among {names}, expected one")
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    classes = classes or [name for name in features if name == "label"]
    if config.label_column is None and len(classes) != 1:
        choices = ", ".join(classes) or names
        raise UserError(f"{origin}: set data.label_column to the column that holds the class, one of: {choices}")
    column = config.label_column or classes[0]
    if column not in features:
        raise UserError(f"data.label_column is {column}, expected one of: {names}")
    class_names, labels = getattr(features[column], "names", None), [list(table[column]) for table in tables]
    if class_names is None:
        class_names, labels = number_splits(labels, f"column {column!r} holds")
    splits = []
    for table, of_split in zip(tables, labels, strict=True):
        if any(label is None or label < 0 for label in of_split):
            raise UserError(f"column {column!r} of the split {table.split} has rows without a known class")
        undecoded = table.cast_column(images[0], datasets.Image(decode=False)).select_columns(images)
        splits.append((partial(_cell, undecoded, images[0]), of_split))
    return image_dataset(config, seed, splits, tuple(map(str, class_names)), 3)


def _cell(table: Any, column: str, index: int) -> Image.Image:
    """Decode an image of a table, which holds files: all data sets decode alike, and name what is broken."""
    cell = table[int(index)][column] or {"bytes": None, "path": None}
    origin = f"image {index} of {table.split or 'the data set'} ({cell['path']})"
    if cell["bytes"] is not None:
        return decode_image(cell["bytes"], origin)
    if cell["path"] is None:
        raise ImageError(f"{origin} is missing")
    return read_image(Path(cell["path"]))


def _load_tables(datasets: Any, config: DataConfig) -> tuple[Any, Any]:
    path = config.path or ""
    with explained(f"data.path is {path}, which datasets cannot load (data.subset chooses one of several)"):
        saved = any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json"))
        tables = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, config.subset)
    if isinstance(tables, dict):
        if "train" not in tables:
            raise UserError(f"data.path is {path}, which has the splits {', '.join(tables)}, expected train among them")
        if tests := [tables[name] for name in TEST_SPLITS if name in tables]:
            return tables["train"], tests[0]
        tables = tables["train"]
    rows, held = hold_out(map(str, range(len(tables))))
    if not len(rows) or not len(held):
        raise UserError(f"data.path is {path}, which has no test split and only {len(tables)} rows to take one from")
    return tables.select(rows), tables.select(held)
