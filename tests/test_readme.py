"""The Python of README.md runs as printed, but for sizes: a network of one narrow block on 8×8 latents, on the CPU."""

import re
from pathlib import Path

import pytest
import torch

from drifting.hub import sources as pretrained
from drifting.models import MAE, DriftingDiT

README = Path(__file__).parent.parent / "README.md"

SMALLER = [
    (r"DriftingDiT\(num_classes=\d+\)", "DriftingDiT(num_classes=10, img_size=8, embed_dim=32, depth=1, num_heads=2)"),
    (r"img_size=\d+", "img_size=8"),
    (r"num_classes=\d+", "num_classes=10"),
    (r"embed_dim=\d+", "embed_dim=32"),
    (r"depth=\d+", "depth=1"),
    (r"num_heads=\d+", "num_heads=2"),
    (r"randint\(0, \d+,", "randint(0, 10,"),
    (r"""(["'])cuda\1""", "'cpu'"),
]

# What the snippets leave to the reader.
GIVEN = {
    "x_generated": lambda: torch.randn(32, 4, 8, 8, requires_grad=True),
    "x_real": lambda: torch.randn(32, 4, 8, 8),
    "dataloader": lambda: [(torch.randn(64, 4, 8, 8), torch.arange(64) % 10)],
    "num_epochs": lambda: 1,
    "class_labels": lambda: torch.arange(16) % 10,
    "images": lambda: torch.randn(8, 4, 8, 8),
}


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_snippets_run(tmp_path, monkeypatch, capsys):
    """All blocks in order, in one namespace, as a reader would paste them; models of the hub are small ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "load_generator", lambda source: DriftingDiT(8, 2, 4, 100, 32, 1, 2).eval())
    monkeypatch.setattr(pretrained, "load_mae", lambda source: MAE(4, 32, (1, 1, 1, 1), 10).eval())
    namespace = {name: make() for name, make in GIVEN.items()}
    for number, block in enumerate(python_blocks(), 1):
        for pattern, replacement in SMALLER:
            block = re.sub(pattern, replacement, block)
        exec(compile(block, f"README.md, Python block {number}:\n{block}", "exec"), namespace)
    assert namespace["loss"].requires_grad and namespace["loss"].isfinite()
    assert namespace["latents"].shape == (4, 4, 8, 8)
    assert all(len(activation) == 4 for activation in namespace["activations"].values())
    assert namespace["samples"].shape == (16, 4, 8, 8)
    assert re.search(r"Epoch 0: Loss = \d+\.\d+", capsys.readouterr().out)


NAMES = ["DriftingDiT(", "model.generate(", "DriftingLoss(", "create_trainer(", ".train_epoch(", "trainer.generate("]


@pytest.mark.parametrize("call", NAMES)
def test_snippets_show(call):
    assert any(call in block for block in python_blocks())
