"""Disks that fail and processes that die, at every call that writing makes."""

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoint_cases import bits, read, same_checkpoints, small_state
from faulty_disk import Died, Disk
from fuzzing import CASES
from run_records import read_records
from test_resume import TINY

from drifting.config.reading import load_config
from drifting.errors import UserError
from drifting.hub.run_directory import RunDirectory
from drifting.models.network_files import write_model
from drifting.train import train
from drifting.training.checkpoint import load_checkpoint, save_checkpoint
from drifting.training.metrics import MetricsLog
from drifting.utils.files import atomic_write

ERRORS = (errno.ENOSPC, errno.EIO)  # at even calls and at odd ones
FAULTS = ("fails", "killed")
BEFORE = {"the first": [], "the second": [1], "a third": [0, 1], "again": [1, 2]}  # steps that are saved already


def steps_of(folder):
    return sorted(path.name for path in folder.iterdir())


def error_of(fault, fail_at):
    return ERRORS[fail_at % 2] if fault == "fails" else None


def save_with(folder, state, fail_at=0, error=None):
    """Save on a faulty disk; the calls made, and the message of the refusal or None."""
    disk = Disk(folder, fail_at, error)
    try:
        with disk.active():
            save_checkpoint(folder, state)
    except UserError as refusal:
        return disk.log, str(refusal)
    except Died:
        return disk.log, None
    return disk.log, None


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_save_leaves_the_state_before_it_or_its_own(tmp_path, before, fault):
    good = tmp_path / "good"
    good.mkdir()
    for step in BEFORE[before]:
        save_checkpoint(good, small_state(step))
    shutil.copytree(good, tmp_path / "counted")
    count = len(save_with(tmp_path / "counted", small_state(2))[0])
    assert count >= 7
    expected = [bits(small_state(step)) for step in [*BEFORE[before][-1:], 2]]
    for fail_at in range(1, count + 1):
        folder = tmp_path / str(fail_at)
        shutil.copytree(good, folder)
        log, message = save_with(folder, small_state(2), fail_at, error_of(fault, fail_at))
        for path in folder.glob("step_*"):  # none is there in part
            read(path)
        loaded = load_checkpoint(folder)
        assert (bits(loaded) in expected) if loaded else not BEFORE[before], log
        if message is not None:
            check_message(message, folder, error_of(fault, fail_at), loaded)
        elif fault != "killed":  # it did not matter: the folder was there, or the file to be deleted was not
            assert log[fail_at - 1][0] in ("mkdir", "unlink") and steps_of(folder) == steps_of(tmp_path / "counted")
            assert bits(loaded) == bits(small_state(2))
        save_checkpoint(folder, small_state(2))  # nothing is left that would be in its way
        assert bits(load_checkpoint(folder)) == bits(small_state(2))
        assert steps_of(folder) == steps_of(tmp_path / "counted")
        shutil.rmtree(folder)


def check_message(message, folder, error, loaded):
    """One line, with the file, the reason, and the checkpoint that is there."""
    assert "\n" not in message and os.strerror(error) in message
    assert re.search(re.escape(f"cannot save the checkpoint {folder}/step_00000002.pt: "), message), message
    if loaded is None:
        assert message.endswith("there is no earlier checkpoint")
    else:
        assert re.search(rf"the checkpoint {folder}/step_0000000{loaded['step']}.pt is intact", message)


def test_what_is_saved_is_on_the_disk_before_it_has_its_name(tmp_path):
    log, _ = save_with(tmp_path, small_state(2))
    part, final = str(tmp_path / ".step_00000002.pt.part"), str(tmp_path / "step_00000002.pt")
    renamed = log.index(("replace", part))
    calls = [call for call, of in log[:renamed] if of == part]
    assert "fsync" in calls[len(calls) - calls[::-1].index("write") :]
    assert ("fsync", str(tmp_path)) in log[renamed:]
    assert not any(path == final for call, path in log[:renamed])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_is_the_old_one_or_the_new_one(tmp_path, fault):
    for fail_at in range(1, 100):
        path = tmp_path / str(fail_at) / "config.yaml"
        path.parent.mkdir()
        path.write_text("old")
        disk = Disk(tmp_path, fail_at, error_of(fault, fail_at))
        refusal = None
        try:
            with disk.active(), atomic_write(path) as part:
                part.write_text("new")
        except (UserError, Died) as error:
            refusal = error
        assert path.read_text() in ("old", "new")
        if fault == "fails":
            assert [p.name for p in path.parent.iterdir()] == ["config.yaml"]
        if len(disk.log) < fail_at:
            assert refusal is None and path.read_text() == "new"
            break
        if isinstance(refusal, UserError):
            assert str(refusal) == f"cannot write {path}: {os.strerror(error_of(fault, fail_at))}"
    assert 5 < fail_at < 99


def test_errors_that_are_not_of_the_disk_stay_what_they_are(tmp_path):
    with pytest.raises(KeyError), atomic_write(tmp_path / "x") as part:
        part.write_text("half")
        raise KeyError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_survives_any_call(tmp_path, fault):
    """Whatever fails while a run trains is told by its name, and the same command then ends with the same weights.

    What TensorBoard writes is not among it.
    """
    config = load_config("digits", [*TINY, "train.save_every=2", "train.steps=4"])
    disk = Disk(tmp_path / "whole")
    with disk.active():
        train(config, tmp_path / "whole")
    first = {}  # call of each kind: of that name, on a file of that name
    for number, (call, path) in enumerate(disk.log, 1):
        first.setdefault((call, Path(path).name), number)
    numbers = list(first.values())
    assert len(numbers) > 40
    for fail_at in numbers if len(numbers) <= CASES // 10 else numbers[4 :: len(numbers) // 4]:
        out = tmp_path / str(fail_at)
        disk = Disk(out, fail_at, error_of(fault, fail_at))
        try:
            with disk.active():
                train(config, out)
        except (UserError, OSError) as refusal:
            assert os.strerror(error_of(fault, fail_at)) in str(refusal) and str(out) in str(refusal)
        except Died:
            assert fault == "killed"
        train(config, out)
        assert read_records(out) == read_records(tmp_path / "whole")
        for file in ("model.safetensors", "model.json"):
            assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), disk.log[fail_at - 1]
        assert same_checkpoints(*(tmp_path / name / "checkpoints" / "step_00000004.pt" for name in (out.name, "whole")))
        shutil.rmtree(out)


# ------------------------------------------------------------------------------------------------------ real limits


@contextmanager
def largest_file(size):
    """Writing beyond ``size`` bytes of a file fails with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_weights_that_do_not_fit(tmp_path):
    from test_fuzz_files import tiny_generator

    run = RunDirectory(tmp_path)
    write_model(run.path, tiny_generator(), {"step": 1})
    before = run.weights.read_bytes()
    with largest_file(1000), pytest.raises(UserError, match="cannot write .*model.safetensors: .*File too large"):
        write_model(run.path, tiny_generator(), {"step": 2})
    assert run.weights.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def test_records_that_do_not_fit(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(60)))
    log = MetricsLog(tmp_path / "metrics.jsonl", 59)
    with largest_file(1000), pytest.raises(OSError, match="File too large: '.*metrics.jsonl'"):
        for step in range(60, 100):
            log.write({"step": step})
    log.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert len(before) == 1000 and not before.endswith(b"\n")
    log = MetricsLog(tmp_path / "metrics.jsonl", 20)
    log.write({"step": 21})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    assert lines[:-1] == before.splitlines()[:21] and lines[-1] == b'{"step": 21}'


@pytest.mark.parametrize("size", [1000, 70_000, 1_060_000])
def test_checkpoints_that_do_not_fit(tmp_path, size):
    """In the middle of a tensor, of which torch.save makes another error, and at the end."""
    state = {"step": 1, "a": torch.zeros(100), "big": torch.zeros(250_000), "c": torch.zeros(20_000)}
    save_checkpoint(tmp_path, state)
    match = r"cannot save .*/step_00000002.pt: File too large; .*step_00000001.pt is intact"
    with largest_file(size), pytest.raises(UserError, match=match):
        save_checkpoint(tmp_path, state | {"step": 2})
    assert steps_of(tmp_path) == ["step_00000001.pt"]


def test_the_command_says_in_one_line_that_the_disk_is_full(tmp_path):
    out = tmp_path / "run"
    train(load_config("digits", [*TINY, "train.steps=3"]), out)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
    code = f"{limit}; from drifting.cli import run_command; from drifting.train import main; run_command(main)"
    command = [sys.executable, "-c", code, "--out", out, *TINY]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    *_, line = result.stderr.splitlines()
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert line == (
        f"error: cannot save the checkpoint {out}/checkpoints/step_00000006.pt: File too large; "
        f"the checkpoint {out}/checkpoints/step_00000003.pt is intact"
    )
    assert steps_of(out / "checkpoints") == ["step_00000003.pt"]
