"""From image files and arrays to normalised tensors: decoding, centre crops, random crops, flips. The random choices
are functions of (seed, epoch, index), so that a resumed run sees the images it would have seen; torchvision's
transforms draw them from a global generator."""

import io
import math
import struct
import sys
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
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
PNG = b"\x89PNG\r\n\x1a\n"  # A PNG file begins so.
PROBED = 200  # So many images tell whether a data set has transparent ones.


class ImageError(UserError):
    """An image that cannot be decoded; the message names it."""


class EncodedImages(ABC):
    """Image files, which are decoded when they are asked for; what is transparent shows the colour ``background``."""

    background: str

    @abstractmethod
    def content(self, index: int) -> tuple[bytes, str]:
        """Return the bytes of an image file, and what to call it where it cannot be decoded."""

    def __getitem__(self, index: int) -> Image.Image:
        return decode_image(*self.content(index), self.background)

    def any_transparent(self, num: int) -> bool:
        """Tell whether one of some evenly spaced images, of ``num``, has an alpha channel or a transparent colour."""
        for index in range(0, num, -(-num // PROBED)):
            with suppress(Exception):  # Whoever needs a broken image will tell.
                if _open_image(self.content(index)[0]).has_transparency_data:
                    return True
        return False


class ImageSplit(Split):
    """``images`` brought to ``[C, size, size]``; black, which is 0, becomes -1, and ``white`` becomes 1. ``images`` is
    uint8 ``[N, H, W]`` or ``[N, H, W, 3]``, or :class:`EncodedImages`. With ``skip_broken``, another image of the class
    stands for one that cannot be read, always the same, and ``broken`` lists these."""

    dtype = torch.uint8

    def __init__(
        self, images: Any, labels: ArrayLike, size: int, flip: bool = False, crop: bool = False, seed: int = 0,
        white: int = 255, skip_broken: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(torch.from_numpy(np.asarray(labels).astype(np.int64)))
        self.images, self.size, self.white, self.flip, self.crop, self.seed = images, size, white, flip, crop, seed
        # Processes that read images share it with this one: which images were found broken.
        self.found_broken = torch.zeros(len(self), dtype=torch.bool).share_memory_() if skip_broken else None

    @property
    def broken(self) -> list[int]:
        return [] if self.found_broken is None else self.found_broken.nonzero().flatten().tolist()

    def _image(self, index: int) -> Any:
        if self.found_broken is None:
            return self.images[index]
        for other in chain([index], self._others(index)):
            try:
                if not self.found_broken[other]:
                    return self.images[other]
            except UserError as error:
                self.found_broken[other] = True
                print(f"another image of its class takes the place of one: {error}", file=sys.stderr)
        raise UserError(f"none of the images of class {int(self.labels[index])} can be read, see above")

    def _others(self, index: int) -> Iterator[int]:
        same = (self.labels == self.labels[index]).nonzero().flatten()
        yield from same.roll(-int((same == index).nonzero()))[1:].tolist()

    def sample(self, index: int, draw: Draw | None) -> Tensor:
        image = self._image(index)
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
    size: int = 0, white: int = 255, notes: Sequence[str] = (),
) -> Dataset:  # fmt: skip
    """Make a data set of training and test images, of their own ``size`` where ``config`` names no other."""
    size, (flip, crop, skip) = config.image_size or size, (config.flip, config.crop, config.skip_broken)
    train, test = (ImageSplit(*split, size, flip, crop, seed, white, skip) for split in splits)
    if isinstance(train.images, EncodedImages) and train.images.any_transparent(len(train)):
        notes = (*notes, f"there are images with transparency, which are put on {config.background} (data.background)")
    return Dataset(config.name, train, test, class_names, (channels, size, size), notes=tuple(notes))


def read_content(path: Path) -> bytes:
    """Read an image file; raises ImageError, or another UserError where the image need not be at fault."""
    with explained(f"{path} cannot be read"):  # A process that reads data would lose the file's name.
        is_small = path.stat().st_size <= MOST_BYTES and path.is_file()
        content = path.read_bytes() if is_small else b""
    if not is_small:
        raise ImageError(f"{path} is no file of at most {MOST_BYTES} bytes: delete it")
    return content


def decode_image(content: bytes, origin: str, background: str = "black") -> Image.Image:
    """Decode an image file, of several frames the first, to RGB, without regard to Exif's orientation. What is
    transparent shows the colour ``background``. It raises ImageError, which names its origin."""
    try:
        image = _open_image(content)
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} × {image.height} pixels, expected at most {MOST_PIXELS}")
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # Pillow would cut 16 bits off at 255.
        if image.mode in ("I", "F"):
            raise ValueError("grey values of 32 bits, whose black and white are unknown: expected 8 or 16 bits")
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA"))
        return image.convert("RGB")
    except Exception as error:  # Decoders raise errors of any class on broken files.
        why = "of no known format" if isinstance(error, UnidentifiedImageError) else reason(error)
        remedy = "repair or delete it, or set data.skip_broken=true"
        raise ImageError(f"{origin} cannot be decoded ({why}): {remedy}") from error


def _open_image(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(_without_metadata(content)), formats=FORMATS)


def _without_metadata(content: bytes) -> bytes:
    """Leave out what a PNG file has beside its pixels: text and profiles, for whose size and flaws Pillow refuses it.
    A chunk whose checksum is wrong raises ValueError; the pixels have one more, inside."""
    if not content.startswith(PNG):
        return content
    kept: list[bytes | memoryview] = [PNG]
    at, chunks = len(PNG), memoryview(content)
    while at + 12 <= len(content):  # A chunk is length, kind, data, checksum.
        length, kind = struct.unpack_from(">I4s", content, at)
        chunk = chunks[at : at + 12 + length]
        at += 12 + length
        if at <= len(content) and kind != b"IDAT" and zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
            what = "ancillary chunk" if kind[0] & 0x20 else "chunk"
            raise ValueError(f"the checksum of the {what} {kind.decode('latin1')} is wrong")
        if not kind[0] & 0x20 or kind == b"tRNS":
            kept.append(chunk)
    return b"".join(kept) + content[at:]


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
