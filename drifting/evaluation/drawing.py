"""Samples as people look at them and evaluators measure them: images as bytes, latents decoded, others as they are."""

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
BATCH_VALUES = 2**21  # … unless they have more values than this together.


def spread_labels(num: int, choices: Sequence[int]) -> Tensor:
    """``num`` labels int64 ``[num]`` in the order of ``choices``, each of which is there equally often up to one."""
    place = (torch.arange(num) % len(choices)).sort().values
    return torch.tensor(choices)[place]


def draw_samples(generator: Generator, numbers: Tensor, cfg_scale: float = 1.0, seed: int = 0) -> NDArray[Any]:
    """Samples for the classes ``numbers [N]``, in batches; ``seed`` fixes them on any device.

    Returns:
        Images as uint8 ``[N, H, W, C]``, decoded where the generator makes latents; other samples as float32
        ``[N, *sample_shape]``. Latents are generated and decoded in bfloat16 on GPUs.
    """
    samples, count = np.empty(0), 0
    with tqdm(total=len(numbers), desc="generate", unit="sample", delay=1, leave=False, disable=None) as bar:
        for part in _draw_parts(generator, numbers, cfg_scale, seed):
            if not count:  # 50,000 images of ImageNet are 10 GB, which concatenation would hold twice.
                samples = np.empty((len(numbers), *part.shape[1:]), part.dtype)
            samples[count : count + len(part)] = part
            count += len(part)
            bar.update(len(part))
    return samples


def _draw_parts(generator: Generator, numbers: Tensor, cfg_scale: float, seed: int) -> Iterator[NDArray[Any]]:
    """The samples in order; a part holds as many as are generated together or, of latents, decoded together."""
    source = torch.Generator().manual_seed(seed)
    size = max(1, min(BATCH, BATCH_VALUES // max(1, prod(generator.sample_shape))))
    weight = next(generator.model.parameters(), torch.empty(0))
    half = generator.latent and weight.is_cuda
    for number in numbers.split(size):
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=half):
            samples = generate(
                generator.model, len(number), number, cfg_scale, None, source, generator.noise_shape
            ).float()
        for part in samples.split(DECODE_BATCH if generator.latent else size):
            part = decode_latents(part) if generator.latent else part
            yield part.cpu().numpy() if generator.pixel_range is None else to_uint8(part, generator.pixel_range)
