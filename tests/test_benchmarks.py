"""What is timed against each other computes the same thing."""

from pathlib import Path

import pytest


@pytest.mark.parametrize("shape", [{"N": 40, "P": 30, "D": 5}, {"N": 64, "P": 64, "D": 130}])
@pytest.mark.parametrize("form", ["compute_V", "drift_field", "drift_loss"])
def test_dense_equals_ours(monkeypatch, form, shape):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent)
    from benchmarks.cases import Case

    contenders = Case(form, **shape, G=3 if form == "drift_loss" else 1).contenders()
    for dense, ours in zip(contenders["eager"](), contenders["ours"](), strict=True):
        assert (dense - ours).norm() < 1e-4 * dense.norm()
