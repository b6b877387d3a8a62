"""How much memory there is to be had."""

import os
import re
from contextlib import suppress
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """How many bytes a GPU has free, or else the host; a container's limit counts where there is one."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError):  # Only Linux has these files.
        available = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
        sizes += [int(available[1]) * 1024] if available else []
    with suppress(OSError, ValueError):  # Without a limit it says "max".
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(sizes)
