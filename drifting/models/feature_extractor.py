"""Feature extractors: images ``[B, C, H, W]`` to feature maps ``{name: [B, T, D]}``.

T counts the locations of a map and D the features of a location; the drifting loss treats each location as a problem
of its own. Map names and contents follow appendix A.5 of the paper (arXiv 2602.04770) and ``get_activations`` in the
release's ``models/mae_model.py``. An extractor's parameters never train, but gradients pass through to the images.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import require

FeatureMaps = dict[str, Tensor]

NORM_EPS = 1e-6
STD_EPS = 1e-6  # inside the square root, so that a constant patch has a finite gradient
PATCH_SIZES = (2, 4)
MOST_BLOCKS = 512  # A stage has at most so many.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FrozenModule(nn.Module):
    """A module that stays in evaluation mode and whose parameters, once :meth:`freeze` was called, never train."""

    def freeze(self) -> None:
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenModule":
        return super().train(False)


class InputFeatureExtractor(FrozenModule):
    """The sample itself, of any shape, as one map ``[B, 1, D]``; its old name is ``pixels``."""

    def __init__(self, name: str = "input") -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> FeatureMaps:
        return {self.name: x.reshape(len(x), 1, -1)}


class FunctionExtractor(FrozenModule):
    """A user's function from samples to maps, as a module."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.__name__ = getattr(function, "__name__", "function").strip("<>")

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class LatentFeatureExtractor(FrozenModule):
    """``global`` (the input, flattened) and the maps of a frozen :class:`ResNetEncoder`, random or trained.

    With the default four stages, 86 maps for a 32 × 32 input.

    Args:
        in_chans, base_channels, layers, input_patch_size: of the :class:`ResNetEncoder`.
        every_k_block: which blocks inside a stage also give maps.
        seed: of the random convolution weights. ``load_state_dict`` replaces them by trained ones, and
            :meth:`drifting.models.MAE.feature_extractor` gives an extractor that has them.
    """

    def __init__(
        self,
        in_chans: int = 4,
        base_channels: int = 64,
        layers: Sequence[int] = (3, 4, 6, 3),
        every_k_block: int = 2,
        seed: int = 0,
        input_patch_size: int = 1,
    ) -> None:
        super().__init__()
        self.in_chans, self.every_k_block = in_chans, every_k_block
        self.encoder = ResNetEncoder(in_chans, base_channels, layers, input_patch_size)
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        self.freeze()

    def forward(self, x: Tensor) -> FeatureMaps:
        """Maps of ``x [B, in_chans, H, W]``; raises ValueError for another shape."""
        return {"global": _flattened(x)} | self.encoder.features(x, every_k_block=self.every_k_block)


class FeatureStack(FrozenModule):
    """Several extractors' maps together, named ``{extractor}/{map}``, or ``{extractor}`` where it has one unnamed map.

    ``global``, the input itself, is taken once.

    Args:
        extractors: their names, of which none occurs twice in the maps, and the modules.
    """

    def __init__(self, extractors: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__()
        names = [name for name, _ in extractors]
        self.names = [
            name if names.count(name) == 1 else f"{name}_{names[:place].count(name) + 1}"
            for place, name in enumerate(names)
        ]
        self.extractors = nn.ModuleList(module for _, module in extractors)
        self.freeze()

    def forward(self, x: Tensor) -> FeatureMaps:
        maps: FeatureMaps = {}
        for extractor, module in zip(self.names, self.extractors, strict=True):
            for name, feature in named_maps(module(x), len(x), module).items():
                of_extractor = extractor if name == extractor_name(module) else f"{extractor}/{name}"
                maps.setdefault("global" if name == "global" else of_extractor, feature)
        return maps


def named_maps(output: Any, count: int, extractor: nn.Module) -> FeatureMaps:
    """The maps ``{name: [B, T, D]}`` of what an extractor returned for ``count`` = B samples.

    A single tensor gets the name of the extractor, and maps ``[B, D]`` have one location.

    Raises:
        ValueError: it is no tensor ``[B, D]`` or ``[B, T, D]`` of floating-point numbers, nor a dict of such.
    """
    maps = output if isinstance(output, Mapping) else {extractor_name(extractor): output}
    for name, feature in maps.items():
        shape = list(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
        if not isinstance(feature, Tensor) or feature.ndim not in (2, 3) or len(feature) != count:
            raise ValueError(
                f"the feature extractor's map {name!r} has shape {shape} for {count} samples, "
                f"expected [{count}, features] or [{count}, locations, features]"
            )
        if not feature.is_floating_point():
            raise ValueError(f"the feature extractor's map {name!r} is {feature.dtype}, expected floating point")
    if not maps:
        raise ValueError("the feature extractor returned no maps, expected at least one")
    return {name: feature.unsqueeze(1) if feature.ndim == 2 else feature for name, feature in maps.items()}


def extractor_name(extractor: nn.Module) -> str:
    """What the one map of an extractor is called."""
    if isinstance(extractor, InputFeatureExtractor):
        return extractor.name
    return getattr(extractor, "__name__", type(extractor).__name__)


class FeatureExtractor(FrozenModule):
    """Multi-scale maps of torchvision's ResNet-18 trained on ImageNet.

    Maps: ``global`` and ``norm_x`` of the input, then those of :func:`multiscale_maps` for ``conv1`` and ``layer1`` …
    ``layer4``. RGB input is taken to lie in [-1, 1]. For another channel count the first convolution's filters are
    averaged over RGB and shared by all channels.

    Args:
        in_chans: channels of the input.
        pretrained: load the ImageNet weights (downloaded once by torchvision); False leaves them random.

    Raises:
        UserError: torchvision is not installed, or broken.
    """

    def __init__(self, in_chans: int = 3, pretrained: bool = True) -> None:
        super().__init__()
        models = require("torchvision.models", "feature_extractor='resnet18'", "resnet")
        self.in_chans = in_chans
        self.resnet = models.resnet18(weights="IMAGENET1K_V1" if pretrained else None)
        if in_chans != 3:
            shared = self.resnet.conv1.weight.mean(1, keepdim=True) * 3 / in_chans
            self.resnet.conv1.weight = nn.Parameter(shared.repeat(1, in_chans, 1, 1))
        self.normalization = ImageNetNormalization() if in_chans == 3 else nn.Identity()
        self.freeze()

    def forward(self, x: Tensor) -> FeatureMaps:
        """Maps of ``x [B, in_chans, H, W]``; raises ValueError for another channel count."""
        _check_channels(x, self.in_chans)
        maps = input_maps(x)
        net = self.resnet
        x = F.relu(net.bn1(net.conv1(self.normalization(x))))
        maps |= multiscale_maps("conv1", x)
        x = net.maxpool(x)
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = getattr(net, name)(x)
            maps |= multiscale_maps(name, x)
        return maps


class ImageNetNormalization(nn.Module):
    """RGB images ``[B, 3, H, W]`` in [-1, 1] as networks trained on ImageNet expect them."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return ((x + 1) / 2 - self.mean) / self.std


class ResNetEncoder(nn.Module):
    """GroupNorm ResNet, at full resolution in its first stage: the encoder of the release's MAE.

    Args:
        in_chans: channels of the input.
        base_channels: width of the first stage; each later stage doubles it and halves the resolution.
        layers: residual blocks of the four stages.
        input_patch_size: side of the square patches of the input that become the first layer's pixels.
        dropout_prob: share of the channels' values that a block drops in training.
    """

    def __init__(
        self,
        in_chans: int,
        base_channels: int = 64,
        layers: Sequence[int] = (3, 4, 6, 3),
        input_patch_size: int = 1,
        dropout_prob: float = 0.0,
    ) -> None:
        super().__init__()
        if len(layers) != 4 or not all(type(count) is int and 1 <= count <= MOST_BLOCKS for count in layers):
            raise ValueError(
                f"layers is {list(layers)}, expected the block counts of four stages, each from 1 to {MOST_BLOCKS}"
            )
        if type(input_patch_size) is not int or input_patch_size < 1:
            raise ValueError(f"input_patch_size is {input_patch_size!r}, expected a whole number, 1 or more")
        self.in_chans, self.input_patch_size = in_chans, input_patch_size
        self.conv1 = nn.Conv2d(in_chans * input_patch_size**2, base_channels, 3, padding=1, bias=False)
        self.gn1 = group_norm(base_channels)
        self.stages = nn.ModuleList()
        self.stage_norms = nn.ModuleList()
        width = base_channels
        for index, count in enumerate(layers):
            out = base_channels * 2**index
            blocks = [BasicBlock(width, out, 2 if index else 1, dropout_prob)]
            blocks += [BasicBlock(out, out, 1, dropout_prob) for _ in range(count - 1)]
            self.stages.append(nn.Sequential(*blocks))
            self.stage_norms.append(group_norm(out))
            width = out

    def patchify(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, H, W]`` with each patch as one pixel, ``[B, p·p·in_chans, H/p, W/p]``.

        Raises:
            ValueError: another channel count, or sides that are no multiples of p.
        """
        _check_channels(x, self.in_chans)
        p = self.input_patch_size
        if x.shape[2] % p or x.shape[3] % p:
            raise ValueError(f"images are {x.shape[2]} × {x.shape[3]}, expected multiples of input_patch_size={p}")
        B, C, H, W = x.shape
        patches = x.reshape(B, C, H // p, p, W // p, p)
        return patches.permute(0, 3, 5, 1, 2, 4).reshape(B, p * p * C, H // p, W // p)  # channels: row, column, channel

    def unpatchify(self, x: Tensor) -> Tensor:
        """The images that :meth:`patchify` makes ``x`` of."""
        p, (B, _, H, W) = self.input_patch_size, x.shape
        patches = x.reshape(B, p, p, self.in_chans, H, W)
        return patches.permute(0, 3, 4, 1, 5, 2).reshape(B, self.in_chans, H * p, W * p)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Activations ``[B, C, H, W]`` by name, of patchified images.

        ``conv1``, ``layer1_blk1`` … for every block, and ``layer1`` … ``layer4``, the normalised end of each stage.
        """
        x = F.relu(self.gn1(self.conv1(x)))
        activations = {"conv1": x}
        for index, (stage, norm) in enumerate(zip(self.stages, self.stage_norms, strict=True), start=1):
            for number, block in enumerate(stage.children(), start=1):
                x = activations[f"layer{index}_blk{number}"] = block(x)
            x = activations[f"layer{index}"] = norm(x)
        return activations

    def features(
        self,
        x: Tensor,
        patch_mean_size: Sequence[int] | None = PATCH_SIZES,
        patch_std_size: Sequence[int] | None = PATCH_SIZES,
        use_std: bool = True,
        use_mean: bool = True,
        every_k_block: float | None = 2,
    ) -> FeatureMaps:
        """Feature maps of images ``[B, in_chans, H, W]`` by the release's names, its ``get_activations``.

        ``norm_x``, then for ``conv1``, ``layer1`` … ``layer4`` and every ``every_k_block``-th block of a stage
        (``layer3_blk2`` …; a fraction is rounded down; none for None, infinity and what is below 1) the maps of
        :func:`multiscale_maps`, which has the other arguments.
        """
        every = int(every_k_block) if every_k_block is not None and 1 <= every_k_block < math.inf else 0
        x = self.patchify(x)
        maps = {"norm_x": _channel_rms(x)}
        for name, activation in self(x).items():
            _, is_block, number = name.partition("_blk")
            if is_block and not (every and int(number) % every == 0):
                continue
            maps |= multiscale_maps(name, activation, patch_mean_size or (), patch_std_size or (), use_std, use_mean)
        return maps


class BasicBlock(nn.Module):
    """Residual block of two 3 × 3 convolutions with GroupNorm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout_prob: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.gn1 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.gn2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout_prob)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
            self.shortcut.append(group_norm(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(F.relu(self.gn1(self.conv1(x))))
        return F.relu(self.gn2(self.conv2(y)) + self.shortcut(x))


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with the largest number of groups up to 32 that divides ``channels``."""
    groups = next(g for g in range(min(32, channels), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=NORM_EPS)


def input_maps(x: Tensor) -> FeatureMaps:
    """Of the input ``[B, C, H, W]``: ``global`` ``[B, 1, C·H·W]``, itself; ``norm_x`` ``[B, 1, C]``, RMS by channel."""
    return {"global": _flattened(x), "norm_x": _channel_rms(x)}


def multiscale_maps(
    name: str,
    feature: Tensor,
    patch_mean_size: Sequence[int] = PATCH_SIZES,
    patch_std_size: Sequence[int] = PATCH_SIZES,
    use_std: bool = True,
    use_mean: bool = True,
) -> FeatureMaps:
    """What one convolutional feature ``[B, C, H, W]`` is seen as.

    ``{name}`` ``[B, H·W, C]`` by location; ``{name}_mean`` and ``{name}_std`` ``[B, 1, C]``; and for patches of side
    p that tile the map, ``{name}_mean_{p}`` and ``{name}_std_{p}`` ``[B, H·W/p², C]``.
    """
    B, C, H, W = feature.shape
    maps = {name: feature.flatten(2).transpose(1, 2)}
    mean, std = _mean_and_std(maps[name].unsqueeze(1))
    if use_mean:
        maps[f"{name}_mean"] = mean
    if use_std:
        maps[f"{name}_std"] = std
    for p in dict.fromkeys([*patch_mean_size, *patch_std_size]):
        if H % p == 0 and W % p == 0:
            patches = feature.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)  # [B, H/p, W/p, p, p, C]
            mean, std = _mean_and_std(patches.reshape(B, H * W // p**2, p**2, C))
            if p in patch_mean_size:
                maps[f"{name}_mean_{p}"] = mean
            if p in patch_std_size:
                maps[f"{name}_std_{p}"] = std
    return maps


def _flattened(x: Tensor) -> Tensor:
    return x.flatten(1).unsqueeze(1)


def _channel_rms(x: Tensor) -> Tensor:
    return (x.square().mean((2, 3)) + STD_EPS).sqrt().unsqueeze(1)


def _mean_and_std(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and smoothed standard deviation over each patch, ``[B, T, points, C]`` to two ``[B, T, C]``."""
    var, mean = torch.var_mean(patches.float(), dim=2, correction=0)
    return mean.to(patches.dtype), (var + STD_EPS).sqrt().to(patches.dtype)


def _check_channels(x: Tensor, in_chans: int) -> None:
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(
            f"images have shape {list(x.shape)}, expected [B, {in_chans}, H, W] (set in_chans to change it)"
        )
