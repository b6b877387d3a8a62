"""Figures of matplotlib, which need no window."""

import os
from typing import Any

from ..errors import require


def new_figure(width: float = 1.0, height: float = 1.0) -> Any:
    """A figure of matplotlib, so many inches wide and high; UserError says why there is none."""
    os.environ["MPLBACKEND"] = "agg"  # A notebook's, which its commands inherit, may not be there.
    return require("matplotlib.figure", "the picture").Figure((width, height), layout="constrained")
