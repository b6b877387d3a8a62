"""Measuring: interleaved timings, and by how much memory grows."""

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Call = Callable[[], Any]


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def interleaved_medians(
    calls: Mapping[str, Call], seconds: float, seconds_of: Callable[[Call], float], min_rounds: int, max_rounds: int
) -> dict[str, tuple[float, int]]:
    """Median seconds of each call and the number of runs. The calls, which must be warm, take turns, so that a slow
    spell of the machine hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < deadline):
        for name, call in calls.items():
            times[name].append(seconds_of(call))
        rounds += 1
    return {name: (statistics.median(of_call), rounds) for name, of_call in times.items()}


def wall_seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def event_seconds(device: str) -> Callable[[Call], float]:
    """Seconds between two events on the GPU around a call that finds none of its inputs in the L2 cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    other = torch.empty(max(4 * cache, 2**26), dtype=torch.uint8, device=device)

    def seconds_of(call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        other.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return seconds_of


def synchronised(call: Call, device: str) -> Call:
    """``call`` that returns when the device has done its work."""
    if device == "cpu":
        return call

    def wait_for_call() -> object:
        result = call()
        torch.cuda.synchronize(device)
        return result

    return wait_for_call


def peak_extra_memory(call: Call, device: str = "cpu") -> int | None:
    """Bytes by which memory peaks during ``call`` above what it was before; None where it cannot be told.

    On a GPU, of torch's allocator. On a CPU resident memory, which counts everything, whichever allocator it came from;
    memory that an earlier call freed and the allocator kept is returned to the system first. Needs Linux's /proc.
    """
    if device != "cpu":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - allocated
    try:
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
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
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))
