"""From image files and arrays to normalised tensors: decoding, centre crops, random crops, flips. The random choices
are functions of (seed, epoch, index), so that a resumed run sees the images it would have seen; torchvision's
transforms draw them from a global generator."""

import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..config.schema import DataConfig
from ..errors import UserError, explained, reason
from .dataset import Dataset, Draw, Split

# Random resized crops have these shares of the image's area and widths over heights, in the release and elsewhere.
CROP_AREA, CROP_ASPECT = (0.2, 1.0), (3 / 4, 4 / 3)
# Pillow decodes these formats only (for PostScript, it would run a program), up to so many bytes and pixels.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
MOST_BYTES, MOST_PIXELS = 2**28, 2**26
MOST_ASPECT = 16  # Of an image longer than that, the middle is resized.


class ImageError(UserError):
    """An image that cannot be decoded; the message names it."""


class ImageSplit(Split):
    """``images`` brought to ``[C, size, size]``; black, which is 0, becomes -1, and ``white`` becomes 1. ``images`` is
    uint8 ``[N, H, W]`` or ``[N, H, W, 3]``, or returns a Pillow image for an index."""

    dtype = torch.uint8

    def __init__(
        self, images: Any, labels: ArrayLike, size: int, flip: bool = False, crop: bool = False, seed: int = 0,
        white: int = 255,
    ) -> None:  # fmt: skip
        super().__init__(torch.from_numpy(np.asarray(labels).astype(np.int64)))
        self.images, self.size, self.white, self.flip, self.crop, self.seed = images, size, white, flip, crop, seed

    def sample(self, index: int, draw: Draw | None) -> Tensor:
        image = self.images(index) if callable(self.images) else self.images[index]
        shape, box, mirrored = (self.size, self.size), None, False
        if draw is not None and (self.flip or self.crop):
            rng = np.random.default_rng([self.seed, *draw])
            mirrored = self.flip and rng.random() < 0.5
            box = random_crop(*_as_image(image).size, rng) if self.crop else None
        if box:
            image = _as_image(image).resize(shape, Image.Resampling.BICUBIC, box)
        elif not isinstance(image, np.ndarray) or image.shape[:2] != shape:  # Others are faster without Pillow.
            image = centre_crop(_as_image(image), self.size)
        pixels = np.asarray(image).reshape(*shape, -1)[:, :: -1 if mirrored else 1]
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    def values(self, samples: Tensor) -> Tensor:
        # A GPU would multiply by the reciprocal of a number of Python's, which is rounded.
        half = torch.full((), self.white / 2, dtype=torch.float32, device=samples.device)
        return samples.float().div_(half).sub_(1)


def _as_image(image: Image.Image | np.ndarray) -> Image.Image:
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image


def find_files(config: DataConfig, folders: tuple[str, ...], names: list[str], what: str, remedy: str) -> list[Path]:
    """Find files of those names, compressed (``.gz``) or not, in ``config.path`` or one of the usual ``folders``."""
    places = [Path(folder) for folder in ((config.path,) if config.path else folders)]
    for folder in places:
        files = [folder / name if (folder / name).is_file() else folder / f"{name}.gz" for name in names]
        if all(file.is_file() for file in files):
            return files
    raise UserError(f"data.name is {config.name}, but {what} are not in {' or '.join(map(str, places))}: {remedy}")


def image_dataset(
    config: DataConfig, seed: int, splits: Iterable[tuple[Any, ArrayLike]], class_names: tuple[str, ...], channels: int,
    size: int = 0, white: int = 255,
) -> Dataset:  # fmt: skip
    """Make a data set of training and test images, of their own ``size`` where ``config`` names no other."""
    size = config.image_size or size
    train, test = (ImageSplit(*split, size, config.flip, config.crop, seed, white) for split in splits)
    return Dataset(config.name, train, test, class_names, (channels, size, size))


def read_image(path: Path) -> Image.Image:
    """Read an image file in RGB; raises ImageError, or another UserError where the image need not be at fault."""
    with explained(f"{path} cannot be read"):  # A process that reads data would lose the file's name.
        is_small = path.stat().st_size <= MOST_BYTES and path.is_file()
        content = path.read_bytes() if is_small else b""
    if not is_small:
        raise ImageError(f"{path} is no file of at most {MOST_BYTES} bytes: delete it")
    return decode_image(content, str(path))


def decode_image(content: bytes, origin: str) -> Image.Image:
    """Decode an image file to RGB, without regard to Exif's orientation; raises ImageError, which names its origin."""
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} × {image.height} pixels, expected at most {MOST_PIXELS}")
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # Pillow would cut 16 bits off at 255.
        if image.mode in ("I", "F"):
            raise ValueError("grey values of 32 bits, whose black and white are unknown: expected 8 or 16 bits")
        return image.convert("RGB")
    except Exception as error:  # Decoders raise errors of any class on broken files.
        why = "of no known format" if isinstance(error, UnidentifiedImageError) else reason(error)
        raise ImageError(f"{origin} cannot be decoded ({why}): repair or delete it") from error


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the largest centred square at ``size``, halved by averaging, then bicubic, as ADM and the release do."""
    left, top = (max(0, side - MOST_ASPECT * min(image.size)) // 2 for side in image.size)
    image = image.crop((left, top, image.width - left, image.height - top))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(width: int, height: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Draw a box of random area and aspect ratio inside an image, or the largest centred one if ten do not fit."""
    low, high = np.log(CROP_ASPECT)
    for _ in range(10):
        area = width * height * rng.uniform(*CROP_AREA)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * CROP_ASPECT[1])), min(height, round(width / CROP_ASPECT[0]))
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2
