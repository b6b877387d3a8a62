"""Samples as they are looked at and measured: images as bytes, latents decoded, other samples as they are."""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ..generation import Generator, generate
from ..hub.vae import DECODE_BATCH, decode_latents
from ..utils.images import to_uint8

BATCH = 500  # This many samples are generated at once …
BATCH_VALUES = 2**21  # … unless they have more values than that together.


def spread_labels(num: int, choices: Sequence[int]) -> Tensor:
    """``num`` labels, each of ``choices`` equally often up to one, sorted by their place in ``choices``."""
    place = (torch.arange(num) % len(choices)).sort().values
    return torch.tensor(choices)[place]


def draw_samples(generator: Generator, numbers: Tensor, cfg_scale: float = 1.0, seed: int = 0) -> NDArray[Any]:
    """Samples for the classes ``numbers [N]``, in batches; ``seed`` fixes them on any device.

    Returns:
        uint8 images ``[N, H, W, C]``, decoded where the generator makes latents; or of other samples float32
        ``[N, *sample_shape]``. Latents are generated and decoded in bfloat16 on GPUs.
    """
    samples, count = np.empty(0), 0
    with tqdm(total=len(numbers), desc="generate", unit="sample", delay=1, leave=False, disable=None) as bar:
        for part in _draw_parts(generator, numbers, cfg_scale, seed):
            if not count:  # 50,000 images of ImageNet are 10 GB, which are not held twice.
                samples = np.empty((len(numbers), *part.shape[1:]), part.dtype)
            samples[count : count + len(part)] = part
            count += len(part)
            bar.update(len(part))
    return samples


def _draw_parts(generator: Generator, numbers: Tensor, cfg_scale: float, seed: int) -> Iterator[NDArray[Any]]:
    """The samples in order, as many at a time as were generated together or, of latents, decoded together."""
    source = torch.Generator().manual_seed(seed)
    size = max(1, min(BATCH, BATCH_VALUES // max(1, prod(generator.sample_shape))))
    parameter = next(generator.model.parameters(), torch.empty(0))
    half = generator.latent and parameter.is_cuda
    for number in numbers.split(size):
        with torch.autocast(parameter.device.type, torch.bfloat16, enabled=half):
            samples = generate(
                generator.model, len(number), number, cfg_scale, None, source, generator.noise_shape
            ).float()
        for part in samples.split(DECODE_BATCH if generator.latent else size):
            part = decode_latents(part) if generator.latent else part
            yield part.cpu().numpy() if generator.pixel_range is None else to_uint8(part, generator.pixel_range)
