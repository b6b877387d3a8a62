"""How much memory there is to be had, and what becomes of memory that is freed."""

import ctypes
import os
import re
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h calls these options so.
KEPT = 2**30  # Tensors of up to so many bytes are allocated from kept memory.
format_bytes = partial(tqdm.format_sizeof, suffix="B")  # 1234567890 is told as 1.23GB.


def free_memory(device: torch.device) -> int:
    """How many bytes a GPU has free, or else the host; a container's limit counts where there is one."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError):  # Only Linux has these files.
        available = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
        sizes += [int(available[1]) * 1024] if available else []
    with suppress(OSError, ValueError):  # Without a limit it says "max".
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return min(sizes)


def keep_freed_memory() -> None:
    """Let the C library keep the memory that tensors free, instead of giving it back to the system at once.

    A training step on the CPU would get it back page by page, zeroed, which takes a fifth of its time. Only glibc gives
    it back, so that nothing changes with others.
    """
    with suppress(OSError, TypeError, AttributeError):  # There may be no C library to open, or none with this function.
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(option, KEPT)
