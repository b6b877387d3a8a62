"""``make gpu-check [STAGE=build|test|bench|sanitize|profile|quick]``: builds, tests and measures the GPU backends.

With this Python and its torch and Triton, without a network. Each stage ends within ten minutes, and one that fails
does not keep the others from running; the exit status says whether any did. Without STAGE all run in that order but
``quick``, which has the main things of them, and some training, within eight minutes. What a stage prints is kept in
``build/gpu-check/STAGE.log``; what is worth keeping goes to ``benchmarks/results/``. ``--dry-run`` goes the same way
without a GPU, to try the code, and keeps nothing.
"""

import argparse
import importlib.util
import json
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
STAGE_SECONDS, QUICK_SECONDS = 570, 470  # for all commands of a stage, and for the build before them
BUILD_SECONDS = 120
QUICK_TEST_SECONDS, QUICK_TRAINING_SECONDS = 110, 100  # at most; the bench has the rest
BENCH_MARGIN = 45  # seconds between the bench's own deadline and its stage's: for a trial that runs over

PARAMETRISED = [f"tests/test_{name}.py" for name in ("operator", "gradients", "golden", "library")]
TEST_PROCESSES = 8  # Triton's compiler runs on the CPU, and takes most of the tests' time
NCU_SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "Occupancy", "LaunchStats")
LAUNCHES = 60  # at most, that ncu profiles of a backend
TRAINING = [  # needs no download: digits, the transformer, five feature maps of the paper's counts
    "--config", "digits", "model=drifting_dit", "model.embed_dim=128", "model.depth=2", "model.num_heads=4",
    "loss.feature_extractor=pyramid", "step.gen_per_label=64", "step.pos_per_label=64", "step.bf16=true",
    "train.log_every=20", "evaluation.num_samples=1000",
]  # fmt: skip


class Stage:
    """The commands of one stage, run one after the other until its time is up; what they print is also kept."""

    def __init__(self, name: str, dry_run: bool = False) -> None:
        self.name, self.dry_run = name, dry_run
        self.deadline = time.monotonic() + (QUICK_SECONDS if name == "quick" else STAGE_SECONDS)
        self.failures: list[str] = []
        self.results = LOGS / "dry-run" if dry_run else RESULTS
        LOGS.mkdir(parents=True, exist_ok=True)
        self.results.mkdir(parents=True, exist_ok=True)
        self.log = LOGS / f"{name}.log"
        self.log.write_text("", encoding="utf-8")

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def device(self) -> str:
        """The name of the device, as files of results begin."""
        import torch

        return "dry-run" if self.dry_run else slug(torch.cuda.get_device_name())

    @property
    def backends(self) -> list[str]:
        """Those that must be usable: Triton, and CUDA C++ where nvcc can have built it."""
        if self.dry_run:
            return []
        has_nvcc = shutil.which("nvcc") or Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc").exists()
        return ["triton", "cuda"] if has_nvcc else ["triton"]

    def run(self, *command: str, seconds: float = float("inf"), environment: dict[str, str] | None = None) -> bool:
        """Whether the command succeeded. It and all processes it started are stopped after so many ``seconds``, or when
        the stage's time is up."""
        limit = max(min(seconds, self.seconds_left), 1)
        label = " ".join(["python" if word == sys.executable else word for word in command]).splitlines()[0]
        self.note(f"[{self.name}] {label}")
        with self.log.open("ab") as log:
            end_before = log.tell()
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | (environment or {}), stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(limit)
                problem = f"exit status {status}" if status else None
            except subprocess.TimeoutExpired:
                problem = f"stopped: not done after {limit:.0f} s"
            finally:
                _stop_group(process)
        with self.log.open("rb") as log:
            log.seek(end_before)
            print(_last_lines(log.read().decode(errors="replace")), flush=True)
        if problem:
            self.fail(f"{label[:60]}{'…' * (len(label) > 60)}: {problem}")
        return problem is None

    def note(self, text: str) -> None:
        """Prints it and keeps it."""
        print(text, flush=True)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"{text}\n")

    def fail(self, reason: str) -> None:
        self.note(f"[{self.name}] FAILED: {reason}")
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
    stage.run(sys.executable, "setup.py", "build_ext", "--inplace", seconds=BUILD_SECONDS)
    stage.run(sys.executable, "-c", _SHOW_BACKENDS, *stage.backends)


_SHOW_BACKENDS = """import sys; import drift_ops  # which backends are usable?
backends = drift_ops.backends()
for name, status in backends.items():
    print(f"{name}: {status.reason or 'usable'}")
sys.exit(", ".join(f"{name} is not usable" for name in sys.argv[1:] if not backends[name].usable) or 0)
"""


def _pytest(stage: Stage, *arguments: str, parallel: bool = True, seconds: float = float("inf")) -> None:
    """Without this project's pytest options: the plugin that they belong to may be missing."""
    environment = {"DRIFT_OPS_REQUIRE": ",".join(stage.backends), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    processes = []
    if parallel and importlib.util.find_spec("xdist"):
        processes = ["-n", str(TEST_PROCESSES)]
        environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "pytest", "-v", "-o", "addopts=", "-p", "no:cacheprovider", *processes]
    stage.run(*command, *arguments, seconds=seconds, environment=environment)


def test(stage: Stage) -> None:
    """The tests that need a GPU, then those of every backend."""
    _pytest(stage, "tests/test_gpu.py", parallel=False)
    _pytest(stage, "-k", "triton or cuda", *PARAMETRISED)


def bench(stage: Stage, *options: str) -> None:
    limit = ["--seconds", str(int(stage.seconds_left - BENCH_MARGIN)), "--out", str(stage.results)]
    dry_run = ["--dry-run"] if stage.dry_run else []
    stage.run(sys.executable, "-m", "benchmarks.gpu", *options, *limit, *dry_run)


def quick(stage: Stage) -> None:
    """Every kernel once against float64, in every dtype; a hundred steps of training; the main times."""
    _pytest(stage, "-k", "test_against_reference", "tests/test_gpu.py", seconds=QUICK_TEST_SECONDS)
    train(stage)
    bench(stage, "--quick")
    shutil.copy(stage.log, stage.results / f"{stage.device}.quick.txt")


def train(stage: Stage) -> None:
    """In bfloat16, compiled."""
    run = LOGS / "training"
    shutil.rmtree(run, ignore_errors=True)
    length = ["step.compile=false", "train.steps=2"] if stage.dry_run else ["step.compile=true", "train.steps=100"]
    command = [sys.executable, "-m", "drifting.train", "--out", str(run), *TRAINING, *length]
    if stage.run(*command, seconds=QUICK_TRAINING_SECONDS):
        last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        times = ", ".join(f"{phase} {1e3 * last['timing'][phase]:.1f}" for phase in ("step", "operator"))
        stage.note(f"training: {last['step']} steps; the last ones took, in ms: {times}")


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
    shutil.copy(stage.log, stage.results / f"{stage.device}.sanitize.txt")


def profile(stage: Stage) -> None:
    """Nsight Compute's key figures of the main kernels of each backend."""
    ncu = stage.tool("ncu")
    if ncu is None:
        return
    options = ["--clock-control", "none", "--profile-from-start", "off", "--target-processes", "all"]
    options += ["--launch-count", str(LAUNCHES), *(word for section in NCU_SECTIONS for word in ("--section", section))]
    for backend in stage.backends:
        text = stage.results / f"{stage.device}.profile-{backend}.txt"
        text.unlink(missing_ok=True)
        stage.run(ncu, *options, "--log-file", str(text), sys.executable, "-m", "benchmarks.profiled_calls", backend)


STAGES: dict[str, Callable[[Stage], None]] = {
    "build": build,
    "test": test,
    "bench": bench,
    "sanitize": sanitize,
    "profile": profile,
    "quick": quick,
}
ALL = ("build", "test", "bench", "sanitize", "profile")
OPTIONAL = ("profile",)  # hardware counters are often not readable: its failure is told, and no more


def run_stages(names: Sequence[str], dry_run: bool = False) -> int:
    """Exit status: 1 if any stage that is not optional failed."""
    failures: dict[str, list[str]] = {}
    for name in names:
        stage = Stage(name, dry_run)
        try:
            if "build" not in names:
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
    parser.add_argument("stage", choices=[*STAGES, "all"], help=f"all: {', '.join(ALL)}")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, at tiny sizes")
    args = parser.parse_args()
    import torch

    if not (args.dry_run or torch.cuda.is_available()):
        sys.exit(f"make gpu-check needs a GPU, and torch {torch.__version__} finds none that it can use")
    sys.exit(run_stages(ALL if args.stage == "all" else [args.stage], args.dry_run))


if __name__ == "__main__":
    main()
