"""From image files and arrays to normalised tensors: decoding, centre crops, random crops, flips.

Pillow does the pixels. The random choices are made here rather than by torchvision, whose transforms draw from a global
generator: each is a function of (seed, epoch, index), so that a resumed run sees the images it would have seen.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..config.schema import DataConfig
from ..errors import UserError, reason
from .dataset import Dataset, Draw, Split

# Random resized crops as the release trains with, and as is usual for ImageNet.
CROP_AREA = (0.2, 1.0)  # The share of the image's area.
CROP_ASPECT = (3 / 4, 4 / 3)  # Width over height.
CROP_TRIALS = 10

# Pillow decodes these formats only (for PostScript, it would run a program), up to so many bytes and pixels.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
MOST_BYTES = 2**28
MOST_PIXELS = 2**26
MOST_ASPECT = 16  # Of an image longer than that, the middle is resized.

Picture = Image.Image | NDArray[np.uint8]  # An array is [H, W] or [H, W, 3].
Pictures = Any  # An array of them, or an object that has one for each index.
Box = tuple[float, float, float, float]  # left, top, right, bottom


class ImageError(UserError):
    """An image that cannot be decoded; the message names it."""


@dataclass(frozen=True)
class ImageTransform:
    """Brings an image to ``[C, size, size]`` in [-1, 1]; ``white`` is the pixel value that becomes 1, 0 becomes -1."""

    size: int
    flip: bool = False
    crop: bool = False
    seed: int = 0
    white: int = 255

    def __call__(self, image: Picture, draw: Draw | None) -> Tensor:
        """The image cropped at the centre, or for a ``draw`` flipped and cropped as it has it."""
        flip = False
        if draw is not None and (self.flip or self.crop):
            rng = np.random.default_rng([self.seed, *draw])
            flip = self.flip and rng.random() < 0.5
            if self.crop:
                image = _as_image(image)
                box = random_crop(*image.size, rng)
                image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box)
        if isinstance(image, Image.Image) or image.shape[:2] != (self.size, self.size):
            image = np.asarray(centre_crop(_as_image(image), self.size))
        pixels = image.reshape(self.size, self.size, -1)[:, :: -1 if flip else 1]
        values = pixels.transpose(2, 0, 1).astype(np.float32, order="C")
        values /= self.white / 2
        values -= 1
        return torch.from_numpy(values)


class ImageSplit(Split):
    """A split whose samples are ``images``, with integer ``labels [N]``."""

    def __init__(self, images: Pictures, labels: ArrayLike, transform: ImageTransform) -> None:
        super().__init__(torch.from_numpy(np.asarray(labels).astype(np.int64)))
        self.images, self.transform = images, transform

    def sample(self, index: int, draw: Draw | None) -> Tensor:
        return self.transform(self.images[index], draw)


def image_dataset(
    config: DataConfig,
    seed: int,
    train: tuple[Pictures, ArrayLike],
    test: tuple[Pictures, ArrayLike],
    class_names: tuple[str, ...],
    channels: int,
    size: int = 0,
    white: int = 255,
) -> Dataset:
    """The data set of these images and labels, as ``config`` wants them; their own ``size`` where it names no other."""
    transform = ImageTransform(config.image_size or size, config.flip, config.crop, seed, white)
    train_split, test_split = (ImageSplit(images, labels, transform) for images, labels in (train, test))
    return Dataset(config.name, train_split, test_split, class_names, (channels, transform.size, transform.size))


def read_image(path: Path) -> Image.Image:
    """The image file in RGB; raises :class:`ImageError` if it cannot be decoded.

    It raises another :class:`UserError` if the file cannot be read, which need not be the image's fault.
    """
    try:
        if not path.is_file() and path.exists() or path.stat().st_size > MOST_BYTES:
            raise ImageError(f"{path} is no file of at most {MOST_BYTES} bytes: delete it")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    return decode_image(content, str(path))


def decode_image(content: bytes, origin: str) -> Image.Image:
    """The image file with that ``content`` in RGB, or :class:`ImageError`, which names its ``origin``.

    Exif's orientation is left alone, as is usual for ImageNet.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} × {image.height} pixels, expected at most {MOST_PIXELS}")
        return _with_bytes(image).convert("RGB")
    except Exception as error:  # Decoders raise errors of any class on broken files.
        why = "of no known format" if isinstance(error, UnidentifiedImageError) else reason(error)
        raise ImageError(f"{origin} cannot be decoded ({why}): repair or delete it") from error


def _with_bytes(image: Image.Image) -> Image.Image:
    """The image with 8 bits a channel. Of 16-bit grey these are the upper ones; Pillow would cut it off at 255."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("grey values of 32 bits, whose black and white are unknown: expected 8 or 16 bits")
    return image


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square at ``size``, as ADM and the release prepare ImageNet.

    The image is halved by averaging while that is possible, then its shorter side is brought to ``size`` by bicubic
    resampling.
    """
    if image.size == (size, size):
        return image
    width, height = image.size
    most = MOST_ASPECT * min(image.size)
    if max(image.size) > most:
        left, top = max(0, width - most) // 2, max(0, height - most) // 2
        image = image.crop((left, top, width - left, height - top))
    while min(image.size) >= 2 * size:
        width, height = image.size
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(width: int, height: int, rng: np.random.Generator) -> Box:
    """A box of random area and aspect ratio inside the image.

    If ten random boxes do not fit, it is the largest centred one of a permitted ratio.
    """
    low, high = np.log(CROP_ASPECT)
    for _ in range(CROP_TRIALS):
        area = width * height * rng.uniform(*CROP_AREA)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * CROP_ASPECT[1])), min(height, round(width / CROP_ASPECT[0]))
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def _as_image(image: Picture) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.fromarray(image)

