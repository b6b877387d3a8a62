"""From the generator's values to pixels and pictures."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from .files import atomic_write

TILE = 48  # No image in a picture is less high than this, in pixels.
GAP = 4
HEADER = 20

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
    rows = -(-count // columns)
    picture = Image.new("RGB", (columns * step_x + GAP, rows * step_y + GAP), "grey")
    for index, image in enumerate(images):
        tile = Image.fromarray(image.squeeze(-1) if channels == 1 else image)
        tile = tile.resize((width * factor, height * factor), Image.Resampling.BICUBIC)
        picture.paste(tile, (GAP + index % columns * step_x, GAP + index // columns * step_y))
    return picture


def save_grid(images: Pixels, columns: int, path: Path) -> None:
    """Write :func:`grid` as PNG."""
    with atomic_write(path) as part:
        grid(images, columns).save(part, format="PNG")


def save_panels(panels: dict[str, Pixels], columns: int, path: Path) -> None:
    """Grids of ``columns`` columns, of as many images each, side by side under their headings, as PNG."""
    grids = {heading: grid(images, columns) for heading, images in panels.items()}
    width, height = next(iter(grids.values())).size
    step = width + 5 * GAP
    picture = Image.new("RGB", (len(grids) * step - 5 * GAP, HEADER + height), "white")
    draw = ImageDraw.Draw(picture)
    for index, (heading, panel) in enumerate(grids.items()):
        draw.text((index * step + GAP, GAP), heading, fill="black")
        picture.paste(panel, (index * step, HEADER))
    with atomic_write(path) as part:
        picture.save(part, format="PNG")
