"""Helper functions; those of the drifting field, and torch with them, are imported when one is first asked for."""

from importlib import import_module
from typing import Any

__all__ = ["compute_V", "compute_V_multiscale", "compute_kernel", "drifting_loss", "softmax_normalize_2d"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.drifting_field"), name)
