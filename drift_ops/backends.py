"""Which implementations there are, whether this machine can use them, and which one serves a call."""

from dataclasses import dataclass

import torch

from . import cpu


@dataclass(frozen=True)
class Backend:
    """An implementation of the operator and whether it can be used here; ``reason`` says why not."""

    name: str
    usable: bool
    reason: str | None = None


_BACKENDS = {
    "triton": Backend("triton", False, "this version has no Triton kernels yet"),
    "cuda": Backend("cuda", False, "this version has no CUDA C++ kernels yet"),
    "cpu": Backend("cpu", cpu.load_error is None, cpu.load_error),
    "reference": Backend("reference", True),
}


def backends() -> dict[str, Backend]:
    """``triton``, ``cuda``, ``cpu`` and ``reference`` by name; ``.reason`` says why one is not ``.usable``."""
    return dict(_BACKENDS)


def choose(name: str | None, device: torch.device) -> str:
    """The backend that serves tensors on ``device``: ``name`` itself when it can, the best one when it is None.

    Raises:
        ValueError: ``name`` is unknown, cannot be used on this machine, or does not serve ``device``.
    """
    if name is None:
        return "cpu" if device.type == "cpu" and _BACKENDS["cpu"].usable else "reference"
    if name not in _BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected None or one of {', '.join(map(repr, _BACKENDS))}")
    if not _BACKENDS[name].usable:
        raise ValueError(f"backend: {name!r} cannot be used here: {_BACKENDS[name].reason}")
    if name == "cpu" and device.type != "cpu":
        raise ValueError(f"backend: 'cpu' serves CPU tensors, got tensors on {device}; move them or leave backend=None")
    return name
