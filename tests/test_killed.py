"""Runs that are killed at any moment and started again, and two processes on one run directory.

DRIFT_KILLS says how often a run is killed; the moments follow from the test's seed, up to what the machine does.
"""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from checkpoint_cases import same_checkpoints
from run_records import read_records
from test_resume import TINY

from drifting.config.reading import load_config
from drifting.errors import UserError
from drifting.hub.run_directory import RunDirectory
from drifting.train import train
from drifting.utils import files

KILLS = int(os.environ.get("DRIFT_KILLS", "3"))
STEPS = 20 * KILLS  # more than they take between two kills
SETTINGS = [*TINY, f"train.steps={STEPS}", "train.save_every=2", "train.eval_every=10", "data.workers=1"]
STARTING = 0.2  # share of the kills that come before the first step


def start(out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "drifting.train", "--out", str(out), *SETTINGS]
    log = out.with_suffix(".log").open("a")
    return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def steps_taken(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def wait_until(process: subprocess.Popen, holds) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended, or takes no steps"
        time.sleep(0.002)


def kill_somewhere(process: subprocess.Popen, out: Path, chance: random.Random) -> None:
    """While it starts, or some steps later and in the middle of one, of a save or of an evaluation."""
    before = steps_taken(out)
    if chance.random() < STARTING:
        wait_until(process, lambda: (out / ".lock").is_file() and str(process.pid) in (out / ".lock").read_text())
        time.sleep(chance.uniform(0, 1))
    else:
        steps = chance.randint(1, 8)
        wait_until(process, lambda: steps_taken(out) >= before + steps)
        time.sleep(chance.uniform(0, 0.1))
    process.kill()
    assert process.wait() == -signal.SIGKILL


def files_of(out: Path) -> dict[str, bytes]:
    """What the run left, without what tells the time, and the checkpoints."""
    files = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    varying = ("events", ".lock", "checkpoints", "metrics.jsonl")
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(varying)}


def test_a_run_that_is_killed_ends_as_one_that_is_not(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = start(whole)
    chance = random.Random(0)
    for _ in range(KILLS):
        kill_somewhere(start(out), out, chance)
    assert start(out).wait(600) == 0, out.with_suffix(".log").read_text()
    assert uninterrupted.wait(600) == 0, whole.with_suffix(".log").read_text()
    assert "damaged" not in out.with_suffix(".log").read_text()
    assert read_records(out) == read_records(whole)
    for name, content in files_of(whole).items():
        assert files_of(out)[name] == content, name
    assert files_of(out).keys() == files_of(whole).keys()
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (whole, out)]
    assert names[0] == names[1] == [f"step_{step:08d}.pt" for step in (STEPS - 2, STEPS)]
    for name in names[0]:
        assert same_checkpoints(whole / "checkpoints" / name, out / "checkpoints" / name)


HOLDER = """
import os, sys, time
from pathlib import Path
from drifting.hub.run_directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).lock():
    worker = os.fork()
    if worker == 0:
        time.sleep(600)
        os._exit(0)
    print(worker, flush=True)
    sys.stdin.read()
os.kill(worker, 9)
"""


@contextmanager
def holder(folder: Path):
    """Another process that has the lock, and its forked worker, which outlives it."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    worker = int(process.stdout.readline())
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        os.kill(worker, signal.SIGKILL)


def test_two_processes_on_one_run(tmp_path, monkeypatch):
    """The second refuses and changes nothing; where the first is killed, it may go on at once."""
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    with holder(tmp_path) as process:
        message = rf"is being trained by another process \(process {process.pid} on .*, since 20.*\): wait for it, or"
        with pytest.raises(UserError, match=message):
            train(load_config("digits", TINY), tmp_path)
        assert not (tmp_path / "metrics.jsonl").exists() and not (tmp_path / "checkpoints").exists()
        process.kill()
        process.wait()
        with RunDirectory(tmp_path).lock(), pytest.raises(UserError, match="another process .*wait for it, or choose"):
            with RunDirectory(tmp_path).lock():
                pass
    with RunDirectory(tmp_path).lock():
        pass


def test_a_folder_that_cannot_be_locked(tmp_path, monkeypatch, capsys):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match="cannot write .*.lock: Is a directory"), RunDirectory(tmp_path).lock():
        pass

    def no_locks(self, *_, **__):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(files.FileLock, "acquire", no_locks)
    with RunDirectory(tmp_path).lock():
        assert "on a file system without locks" in capsys.readouterr().err
