"""Samples as people look at them and evaluators measure them: images as bytes, latents decoded, others as they are."""

from collections.abc import Iterator, Sequence
from math import inf

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..generation import Generator, Signature, evaluating
from ..hub.vae import decode_latents
from ..training.distributed import Ranks
from ..utils.images import to_uint8
from .archives import Samples
from .features import batches

DEFAULT_SCALE = "the one that evaluated best in training, else 1"  # So commands word it.


def check_drawing(cfg_scale: float | None, seed: int) -> None:
    """Raise :class:`UserError` for a guidance scale or seed that a command is given, if it is out of range."""
    if cfg_scale is not None and not 1 <= cfg_scale < inf:
        raise UserError(f"--cfg-scale is {cfg_scale}, expected 1 or more")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed is {seed}, expected 0 or more, below 2**63")


def spread_labels(num: int, choices: Sequence[int]) -> Tensor:
    """``num`` labels int64 ``[num]`` in the order of ``choices``, each of which is there equally often up to one."""
    return torch.tensor(choices, device="cpu")[(torch.arange(num, device="cpu") % len(choices)).sort().values]


def draw_samples(generator: Generator, numbers: Tensor, cfg_scale: float | None = None, seed: int = 0) -> Samples:
    """Images uint8 ``[N, H, W, C]``, or else samples float32 ``[N, *sample_shape]``, of the classes ``numbers [N]``.

    None for ``cfg_scale`` is the generator's own. What sample n draws follows from (seed, n) alone. An evaluation has
    the same samples, but for roundings where it has so few that its batches are smaller.
    """
    samples, count = np.empty(0), 0
    for batch in draw_batches(generator, numbers, cfg_scale, seed, None):
        if not count:  # 50,000 images of ImageNet are 10 GB, which concatenation would hold twice.
            samples = np.empty((len(numbers), *batch.shape[1:]), batch.dtype)
        samples[count : count + len(batch)] = batch
        count += len(batch)
    return samples


def draw_batches(
    generator: Generator, numbers: Tensor, cfg_scale: float | None, seed: int, ranks: Ranks | None
) -> Iterator[Samples]:
    """Draw this rank's batches of the samples that :func:`draw_samples` returns, the same to the last bit at any number
    of ranks; None is one process that shares them with nobody, see :func:`.features.batches`."""
    for part in batches(len(numbers), generator.sample_shape, "generate", ranks):
        drawn = draw_inputs(generator, seed, range(part.start, part.stop))
        yield render(generator, drawn, numbers[part], cfg_scale)


def draw_inputs(generator: Generator, seed: int, samples: range) -> dict[str, Tensor]:
    """All that is random in the ``samples`` of a seed, on the CPU: noise ``z [N, *noise_shape]``, and more by name."""
    signature, source = Signature.of(generator.model, generator.noise_shape), torch.Generator("cpu")
    first = int(np.random.SeedSequence(seed).generate_state(1)[0])
    # Each sample has a seed, as in EDM's generate_images.py. They are drawn on the CPU, alike for any device.
    each = [signature.draw(generator.model, 1, source.manual_seed((first + n) % 2**32), "cpu") for n in samples]
    return {name: torch.cat([of_sample[name] for of_sample in each]) for name in each[0]}


@torch.no_grad()
def render(generator: Generator, drawn: dict[str, Tensor], numbers: Tensor, cfg_scale: float | None) -> Samples:
    """Samples as :func:`draw_samples` has them, in one batch, of what :func:`draw_inputs` gave, classes ``[N]``."""
    scale = torch.tensor([generator.cfg_scale if cfg_scale is None else cfg_scale], dtype=torch.float32)
    model, latent, pixel_range = generator.model, generator.latent, generator.pixel_range
    signature = Signature.of(model, generator.noise_shape)
    weight = next(model.parameters(), torch.empty(0, device="cpu"))
    with torch.autocast(weight.device.type, torch.bfloat16, enabled=latent and weight.is_cuda), evaluating(model):
        batch = signature.call(model, drawn, numbers, scale.expand(len(numbers))).float()
    batch = decode_latents(batch) if latent else batch
    if pixel_range is None or not generator.makes_images:
        return (batch if pixel_range is None else batch.clamp(*pixel_range)).cpu().numpy()
    return to_uint8(batch, pixel_range)
