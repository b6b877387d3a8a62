"""Write files whole or not at all, also in a crash or on a full disk, and read JSON from files of any content."""

import errno
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from ..errors import UserError, explained, reason, shown

LOCK = ".lock"  # A folder that one process works in at a time has a file of this name.
LOCK_SECONDS = 6  # Data-loader workers of a killed process may hold its lock for the five that they take to notice.
MOST_JSON = 2**28  # This many bytes: the index of ImageNet's latents has about 10 MB.


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; what the block wrote there is synced to disk, then moved to ``path``. The
    folder is made if it is not there. Where anything fails, ``path`` stays as it was before."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:  # Python does not say which file it could not write to.
        raise UserError(f"cannot write {path}: {reason(error)}") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, busy: str, instead: str) -> Iterator[None]:
    """Keep other processes from locking ``folder``; the lock is gone with the process, however that ends.

    It raises UserError where another process has it: the folder ``busy``, and what to do ``instead``.
    """
    path = folder / LOCK
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=LOCK_SECONDS)
            words = f"process {os.getpid()} on {platform.node()}, since {datetime.now():%F %T}\n"
            path.write_text(words, encoding="utf-8")
        except Timeout as error:
            holder = shown(path.read_text(errors="replace", encoding="utf-8")) or "just started"
            raise UserError(f"{folder} {busy} ({holder}): wait for it, or {instead}") from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise UserError(f"cannot write {path}: {reason(error)}") from error
            print(f"{folder} is on a file system without locks: start only one process there", file=sys.stderr)
        yield
    finally:
        lock.release()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in the file ``path``; it raises UserError for a file that is anything else."""
    if path.stat().st_size > MOST_JSON or not path.is_file():
        raise UserError(f"it is no regular file of at most {MOST_JSON} bytes")
    text = path.read_bytes()
    with explained("it is no JSON"):
        content = json.loads(text, parse_constant=_refuse_constant)
    if not isinstance(content, dict):
        raise UserError(f"it holds a {type(content).__name__}, expected an object")
    return content


def _refuse_constant(name: str) -> None:
    raise UserError(f"it has {name}, which is no number there")


def write_object(path: Path, content: dict[str, Any], indent: int | None = 2) -> None:
    """Write a JSON object as :func:`atomic_write` does; values that JSON has no form for become text."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=indent, default=str) + "\n", encoding="utf-8")


def is_count(value: Any, least: int = 0) -> bool:
    """Tell whether a value of JSON is an integer of at least ``least``; true and false are none."""
    return type(value) is int and value >= least
