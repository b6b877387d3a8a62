"""Masked autoencoder whose encoder gives the feature maps of the drifting loss.

Appendix A.3 of the paper (arXiv 2602.04770), layer by layer that of ``models/mae_model.py`` in the official release, so
that its weights fit this class.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .feature_extractor import PATCH_SIZES, FeatureMaps, LatentFeatureExtractor, ResNetEncoder, group_norm

TRUNCATED_STD = 0.87962566103423978  # of a standard normal cut off at ±2


class MAE(nn.Module):
    """ResNet encoder, U-Net decoder for the hidden part of the image, and a linear classifier on the last stage.

    Args:
        in_chans: channels of the images.
        base_channels: width of the first stage (the release can build multiples of 32 only).
        layers: residual blocks of the four stages.
        num_classes: labels are ``0 … num_classes - 1``.
        patch_size: side of the squares of the mask, on the patchified grid.
        input_patch_size: side of the square patches of the image that become one pixel of the encoder's input.
        dropout_prob: in the residual blocks, in training.

    ``config`` holds these arguments, so that ``MAE(**mae.config)`` builds the same network.
    """

    def __init__(
        self,
        in_chans: int = 4,
        base_channels: int = 64,
        layers: Sequence[int] = (3, 4, 6, 3),
        num_classes: int = 1000,
        patch_size: int = 2,
        input_patch_size: int = 1,
        dropout_prob: float = 0.0,
    ) -> None:
        super().__init__()
        if type(patch_size) is not int or patch_size < 1:
            raise ValueError(f"patch_size is {patch_size!r}, expected a whole number, 1 or more")
        self.encoder = ResNetEncoder(in_chans, base_channels, layers, input_patch_size, dropout_prob)
        self.decoder = UNetDecoder(base_channels, in_chans * input_patch_size**2)
        self.fc = nn.Linear(8 * base_channels, num_classes)
        self.patch_size = patch_size
        self.config: dict[str, Any] = {
            "in_chans": in_chans,
            "base_channels": base_channels,
            "layers": list(layers),
            "num_classes": num_classes,
            "patch_size": patch_size,
            "input_patch_size": input_patch_size,
            "dropout_prob": dropout_prob,
        }
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the release: truncated normal weights of variance 1 / fan-in, biases 0."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                std = 1 / math.sqrt(module.weight[0].numel()) / TRUNCATED_STD
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, labels: Tensor, mask: Tensor, lambda_cls: float | Tensor = 0.0) -> dict[str, Tensor]:
        """The training losses of each image.

        Args:
            x: images ``[B, in_chans, H, W]``.
            labels: integers ``[B]``.
            mask: ``[B, 1, H', W']`` on the patchified grid, 1 where the image is hidden from the encoder, else 0.
            lambda_cls: share of the classification loss, from 0 to 1.

        Returns:
            ``[B]`` each: ``recon_loss``, the squared error summed over channels, mean over the hidden locations;
            ``cls_loss``, the cross-entropy of the label; ``loss``, their mean weighted by ``lambda_cls``.

        Raises:
            ValueError: a wrong shape.
        """
        target = self.encoder.patchify(x)
        B, _, H, W = target.shape
        if mask.shape != (B, 1, H, W):
            raise ValueError(f"mask has shape {list(mask.shape)}, expected {[B, 1, H, W]}, the patchified grid")
        mask = mask.to(target.dtype)
        activations = self.encoder(target * (1 - mask))
        logits = self.fc(activations["layer4"].mean((2, 3)))
        cls_loss = F.cross_entropy(logits.float(), labels.long(), reduction="none")
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
        """A mask ``[B, 1, H', W']`` for :meth:`forward` of images ``[B, in_chans, H, W]``.

        Squares of side ``patch_size`` are hidden independently, each with its image's probability, which is drawn
        uniformly from ``min_ratio`` to ``max_ratio``.

        Raises:
            ValueError: sides that are no multiples of ``input_patch_size · patch_size``.
        """
        unit, B = self.encoder.input_patch_size * self.patch_size, x.shape[0]
        if x.shape[2] % unit or x.shape[3] % unit:
            raise ValueError(f"images are {x.shape[2]} × {x.shape[3]}, expected multiples of {unit}, a masked square")
        rows, columns = x.shape[2] // unit, x.shape[3] // unit
        ratio = min_ratio + (max_ratio - min_ratio) * torch.rand(B, 1, 1, 1, generator=generator, device=x.device)
        hidden = torch.rand(B, 1, rows, columns, generator=generator, device=x.device) < ratio
        mask = hidden.repeat_interleave(self.patch_size, 2).repeat_interleave(self.patch_size, 3)
        return mask.to(x.dtype)

    def features(
        self,
        x: Tensor,
        patch_mean_size: Sequence[int] | None = PATCH_SIZES,
        patch_std_size: Sequence[int] | None = PATCH_SIZES,
        use_std: bool = True,
        use_mean: bool = True,
        every_k_block: float | None = 2,
    ) -> FeatureMaps:
        """Feature maps ``{name: [B, T, C]}`` of images ``[B, in_chans, H, W]``: :meth:`ResNetEncoder.features`."""
        return self.encoder.features(x, patch_mean_size, patch_std_size, use_std, use_mean, every_k_block)

    def feature_extractor(self, every_k_block: int = 2) -> LatentFeatureExtractor:
        """A frozen extractor of this MAE's feature maps for :class:`DriftingLoss`; it shares the encoder's weights."""
        names = ("in_chans", "base_channels", "layers", "input_patch_size")
        with torch.device("meta"):
            extractor = LatentFeatureExtractor(**{n: self.config[n] for n in names}, every_k_block=every_k_block)
        extractor.encoder.load_state_dict(self.encoder.state_dict(), assign=True)
        return extractor


class UNetDecoder(nn.Module):
    """From the encoder's ``layer4`` back to full resolution, with every stage's activation on the way."""

    def __init__(self, base_channels: int, out_channels: int) -> None:
        super().__init__()
        c = base_channels
        self.bridge = ConvNormReLU(8 * c, 8 * c)
        self.up43 = UpBlock(8 * c, 4 * c, 4 * c)
        self.up32 = UpBlock(4 * c, 2 * c, 2 * c)
        self.up21 = UpBlock(2 * c, c, c)
        self.up10 = UpBlock(c, c, c)
        self.head = nn.Conv2d(c, out_channels, 1)

    def forward(self, activations: dict[str, Tensor]) -> Tensor:
        x = self.bridge(activations["layer4"])
        x = self.up43(x, activations["layer3"])
        x = self.up32(x, activations["layer2"])
        x = self.up21(x, activations["layer1"])
        x = self.up10(x, activations["conv1"])
        return self.head(x)


class UpBlock(nn.Module):
    """Enlarge to the size of ``skip``, put ``skip`` beside it, and two convolutions."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = group_norm(in_channels + skip_channels)
        self.proj = ConvNormReLU(in_channels + skip_channels, out_channels)
        self.refine = ConvNormReLU(out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
        return self.refine(self.proj(self.norm(torch.cat([x, skip], 1))))


class ConvNormReLU(nn.Module):
    """3 × 3 convolution, GroupNorm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.gn = group_norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.gn(self.conv(x)))
