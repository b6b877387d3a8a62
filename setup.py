"""Builds drift_ops._cpu, one C++ module that holds the CPU kernels for every instruction set and picks at run time, and
drift_ops._cuda, the CUDA kernels, where nvcc is found.

Needs a C++17 compiler (GCC or Clang) and pybind11, not torch. DRIFT_OPS_CUDA=0 leaves the CUDA kernels out; 1 makes a
missing nvcc (CUDA 11.8 or later) an error.
"""

import os
import platform
import shutil
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

X86 = platform.machine().lower() in ("x86_64", "amd64")
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
INSTRUCTION_SETS = {"portable": []}  # first, so that the linker keeps its copy of anything the sets share
if X86:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]

NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
for target in ("sm_80", "sm_90", "compute_90"):  # machine code for two, and PTX for whatever comes after them
    NVCC_FLAGS += ["-gencode", f"arch={target.replace('sm', 'compute')},code={target}"]


def find_nvcc() -> str | None:
    """The CUDA compiler, or None where it is not wanted or not found."""
    wanted = os.environ.get("DRIFT_OPS_CUDA")
    if wanted not in (None, "0", "1"):
        raise ValueError(f"DRIFT_OPS_CUDA: got {wanted!r}, expected 0 or 1")
    if wanted == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc") or next((p for home in homes if home and (p := shutil.which(f"{home}/bin/nvcc"))), None)
    if nvcc is None and wanted == "1":
        raise FileNotFoundError("DRIFT_OPS_CUDA=1, but nvcc is neither on PATH nor in $CUDA_HOME/bin")
    if nvcc is None:
        print("drift_ops: no nvcc found, so the CUDA kernels are left out")
    return nvcc


class BuildKernels(build_ext):
    """Compiles what the stock command cannot: ``kernels_NAME.cpp`` with NAME's own flags, and CUDA."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "drift_ops._cuda":
            self.build_cuda(ext)
            return
        for name, flags in INSTRUCTION_SETS.items():
            source = f"csrc/cpu/kernels_{name}.cpp"
            ext.extra_objects += self.compiler.compile(
                [source], self.build_temp, extra_postargs=FLAGS + flags, depends=ext.depends
            )
        super().build_extension(ext)

    def build_cuda(self, ext: Extension) -> None:
        """Compiles and links with nvcc, the CUDA runtime inside, so that the module loads without a driver."""
        module = self.get_ext_fullpath(ext.name)
        if not self.force and not newer_group([*ext.sources, *ext.depends], module, "newer"):
            return
        includes = [f"-I{path}" for path in (*ext.include_dirs, sysconfig.get_paths()["include"])]
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        Path(module).parent.mkdir(parents=True, exist_ok=True)

        def compile_source(source: str) -> str:
            target = os.path.join(self.build_temp, f"cuda_{Path(source).name}.o")
            self.spawn([NVCC, *NVCC_FLAGS, *includes, "-c", source, "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_source, ext.sources))
        self.spawn([NVCC, "-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL", *objects, "-o", module])


NVCC = find_nvcc()
EXTENSIONS = [
    Extension(
        "drift_ops._cpu",
        sources=["csrc/cpu/module.cpp", "csrc/cpu/parallel.cpp"],
        depends=["csrc/math.hpp", *glob("csrc/cpu/*.hpp")],
        include_dirs=[pybind11.get_include()],
        define_macros=[("DRIFT_X86", "1")] if X86 else [],
        extra_compile_args=FLAGS,
        language="c++",
    )
]
if NVCC:
    EXTENSIONS.append(
        Extension(
            "drift_ops._cuda",
            sources=["csrc/cuda/module.cpp", *sorted(glob("csrc/cuda/*.cu"))],
            depends=["csrc/math.hpp", *glob("csrc/cuda/*.cuh"), *glob("csrc/cuda/*.hpp")],
            include_dirs=[pybind11.get_include()],
        )
    )

setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildKernels})
