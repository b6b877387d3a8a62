"""Samples as people look at them and evaluators measure them: images as bytes, latents decoded, others as they are."""

from collections.abc import Sequence
from math import inf, prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError
from ..generation import Generator, generate
from ..hub.vae import decode_latents
from ..utils.images import to_uint8
from ..utils.progress import progress

DEFAULT_SCALE = "the one that evaluated best in training, else 1"  # So commands word it.
BATCH, BATCH_VALUES = 500, 2**21  # So many samples are generated at once, unless they have more values than this.


def check_drawing(cfg_scale: float | None, seed: int) -> None:
    """Raise :class:`UserError` for a guidance scale or seed that a command is given, if it is out of range."""
    if cfg_scale is not None and not 1 <= cfg_scale < inf:
        raise UserError(f"--cfg-scale is {cfg_scale}, expected 1 or more")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed is {seed}, expected 0 or more, below 2**63")


def spread_labels(num: int, choices: Sequence[int]) -> Tensor:
    """``num`` labels int64 ``[num]`` in the order of ``choices``, each of which is there equally often up to one."""
    return torch.tensor(choices, device="cpu")[(torch.arange(num, device="cpu") % len(choices)).sort().values]


def draw_samples(generator: Generator, numbers: Tensor, cfg_scale: float | None = None, seed: int = 0) -> NDArray[Any]:
    """Images uint8 ``[N, H, W, C]``, or else samples float32 ``[N, *sample_shape]``, of the classes ``numbers [N]``.

    None for ``cfg_scale`` is the generator's own.
    """
    model, latent, pixel_range = generator.model, generator.latent, generator.pixel_range
    scale = generator.cfg_scale if cfg_scale is None else cfg_scale
    source = torch.Generator().manual_seed(seed)  # It is on the CPU, which makes samples alike on any device.
    size = max(1, min(BATCH, BATCH_VALUES // max(1, prod(generator.sample_shape))))
    weight = next(model.parameters(), torch.empty(0, device="cpu"))
    samples, count = np.empty(0), 0
    for number in progress(numbers.split(size), "generate", "batch"):
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=latent and weight.is_cuda):
            batch = generate(model, len(number), number, scale, None, source, generator.noise_shape).float()
        batch = decode_latents(batch) if latent else batch
        if pixel_range is None or not generator.makes_images:
            values = (batch if pixel_range is None else batch.clamp(*pixel_range)).cpu().numpy()
        else:
            values = to_uint8(batch, pixel_range)
        if not count:  # 50,000 images of ImageNet are 10 GB, which concatenation would hold twice.
            samples = np.empty((len(numbers), *values.shape[1:]), values.dtype)
        samples[count : count + len(values)] = values
        count += len(values)
    return samples
