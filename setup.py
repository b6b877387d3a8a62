"""Builds drift_ops._cpu, one C++ module that holds the CPU kernels for every instruction set and picks at run time, and
drift_ops._cuda, the CUDA kernels, where they are of use.

Needs a C++17 compiler (GCC or Clang) and pybind11, not torch. The CUDA kernels need nvcc (CUDA 11.8 or later) and are
built for the GPUs of this machine; without a GPU they are left out. DRIFT_OPS_CUDA=1 builds them anyway, for every
target, and makes a missing nvcc an error; DRIFT_OPS_CUDA=0 leaves them out.
"""

import os
import platform
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

X86 = platform.machine().lower() in ("x86_64", "amd64")
FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
INSTRUCTION_SETS = {"portable": []}
if X86:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]

NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
EVERY_TARGET = ["sm_80", "sm_90", "compute_90"]  # machine code for two GPUs, and PTX for those that come after them


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
        raise ValueError(f"DRIFT_OPS_CUDA: got {wanted!r}, expected 0 or 1: unset it to leave the choice to setup.py")
    nvcc = find_nvcc()
    if nvcc is None and wanted == "1":
        raise FileNotFoundError("DRIFT_OPS_CUDA=1, but nvcc is neither on PATH nor in $CUDA_HOME/bin: install CUDA")
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


class BuildKernels(build_ext):
    """Compiles the sources of a module at the same time: C++ with the flags of its instruction set, CUDA with nvcc."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "drift_ops._cuda":
            self.build_cuda(ext)
            return
        compile_one = self.compiler.compile

        def compile_source(source: str) -> str:
            name = Path(source).stem.removeprefix("kernels_")
            flags = FLAGS + INSTRUCTION_SETS.get(name, [])
            return compile_one([source], self.build_temp, ext.define_macros, ext.include_dirs, extra_postargs=flags)[0]

        def compile_sources(sources: list[str], **_: object) -> list[str]:
            # The linker keeps the first copy of a function that the sets share, which must run on every machine.
            portable_first = sorted(sources, key=lambda source: "kernels_portable" not in source)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(pool.map(compile_source, portable_first))

        self.compiler.compile = compile_sources  # which the stock command then calls, and links
        super().build_extension(ext)

    def build_cuda(self, ext: Extension) -> None:
        """Compiles and links with nvcc, the CUDA runtime inside, so that the module loads without a driver."""
        module = self.get_ext_fullpath(ext.name)
        if not self.force and not newer_group([*ext.sources, *ext.depends], module, "newer"):
            return
        includes = [f"-I{path}" for path in (*ext.include_dirs, sysconfig.get_paths()["include"])]
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        Path(module).parent.mkdir(parents=True, exist_ok=True)

        codes = [f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in CUDA_TARGETS]

        def compile_source(source: str) -> str:
            target = os.path.join(self.build_temp, f"cuda_{Path(source).name}.o")
            self.spawn([NVCC, *NVCC_FLAGS, *codes, *includes, "-c", source, "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_source, ext.sources))
        self.spawn([NVCC, "-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL", *objects, "-o", module])


NVCC, CUDA_TARGETS = plan_cuda()
EXTENSIONS = [
    Extension(
        "drift_ops._cpu",
        sources=[
            *(f"csrc/cpu/kernels_{name}.cpp" for name in INSTRUCTION_SETS),
            "csrc/cpu/module.cpp",
            "csrc/cpu/parallel.cpp",
        ],
        depends=["csrc/math.hpp", *glob("csrc/cpu/*.hpp")],
        include_dirs=[pybind11.get_include()],
        define_macros=[("DRIFT_X86", "1")] if X86 else [],
        language="c++",
    )
]
if CUDA_TARGETS:
    EXTENSIONS.append(
        Extension(
            "drift_ops._cuda",
            sources=["csrc/cuda/module.cpp", *sorted(glob("csrc/cuda/*.cu"))],
            depends=["csrc/math.hpp", *glob("csrc/cuda/*.cuh"), *glob("csrc/cuda/*.hpp")],
            include_dirs=[pybind11.get_include()],
        )
    )

setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildKernels})
