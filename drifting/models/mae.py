"""Masked autoencoder (appendix A.3 of the paper), layer by layer that of the release's ``models/mae_model.py``."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .conditions import check_indices
from .feature_extractor import LatentFeatureExtractor
from .resnet_encoder import ResNetEncoder, check_sizes, group_norm


class MAE(nn.Module):
    """ResNet encoder, U-Net decoder for the hidden part of the image, and a linear classifier on the last stage.

    Squares of side ``patch_size`` are hidden on the patchified grid. ``MAE(**mae.config)`` builds the same network.
    """

    def __init__(
        self, in_chans: int = 4, base_channels: int = 64, layers: Sequence[int] = (3, 4, 6, 3), num_classes: int = 1000,
        patch_size: int = 2, input_patch_size: int = 1, dropout_prob: float = 0.0,
    ) -> None:  # fmt: skip
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        check_sizes(patch_size=patch_size)
        self.encoder = ResNetEncoder(in_chans, base_channels, layers, input_patch_size, dropout_prob)
        self.decoder = UNetDecoder(base_channels, in_chans * input_patch_size**2)
        self.fc = nn.Linear(8 * base_channels, num_classes)
        self.patch_size = patch_size
        self.config: dict[str, Any] = config | {"layers": list(layers)}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the release: truncated normal weights of variance 1 / fan-in, biases 0."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                std = 1 / math.sqrt(module.weight[0].numel()) / 0.87962566103423978  # N(0, 1) cut off at ±2 has that.
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, labels: Tensor, mask: Tensor, lambda_cls: float | Tensor = 0.0) -> dict[str, Tensor]:
        """The losses ``[B]`` of images ``x [B, in_chans, H, W]`` with integer ``labels [B]``.

        ``recon_loss`` is the squared error summed over channels, its mean over the hidden locations, where ``mask``
        ``[B, 1, H', W']`` on the patchified grid is 1, not 0; ``cls_loss`` is the cross-entropy of the label.
        """
        are_numbers = not labels.is_floating_point() and labels.dtype != torch.bool
        labels = labels.long() if are_numbers else labels
        check_indices("labels", labels, (len(x),), self.fc.out_features)
        target = self.encoder.patchify(x)
        if mask.shape != target[:, :1].shape:
            raise ValueError(f"mask has shape {list(mask.shape)}, expected {list(target[:, :1].shape)}, as patchified")
        mask = mask.to(target.dtype)
        activations = self.encoder(target * (1 - mask))
        logits = self.fc(activations["layer4"].mean((2, 3)))
        cls_loss = F.cross_entropy(logits.float(), labels, reduction="none")
        squares = (self.decoder(activations).float() - target).square() * mask
        recon_loss = squares.sum((1, 2, 3)) / (mask.sum((1, 2, 3)) + 1e-8)
        loss = lambda_cls * cls_loss + (1 - lambda_cls) * recon_loss
        return {"loss": loss, "recon_loss": recon_loss, "cls_loss": cls_loss}

    def reconstruct(self, x: Tensor, mask: Tensor) -> Tensor:
        """The decoder's images ``[B, in_chans, H, W]``, for the arguments of :meth:`forward`."""
        target = self.encoder.patchify(x)
        return self.encoder.unpatchify(self.decoder(self.encoder(target * (1 - mask))))

    def random_mask(
        self, x: Tensor, min_ratio: float = 0.5, max_ratio: float = 0.5, generator: torch.Generator | None = None
    ) -> Tensor:
        """A mask ``[B, 1, H', W']`` that hides squares of images ``x`` with a probability drawn for each image."""
        unit, B = self.encoder.input_patch_size * self.patch_size, x.shape[0]
        if x.shape[2] % unit or x.shape[3] % unit:
            raise ValueError(f"images are {x.shape[2]} × {x.shape[3]}, expected multiples of {unit}, a masked square")
        rows, columns = x.shape[2] // unit, x.shape[3] // unit
        rand = partial(torch.rand, generator=generator, device=x.device, dtype=torch.float32)
        ratio = min_ratio + (max_ratio - min_ratio) * rand(B, 1, 1, 1)
        hidden = rand(B, 1, rows, columns) < ratio
        return hidden.to(x.dtype).repeat_interleave(self.patch_size, 2).repeat_interleave(self.patch_size, 3)

    def feature_extractor(self) -> LatentFeatureExtractor:
        """A frozen extractor of this MAE's feature maps for :class:`DriftingLoss`; it shares the encoder's weights."""
        names = ("in_chans", "base_channels", "layers", "input_patch_size")
        with torch.device("meta"):
            extractor = LatentFeatureExtractor(**{name: self.config[name] for name in names})
        extractor.encoder.load_state_dict(self.encoder.state_dict(), assign=True)
        return extractor


class UNetDecoder(nn.Module):
    """From the encoder's ``layer4`` back to full resolution, with every stage's activation on the way."""

    def __init__(self, base_channels: int, out_channels: int) -> None:
        super().__init__()
        c = base_channels
        self.bridge = conv_norm_relu(8 * c, 8 * c)
        self.up43, self.up32 = UpBlock(8 * c, 4 * c), UpBlock(4 * c, 2 * c)
        self.up21, self.up10 = UpBlock(2 * c, c), UpBlock(c, c)
        self.head = nn.Conv2d(c, out_channels, 1)

    def forward(self, activations: dict[str, Tensor]) -> Tensor:
        x = self.bridge(activations["layer4"])
        for up, skip in ((self.up43, "layer3"), (self.up32, "layer2"), (self.up21, "layer1"), (self.up10, "conv1")):
            x = up(x, activations[skip])
        return self.head(x)


class UpBlock(nn.Module):
    """Enlarges to the size of ``skip``, puts ``skip`` beside it, and has two convolutions."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = group_norm(in_channels + out_channels)
        self.proj = conv_norm_relu(in_channels + out_channels, out_channels)
        self.refine = conv_norm_relu(out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
        return self.refine(self.proj(self.norm(torch.cat([x, skip], 1))))


def conv_norm_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, gn=group_norm(out_channels), relu=nn.ReLU()))
