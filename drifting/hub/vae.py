"""The Stable Diffusion VAE between images and the latents of the release's latent generators, through diffusers."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

VAE = "stabilityai/sd-vae-ft-mse"
LATENT_CHANNELS = 4
LATENT_SCALE = 0.18215  # latents are stored with about unit variance
DECODE_BATCH = 16  # images decoded at once
ENCODE_BATCH = 64


def require_vae(device: torch.device) -> None:
    """Raises as :func:`decode_latents` does, before there are latents: generating them may take minutes."""
    _load_vae(device)


@torch.no_grad()
def decode_latents(latents: Tensor) -> Tensor:
    """Latents ``[B, 4, h, w]`` to images ``[B, 3, 8h, 8w]`` in [-1, 1], float32; computed in bfloat16 on GPUs.

    Raises:
        UserError: diffusers is not installed, or the VAE cannot be downloaded.
    """
    vae = _load_vae(latents.device)
    parts = latents.div(LATENT_SCALE).to(vae.dtype).split(DECODE_BATCH)
    return torch.cat([vae.decode(part).sample.float() for part in parts])


@torch.no_grad()
def encode_images(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images ``[B, 3, H, W]`` in [-1, 1] to mean and standard deviation of their latents, float32 ``[B, 4, H/8, W/8]``.

    Grey ones ``[B, 1, H, W]`` are encoded as RGB.

    Both are multiplied by ``LATENT_SCALE``. Computed in bfloat16 on GPUs; raises as :func:`decode_latents` does.
    """
    vae = _load_vae(images.device)
    parts = images.expand(-1, 3, -1, -1).to(vae.dtype).split(ENCODE_BATCH)
    posteriors = [vae.encode(part).latent_dist for part in parts]
    mean, std = (torch.cat([getattr(p, moment) for p in posteriors]).float() for moment in ("mean", "std"))
    return mean * LATENT_SCALE, std * LATENT_SCALE


@cache
def _load_vae(device: torch.device) -> Any:
    try:
        from diffusers import AutoencoderKL
    except (ImportError, RuntimeError) as error:  # RuntimeError, where what it imports in turn is broken
        raise UserError(
            "latents need the Stable Diffusion VAE of diffusers, which is not installed or cannot be imported: "
            f"`pip install 'drifting[imagenet]'` ({(str(error).strip() or type(error).__name__).splitlines()[-1]})"
        ) from error
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        vae = AutoencoderKL.from_pretrained(VAE, torch_dtype=dtype)
    except Exception as error:  # offline, no access, a broken cache: they have no base class in common
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"cannot load the VAE {VAE} from huggingface.co or its cache: {type(error).__name__}: {reason}"
        ) from error
    return vae.to(device).requires_grad_(False).eval()
