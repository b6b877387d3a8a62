"""Checkpoints: folders ``step_00001000`` and so on, which all ranks write and read together.

A state is a nested dictionary. Its tensors are in files of torch.distributed.checkpoint, sharded as the ranks have
them; the rest is in ``checkpoint.json``, with the size and SHA-256 of every file. That is written last, and the folder
gets its name when all is on disk: one of that name is complete.
"""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError, reason
from ..utils.files import sync
from .checkpoint_index import (
    DamagedCheckpoint,
    check_files,
    check_tensors,
    describe_files,
    describe_tensors,
    describe_values,
    filled,
    flat,
    read_index,
    read_values,
    tensors_of,
    values_of,
    write_index,
)
from .checkpoint_storage import read_tensors, write_tensors
from .distributed import Ranks

T = TypeVar("T")
ALONE = Ranks()
NAME = re.compile(r"step_(\d{8,})(\.old)?")


def save_checkpoint(folder: Path, state: dict[str, Any], ranks: Ranks = ALONE, keep: int = 2) -> Path:
    """Write ``state`` into ``folder``, and delete all but the newest ``keep`` there; every rank calls this.

    Args:
        state: nested dictionaries with text as keys, of tensors (the same on all ranks, or DTensors of which each has
            its part) and of numbers, text, booleans, None and lists of these (those of rank 0 count). Its ``step``
            names the checkpoint, which replaces one of that step.

    Raises:
        UserError: it cannot be written, on whichever rank; the checkpoints before it stay.
    """
    leaves = flat(state)
    values = describe_values(values_of(leaves))
    path = folder / f"step_{state['step']:08d}"
    part = folder / f".{path.name}.part"
    try:
        _on_main(ranks, lambda: _make_room(part))
        tensors = describe_tensors(write_tensors(part, tensors_of(leaves), ranks))
        of_ranks = ranks.on_all(lambda: describe_files(_files_of(part, ranks.rank)))
        files = {name: entry for described in of_ranks for name, entry in described.items()}
        _on_main(ranks, lambda: write_index(part, files, tensors, values))
        _on_main(ranks, lambda: _put_in_place(part, path, keep))
    except (OSError, UserError) as error:
        raise UserError(f"{_not_written(path, error)}; {_what_is_left(folder)}") from error
    finally:
        if ranks.main:
            shutil.rmtree(part, ignore_errors=True)
    return path


def load_checkpoint(folder: Path, state: dict[str, Any], ranks: Ranks = ALONE) -> dict[str, Any] | None:
    """The newest state in ``folder`` that is as it was written, or None where there is none; every rank calls this.

    A damaged checkpoint is reported, and the one before it used.

    Args:
        state: that of a fresh trainer with the same arguments, at this number of ranks or another. Its tensors are
            overwritten, and are those of the result.

    Raises:
        ValueError: there are checkpoints but none is undamaged, or the newest of these is of another trainer.
    """
    paths = _on_main(ranks, lambda: checkpoints_in(folder))
    problems = []
    for path in reversed(paths):
        try:
            return _load(path, state, ranks)
        except DamagedCheckpoint as error:
            problems.append(f"checkpoint {path} is damaged and left out: {error}")
            if ranks.main:
                print(problems[-1], file=sys.stderr)
    if problems:
        raise ValueError(f"{'; '.join(problems)}: put one back from a copy, or delete {folder} to begin anew")
    return None


def _load(path: Path, state: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    content = _on_main(ranks, lambda: read_index(path, _step(path)))
    shared = list(content["files"].items())[ranks.share(len(content["files"]))]
    ranks.on_all(lambda: check_files(path, dict(shared)))
    leaves = flat(state)
    tensors = tensors_of(leaves)

    def check() -> dict[str, Any]:
        check_tensors(content, tensors)
        return read_values(content, values_of(leaves))

    try:
        values = ranks.on_all(check)[ranks.rank]
    except ValueError as error:
        raise ValueError(f"checkpoint {path} is of another trainer than this: {error}") from error
    read_tensors(path, content["tensors"], tensors, ranks)
    return filled(state, values | tensors)


def _on_main(ranks: Ranks, action: Callable[[], T]) -> T:
    """What ``action`` gives on rank 0, the only one to call it, on all; so its errors."""
    return ranks.on_all(lambda: action() if ranks.main else None)[0]  # type: ignore[return-value]


# --------------------------------------------------------------------------------------------------------- folders


def checkpoints_in(folder: Path) -> list[Path]:
    """Those in ``folder``, oldest step first; ``.old`` is one that was being replaced, and comes before its step's."""
    found = [path for path in folder.glob("step_*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: (_step(path), path.suffix != ".old"))


def _step(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    assert match
    return int(match[1])


def _make_room(part: Path) -> None:
    """An empty folder ``part``; what interrupted saves left there goes."""
    if not part.parent.is_dir():
        part.parent.mkdir(parents=True)
        sync(part.parent.parent)
    for left in part.parent.glob(".step_*.part"):
        shutil.rmtree(left)
    part.mkdir()


def _files_of(part: Path, rank: int) -> list[Path]:
    """The files that this rank wrote; rank 0 also wrote the one of all."""
    return sorted(part.glob(f"__{rank}_*")) + ([part / ".metadata"] if rank == 0 else [])


def _put_in_place(part: Path, path: Path, keep: int) -> None:
    """Give ``part`` its name, then delete old checkpoints. At every moment, one whole folder has a name."""
    old = path.with_name(f"{path.name}.old")
    if path.exists():
        if old.exists():
            _delete(old)
        path.rename(old)
    part.rename(path)
    sync(path.parent)
    earlier = [other for other in checkpoints_in(path.parent) if _step(other) < _step(path)]  # later ones are damaged
    for other in [old] * old.exists() + earlier[: max(0, len(earlier) + 1 - keep)]:
        _delete(other)


def _delete(path: Path) -> None:
    """Take the folder its name before its files, so that it is never there in part."""
    part = path.with_name(f".{path.name}.part")
    path.rename(part)
    shutil.rmtree(part)


# --------------------------------------------------------------------------------------------------------- messages


def _not_written(path: Path, error: Exception) -> str:
    cause = error if isinstance(error, UserError) else f"{getattr(error, 'filename', None) or path}: {reason(error)}"
    return f"cannot save the checkpoint {path.name}: {cause}"


def _what_is_left(folder: Path) -> str:
    paths = checkpoints_in(folder)
    return f"the checkpoint {paths[-1]} is intact" if paths else "there is no earlier checkpoint"
