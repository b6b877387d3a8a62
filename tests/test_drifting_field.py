"""The description's helper functions: their own values, and that they compose to drift_ops.compute_V."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import drift_ops
from drifting.utils.drifting_field import (
    compute_kernel,
    compute_V,
    compute_V_multiscale,
    drifting_loss,
    softmax_normalize_2d,
)


def test_compute_V_is_the_operator_itself():
    assert compute_V is drift_ops.compute_V and compute_V_multiscale is drift_ops.compute_V_multiscale


def test_kernel_values():
    x, y = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    kernel = compute_kernel(x, y, sigma=5.0, normalize=False)
    torch.testing.assert_close(kernel, torch.tensor([[math.exp(-0.5), 1.0]]))


def test_normalised_kernel_sees_directions_only():
    x, y = torch.randn(4, 3), torch.randn(5, 3)
    torch.testing.assert_close(compute_kernel(x, y), compute_kernel(7 * x, 0.1 * y))
    assert not torch.allclose(compute_kernel(x, y, normalize=False), compute_kernel(7 * x, y, normalize=False))


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 6), m=st.integers(1, 6), temperature=st.floats(0.1, 5))
def test_softmax_normalize_2d(n, m, temperature):
    matrix = torch.randn(n, m, dtype=torch.float64)
    A = softmax_normalize_2d(matrix, temperature)
    product = (matrix / temperature).softmax(0) * (matrix / temperature).softmax(1)
    torch.testing.assert_close(A, product.sqrt() / product.sqrt().sum())
    torch.testing.assert_close(A.sum(), torch.ones((), dtype=torch.float64))


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 6), p=st.integers(1, 6), m=st.integers(1, 6), d=st.integers(1, 4), normalize=st.booleans())
def test_the_pieces_make_compute_V(n, p, m, d, normalize):
    x, data, gen = (torch.randn(count, d, dtype=torch.float64) for count in (n, p, m))

    def weighted_mean(y):
        A = softmax_normalize_2d(compute_kernel(x, y, 0.8, normalize), 0.5)
        return A / (A.sum(-1, keepdim=True) + 1e-8) @ y

    V = compute_V(x, data, gen, 0.8, 0.5, normalize_features=normalize, normalize_drift=False)
    torch.testing.assert_close(V, weighted_mean(data) - weighted_mean(gen), atol=1e-9, rtol=1e-9)


def test_drifting_loss_descends_along_the_field():
    x, V = torch.randn(5, 2, requires_grad=True), torch.randn(5, 2)
    loss = drifting_loss(x, V)
    torch.testing.assert_close(loss, V.square().mean())
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(gradient, -2 * V / V.numel())
    torch.testing.assert_close(drifting_loss(x, V, x + V), loss)
