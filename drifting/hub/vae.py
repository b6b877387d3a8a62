"""Encode images to latents of the Stable Diffusion VAE, and decode them, through diffusers."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import explained, require

VAE = "stabilityai/sd-vae-ft-mse"
LATENT_CHANNELS, LATENT_SCALE = 4, 0.18215  # The scale gives stored latents about unit variance.


@cache
def require_vae(device: torch.device) -> Any:
    """Load the VAE; commands call this before they spend minutes on latents that could not be decoded."""
    diffusers = require("diffusers", "making or decoding latents", "imagenet")
    with explained(f"cannot load the VAE {VAE} from huggingface.co or its cache"):
        vae = diffusers.AutoencoderKL.from_pretrained(VAE, torch_dtype=torch.float32)
    return vae.to(device).requires_grad_(False).eval()


@torch.no_grad()
def decode_latents(latents: Tensor) -> Tensor:
    """Decode latents ``[B, 4, h, w]`` to float32 images ``[B, 3, 8h, 8w]`` in [-1, 1], also within autocast: bfloat16
    would round by more than the grey levels that FID is measured of."""
    vae = require_vae(latents.device)
    with torch.autocast(latents.device.type, enabled=False):
        return torch.cat([vae.decode(part).sample for part in latents.float().div(LATENT_SCALE).split(16)])


@torch.no_grad()
def encode_images(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of scaled latents, float32 ``[B, 4, H/8, W/8]``, of images ``[B, 1 or 3, H, W]``, on
    GPUs in bfloat16 autocast."""
    vae = require_vae(images.device)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        posteriors = [vae.encode(part).latent_dist for part in images.expand(-1, 3, -1, -1).float().split(64)]
    mean, std = (torch.cat([getattr(p, moment) for p in posteriors]).float() for moment in ("mean", "std"))
    return mean * LATENT_SCALE, std * LATENT_SCALE
