"""Fused operators for the drifting field of "Generative Modeling via Drifting" (arXiv 2602.04770)."""

from .backends import Backend, backends
from .functional import compute_V, compute_V_multiscale, drift_field, drift_loss

__all__ = ["Backend", "backends", "compute_V", "compute_V_multiscale", "drift_field", "drift_loss"]
