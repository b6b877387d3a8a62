"""Generator, feature extractors and the drifting loss."""

from .drifting_dit import DriftingDiT, DriftingDiTBase, DriftingDiTLarge, DriftingDiTSmall, DriftingDiTXL
from .drifting_loss import DriftingLoss, SimpleDriftingLoss
from .feature_extractor import FeatureExtractor, LatentFeatureExtractor, PixelFeatureExtractor

__all__ = [
    "DriftingDiT",
    "DriftingDiTBase",
    "DriftingDiTLarge",
    "DriftingDiTSmall",
    "DriftingDiTXL",
    "DriftingLoss",
    "FeatureExtractor",
    "LatentFeatureExtractor",
    "PixelFeatureExtractor",
    "SimpleDriftingLoss",
]
