"""How long each phase of a training step takes, without waiting for a GPU."""

import time
from collections import defaultdict, deque
from functools import partial
from typing import Any

import torch
from torch import Tensor


class Stopwatch:
    """A phase lasts until another is entered. On a GPU it is timed there, by events in its current stream.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        self.entries: deque[tuple[str, Any]] = deque()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def enter(self, phase: str) -> None:
        """End the phase that lasts, if it is another, and begin this one."""
        if not self.entries or self.entries[-1][0] != phase:
            self._mark(phase)
            self._add_up(wait=False)

    def enter_at_gradient(self, tensor: Tensor, phase: str) -> None:
        """Enter a phase where a backward gets to ``tensor``, if it needs a gradient."""
        if tensor.requires_grad:
            tensor.register_hook(partial(self._enter_at, phase))

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call, up to now; on a GPU it waits until that gets here."""
        if self.entries:
            self._mark(self.entries[-1][0])
        self._add_up(wait=True)
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken

    def _enter_at(self, phase: str, gradient: Tensor) -> None:
        self.enter(phase)

    def _mark(self, phase: str) -> None:
        event = torch.cuda.Event(enable_timing=True) if self.on_gpu else None
        if event is not None:
            event.record()
        self.entries.append((phase, event or time.perf_counter()))

    def _add_up(self, wait: bool) -> None:
        """Add what is over to the phases' seconds."""
        while len(self.entries) > 1:
            (phase, start), (_, end) = self.entries[0], self.entries[1]
            if self.on_gpu and wait:
                end.synchronize()
            if self.on_gpu and not end.query():
                break
            self.seconds[phase] += start.elapsed_time(end) / 1e3 if self.on_gpu else end - start
            self.entries.popleft()
