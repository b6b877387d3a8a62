"""One-step image generation by drifting (arXiv 2602.04770): models, loss, data, training and its command line."""

from .data import SampleQueue
from .models import DriftingDiT, DriftingLoss, FeatureExtractor
from .utils import compute_kernel, compute_V

__all__ = ["DriftingDiT", "DriftingLoss", "FeatureExtractor", "SampleQueue", "compute_V", "compute_kernel"]
