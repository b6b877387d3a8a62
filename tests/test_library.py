"""The ops as citizens of PyTorch: opcheck, torch.compile, autocast, and no double backward."""

from importlib import import_module

import pytest
import torch
from cases import compute_V_inputs, device_of, field_inputs, loss_inputs, points
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._pytree import tree_map

import drift_ops
from drift_ops import Field, cpu
from drift_ops.spec import AffinitySpec, LossSpec, PairSpec

affinity, loss, pairs = (import_module(f"drift_ops.ops.{name}") for name in ("affinity", "loss", "pairs"))
G, N, P, M, D, R_LIST = 2, 4, 5, 3, 6, [0.05, 0.2]


def float32(tensors, backend, grad=True):
    return {name: t.float().to(device_of(backend)).requires_grad_(grad) for name, t in tensors.items()}


def op_samples(backend):
    """Arguments for every op that ``drift_ops.ops`` registers: those of form A and of form B, of one map and of two."""
    tensors = float32(field_inputs(N, P, M, D, (G,), weighted=True), backend)
    q, pos = tensors["x"], tensors["pos"]
    w = torch.cat([q.new_ones(G, N), tensors["weight_neg"], tensors["weight_pos"]], 1).detach().requires_grad_()
    neg = tensors["neg"]
    of_gaussian = AffinitySpec("gaussian", (0.5, 1.0), 0.7).values()
    of_laplace = AffinitySpec("laplace", (0.5, 1.0), floor=1e-6, has_self=True, sides=2).values()
    gaussian = (q, [pos], [pos * 2], None, *of_gaussian, backend)
    laplace = (q, [q, neg, pos], [], w, *of_laplace, backend)
    forward, backward = [], []
    for tensors_in, rest in ((gaussian[:4], gaussian[4:]), (laplace[:4], laplace[4:])):
        tensors_in = tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, tensors_in)
        num, den, *statistics = affinity._affinity_sums(*tensors_in, *rest)
        incoming = [points(*t.shape, seed=seed).to(t) for seed, t in enumerate((num, den))]
        forward.append((*tensors_in, *rest))
        backward.append((*tensors_in, *statistics, *incoming, *rest))

    one = [t.detach().unsqueeze(1) for t in (q, neg, pos)]
    weights = [t.new_ones(t.shape[:3]) for t in one]
    maps, spec = (one + one, weights + weights), (*LossSpec(tuple(R_LIST), 1e-6).values(), backend)
    scale = torch.ones(2, dtype=torch.float64, device=q.device)
    _, kept = loss._loss_scale(*maps, *spec)
    states, moments, _ = loss._loss_moments(*maps, kept, scale, None, *spec)
    factors = scale.new_tensor([[0.7, 1.3], [0.9, 1.1]])
    incoming = [of_map.new_ones(G) for of_map in moments]
    return pair_samples([q, neg, pos], w, backend) | {
        affinity._affinity_sums: forward,
        affinity._affinity_sums_backward: backward,
        loss._loss_scale: [(one, weights, *spec), (*maps, *spec)],
        loss._loss_moments: [(*maps, kept, scale, None, *spec)],
        loss._loss_gradient: [(*maps, states, scale, factors, incoming, *spec)],
    }


def pair_samples(keys, w, backend):
    """Of the sums over pairs, with all that they take and with as little as they can do with."""
    q, *others = keys = [t.detach() for t in keys]
    full, least = PairSpec("l2_sq", True, 2.0, 2, 1e-3), PairSpec("l2")
    width, unit, centre = q.new_tensor([0.5, 1.0]), q.new_tensor([1.0, 2.0]), q[:, 0]
    alpha, beta = (points(2, *t.shape[:2], seed=seed).to(t) for seed, t in enumerate((q, w)))
    num, den = points(2, G, 2, N, D).to(q), points(2, G, 2, N).to(q)
    problem, others = (q, keys, width, unit), (q, others, width, None)
    return {
        pairs._log_sums: [
            (*problem, beta, True, *full.values(), backend),
            (*others, None, False, *least.values(), backend),
        ],
        pairs._weighted_sums: [(*problem, alpha, beta, w.detach(), centre, *full.values(), backend)],
        pairs._pair_gradients: [
            (*problem, alpha, beta, w.detach(), centre, num, den, beta, *full.values(), backend),
            (*others, alpha, beta[:, :, N:], None, None, None, den[:, :, :1], None, *least.values(), backend),
        ],
    }


def test_opcheck(kernel_backend):
    samples = op_samples(kernel_backend)
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("drift_ops::")}
    assert {op._qualname for op in samples} == registered, "an op without samples, or a sample without its op"
    for op, calls in samples.items():
        for arguments in calls:
            opcheck(op, arguments)


FORMS = {
    "compute_V": (drift_ops.compute_V, compute_V_inputs(N, P, M, D, (G,)), {"sigma": 2.0}),
    "compute_V_multiscale": (drift_ops.compute_V_multiscale, compute_V_inputs(N, P, M, D), {"normalize_drift": False}),
    "drift_field": (drift_ops.drift_field, field_inputs(N, P, M, D, (G,), weighted=True), {"temperature": (0.5, 1.0)}),
    "drift_loss": (drift_ops.drift_loss, loss_inputs(N, P, M, D, G, weighted=True), {"R_list": R_LIST}),
    "sinkhorn": (
        drift_ops.drift_field,
        field_inputs(N, P, M, D, (G,)),
        {"temperature": (4.0, 9.0), "field": Field("l2_sq", "sinkhorn", "split", 2, "kernel")},
    ),
    "coupled_loss": (
        drift_ops.drift_loss,
        loss_inputs(N, P, M, D, G),
        {"R_list": R_LIST, "field": Field(coupling="row", sides="split"), "scale": "group", "normalize": "group"},
    ),
}
every_form = pytest.mark.parametrize(("function", "tensors", "options"), FORMS.values(), ids=FORMS)


def step(function, tensors, options):
    """A use in which something happens before and after the op: ``(value, gradients, info)``."""
    result = function(**{name: t * 1.0 for name, t in tensors.items()}, **options)
    output, info = result if isinstance(result, tuple) else (result, {})
    return (output.float().square() + output).sum(), info


def values_and_gradients(call, tensors):
    value, info = call()
    gradients = torch.autograd.grad(value, list(tensors.values()), allow_unused=True)
    return [value.detach(), *info.values(), *(g for g in gradients if g is not None)]


@every_form
def test_compile(backend, function, tensors, options):
    torch._dynamo.reset()
    tensors = float32(tensors, backend)
    options = options | {"backend": backend}
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours = values_and_gradients(lambda: compiled(function, tensors, options), tensors)
    expected = values_and_gradients(lambda: step(function, tensors, options), tensors)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_lists_of_maps(backend):
    torch._dynamo.reset()
    maps = [float32(loss_inputs(N, P, M, D, G), backend), float32(loss_inputs(3, 4, 2, 7, 3), backend)]
    gens = {f"gen{k}": tensors["gen"] for k, tensors in enumerate(maps)}

    def total_loss():
        losses, infos = drift_ops.drift_loss(**{name: [m[name] for m in maps] for name in maps[0]}, backend=backend)
        return sum(loss.mean() for loss in losses), {"scale": sum(info["scale"] for info in infos)}

    compiled = torch.compile(total_loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(values_and_gradients(compiled, gens), values_and_gradients(total_loss, gens), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", ["compute_V", "drift_field", "drift_loss"])
def test_compile_does_not_trace_how_a_backend_is_chosen(monkeypatch, form):
    """Looking at the machine takes calls that dynamo cannot trace."""
    torch._dynamo.reset()
    function, tensors, options = FORMS[form]
    why_not = import_module("drift_ops.backends")._WHY_NOT
    monkeypatch.setitem(why_not, "cpu", lambda: torch._dynamo.graph_break() or cpu.load_error)
    tensors = float32(tensors, "cpu")
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (value, _), (expected, _) = compiled(function, tensors, options), step(function, tensors, options)
    torch.testing.assert_close(value, expected)


def test_compile_with_inductor(kernel_backend):
    """The default compiler; one form, as it is slow and treats all custom ops alike."""
    torch._dynamo.reset()
    function, tensors, options = FORMS["drift_field"]
    tensors, options = float32(tensors, kernel_backend), options | {"backend": kernel_backend}
    compiled = torch.compile(step, fullgraph=True)
    ours = values_and_gradients(lambda: compiled(function, tensors, options), tensors)
    expected = values_and_gradients(lambda: step(function, tensors, options), tensors)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


@every_form
def test_nothing_waits_for_a_value(backend, function, tensors, options):
    """Tensors without values go through: on a GPU, no step makes the host wait."""
    with FakeTensorMode():
        device = device_of(backend)
        fakes = {name: torch.empty(t.shape, device=device, requires_grad=True) for name, t in tensors.items()}
        value, _ = step(function, fakes, options | {"backend": backend})
        torch.autograd.grad(value, list(fakes.values()), allow_unused=True)


@every_form
def test_autocast_changes_nothing(backend, function, tensors, options):
    """Distances and softmaxes stay in float32 where autocast would have matrix products in bfloat16."""
    tensors = float32(tensors, backend)
    options = options | {"backend": backend}
    expected = values_and_gradients(lambda: step(function, tensors, options), tensors)
    with torch.autocast(device_of(backend), dtype=torch.bfloat16):
        inside = step(function, tensors, options)
    for a, b in zip(values_and_gradients(lambda: inside, tensors), expected, strict=True):
        assert torch.equal(a, b)


def test_autocast_features_reach_the_generator(backend):
    """Features in bfloat16 from a layer under autocast: the loss takes them as they come."""
    layer = torch.nn.Linear(D, D, device=device_of(backend))
    tensors = float32(loss_inputs(N, P, 0, D, G), backend, grad=False)
    with torch.autocast(device_of(backend), dtype=torch.bfloat16):
        gen, pos = layer(tensors["gen"]), layer(tensors["fixed_pos"])
        assert gen.dtype == torch.bfloat16
        loss, _ = drift_ops.drift_loss(gen, pos.detach(), backend=backend)
    assert loss.dtype == torch.float32
    loss.mean().backward()
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.any()


@every_form
def test_no_double_backward(kernel_backend, function, tensors, options):
    tensors = float32(tensors, kernel_backend)
    first = next(iter(tensors.values()))
    value, _ = step(function, tensors, options | {"backend": kernel_backend})
    (gradient,) = torch.autograd.grad(value, first, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match="double backward"):
        torch.autograd.grad(gradient.square().sum(), first)
