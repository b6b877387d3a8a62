"""Thousands of calls of the operator, right and wrong: the right ones are computed, the wrong ones refused by name.

Each call starts from arguments that are right; every change made to them is one that must be refused. So what is
accepted silently is seen as well as what crashes.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch
from fuzzing import fuzzed, watching
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import drift_ops

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NUMBERS = [1.0, 0.3, 2, np.float64(0.5), np.float32(2), Fraction(1, 3), 1e-3, 1e3]
NO_NUMBER = [0.0, -1.0, -0.0, float("nan"), float("inf"), True, None, "1", b"1", {}, 1j, 10**400, Fraction(10**400)]
NO_POSITIVE = [*NO_NUMBER, [], torch.ones(()), np.ones(2), object()]
NO_POSITIVES = [(), [], "1", None, 0.5, torch.ones(2), np.ones(2), {1.0}, {1.0: 2.0}, *([0.1, w] for w in NO_POSITIVE)]
# Widths may be tensors, too.
WIDTH_TENSORS = [torch.ones(()), torch.tensor([0.1, 2.0]), torch.tensor(0.5, dtype=torch.float64), torch.tensor([0.3])]
NO_WIDTH_TENSORS = [
    torch.zeros(()), torch.tensor([0.1, -1.0]), torch.tensor([float("nan")]), torch.ones(7, 1), torch.ones(0),
    torch.ones(2, dtype=torch.complex64), torch.ones(2).to_sparse(),
]  # fmt: skip
NO_WIDTH = [*(w for w in NO_NUMBER), [], np.ones(2), object(), *NO_WIDTH_TENSORS]
NO_WIDTHS = [*(w for w in NO_POSITIVES if not isinstance(w, Tensor)), *NO_WIDTH_TENSORS]
FIELDS = [
    drift_ops.Field(**chosen)
    for chosen in (
        {}, {"mask_self": 100.0, "affinity_floor": 1e-6}, {"coupling": "row", "weights": "kernel"},
        {"cost": "l2_sq", "coupling": "sinkhorn", "sides": "split", "iterations": 3, "weights": "kernel"},
        {"mask_self": False}, {"coupling": "sinkhorn", "weights": "marginal", "iterations": 2},
    )
]  # fmt: skip
NO_FIELD = ["paper", {}, drift_ops.Field, ("l2",), 1, True]
NO_FLOOR = [-1e-9, 1.0, 2, float("nan"), float("inf"), True, None, "0", 10**400, torch.zeros(())]
NO_FLAG = [None, "no", 0, 1, 0.5, [], torch.tensor(True), np.True_]
NO_BACKEND = ["", "gpu", "CPU", "numpy", 3, True, ["cpu"], b"cpu", object(), ("cpu",), {}]


def wrong_points(t: Tensor) -> list[object]:
    """What cannot stand for the points ``t [..., count, D]`` of another argument's groups, D, dtype and device."""
    other = torch.float32 if t.dtype != torch.float32 else torch.float64
    return [
        None,
        1.0,
        "x",
        t.tolist(),
        t.float().numpy(),
        t.int(),
        t.bool(),
        t.to(torch.complex64),
        t.to(other),
        t.to("meta"),
        t.to_sparse() if t.dtype != torch.bfloat16 else t.float().to_sparse(),
        t[..., :0],
        t[..., 0],
        t.flatten(),
        torch.cat([t, t], -1),
        t.unsqueeze(0).unsqueeze(0),
        torch.zeros((), dtype=t.dtype),
        torch.cat([t, t[:1]], 0),
        torch.nested.nested_tensor([t[0].float().cpu()]),
    ]


def wrong_weights(w: Tensor) -> list[object]:
    return [
        1.0,
        w.tolist(),
        w.numpy(),
        w.int(),
        w.to("meta"),
        w[..., :-1],
        w[..., None],
        w.flatten()[:1].reshape(()),
        torch.cat([w, w], -1),
        w.to_sparse(),
        w.to(torch.complex64),
    ]


counts = st.integers(1, 5)


@st.composite
def calls(draw, function: str):
    """Arguments of ``function``, and whether they are right."""
    batch = draw(st.sampled_from([(2,), (2, 1), (3,)] if function != "drift_loss" else [(2,), (3,)]))
    dtype, D = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1, 2, 3, 17]))
    names = {
        "compute_V": ("x", "x_data", "x_gen"),
        "compute_V_multiscale": ("x", "x_data", "x_gen"),
        "drift_field": ("x", "pos", "neg"),
        "drift_loss": ("gen", "fixed_pos", "fixed_neg"),
    }[function]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    sizes = {name: draw(counts) for name in names}
    points = {name: torch.randn(*batch, sizes[name], D, generator=generator).to(dtype) for name in names}
    arguments: dict[str, object] = dict(points)
    wrong: dict[str, list[object]] = {name: wrong_points(t) for name, t in points.items()}
    wrong[names[0]] = [
        w
        for w in wrong[names[0]]
        if not isinstance(w, Tensor)
        or w.dtype not in DTYPES
        or w.is_nested
        or w.dim() < 2
        or w.layout != torch.strided
        or w.shape[-1] == 0
    ]
    if function in ("drift_field", "drift_loss"):
        wrong["field"] = NO_FIELD
        wrong[names[2]] = [w for w in wrong[names[2]] if w is not None]
        for name, of in [("weight_pos", 1), ("weight_neg", 2), ("weight_gen", 0)][: 2 + (function == "drift_loss")]:
            weights = torch.rand(*batch, sizes[names[of]], generator=generator) + 0.1
            wrong[name] = wrong_weights(weights)
            if draw(st.booleans()):
                arguments[name] = weights
        arguments["affinity_floor"] = draw(st.sampled_from([0.0, 1e-6, 0.5, 0, np.float32(0.1)]))
        wrong["affinity_floor"] = NO_FLOOR
    if function == "compute_V":
        arguments["sigma"], wrong["sigma"] = draw(st.sampled_from(NUMBERS)), NO_POSITIVE
    if function == "compute_V_multiscale":
        arguments["sigmas"], wrong["sigmas"] = (
            draw(st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=3)),
            NO_POSITIVES,
        )
    if function.startswith("compute_V"):
        arguments["temperature"], wrong["temperature"] = draw(st.sampled_from(NUMBERS)), NO_POSITIVE
        for flag in ("normalize_features", "normalize_drift"):
            arguments[flag], wrong[flag] = draw(st.booleans()), NO_FLAG
    if function == "drift_field":
        arguments["temperature"] = draw(st.sampled_from([*NUMBERS, (0.5, 1), [0.2], *WIDTH_TENSORS]))
        wrong["temperature"] = [w for w in (*NO_WIDTH, *NO_WIDTHS) if type(w) is not float or not w == 0.5]
        arguments["include_self"], wrong["include_self"] = draw(st.booleans()), NO_FLAG
    if function == "drift_loss":
        widths = st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=3)
        arguments["R_list"], wrong["R_list"] = draw(widths | st.sampled_from(WIDTH_TENSORS)), NO_WIDTHS
        scales = ["global", "group", *NUMBERS, *WIDTH_TENSORS[::2], torch.rand(batch, generator=generator) + 0.1]
        arguments["scale"], wrong["scale"] = draw(st.sampled_from(scales)), [*NO_WIDTH, "batch", torch.ones(7)]
        arguments["normalize"] = draw(st.sampled_from(["global", "group", "group_mean", None]))
        wrong["normalize"] = ["batch", "", True, 1.0, ("group",)]
        arguments["scale_self_pairs"], wrong["scale_self_pairs"] = draw(st.booleans()), NO_FLAG
        wrong["process_group"] = ["world", 1, object()]
    arguments["backend"], wrong["backend"] = draw(st.sampled_from([None, "cpu", "reference"])), NO_BACKEND
    if "field" in wrong and draw(st.booleans()):  # It has a floor and include_self of its own.
        arguments["field"] = draw(st.sampled_from(FIELDS))
        for name in ("affinity_floor", "include_self"):
            arguments.pop(name, None), wrong.pop(name, None)
    right = draw(st.booleans())
    if not right:
        for name in draw(st.lists(st.sampled_from(sorted(wrong)), min_size=1, max_size=2, unique=True)):
            arguments[name] = draw(st.sampled_from(wrong[name]))
    return arguments, right


FIRST = {"compute_V": "x", "compute_V_multiscale": "x", "drift_field": "x", "drift_loss": "gen"}


@pytest.mark.parametrize("function", FIRST)
def test_arguments(function):
    if not drift_ops.backends()["cpu"].usable:
        pytest.skip(drift_ops.backends()["cpu"].reason)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with watching(function, TypeError, ValueError) as watch:

        @fuzzed
        @given(calls(function))
        def fuzz(call):
            arguments, right = call
            kept = {n: v.clone() for n, v in arguments.items() if right and isinstance(v, Tensor)}
            result, refusal = watch.call(getattr(drift_ops, function), **arguments)
            assert right == (refusal is None), refusal or f"accepted {arguments}"
            if refusal is not None:
                named = [name for name in arguments if str(refusal).startswith((f"{name}:", f"{name}["))]
                assert named or "gen[" in str(refusal), f"names no argument: {refusal}"
                return
            first = arguments[FIRST[function]]
            output = result[0] if function == "drift_loss" else result
            assert output.isfinite().all()
            if function == "drift_loss":
                assert output.shape == first.shape[:1] and all(v.isfinite().all() for v in result[1].values())
            else:
                assert output.shape[-first.dim() :] == first.shape and output.dtype == first.dtype
            assert all(torch.equal(arguments[name], value) for name, value in kept.items())

        fuzz()
    torch.set_num_threads(before)


VALUES = [0.0, -0.0, 1.0, -1.0, 1e-30, 1e-45, 1e20, 1e38, -3e38, float("inf"), float("-inf"), float("nan"), 65504.0]


@pytest.mark.parametrize("function", FIRST)
def test_values_of_any_kind_crash_nothing(function):
    """Neither do NaN, infinity and numbers whose squares overflow: what comes out has the right shape."""
    names = {
        "drift_field": ("x", "pos", "neg"),
        "drift_loss": ("gen", "fixed_pos", "fixed_neg"),
    }.get(function, ("x", "x_data", "x_gen"))
    options = {"temperature": 0.1} if function == "drift_field" else {}

    @fuzzed
    @given(
        st.tuples(counts, counts, counts, st.sampled_from([1, 3, 20])),
        st.sampled_from(DTYPES),
        st.lists(st.tuples(st.integers(0, 10**4), st.sampled_from(VALUES)), max_size=6),
        st.sampled_from(["cpu", "reference"]),
    )
    def fuzz(sizes, dtype, values, backend):
        *counts_, D = sizes
        flat = torch.ones(2 * sum(counts_) * D, dtype=torch.float64)
        flat[: len(flat) // 2] = torch.linspace(-1, 1, len(flat) // 2)
        for place, value in values:
            flat[place % len(flat)] = value
        parts = flat.to(dtype).split([2 * count * D for count in counts_])
        points = {
            n: p.view(2, c, D).requires_grad_()
            for n, p, c in zip(names, (p.clone() for p in parts), counts_, strict=True)
        }
        result = getattr(drift_ops, function)(**points, **options, backend=backend)
        output = result[0] if isinstance(result, tuple) else result
        output.sum().backward()
        gradient = points[names[0]].grad
        assert gradient is not None and gradient.shape == points[names[0]].shape
        if not any(abs(value) > 1e3 or value != value for _, value in values):
            assert output.isfinite().all()

    fuzz()


@example(1e-300)
@example(1e-40)
@example(1e300)
@example(10**300)
@fuzzed
@given(st.floats(1e-320, 1e308))
def test_widths_of_any_size(width):
    """A width that the dtype computed in cannot hold is refused, or what it makes is finite."""
    x, y = torch.linspace(-1, 1, 6).view(3, 2), torch.linspace(-1, 2, 8).view(4, 2)
    for backend in ("cpu", "reference"):
        for call in (
            lambda: drift_ops.compute_V(x, y, x, sigma=width, backend=backend),  # noqa: B023
            lambda: drift_ops.compute_V(x, y, x, temperature=width, backend=backend),  # noqa: B023
            lambda: drift_ops.drift_field(x, y, temperature=width, backend=backend),  # noqa: B023
            lambda: drift_ops.drift_loss(x[None], y[None], R_list=[width], backend=backend)[0],  # noqa: B023
        ):
            try:
                result = call()
            except ValueError as error:
                assert "expected" in str(error)
            else:
                assert result.isfinite().all(), (width, backend)


@pytest.mark.parametrize(
    "wrong", [b"1", bytearray(b"1"), 10**400, Fraction(10**400)], ids=lambda wrong: type(wrong).__name__
)
def test_temperatures_that_were_once_accepted_or_no_error_of_ours(wrong):
    """Bytes are a sequence of numbers, and there are numbers larger than any float."""
    x = torch.ones(2, 3)
    with pytest.raises((TypeError, ValueError), match="^temperature: got"):
        drift_ops.drift_field(x, x, temperature=wrong)
