"""Generator, feature extractors, masked autoencoder, classifier and the drifting loss."""

from .classifier import Classifier
from .drifting_dit import DriftingDiT, DriftingDiTBase, DriftingDiTLarge, DriftingDiTSmall, DriftingDiTXL
from .drifting_loss import DriftingLoss, SimpleDriftingLoss
from .feature_extractor import ConvNeXtFeatureExtractor, FeatureExtractor, FeatureStack

from .feature_extractor import InputFeatureExtractor, LatentFeatureExtractor  # isort: skip
from .mae import MAE

NETWORKS = {"drifting_dit": DriftingDiT}  # Generators by their name in configurations.
MODELS: dict[str, type[DriftingDiT] | type[MAE]] = {"gen": DriftingDiT, "mae": MAE}  # Models by their kind in files.

__all__ = [
    "MAE", "MODELS", "NETWORKS", "Classifier", "ConvNeXtFeatureExtractor", "DriftingDiT", "DriftingDiTBase",
    "DriftingDiTLarge", "DriftingDiTSmall", "DriftingDiTXL", "DriftingLoss", "FeatureExtractor", "FeatureStack",
    "InputFeatureExtractor", "LatentFeatureExtractor", "SimpleDriftingLoss",
]  # fmt: skip
