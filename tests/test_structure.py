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


def opens_text(call: ast.Call) -> bool:
    """Whether the call opens a text file, as far as its words tell."""
    name, owner = getattr(call.func, "attr", getattr(call.func, "id", "")), getattr(call.func, "value", None)
    if name != "open" or getattr(owner, "id", "") in ("os", "gzip", "Image"):
        return name in ("read_text", "write_text", "fdopen")
    words = [
        word.value for word in (*call.args, *(key.value for key in call.keywords)) if isinstance(word, ast.Constant)
    ]
    return not any(word in ("rb", "wb", "ab", "r+b", "xb") for word in words)


def test_text_files_are_opened_as_utf_8():
    """Whatever encoding the machine has by default; tests themselves are left out."""
    here = ROOT.parent
    files = [path for part in ("drift_ops", "drifting", "benchmarks", "tests") for path in (here / part).rglob("*.py")]
    for path in (*files, here / "setup.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and opens_text(node) and not path.name.startswith("test_"):
                assert "encoding" in {key.arg for key in node.keywords}, f"{path}:{node.lineno}"
