"""One-step generation by drifting (arXiv 2602.04770): models, loss, data, training and the command line."""

import os

# Idle OpenMP threads of torch sleep instead of spinning: no slower on an idle machine, several times faster on a
# busy one. OpenMP reads this when torch is first imported: it acts on the commands, not on programs that did so before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from .data import SampleQueue  # noqa: E402
from .generation import Generator, generate  # noqa: E402
from .hub import load_generator, load_mae  # noqa: E402
from .models import DriftingDiT, DriftingLoss, FeatureExtractor  # noqa: E402
from .utils import compute_kernel, compute_V  # noqa: E402

__all__ = [
    "DriftingDiT", "DriftingLoss", "FeatureExtractor", "Generator", "SampleQueue", "compute_V", "compute_kernel",
    "generate", "load_generator", "load_mae",
]  # fmt: skip
