"""The family of fields in drift_loss: values that others computed, and every backend against the reference."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import DENSE_FACTOR, FLOOR, device_of, relative_error

import drift_ops
from drift_ops import Field

FAMILY = sorted((Path(__file__).parent / "golden" / "family").glob("*.npz"))
COUPLINGS = {"partial_two_sided": "two_sided", "row": "row", "sinkhorn": "sinkhorn"}


def load(path: Path, device: torch.device) -> dict:
    with np.load(path) as file:
        return {name: torch.from_numpy(v).to(device) if v.ndim else v.item() for name, v in file.items()}


@pytest.mark.parametrize("path", [p for p in FAMILY if not p.stem.startswith("one")], ids=lambda path: path.stem)
def test_golden_of_reachomk(path, backend):
    """``imagenet/drifting_loss.py`` of reachomk/sinkhorn, in float32."""
    given = load(path, device_of(backend))
    masked, marginal = given["mask_self_neg"], given["sinkhorn_marginal"] != "none"
    field = Field(
        cost=given["dist_metric"],
        coupling=COUPLINGS[given["coupling"]],
        sides="split" if given["drift_form"] == "split" else "joint",
        iterations=given["sinkhorn_iters"],
        weights="marginal" if marginal else "kernel",
        mask_self=masked,
    )
    gen = given["x"].requires_grad_()
    weights = [torch.full_like(gen[..., 0], 1.0), torch.full_like(given["neg"][..., 0], given["weight_neg"])]
    loss, info = drift_ops.drift_loss(
        gen,
        given["pos"],
        given["neg"],
        None,
        None,
        weights[1],
        given["R_list"].tolist(),
        field=field,
        scale_self_pairs=not masked,
        backend=backend,
    )
    loss.mean().backward()
    assert loss.mean().item() == pytest.approx(given["loss"], rel=1e-4)
    assert relative_error(gen.grad, given["grad"]) < 1e-4


@pytest.mark.parametrize("path", [p for p in FAMILY if p.stem.startswith("one")], ids=lambda path: path.stem)
def test_golden_of_one_positive(path, float64_backend):
    """``training/modules/samplers.py`` of kyutai-labs/pocket-tts, in float64."""
    given = load(path, device_of(float64_backend))
    R = torch.tensor([given["temperature"]], dtype=torch.float64, requires_grad=True)
    gen = given["x"].requires_grad_()
    arguments = {
        "R_list": R,
        "field": Field(mask_self=100.0, affinity_floor=1e-6),
        "scale_self_pairs": False,
        "normalize": {"batch": "group_mean", "True": "group", "False": None}[given["normalize"]],
        "backend": float64_backend,
    }
    loss, info = drift_ops.drift_loss(gen, given["pos"], scale="group", **arguments)
    loss.sum().backward()
    # 2e-6, because their scale counts a cost of 1e-4 for the pairs of a sample with itself.
    assert relative_error(info["scale"], given["scale"]) < 2e-6
    assert relative_error(loss.detach(), given["loss"]) < 2e-6
    assert relative_error(gen.grad, given["grad"]) < 2e-6
    assert relative_error(info["log_mass"][0].detach(), given["log_mass"] - np.log(gen.shape[1])) < 2e-6
    _, info = drift_ops.drift_loss(gen, given["pos"], scale=given["scale"], **arguments)
    (-info["log_mass"].amax(-1).mean()).backward()
    assert R.grad.item() == pytest.approx(given["grad_temperature"], rel=1e-9)


FIELDS = [
    Field(cost, coupling, sides, iterations, weights, include_self, mask_self, floor)
    for (coupling, iterations, weights), sides in itertools.product(
        [
            ("row", 1, "kernel"),
            ("row", 1, "affinity"),
            ("two_sided", 1, "kernel"),
            ("two_sided", 1, "affinity"),
            ("sinkhorn", 1, "kernel"),
            ("sinkhorn", 7, "marginal"),
        ],
        ("joint", "split"),
    )
    for cost, include_self, mask_self, floor in (
        ("l2", True, True, 1e-3),
        ("l2_sq", True, False, 0.0),
        ("l2", True, 2.0, 0.0),
        ("l2_sq", False, True, 0.0),
    )
]
CHOICES = itertools.product(("group", "global", "given"), ("group_mean", None, "global", "group"), (True, False))


# Logarithms, and the means of differences of numbers above 1, are judged by their absolute errors where they are small.
SMALL = ("log_row_sums", "log_mass", "residual", "grad_R")


def check(
    field: Field, backend: str, counts, D, options, R_list, far=1.0, dtype=torch.float64, offset=0.0, largest_logit=0.0
) -> None:
    """Loss, gradient and info of random groups against the reference in float64. Kernels that have a potential
    in one number may err by the rounding of ``largest_logit``; of forces that then cancel in ``dtype``, as the
    reference in ``dtype`` shows, nothing is left to compare."""
    G, N, M, P = counts
    torch.manual_seed(1)
    gen, neg, pos = ((far * torch.randn(G, n, D, dtype=torch.float64) + offset).to(dtype) for n in (N, M, P))
    weights = [(torch.rand(G, n, dtype=torch.float64) + 0.2).to(dtype) for n in (N, P, M)]
    if field.weights == "kernel":
        weights[1][0, 1:2] = weights[2][-1, 1] = 0.0
    weights[0] = weights[0] if field.include_self else None
    results = []
    for of_backend, of_dtype in ((backend, dtype), ("reference", torch.float64), ("reference", dtype)):
        device = device_of(of_backend)
        given = [None if t is None else t.to(device, of_dtype, copy=True) for t in (gen, pos, neg, *weights)]
        given[0].requires_grad_()
        R = torch.tensor(R_list, dtype=torch.float64, requires_grad=True)
        loss, info = drift_ops.drift_loss(*given, R, field=field, backend=of_backend, **options)
        incoming = torch.linspace(0.5, 2.0, G, dtype=loss.dtype, device=device)
        mass = info["log_mass"].clamp(min=-1e4)
        (loss * incoming).sum().add(mass.mean()).backward()
        found = {"loss": loss, "grad": given[0].grad, "grad_R": R.grad, **info}
        found = {name: value.detach().to("cpu", torch.float64) for name, value in found.items()}
        results.append(found | {name: 1.0 + found[name] for name in SMALL if name in found})
    ours, truth, dense = results
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        if not expected.any():
            assert not ours[name].any(), name
            continue
        of_dense, rounding = relative_error(dense[name], expected), torch.finfo(dtype).eps * largest_logit
        assert ours[name].isfinite().all(), name
        if not rounding or of_dense < 1e-3:
            assert relative_error(ours[name], expected) <= max(FLOOR[dtype], DENSE_FACTOR * of_dense, rounding), name


@pytest.mark.parametrize(("field", "choice"), list(zip(FIELDS, itertools.cycle(CHOICES))), ids=str)
def test_groups(field, choice, kernel_backend):
    scale, normalize, scale_self_pairs = choice
    if scale == "given":
        scale = 5.0 if field.cost == "l2" else 50.0
    options = {"scale": scale, "normalize": normalize, "scale_self_pairs": scale_self_pairs}
    for dtype in (torch.float64, torch.float32):
        if kernel_backend == "triton" and dtype == torch.float64:
            continue
        check(field, kernel_backend, (3, 18, 3, 21), 5, options, [0.2, 1.0], dtype=dtype)
        check(field, kernel_backend, (2, 7, 2, 1), 40, options, [0.2, 0.5], dtype=dtype)


@pytest.mark.parametrize("field", FIELDS, ids=str)
def test_logits_far_apart(field, kernel_backend):
    """Widths so small that exponentials of most pairs are 0, and some columns have nothing near."""
    dtype, largest = torch.float64, 0.0
    if kernel_backend == "triton":
        dtype, largest = torch.float32, (40.0 if field.cost == "l2" else 40.0**2) / 0.02  # No two points are 40 apart.
    check(field, kernel_backend, (2, 9, 3, 8), 3, {"scale": 1.0}, [0.02, 0.3], 8.0, dtype, largest_logit=largest)


def test_goldens_are_there():
    assert len(FAMILY) == 41


POINTS = {"gen": torch.zeros(2, 3, 4), "fixed_pos": torch.zeros(2, 5, 4), "fixed_neg": torch.zeros(2, 1, 4)}
NOTHING = torch.tensor([[1.0], [0.0]])
WRONG = [
    (lambda: Field(coupling="sinkhorn"), "weights: got 'affinity' with coupling='sinkhorn'"),
    (lambda: Field(weights="marginal"), "weights: got 'marginal' with coupling='two_sided'"),
    (lambda: Field(coupling="rows"), "coupling: got 'rows', expected one of 'row'"),
    (lambda: Field(coupling="sinkhorn", weights="kernel", iterations=0), "iterations: got 0, expected at least 1"),
    (lambda: Field(iterations=2.0), "iterations: got 2.0"),
    (lambda: Field(mask_self=-1.0), "mask_self: got -1.0"),
    (lambda: Field(affinity_floor=1.0), "affinity_floor: got 1.0"),
    (lambda: drift_ops.drift_loss(**POINTS, field="row"), "field: got str"),
    (
        lambda: drift_ops.drift_loss(**POINTS, field=Field(), affinity_floor=0.1),
        "affinity_floor: got 0.1 beside a field",
    ),
    (lambda: drift_ops.drift_loss(**POINTS, scale="groups"), "scale: got 'groups', expected one of 'global', 'group'"),
    (lambda: drift_ops.drift_loss(**POINTS, scale=-1.0), "scale"),
    (lambda: drift_ops.drift_loss(**POINTS, scale=torch.ones(3)), "scale"),
    (lambda: drift_ops.drift_loss(**POINTS, normalize="none"), "normalize: got 'none'"),
    (lambda: drift_ops.drift_loss(**POINTS, scale_self_pairs=1), "scale_self_pairs: got 1"),
    (lambda: drift_ops.drift_loss(**POINTS, R_list=torch.tensor([0.1, -1.0])), "R_list: got"),
    (lambda: drift_ops.drift_loss(**POINTS, R_list=torch.ones(1, 2)), "R_list: got shape"),
    (
        lambda: drift_ops.drift_loss(POINTS["gen"], POINTS["fixed_pos"], field=Field(include_self=False)),
        "fixed_neg: got no negatives with include_self=False",
    ),
    (
        lambda: drift_ops.drift_loss(**POINTS, weight_gen=torch.ones(2, 3), field=Field(include_self=False)),
        "weight_gen: got weights, but samples are no targets",
    ),
    (
        lambda: drift_ops.drift_loss(
            **POINTS, weight_neg=NOTHING, field=Field(coupling="sinkhorn", weights="marginal")
        ),
        "weight_neg: got a weight that is not above 0 with weights='marginal'",
    ),
    (
        lambda: drift_ops.drift_loss(**POINTS, weight_neg=-NOTHING, field=Field(weights="kernel")),
        "weight_neg: got a negative weight with weights='kernel'",
    ),
    (
        lambda: drift_ops.drift_field(
            POINTS["gen"], POINTS["fixed_pos"], temperature=1.0, field=Field(), include_self=False
        ),
        "include_self: got False beside a field",
    ),
    (
        lambda: drift_ops.drift_field(POINTS["gen"], POINTS["fixed_pos"], temperature=torch.tensor(0.0)),
        "temperature: got 0.0",
    ),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_does_not_go_together_is_told(call, message):
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert str(error.value).startswith(message), error.value
    assert "\n" not in str(error.value)


def test_true_and_one_are_not_the_same_mask(backend):
    """A cache that took them for one key would give the loss of the other."""
    points = [t.to(device_of(backend)) for t in (torch.randn(2, 6, 3), torch.randn(2, 5, 3))]
    masked, moved = (
        drift_ops.drift_loss(*points, field=Field(mask_self=mask), backend=backend)[0] for mask in (True, 1.0)
    )
    assert not torch.allclose(masked, moved)
