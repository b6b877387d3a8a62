"""How fast training is, and how much memory it takes."""

import resource
import sys

import torch

from ..utils.stopwatch import Stopwatch


class Meter:
    """Reads a trainer's stopwatch, from ``step`` on; what is under "evaluation" is not training."""

    def __init__(self, stopwatch: Stopwatch, step: int) -> None:
        self.stopwatch, self.step = stopwatch, step
        stopwatch.take()
        stopwatch.enter("data")

    def read(self, step: int, images_per_step: int) -> dict[str, float]:
        """Of the steps since the last reading: seconds a ``step``, and of it in each phase; images a second. And
        ``memory_gb``, the most so far that was allocated on the GPU, or on the CPU was this process's."""
        seconds = self.stopwatch.take()
        seconds.pop("evaluation", None)
        steps, total, self.step = step - self.step, sum(seconds.values()), step
        by_phase = {phase: spent / steps for phase, spent in seconds.items()}
        images = images_per_step * steps / total
        memory = torch.cuda.max_memory_allocated() if self.stopwatch.on_gpu else _peak_of_process()
        return {"step": total / steps} | by_phase | {"images_per_second": images, "memory_gb": memory / 1e9}


def _peak_of_process() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
