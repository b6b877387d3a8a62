"""Helper functions."""

from .drifting_field import compute_kernel, compute_V, compute_V_multiscale, drifting_loss, softmax_normalize_2d

__all__ = ["compute_V", "compute_V_multiscale", "compute_kernel", "drifting_loss", "softmax_normalize_2d"]
