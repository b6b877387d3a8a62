"""setup.py: compiles what has changed and no more, and says in plain words why it cannot."""

import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup(monkeypatch):
    """The module, in the folder where it runs."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(ROOT)
    return import_module("setup")


def test_every_source_is_compiled_for_its_instruction_set(setup):
    sources = setup.cpu_sources()
    assert next(iter(sources)).name == "kernels_portable.cpp", "the linker keeps the first copy of what the sets share"
    flags = {path.stem: flags for path, flags in sources.items()}
    assert flags["module"] == flags["kernels_portable"] == []
    if setup.X86:
        assert "-mavx2" in flags["kernels_avx2"] and "-mavx512f" in flags["kernels_avx512"]
        assert sources.keys() == set(Path("csrc/cpu").rglob("*.cpp"))
    assert {path.suffix for path in setup.cuda_sources()} == {".cpp", ".cu"}


@pytest.fixture
def program(setup, tmp_path, monkeypatch):
    """A program in a folder with a space in its name: ``one.cpp`` includes ``one.hpp`` and ``two.cpp`` nothing."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("one.hpp").write_text("constexpr int ONE = 1;\n")
    Path("one.cpp").write_text('#include "one.hpp"\nint two();\nint main() { return ONE + two(); }\n')
    Path("two.cpp").write_text("int two() { return 2; }\n")
    sources = {Path(name): ["g++", "-O0", "-DQUOTED='a b'"] for name in ("one.cpp", "two.cpp")}
    return setup.Binary(folder / "program", sources, ["g++"])


def test_only_what_includes_a_header_is_compiled_again(setup, program, capfd):
    def build() -> tuple[str, int]:
        """What ninja says, and the exit status of the program."""
        setup.run_ninja([program], Path("build"))
        return capfd.readouterr().out, subprocess.run([program.path]).returncode

    says, status = build()
    assert "compiling one.cpp" in says and "compiling two.cpp" in says and status == 3
    assert build() == ("ninja: no work to do.\n", 3)
    Path("one.hpp").write_text("constexpr int ONE = 40;\n")
    os.utime("one.hpp", (time.time() + 10,) * 2)
    says, status = build()
    assert "compiling one.cpp" in says and "compiling two.cpp" not in says and status == 42


def test_a_mistake_is_told_once(setup, program, capfd):
    for name in ("one.cpp", "two.cpp"):
        Path(name).write_text("int x = nonsense;\n")
    with pytest.raises(CompileError, match="what the compiler says is above"):
        setup.run_ninja([program], Path("build"))
    output = capfd.readouterr()
    assert (output.out + output.err).count("error: ") == 1


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"DRIFT_OPS_CUDA": "2"}, "error: DRIFT_OPS_CUDA: got '2', expected 0 or 1"),
        ({"DRIFT_OPS_CUDA": "0", "CXX": "no-such-compiler"}, "error: the C++ compiler no-such-compiler is not"),
    ],
)
def test_reasons_are_given_without_a_traceback(environment, reason):
    command = [sys.executable, "setup.py", "build_ext"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 1 and reason in done.stderr and "Traceback" not in done.stderr


def test_cuda_where_it_is_of_use(setup, monkeypatch, capsys):
    monkeypatch.delenv("DRIFT_OPS_CUDA", raising=False)
    monkeypatch.setattr(setup, "find_nvcc", lambda: "nvcc")
    for targets, decision in (([], "left out, because there is no GPU"), (["sm_86"], "built for sm_86")):
        monkeypatch.setattr(setup, "targets_of_gpus", lambda nvcc, targets=targets: targets)
        assert setup.plan_cuda() == ("nvcc", targets)
        assert capsys.readouterr().out.startswith(f"drift_ops: the CUDA kernels are {decision}")
    monkeypatch.setenv("DRIFT_OPS_CUDA", "1")
    assert setup.plan_cuda() == ("nvcc", setup.EVERY_TARGET)
    monkeypatch.setattr(setup, "find_nvcc", lambda: None)
    with pytest.raises(SetupError, match="DRIFT_OPS_CUDA=1, but nvcc is neither"):
        setup.plan_cuda()
    monkeypatch.delenv("DRIFT_OPS_CUDA")
    assert setup.plan_cuda() == (None, [])
    assert capsys.readouterr().out.count("left out, because there is no nvcc") == 1


def test_a_missing_ninja_is_named(setup, monkeypatch):
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    with pytest.raises(SetupError, match="pip install ninja"):
        setup.find_ninja()
