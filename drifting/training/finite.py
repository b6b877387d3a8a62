"""A run stops when its loss or gradient is no longer finite."""

import math
from typing import Any

import torch
from torch import Tensor

from .metrics_log import to_record


class NotFiniteError(ValueError):
    """The loss or the gradient was NaN or infinite; the message says at which step and in which feature maps."""


class FiniteGuard:
    """Looks at ``skipped_steps`` of each step's metrics, of which ``allowed`` are, over the whole run.

    On a GPU it looks at those of the step before, so that nothing waits for the step in hand.
    """

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self.pending: list[tuple[int, dict[str, Tensor], Tensor, torch.cuda.Event | None]] = []

    def check(self, step: int, metrics: dict[str, Tensor]) -> None:
        """Raises NotFiniteError if more steps were skipped than are allowed, on a GPU up to the step before."""
        skipped, event = metrics["skipped_steps"], None
        if skipped.is_cuda:
            pinned = torch.empty_like(skipped, device="cpu", pin_memory=True)
            skipped = pinned.copy_(skipped, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.pending.append((step, metrics, skipped, event))
        while len(self.pending) > (event is not None):
            self._look()

    def finish(self) -> None:
        """Raises as :meth:`check`, of all steps."""
        while self.pending:
            self._look()

    def _look(self) -> None:
        step, metrics, skipped, event = self.pending.pop(0)
        if event is not None:
            event.synchronize()
        if skipped > self.allowed:
            raise NotFiniteError(f"step {step}: {_describe(to_record(metrics))}; skipped so far: {int(skipped)}")


def _describe(record: dict[str, Any]) -> str:
    """What of a step is not finite."""
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
