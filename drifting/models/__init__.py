"""Generators, feature extractors, masked autoencoder, classifier and the drifting loss."""

from ..errors import libraries

with libraries():
    from .classifier import Classifier
    from .drifting_dit import DriftingDiT, DriftingDiTBase, DriftingDiTLarge, DriftingDiTSmall, DriftingDiTXL
    from .drifting_loss import DriftingLoss, SimpleDriftingLoss
    from .feature_extractor import ConvNeXtFeatureExtractor, FeatureExtractor, FeatureStack

    from .feature_extractor import InputFeatureExtractor, LatentFeatureExtractor, PyramidExtractor  # isort: skip
    from .fields import FIELDS
    from .mae import MAE
    from .small_generators import ConvDecoder, ResidualMLP

# Generators by their name in configurations, and what the release has by its kind there.
NETWORKS = {"drifting_dit": DriftingDiT, "conv_decoder": ConvDecoder, "residual_mlp": ResidualMLP}
MODELS: dict[str, type[DriftingDiT] | type[MAE]] = {"gen": DriftingDiT, "mae": MAE}

__all__ = [
    "FIELDS", "MAE", "MODELS", "NETWORKS", "Classifier", "ConvDecoder", "ConvNeXtFeatureExtractor", "DriftingDiT",
    "DriftingDiTBase", "DriftingDiTLarge", "DriftingDiTSmall", "DriftingDiTXL", "DriftingLoss", "FeatureExtractor",
    "FeatureStack", "InputFeatureExtractor", "LatentFeatureExtractor", "PyramidExtractor", "ResidualMLP",
    "SimpleDriftingLoss",
]  # fmt: skip
