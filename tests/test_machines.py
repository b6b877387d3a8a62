"""Machines that lack something: streams, an encoding, a compiler, a library that can be imported."""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import drift_ops
from drifting import evaluate, train
from drifting.cli import run_command
from drifting.errors import UserError, require, some_of
from drifting.experiments import policy
from drifting.models import drifting_loss
from drifting.train import tell_operator
from drifting.training import create_trainer
from drifting.training.metrics import MetricsLog
from drifting.utils.progress import progress

ROOT = Path(__file__).parents[1]
SMALL = [
    "model=residual_mlp", "loss.feature_extractor=input", "step.gen_per_label=4", "train.steps=1",
    "evaluation.num_samples=256",
]  # fmt: skip
FULL = Path("/dev/full")


def run(command: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess:
    """What the shell does with ``command``, in which PYTHON stands for this one."""
    command = command.replace("PYTHON", f"'{sys.executable}'")
    environ = os.environ | {"PYTHONPATH": str(ROOT)} | environ
    return subprocess.run(["sh", "-c", command], cwd=cwd, env=environ, capture_output=True, timeout=300)


def ended(command) -> int:
    with pytest.raises(SystemExit) as caught:
        run_command(command)
    return caught.value.code


def test_a_machine_without_kernels_is_told_of_it(monkeypatch, capsys, tmp_path):
    tell_operator(torch.device("cpu"))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(drift_ops, "backends", lambda: {"cpu": drift_ops.Backend("cpu", False, "no compiler")})
    tell_operator(torch.device("cpu"))
    assert capsys.readouterr().err.endswith("computes the drifting field (cpu: no compiler)\n")
    shutil.copytree(ROOT / "drift_ops", tmp_path / "drift_ops", ignore=shutil.ignore_patterns("*.so"))
    elsewhere = 'sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f)]'  # knows of ours
    command = f"PYTHON -c 'import sys; {elsewhere}; import drift_ops; print(drift_ops.backends()[\"cpu\"].reason)'"
    told = run(command, tmp_path, PYTHONPATH=str(tmp_path)).stdout.decode()
    assert told.startswith(f"there are no compiled kernels in {tmp_path / 'drift_ops'}; `pip install -e .` beside it")


# -------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_missed_by_no_command(tmp_path, closed):
    for command, status in (("PYTHON -m drifting", 0), ("PYTHON -m drifting smaple", 2)):
        done = run(f"{command} {closed}", tmp_path)
        assert done.returncode == status
        told = b"" if status == 0 or "2>" in closed else b"error: there is no command 'smaple'"
        assert done.stderr.startswith(told) and done.stderr.count(b"\n") == bool(told)
        assert status == 0 or done.stdout == b""  # Nothing that belongs to stderr goes there.


def test_ctrl_c_while_libraries_are_imported_is_told_in_a_word(tmp_path):
    (tmp_path / "tqdm.py").write_text("raise KeyboardInterrupt")
    done = run("PYTHON -m drifting.sample", tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"interrupted\n")


def test_names_from_files_are_words():
    names = ["\x1b[31mred\x1b[2J", "b\nerror: fake", "c" * 1000, 4]
    assert some_of(names) == f"red[2J, berror: fake, {'c' * 60}…, 4"


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
def test_a_full_disk_behind_a_stream_is_told_in_a_line(tmp_path):
    done = run("PYTHON -m drifting >/dev/full", tmp_path)
    assert (done.returncode, done.stderr) == (2, b"error: the system: No space left on device\n")
    assert run("PYTHON -m drifting smaple 2>/dev/full", tmp_path).returncode == 2


def test_a_reader_that_has_seen_enough_ends_the_command_silently():
    command = [sys.executable, "-u", "-m", "drifting.doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout.readline() == b"versions\n"
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == 141


def test_an_encoding_without_the_letter_gets_escapes(monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True) for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        monkeypatch.setattr(sys, name, stream)

    def fails():
        print("lauf ä")
        raise UserError("λ is wrong")

    assert ended(fails) == 2
    assert [stream.buffer.getvalue() for stream in streams] == [b"lauf \\xe4\n", b"error: \\u03bb is wrong\n"]


def test_a_name_that_is_no_text_is_told_in_a_line(capsys):
    assert ended(lambda: open("lauf \udce4".encode())) == 2
    assert capsys.readouterr().err.startswith("error: 'lauf \\udce4' cannot be written in utf-8: choose another name")


def test_progress_without_stderr(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress(range(3), "items", "item")) == [0, 1, 2]


def test_a_run_without_stderr_into_a_folder_that_stdout_cannot_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", stdout := io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert ended(lambda: train.main(["--out", "lauf ä", *SMALL])) == 0
    assert b"samples: lauf \\xe4/samples" in stdout.buffer.getvalue()
    assert Path("lauf ä/model.safetensors").is_file()


# ------------------------------------------------------------------------------------------------------ libraries


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder that packages are imported from."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("a_broken_one", "a_mere_folder"):
        sys.modules.pop(name, None)


def test_a_broken_library_is_told_with_its_cause(packages):
    (packages / "a_broken_one.py").write_text("raise AttributeError('_ARRAY_API\\nnot found')", encoding="utf-8")
    words = r"train.wandb needs a_broken_one, which is there but cannot be imported \(AttributeError: _ARRAY_API not "
    with pytest.raises(UserError, match=rf"^{words}found\): pip install --force-reinstall a_broken_one$"):
        require("a_broken_one", "train.wandb", "wandb")


@pytest.mark.parametrize("library", ["a_mere_folder", "a_mere_folder.part", "a_missing_one"])
def test_a_folder_of_its_name_is_no_library(packages, library):
    (packages / "a_mere_folder").mkdir()
    with pytest.raises(UserError, match=r"is not installed: pip install 'drifting\[wandb\]'$"):
        require(library, "train.wandb", "wandb")


@pytest.mark.parametrize("cause", [None, SimpleNamespace(resnet18=lambda weights: torch.hub.load_state_dict_from_url)])
def test_resnet18_without_what_it_needs(monkeypatch, cause):
    def offline(weights):
        raise OSError("<urlopen error\nno network>")

    monkeypatch.setitem(sys.modules, "torchvision", cause)
    monkeypatch.setitem(sys.modules, "torchvision.models", cause and SimpleNamespace(resnet18=offline))
    told = (
        "which is not installed" if cause is None else "cannot load its weights .*: OSError: <urlopen error no network>"
    )
    with pytest.raises(UserError, match=f"^feature_extractor='resnet18' .*{told}"):
        drifting_loss.build_extractor("resnet18", 3)


def test_wandb_that_breaks_ends_no_run(tmp_path, monkeypatch, capsys):
    def broken(*arguments, **options):
        raise AttributeError("module 'wandb' has no attribute 'x'")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=broken))
    with pytest.raises(UserError, match="train.wandb: AttributeError: module 'wandb' has no attribute"):
        MetricsLog(tmp_path / "metrics.jsonl", 0, "project")
    wandb_run = SimpleNamespace(log=broken)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: wandb_run))
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, "project")
    for step in (1, 2):
        log.write({"step": step, "loss": 1.0})
    log.close()
    assert len((tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    told = capsys.readouterr().err
    assert told.startswith("train.wandb gets no more records") and told.count("\n") == 1


def test_what_writes_the_pictures_and_events_is_needed_before_a_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="TensorBoard cannot be imported, which pip install"):
        MetricsLog(tmp_path / "metrics.jsonl", 0)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(policy, "create_trainer", None)
    with pytest.raises(UserError, match="^the picture needs matplotlib, which is there but cannot be imported"):
        policy.main(["--out", str(tmp_path), "--steps", "1"])


def test_pictures_whatever_backend_a_notebook_has_set(tmp_path):
    code = "from drifting.utils.figures import new_figure; new_figure().savefig('x.png')"
    assert run(f'PYTHON -c "{code}"', tmp_path, MPLBACKEND="module://not_there").returncode == 0
    assert (tmp_path / "x.png").is_file()


# ------------------------------------------------------------------------------------------------- compiler, files


def test_a_machine_that_cannot_compile_is_told_in_a_line(monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("No working C++ compiler found\nSet TORCHDYNAMO_VERBOSE=1")

    module_compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: module_compile(module, backend=backend))
    trainer = create_trainer(torch.nn.Linear(3, 2), "input", noise_shape=(3,), device="cpu", compile=True)
    with pytest.raises(
        UserError, match=r"^step.compile is true, .*\(.*No working C\+\+ compiler found .*\): install .*=false"
    ):
        trainer.train_step(torch.rand(6, 2))


@pytest.mark.parametrize("name", ["x.npy", "x.csv", "missing.npy"])
def test_a_file_that_is_no_archive_is_not_evaluated(tmp_path, name):
    if not name.startswith("missing"):
        with (tmp_path / name).open("wb") as file:
            np.save(file, np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=rf"{name} is a file, expected a run directory, hf://NAME or .npz: numpy.savez"):
        evaluate.main([str(tmp_path / name)])
