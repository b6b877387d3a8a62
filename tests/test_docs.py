"""The documentation as a site, and the notebook: both are built as their readers would."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    reference = (tmp_path / "reference" / "drift_ops" / "index.html").read_text(encoding="utf-8")
    for name in ("drift_loss", "drift_field", "compute_V", "Field"):
        assert f'id="drift_ops.{name}"' in reference
    assert "process_group" in reference


def test_the_notebook_runs(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("onnxruntime")
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    few = '"--out", RUN, "train.steps=20", "evaluation.num_samples=50"]'
    shorter = {'"--out", RUN]': few, "range(1000)": "range(3)"}
    for cell in notebook.cells:
        for long, short in shorter.items():
            if cell.cell_type == "code" and long in cell.source:
                cell.source = cell.source.replace(long, short)
    text = "\n".join(cell.source for cell in notebook.cells)
    assert all(short in text for short in shorter.values())
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert (tmp_path / "runs" / "quickstart" / "model.onnx").is_file()
