"""One-step generation by drifting (arXiv 2602.04770): models, loss, data, training and the command line."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import tell_failed_import

if TYPE_CHECKING:
    from drift_ops import __version__ as __version__

    from .data import SampleQueue
    from .generation import Generator, generate
    from .hub import load_generator, load_mae
    from .models import DriftingDiT, DriftingLoss, FeatureExtractor
    from .utils import compute_kernel, compute_V

__all__ = [
    "DriftingDiT", "DriftingLoss", "FeatureExtractor", "Generator", "SampleQueue", "compute_V", "compute_kernel",
    "generate", "load_generator", "load_mae",
]  # fmt: skip
HOMES = ("generation", "models", "utils", "data", "hub")

# Idle OpenMP threads of torch sleep instead of spinning: no slower on an idle machine, several times faster on a
# busy one. OpenMP reads this when torch is first imported: it acts on the commands, not on programs that did so before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if sys.argv[:1] == ["-m"]:  # Python is about to run one of the commands, which import what they need.
    sys.excepthook = tell_failed_import


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: the list of commands need not wait for torch."""
    if name == "__version__":
        return import_module("drift_ops").__version__
    if name in HOMES:
        return import_module(f".{name}", __name__)
    for home in HOMES if name in __all__ else ():
        module = import_module(f".{home}", __name__)
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
