"""One large problem never has an N×M tensor in memory, forward or backward; training keeps what it has freed."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import drift_ops

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("form", ["compute_V", "drift_field", "sinkhorn", "drift_loss"])
def test_large_problem(form):
    """8,192 points a side: a dense matrix takes 256 MB."""
    if not drift_ops.backends()["cpu"].usable:
        pytest.skip(drift_ops.backends()["cpu"].reason)
    command = [sys.executable, "-m", "benchmarks.memory", form, "--points", "8192", "--iterations", "2"]
    result = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert result["dense_matrix_mb"] == 256
    assert 0.5 < result["growth_mb"] < 50  # the gradient of one set of points alone takes 0.5


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives freed memory back at once")
def test_freed_memory_is_kept_for_the_next_step():
    """Without that, most runs fetch all eight tensors of a step again, 49,152 pages."""
    script = """if True:
        import ctypes, resource, torch
        from drifting.utils.memory import keep_freed_memory
        ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page counts as one fault, if there is one
        keep_freed_memory()
        for step in range(8):
            if step == 2:  # The first steps fetch memory in any case.
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            tensors = [torch.ones(6 * 2**20) for _ in range(8)]  # 24 MB each: more than glibc keeps by itself
            del tensors
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.1 * 6144  # One of them may have found no place between others.
