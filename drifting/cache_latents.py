"""``python -m drifting.cache_latents SRC DST``: encode images once, to train on their latents. As in the release's
cache, each image is centre-cropped and encoded as it is and mirrored, and what is kept of either is one draw from the
VAE's posterior, with the same noise for both. :mod:`drifting.data.latents` describes the format."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .cli import ArgumentParser, run_command
from .config.schema import DataConfig
from .data import DATASETS, Dataset, Split, open_dataset
from .data.dataset import read_batches
from .data.image_split import ImageError
from .data.latents import INDEX, read_index
from .errors import UserError, explained
from .hub.vae import LATENT_SCALE, VAE, encode_images
from .utils.files import LOCK, atomic_write, locked, write_object

Encoder = Callable[[Tensor], tuple[Tensor, Tensor]]  # It gives mean and deviation of the latents of [B, 3, H, W].
SHARD_SIZE = 8192  # That many images have 134 MB of 4 × 32 × 32 latents.
NUMBERS = {  # Options with their default, least value and description.
    "image-size": (256, 1, "of the centre crops"), "batch-size": (32, 1, "images encoded at once"),
    "shard-size": (SHARD_SIZE, 1, "images a file"), "workers": (2, 0, "processes that read and decode images"),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    purpose = "Encode images to latents. The same command again goes on where the last one stopped."
    parser = ArgumentParser("python -m drifting.cache_latents", description=purpose)
    kinds = [name for name in DATASETS if name not in ("digits", "latents")]
    parser.add_argument("source", metavar="SRC", help="folder of the images, or a name on the Hugging Face hub")
    parser.add_argument("destination", metavar="DST", type=Path, help="folder for the latents")
    parser.add_argument("--data", choices=kinds, default="folder", help="what SRC holds (default: folder)")
    for name, (default, _, what) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: {default})")
    for name in ("subset", "label-column"):
        parser.add_argument(f"--{name}", help="of a Hugging Face data set that has several")
    given = parser.parse_args(argv)
    for name, (_, least, _) in NUMBERS.items():
        if (number := getattr(given, name.replace("-", "_"))) < least:
            raise UserError(f"--{name} is {number}, expected {least} or more")
    keys = {"path": given.source, "subset": given.subset}
    config = DataConfig(given.data, image_size=given.image_size, label_column=given.label_column, **keys)
    dataset = open_dataset(config)
    print(dataset.describe(), file=sys.stderr)
    splits = cache_latents(
        dataset, given.destination, origin={"data": given.data, **keys, "vae": VAE},
        encode=encode_images, batch_size=given.batch_size, shard_size=given.shard_size, workers=given.workers,
    )["splits"]  # fmt: skip
    counts = " and ".join(f"{len(split['labels'])} {name}" for name, split in splits.items())
    print(f"{given.destination} holds the latents of {counts} images")
    if skipped := sum(len(split["skipped"]) for split in splits.values()):
        print(f"skipped {skipped} images that cannot be decoded: {given.destination / INDEX} names them")
    return 0


def cache_latents(
    dataset: Dataset, destination: Path, *, origin: dict[str, Any], encode: Encoder,
    batch_size: int = 32, shard_size: int = SHARD_SIZE, workers: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Write the latents of ``dataset`` that ``destination`` does not hold yet, and return its index. The index keeps
    ``origin``, which says what ``dataset`` and ``encode`` are. Grey images are encoded as RGB.

    It raises UserError where another process writes there, or ``destination`` holds anything else.
    """
    with explained(f"cannot write latents to {destination}"):
        destination.mkdir(parents=True, exist_ok=True)
    with locked(destination, "is being written by another process", "choose another DST"):
        index = _opened_index(dataset, destination, origin, shard_size)
        if not index["complete"]:
            for name, split in {"train": dataset.train, "test": dataset.test}.items():
                _cache_split(destination, index, name, split, encode, batch_size, workers)
            index["complete"] = True
            write_object(destination / INDEX, index, indent=None)
    return index


def _opened_index(dataset: Dataset, destination: Path, origin: dict[str, Any], shard_size: int) -> dict[str, Any]:
    """The index of what ``destination`` holds already, made in the same way; or a new one, written there."""
    splits, file = {"train": dataset.train, "test": dataset.test}, destination / INDEX
    sizes = {name: len(split) for name, split in splits.items()}
    index: dict[str, Any] = {
        "complete": False, "dtype": "float16", "scaling_factor": LATENT_SCALE, "shape": [],
        "settings": origin | {"image_size": list(dataset.sample_shape[1:]), "shard_size": shard_size, "images": sizes},
        "class_names": list(dataset.class_names),
        "splits": {name: {"shards": [], "labels": [], "skipped": []} for name in splits},
    }  # fmt: skip
    if file.exists():
        now, index = index["settings"] | {"class_names": index["class_names"]}, read_index(destination)
        made = index["settings"] | {"class_names": index.get("class_names")}
        changed = [f"{key}: {made.get(key)}, now {value}" for key, value in now.items() if made.get(key) != value]
        if changed:
            raise UserError(f"{destination} holds latents made otherwise ({'; '.join(changed)}): choose another DST")
        with explained(f"{file} is damaged, choose another DST or empty this one"):
            lists = [index["splits"][name][key] for name in splits for key in ("shards", "labels", "skipped")]
            if any(not isinstance(part, list) for part in lists):
                raise UserError("expected lists of shards, labels and skipped images")
    elif any(path.name != LOCK for path in destination.iterdir()):
        raise UserError(f"{destination} has files but no {INDEX}: choose another DST, or empty it")
    else:
        write_object(file, index, indent=None)
    return index


def _cache_split(
    destination: Path, index: dict[str, Any], name: str, split: Split, encode: Encoder, batch_size: int, workers: int
) -> None:
    content, size = index["splits"][name], index["settings"]["shard_size"]
    done = len(content["labels"]) + len(content["skipped"])
    with tqdm(total=len(split), initial=done, unit="img", desc=f"encoding {name}", mininterval=0.5) as bar:
        for start in range(done, len(split), size):
            latents, shard = [], range(start, min(start + size, len(split)))
            settings = {"batch_size": batch_size, "collate_fn": partial(_read, split)}
            for images, numbers, labels, skipped in read_batches(shard, workers, **settings):
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
            write_object(destination / INDEX, index, indent=None)
    if not content["labels"]:
        raise UserError(f"not one {name} image can be decoded, see above")


def _read(split: Split, indices: list[int]) -> tuple[Tensor, list[int], list[int], list[str]]:
    """Read images ``[B, C, H, W]`` with their indices and labels, and why the others cannot be decoded."""
    good, skipped = [], []
    for index in indices:
        try:
            good.append((index, *split[index]))
        except ImageError as error:
            skipped.append(str(error))
    images = torch.stack([image for _, image, _ in good]) if good else torch.empty(0)
    return images, [index for index, _, _ in good], [label for _, _, label in good], skipped


def _draw_latents(images: Tensor, indices: list[int], encode: Encoder) -> np.ndarray:
    """Draw ``[B, 2, C, h, w]`` from the posteriors of images and mirror images, with noise of each image's index."""
    images = images.to("cuda" if torch.cuda.is_available() else "cpu").expand(-1, 3, -1, -1)
    mean, std = (part.unflatten(0, (2, -1)).float().cpu() for part in encode(torch.cat([images, images.flip(3)])))
    shape = mean.shape[2:]
    noise = np.stack([np.random.default_rng(index).standard_normal(shape, np.float32) for index in indices])
    return (mean + std * torch.from_numpy(noise)).transpose(0, 1).numpy().astype(np.float16)


if __name__ == "__main__":
    run_command(main)
