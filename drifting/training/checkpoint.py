"""Checkpoints: files ``step_00001000.pt`` and so on, written whole or not at all, and checked before they are used.

A checkpoint is what ``torch.save`` makes of a trainer's state: nested dictionaries of tensors, numbers, text and lists.
It is read with ``weights_only``, so that nothing in it runs. The file is an archive that has a checksum of every tensor
and of the rest; the folder lists it only once it is on disk.
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


class DamagedCheckpoint(ValueError):
    """The file is not what was written."""


def save_checkpoint(folder: Path, state: dict[str, Any], keep: int = 2) -> Path:
    """Write ``state`` into ``folder``, and delete all but the newest ``keep`` checkpoints there.

    Args:
        folder: the folder, which is made if need be.
        state: nested dictionaries of tensors, numbers, text, booleans, None and lists. Its ``step`` names the file, and
            a checkpoint of that step is replaced.
        keep: how many checkpoints are kept, this one included.

    Raises:
        UserError: the checkpoint cannot be written; those before it stay.
    """
    path = folder / f"step_{state['step']:08d}.pt"
    try:
        for half in folder.glob(".step_*.part"):  # A killed process left it.
            half.unlink()
        with atomic_write(path) as part, part.open("wb") as file:
            torch.save(state, file)
        for old in [other for other in checkpoints_in(folder) if step_of(other) <= state["step"]][:-keep]:
            old.unlink(missing_ok=True)  # Later ones are damaged, and are replaced when their step comes again.
    except (OSError, RuntimeError, UserError) as error:
        # What the system refused may be hidden behind an error of PyTorch's writer or of ours.
        causes = (error, error.__cause__, error.__context__)
        cause = next((cause for cause in causes if isinstance(cause, OSError)), error)
        kept = checkpoints_in(folder)
        left = f"the checkpoint {kept[-1]} is intact" if kept else "there is no earlier checkpoint"
        raise UserError(f"cannot save the checkpoint {path}: {reason(cause)}; {left}") from error
    return path


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest state in ``folder`` that is as it was written, on the CPU, or None where there is no checkpoint.

    A damaged checkpoint is reported, and the one before it used.

    Raises:
        UserError: there are checkpoints, and none is undamaged.
    """
    problems = []
    for path in reversed(checkpoints_in(folder)):
        try:
            return _read(path)
        except DamagedCheckpoint as error:
            problems.append(f"checkpoint {path} is damaged and left out: {error}")
            print(problems[-1], file=sys.stderr)
    if problems:
        raise UserError(f"{'; '.join(problems)}: put one back from a copy, or delete {folder} to begin anew")
    return None


def _read(path: Path) -> dict[str, Any]:
    """The state in ``path``, of which every checksum is right."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise DamagedCheckpoint("it is compressed, which torch.save never does")
            broken = archive.testzip()
        if broken is not None:
            raise DamagedCheckpoint(f"the checksum of {broken} is another")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except DamagedCheckpoint:
        raise
    except Exception as error:  # Damaged archives make zipfile and torch raise errors of many classes.
        raise DamagedCheckpoint(reason(error)) from error
    if not isinstance(state, dict) or type(state.get("step")) is not int or state["step"] != step_of(path):
        raise DamagedCheckpoint(f"it does not hold the state of step {step_of(path)}")
    return state


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, whole or damaged, oldest step first."""
    return sorted((path for path in folder.glob("step_*.pt") if NAME.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step that the name of a checkpoint tells."""
    match = NAME.fullmatch(path.name)
    assert match
    return int(match[1])
