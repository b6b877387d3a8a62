"""``python -m drifting.doctor``: what it prints, and that it sees a backend that computes something else."""

import subprocess
import sys
import time

import pytest
import torch

import drift_ops
from drifting import doctor


@pytest.fixture
def two_backends(monkeypatch):
    """The cpu, where it was built, and the reference: Triton's interpreter would take minutes."""
    usable = {name: status for name, status in drift_ops.backends().items() if name in ("cpu", "reference")}
    away = drift_ops.Backend("cuda", False, "no CUDA device")
    monkeypatch.setattr(drift_ops, "backends", lambda: {"cuda": away} | usable)
    if not usable["cpu"].usable:
        pytest.skip(usable["cpu"].reason)


def test_report(two_backends, capsys):
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "versions" and lines[-1] == "all checks passed"
    assert f"  torch             {torch.__version__}" in lines
    assert "  cuda              not usable: no CUDA device" in lines
    for name in ("cpu", "reference"):
        assert any(line.startswith(f"  {name:<18}usable, agrees with the reference (") for line in lines)


@pytest.mark.parametrize("what", ["output", "gradient"])
def test_a_wrong_backend_is_told(two_backends, capsys, monkeypatch, what):
    from drift_ops import cpu

    name = "affinity_sums" if what == "output" else "affinity_sums_backward"
    right = getattr(cpu, name)

    def slightly_wrong(*arguments):
        first, *rest = right(*arguments)
        return first * 1.01, *rest

    monkeypatch.setattr(cpu, name, slightly_wrong)
    assert doctor.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("  cpu               usable")]
    assert "FAILED: " in line and f"drift_field: {what}" in line
    assert lines[-1] == "FAILED: a usable backend is wrong"


def test_a_backend_that_raises_is_told(two_backends, capsys, monkeypatch):
    from drift_ops import cpu

    def broken(*arguments):
        raise RuntimeError("no kernel image\nand a traceback")

    monkeypatch.setattr(cpu, "loss_at_once", broken)
    assert doctor.main([]) == 1
    assert "FAILED: drift_loss: RuntimeError: no kernel image (" in capsys.readouterr().out


def test_a_slow_backend_is_left_out_in_time(two_backends, capsys, monkeypatch):
    from drift_ops import cpu

    right = cpu.affinity_sums
    monkeypatch.setattr(doctor, "SECONDS", 0.2)
    monkeypatch.setattr(cpu, "affinity_sums", lambda *arguments: (time.sleep(0.15), right(*arguments))[1])
    assert doctor.main([]) == 0
    assert "agrees with the reference, no time for drift_field" in capsys.readouterr().out


def test_without_optional_packages():
    """Nor triton: what is not there is said to be absent."""
    hidden = "torchvision", "huggingface_hub", "diffusers", "torch_fidelity", "transformers", "datasets", "triton"
    command = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden!r}))\n"
        "from drifting.doctor import main; sys.exit(main([]))"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "all checks passed" in done.stdout and done.stderr == ""
