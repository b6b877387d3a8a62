"""A small classifier of small images, whose features :mod:`drifting.evaluation` compares generated images in."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

MOST_STAGES = 32


class Classifier(nn.Module):
    """Stages of two 3 × 3 convolutions, the second of which halves the resolution; mean over locations; linear.

    Args:
        in_chans: channels of the images.
        num_classes: labels are ``0 … num_classes - 1``.
        channels: width of each stage; the last is the number of features.

    ``config`` holds these arguments, so that ``Classifier(**classifier.config)`` builds the same network.
    """

    def __init__(self, in_chans: int = 1, num_classes: int = 10, channels: Sequence[int] = (24, 48, 96)) -> None:
        super().__init__()
        if not 1 <= len(channels) <= MOST_STAGES:
            raise ValueError(f"there are {len(channels)} stages, expected 1 to {MOST_STAGES}")
        widths = [in_chans, *channels]
        self.stages = nn.Sequential()
        for before, after in zip(widths, widths[1:], strict=False):
            self.stages.extend([*_convolution(before, after, stride=2), *_convolution(after, after, stride=1)])
        self.fc = nn.Linear(channels[-1], num_classes)
        self.config: dict[str, Any] = {
            "in_chans": in_chans, "num_classes": num_classes, "channels": list(channels),
        }  # fmt: skip

    def features(self, x: Tensor) -> Tensor:
        """``[B, channels[-1]]`` of images ``[B, in_chans, H, W]`` in [-1, 1]."""
        return self.stages(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]``."""
        return self.fc(self.features(x))


def _convolution(before: int, after: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
