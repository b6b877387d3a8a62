"""Data sets that Hugging Face's ``datasets`` loads, from disk or from the hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..config.schema import DataConfig
from ..errors import UserError, reason, require
from .dataset import Dataset, hold_out
from .image_split import ImageError, decode_image, image_dataset, read_image
from .labels import number_splits

TEST_SPLITS = ("validation", "valid", "val", "test")  # ImageNet and others keep the labels of "test" to themselves.


@dataclass(frozen=True)
class Rows:
    """Images in a column of a table of ``datasets``, decoded to RGB when they are asked for.

    The column holds the images' files, so that all data sets decode alike and name what is broken.
    """

    table: Any
    column: str

    def __getitem__(self, index: int) -> Image.Image:
        cell = self.table[int(index)][self.column] or {"bytes": None, "path": None}
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
    datasets = require("datasets", "data.name=huggingface", "huggingface")
    origin = f"data.path is {config.path}"
    tables = _splits(_load_tables(datasets, config), origin)
    names, columns = tables[0].column_names, _columns(tables[0], datasets.Image)
    if len(columns) != 1:
        raise UserError(f"{origin}, which has {len(columns)} columns of images among {names}, expected one")
    label_column = config.label_column or _label_column(tables[0], datasets.ClassLabel, origin)
    if label_column not in names:
        raise UserError(f"data.label_column is {label_column}, expected one of: {', '.join(names)}")
    class_names, labels = _number_labels(tables, label_column)
    undecoded = (table.cast_column(columns[0], datasets.Image(decode=False)) for table in tables)
    pictures = (Rows(table.select_columns(columns), columns[0]) for table in undecoded)
    train, test = zip(pictures, labels, strict=True)
    return image_dataset(config, seed, train, test, class_names, 3)


def _load_tables(datasets: Any, config: DataConfig) -> Any:
    """A table, or a dictionary of them by split."""
    path = config.path or ""
    try:
        if any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return datasets.load_from_disk(path)
        return datasets.load_dataset(path, config.subset)
    except Exception as error:  # There is no common class for no network, no access, no such data set, several subsets.
        raise UserError(
            f"data.path is {path}, which datasets cannot load: {reason(error)} (data.subset chooses one of several)"
        ) from error


def _splits(tables: Any, origin: str) -> tuple[Any, Any]:
    """Training and test table."""
    if isinstance(tables, dict):
        if "train" not in tables:
            raise UserError(f"{origin}, which has the splits {', '.join(tables)}, expected train among them")
        test = next((tables[name] for name in TEST_SPLITS if name in tables), None)
        if test is not None:
            return tables["train"], test
        tables = tables["train"]
    rows, held = hold_out(map(str, range(len(tables))))
    if not len(rows) or not len(held):
        raise UserError(f"{origin}, which has no test split and only {len(tables)} rows to take one from")
    return tables.select(rows), tables.select(held)


def _columns(table: Any, kind: type) -> list[str]:
    return [name for name, feature in table.features.items() if isinstance(feature, kind)]


def _label_column(table: Any, class_label: type, origin: str) -> str:
    columns = _columns(table, class_label)
    if len(columns) == 1:
        return columns[0]
    if not columns and "label" in table.column_names:
        return "label"
    raise UserError(
        f"{origin}: set data.label_column to the column that holds the class, "
        f"one of: {', '.join(columns or table.column_names)}"
    )


def _number_labels(tables: tuple[Any, Any], column: str) -> tuple[tuple[str, ...], tuple[list[int], list[int]]]:
    """The names of the classes, which the column's type gives or which are its values in order, and the class numbers
    of the rows of each table."""
    train, test = (list(table[column]) for table in tables)
    names = getattr(tables[0].features[column], "names", None)
    if names is None:
        names, train, test = number_splits(train, test, f"column {column!r} holds")
    for table, labels in zip(tables, (train, test), strict=True):
        if any(label is None or label < 0 for label in labels):
            raise UserError(f"column {column!r} of the split {table.split} has rows without a known class")
    return tuple(map(str, names)), (train, test)
