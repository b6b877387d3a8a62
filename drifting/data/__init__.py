"""Data sets, the order in which they are read, and the queue that training draws its real samples from."""

from collections.abc import Callable
from typing import NamedTuple

from ..config.schema import DataConfig
from ..errors import UserError
from .cifar10 import load_cifar10
from .dataset import Dataset, Draw, EndlessShuffle, Split, training_batches
from .digits import load_digits
from .folder import load_folder
from .huggingface import load_huggingface
from .idx import load_fashion_mnist, load_mnist
from .latents import load_latents
from .sample_queue import SampleQueue


class Source(NamedTuple):
    """How a kind of data set is loaded, and the keys of ``data`` that mean nothing to it."""

    load: Callable[[DataConfig, int], Dataset]
    unused: tuple[str, ...] = ("subset", "label_column")


DATASETS = {
    "digits": Source(load_digits, ("path", "subset", "label_column")),
    "mnist": Source(load_mnist),
    "fashion_mnist": Source(load_fashion_mnist),
    "cifar10": Source(load_cifar10),
    "folder": Source(load_folder),
    "huggingface": Source(load_huggingface, ()),
    "latents": Source(load_latents, ("image_size", "crop", "subset", "label_column")),
}


def open_dataset(config: DataConfig, seed: int = 0) -> Dataset:
    """The data set that ``config`` describes; ``seed`` is that of flips and crops.

    Raises:
        UserError: it is not there, cannot be read or needs a package that is not installed; a key that it has no use
            for is set.
    """
    source = DATASETS[config.name]
    for key in source.unused:
        if getattr(config, key) != getattr(DataConfig(), key):
            raise UserError(f"data.{key} is {getattr(config, key)}, which data.name={config.name} has no use for")
    return source.load(config, seed)


__all__ = [
    "DATASETS", "DataConfig", "Dataset", "Draw", "EndlessShuffle", "SampleQueue", "Split", "load_digits",
    "open_dataset", "training_batches",
]  # fmt: skip
