"""How long each phase of a training step takes, without waiting for a GPU, and how much memory training takes."""

import resource
import sys
import time
from collections import defaultdict, deque
from typing import Any

import torch
from torch import Tensor


class Stopwatch:
    """Times phases, each of which lasts until another is entered; on a GPU by events in its current stream."""

    def __init__(self, device: torch.device | str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        self.entries: deque[tuple[str, Any]] = deque()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def enter(self, phase: str) -> None:
        """End the phase that lasts, if it is another, and begin this one."""
        if not self.entries or self.entries[-1][0] != phase:
            self._mark(phase, wait=False)

    def enter_at_gradient(self, tensor: Tensor, phase: str) -> None:
        """Enter a phase when a backward gets to ``tensor``, if it needs a gradient."""
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: self.enter(phase))

    def take(self) -> dict[str, float]:
        """The seconds of each phase since the last call, up to now; on a GPU it waits until that gets here."""
        if self.entries:
            self._mark(self.entries[-1][0], wait=True)
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken

    def read(self, steps: int, images: int) -> dict[str, float]:
        """What one of ``steps`` steps of ``images`` images took since the last call by phase, speed, peak memory."""
        seconds = self.take()
        seconds.pop("evaluation", None)  # It is part of no step.
        total = sum(seconds.values())
        of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        memory = torch.cuda.max_memory_allocated() if self.on_gpu else of_process
        speed = {"images_per_second": images * steps / total, "memory_gb": memory / 1e9}
        return {"step": total / steps} | {phase: spent / steps for phase, spent in seconds.items()} | speed

    def _mark(self, phase: str, wait: bool) -> None:
        """Begin a phase, and add the time of those that are over; on a GPU of those that it has finished."""
        now: Any = torch.cuda.Event(enable_timing=True) if self.on_gpu else time.perf_counter()
        if self.on_gpu:
            now.record()
        self.entries.append((phase, now))
        while len(self.entries) > 1:
            (phase, start), (_, end) = self.entries[0], self.entries[1]
            if self.on_gpu and wait:
                end.synchronize()
            if self.on_gpu and not end.query():
                break
            self.seconds[phase] += start.elapsed_time(end) / 1e3 if self.on_gpu else end - start
            self.entries.popleft()
