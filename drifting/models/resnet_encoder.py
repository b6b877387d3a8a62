"""The encoder of the masked autoencoder, and the maps ``{name: [B, T, D]}`` of its layers (appendix A.5)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FeatureMaps = dict[str, Tensor]
STD_EPS = 1e-6  # It is inside the square root, so that a constant patch has a finite gradient.


class ResNetEncoder(nn.Module):
    """A ResNet with GroupNorm whose first stage has full resolution and ``base_channels``.

    Each later one has twice the channels and half the resolution. ``layers`` are the numbers of residual blocks of the
    four stages, and patches of side ``input_patch_size`` of an image become the first layer's pixels.
    """

    def __init__(
        self, in_chans: int, base_channels: int = 64, layers: Sequence[int] = (3, 4, 6, 3),
        input_patch_size: int = 1, dropout_prob: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(in_chans=in_chans, base_channels=base_channels, input_patch_size=input_patch_size)
        if len(layers) != 4 or not all(type(count) is int and 1 <= count <= 512 for count in layers):
            raise ValueError(f"layers is {list(layers)}, expected four stages of 1 to 512 blocks each")
        if not 0 <= dropout_prob <= 1:
            raise ValueError(f"dropout_prob is {dropout_prob}, expected a number from 0 to 1")
        self.in_chans, self.input_patch_size = in_chans, input_patch_size
        self.conv1 = nn.Conv2d(in_chans * input_patch_size**2, base_channels, 3, padding=1, bias=False)
        self.gn1 = group_norm(base_channels)
        self.stages, self.stage_norms = nn.ModuleList(), nn.ModuleList()
        for index, count in enumerate(layers):
            out = base_channels * 2**index
            blocks = [BasicBlock(out // 2 if index else out, out, 2 if index else 1, dropout_prob)]
            blocks += [BasicBlock(out, out, 1, dropout_prob) for _ in range(count - 1)]
            self.stages.append(nn.Sequential(*blocks))
            self.stage_norms.append(group_norm(out))

    def patchify(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, H, W]`` with each patch as one pixel, ``[B, p·p·in_chans, H/p, W/p]``."""
        check_channels(x, self.in_chans)
        p = self.input_patch_size
        if x.shape[2] % p or x.shape[3] % p:
            raise ValueError(f"images are {x.shape[2]} × {x.shape[3]}, expected multiples of input_patch_size={p}")
        # The channels of a patch come last, after its rows and columns.
        return F.pixel_unshuffle(x, p).unflatten(1, (-1, p**2)).transpose(1, 2).flatten(1, 2)

    def unpatchify(self, x: Tensor) -> Tensor:
        """The images that :meth:`patchify` makes ``x`` of."""
        p = self.input_patch_size
        return F.pixel_shuffle(x.unflatten(1, (p**2, -1)).transpose(1, 2).flatten(1, 2), p)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Activations ``[B, C, H, W]`` of patchified images: ``conv1``, ``layer1_blk1`` …, ``layer1`` …, its norm."""
        x = F.relu(self.gn1(self.conv1(x)))
        activations = {"conv1": x}
        for index, (stage, norm) in enumerate(zip(self.stages, self.stage_norms, strict=True), start=1):
            for number, block in enumerate(stage.children(), start=1):
                x = activations[f"layer{index}_blk{number}"] = block(x)
            x = activations[f"layer{index}"] = norm(x)
        return activations

    def features(self, x: Tensor) -> FeatureMaps:
        """Feature maps of images ``[B, in_chans, H, W]`` by the release's names.

        They are ``norm_x`` and the :func:`multiscale_maps` of ``conv1``, ``layer1`` … ``layer4`` and every second block
        of a stage.
        """
        x = self.patchify(x)
        maps = {"norm_x": channel_rms(x)}
        for name, activation in self(x).items():
            _, is_block, number = name.partition("_blk")
            if not is_block or int(number) % 2 == 0:
                maps |= multiscale_maps(name, activation)
        return maps


class BasicBlock(nn.Module):
    """Residual block of two 3 × 3 convolutions with GroupNorm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout_prob: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.gn1 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.gn2 = group_norm(out_channels)
        self.dropout_prob, self.shortcut = dropout_prob, nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut.extend([shortcut, group_norm(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(F.relu(self.gn1(self.conv1(x))), self.dropout_prob, self.training)
        return F.relu(self.gn2(self.conv2(y)) + self.shortcut(x))


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with the largest number of groups up to 32 that divides ``channels``."""
    groups = next(g for g in range(min(32, channels), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


def multiscale_maps(name: str, feature: Tensor, sides: Sequence[int] = (2, 4)) -> FeatureMaps:
    """The maps of one feature ``[B, C, H, W]``: ``{name} [B, H·W, C]``, ``{name}_mean`` and ``{name}_std [B, 1, C]``.

    Patches of these sides p that tile the map have ``{name}_mean_{p}`` and ``{name}_std_{p}`` ``[B, H·W/p², C]``.
    """
    B, C, H, W = feature.shape
    maps = {name: feature.flatten(2).transpose(1, 2)}
    patches = {"": maps[name].unsqueeze(1)}  # [B, T, locations, C]
    for p in sides:
        if H % p == W % p == 0:
            tiles = feature.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)  # [B, H/p, W/p, p, p, C]
            patches[f"_{p}"] = tiles.reshape(B, H * W // p**2, p**2, C)
    for suffix, of_side in patches.items():
        var, mean = _var_mean(of_side.float())
        maps[f"{name}_mean{suffix}"] = mean.to(feature.dtype)
        maps[f"{name}_std{suffix}"] = (var + STD_EPS).sqrt().to(feature.dtype)
    return maps


def _var_mean(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and mean ``[B, T, C]`` over the locations of ``patches [B, T, K, C]``."""
    if patches.device.type != "cpu":
        return torch.var_mean(patches, dim=2, correction=0)
    # There, torch.var_mean over a middle dimension is scalar code, and two vectorised passes take half its time.
    mean = patches.mean(2, keepdim=True)
    return (patches - mean).square().mean(2), mean.squeeze(2)


def channel_rms(x: Tensor) -> Tensor:
    """The map ``norm_x`` ``[B, 1, C]`` of ``x [B, C, H, W]``."""
    return (x.square().mean((2, 3)) + STD_EPS).sqrt().unsqueeze(1)


def check_channels(x: Tensor, in_chans: int) -> None:
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"images have shape {list(x.shape)}, expected [B, {in_chans}, H, W]; in_chans sets that")


def check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{name} is {size!r}, expected a whole number, 1 or more")
