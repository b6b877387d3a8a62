"""From the generator's values to pixels and pictures."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from .files import atomic_write

TILE, GAP = 48, 4  # The images of a picture are at least so high and so far apart, in pixels.

Pixels = NDArray[np.uint8]  # [N, H, W, C]


def to_uint8(images: Tensor, pixel_range: tuple[float, float]) -> Pixels:
    """``images [N, C, H, W]`` as uint8 ``[N, H, W, C]``; ``pixel_range`` maps to 0 … 255, the rest is clipped."""
    low, high = pixel_range
    pixels = ((images.float() - low) * (255 / (high - low))).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def grid(images: Pixels, columns: int) -> Image.Image:
    """``images`` row by row on a grey ground, small ones enlarged."""
    count, height, width, channels = images.shape
    factor = max(1, -(-TILE // height))
    step_y, step_x = height * factor + GAP, width * factor + GAP
    picture = Image.new("RGB", (columns * step_x + GAP, -(-count // columns) * step_y + GAP), "grey")
    for index, image in enumerate(images):
        tile = ImageOps.scale(Image.fromarray(image.squeeze(-1) if channels == 1 else image), factor)
        picture.paste(tile, (GAP + index % columns * step_x, GAP + index // columns * step_y))
    return picture


def save_grid(images: Pixels, columns: int, path: Path) -> None:
    with atomic_write(path) as file:
        grid(images, columns).save(file, format="PNG")


def save_panels(panels: dict[str, Pixels], columns: int, path: Path) -> None:
    """Write grids of as many images each, side by side under their headings, as PNG."""
    parts = []
    for heading, images in panels.items():
        part = ImageOps.expand(grid(images, columns), (2 * GAP, 5 * GAP, 2 * GAP, 0), "white")
        ImageDraw.Draw(part).text((3 * GAP, GAP), heading, fill="black")
        parts.append(np.asarray(part))
    with atomic_write(path) as file:
        Image.fromarray(np.concatenate(parts, axis=1)).save(file, format="PNG")
