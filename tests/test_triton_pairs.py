"""The Triton sums over pairs, interpreted: ``TRITON_INTERPRET=1 python -m pytest tests/test_triton_pairs.py``."""

import pytest
import torch
from cases import INTERPRETED, check, field_inputs, transposed, unaligned
from pair_cases import CASES, check_pairs, converted, inputs, results

import drift_ops
from drift_ops import Field

pytest.importorskip("triton")

from drift_ops import triton  # noqa: E402
from drift_ops.triton.affinity import blocks  # noqa: E402
from drift_ops.triton.pairs import log_sum_exps  # noqa: E402

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles, rectangles, parts of walks and chunks of dimensions even in small problems."""
    monkeypatch.setattr(blocks, "LARGEST_BLOCK", 16)
    monkeypatch.setattr(blocks, "PROGRAMS", 6)
    monkeypatch.setattr(log_sum_exps, "WIDTHS_OF_PROGRAM", 2)


@pytest.mark.parametrize("name", CASES)
def test_pairs(name):
    check_pairs(triton, CASES[name], torch.float32, transposed if name == "squares" else unaligned, DEVICE)


def test_the_same_every_time():
    case = CASES["squares"]
    given = converted(inputs(case), lambda t: t.float().to(DEVICE))
    first, second = (results(triton, case.spec, given, lambda t: t) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("coupling", ["row", "two_sided", "sinkhorn"])
@pytest.mark.parametrize("sides", ["joint", "split"])
def test_drift_field(coupling, sides):
    field = Field("l2_sq", coupling, sides, 2, "kernel", mask_self=0.5, affinity_floor=1e-4)
    tensors = field_inputs(5, 6, 4, 3, weighted=True) | {"temperature": torch.tensor([2.0, 5.0], dtype=torch.float64)}
    tensors |= {name: tensors[name] + 0.1 for name in ("weight_pos", "weight_neg")}
    check(drift_ops.drift_field, tensors, {"field": field}, torch.float32, "triton")
