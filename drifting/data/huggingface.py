"""Data sets that Hugging Face's ``datasets`` loads, from disk or from the hub."""

from pathlib import Path
from typing import Any

from ..config.schema import DataConfig
from ..errors import UserError, explained, require
from .dataset import TEST_SPLITS, TRAIN_SPLITS, Dataset, called, hold_out
from .image_split import EncodedImages, ImageError, image_dataset, read_content
from .own import number_splits


def load_huggingface(config: DataConfig, seed: int = 0) -> Dataset:
    """Load the splits ``train`` and ``validation``, ``val`` or ``test``; without those, some rows are held out. The
    image column is the only one of that type. The label column is ``config.label_column`` if that is set, else the only
    one of type ``ClassLabel``, else the one called ``label``. Splits may number classes differently: names count."""
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
    labels = [_labels(table, column) for table in tables]
    if len(tables) == 1:
        parts = hold_out(map(str, range(len(tables[0]))), labels[0])
        if not all(map(len, parts)):
            raise UserError(f"{origin}, which has no test split and only {len(labels[0])} rows to take one from")
        labels, tables = [[labels[0][n] for n in part] for part in parts], [tables[0].select(part) for part in parts]
    class_names, numbers = number_splits(labels, f"column {column!r} holds", getattr(features[column], "names", None))
    splits = []
    for table, of_split in zip(tables, numbers, strict=True):
        if not isinstance(table.features.get(images[0]), datasets.Image):
            raise UserError(f"the split {table.split} has no column {images[0]!r} of images")
        undecoded = table.cast_column(images[0], datasets.Image(decode=False)).select_columns(images)
        splits.append((Cells(undecoded, images[0], config.background), of_split))
    return image_dataset(config, seed, splits, tuple(map(str, class_names)), 3)


class Cells(EncodedImages):
    """A column of a table, which holds files: all data sets decode alike, and name what is broken."""

    def __init__(self, table: Any, column: str, background: str) -> None:
        self.table, self.column, self.background = table, column, background

    def content(self, index: int) -> tuple[bytes, str]:
        cell = self.table[int(index)][self.column] or {"bytes": None, "path": None}
        origin = f"image {index} of {self.table.split or 'the data set'} ({cell['path']})"
        if cell["bytes"] is None and cell["path"] is None:
            raise ImageError(f"{origin} is missing")
        return (read_content(Path(cell["path"])) if cell["bytes"] is None else cell["bytes"]), origin


def _labels(table: Any, column: str) -> list[Any]:
    """List the labels of all rows, as names where the table has numbers that stand for these."""
    if column not in table.features:
        raise UserError(f"the split {table.split} has no column {column!r}, which holds the class")
    labels, names = list(table[column]), getattr(table.features[column], "names", None)
    if names is not None and any(label is None or label < 0 for label in labels):
        raise UserError(f"column {column!r} of the split {table.split} has rows without a known class")
    return labels if names is None else [names[label] for label in labels]


def _load_tables(datasets: Any, config: DataConfig) -> list[Any]:
    """Load the table of the training split and that of the test split, or the only one."""
    path = config.path or ""
    with explained(f"data.path is {path}, which datasets cannot load (data.subset chooses one of several)"):
        saved = any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json"))
        tables = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, config.subset)
    if not isinstance(tables, dict):
        return [tables]
    train, test = (called(splits, tables) for splits in (TRAIN_SPLITS, TEST_SPLITS))
    if not train:
        raise UserError(f"data.path is {path}, which has the splits {', '.join(tables)}, expected train among them")
    return [tables[name] for name in (*train[:1], *test[:1])]
