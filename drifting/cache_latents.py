"""``python -m drifting.cache_latents SRC DST``: encode images once, to train on their latents.

As in the release's cache, each image is centre-cropped and encoded as it is and mirrored, and what is kept of either
is one draw from the VAE's posterior, with the same noise for both. :mod:`drifting.data.latents` describes the format.
A shard is written whole or not at all, so that the same command goes on after a kill with those that lack.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    try:
        destination.mkdir(parents=True, exist_ok=True)
        before = _earlier_index(destination, settings)
        if before is not None and before["complete"]:
            return before
        _write_json(destination / INDEX, {"complete": False, "settings": settings})
        shards = [
            Shard(name, range(size)[start : start + shard_size], destination / name / f"{start // shard_size:05d}.npy")
            for name, size in sizes.items()
            for start in range(0, size, shard_size)
        ]
        pending = [shard for shard in shards if not shard.file.exists()]
        total, left = (sum(len(shard.indices) for shard in some) for some in (shards, pending))
        with tqdm(total=total, initial=total - left, unit="img", desc="encoding", mininterval=0.5) as bar:
            for shard in pending:
                _write_shard(shard, splits[shard.split], encode, batch_size, workers, bar)
        index = {"complete": True, "settings": settings} | _describe(shards, dataset.class_names)
        _write_json(destination / INDEX, index)
        for shard in shards:
            shard.notes.unlink()
    except OSError as error:
        raise UserError(f"cannot write latents: {reason(error)}") from error
    return index


def _earlier_index(destination: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The index in ``destination``, if there is one; raises :class:`UserError` if it holds anything else."""
    before = read_index(destination)
    if before is None and any(destination.iterdir()):
        raise UserError(f"{destination} has files but no {INDEX}: choose another DST, or empty it")
    made = settings if before is None else before["settings"]
    changed = [f"{key}: {made.get(key)}, now {value}" for key, value in settings.items() if made.get(key) != value]
    if changed:
        raise UserError(
            f"{destination} holds latents that were made otherwise ({'; '.join(changed)}): choose another DST"
        )
    return before


@dataclass(frozen=True)
class Shard:
    """The ``file`` of some images of a split, and beside it, until all are done, notes on it."""

    split: str
    indices: range
    file: Path

    @property
    def notes(self) -> Path:
        """``labels`` of the latents in the file and ``skipped`` images; written before it."""
        return self.file.with_suffix(".json")


class _Attempts(TorchDataset[tuple[int, Tensor | str, int]]):
    """Index, image and label of some samples of a split; where an image cannot be decoded, the reason instead."""

    def __init__(self, split: Split, indices: range) -> None:
        self.split, self.indices = split, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[int, Tensor | str, int]:
        index = self.indices[place]
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


def _write_shard(
    shard: Shard, split: Split, encode: Encoder, batch_size: int, workers: int, bar: "tqdm[Any]"
) -> None:
    attempts = _Attempts(split, shard.indices)
    loader = DataLoader(attempts, batch_size, collate_fn=_collate, **worker_settings(workers))
    latents, labels, skipped = [], [], []
    for images, indices, of_images, reasons in load_batches(loader):
        if indices:
            latents.append(_draw_latents(images, indices, encode))
        labels += of_images
        skipped += reasons
        for why in reasons:
            bar.write(f"skipped: {why}", file=sys.stderr)
        bar.update(len(indices) + len(reasons))
    _write_json(shard.notes, {"labels": labels, "skipped": skipped})
    with atomic_write(shard.file) as part, part.open("wb") as file:
        np.save(file, np.concatenate(latents) if latents else np.empty(0, DTYPE))


def _draw_latents(images: Tensor, indices: list[int], encode: Encoder) -> NDArray[np.float16]:
    """A draw ``[B, 2, C, h, w]`` from the posteriors of images and mirror images, with noise of each image's index."""
    images = images.to("cuda" if torch.cuda.is_available() else "cpu").expand(-1, 3, -1, -1)
    mean, std = (part.unflatten(0, (2, -1)).float().cpu() for part in encode(torch.cat([images, images.flip(3)])))
    shape = mean.shape[2:]
    noise = np.stack([np.random.default_rng(index).standard_normal(shape, np.float32) for index in indices])
    return (mean + std * torch.from_numpy(noise)).transpose(0, 1).numpy().astype(DTYPE)


def _describe(shards: list[Shard], class_names: tuple[str, ...]) -> dict[str, Any]:
    """What the index of a folder that has all shards holds, see :mod:`drifting.data.latents`."""
    splits: dict[str, Any] = {name: {"shards": [], "labels": [], "skipped": []} for name in SPLITS}
    shape = None
    for shard in shards:
        notes = json.loads(shard.notes.read_text())
        description = splits[shard.split]
        description["labels"] += notes["labels"]
        description["skipped"] += notes["skipped"]
        if notes["labels"]:
            shape = np.load(shard.file, mmap_mode="r").shape[2:]
            description["shards"].append({"file": f"{shard.split}/{shard.file.name}", "count": len(notes["labels"])})
    for name, description in splits.items():
        if not description["labels"]:
            raise UserError(f"not one {name} image can be decoded, see above")
    return {
        "dtype": np.dtype(DTYPE).name, "shape": shape, "scaling_factor": LATENT_SCALE, "class_names": class_names,
        "splits": splits,
    }  # fmt: skip


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
