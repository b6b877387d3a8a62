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
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with explained(f"cannot load the VAE {VAE} from huggingface.co or its cache"):
        vae = diffusers.AutoencoderKL.from_pretrained(VAE, torch_dtype=dtype)
    return vae.to(device).requires_grad_(False).eval()


@torch.no_grad()
def decode_latents(latents: Tensor) -> Tensor:
    """Decode latents ``[B, 4, h, w]`` to float32 images ``[B, 3, 8h, 8w]`` in [-1, 1], in bfloat16 on GPUs."""
    vae = require_vae(latents.device)
    parts = latents.div(LATENT_SCALE).to(vae.dtype).split(16)
    return torch.cat([vae.decode(part).sample.float() for part in parts])


@torch.no_grad()
def encode_images(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of scaled latents, float32 ``[B, 4, H/8, W/8]``, of images ``[B, 1 or 3, H, W]``."""
    vae = require_vae(images.device)
    parts = images.expand(-1, 3, -1, -1).to(vae.dtype).split(64)
    posteriors = [vae.encode(part).latent_dist for part in parts]
    mean, std = (torch.cat([getattr(p, moment) for p in posteriors]).float() for moment in ("mean", "std"))
    return mean * LATENT_SCALE, std * LATENT_SCALE
