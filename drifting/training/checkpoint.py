"""Checkpoints: files ``step_00001000.pt`` and so on, written whole or not at all, and checked before they are used.

``torch.save`` writes a trainer's state: nested dictionaries of tensors, numbers, text and lists. Nothing in it runs, as
it is read with ``weights_only``, and it has a checksum of every tensor and of the rest.
"""

import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, reason
from ..utils.files import atomic_write

NAME = re.compile(r"step_(\d{8,})\.pt")


def save_checkpoint(folder: Path, state: dict[str, Any], keep: int = 2) -> Path:
    """Write ``state``, whose ``step`` names the file, into ``folder``; delete all but the newest ``keep`` checkpoints.

    If it cannot be written, those before it stay, and UserError names them.
    """
    path = folder / f"step_{state['step']:08d}.pt"
    try:
        for half in folder.glob(".step_*.part"):  # A killed process left it.
            half.unlink()
        with atomic_write(path) as part, part.open("wb") as file:
            torch.save(state, file)
        for old in [other for step, other in checkpoints_in(folder).items() if step <= state["step"]][:-keep]:
            old.unlink(missing_ok=True)  # Later ones are damaged, and are replaced when their step comes again.
    except (OSError, RuntimeError, UserError) as error:
        # What the system refused may be hidden behind an error of PyTorch's writer or of ours.
        cause = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), error)
        kept = [f"the checkpoint {other} is intact" for other in checkpoints_in(folder).values()]
        left = ["there is no earlier checkpoint", *kept][-1]
        raise UserError(f"cannot save the checkpoint {path}: {reason(cause)}; {left}") from error
    return path


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest state in ``folder`` that is as it was written, on the CPU, or None where there is no checkpoint.

    A damaged checkpoint is reported, and the one before it used; if all are damaged it raises UserError.
    """
    problems = []
    for step, path in reversed(checkpoints_in(folder).items()):
        try:
            return _read(path, step)
        except Exception as error:  # Damaged archives make zipfile and torch raise errors of many classes.
            problems.append(f"checkpoint {path} is damaged and left out: {reason(error)}")
            print(problems[-1], file=sys.stderr)
    if problems:
        raise UserError(f"{'; '.join(problems)}: put one back from a copy, or delete {folder} to begin anew")
    return None


def _read(path: Path, step: int) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise UserError("it is compressed, which torch.save never does")
        broken = archive.testzip()
    if broken is not None:
        raise UserError(f"the checksum of {broken} is another")
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, dict) or type(state.get("step")) is not int or state["step"] != step:
        raise UserError(f"it does not hold the state of step {step}")
    return state


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """The checkpoints in ``folder``, whole or damaged, by their steps in ascending order."""
    matches = [(NAME.fullmatch(path.name), path) for path in folder.glob("step_*.pt")]
    return dict(sorted((int(match[1]), path) for match, path in matches if match))
