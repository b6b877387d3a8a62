"""Helper functions."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .drifting_field import compute_kernel, compute_V, compute_V_multiscale, drifting_loss, softmax_normalize_2d

__all__ = ["compute_V", "compute_V_multiscale", "compute_kernel", "drifting_loss", "softmax_normalize_2d"]


def __getattr__(name: str) -> Any:
    """Import the drifting field, and torch with it, when one of its functions is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.drifting_field"), name)
