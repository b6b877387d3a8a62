"""A run stops when its loss or gradient is no longer finite."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .checkpoint import checkpoints_in
from .metrics_log import to_record


class FiniteGuard:
    """Raises once a run has skipped more than ``allowed`` steps because their loss or gradient was not finite.

    On a GPU it looks at the step before the last, so that nothing waits for the one in hand. ``checkpoints`` is the
    folder whose newest checkpoint the message names.
    """

    def __init__(self, allowed: int, checkpoints: Path) -> None:
        self.allowed, self.checkpoints = allowed, checkpoints
        self.pending: list[tuple[int, dict[str, Tensor], Tensor, torch.cuda.Event | None]] = []

    def check(self, step: int, metrics: dict[str, Tensor], wait: bool = False) -> None:
        """Take in the metrics of a step, whose ``skipped_steps`` counts the steps that were skipped so far.

        Args:
            step: the number of the step.
            metrics: what the step returned.
            wait: look at this step too, even on a GPU.

        Raises:
            UserError: too many steps were skipped; the message names the step and the feature maps.
        """
        skipped, event = metrics["skipped_steps"], None
        if skipped.is_cuda:
            pinned = torch.empty_like(skipped, device="cpu", pin_memory=True)
            skipped = pinned.copy_(skipped, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending.append((step, metrics, skipped, event))
        kept = 1 if event is not None and not wait else 0
        while len(self.pending) > kept:
            self._look(*self.pending.pop(0))

    def _look(self, step: int, metrics: dict[str, Tensor], skipped: Tensor, event: torch.cuda.Event | None) -> None:
        if event is not None:
            event.synchronize()
        if skipped > self.allowed:
            newest = [str(path) for path in checkpoints_in(self.checkpoints)][-1:] or ["not there yet"]
            raise UserError(
                f"step {step}: {_describe(to_record(metrics))}; skipped so far: {int(skipped)}. These steps left the "
                f"weights as they were; the last checkpoint is {newest[0]}: look at the data, lower "
                "optimizer.learning_rate, or let train.max_skipped_steps such steps pass"
            )


def _describe(record: dict[str, Any]) -> str:
    """What is not finite in a step."""
    maps = [name for name, scale in record.get("scale", {}).items() if not math.isfinite(scale)]
    maps += [
        name
        for name, squares in record.get("lambda", {}).items()
        if name not in maps and not all(map(math.isfinite, squares.values()))
    ]
    if maps:
        rest = f" and {len(maps) - 3} more" if len(maps) > 3 else ""
        where = f"in the feature map{'s' * (len(maps) > 1)} {', '.join(maps[:3])}{rest}"
    else:
        where = "behind the feature maps, which are finite" if "scale" in record else "in the model"
    return f"the loss is {record['loss']:g} and its gradient's norm {record['grad_norm']:g}, {where}"
