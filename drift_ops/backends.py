"""Which implementations there are, whether this machine can use them, and which one serves a call."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from . import cpu, cuda


@dataclass(frozen=True)
class Backend:
    """An implementation of the operator and whether it can be used here; ``reason`` says why not."""

    name: str
    usable: bool
    reason: str | None = None


@functools.cache
def _why_not_triton() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if not torch.cuda.is_available() and not _interpreted():
        return "no CUDA device"
    return None


_WHY_NOT: dict[str, Callable[[], str | None]] = {
    "triton": _why_not_triton,
    "cuda": functools.cache(cuda.why_not),
    "cpu": lambda: cpu.load_error,
    "reference": lambda: None,
}


OF_DEVICE = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}  # best first


def backends() -> dict[str, Backend]:
    """``triton``, ``cuda``, ``cpu`` and ``reference`` by name; ``.reason`` says why one is not ``.usable``."""
    reasons = {name: why_not() for name, why_not in _WHY_NOT.items()}
    return {name: Backend(name, reason is None, reason) for name, reason in reasons.items()}


def choose(name: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that serves tensors of ``dtype`` on ``device``: ``name`` itself when it can, the best for None.

    Raises:
        ValueError: ``name`` is unknown, cannot be used on this machine, or does not serve such tensors.
    """
    if _forked:
        _use_one_thread_after_fork()
    if name is None:
        for best in OF_DEVICE.get(device.type, ()):
            if not _WHY_NOT[best]() and not _why_not_for(best, device, dtype):
                return best
        return "reference"
    if not isinstance(name, str) or name not in _WHY_NOT:
        raise ValueError(f"backend: got {name!r}, expected None or one of {', '.join(map(repr, _WHY_NOT))}")
    if reason := _WHY_NOT[name]():
        raise ValueError(f"backend: {name!r} cannot be used here: {reason}")
    if reason := _why_not_for(name, device, dtype):
        raise ValueError(f"backend: {reason}, or leave backend=None")
    return name


# torch.compile takes what choose returns for a constant, instead of tracing how it looks at the machine. This is all
# that torch.compiler.assume_constant_result does, but that one imports the compiler, which takes seconds.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_note_fork)


def _use_one_thread_after_fork() -> None:
    """A forked process lacks the threads of torch's OpenMP, and torch would wait for them for ever."""
    global _forked
    torch.set_num_threads(1)
    _forked = False


def _why_not_for(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps a usable backend from serving tensors of ``dtype`` on ``device``, and what to do about it."""
    if name == "reference":
        return None
    served = "cpu" if name == "cpu" or (name == "triton" and _interpreted()) else "cuda"
    if device.type != served:
        return f"{name!r} serves {served.upper()} tensors, got tensors on {device}; move them"
    if name == "triton" and dtype == torch.float64:
        return "'triton' serves float32, bfloat16 and float16, got float64; convert, take 'cuda' or 'reference'"
    return None


def _interpreted() -> bool:
    """Triton's interpreter runs the kernels in Python, on CPU tensors; for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def implementation(name: str) -> ModuleType:
    """The module that implements the ops for a backend, loaded when first asked for."""
    return import_module(f".{name}", __package__)
