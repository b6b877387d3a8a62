"""The operator among what torch offers: torch.func, inference mode, the meta device, defaults, forks; and in memory."""

import os
import subprocess
import sys

import pytest
import torch
from cases import relative_error

import drift_ops
from drift_ops.spec import AffinitySpec

GEN, POS = torch.randn(3, 5, 8), torch.randn(3, 6, 8)
FORMS = {
    "compute_V": lambda x, pos, **options: drift_ops.compute_V(x, pos, pos[..., 1:, :], **options),
    "drift_field": lambda x, pos, **options: drift_ops.drift_field(x, pos, temperature=1.0, **options),
    "sinkhorn": lambda x, pos, **options: drift_ops.drift_field(
        x, pos, temperature=9.0, field=drift_ops.Field("l2_sq", "sinkhorn", "split", 2, "kernel"), **options
    ),
    "drift_loss": lambda x, pos, **options: drift_ops.drift_loss(x, pos, **options)[0],
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def jacobian(form, x):
    """``∂ form(x) / ∂ x``, an output at a time."""
    x = x.clone().requires_grad_()
    result = form(x, POS)
    rows = [torch.autograd.grad(entry, x, retain_graph=True)[0] for entry in result.flatten()]
    return torch.stack(rows).view(*result.shape, *x.shape)


@every_form
def test_transforms_of_torch_func(form):
    expected = jacobian(form, GEN)
    torch.testing.assert_close(torch.func.jacrev(form)(GEN, POS), expected)
    grad = torch.func.grad(lambda x: form(x, POS).sum())(GEN)
    torch.testing.assert_close(grad, expected.flatten(0, -GEN.dim() - 1).sum(0))
    with pytest.raises(NotImplementedError, match="no double backward"):
        torch.func.grad(lambda x: torch.func.grad(lambda y: form(y, POS).square().sum())(x).sum())(GEN)


@every_form
def test_vmap(form):
    x, pos = GEN.unsqueeze(1), POS.unsqueeze(1)
    expected = torch.stack([form(a, b) for a, b in zip(x, pos, strict=True)])
    torch.testing.assert_close(torch.func.vmap(form)(x, pos), expected, rtol=1e-6, atol=1e-6)


@every_form
def test_constants_of_inference_mode(form):
    with torch.inference_mode():
        constant = POS.clone()
        inside = form(GEN, constant)
    x = GEN.clone().requires_grad_()
    outside = form(x, constant)
    assert torch.equal(inside, outside)
    torch.autograd.grad(outside.sum(), x)


@every_form
def test_meta_tensors_tell_shapes(form):
    result = form(GEN.to("meta"), POS.to("meta"))
    assert result.device.type == "meta" and result.shape == form(GEN, POS).shape


@every_form
def test_defaults_of_torch_change_nothing(form):
    expected = form(GEN, POS)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        results = [form(GEN, POS), form(GEN, POS, backend="reference")]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(results[0], expected) and relative_error(results[1], expected) < 1e-5


IN_A_FORK = """
import os, torch, drift_ops
torch.set_num_threads(2)
x, y, maps = torch.randn(1024, 64, requires_grad=True), torch.randn(1024, 64), torch.randn(64, 64, 64)
def every_form():
    V = drift_ops.drift_field(x, y, temperature=8.0) + drift_ops.compute_V(x, y, x, normalize_drift=False)
    return torch.cat([drift_ops.drift_loss(maps, maps)[0], V.flatten(), *torch.autograd.grad(V.sum(), x)[0]]).detach()
expected = every_form()
if (child := os.fork()) == 0:
    os._exit(0 if torch.allclose(every_form(), expected, rtol=1e-3, atol=1e-3) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@every_form
def test_subnormal_numbers_are_flushed_within_only(form):
    form(GEN, POS)
    assert float(torch.tensor([1e-39]) * 1) > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
def test_a_forked_process_does_not_wait_for_threads_it_lacks():
    subprocess.run([sys.executable, "-c", IN_A_FORK], check=True, timeout=60, env=os.environ | {"OMP_NUM_THREADS": "2"})


def test_an_unknown_logit_is_told():
    with pytest.raises(ValueError, match="logit: got 'cauchy', expected one of 'laplace', 'gaussian'"):
        AffinitySpec("cauchy", (1.0,))


GROWTH = """
import resource, torch, drift_ops
gen, pos = torch.randn(1, 6000, 8, requires_grad=True), torch.randn(1, 6000, 8)
drift_ops.drift_loss(gen[:, :64], pos[:, :64])[0].sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
drift_ops.drift_loss(gen, pos)[0].sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_large_groups_are_streamed():
    """A matrix of samples and targets has 288 MB."""
    done = subprocess.run([sys.executable, "-c", GROWTH], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 60


@pytest.mark.parametrize("distances", [0.01, 30.0])
def test_large_loss_agrees_with_small_ones(distances):
    """Over what is streamed; with far-apart logits, too, whose statistics take another path."""
    gen, pos = distances * torch.randn(1, 400, 3), torch.randn(1, 500, 3)
    gen[0, 0] = 1000.0
    gen.requires_grad_()
    results = {}
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        loss, info = drift_ops.drift_loss(gen.to(dtype), pos.to(dtype), affinity_floor=0.0, backend=backend)
        results[backend] = loss.detach(), info["loss_0.02"], torch.autograd.grad(loss.sum(), gen)[0]
    for ours, exact in zip(results["cpu"], results["reference"], strict=True):
        assert relative_error(ours, exact) < 2e-4
