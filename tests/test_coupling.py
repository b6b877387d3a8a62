"""The family composed of streamed sums over pairs, against its dense definition in float64."""

import itertools

import pytest
import torch
from cases import relative_error

from drift_ops import Field, reference
from drift_ops.coupling import Problem, drifting_field
from drift_ops.ops import DifferentiableSums

F64 = torch.float64
COUPLINGS = [("row", "kernel"), ("row", "affinity"), ("two_sided", "kernel"), ("two_sided", "affinity")]
COUPLINGS += [("sinkhorn", "kernel"), ("sinkhorn", "marginal")]
FIELDS = [
    Field(cost, coupling, sides, 3, weights, include_self, mask_self, floor)
    for (coupling, weights), cost, sides in itertools.product(COUPLINGS, ("l2", "l2_sq"), ("joint", "split"))
    for include_self, mask_self, floor in ((True, True, 0.0), (True, False, 1e-3), (True, 2.0, 0.0), (False, True, 0.0))
]


def make(field: Field, G: int = 2, N: int = 5, M: int = 4, P: int = 6, D: int = 3) -> list[torch.Tensor]:
    """x, pos, neg, weights of neg and pos."""
    torch.manual_seed(0)
    points = [torch.randn(G, n, D, dtype=F64) for n in (N, P, M)]
    weights = [torch.rand(G, n, dtype=F64) + 0.5 for n in (M, P)]
    if field.weights == "kernel":
        weights[0][0, 1] = weights[1][1, 2] = 0.0
    return [t.requires_grad_() for t in (*points, *weights, torch.tensor([0.7, 2.0], dtype=F64))]


@pytest.mark.parametrize("field", FIELDS, ids=str)
def test_composed(field, float64_backend):
    sums = DifferentiableSums(float64_backend)
    x, pos, neg, w_neg, w_pos, width = inputs = make(field)
    V, _, _ = drifting_field(Problem(x, neg, pos, None, w_neg, w_pos, width, None, field, sums))
    expected = reference.drift_field(x, pos, neg, width, w_pos, w_neg, field)
    assert relative_error(V.detach(), expected.detach()) < 1e-10
    incoming = torch.randn_like(V)
    if field.weights == "kernel":  # where a weight is 0, its gradient is a constant of no use
        inputs = [x, pos, neg, width]
    for ours, dense in zip(
        torch.autograd.grad(V, inputs, incoming), torch.autograd.grad(expected, inputs, incoming), strict=True
    ):
        assert relative_error(ours, dense) < 1e-9
