"""The CUDA kernels as nvcc builds them: registers and spills within tests/cuda_budgets.json, and a module that loads
without a GPU. (Shared memory is all dynamic: test_cuda_emulated.py has devices with as little as sm_80 and sm_86.)

``make test`` compiles for sm_90, ``make test-kernels`` for all. ``python tests/test_cuda_build.py`` prints what kernels
need now, to be written to the budgets.
"""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest
import torch
from cases import EVERY_KERNEL, load_library

import drift_ops
from drift_ops import cuda
from drift_ops.backends import _WHY_NOT
from drift_ops.spec import AffinitySpec

ROOT = Path(__file__).parents[1]
BUDGETS = ROOT / "tests/cuda_budgets.json"
NVCC = shutil.which("nvcc")
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"]
FLAGS += [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]


def every_target() -> tuple[int, ...]:
    """Of the oldest GPUs that are served, of those whose blocks have the least shared memory (8.6, 8.9, 12.0), and of
    Hopper: what nvcc knows."""
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return tuple(n for n in (80, 86, 89, 90, 120) if f"sm_{n}" in known)


TARGETS = every_target() if NVCC and EVERY_KERNEL else (90,)

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")

Resources = dict[str, dict[str, dict[str, int]]]  # target, kernel, resource


def kernel_name(mangled: str) -> str:
    """``find_flows<f, 4>`` of ``_ZN5drift4cuda…10find_flowsIfLi4EEE…``."""
    rest, name = mangled.removeprefix("_ZN"), ""
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        name, rest = rest[length.end() : end], rest[end:]
    arguments = re.match(r"I((?:[fd]|L[bi]\d+E)+)E", rest)
    return f"{name}<{', '.join(re.findall('[fd]|[0-9]+', arguments[1]))}>" if arguments else name


def build(folder: Path, targets: tuple[int, ...] = TARGETS) -> tuple[Path, str]:
    """The module, and what ptxas says about its kernels."""
    codes = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in targets]

    def compile_source(source: Path) -> tuple[Path, str]:
        target = folder / f"{source.name}.o"
        done = subprocess.run([NVCC, *FLAGS, *codes, "-c", source, "-o", target], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target, done.stderr

    sources = [*ROOT.glob("csrc/cuda/*.cu"), ROOT / "csrc/cuda/module.cpp"]
    with ThreadPoolExecutor(2) as pool:
        objects, logs = zip(*pool.map(compile_source, sources), strict=True)
    subprocess.run([NVCC, "-shared", "-cudart", "static", *objects, "-o", folder / "_cuda.so"], check=True)
    return folder / "_cuda.so", "".join(logs)


def resources(logs: str) -> Resources:
    """What every kernel needs on each target."""
    entry = (
        r"entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) reg"
    )
    found: Resources = {}
    for mangled, target, stores, loads, registers in re.findall(entry, logs, re.DOTALL):
        found.setdefault(target, {})[kernel_name(mangled)] = {
            "registers": int(registers),
            "spilled bytes": int(stores) + int(loads),
        }
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, str]:
    return build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def module(built, monkeypatch):
    """Has drift_ops use what was built, whether or not its installation left the CUDA kernels out."""
    monkeypatch.setattr(cuda, "_cuda", load_library(built[0]))
    monkeypatch.setitem(_WHY_NOT, "cuda", cuda.why_not)  # Another test may have asked before.


def test_budgets(built):
    budgets, needed = json.loads(BUDGETS.read_text()), resources(built[1])
    assert needed.keys() == {f"sm_{n}" for n in TARGETS}
    for target, kernels in needed.items():
        assert kernels.keys() == budgets[target].keys(), (
            f"{target}: kernels without a budget, or budgets without a kernel"
        )
        for kernel, needs in kernels.items():
            for resource, amount in needs.items():
                allowed = budgets[target][kernel][resource]
                assert amount <= allowed, f"{kernel} on {target}: {amount} {resource}, allowed {allowed}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_loads_without_a_gpu(module):
    status = drift_ops.backends()["cuda"]
    assert not status.usable and status.reason == "no CUDA device"
    with pytest.raises(ValueError, match="'cuda' cannot be used here: no CUDA device"):
        drift_ops.drift_field(torch.ones(2, 3), torch.ones(2, 3), temperature=1.0, backend="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_errors_reach_python(module):
    with pytest.raises(RuntimeError, match="drift_ops._cuda: cudaGetDevice: "):
        cuda.affinity_sums(AffinitySpec("laplace", (1.0,)), torch.ones(1, 2, 3), [torch.ones(1, 2, 3)], None, None)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        json.dump(resources(build(Path(folder), every_target())[1]), sys.stdout, indent=2)
