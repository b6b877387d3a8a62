"""A small classifier of small images, whose features :mod:`drifting.evaluation` compares generated images in."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .pretrained import Pretrained


class Classifier(Pretrained, kind="classifier"):
    """Stages of two 3 × 3 convolutions, the first of which halves the resolution; mean over locations; linear.

    The stages are ``channels`` wide. ``Classifier(**classifier.config)`` builds the same network.
    """

    def __init__(self, in_chans: int = 1, num_classes: int = 10, channels: Sequence[int] = (24, 48, 96)) -> None:
        super().__init__()
        if not 1 <= len(channels) <= 32:
            raise ValueError(f"there are {len(channels)} stages, expected 1 to 32")
        self.config: dict[str, Any] = dict(in_chans=in_chans, num_classes=num_classes, channels=list(channels))
        self.stages = nn.Sequential()
        for before, after in zip([in_chans, *channels], channels, strict=False):
            for width, stride in ((before, 2), (after, 1)):
                self.stages.append(nn.Conv2d(width, after, 3, stride, padding=1, bias=False))
                self.stages.extend([nn.BatchNorm2d(after), nn.ReLU()])
        self.fc = nn.Linear(channels[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        """``[B, channels[-1]]`` of images ``[B, in_chans, H, W]`` in [-1, 1]."""
        return self.stages(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]``."""
        return self.fc(self.features(x))
