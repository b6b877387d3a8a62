"""A file system that fails, or after which the process is dead, at the n-th call below a folder."""

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

WRITING = set("wax+")
OPEN, FSYNC = io.open, os.fsync


class Died(BaseException):
    """Nothing that the process does after this reaches the disk."""


class Disk:
    """Counts the calls that concern ``folder``: open, write, fsync, rename, replace, mkdir, unlink, rmdir.

    Args:
        fail_at: the call that fails, from 1; none by default.
        error: number of the error that it fails with; None kills the process there. A write fails halfway.

    ``log`` has the name and path of each call.
    """

    def __init__(self, folder: Path, fail_at: int = 0, error: int | None = None) -> None:
        self.folder, self.fail_at, self.error = str(folder), fail_at, error
        self.log: list[tuple[str, str]] = []
        self.dead = False

    def call(self, name: str, path: str, before_failing: Callable[[], Any] = lambda: None) -> None:
        if not path.startswith(self.folder):
            return
        if self.dead:
            raise Died
        self.log.append((name, path))
        if len(self.log) == self.fail_at:
            before_failing()
            if self.error is None:
                self.dead = True
                raise Died
            place = () if name == "write" else (path,)  # The system names the file of all calls but this one.
            raise OSError(self.error, os.strerror(self.error), *place)

    @contextmanager
    def active(self) -> Iterator[None]:
        patches = [patch.object(os, name, self._wrapped(name)) for name in ("open", "mkdir", "unlink", "rmdir")]
        patches += [patch.object(os, name, self._wrapped(name)) for name in ("rename", "replace")]
        patches += [patch.object(module, "open", self._open) for module in (io, builtins)]
        patches += [patch.object(os, "fsync", self._fsync)]
        for one in patches:
            one.start()
        try:
            yield
        finally:
            for one in patches:
                one.stop()

    def _wrapped(self, name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def call(path: Any, *arguments: Any, dir_fd: int | None = None, **keywords: Any) -> Any:
            parent = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
            self.call(name, os.path.join(parent, os.fspath(path)))
            return original(path, *arguments, **(keywords if dir_fd is None else keywords | {"dir_fd": dir_fd}))

        return call

    def _fsync(self, descriptor: int) -> None:
        self.call("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        FSYNC(descriptor)

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **keywords: Any) -> Any:
        below = isinstance(file, (str, os.PathLike)) and os.path.abspath(file).startswith(self.folder)
        if below:
            self.call("open", os.path.abspath(file))
        if not below or not WRITING & set(mode):
            return OPEN(file, mode, buffering, *rest, **keywords)
        raw = FaultyFile(os.fspath(file), mode.replace("b", ""), self)
        if buffering == 0:
            return raw
        buffered = io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *rest, **keywords)


class FaultyFile(io.FileIO):
    def __init__(self, path: str, mode: str, disk: Disk) -> None:
        super().__init__(path, mode)
        self.disk = disk

    def write(self, data: Any) -> int:
        half = memoryview(data).cast("B")[: memoryview(data).nbytes // 2]
        self.disk.call("write", os.path.abspath(self.name), lambda: super(FaultyFile, self).write(half))
        return super().write(data)
