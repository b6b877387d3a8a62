"""Data sets, the order in which they are read, and the queue that training draws its real samples from."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..config.schema import DataConfig
from ..errors import UserError
from ..utils.named import is_own, nearest
from .cifar10 import load_cifar10
from .dataset import Dataset, Draw, Split, training_batches
from .digits import load_digits
from .folder import load_folder
from .huggingface import load_huggingface
from .idx import FASHION_MNIST, MNIST
from .latents import COMMAND, load_latents
from .own import load_own
from .sample_queue import SampleQueue

__all__ = ["DATASETS", "Dataset", "Draw", "SampleQueue", "Split", "load_digits", "open_dataset", "training_batches"]


OF_TABLES, OF_FILES = ("subset", "label_column"), ("background", "skip_broken")


class Source(NamedTuple):
    """How a data set is loaded, which keys of ``data`` mean nothing to it, and what those that it needs are."""

    load: Callable[[DataConfig, int], Dataset]
    unused: tuple[str, ...] = OF_TABLES + OF_FILES
    needed: Mapping[str, str] = {}


SIZE = {"image_size": "the size to bring the images to, for example 256"}
DATASETS = {
    "digits": Source(load_digits, ("path", *OF_TABLES, *OF_FILES)),
    "mnist": Source(MNIST.load),
    "fashion_mnist": Source(FASHION_MNIST.load),
    "cifar10": Source(load_cifar10),
    "folder": Source(load_folder, OF_TABLES, {"path": "the folder of the images"} | SIZE),
    "huggingface": Source(load_huggingface, (), {"path": "a folder or the name of a data set on the hub"} | SIZE),
    "latents": Source(
        load_latents, ("image_size", "crop", *OF_TABLES, *OF_FILES), {"path": f"a folder that {COMMAND} has written"}
    ),
}


def open_dataset(config: DataConfig, seed: int = 0, pairs: bool = False) -> Dataset:
    """Open the data set that ``config`` describes, one of ours or the user's own; ``seed`` decides on flips and crops.
    With ``pairs``, the user's own has conditions in place of labels; of ours, the labels are conditions. It raises
    UserError where the data set cannot be had, and where a key of ``data`` is missing or set in vain."""
    if is_own(config.name):
        return load_own(config, seed, pairs).without_ghosts()
    if config.name not in DATASETS:
        known = f"{', '.join(DATASETS)}; or your own module:Name (did you mean {nearest(config.name, DATASETS)}?)"
        raise UserError(f"data.name is {config.name}, expected one of: {known}")
    source = DATASETS[config.name]
    for key in source.unused:
        if getattr(config, key) != getattr(DataConfig(), key):
            raise UserError(f"data.{key} is {getattr(config, key)}, which data.name={config.name} has no use for")
    for key, expected in source.needed.items():
        if getattr(config, key) is None:
            raise UserError(f"data.{key} is not set, expected {expected}")
    return source.load(config, seed).without_ghosts()
