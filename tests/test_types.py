"""What a user's type checker sees: every public name has its type, under mypy --strict."""

import ast
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import typed_user

ROOT = Path(__file__).parents[1]
PARTS = ("config", "data", "hub", "models", "training", "utils")
PUBLIC = ("drift_ops", "drifting", *(f"drifting.{part}" for part in PARTS))


def test_every_public_name_is_called():
    tree = ast.parse(Path(typed_user.__file__).read_text(encoding="utf-8"))
    called = {getattr(node, "attr", getattr(node, "id", None)) for node in ast.walk(tree)}
    for name in PUBLIC:
        module = import_module(name)
        missing = {it for it in module.__all__ if callable(getattr(module, it))} - called
        assert not missing, name


def test_both_packages_tell_that_they_have_types():
    for name in PUBLIC[:2]:
        assert Path(import_module(name).__file__).with_name("py.typed").is_file()


def test_a_users_file_passes_mypy_strict():
    """With the settings and the cache of ``make lint``, which say that the whole project is strict."""
    command = [sys.executable, "-m", "mypy", "--strict", "tests/typed_user.py"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_runs(tmp_path):
    typed_user.main(tmp_path)
