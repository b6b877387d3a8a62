"""The CUDA kernels as nvcc builds them: registers and spills within tests/cuda_budgets.json, and a module that loads
without a GPU. (Shared memory is all dynamic: the emulated device of test_cuda_emulated.py has as little as sm_80.)

``python tests/test_cuda_build.py`` prints what the kernels need now, to be written to the budgets.
"""

import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import drift_ops
from drift_ops import cuda

ROOT = Path(__file__).parents[1]
BUDGETS = ROOT / "tests/cuda_budgets.json"
NVCC = shutil.which("nvcc")
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-c", "-o", "/dev/null"]

Resources = dict[str, dict[str, dict[str, int]]]  # target, kernel, resource


def kernel_name(mangled: str) -> str:
    """``weighted_sums<f>`` of ``_ZN5drift4cuda…13weighted_sumsIfEE…``."""
    rest, name = mangled.removeprefix("_ZN"), ""
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        name, rest = rest[length.end() : end], rest[end:]
    arguments = re.match(r"I(?:([fd])(?:Lb([01])E)?|Li(\d+)E)E", rest)
    return f"{name}<{', '.join(filter(None, arguments.groups()))}>" if arguments else name


def resources() -> Resources:
    """What ptxas says every kernel needs on sm_80 and sm_90."""

    def compile_source(source: Path) -> str:
        targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90)]
        done = subprocess.run([NVCC, *FLAGS, *targets, source], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    with ThreadPoolExecutor(2) as pool:
        logs = "".join(pool.map(compile_source, sorted(ROOT.glob("csrc/cuda/*.cu"))))
    entry = (
        r"entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) reg"
    )
    found: Resources = {"sm_80": {}, "sm_90": {}}
    for mangled, target, stores, loads, registers in re.findall(entry, logs, re.DOTALL):
        found[target][kernel_name(mangled)] = {"registers": int(registers), "spilled bytes": int(stores) + int(loads)}
    return found


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
def test_budgets():
    budgets, needed = json.loads(BUDGETS.read_text()), resources()
    for target, kernels in needed.items():
        assert kernels.keys() == budgets[target].keys(), (
            f"{target}: kernels without a budget, or budgets without a kernel"
        )
        for kernel, needs in kernels.items():
            for resource, amount in needs.items():
                allowed = budgets[target][kernel][resource]
                assert amount <= allowed, f"{kernel} on {target}: {amount} {resource}, allowed {allowed}"


@pytest.mark.skipif(cuda.load_error is not None, reason=f"drift_ops._cuda was not built: {cuda.load_error}")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_loads_without_a_gpu():
    status = drift_ops.backends()["cuda"]
    assert not status.usable and status.reason == "no CUDA device"
    with pytest.raises(ValueError, match="'cuda' cannot be used here: no CUDA device"):
        drift_ops.drift_field(torch.ones(2, 3), torch.ones(2, 3), temperature=1.0, backend="cuda")


@pytest.mark.skipif(cuda.load_error is not None, reason=f"drift_ops._cuda was not built: {cuda.load_error}")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_errors_reach_python():
    with pytest.raises(RuntimeError, match="drift_ops._cuda: cudaGetDevice: "):
        cuda.affinity_sums(*[torch.ones(1, 2, 3)] * 3, None, "laplace", [1.0], 1.0, 0, False, 0.0)


if __name__ == "__main__":
    json.dump(resources(), sys.stdout, indent=2)
