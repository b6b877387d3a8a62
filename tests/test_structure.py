"""Data flows one way: commands import packages, and nothing below a command imports one."""

import ast
from pathlib import Path

import drifting
from drifting.__main__ import COMMANDS

ROOT = Path(drifting.__file__).parent
ABOVE = {f"drifting.{name}" for name in (*COMMANDS, "cli", "__main__")}
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def imports_of(module: str) -> set[str]:
    """The modules of this package that ``module`` imports, wherever in it."""
    path, found = MODULES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    return found & MODULES.keys()


def test_no_package_imports_a_command():
    for module in MODULES.keys() - ABOVE:
        assert not imports_of(module) & ABOVE, module


def test_no_command_imports_another():
    for command in ABOVE - {"drifting.cli", "drifting.__main__"}:
        assert not imports_of(command) & (ABOVE - {"drifting.cli"}), command


def test_models_and_the_loss_import_no_data():
    for module in MODULES:
        if module.startswith("drifting.models"):
            lower = ("drifting.models", "drifting.generation", "drifting.errors", "drifting.utils")
            assert all(name.startswith(lower) for name in imports_of(module)), module
    assert imports_of("drifting.generation") <= {"drifting.errors"}


def test_the_operator_knows_nothing_of_the_package_around_it():
    for path in (ROOT.parent / "drift_ops").rglob("*.py"):
        assert "drifting" not in {
            node.module.partition(".")[0]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and node.module
        }, path
