"""How long each phase of a training step takes, without waiting for a GPU, and how much memory training takes."""

import resource
import sys
import time
from collections import defaultdict, deque
from functools import partial
from typing import Any

import torch
from torch import Tensor


class Stopwatch:
    """Times phases, each of which lasts until another is entered; on a GPU by events in its current stream.

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
        """Enter a phase when a backward gets to ``tensor``, if it needs a gradient."""
        if tensor.requires_grad:
            tensor.register_hook(partial(self._enter_at, phase))

    def take(self) -> dict[str, float]:
        """The seconds of each phase since the last call, up to now; on a GPU it waits until that gets here."""
        if self.entries:
            self._mark(self.entries[-1][0])
        self._add_up(wait=True)
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken

    def read(self, steps: int, images: int) -> dict[str, float]:
        """How fast training is since the last call, after that many steps of that many images each.

        Returns:
            The seconds of a ``step``, and those of each of its phases but "evaluation", which is not training;
            ``images_per_second``; and ``memory_gb``, the most so far that was allocated on the GPU, or that this
            process had on the CPU.
        """
        seconds = self.take()
        seconds.pop("evaluation", None)
        total = sum(seconds.values())
        by_phase = {phase: spent / steps for phase, spent in seconds.items()}
        memory = torch.cuda.max_memory_allocated() if self.on_gpu else _peak_of_process()
        speed = {"images_per_second": images * steps / total, "memory_gb": memory / 1e9}
        return {"step": total / steps} | by_phase | speed

    def _enter_at(self, phase: str, gradient: Tensor) -> None:
        self.enter(phase)

    def _mark(self, phase: str) -> None:
        event = torch.cuda.Event(enable_timing=True) if self.on_gpu else None
        if event is not None:
            event.record()
        self.entries.append((phase, event or time.perf_counter()))

    def _add_up(self, wait: bool) -> None:
        """Add the time of the phases that are over."""
        while len(self.entries) > 1:
            (phase, start), (_, end) = self.entries[0], self.entries[1]
            if self.on_gpu and wait:
                end.synchronize()
            if self.on_gpu and not end.query():
                break
            self.seconds[phase] += start.elapsed_time(end) / 1e3 if self.on_gpu else end - start
            self.entries.popleft()


def _peak_of_process() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
