"""Generators for small samples: a residual MLP from noise, label and guidance scale, and a decoder of images on it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import shown
from .conditions import check_conditions
from .drifting_dit import MOST, RMSNorm
from .pretrained import Pretrained
from .resnet_encoder import check_sizes


def check_shape(sample_shape: Any, ranks: Sequence[int] = range(33)) -> None:
    """Raise ValueError unless ``sample_shape`` is a list of sizes, as many as one of ``ranks``."""
    if not isinstance(sample_shape, Sequence) or len(sample_shape) not in ranks:
        expected = "[channels, height, width]" if list(ranks) == [3] else "a list of sizes, such as [64]"
        raise ValueError(f"sample_shape is {sample_shape!r}, expected {expected}")
    check_sizes(**{f"sample_shape[{place}]": size for place, size in enumerate(sample_shape)})


class ConditionedMLP(nn.Module):
    """Residual blocks from noise to ``[L, B/L, width]``, modulated (adaLN) by a vector of label and guidance scale α.

    That vector is e(y) + log(α) g(y), with two embeddings e and g of the labels, so that α = 1 is e(y) alone.
    """

    def __init__(self, num_classes: int, noise_dim: int, width: int, depth: int, cond_dim: int) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, noise_dim=noise_dim, width=width, depth=depth, cond_dim=cond_dim)
        if depth > MOST["depth"]:  # A damaged file must not fill the memory with blocks, even on the meta device.
            raise ValueError(f"depth is {depth}, expected {MOST['depth']} at most")
        self.class_embed = nn.Embedding(num_classes, cond_dim)
        self.guidance_embed = nn.Embedding(num_classes, cond_dim)
        self.noise_proj, self.cond_proj = nn.Linear(noise_dim, width), nn.Linear(cond_dim, width)
        self.blocks = nn.ModuleList(Block(width, cond_dim) for _ in range(depth))
        # Noise and label begin with a say of the same size in what the network makes, and α with half of it.
        nn.init.normal_(self.noise_proj.weight, std=1 / math.sqrt(noise_dim))
        nn.init.normal_(self.guidance_embed.weight, std=0.5)

    def forward(self, z: Tensor, y: Tensor, cfg_scale: float | Tensor) -> tuple[Tensor, Tensor]:
        """Features of ``z [B, noise_dim]``, normalised by nothing yet, and condition vectors ``[L, 1, cond_dim]``."""
        if z.shape[1:] != (self.noise_proj.in_features,):
            raise ValueError(f"z has shape {list(z.shape)}, expected [B, {self.noise_proj.in_features}]")
        scale = check_conditions(y, cfg_scale, z.shape[0], self.class_embed.num_embeddings, z.device)
        is_seen = scale.device.type == "cpu" and not torch.compiler.is_compiling()  # Looking would stall a GPU's queue.
        if is_seen and not ((scale >= 1) & (scale < math.inf)).all():
            raise ValueError(f"cfg_scale is {shown(scale.tolist())}, expected finite numbers of 1 or more")
        strength = scale.log().unsqueeze(1).to(self.guidance_embed.weight.dtype)
        cond = (self.class_embed(y) + strength * self.guidance_embed(y)).unsqueeze(1)
        x = self.noise_proj(z).unflatten(0, (y.shape[0], z.shape[0] // max(1, y.shape[0]))) + self.cond_proj(cond)
        for block in self.blocks:
            x = block(x, cond)
        return x, cond


class Block(nn.Module):
    """Norm, two layers, and a gate that is 1 at first; shift, scale and gate depend on the condition."""

    def __init__(self, width: int, cond_dim: int) -> None:
        super().__init__()
        self.norm, self.modulation = RMSNorm(width), nn.Linear(cond_dim, 3 * width)
        self.w1, self.w2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        nn.init.normal_(self.modulation.weight, std=0.3 / math.sqrt(cond_dim))
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(cond).chunk(3, -1)
        return x + (1 + gate) * self.w2(F.silu(self.w1(self.norm(x) * (1 + scale) + shift)))


class ResidualMLP(Pretrained, kind="residual_mlp"):
    """A generator ``G(z, y, α)`` of samples of any shape, which are small: an MLP sees nothing of images.

    Args:
        sample_shape: shape of one sample.
        num_classes: labels are 0 … num_classes - 1.
        noise_dim: a sample has this many Gaussian numbers.
        width, depth: the network has ``depth`` residual blocks, whose inputs have ``width`` values.
        cond_dim: width of the vector of label and guidance scale.

    ``ResidualMLP(**network.config)`` builds the same network.
    """

    conditions_once = True

    def __init__(
        self, sample_shape: Sequence[int], num_classes: int = 1, noise_dim: int = 64, width: int = 256, depth: int = 3,
        cond_dim: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        check_shape(sample_shape)
        self.config: dict[str, Any] = dict(
            sample_shape=list(sample_shape), num_classes=num_classes, noise_dim=noise_dim, width=width, depth=depth,
            cond_dim=cond_dim,
        )  # fmt: skip
        self.noise_shape, self.sample_shape, self.num_classes = (noise_dim,), tuple(sample_shape), num_classes
        self.trunk = ConditionedMLP(num_classes, noise_dim, width, depth, cond_dim)
        self.norm = RMSNorm(width)
        self.proj, self.cond_proj = (nn.Linear(size, math.prod(sample_shape)) for size in (width, cond_dim))

    def forward(self, z: Tensor, y: Tensor, cfg_scale: float | Tensor = 1.0) -> Tensor:
        """Samples ``[B, *sample_shape]`` of Gaussian noise ``z [B, noise_dim]``.

        Integer labels ``y`` and guidance scales, 1 or more, are ``[B]``, or ``[L]`` where each is that of B/L
        consecutive samples; one scale may be for all. Wrong shapes raise ValueError.
        """
        x, cond = self.trunk(z, y, cfg_scale)
        samples = self.proj(self.norm(x)) + self.cond_proj(cond)  # [L, B/L, values]
        return samples.reshape(z.shape[0], *self.sample_shape)


class ConvDecoder(Pretrained, kind="conv_decoder"):
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
