"""A convolutional generator of small images, whose features begin as those of an MLP."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .drifting_dit import RMSNorm
from .residual_mlp import ConditionedMLP, check_shape
from .resnet_encoder import check_sizes


class ConvDecoder(nn.Module):
    """A generator ``G(z, y, α)`` of images: an MLP makes a coarse grid of features, and convolutions refine it.

    They come in stages, each of which doubles the resolution, the last one to that of the image.

    Args:
        sample_shape: shape ``(channels, height, width)`` of an image.
        num_classes: labels are 0 … num_classes - 1.
        noise_dim: an image has this many Gaussian numbers.
        channels: the stages have these many channels.
        width, depth: the MLP has ``depth`` residual blocks, whose inputs have ``width`` values.
        cond_dim: width of the vector of label and guidance scale, which modulates all blocks.

    ``ConvDecoder(**network.config)`` builds the same network.
    """

    conditions_once = True

    def __init__(
        self, sample_shape: Sequence[int], num_classes: int = 1, noise_dim: int = 64,
        channels: Sequence[int] = (32, 16), width: int = 128, depth: int = 2, cond_dim: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        check_shape(sample_shape, ranks=[3])
        if not isinstance(channels, Sequence) or not 1 <= len(channels) <= 16:
            raise ValueError(f"channels is {channels!r}, expected a list of one number for each of 1 to 16 stages")
        check_sizes(**{f"channels[{stage}]": count for stage, count in enumerate(channels)})
        self.config: dict[str, Any] = dict(
            sample_shape=list(sample_shape), num_classes=num_classes, noise_dim=noise_dim, channels=list(channels),
            width=width, depth=depth, cond_dim=cond_dim,
        )  # fmt: skip
        self.noise_shape, self.num_classes, self.sample_shape = (noise_dim,), num_classes, tuple(sample_shape)
        self.grid = tuple(math.ceil(side / 2 ** len(channels)) for side in sample_shape[1:])
        self.trunk = ConditionedMLP(num_classes, noise_dim, width, depth, cond_dim)
        self.norm = RMSNorm(width)
        self.proj, self.cond_proj = (nn.Linear(size, channels[0] * math.prod(self.grid)) for size in (width, cond_dim))
        self.stages = nn.ModuleList()
        for before, after in zip(channels, [*channels[1:], sample_shape[0]], strict=True):
            self.stages.append(Stage(before, after, cond_dim))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # It is faster on CPUs.

    def forward(self, z: Tensor, y: Tensor, cfg_scale: float | Tensor = 1.0) -> Tensor:
        """Images ``[B, *sample_shape]``, for the arguments of :meth:`ResidualMLP.forward`."""
        x, cond = self.trunk(z, y, cfg_scale)
        x = self.proj(self.norm(x)) + self.cond_proj(cond)  # [L, B/L, grid · channels]
        x = x.flatten(0, 1).unflatten(1, (*self.grid, -1)).permute(0, 3, 1, 2)  # [B, channels, rows, columns]
        for stage in self.stages:
            x = stage(x, cond)
        _, height, width = self.sample_shape
        return x[:, :, :height, :width]


class Stage(nn.Module):
    """A residual block of two 3 × 3 convolutions, modulated by the condition, then one to twice the resolution."""

    def __init__(self, in_channels: int, out_channels: int, cond_dim: int) -> None:
        super().__init__()
        # A group has eight channels, where they divide so: with groups of one, no feature could be strong throughout.
        groups = in_channels // 8 if in_channels % 8 == 0 else 1
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(groups, in_channels) for _ in range(3))
        self.conv1, self.conv2 = (nn.Conv2d(in_channels, in_channels, 3, padding=1) for _ in range(2))
        self.modulation = nn.Linear(cond_dim, 2 * in_channels)
        self.enlarge = nn.Conv2d(in_channels, 4 * out_channels, 3, padding=1)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift, scale = self.modulation(cond)[..., None, None].chunk(2, 2)  # [L, 1, channels, 1, 1] each
        labels, each = cond.shape[0], x.shape[0] // max(1, cond.shape[0])
        h = self.norm2(self.conv1(F.silu(self.norm1(x)))).unflatten(0, (labels, each))
        x = x + self.conv2(F.silu((h * (1 + scale) + shift).flatten(0, 1)))
        return F.pixel_shuffle(self.enlarge(F.silu(self.norm3(x))), 2).contiguous(memory_format=torch.channels_last)
