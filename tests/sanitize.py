"""``make sanitize``: the CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

Needs GCC or Clang with its sanitizers' libraries; on Debian and Ubuntu, the package g++ has them, and clang needs
libclang-rt-VERSION-dev. What is built goes to ``build/sanitize``; the module that is installed stays as it is.

1. The operator's tests with a module built for AddressSanitizer and UndefinedBehaviorSanitizer, whose library is loaded
   before Python, so that it watches the memory of torch's tensors as well, for every instruction set of this machine.
2. ``threads.cpp``, which calls every kernel on several threads, under ThreadSanitizer. Without Python, because torch's
   OpenMP is not built for it, and every barrier of it would be taken for a race.

Before each, a fault is made on purpose: a sanitizer that does not see it would see nothing else.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pybind11
from setuptools.errors import CompileError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from setup import DEFINES, Binary, cpu_sources, run_ninja  # noqa: E402

BUILD = Path("build/sanitize")
FLAGS = ["-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-fno-math-errno", "-fno-trapping-math", "-fPIC"]
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREAD = ["-fsanitize=thread"]
TESTS = [f"tests/test_{name}.py" for name in ("operator", "gradients", "golden", "pairs")]

# A gradient of 1,000 numbers, of forces that have only 10.
OVERFLOW = """import sanitized_cpu, torch; from drift_ops import _cpu; from drift_ops.spec import LossSpec
forces, grad = torch.ones(1, 1, 1, 10), torch.ones(1, 1, 100, 10)
_cpu.loss_gradient(LossSpec((1.0,), 0.0), [[1.0, 1.0]], [forces], [torch.ones(1)], [grad], 1)
"""
SUPPORTED = "import sanitized_cpu; from drift_ops import _cpu; print(*_cpu.supported())"


def find_compiler() -> str:
    """``$CXX``, g++ or clang++."""
    names = [os.environ.get("CXX"), "g++", "clang++"]
    compiler = next((path for name in names if name and (path := shutil.which(name))), None)
    if compiler is None:
        sys.exit("make sanitize needs g++ or clang++ (on Debian and Ubuntu: apt-get install g++)")
    return compiler


def is_clang(compiler: str) -> bool:
    return "clang" in output_of([compiler, "--version"])


def output_of(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def build(name: str, command: list[str], sources: dict[Path, list[str]], *link: str) -> Path:
    """Compile the sources with the ``command`` and their own flags, and link them to ``build/sanitize/NAME``."""
    includes = [f"-I{path}" for path in ("csrc/cpu", pybind11.get_include(), sysconfig.get_paths()["include"])]
    compiler = [*command, *FLAGS, *DEFINES, *includes]
    commands = {source: [*compiler, *extra] for source, extra in sources.items()}
    try:
        run_ninja([Binary(BUILD / name, commands, [*command, *link])], BUILD / f"{name}.ninja")
    except CompileError as error:
        sys.exit(f"make sanitize: {error}")
    return BUILD.absolute() / name


def run(command: list[str], environment: dict[str, str] | None = None) -> None:
    """Run a command that must succeed."""
    if subprocess.run(command, cwd=ROOT, env=os.environ | (environment or {})).returncode:
        sys.exit(f"make sanitize: failed: {shlex.join(command)}")


def must_fail(command: list[str], report: str, environment: dict[str, str] | None = None) -> None:
    """Run a command whose fault the sanitizer must ``report``."""
    done = subprocess.run(command, cwd=ROOT, env=os.environ | (environment or {}), capture_output=True, text=True)
    if done.returncode == 0 or report not in done.stderr:
        sys.exit(f"make sanitize: no {report} reported where there is one:\n{done.stdout}{done.stderr}")


def sanitize_memory(compiler: str) -> None:
    shared = ["-shared-libasan"] if is_clang(compiler) else []
    module = build("_cpu.so", [compiler, *ADDRESS, *shared], cpu_sources(), "-shared")
    arch = platform.machine()
    library = f"libclang_rt.asan-{arch}.so" if shared else "libasan.so"
    runtime = output_of([compiler, f"-print-file-name={library}"])
    libraries = [runtime, *([] if shared else [output_of([compiler, "-print-file-name=libstdc++.so"])])]
    environment = {
        "LD_PRELOAD": ":".join(libraries),  # with libstdc++, so that exceptions can be intercepted
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python leaves much to the end of the process
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "SANITIZED_CPU": str(module),
        "PYTHONPATH": str(ROOT / "tests"),
    }
    must_fail([sys.executable, "-c", OVERFLOW], "heap-buffer-overflow", environment)
    supported = subprocess.run(
        [sys.executable, "-c", SUPPORTED], env=os.environ | environment, check=True, capture_output=True, text=True
    ).stdout.split()
    for isa in supported:
        started = time.monotonic()
        pytest = [
            sys.executable,
            *"-m pytest -q -s -p sanitized_cpu -p no:cacheprovider -k".split(),
            "cpu or test_pairs",
        ]
        run([*pytest, *TESTS], environment | {"DRIFT_OPS_CPU_ISA": isa, "DRIFT_OPS_REQUIRE": "cpu"})
        seconds = time.monotonic() - started
        print(f"AddressSanitizer and UndefinedBehaviorSanitizer, {isa}: clean ({seconds:.0f} s)", flush=True)


def sanitize_threads(compiler: str) -> None:
    sources = {source: flags for source, flags in cpu_sources().items() if source.name != "module.cpp"}
    link = ["-pthread", "-Wl,--no-as-needed", "-ldl"]
    program = build("threads", [compiler, *THREAD], {Path("tests/threads.cpp"): [], **sources}, *link)
    # without address space randomisation, which libraries of before 2024 cannot work with on newer kernels
    command = [*(["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []), str(program)]
    must_fail([*command, "race"], "data race")
    started = time.monotonic()
    run(command, {"TSAN_OPTIONS": "halt_on_error=1"})
    print(f"ThreadSanitizer: clean ({time.monotonic() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    os.chdir(ROOT)
    chosen = find_compiler()
    print(output_of([chosen, "--version"]).splitlines()[0], flush=True)
    sanitize_threads(chosen)
    sanitize_memory(chosen)
