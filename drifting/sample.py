"""``python -m drifting.sample SOURCE --num N --out FILE.npz|FILE.png``: images from a trained generator, one step each.

A generator of four channels makes latents of the Stable Diffusion VAE, which decodes them.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .archives import write_images
from .cli import ArgumentParser, UserError, run_command
from .images import Pixels, grid, to_uint8
from .models import DriftingDiT
from .pretrained import open_generator
from .vae import DECODE_BATCH, LATENT_CHANNELS, decode_latents, require_vae

BATCH = 500  # images generated at once …
BATCH_TOKENS = 2**15  # … unless that makes more tokens


def spread_labels(num: int, choices: Sequence[int]) -> Tensor:
    """``num`` labels, each of ``choices`` equally often up to one, sorted by their place in ``choices``."""
    place = (torch.arange(num) % len(choices)).sort().values
    return torch.tensor(choices)[place]


def draw_samples(
    model: DriftingDiT, labels: Tensor, pixel_range: tuple[float, float], cfg_scale: float = 1.0, seed: int = 0
) -> Pixels:
    """uint8 images ``[N, H, W, C]`` for ``labels [N]``, in batches; ``seed`` fixes them on any device.

    Latents are generated and decoded in bfloat16 on GPUs.
    """
    images, count = np.empty(0, np.uint8), 0
    with tqdm(total=len(labels), desc="generate", unit="image", delay=1, leave=False, disable=None) as bar:
        for part in _draw_parts(model, labels, pixel_range, cfg_scale, seed):
            if not count:  # 50,000 images of ImageNet are 10 GB: not held twice
                images = np.empty((len(labels), *part.shape[1:]), np.uint8)
            images[count : count + len(part)] = part
            count += len(part)
            bar.update(len(part))
    return images


def _draw_parts(
    model: DriftingDiT, labels: Tensor, pixel_range: tuple[float, float], cfg_scale: float, seed: int
) -> Iterator[Pixels]:
    """The images in order, as many at a time as were generated together or, of latents, decoded together."""
    generator = torch.Generator().manual_seed(seed)
    size = max(1, min(BATCH, BATCH_TOKENS // (model.grid**2 + model.n_cls_tokens)))
    latent, device = model.out_chans == LATENT_CHANNELS, model.pos_embed.device.type
    for y in labels.split(size):
        with torch.autocast(device, torch.bfloat16, enabled=latent and device == "cuda"):
            images = model.generate(len(y), y, cfg_scale, generator=generator)
        for part in images.float().split(DECODE_BATCH if latent else size):
            yield to_uint8(decode_latents(part) if latent else part, pixel_range)


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
    trained = open_generator(arguments.source)
    labels = spread_labels(arguments.num, _parse_labels(arguments.labels, trained.model.num_classes))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if trained.model.out_chans == LATENT_CHANNELS:
        require_vae(device)
    images = draw_samples(trained.model.to(device), labels, trained.pixel_range, arguments.cfg_scale, arguments.seed)
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
