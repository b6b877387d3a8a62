"""One large problem never has an N×M tensor in memory, forward or backward."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import drift_ops

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("form", ["compute_V", "drift_field"])
def test_large_problem(form):
    """16,384 points a side: a dense matrix takes 1 GB."""
    if not drift_ops.backends()["cpu"].usable:
        pytest.skip(drift_ops.backends()["cpu"].reason)
    command = [sys.executable, "-m", "benchmarks.memory", form, "--points", "16384"]
    result = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert result["dense_matrix_mb"] == 1024
    assert 3 < result["growth_mb"] < 100  # the three gradients alone take 3
