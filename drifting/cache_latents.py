"""``python -m drifting.cache_latents SRC DST``: encode images once, to train on their latents.

As in the release's cache, each image is centre-cropped and encoded as it is and mirrored, and what is kept of either
is one draw from the VAE's posterior, with the same noise for both. :mod:`drifting.data.latents` describes the format.
A shard is written whole or not at all, then listed in the index, so that the same command goes on after a kill.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from .cli import ArgumentParser, run_command
from .config.schema import DataConfig
from .data import DATASETS, Dataset, Split, open_dataset
from .data.dataset import load_batches, worker_settings
from .data.image_split import ImageError
from .data.latents import INDEX, SPLITS, read_index
from .errors import UserError, reason
from .hub.vae import LATENT_SCALE, VAE, encode_images
from .utils.files import atomic_write

Encoder = Callable[[Tensor], tuple[Tensor, Tensor]]  # images [B, 3, H, W] to mean and standard deviation of latents
DTYPE = np.float16
SHARD_SIZE = 8192  # That many images have 134 MB of 4 × 32 × 32 latents.
NUMBERS = {  # Options with their default, least value and description.
    "image-size": (256, 1, "of the centre crops"), "batch-size": (32, 1, "images encoded at once"),
    "shard-size": (SHARD_SIZE, 1, "images a file"), "workers": (2, 0, "processes that read and decode images"),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m drifting.cache_latents",
        description="Encode images to latents. The same command again goes on where the last one stopped.",
    )
    kinds = [name for name, source in DATASETS.items() if "path" not in source.unused and name != "latents"]
    parser.add_argument("source", metavar="SRC", help="folder of the images, or a name on the Hugging Face hub")
    parser.add_argument("destination", metavar="DST", type=Path, help="folder for the latents")
    parser.add_argument("--data", choices=kinds, default="folder", help="what SRC holds (default: folder)")
    for name, (default, _, what) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: {default})")
    for name in ("subset", "label-column"):
        parser.add_argument(f"--{name}", help="of a Hugging Face data set that has several")
    arguments = parser.parse_args(argv)
    for name, (_, least, _) in NUMBERS.items():
        if (number := getattr(arguments, name.replace("-", "_"))) < least:
            raise UserError(f"--{name} is {number}, expected {least} or more")
    config = DataConfig(
        name=arguments.data, path=arguments.source, image_size=arguments.image_size,
        subset=arguments.subset, label_column=arguments.label_column,
    )  # fmt: skip
    index = cache_latents(
        open_dataset(config), arguments.destination,
        origin={"data": config.name, "path": config.path, "subset": config.subset, "vae": VAE}, encode=encode_images,
        batch_size=arguments.batch_size, shard_size=arguments.shard_size, workers=arguments.workers,
    )  # fmt: skip
    counts = [f"{len(index['splits'][name]['labels'])} {name}" for name in SPLITS]
    print(f"{arguments.destination} holds the latents of {' and '.join(counts)} images")
    skipped = sum(len(index["splits"][name]["skipped"]) for name in SPLITS)
    if skipped:
        print(f"skipped {skipped} images that cannot be decoded: {arguments.destination / INDEX} names them")
    return 0


def cache_latents(
    dataset: Dataset,
    destination: Path,
    *,
    origin: dict[str, Any],
    encode: Encoder,
    batch_size: int = 32,
    shard_size: int = SHARD_SIZE,
    workers: int = 0,
) -> dict[str, Any]:
    """Write the latents of ``dataset`` that ``destination`` does not hold yet, and return its index.

    Args:
        dataset: images of one or three channels; grey ones are encoded as RGB.
        destination: folder, made if need be.
        origin: what ``dataset`` and ``encode`` are, kept in the index. Latents of another origin are not added to.
        encode: from images in [-1, 1] to mean and standard deviation of their scaled latents.
        batch_size, shard_size, workers: images encoded at once, images a file, processes that read images.

    Raises:
        UserError: ``destination`` holds latents of another origin or cannot be written; not one image can be decoded.
    """
    splits = {"train": dataset.train, "test": dataset.test}
    sizes = {name: len(split) for name, split in splits.items()}
    index = {
        "complete": False, "dtype": np.dtype(DTYPE).name, "scaling_factor": LATENT_SCALE, "shape": [],
        "settings": origin | {"image_size": list(dataset.sample_shape[1:]), "shard_size": shard_size, "images": sizes},
        "class_names": list(dataset.class_names),
        "splits": {name: {"shards": [], "labels": [], "skipped": []} for name in SPLITS},
    }  # fmt: skip
    try:
        destination.mkdir(parents=True, exist_ok=True)
        index |= _earlier_index(destination, index["settings"])
        if index["complete"]:
            return index
        _write_index(destination, index)
        for name, split in splits.items():
            _cache_split(destination, index, name, split, encode, batch_size, workers)
        index["complete"] = True
        _write_index(destination, index)
    except (OSError, KeyError, TypeError) as error:  # An earlier index that is damaged may lack anything.
        raise UserError(f"cannot write latents: {reason(error)}") from error
    return index


def _earlier_index(destination: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The index in ``destination``, or none; raises :class:`UserError` if that holds anything else."""
    before = read_index(destination)
    if before is None and any(destination.iterdir()):
        raise UserError(f"{destination} has files but no {INDEX}: choose another DST, or empty it")
    made = settings if before is None else before["settings"]
    changed = [f"{key}: {made.get(key)}, now {value}" for key, value in settings.items() if made.get(key) != value]
    if changed:
        raise UserError(f"{destination} holds latents made otherwise ({'; '.join(changed)}): choose another DST")
    return before or {}


def _cache_split(
    destination: Path, index: dict[str, Any], name: str, split: Split, encode: Encoder, batch_size: int, workers: int
) -> None:
    """Write the shards of a split that ``index`` does not list yet, each listed once it is written."""
    content, size = index["splits"][name], index["settings"]["shard_size"]
    done = len(content["labels"]) + len(content["skipped"])
    with tqdm(total=len(split), initial=done, unit="img", desc=f"encoding {name}", mininterval=0.5) as bar:
        for start in range(done, len(split), size):
            latents, some = [], range(len(split))[start : start + size]
            settings = worker_settings(workers) | {"sampler": some, "collate_fn": _collate}
            loader: DataLoader[Any] = DataLoader(_Attempts(split), batch_size, **settings)
            for images, numbers, labels, skipped in load_batches(loader):
                if numbers:
                    latents.append(_draw_latents(images, numbers, encode))
                content["labels"] += labels
                content["skipped"] += skipped
                for why in skipped:
                    bar.write(f"skipped: {why}", file=sys.stderr)
                bar.update(len(labels) + len(skipped))
            if latents:
                file = f"{name}/{start // size:05d}.npy"
                with atomic_write(destination / file) as part, part.open("wb") as opened:
                    np.save(opened, np.concatenate(latents))
                content["shards"].append({"file": file, "count": sum(map(len, latents))})
                index["shape"] = list(latents[0].shape[2:])
            _write_index(destination, index)
    if not content["labels"]:
        raise UserError(f"not one {name} image can be decoded, see above")


class _Attempts(TorchDataset[tuple[int, Tensor | str, int]]):
    """Index, image and label of the samples of a split; where an image cannot be decoded, the reason instead."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __getitem__(self, index: int) -> tuple[int, Tensor | str, int]:
        try:
            return index, *self.split[index]
        except ImageError as error:
            return index, str(error), -1


def _collate(attempts: list[tuple[int, Tensor | str, int]]) -> tuple[Tensor, list[int], list[int], list[str]]:
    """Images ``[B, C, H, W]``, their indices and labels, and why the other images could not be decoded."""
    good = [(index, image, label) for index, image, label in attempts if isinstance(image, Tensor)]
    images = torch.stack([image for _, image, _ in good]) if good else torch.empty(0)
    skipped = [image for _, image, _ in attempts if isinstance(image, str)]
    return images, [index for index, _, _ in good], [label for _, _, label in good], skipped


def _draw_latents(images: Tensor, indices: list[int], encode: Encoder) -> NDArray[np.float16]:
    """A draw ``[B, 2, C, h, w]`` from the posteriors of images and mirror images, with noise of each image's index."""
    images = images.to("cuda" if torch.cuda.is_available() else "cpu").expand(-1, 3, -1, -1)
    mean, std = (part.unflatten(0, (2, -1)).float().cpu() for part in encode(torch.cat([images, images.flip(3)])))
    shape = mean.shape[2:]
    noise = np.stack([np.random.default_rng(index).standard_normal(shape, np.float32) for index in indices])
    return (mean + std * torch.from_numpy(noise)).transpose(0, 1).numpy().astype(DTYPE)


def _write_index(destination: Path, index: dict[str, Any]) -> None:
    with atomic_write(destination / INDEX) as part:
        part.write_text(json.dumps(index) + "\n")


if __name__ == "__main__":
    run_command(main)
