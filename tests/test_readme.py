"""The Python of README.md and of pages under docs/ runs as printed, but for sizes and numbers of steps, on the CPU."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import drifting
from drifting.generation import Generator
from drifting.hub.exporting import export
from drifting.models import MAE, DriftingDiT, ResidualMLP

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
SMALLER = [
    (r"DriftingDiT\(num_classes=\d+\)", "DriftingDiT(num_classes=10, img_size=8, embed_dim=32, depth=1, num_heads=2)"),
    (r"img_size=\d+", "img_size=8"),
    (r"num_classes=1000", "num_classes=10"),
    (r"embed_dim=\d+", "embed_dim=32"),
    (r"depth=\d+", "depth=1"),
    (r"num_heads=\d+", "num_heads=2"),
    (r"randint\(0, \d+,", "randint(0, 10,"),
    (r"(gen|pos)_per_label=\d+", r"\1_per_label=16"),
    (r"for epoch in range\(\d+\)", "for epoch in range(1)"),
    (r"train\.steps=\d+", "train.steps=2"),
    (r"""(["'])cuda\1""", "'cpu'"),
]

# What the snippets leave to the reader.
GIVEN = {
    "x_generated": lambda: torch.randn(32, 4, 8, 8, requires_grad=True),
    "x_real": lambda: torch.randn(32, 4, 8, 8),
    "dataloader": lambda: [(torch.randn(64, 4, 8, 8), torch.arange(64) % 10)],
    "num_epochs": lambda: 1,
    "class_labels": lambda: torch.arange(16) % 10,
    "model": lambda: DriftingDiT(8, 2, 4, 10, 32, 1, 2),
    "images": lambda: torch.randn(8, 4, 8, 8),
    "labels": lambda: torch.arange(8),
}


def blocks(page: str, language: str) -> list[str]:
    """The blocks of that language, smaller than printed."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    for pattern, replacement in SMALLER:
        found = [re.sub(pattern, replacement, block) for block in found]
    return found


@pytest.fixture
def run_page(tmp_path, monkeypatch):
    """A function that runs all Python blocks of a page in order, as a reader would paste them into one session.

    A block whose first line names a file is saved under that name instead. The function returns the session's names.
    """
    monkeypatch.chdir(tmp_path)

    def run(page: str) -> dict:
        namespace = {"__name__": "__main__"} | {name: make() for name, make in GIVEN.items()}
        for number, block in enumerate(blocks(page, "python"), 1):
            if named := re.match(r"# (\w+\.py)\n", block):
                Path(named[1]).write_text(block, encoding="utf-8")
            else:
                exec(compile(block, f"{page}, Python block {number}:\n{block}", "exec"), namespace)
        return namespace

    return run


def test_readme_runs(run_page, capsys):
    names = run_page("README.md")
    assert names["loss"].requires_grad and names["loss"].isfinite()
    assert names["samples"].shape == (16, 4, 8, 8)
    assert names["drawn"].shape == (500, 2)
    assert Path("runs/points/model.safetensors").is_file()
    assert re.search(r"Epoch 0: Loss = \d+\.\d+", capsys.readouterr().out)


NAMES = ["DriftingDiT(", "model.generate(", "DriftingLoss(", "create_trainer(", ".train_epoch(", "trainer.generate("]


@pytest.mark.parametrize("call", NAMES)
def test_readme_shows(call):
    assert any(call in block for block in blocks("README.md", "python"))


@pytest.mark.parametrize("page", ["docs/operator.md", "docs/scaling.md", "docs/fields.md"])
def test_page_runs(run_page, page):
    run_page(page)


def test_release_runs(run_page, monkeypatch):
    """The models of the hub are small ones here."""
    monkeypatch.setattr(drifting, "load_generator", lambda source: DriftingDiT(8, 2, 4, 100, 32, 1, 2).eval())
    monkeypatch.setattr(drifting, "load_mae", lambda source: MAE(4, 32, (1, 1, 1, 1), 10).eval())
    names = run_page("docs/release.md")
    assert names["latents"].shape == (4, 4, 8, 8)
    assert all(len(activation) == 4 for activation in names["activations"].values())


def test_export_runs(run_page):
    """The page's programs run what its commands wrote, here of an untrained network of the same shapes."""
    pytest.importorskip("onnxscript")
    model = ResidualMLP([1, 8, 8], 10, width=16, depth=1).eval()
    generator = Generator(model, model.noise_shape, (1, 8, 8), tuple("0123456789"), (-1.0, 1.0))
    for name, kind in (("model.onnx", "onnx"), ("model.pt2", "torch")):
        export(generator, Path(name), kind, torch.float32, {})
    assert run_page("docs/export.md")["images"].shape == (10, 1, 8, 8)


def test_your_own_runs(run_page, tmp_path, monkeypatch):
    """The scripts run, then the commands of the page with the parts that it defines."""
    monkeypatch.syspath_prepend(tmp_path)  # It is taken away again, with what the commands add.
    names = run_page("docs/your_own.md")
    assert names["again"].generate(3).shape == (3, 2)
    assert names["drawn"].shape == (500, 32, 3)
    (commands,) = blocks("docs/your_own.md", "bash")
    try:
        for command in commands.replace("\\\n", "").splitlines():
            python, option, module, *arguments = shlex.split(command)
            assert (python, option) == ("python", "-m")
            assert importlib.import_module(module).main(arguments) == 0
    finally:
        sys.modules.pop("own_parts", None)
    assert Path("stripes.png").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:\s]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / page).parent.joinpath(target).exists(), target
