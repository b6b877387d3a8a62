"""From image files and arrays to normalised tensors: decoding, centre crops, random crops, flips.

Pillow does the pixels. The random choices are made here rather than by torchvision, whose transforms draw from a global
generator: each is a function of (seed, epoch, index), so that a resumed run sees the images it would have seen.
"""

import hashlib
import io
import math
import os
import stat
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..errors import UserError
from .dataset import Draw, Split

# Random resized crops as the release trains with, and as is usual for ImageNet.
CROP_AREA = (0.2, 1.0)  # share of the image's area
CROP_ASPECT = (3 / 4, 4 / 3)  # width over height
CROP_TRIALS = 10

# What image files may make Pillow do: decode these formats (for PostScript, it would run a program), up to so many
# bytes and pixels.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
MOST_BYTES = 2**28
MOST_PIXELS = 2**26
MOST_ASPECT = 16  # of what is resized: of an image longer than that, the middle

HELD_OUT = 10  # one image in so many is for testing, where a data set has no such split of its own

Picture = Image.Image | NDArray[np.uint8]  # an array is [H, W] or [H, W, 3]
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
    """A split whose samples are images; subclasses say where an image comes from."""

    def __init__(self, labels: Tensor, transform: ImageTransform) -> None:
        super().__init__(labels)
        self.transform = transform

    @abstractmethod
    def image(self, index: int) -> Picture:
        """The image of that index, grey or RGB; raises :class:`ImageError` if it cannot be decoded."""

    def sample(self, index: int, draw: Draw | None) -> Tensor:
        return self.transform(self.image(index), draw)


class ArrayImages(ImageSplit):
    """Images in memory, uint8 ``[N, H, W]`` or ``[N, H, W, 3]``."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.integer], transform: ImageTransform) -> None:
        super().__init__(torch.from_numpy(labels.astype(np.int64)), transform)
        self.images = images

    def image(self, index: int) -> Picture:
        return self.images[index]


def read_image(path: Path) -> Image.Image:
    """The image file in RGB.

    Raises:
        ImageError: it cannot be decoded.
        UserError: it cannot be read, which need not be the image's fault.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
            raise ImageError(f"{path} is no file of at most {MOST_BYTES} bytes: delete it")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return decode_image(data, str(path))


def decode_image(data: bytes, origin: str) -> Image.Image:
    """The image file ``data`` in RGB, as it is stored: Exif's orientation is left alone, as is usual for ImageNet.

    Raises:
        ImageError: it cannot be decoded; the message names ``origin``.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} × {image.height} pixels, expected at most {MOST_PIXELS}")
        return _with_bytes(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise ImageError(f"{origin} cannot be decoded (of no known format): repair or delete it") from error
    except Exception as error:  # on broken files, decoders raise errors of any class
        reason = f"{type(error).__name__}: {error}"
        raise ImageError(f"{origin} cannot be decoded ({reason}): repair or delete it") from error


def _with_bytes(image: Image.Image) -> Image.Image:
    """``image`` with 8 bits a channel; of 16-bit grey, which Pillow would cut off at 255, the upper ones."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("grey values of 32 bits, whose black and white are unknown: expected 8 or 16 bits")
    return image


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square at ``size``, as ADM and the release prepare ImageNet: halved while that is possible
    by averaging, then brought to ``size`` along the shorter side by bicubic resampling."""
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
    """A box of random area and aspect ratio inside the image; the largest centred one of a permitted ratio if ten
    random ones do not fit."""
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


def held_out(name: str) -> bool:
    """Whether the image of that name is for testing: one in ``HELD_OUT``, whatever other images there are."""
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT == 0
