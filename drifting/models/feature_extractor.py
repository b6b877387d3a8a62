"""Feature extractors: samples to maps ``{name: [B, T, D]}`` of T locations; gradients pass, parameters never train."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError, explained, reason, require
from .resnet_encoder import FeatureMaps, ResNetEncoder, channel_rms, check_channels, multiscale_maps

CONVNEXT = "facebook/convnextv2-base-22k-224"  # The hub has it, trained on ImageNet-22k and then on ImageNet-1k.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FrozenModule(nn.Module):
    """A module that stays in evaluation mode."""

    def train(self, mode: bool = True) -> "FrozenModule":
        return super().train(False)


class InputFeatureExtractor(FrozenModule):
    """The sample itself, of any shape, as one map ``[B, 1, D]``; its old name is ``pixels``."""

    def __init__(self, name: str = "input") -> None:
        super().__init__()
        self.__name__ = name

    def forward(self, x: Tensor) -> FeatureMaps:
        return {self.__name__: x.reshape(len(x), 1, -1)}


class PyramidExtractor(FrozenModule):
    """An image at several sizes and in parts, without training: for small images, of any size and channels.

    ``global [B, 1, D]`` is the image, ``half`` and ``quarter [B, 1, D]`` are its averages over squares of side 2 and 4.
    ``patches_2`` and ``patches_4 [B, T, D]`` are its parts with a half and a quarter of its sides, which begin every
    quarter of a side. The last row and column are repeated where such parts do not tile the image.
    """

    def forward(self, x: Tensor) -> FeatureMaps:
        """Maps of images ``x [B, C, H, W]``."""
        maps = {"global": x.flatten(1).unsqueeze(1)}
        sides = {parts: (math.ceil(x.shape[2] / parts), math.ceil(x.shape[3] / parts)) for parts in (2, 4)}
        for name, parts in (("half", 2), ("quarter", 4)):
            maps[name] = F.adaptive_avg_pool2d(x, sides[parts]).flatten(1).unsqueeze(1)
        down, across = sides[4]
        for parts, (height, width) in sides.items():
            below, beside = (height - x.shape[2]) % down, (width - x.shape[3]) % across
            padded = F.pad(x, (0, beside, 0, below), mode="replicate") if below or beside else x
            tiles = padded.unfold(2, height, down).unfold(3, width, across)  # [B, C, rows, columns, height, width]
            maps[f"patches_{parts}"] = tiles.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return maps


class FunctionExtractor(FrozenModule):
    """A user's function from samples to maps, as a module."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.__name__ = getattr(function, "__name__", "function").strip("<>")

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class LatentFeatureExtractor(FrozenModule):
    """``global``, the input, and the maps of a frozen :class:`ResNetEncoder` whose weights follow from ``seed``."""

    def __init__(
        self, in_chans: int = 4, base_channels: int = 64, layers: Sequence[int] = (3, 4, 6, 3), seed: int = 0,
        input_patch_size: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder = ResNetEncoder(in_chans, base_channels, layers, input_patch_size).float()
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                drawn = torch.empty_like(module.weight, device="cpu")  # The weights may be on torch's default device.
                nn.init.kaiming_normal_(drawn, mode="fan_out", nonlinearity="relu", generator=generator)
                module.weight.data.copy_(drawn)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> FeatureMaps:
        return {"global": x.flatten(1).unsqueeze(1)} | self.encoder.features(x)


class FeatureStack(FrozenModule):
    """Several extractors' maps together, named ``{extractor}/{map}``, or ``{extractor}`` where it has one unnamed map.

    ``global``, the input itself, is taken once. Extractors of the same name get numbers: ``{extractor}_1`` ….
    """

    def __init__(self, extractors: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__()
        names, self.names = [name for name, _ in extractors], []
        for place, name in enumerate(names):
            self.names.append(name if names.count(name) == 1 else f"{name}_{names[:place].count(name) + 1}")
        self.extractors = nn.ModuleList(module for _, module in extractors)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> FeatureMaps:
        maps: FeatureMaps = {}
        for extractor, module in zip(self.names, self.extractors, strict=True):
            for name, feature in named_maps(module(x), len(x), module).items():
                of_extractor = extractor if name == extractor_name(module) else f"{extractor}/{name}"
                maps.setdefault("global" if name == "global" else of_extractor, feature)
        return maps


def named_maps(output: Any, count: int, extractor: nn.Module) -> FeatureMaps:
    """The maps ``{name: [B, T, D]}`` of what an extractor returned for B samples; a single tensor gets its name."""
    maps = output if isinstance(output, Mapping) else {extractor_name(extractor): output}
    if not maps:
        raise ValueError("the feature extractor returned no maps, expected at least one")
    for name, feature in maps.items():
        is_map = isinstance(feature, Tensor) and feature.is_floating_point() and feature.ndim in (2, 3)
        if not is_map or len(feature) != count:
            shape, dtype = list(getattr(feature, "shape", ())), getattr(feature, "dtype", type(feature).__name__)
            received = f"the feature extractor's map {name!r} has shape {shape} and is {dtype} for {count} samples"
            expected = f"floating-point [{count}, features] or [{count}, locations, features]"
            raise ValueError(f"{received}, expected {expected}")
    return {name: feature.unsqueeze(1) if feature.ndim == 2 else feature for name, feature in maps.items()}


def extractor_name(extractor: nn.Module) -> str:
    return getattr(extractor, "__name__", type(extractor).__name__)


class FeatureExtractor(FrozenModule):
    """``global``, ``norm_x`` and the maps of ``conv1``, ``layer1`` … ``layer4`` of ResNet-18 trained on ImageNet.

    RGB input is in [-1, 1]; other channels share the first filters, averaged over RGB.
    """

    def __init__(self, in_chans: int = 3, pretrained: bool = True) -> None:
        super().__init__()
        models = require("torchvision.models", "feature_extractor='resnet18'", "resnet")
        self.in_chans = in_chans
        advice = "where there is no network, bring another machine's ~/.cache/torch/hub/checkpoints"
        with explained(f"feature_extractor='resnet18' cannot load its weights ({advice})"):
            self.resnet = models.resnet18(weights="IMAGENET1K_V1" if pretrained else None)
        if in_chans != 3:
            shared = self.resnet.conv1.weight.mean(1, keepdim=True) * 3 / in_chans
            self.resnet.conv1.weight = nn.Parameter(shared.repeat(1, in_chans, 1, 1))
        self.normalization = ImageNetNormalization() if in_chans == 3 else nn.Identity()
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> FeatureMaps:
        check_channels(x, self.in_chans)
        maps = {"global": x.flatten(1).unsqueeze(1), "norm_x": channel_rms(x)}
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

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.std = nn.Buffer(torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return ((x + 1) / 2 - self.mean) / self.std


class ConvNeXtFeatureExtractor(FrozenModule):
    """Maps of a ConvNeXt V2 (arXiv 2301.00808), transformers' ``ConvNextV2Model``, of images resized to 224 × 224.

    ``global`` is the input. ``stage_1`` … ``stage_3`` ``[B, H·W, C]`` are by location, and ``stage_0_mean``,
    ``stage_0_std`` … ``[B, 1, C]`` over the locations, each of which was normalised over channels. ``global_mean`` is
    what the classifier sees, ``global_std`` is ``stage_3_std``. The release has stages in float32 beside bfloat16.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network
        self.normalization = ImageNetNormalization()
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> FeatureMaps:
        """Maps of RGB images ``x [B, 3, H, W]`` in [-1, 1]."""
        maps = {"global": x.flatten(1).unsqueeze(1)}
        x = F.interpolate(self.normalization(x), (224, 224), mode="bilinear", antialias=True)
        x = self.network.embeddings(x)
        for index, stage in enumerate(self.network.encoder.stages):
            x = stage(x)
            std, mean = torch.std_mean(x.float(), 1, correction=0, keepdim=True)  # over the channels of a location
            maps |= multiscale_maps(f"stage_{index}", ((x - mean) / (std + 1e-3)).to(x.dtype), ())
        del maps["stage_0"]  # The release leaves out its 56 × 56 locations.
        norm = self.network.layernorm
        pooled = F.layer_norm(x.mean((2, 3)), norm.normalized_shape, norm.weight, norm.bias, 1e-6)  # Not its own 1e-12.
        return maps | {"global_mean": pooled.unsqueeze(1), "global_std": maps["stage_3_std"]}


def load_convnext(in_chans: int = 3, source: str = CONVNEXT) -> ConvNeXtFeatureExtractor:
    """The extractor with the weights of ``source``, a name on the hub or a directory in the format of transformers."""
    if in_chans != 3:
        raise UserError(f"convnext_v2 takes images of 3 channels, the data have {in_chans}")
    transformers = require("transformers", "the features convnext_v2", "convnext")
    try:
        network = transformers.ConvNextV2ForImageClassification
        classifier, info = network.from_pretrained(source, output_loading_info=True)
    except Exception as error:  # Being offline, without access or of a broken file have no base class in common.
        advice = f"bring the cache of a machine that ran `hf download {CONVNEXT}`, and set HF_HOME to it"
        received = f"cannot load ConvNeXt V2 {source} ({reason(error)})"
        raise UserError(f"{received}: where the hub is out of reach, {advice}") from error
    missing = [key for key in info["missing_keys"] if not key.startswith("classifier.")]
    if missing:
        raise UserError(f"{source} holds no ConvNeXt V2 in the format of transformers, it lacks {missing[0]}")
    return ConvNeXtFeatureExtractor(classifier.convnextv2.float())
