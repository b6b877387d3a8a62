"""Builds drift_ops._cpu, one C++ module that holds the CPU kernels for every instruction set and picks at run time, and
drift_ops._cuda, the CUDA kernels, where they are of use.

Needs a C++17 compiler (GCC or Clang), ninja and pybind11, not torch. Every source is compiled when it or a header that
it includes has changed, as many at a time as there are cores; what is built is kept in build/kernels-PLATFORM.

The CUDA kernels need nvcc (CUDA 11.8 or later) and are built for the GPUs of this machine; without a GPU they are left
out. DRIFT_OPS_CUDA=1 builds them anyway, for every target, and makes a missing nvcc an error; DRIFT_OPS_CUDA=0 leaves
them out.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

X86 = platform.machine().lower() in ("x86_64", "amd64")
FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
DEFINES = ["-DDRIFT_X86"] if X86 else []
INSTRUCTION_SETS = {"portable": []}
if X86:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]

NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
EVERY_TARGET = ["sm_80", "sm_90", "compute_90"]  # machine code for two GPUs, and PTX for those that come after them

BUILD = Path("build") / f"kernels-{sysconfig.get_config_var('SOABI')}"


# What there is to compile


def cpu_sources() -> dict[Path, list[str]]:
    """Each source of the CPU kernels with the flags of its instruction set, whose name follows ``kernels_``. The
    portable ones come first: the linker keeps the first copy of what the sets share, and it must run everywhere."""
    sources = sorted(Path("csrc/cpu").rglob("*.cpp"), key=lambda path: ("kernels_portable" not in path.name, path))
    sets = {path: path.stem.partition("kernels_")[2] or "portable" for path in sources}
    return {path: INSTRUCTION_SETS[name] for path, name in sets.items() if name in INSTRUCTION_SETS}


def cuda_sources() -> list[Path]:
    return sorted([*Path("csrc/cuda").rglob("*.cpp"), *Path("csrc/cuda").rglob("*.cu")])


# The CUDA kernels are optional


def find_nvcc() -> str | None:
    """The CUDA compiler on PATH, in $CUDA_HOME or in /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    return shutil.which("nvcc") or next((p for home in homes if home and (p := shutil.which(f"{home}/bin/nvcc"))), None)


def targets_of_gpus(nvcc: str) -> list[str]:
    """The targets of this machine's GPUs, none without a GPU; every target where nvcc does not know that of a GPU."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        capabilities = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return EVERY_TARGET if Path("/dev/nvidia0").exists() else []
    targets = {f"sm_{capability.replace('.', '')}" for capability in capabilities if float(capability) >= 8.0}
    return sorted(targets) if targets <= set(known) else EVERY_TARGET


def plan_cuda() -> tuple[str | None, list[str]]:
    """The CUDA compiler, and the targets of the CUDA kernels: none where they are left out. Prints the decision."""
    wanted = os.environ.get("DRIFT_OPS_CUDA")
    if wanted not in (None, "0", "1"):
        raise SetupError(f"DRIFT_OPS_CUDA: got {wanted!r}, expected 0 or 1: unset it to leave the choice to setup.py")
    nvcc = find_nvcc()
    if nvcc is None and wanted == "1":
        raise SetupError("DRIFT_OPS_CUDA=1, but nvcc is neither on PATH nor in $CUDA_HOME/bin: install CUDA")
    targets: list[str] = []
    if wanted == "0":
        decision = "left out, as DRIFT_OPS_CUDA=0 asks"
    elif nvcc is None:
        decision = "left out, because there is no nvcc"
    elif targets := EVERY_TARGET if wanted == "1" else targets_of_gpus(nvcc):
        decision = f"built for {', '.join(targets)}"
    else:
        decision = "left out, because there is no GPU of sm_80 or later (DRIFT_OPS_CUDA=1 builds them anyway)"
    print(f"drift_ops: the CUDA kernels are {decision}", flush=True)
    return nvcc, targets


# ninja


class Binary(NamedTuple):
    """A file that the command ``link`` makes from objects, each compiled from a source by that source's command."""

    path: Path
    sources: dict[Path, list[str]]
    link: list[str]


RULES = """ninja_required_version = 1.5
rule compile
  command = $compiler -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compiling $in
rule link
  command = $linker $in -o $out
  description = linking $out
"""


def ninja_file(binaries: Sequence[Binary]) -> str:
    """The text of a build.ninja that makes them; objects go beside what is linked from them."""

    def path(name: Path) -> str:
        return str(name).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def command(words: Sequence[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    lines = [RULES]
    for binary in binaries:
        folder = binary.path.parent / f"{binary.path.stem}.objects"
        objects = {source: path(folder / f"{source}.o") for source in binary.sources}
        for source, compiler in binary.sources.items():
            lines += [f"build {objects[source]}: compile {path(source)}", f"  compiler = {command(compiler)}"]
        lines += [f"build {path(binary.path)}: link {' '.join(objects.values())}", f"  linker = {command(binary.link)}"]
    return "\n".join(lines) + "\n"


def find_ninja() -> str:
    """The program that the package ninja brings, or the one on PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    if path := shutil.which(os.path.join(BIN_DIR, "ninja")) or shutil.which("ninja"):
        return path
    raise SetupError("ninja is not installed: pip install ninja")


def run_ninja(binaries: Sequence[Binary], folder: Path) -> None:
    """Brings them up to date, keeping in ``folder`` what it needs to know the next time, and prints what is done. Of
    failures only the first is shown: instruction sets have their sources, and so their mistakes, in common."""
    ninja, file = find_ninja(), folder / "build.ninja"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(f"builddir = {folder}\n" + ninja_file(binaries), encoding="utf-8")
    failures = 0
    with subprocess.Popen([ninja, "-f", str(file)], stdout=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stdout
        for line in process.stdout:
            failures += line.startswith("FAILED:")
            if failures < 2:
                print(line, end="", flush=True)
    if process.returncode:
        raise CompileError("the C++ could not be compiled: what the compiler says is above")


# setuptools


def pybind11_headers() -> Path:
    """A link to pybind11's headers, named by their version. With pip they lie elsewhere in every build, and with them
    in it no command would be the same again."""
    link = BUILD / f"pybind11-{pybind11.__version__}"
    BUILD.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(pybind11.get_include(), target_is_directory=True)
    return link


class BuildKernels(build_ext):
    """Has ninja build the modules, then puts them where the command wants them."""

    def run(self) -> None:
        self.nvcc, self.cuda_targets = plan_cuda()
        if not self.cuda_targets:
            self.extensions = [ext for ext in self.extensions if ext.name != "drift_ops._cuda"]
        super().run()

    def build_extensions(self) -> None:
        name = self.compiler.compiler_cxx[0]
        if not shutil.which(name):
            raise SetupError(f"the C++ compiler {name} is not installed: install it, or name another one in $CXX")
        if self.force:
            shutil.rmtree(BUILD, ignore_errors=True)
        headers = [f"-isystem{path}" for path in (pybind11_headers(), sysconfig.get_paths()["include"])]
        compiler = [*self.compiler.compiler_so_cxx, *FLAGS, *DEFINES, *headers]
        binaries = {"drift_ops._cpu": self.cpu_module(compiler)}
        if self.cuda_targets:
            binaries["drift_ops._cuda"] = self.cuda_module(compiler)
        run_ninja([*binaries.values()], BUILD)
        for module, binary in binaries.items():
            place = self.get_ext_fullpath(module)
            self.mkpath(os.path.dirname(place))
            self.copy_file(binary.path, place)

    def cpu_module(self, compiler: list[str]) -> Binary:
        sources = {source: [*compiler, *flags] for source, flags in cpu_sources().items()}
        return Binary(BUILD / "_cpu.so", sources, [*self.compiler.compiler_cxx, *self.compiler.linker_so_cxx[1:]])

    def cuda_module(self, compiler: list[str]) -> Binary:
        """Linked by nvcc, with the CUDA runtime inside, so that the module loads without a driver."""
        assert self.nvcc
        codes = [f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in self.cuda_targets]
        compilers = {".cpp": compiler, ".cu": [self.nvcc, *NVCC_FLAGS, *codes]}
        sources = {source: compilers[source.suffix] for source in cuda_sources()}
        link = [self.nvcc, "-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL"]
        return Binary(BUILD / "_cuda.so", sources, link)


if __name__ == "__main__":
    modules = {"drift_ops._cpu": cpu_sources(), "drift_ops._cuda": cuda_sources()}
    setup(
        ext_modules=[Extension(name, [str(path) for path in sources]) for name, sources in modules.items()],
        cmdclass={"build_ext": BuildKernels},
    )
