"""What a result says about where it comes from."""

import importlib.util
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import drift_ops

ROOT = Path(__file__).parent.parent
DRY_RUN_MEMORY = 2**16  # bytes that the CPU of a dry run is said to have: dense contenders are scaled down there too


def memory_bytes(device: str) -> int:
    return DRY_RUN_MEMORY if device == "cpu" else torch.cuda.get_device_properties(device).total_memory


def describe_machine(device: str) -> dict[str, Any]:
    """Device, versions, commit and date; which backends and optional contenders are usable."""
    description = {
        "device": platform.processor() or platform.machine(),
        "memory_bytes": memory_bytes(device),
        "driver": None,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(),
        "commit": os.environ.get("COMMIT") or _output_of("git", "rev-parse", "HEAD"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "backends": {name: status.reason or "usable" for name, status in drift_ops.backends().items()},
        "keops": importlib.util.find_spec("pykeops") is not None,
    }
    if device == "cpu":
        return description
    properties = torch.cuda.get_device_properties(device)
    driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return description | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": driver.splitlines()[0] if driver else None,
    }


def slug(name: str) -> str:
    """``NVIDIA H100 80GB HBM3`` as ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
