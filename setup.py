"""Builds drift_ops._cpu: one C++ module that holds the CPU kernels for every instruction set and picks at run time.

Needs a C++17 compiler (GCC or Clang) and pybind11, not torch.
"""

import platform
from glob import glob

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
INSTRUCTION_SETS = {"portable": []}  # first, so that the linker keeps its copy of anything the sets share
if X86:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]


class BuildKernels(build_ext):
    """Compiles ``kernels_NAME.cpp`` with NAME's own flags, then builds the module around the objects."""

    def build_extension(self, ext: Extension) -> None:
        for name, flags in INSTRUCTION_SETS.items():
            source = f"csrc/cpu/kernels_{name}.cpp"
            ext.extra_objects += self.compiler.compile(
                [source], self.build_temp, extra_postargs=FLAGS + flags, depends=ext.depends
            )
        super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "drift_ops._cpu",
            sources=["csrc/cpu/module.cpp", "csrc/cpu/parallel.cpp"],
            depends=glob("csrc/cpu/*.hpp"),
            include_dirs=[pybind11.get_include()],
            define_macros=[("DRIFT_X86", "1")] if X86 else [],
            extra_compile_args=FLAGS,
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
