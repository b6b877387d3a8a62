"""Measuring: interleaved timings and the growth of resident memory."""

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping

Call = Callable[[], object]


def interleaved_medians(calls: Mapping[str, Call], seconds: float = 8.0, min_rounds: int = 7) -> dict[str, float]:
    """Median seconds of each call. The calls take turns, so that a slow spell of the machine hits all of them."""
    for call in calls.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < min_rounds or time.perf_counter() < deadline:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(of_call) for name, of_call in times.items()}


def peak_extra_memory(call: Call) -> int | None:
    """Bytes by which resident memory peaks during ``call`` above what it was before; None where Linux's /proc is not.

    Counts everything, whichever allocator it came from; memory that an earlier call freed and the allocator kept is
    returned to the system first.
    """
    try:
        with open("/proc/self/clear_refs", "w") as file:
            _trim()
            before = _status("VmRSS")
            file.write("5")  # resets the peak
    except OSError:
        return None
    call()
    return max(0, _status("VmHWM") - before)


def _trim() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))
