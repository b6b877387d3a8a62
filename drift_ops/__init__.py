"""Fused operators for the drifting field of "Generative Modeling via Drifting" (arXiv 2602.04770)."""

from .backends import Backend, backends
from .gaussian_field import compute_V, compute_V_multiscale
from .laplacian_field import drift_field
from .loss import drift_loss
from .spec import Field

__all__ = ["Backend", "Field", "backends", "compute_V", "compute_V_multiscale", "drift_field", "drift_loss"]
__version__ = "0.2.1"  # of both packages; pyproject.toml reads it here
