"""Derivatives of the fields against finite differences, and who gets a gradient from the loss."""

import pytest
import torch
from cases import compute_V_inputs, device_of, field_inputs, loss_inputs, relative_error
from torch.autograd import gradcheck

import drift_ops


@pytest.fixture
def backend(float64_backend):
    return float64_backend


def leaves(tensors, backend):
    return {name: t.to(device_of(backend)).requires_grad_() for name, t in tensors.items()}


def check_derivatives(function, inputs):
    def of_tensors(*tensors):
        return function(**dict(zip(inputs, tensors, strict=True)))

    assert gradcheck(of_tensors, tuple(inputs.values()), atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("normalize_features", [True, False])
@pytest.mark.parametrize("normalize_drift", [True, False])
@pytest.mark.parametrize("sigmas", [(1.3,), (0.5, 2.0)])
def test_compute_V(backend, sigmas, normalize_features, normalize_drift):
    options = {
        "sigmas": sigmas, "temperature": 0.5, "backend": backend,
        "normalize_features": normalize_features, "normalize_drift": normalize_drift,
    }  # fmt: skip
    inputs = leaves(compute_V_inputs(4, 5, 3, 3), backend)
    check_derivatives(lambda **tensors: drift_ops.compute_V_multiscale(**tensors, **options), inputs)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("temperature", [0.7, (0.4, 2.0)])
@pytest.mark.parametrize(("M", "include_self"), [(3, True), (3, False), (0, True)])
def test_drift_field(backend, M, include_self, temperature, weighted):
    options = {"include_self": include_self, "temperature": temperature, "backend": backend}
    inputs = leaves(field_inputs(4, 5, M, 3, weighted=weighted), backend)
    check_derivatives(lambda **tensors: drift_ops.drift_field(**tensors, **options), inputs)


def test_drift_field_with_floor(backend):
    """About half of the affinities lie on the floor, where they are constants."""
    inputs = leaves(field_inputs(4, 5, 3, 3, weighted=True), backend)
    options = {"temperature": 0.7, "affinity_floor": 0.02, "backend": backend}
    check_derivatives(lambda **tensors: drift_ops.drift_field(**tensors, **options), inputs)


@pytest.mark.parametrize("groups", [(2,), (2, 1)])
def test_leading_dimensions(backend, groups):
    inputs = leaves(compute_V_inputs(3, 2, 3, 2, groups), backend)
    check_derivatives(lambda **tensors: drift_ops.compute_V(**tensors, backend=backend), inputs)
    inputs = leaves(field_inputs(3, 2, 3, 2, groups, weighted=True), backend)
    options = {"temperature": (0.5, 1.0), "backend": backend}
    check_derivatives(lambda **tensors: drift_ops.drift_field(**tensors, **options), inputs)


@pytest.mark.parametrize("wanted", ["x", "pos", "neg", "weight_pos", "weight_neg"])
def test_one_input_alone(backend, wanted):
    """The gradient of one input does not depend on which others want one; those that do not get none."""
    inputs = leaves(field_inputs(4, 5, 3, 3, weighted=True), backend)
    everything = torch.autograd.grad(
        drift_ops.drift_field(**inputs, temperature=0.7, backend=backend).square().sum(), list(inputs.values())
    )
    alone = {name: t.detach().requires_grad_(name == wanted) for name, t in inputs.items()}
    drift_ops.drift_field(**alone, temperature=0.7, backend=backend).square().sum().backward()
    for (name, t), expected in zip(alone.items(), everything, strict=True):
        if name == wanted:
            torch.testing.assert_close(t.grad, expected, rtol=1e-12, atol=1e-14)
        else:
            assert t.grad is None


@pytest.mark.parametrize(
    "incoming", [lambda V: V.sum(), lambda V: (V.mT @ V).sum(), lambda V: V[..., 1:, ::2].sum()],
    ids=["expanded", "transposed", "sliced"],
)  # fmt: skip
def test_incoming_gradients_of_any_strides(backend, incoming):
    for function, tensors, options in [
        (drift_ops.compute_V, compute_V_inputs(4, 5, 3, 3, (2,)), {}),
        (drift_ops.drift_field, field_inputs(4, 5, 3, 3, (2,)), {"temperature": (0.7, 1.4)}),
    ]:
        ours, expected = (
            torch.autograd.grad(incoming(function(**inputs, **options, backend=b)), list(inputs.values()))
            for b, inputs in ((b, leaves(tensors, b)) for b in (backend, "reference"))
        )
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-10, atol=1e-12)


def test_loss_is_the_squared_force_and_its_gradient_points_along_it(backend):
    """``loss_g = mean(F²)`` and ``∂loss/∂gen = −2F/(N·D·s)``: the two must belong to one F, scaled by each incoming
    gradient. (Finite differences of the loss would see through the stop-gradient.)"""
    G, N, D = 3, 6, 4
    inputs = leaves(loss_inputs(N, 5, 2, D, G, weighted=True), backend)
    loss, info = drift_ops.drift_loss(**inputs, backend=backend)
    s = (info["scale"] / D**0.5).clamp(min=1e-3)
    (gradient,) = torch.autograd.grad(loss.sum(), inputs["gen"], retain_graph=True)
    F = -gradient * N * D * s / 2
    assert relative_error(loss.detach(), F.square().mean((1, 2))) < 1e-12
    incoming = torch.tensor([0.0, 1.0, -2.5], dtype=loss.dtype, device=loss.device)
    (scaled,) = torch.autograd.grad(loss, inputs["gen"], incoming)
    assert relative_error(scaled, gradient * incoming.view(-1, 1, 1)) < 1e-12


def test_loss_gives_a_gradient_to_gen_alone(backend):
    inputs = leaves(loss_inputs(6, 5, 2, 4, 2, weighted=True), backend)
    loss, info = drift_ops.drift_loss(**inputs, backend=backend)
    assert not any(value.requires_grad for value in info.values())
    loss.sum().backward()
    assert {name for name, t in inputs.items() if t.grad is not None} == {"gen"}
    constant, _ = drift_ops.drift_loss(**{name: t.detach() for name, t in inputs.items()}, backend=backend)
    assert not constant.requires_grad and torch.equal(constant, loss)
