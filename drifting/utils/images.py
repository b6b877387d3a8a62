"""From the generator's values to pixels and pictures."""

import base64
import io
from pathlib import Path
from typing import Any

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


def enlargement(height: int, least: int = TILE) -> int:
    """The factor that makes an image at least so high."""
    return max(1, -(-least // height))


def enlarged(image: Pixels, least: int = TILE, sharp: bool = False) -> Image.Image:
    """An image ``[H, W, C]`` by that factor; ``sharp`` keeps its pixels, which are blurred otherwise."""
    resample = Image.Resampling.NEAREST if sharp else Image.Resampling.BICUBIC
    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    return ImageOps.scale(picture, enlargement(picture.height, least), resample)


def grid(images: Pixels, columns: int, least: int = TILE, sharp: bool = False) -> Image.Image:
    """``images`` row by row on a grey ground, small ones enlarged, see :func:`enlarged`."""
    tiles = [enlarged(image, least, sharp) for image in images]
    step_x, step_y = (side + GAP for side in tiles[0].size)
    picture = Image.new("RGB", (columns * step_x + GAP, -(-len(tiles) // columns) * step_y + GAP), "grey")
    for index, tile in enumerate(tiles):
        picture.paste(tile, (GAP + index % columns * step_x, GAP + index // columns * step_y))
    return picture


def data_uri(image: Image.Image, format: str = "PNG", **settings: Any) -> str:
    """A picture as text for the ``src`` of a page, which needs no other file then."""
    content = io.BytesIO()
    image.save(content, format, **settings)
    return f"data:image/{format.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


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
