"""Every backend against the reference: dtypes, shapes, strides, extreme values, and what must not happen."""

import pytest
import torch
from cases import (
    DTYPES,
    check,
    compute_V_inputs,
    device_of,
    every_other,
    field_inputs,
    loss_inputs,
    padded,
    points,
    run,
    skip_unless_served,
    transposed,
    unaligned,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import drift_ops
from drift_ops import Field

COUNTS = st.sampled_from([1, 2, 3, 5, 17, 64, 100, 129, 300])
DIMS = st.sampled_from([1, 2, 3, 5, 8, 16, 17, 33, 64, 100, 129, 640, 1025])
GROUPS = st.sampled_from([(), (1,), (3,), (2, 3)])
MULTIPLY_ADDS = 1e6  # of one distance matrix; above it an example is dropped, to keep the dense truth quick

property_test = settings(
    max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)  # fmt: skip


def assume_quick(groups: tuple[int, ...], N: int, P: int, M: int, D: int) -> None:
    assume(torch.Size(groups).numel() * N * (N + P + M) * D < MULTIPLY_ADDS)


@property_test
@given(
    N=COUNTS, P=COUNTS, M=COUNTS, D=DIMS, groups=GROUPS, dtype=st.sampled_from(DTYPES),
    sigmas=st.sampled_from([(1.0,), (0.3, 2.0)]), temperature=st.sampled_from([0.1, 1.0]),
    normalize_features=st.booleans(), normalize_drift=st.booleans(),
)  # fmt: skip
def test_compute_V(
    kernel_backend, N, P, M, D, groups, dtype, sigmas, temperature, normalize_features, normalize_drift
):  # fmt: skip
    assume_quick(groups, N, P, M, D)
    assume(D > 1 or not normalize_drift)  # numbers of norm 1 have no gradient: nothing but roundings to compare
    options = {
        "sigmas": [s * D**0.5 for s in sigmas],  # distances grow with √D
        "temperature": temperature,
        "normalize_features": normalize_features,
        "normalize_drift": normalize_drift,
    }
    check(drift_ops.compute_V_multiscale, compute_V_inputs(N, P, M, D, groups), options, dtype, kernel_backend)


@property_test
@given(
    N=COUNTS, P=COUNTS, M=COUNTS | st.just(0), D=DIMS, groups=GROUPS, dtype=st.sampled_from(DTYPES),
    temperatures=st.sampled_from([0.2, [0.2], [0.05, 0.2, 1.0]]), weighted=st.booleans(), include_self=st.booleans(),
    affinity_floor=st.sampled_from([0.0, 1e-6]),
)  # fmt: skip
def test_drift_field(
    kernel_backend, N, P, M, D, groups, dtype, temperatures, weighted, include_self, affinity_floor
):  # fmt: skip
    assume_quick(groups, N, P, M, D)
    assume(include_self or M > 0)
    scaled = temperatures * D**0.5 if isinstance(temperatures, float) else [T * D**0.5 for T in temperatures]
    options = {"temperature": scaled, "include_self": include_self, "affinity_floor": affinity_floor}
    check(drift_ops.drift_field, field_inputs(N, P, M, D, groups, weighted), options, dtype, kernel_backend)


@property_test
@given(
    N=COUNTS, P=COUNTS, M=COUNTS | st.just(0), D=DIMS, G=st.sampled_from([1, 2, 5]), dtype=st.sampled_from(DTYPES),
    weighted=st.booleans(), R_list=st.sampled_from([(0.2,), (0.02, 0.05, 0.2)]),
    affinity_floor=st.sampled_from([1e-6, 0.0]),
)  # fmt: skip
def test_drift_loss(kernel_backend, N, P, M, D, G, dtype, weighted, R_list, affinity_floor):
    assume_quick((G,), N, P, M, D)
    options = {"R_list": R_list, "affinity_floor": affinity_floor}
    check(drift_ops.drift_loss, loss_inputs(N, P, M, D, G, weighted), options, dtype, kernel_backend)


# One problem too large for a tile that stays in cache.


def test_large_compute_V(kernel_backend):
    tensors, options = compute_V_inputs(1500, 1700, 900, 7), {"sigma": 2.0, "temperature": 0.2}
    check(drift_ops.compute_V, tensors, options, torch.float32, kernel_backend)


def test_large_drift_field(kernel_backend):
    tensors, options = field_inputs(1500, 1700, 900, 7, weighted=True), {"temperature": (0.3, 2.0)}
    check(drift_ops.drift_field, tensors, options, torch.float32, kernel_backend)


def test_large_drift_loss(kernel_backend):
    check(drift_ops.drift_loss, loss_inputs(1500, 1700, 900, 7, G=1, weighted=True), {}, torch.float32, kernel_backend)


FORMS = {
    "compute_V": (drift_ops.compute_V, compute_V_inputs(6, 5, 7, 10, (2,)), {"sigma": 3.0}),
    "drift_field": (drift_ops.drift_field, field_inputs(6, 5, 7, 10, (2,), weighted=True), {"temperature": 1.0}),
    "drift_loss": (drift_ops.drift_loss, loss_inputs(6, 5, 7, 10, 2, weighted=True), {}),
    "compute_V large": (drift_ops.compute_V, compute_V_inputs(260, 220, 240, 3, (2,)), {"sigma": 0.5}),
    "drift_field large": (drift_ops.drift_field, field_inputs(260, 220, 240, 3, (2,)), {"temperature": 0.5}),
    "drift_loss large": (drift_ops.drift_loss, loss_inputs(260, 220, 240, 3, 2), {}),
    "coupled loss": (
        drift_ops.drift_loss,
        loss_inputs(6, 5, 7, 10, 2, weighted=True),
        {"field": Field("l2_sq", "sinkhorn", "split", 5, "kernel"), "scale": "group", "normalize": "group_mean"},
    ),
    "coupled loss large": (
        drift_ops.drift_loss,
        loss_inputs(260, 220, 240, 3, 2, weighted=True),
        {"field": Field(coupling="two_sided", sides="split", weights="kernel"), "scale_self_pairs": False},
    ),
    "coupled field large": (
        drift_ops.drift_field,
        field_inputs(260, 220, 240, 3, (2,), weighted=True),
        {"field": Field(coupling="sinkhorn", iterations=3, weights="kernel"), "temperature": 0.5},
    ),
}
every_form = pytest.mark.parametrize(("function", "tensors", "options"), FORMS.values(), ids=FORMS)
small_forms = pytest.mark.parametrize(("function", "tensors", "options"), list(FORMS.values())[:3], ids=list(FORMS)[:3])
point_forms = pytest.mark.parametrize(
    ("function", "tensors", "options"),
    [form for name, form in FORMS.items() if "loss" not in name],
    ids=[name for name in FORMS if "loss" not in name],
)


# Ways to run


@pytest.fixture(params=["avx512", "avx2", "portable"])
def instruction_set(request):
    """The cpu backend with one of its instruction sets, instead of the best one."""
    native = pytest.importorskip("drift_ops._cpu", exc_type=ImportError)
    if request.param not in native.supported():
        pytest.skip(f"this machine has no {request.param}")
    best = native.chosen()
    native.choose(request.param)
    yield
    native.choose(best)


@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_instruction_sets(instruction_set, function, tensors, options, dtype):
    check(function, tensors, options, dtype, "cpu")


@pytest.fixture(params=[1, 5])
def threads(request):
    usual = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(usual)


@every_form
def test_thread_counts(kernel_backend, threads, function, tensors, options):
    check(function, tensors, options, torch.float32, kernel_backend)


# Memory layouts


@every_form
@pytest.mark.parametrize("layout", [transposed, every_other, padded, unaligned])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(kernel_backend, function, tensors, options, layout, dtype):
    """NaN lies around every row that is not contiguous, so the right numbers also mean that nothing else was read."""
    check(function, tensors, options, dtype, kernel_backend, layout)


@small_forms
def test_expanded_groups(kernel_backend, function, tensors, options):
    one = {name: t[:1] for name, t in tensors.items()}
    copies = {name: t.expand(4, *t.shape[1:]).contiguous() for name, t in one.items()}
    check(function, copies, options, torch.float32, kernel_backend, lambda t: t[:1].expand(4, *t.shape[1:]))


@small_forms
def test_expanded_rows(kernel_backend, function, tensors, options):
    """All points of a set at one place, stored once; weights become equal."""
    copies = {name: t[:, :1].expand(t.shape).contiguous() for name, t in tensors.items()}
    check(function, copies, options, torch.float32, kernel_backend, lambda t: t[:, :1].expand(t.shape), atol=1e-6)


@pytest.mark.parametrize("function", [drift_ops.compute_V, drift_ops.drift_field], ids=["compute_V", "drift_field"])
def test_same_tensor_twice(kernel_backend, function):
    """One tensor given as queries and as a target: its gradient is the sum over both roles."""
    x, pos = (points(40, 5, seed=s).float().to(device_of(kernel_backend)).requires_grad_() for s in (1, 2))
    options = {"temperature": 1.0, "backend": kernel_backend}
    if function is drift_ops.drift_field:
        options["include_self"] = False
    shared = torch.autograd.grad(function(x, pos, x, **options).square().sum(), x)[0]
    y = x.detach().clone().requires_grad_()
    apart = torch.autograd.grad(function(x, pos, y, **options).square().sum(), [x, y])
    torch.testing.assert_close(shared, apart[0] + apart[1])


# Extreme values


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_points(kernel_backend, function, tensors, options, dtype):
    same = {name: t if name.startswith("weight") else torch.ones_like(t) for name, t in tensors.items()}
    check(function, same, options, dtype, kernel_backend, atol=1e-6)


@every_form
def test_coinciding_pairs(kernel_backend, function, tensors, options):
    """Half of the positives lie exactly on queries: distance 0, subgradient 0."""
    query, positive = ("gen", "fixed_pos") if "gen" in tensors else ("x", "pos" if "pos" in tensors else "x_data")
    half = tensors[positive].shape[-2] // 2
    moved = torch.cat([tensors[query][..., :half, :], tensors[positive][..., half:, :]], -2)
    check(function, tensors | {positive: moved}, options, torch.float32, kernel_backend)


@every_form
def test_far_from_the_origin(kernel_backend, function, tensors, options):
    """Points 1e4 away from the origin are as far from each other as before: no digit is lost, unlike in the dense form,
    which sums the points as they are."""
    shifted = {name: t if name.startswith("weight") else t + 1e4 for name, t in tensors.items()}
    if function is drift_ops.compute_V:
        options = options | {"normalize_features": False}
    check(function, shifted, options, torch.float32, kernel_backend, rtol=1e-5, dense_factor=0)


@every_form
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_scales(kernel_backend, function, tensors, options, scale):
    """With the kernel's width scaled likewise, points 1e-4 apart are an ordinary problem."""
    scaled = {name: t if name.startswith("weight") else t * scale for name, t in tensors.items()}
    if function is drift_ops.compute_V:
        options = options | {"normalize_features": False, "sigma": options["sigma"] * scale}
    elif function is drift_ops.drift_field:
        options = options | {"temperature": options["temperature"] * scale}
    check(function, scaled, options, torch.float32, kernel_backend)


@every_form
@pytest.mark.parametrize("who", [0, 1, 2], ids=["query", "positive", "negative"])
def test_one_outlier(kernel_backend, function, tensors, options, who):
    name = [name for name in tensors if not name.startswith("weight")][who]
    moved = tensors[name].clone()
    moved[..., 0, :] = 1e4
    rtol = 5e-5 if "field" in options else 1e-5  # a composed one rounds logarithms of some hundreds
    check(function, tensors | {name: moved}, options, torch.float32, kernel_backend, rtol=rtol)


@every_form
def test_sharp_kernel(kernel_backend, function, tensors, options):
    """A kernel far narrower than the distances: softmaxes are all but one-hot, and most of exp underflows. The rounding
    of an exponent of 100 is an error of 1e-5."""
    if function is drift_ops.compute_V:
        options = {"sigma": 0.03, "temperature": 0.03}
    elif function is drift_ops.drift_field:
        options = {"temperature": 0.03}
    else:
        options = {"R_list": (3e-3,)}
    check(function, tensors, options, torch.float32, kernel_backend, rtol=3e-5)


def test_lone_query_has_no_field(kernel_backend):
    """N = 1 without other negatives: nothing repels, and the field vanishes, whatever the floor."""
    for affinity_floor in (0.0, 1e-6):
        tensors = field_inputs(1, 7, 0, 3, (2,))
        options = {"temperature": 1.0, "affinity_floor": affinity_floor}
        outputs = check(drift_ops.drift_field, tensors, options, torch.float32, kernel_backend)
        assert all(not value.any() for value in outputs.values())


def test_negatives_left_out_equal_empty_negatives(kernel_backend):
    tensors = {n: t.float().to(device_of(kernel_backend)) for n, t in field_inputs(6, 5, 0, 3, (2,)).items()}
    x, pos, neg = tensors.values()
    with_empty = drift_ops.drift_field(x, pos, neg, temperature=1.0, backend=kernel_backend)
    assert torch.equal(drift_ops.drift_field(x, pos, temperature=1.0, backend=kernel_backend), with_empty)
    loss_with_empty, _ = drift_ops.drift_loss(x, pos, neg, backend=kernel_backend)
    loss, _ = drift_ops.drift_loss(x, pos, backend=kernel_backend)
    assert torch.equal(loss, loss_with_empty)


def test_compute_V_without_x_gen(kernel_backend):
    """No generated points to repel: only the attraction is left."""
    check(drift_ops.compute_V, compute_V_inputs(5, 4, 0, 3, (2,)), {}, torch.float32, kernel_backend)


# Values that are not finite


@point_forms
@pytest.mark.parametrize("who", [0, 1, 2], ids=["query", "positive", "negative"])
def test_non_finite_points_stay_in_their_group(backend, function, tensors, options, who):
    on_device = {name: t.float().to(device_of(backend)) for name, t in tensors.items()}
    clean = run(function, on_device, options, backend)
    name = list(tensors)[who]
    for value in (float("nan"), float("inf"), float("-inf")):
        spoilt = on_device[name].clone()
        spoilt[1, -1, -1] = value
        dirty = run(function, on_device | {name: spoilt}, options, backend)
        assert not dirty["output"][1].isfinite().all(), value
        for key, expected in clean.items():
            assert torch.equal(dirty[key][0], expected[0]), (value, key)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("N", [6, 700])
def test_non_finite_points_make_the_loss_non_finite(backend, value, N):
    """The loss shares its scale over all groups, so it all goes: visibly, and without a hang."""
    tensors = {name: t.float().to(device_of(backend)) for name, t in loss_inputs(N, N, 3, 4, 2).items()}
    tensors["fixed_pos"][0, 0, 0] = value
    loss, info = drift_ops.drift_loss(**tensors, backend=backend)
    assert not loss.isfinite().any() and not info["scale"].isfinite()


# The rest of the contract


@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_deterministic(backend, function, tensors, options, dtype):
    skip_unless_served(backend, dtype)
    converted = {name: t.to(device_of(backend), dtype) for name, t in tensors.items()}
    first, second = (run(function, converted, options, backend) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@every_form
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(backend, function, tensors, options, dtype):
    """Fields come in the input's dtype, gradients in their input's; losses and statistics in float32 at least."""
    outputs = check(function, tensors, options, dtype, backend)
    at_least_float32 = dtype if dtype == torch.float64 else torch.float32
    for name, value in outputs.items():
        is_input_dtype = name.startswith("gradient") or (name == "output" and function is not drift_ops.drift_loss)
        assert value.dtype == (dtype if is_input_dtype else at_least_float32), name


def test_temperatures_share_a_leading_axis(backend):
    tensors = {n: t.float() for n, t in field_inputs(6, 5, 4, 3, (2,), weighted=True).items()}
    tensors = {n: t.to(device_of(backend)) for n, t in tensors.items()}
    together = drift_ops.drift_field(**tensors, temperature=[0.3, 1.0], backend=backend)
    for T, V in zip([0.3, 1.0], together, strict=True):
        alone = drift_ops.drift_field(**tensors, temperature=T, backend=backend)
        torch.testing.assert_close(V, alone)


def test_lists_of_maps_equal_one_map_at_a_time(backend):
    """Maps of different group counts, point counts, widths and weights, with one incoming gradient each."""
    maps = [loss_inputs(6, 5, 3, 10, 2, weighted=True), loss_inputs(9, 4, 2, 33, 3, weighted=True)]
    maps = [{name: t.float().to(device_of(backend)) for name, t in tensors.items()} for tensors in maps]
    for tensors in maps:
        tensors["gen"].requires_grad_()
    losses, infos = drift_ops.drift_loss(**{name: [m[name] for m in maps] for name in maps[0]}, backend=backend)
    assert len(losses) == len(infos) == 2
    together = torch.autograd.grad(sum(k * loss.sum() for k, loss in enumerate(losses, 1)), [m["gen"] for m in maps])
    for k, tensors in enumerate(maps):
        loss, info = drift_ops.drift_loss(**tensors, backend=backend)
        torch.testing.assert_close(losses[k], loss)
        assert infos[k].keys() == info.keys()
        for name, value in info.items():
            assert value.dim() == 0
            torch.testing.assert_close(infos[k][name], value)
        (alone,) = torch.autograd.grad((k + 1) * loss.sum(), tensors["gen"])
        torch.testing.assert_close(together[k], alone)


def test_default_backend_is_one_that_can_serve():
    tensors = {n: t.float() for n, t in field_inputs(6, 5, 4, 3).items()}
    default = drift_ops.drift_field(**tensors, temperature=1.0)
    torch.testing.assert_close(default, drift_ops.drift_field(**tensors, temperature=1.0, backend="reference"))


def test_backends_report_themselves():
    backends = drift_ops.backends()
    assert {"reference", "cpu"} <= backends.keys() and backends["reference"].usable
    for status in backends.values():
        assert status.usable != bool(status.reason)
