"""``python -m drifting.cache_latents SRC DST``: encode images once, to train on their latents.

As in the release's cache, each image is centre-cropped and encoded as it is and mirrored, and what is kept of either
is one draw from the VAE's posterior, with the same noise for both. :mod:`drifting.data.latents` describes the format.
A shard is written whole or not at all, so that the same command goes on after a kill with those that lack.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import data
from torch.utils.data import DataLoader
from tqdm import tqdm

from .cli import ArgumentParser, run_command
from .config.schema import DataConfig
from .data import DATASETS, Dataset, Split, open_dataset
from .data.dataset import load_batches, worker_settings
from .data.image_split import ImageError
from .data.latents import INDEX, SPLITS, read_index
from .errors import UserError
from .hub.vae import LATENT_SCALE, VAE, encode_images
from .utils.files import atomic_write

Encoder = Callable[[Tensor], tuple[Tensor, Tensor]]  # images [B, 3, H, W] to mean and standard deviation of latents
DTYPE = np.float16
SHARD_SIZE = 8192  # images: 134 MB of 4 × 32 × 32 latents


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m drifting.cache_latents",
        description="Encode images to latents. The same command again goes on where the last one stopped.",
    )
    kinds = [name for name, source in DATASETS.items() if "path" not in source.unused and name != "latents"]
    parser.add_argument("source", metavar="SRC", help="folder of the images, or a name on the Hugging Face hub")
    parser.add_argument("destination", metavar="DST", type=Path, help="folder for the latents")
    parser.add_argument("--data", choices=kinds, default="folder", help="what SRC holds (default: folder)")
    parser.add_argument("--image-size", type=_count, default=256, help="of the centre crops (default: 256)")
    parser.add_argument("--batch-size", type=_count, default=32, help="images encoded at once (default: 32)")
    parser.add_argument("--shard-size", type=_count, default=SHARD_SIZE, help=f"images a file (default: {SHARD_SIZE})")
    parser.add_argument("--workers", type=int, default=2, help="processes that read and decode images (default: 2)")
    parser.add_argument("--subset", help="of a Hugging Face data set that has several")
    parser.add_argument("--label-column", help="of a Hugging Face data set that has several")
    arguments = parser.parse_args(argv)
    if arguments.workers < 0:
        raise UserError(f"--workers is {arguments.workers}, expected 0 or more")
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
        batch_size: images encoded at once.
        shard_size: images a file.
        workers: processes that read images.

    Raises:
        UserError: ``destination`` holds latents of another origin or cannot be written; not one image can be decoded.
    """
    splits = {"train": dataset.train, "test": dataset.test}
    sizes = {name: len(split) for name, split in splits.items()}
    settings = origin | {"image_size": list(dataset.sample_shape[1:]), "shard_size": shard_size, "images": sizes}
    index = {"complete": False, "settings": settings}
    try:
        destination.mkdir(parents=True, exist_ok=True)
        before = read_index(destination)
        if before is None and any(destination.iterdir()):
            raise UserError(f"{destination} has files but no {INDEX}: choose another DST, or empty it")
        if before is not None:
            _check_settings(destination, before["settings"], settings)
            if before["complete"]:
                return before
        _write_json(destination / INDEX, index)
        shards = [
            Shard(name, start, min(start + shard_size, size), destination / name / f"{start // shard_size:05d}.npy")
            for name, size in sizes.items()
            for start in range(0, size, shard_size)
        ]
        _encode_shards(splits, shards, encode, batch_size, workers)
        index = _complete_index(index, shards, destination, dataset.class_names)
        _write_json(destination / INDEX, index)
        for shard in shards:
            shard.notes.unlink()
    except OSError as error:
        raise UserError(f"cannot write latents: {error}") from error
    return index


@dataclass(frozen=True)
class Shard:
    """The file of the images ``start … stop - 1`` of a split, and beside it, until all are done, notes on it."""

    split: str
    start: int
    stop: int
    file: Path

    @property
    def notes(self) -> Path:
        """``labels`` of the latents in the file and ``skipped`` images; written before it."""
        return self.file.with_suffix(".json")


def _encode_shards(
    splits: dict[str, Split], shards: list[Shard], encode: Encoder, batch_size: int, workers: int
) -> None:
    """Write the files of those ``shards`` that have none."""
    total = sum(shard.stop - shard.start for shard in shards)
    pending = [shard for shard in shards if not shard.file.exists()]
    done = total - sum(shard.stop - shard.start for shard in pending)
    with tqdm(total=total, initial=done, unit="img", desc="encoding", mininterval=0.5) as bar:
        for name, split in splits.items():
            own = [shard for shard in pending if shard.split == name]
            batches = _readable_batches(split, own, batch_size, workers)
            for shard in own:
                latents, labels, skipped = [], [], []
                for start in range(shard.start, shard.stop, batch_size):
                    batch = next(batches)
                    if batch.indices:
                        latents.append(_draw_latents(batch, encode))
                    labels += batch.labels
                    skipped += batch.skipped
                    for reason in batch.skipped:
                        bar.write(f"skipped: {reason}", file=sys.stderr)
                    bar.update(min(start + batch_size, shard.stop) - start)
                _write_shard(shard, latents, labels, skipped)


@dataclass(frozen=True)
class Batch:
    """Images ``[B, C, H, W]`` of the ``indices`` that could be decoded, and why the others could not."""

    images: Tensor
    indices: list[int]
    labels: list[int]
    skipped: list[str]


class _Attempts(data.Dataset[tuple[int, Tensor | str, int]]):
    """The samples of a split, or the reason why there is none."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __getitem__(self, index: int) -> tuple[int, Tensor | str, int]:
        try:
            return index, *self.split[index]
        except ImageError as error:
            return index, str(error), -1


def _collate(attempts: list[tuple[int, Tensor | str, int]]) -> Batch:
    good = [(index, image, label) for index, image, label in attempts if isinstance(image, Tensor)]
    return Batch(
        images=torch.stack([image for _, image, _ in good]) if good else torch.empty(0),
        indices=[index for index, _, _ in good],
        labels=[label for _, _, label in good],
        skipped=[image for _, image, _ in attempts if isinstance(image, str)],
    )


def _readable_batches(split: Split, shards: list[Shard], batch_size: int, workers: int) -> Iterator[Batch]:
    """Batches of the images of ``shards``, none of which takes from two of them."""
    indices = [
        list(range(start, min(start + batch_size, shard.stop)))
        for shard in shards
        for start in range(shard.start, shard.stop, batch_size)
    ]
    return load_batches(
        DataLoader(_Attempts(split), batch_sampler=indices, collate_fn=_collate, **worker_settings(workers))
    )


def _draw_latents(batch: Batch, encode: Encoder) -> NDArray[np.float16]:
    """A draw ``[B, 2, C, h, w]`` from the posteriors of images and mirror images, with noise of each image's index."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = batch.images.to(device).expand(-1, 3, -1, -1)
    mean, std = (part.unflatten(0, (2, -1)).float().cpu() for part in encode(torch.cat([images, images.flip(3)])))
    shape = mean.shape[2:]
    noise = np.stack([np.random.default_rng(index).standard_normal(shape, np.float32) for index in batch.indices])
    return (mean + std * torch.from_numpy(noise)).transpose(0, 1).numpy().astype(DTYPE)


def _write_shard(shard: Shard, latents: list[NDArray[np.float16]], labels: list[int], skipped: list[str]) -> None:
    shard.file.parent.mkdir(exist_ok=True)
    _write_json(shard.notes, {"labels": labels, "skipped": skipped})
    with atomic_write(shard.file) as part, part.open("wb") as file:
        np.save(file, np.concatenate(latents) if latents else np.empty(0, DTYPE))


def _complete_index(
    index: dict[str, Any], shards: list[Shard], destination: Path, class_names: tuple[str, ...]
) -> dict[str, Any]:
    """The index of a destination that has all shards, see :mod:`drifting.data.latents`."""
    splits: dict[str, Any] = {name: {"shards": [], "labels": [], "skipped": []} for name in SPLITS}
    shape = None
    for shard in shards:
        notes = json.loads(shard.notes.read_text())
        description = splits[shard.split]
        description["labels"] += notes["labels"]
        description["skipped"] += notes["skipped"]
        if notes["labels"]:
            shape = np.load(shard.file, mmap_mode="r").shape[2:]
            file = shard.file.relative_to(destination).as_posix()
            description["shards"].append({"file": file, "count": len(notes["labels"])})
    for name, description in splits.items():
        if not description["labels"]:
            raise UserError(f"not one {name} image can be decoded, see above")
    return index | {
        "complete": True, "dtype": np.dtype(DTYPE).name, "shape": shape, "scaling_factor": LATENT_SCALE,
        "class_names": class_names, "splits": splits,
    }  # fmt: skip


def _check_settings(destination: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [f"{key}: {before.get(key)}, now {value}" for key, value in now.items() if before.get(key) != value]
    if changed:
        raise UserError(
            f"{destination} holds latents that were made otherwise ({'; '.join(changed)}): choose another DST"
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as part:
        part.write_text(json.dumps(content) + "\n")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}, expected 1 or more")
    return number


if __name__ == "__main__":
    run_command(main)
