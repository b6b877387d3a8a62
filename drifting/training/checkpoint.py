"""Checkpoints on disk: ``step_00001000.pt`` and so on in one folder, the newest few kept."""

import os
import re
from pathlib import Path
from typing import Any

import torch

NAME = re.compile(r"step_(\d{8})\.pt")


def save_checkpoint(folder: Path, state: dict[str, Any], keep: int = 2) -> Path:
    """Write ``state`` (with its ``step``) as one file that is either whole or absent, and delete all but ``keep``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{state['step']:08d}.pt"
    with atomic_write(path) as part:
        torch.save(state, part)
    for old in _checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest state in ``folder`` on the CPU, or None where there is none.

    Raises:
        ValueError: that file cannot be read.
    """
    paths = _checkpoints(folder)
    if not paths:
        return None
    try:
        return torch.load(paths[-1], map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"checkpoint {paths[-1]} cannot be read ({type(error).__name__}): delete it to go on from the one before"
        ) from error


class atomic_write:
    """Context manager that gives a temporary path beside ``path`` and moves it there when the block succeeds."""

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, path.with_name(f".{path.name}.part")

    def __enter__(self) -> Path:
        return self.part

    def __exit__(self, error_type: object, error: object, traceback: object) -> None:
        if error_type is None:
            os.replace(self.part, self.path)
        else:
            self.part.unlink(missing_ok=True)


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint files in ``folder``, oldest step first."""
    return sorted(path for path in folder.glob("step_*.pt") if NAME.fullmatch(path.name))
