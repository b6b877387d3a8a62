"""Data sets that Hugging Face's ``datasets`` loads, from disk or from the hub."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..config.schema import DataConfig
from ..errors import UserError
from .dataset import Dataset
from .image_split import ImageError, ImageSplit, ImageTransform, decode_image, held_out, read_image

TEST_SPLITS = ("validation", "valid", "val", "test")  # ImageNet and others keep the labels of "test" to themselves


class HuggingFaceImages(ImageSplit):
    """Rows of a table of ``datasets`` with a column of encoded images, decoded to RGB when they are asked for."""

    def __init__(self, table: Any, image_column: str, labels: list[int], transform: ImageTransform) -> None:
        super().__init__(torch.tensor(labels, dtype=torch.int64), transform)
        self.table, self.image_column = table, image_column

    def image(self, index: int) -> Image.Image:
        cell = self.table[int(index)][self.image_column] or {"bytes": None, "path": None}
        origin = f"image {index} of {self.table.split or 'the data set'} ({cell['path']})"
        if cell["bytes"] is not None:
            return decode_image(cell["bytes"], origin)
        if cell["path"] is None:
            raise ImageError(f"{origin} is missing")
        return read_image(Path(cell["path"]))


def load_huggingface(config: DataConfig, seed: int = 0) -> Dataset:
    """The splits ``train`` and ``validation``, ``val`` or ``test``; without the latter, one row in ten is for testing.

    The image column is the only one of that type; the label column the only one of type ``ClassLabel`` or else the
    one called ``label``, unless ``config.label_column`` names it. Images are decoded to RGB.
    """
    if config.path is None:
        raise UserError("data.path is not set, expected a folder or the name of a data set on the hub")
    if config.image_size is None:
        raise UserError("data.image_size is not set, expected the size to bring the images to, for example 64")
    train, test = _splits(_load_tables(config), config.path)
    image_column = _image_column(train, config.path)
    label_column = config.label_column or _label_column(train, config.path)
    if label_column not in train.column_names:
        raise UserError(f"data.label_column is {label_column}, expected one of: {', '.join(train.column_names)}")
    class_names = _class_names(train, label_column)
    transform = ImageTransform(config.image_size, config.flip, config.crop, seed)

    def images(table: Any) -> HuggingFaceImages:
        labels = _labels(table, label_column, class_names)
        return HuggingFaceImages(_undecoded(table, image_column), image_column, labels, transform)

    return Dataset(
        name="huggingface",
        train=images(train),
        test=images(test),
        class_names=class_names,
        sample_shape=(3, transform.size, transform.size),
    )


def _load_tables(config: DataConfig) -> Any:
    """A table, or a dictionary of them by split."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "data.name is huggingface, which needs the package datasets: `pip install 'drifting[huggingface]'`"
        ) from error
    assert config.path is not None
    try:
        if any((Path(config.path) / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return datasets.load_from_disk(config.path)
        return datasets.load_dataset(config.path, config.subset)
    except Exception as error:  # offline, no access, no such data set, several subsets: no base class in common
        reason = " ".join(str(error).split())
        raise UserError(
            f"data.path is {config.path}, which datasets cannot load: {type(error).__name__}: {reason} "
            "(data.subset chooses one of several)"
        ) from error


def _splits(tables: Any, path: str) -> tuple[Any, Any]:
    """Training and test table."""
    if isinstance(tables, dict):
        if "train" not in tables:
            raise UserError(f"data.path is {path}, which has the splits {', '.join(tables)}, expected train among them")
        test = next((tables[name] for name in TEST_SPLITS if name in tables), None)
        if test is not None:
            return tables["train"], test
        tables = tables["train"]
    rows = np.arange(len(tables))
    held = np.array([held_out(str(row)) for row in rows], dtype=bool)
    if held.all() or not held.any():
        raise UserError(f"data.path is {path}, which has no test split and only {len(rows)} rows to take one from")
    return tables.select(rows[~held]), tables.select(rows[held])


def _image_column(table: Any, path: str) -> str:
    import datasets

    columns = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    if len(columns) != 1:
        raise UserError(f"data.path is {path}, which has {len(columns)} columns of images among {table.column_names}, "
                        "expected one")  # fmt: skip
    return columns[0]


def _label_column(table: Any, path: str) -> str:
    import datasets

    columns = [name for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(columns) == 1:
        return columns[0]
    if not columns and "label" in table.column_names:
        return "label"
    raise UserError(
        f"data.path is {path}: set data.label_column to the column that holds the class, "
        f"one of: {', '.join(columns or table.column_names)}"
    )


def _class_names(table: Any, column: str) -> tuple[str, ...]:
    """The names that the column's type gives, or its values in order."""
    if names := getattr(table.features[column], "names", None):
        return tuple(names)
    values = list(table[column])
    wrong = [value for value in values if not isinstance(value, (int, str))]
    if wrong:
        raise UserError(f"column {column!r} holds {wrong[0]!r}, expected a class in each row: an integer or text")
    return tuple(map(str, sorted(set(values))))


def _labels(table: Any, column: str, class_names: tuple[str, ...]) -> list[int]:
    values = list(table[column])
    if getattr(table.features[column], "names", None) is None:
        number = {name: label for label, name in enumerate(class_names)}
        values = [number.get(str(value), -1) for value in values]
    if any(value is None or value < 0 for value in values):
        raise UserError(f"column {column!r} of the split {table.split} has rows without a known class")
    return values


def _undecoded(table: Any, image_column: str) -> Any:
    """The table with images as their files' bytes, so that all data sets decode alike and name what is broken."""
    import datasets

    return table.cast_column(image_column, datasets.Image(decode=False)).select_columns([image_column])
