"""``python -m drifting.sample SOURCE --num N --out FILE.npz|FILE.png``: images from a trained generator, one step each.

A generator of four channels makes latents of the Stable Diffusion VAE, which decodes them.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from .cli import ArgumentParser, run_command
from .errors import UserError
from .evaluation.archives import write_images
from .evaluation.drawing import draw_samples, spread_labels
from .hub.sources import load_generator
from .hub.vae import require_vae
from .utils.images import Pixels, grid


def check_sampling(cfg_scale: float, seed: int) -> None:
    """Raise :class:`UserError` for a guidance scale or seed out of range."""
    if not 1 <= cfg_scale < math.inf:
        raise UserError(f"--cfg-scale is {cfg_scale}, expected 1 or more")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed is {seed}, expected 0 or more, below 2**63")


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m drifting.sample", description="Draw images from a trained generator.")
    parser.add_argument("source", metavar="SOURCE", help="run directory, hf://NAME, or artifact of the release")
    parser.add_argument("--num", type=int, required=True, help="how many images")
    parser.add_argument("--out", type=Path, required=True, help=".npz (arr_0 images, arr_1 labels) or .png (a grid)")
    parser.add_argument("--labels", help="labels to spread the images over, such as 3,5 (default: all)")
    parser.add_argument("--cfg-scale", type=float, default=1.0, help="guidance scale, 1 or more (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    if arguments.num < 1:
        raise UserError(f"--num is {arguments.num}, expected 1 or more")
    if arguments.out.suffix not in (".npz", ".png"):
        raise UserError(f"--out is {arguments.out}, expected a file that ends in .npz or .png")
    check_sampling(arguments.cfg_scale, arguments.seed)
    trained = load_generator(arguments.source)
    labels = spread_labels(arguments.num, _parse_labels(arguments.labels, len(trained.class_names)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if trained.latent:
        require_vae(device)
    trained.model.to(device)
    images = draw_samples(trained, labels, arguments.cfg_scale, arguments.seed)
    if arguments.out.suffix == ".npz":
        write_images(arguments.out, images, labels.numpy())
    else:
        _write_picture(arguments.out, images)
    print(f"wrote {len(images)} images of labels {sorted(set(labels.tolist()))} to {arguments.out}")
    return 0


def _write_picture(path: Path, images: Pixels) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        grid(images, columns=math.ceil(math.sqrt(len(images)))).save(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _parse_labels(text: str | None, num_classes: int) -> list[int]:
    if text is None:
        return list(range(num_classes))
    try:
        labels = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--labels is {text!r}, expected numbers with commas between them, such as 3,5") from None
    for label in labels:
        if not 0 <= label < num_classes:
            raise UserError(f"--labels names {label}, expected labels from 0 to {num_classes - 1}")
    return labels


if __name__ == "__main__":
    run_command(main)
