"""The sdist and the wheel as others get them: built, installed where no compiler is, and with torch and numpy alone."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import drift_ops
import drifting

ROOT = Path(__file__).parents[1]
SOURCES = ("drift_ops", "drifting", "csrc")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt")
KERNELS = f"build/kernels-{sysconfig.get_config_var('SOABI')}"


def run(*command: object, cwd: Path, status: int = 0, **environ: str) -> str:
    """The output of a command, which knows nothing of this folder, and must end with ``status``."""
    around = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environ
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=around, capture_output=True, text=True, timeout=600)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def built(kind: str, source: Path, folder: Path) -> Path:
    """What ``python -m build`` makes of ``source``, with the tools of this environment."""
    run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", folder, source, cwd=folder)
    (path,) = folder.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in FILES:
        shutil.copy2(ROOT / name, tree)
    return built("sdist", tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory) -> Path:
    """The sdist's files, whose C++ is that of this tree. ninja may take objects that this tree has built from it."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    source = folder / sdist.name.removesuffix(".tar.gz")
    for path in (path for path in (ROOT / "csrc").rglob("*") if path.is_file()):
        assert (source / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    if (ROOT / KERNELS).is_dir():
        shutil.copytree(ROOT / KERNELS, source / KERNELS, symlinks=True)
    return source


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory) -> Path:
    return built("wheel", unpacked, tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def environment(wheel, tmp_path):
    """Makes an environment with the wheel, which sees further packages in a folder; its Python is returned."""

    def make(packages: Path) -> Path:
        run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
        python = tmp_path / "env/bin/python"
        run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
        (site,) = tmp_path.glob("env/lib/python*/site-packages")
        (site / "others.pth").write_text(f"{packages}\n", encoding="utf-8")
        return python

    return make


def site_packages() -> Path:
    return Path(importlib.metadata.distribution("torch").locate_file(""))


def needed(*names: str) -> set[str]:
    """The installed distributions of those names, and all that they need."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        try:
            requirements = map(Requirement, importlib.metadata.requires(name) or ())
        except importlib.metadata.PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            todo += [of.name for of in requirements if of.marker is None or of.marker.evaluate({"extra": ""})]
    return found


def test_the_sdist_has_what_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert set(FILES) <= files and "csrc/cpu/module.cpp" in files and "csrc/spec.hpp" in files
    assert not {file for file in files if file.startswith("tests") or file.endswith((".so", ".pyc"))}
    assert sdist.name == f"drifting-{drift_ops.__version__}.tar.gz"


def test_the_wheel_has_what_runs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files, information = archive.namelist(), f"drifting-{drift_ops.__version__}.dist-info"
        metadata = archive.read(f"{information}/METADATA").decode()
    assert {file.partition("/")[0] for file in files} == {"drift_ops", "drifting", information}
    assert {"drift_ops/py.typed", "drifting/py.typed", "drifting/configs/digits.yaml"} <= set(files)
    assert f"drift_ops/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}" in files
    assert {f"{information}/licenses/LICENSE"} <= set(files)
    always = [line for line in re.findall(r"Requires-Dist: (.*)", metadata) if "extra ==" not in line]
    assert sorted(re.split(r"\W", line)[0] for line in always) == ["numpy", "torch"]


def test_the_wheel_works_where_no_compiler_is(environment, tmp_path):
    python, tools = environment(site_packages()), {"PATH": str(tmp_path), "CXX": "none"}
    report = run(python, "-m", "drifting.doctor", cwd=tmp_path, **tools)
    assert re.search(rf"drifting +{re.escape(drift_ops.__version__)}\n", report) and "all checks passed" in report
    assert re.search("  cpu +usable, agrees with the reference", report)
    short = "model=residual_mlp loss.feature_extractor=input train.steps=1 evaluation.num_samples=256".split()
    trained = run(python, "-m", "drifting.train", "--out", "run", *short, cwd=tmp_path, **tools)
    assert "samples: run/samples" in trained


OPERATOR = """
import torch, drift_ops, drifting.doctor
x, y = torch.randn(40, 3, requires_grad=True), torch.randn(50, 3)
for V in (drift_ops.drift_field(x, y, temperature=1.0, backend="cpu"), drift_ops.compute_V(x, y, y, backend="cpu")):
    V.square().sum().backward()
drift_ops.drift_loss(x[None], y[None], backend="cpu")[0].sum().backward()
drifting.doctor.main([])
try:
    import drifting.models
except ImportError as error:
    print(error)
print(drift_ops.__file__)
"""
TOLD = "drifting needs yaml, which is not installed: pip install 'drifting[train]'"


def test_the_operator_needs_torch_and_numpy_only(environment, tmp_path):
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in needed("torch", "numpy"):
        for top in {path.parts[0] for path in importlib.metadata.files(name) or ()} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(site_packages() / top)
    python = environment(packages)
    *_, checks, told, place = run(python, "-c", OPERATOR, cwd=tmp_path).splitlines()
    assert (checks, told) == ("all checks passed", TOLD) and Path(place).is_relative_to(tmp_path / "env")
    assert run(python, "-m", "drifting.train", cwd=tmp_path, status=2) == f"error: {TOLD}\n"


def test_the_changelog_begins_with_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", text, re.MULTILINE)[1] == drift_ops.__version__ == drifting.__version__
