"""``make gpu-check [STAGE=build|test|bench|sanitize|profile]``: builds, tests and measures the GPU backends.

With this Python and its torch and Triton, without a network. Each stage ends within ten minutes, and one that fails
does not keep the others from running; the exit status says whether any did. What a stage prints is kept in
``build/gpu-check/STAGE.log``; what is worth keeping goes to ``benchmarks/results/``.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .machine import ROOT, slug

LOGS = ROOT / "build" / "gpu-check"
RESULTS = ROOT / "benchmarks" / "results"
STAGE_SECONDS = 570  # for all commands of a stage, and for the build if it has to come first
BENCH_MARGIN = 45  # seconds between the bench's own deadline and its stage's: for a trial that runs over

PARAMETRISED = [f"tests/test_{name}.py" for name in ("operator", "gradients", "golden", "library")]
TEST_PROCESSES = 8  # Triton's compiler runs on the CPU, and takes most of the tests' time
NCU_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "Occupancy", "LaunchStats")
LAUNCHES = 60  # at most, that ncu profiles of a backend


class Stage:
    """The commands of one stage, run one after the other until its time is up; what they print is also kept."""

    def __init__(self, name: str, seconds: float = STAGE_SECONDS) -> None:
        self.name, self.deadline = name, time.monotonic() + seconds
        self.failures: list[str] = []
        LOGS.mkdir(parents=True, exist_ok=True)
        self.log = LOGS / f"{name}.log"
        self.log.write_text("")

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def run(self, *command: str, environment: dict[str, str] | None = None) -> bool:
        """Whether the command succeeded. It and all processes it started are stopped when the stage's time is up."""
        label = " ".join(["python" if word == sys.executable else word for word in command]).splitlines()[0]
        print(f"[{self.name}] {label}", flush=True)
        with self.log.open("ab") as log:
            end_before = log.tell()
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | (environment or {}), stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(max(self.seconds_left, 1))
                problem = f"exit status {status}" if status else None
            except subprocess.TimeoutExpired:
                problem = "stopped: the stage's time was up"
            finally:
                _stop_group(process)
        with self.log.open("rb") as log:
            log.seek(end_before)
            print(_last_lines(log.read().decode(errors="replace")), flush=True)
        if problem:
            self.fail(f"{label[:60]}{'…' * (len(label) > 60)}: {problem}")
        return problem is None

    def fail(self, reason: str) -> None:
        print(f"[{self.name}] FAILED: {reason}", flush=True)
        self.failures.append(reason)

    def tool(self, name: str) -> str | None:
        """Path of a program of the CUDA toolkit; its absence is a failure."""
        folders = [os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
        path = shutil.which(name, path=os.pathsep.join(folders))
        if path is None:
            self.fail(f"{name} is not installed")
        return path


def _stop_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _last_lines(text: str, count: int = 80) -> str:
    lines = text.splitlines()
    skipped = [f"… {len(lines) - count} lines before"] if len(lines) > count else []
    return "\n".join(skipped + lines[-count:])


def build(stage: Stage) -> None:
    """The compiled backends, in place; then at least one GPU backend must be usable, and every one that was built."""
    stage.run(sys.executable, "setup.py", "build_ext", "--inplace")
    stage.run(sys.executable, "-c", _SHOW_BACKENDS, *_expected_backends())


_SHOW_BACKENDS = """import sys; import drift_ops  # which backends are usable?
backends = drift_ops.backends()
for name, status in backends.items():
    print(f"{name}: {status.reason or 'usable'}")
sys.exit(", ".join(f"{name} is not usable" for name in sys.argv[1:] if not backends[name].usable))
"""


def _expected_backends() -> list[str]:
    """Triton, and CUDA C++ where nvcc can have built it."""
    has_nvcc = shutil.which("nvcc") or Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc").exists()
    return ["triton", "cuda"] if has_nvcc else ["triton"]


def test(stage: Stage) -> None:
    """The tests that need a GPU, then those of every backend. Without this project's pytest options: the plugin that
    they belong to may be missing."""
    required = {"DRIFT_OPS_REQUIRE": ",".join(_expected_backends()), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    pytest = [sys.executable, "-m", "pytest", "-v", "-o", "addopts=", "-p", "no:cacheprovider"]
    stage.run(*pytest, "tests/test_gpu.py", environment=required)
    parallel = ["-n", str(TEST_PROCESSES)] if importlib.util.find_spec("xdist") else []
    stage.run(*pytest, *parallel, "-k", "triton or cuda", *PARAMETRISED, environment=required)


def bench(stage: Stage) -> None:
    stage.run(sys.executable, "-m", "benchmarks.gpu", "--seconds", str(int(stage.seconds_left - BENCH_MARGIN)))


def sanitize(stage: Stage) -> None:
    """memcheck and racecheck of the CUDA C++ kernels. Every tensor has an allocation of its own, so that memcheck sees
    where it ends."""
    sanitizer = stage.tool("compute-sanitizer")
    if sanitizer is None:
        return
    options = ["--target-processes", "all", "--error-exitcode", "1"]
    call = [sys.executable, "-m", "benchmarks.small_calls", "cuda"]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # torch tries out API calls that may fail; those of ours are checked where they are made.
    stage.run(sanitizer, "--tool", "memcheck", "--report-api-errors", "no", *options, *call, environment=environment)
    stage.run(sanitizer, "--tool", "racecheck", *options, *call, environment=environment)
    shutil.copy(stage.log, RESULTS / f"{_device_slug()}.sanitize.txt")


def profile(stage: Stage) -> None:
    """Nsight Compute's key figures of the main kernels of each backend."""
    ncu = stage.tool("ncu")
    if ncu is None:
        return
    options = ["--clock-control", "none", "--profile-from-start", "off", "--target-processes", "all"]
    options += ["--launch-count", str(LAUNCHES), *(word for section in NCU_SECTIONS for word in ("--section", section))]
    for backend in _expected_backends():
        text = RESULTS / f"{_device_slug()}.profile-{backend}.txt"
        text.unlink(missing_ok=True)
        stage.run(ncu, *options, "--log-file", str(text), sys.executable, "-m", "benchmarks.profiled_calls", backend)


def _device_slug() -> str:
    import torch

    return slug(torch.cuda.get_device_name())


STAGES: dict[str, Callable[[Stage], None]] = {
    "build": build,
    "test": test,
    "bench": bench,
    "sanitize": sanitize,
    "profile": profile,
}
OPTIONAL = ("profile",)  # hardware counters are often not readable: its failure is told, and no more


def run_stages(names: Sequence[str]) -> int:
    """Exit status: 1 if any stage that is not optional failed."""
    failures: dict[str, list[str]] = {}
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in names:
        stage = Stage(name)
        try:
            if "build" not in names and not list((ROOT / "drift_ops").glob("_cuda*.so")):
                STAGES["build"](stage)
            STAGES[name](stage)
        except Exception as error:  # of this script: the other stages still have their turn
            stage.fail(repr(error))
        failures[name] = stage.failures
    print("\nmake gpu-check:")
    for name, reasons in failures.items():
        print(f"  {name:<9}{'; '.join(reasons) or 'ok'}")
    return int(any(reasons for name, reasons in failures.items() if name not in OPTIONAL))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    args = parser.parse_args()
    sys.exit(run_stages(list(STAGES) if args.stage == "all" else [args.stage]))


if __name__ == "__main__":
    main()
