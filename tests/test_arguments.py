"""Bad input: the error names the argument, what it received, and comes before anything is computed."""

import re

import numpy as np
import pytest
import torch

import drift_ops


def t(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


GOOD = {
    "compute_V": {"x": t(2, 5, 3), "x_data": t(2, 4, 3), "x_gen": t(2, 6, 3)},
    "compute_V_multiscale": {"x": t(2, 5, 3), "x_data": t(2, 4, 3), "x_gen": t(2, 6, 3)},
    "drift_field": {
        "x": t(2, 5, 3), "pos": t(2, 4, 3), "neg": t(2, 6, 3), "weight_pos": t(2, 4), "weight_neg": t(2, 6),
        "temperature": 1.0,
    },
    "drift_loss": {
        "gen": t(2, 5, 3), "fixed_pos": t(2, 4, 3), "fixed_neg": t(2, 6, 3),
        "weight_gen": t(2, 5), "weight_pos": t(2, 4), "weight_neg": t(2, 6),
    },
}  # fmt: skip

# What is wrong with a tensor of points of shape [2, count, 3], and a word of what was received.
BAD_POINTS = {
    "D": (lambda n: t(2, n, 7), "7"),
    "groups": (lambda n: t(9, n, 3), "9"),
    "more groups": (lambda n: t(8, 2, n, 3), "8"),
    "rank": (lambda n: t(3), "3"),
    "dtype": (lambda n: t(2, n, 3, dtype=torch.float64), "float64"),
    "device": (lambda n: t(2, n, 3, device="meta"), "meta"),
    "integer": (lambda n: t(2, n, 3, dtype=torch.int64), "int64"),
    "complex": (lambda n: t(2, n, 3, dtype=torch.complex64), "complex64"),
    "bool": (lambda n: t(2, n, 3, dtype=torch.bool), "bool"),
    "array": (lambda n: np.zeros((2, n, 3), np.float32), "ndarray"),
    "number": (lambda n: 1.5, "float"),
    "None": (lambda n: None, "None"),
}
FIRST = {"compute_V": "x", "compute_V_multiscale": "x", "drift_field": "x", "drift_loss": "gen"}
MAY_BE_NONE = {"neg", "fixed_neg"}


def bad_calls():
    for function, good in GOOD.items():
        points = {name: v for name, v in good.items() if isinstance(v, torch.Tensor) and v.dim() == 3}
        for name, value in points.items():
            for what, (make, received) in BAD_POINTS.items():
                if name == FIRST[function] and what in ("D", "groups", "more groups", "dtype", "device"):
                    continue  # the first argument is what the others are compared with
                if name in MAY_BE_NONE and what == "None":
                    continue
                yield function, name, {name: make(value.shape[1])}, received, what
        for name in list(points)[:2]:
            yield function, name, {name: t(2, 0, 3)}, "0", "no points"
        first = FIRST[function]
        for what in ("integer", "complex"):
            make, received = BAD_POINTS[what]
            every_point = {name: make(v.shape[1]) for name, v in points.items()}
            yield function, first, every_point, received, f"all {what}"
        yield function, first, {name: v[..., :0] for name, v in points.items()}, "0", "D = 0"
        for name, value in good.items():
            if name.startswith("weight"):
                yield function, name, {name: t(2, value.shape[1] + 5)}, str(value.shape[1] + 5), "count"
                yield function, name, {name: t(9, value.shape[1])}, "9", "groups"
                yield function, name, {name: t(2, value.shape[1], 1)}, "1", "rank"
                yield function, name, {name: t(2, value.shape[1], dtype=torch.int64)}, "int64", "integer"
                yield function, name, {name: value.to("meta")}, "meta", "device"
                yield function, name, {name: np.ones((2, value.shape[1]))}, "ndarray", "array"
    for bad, received in [(0.0, "0"), (-2.5, "-2.5"), (float("nan"), "nan"), ("hot", "hot|str"), (None, "None")]:
        yield "compute_V", "sigma", {"sigma": bad}, received, str(bad)
        for function in ("compute_V", "compute_V_multiscale", "drift_field"):
            yield function, "temperature", {"temperature": bad}, received, str(bad)
        yield "compute_V_multiscale", "sigmas", {"sigmas": (1.0, bad)}, received, str(bad)
        yield "drift_field", "temperature", {"temperature": (1.0, bad)}, received, f"(1, {bad})"
        yield "drift_loss", "R_list", {"R_list": (1.0, bad)}, received, str(bad)
    yield "compute_V_multiscale", "sigmas", {"sigmas": ()}, r"\(\)|empty|0", "empty"
    yield "drift_field", "temperature", {"temperature": []}, r"\[\]|empty|0", "empty"
    yield "drift_loss", "R_list", {"R_list": ()}, r"\(\)|empty|0", "empty"
    for function in ("drift_field", "drift_loss"):
        for bad in (-1e-6, float("nan")):
            yield function, "affinity_floor", {"affinity_floor": bad}, str(bad), str(bad)
    no_negatives = {"neg": None, "weight_neg": None, "include_self": False}
    empty_negatives = {"neg": t(2, 0, 3), "weight_neg": t(2, 0), "include_self": False}
    yield "drift_field", "neg", no_negatives, "None|no negatives", "no negatives"
    yield "drift_field", "neg", empty_negatives, "0|no negatives", "empty negatives"
    yield "drift_field", "weight_neg", {"neg": None}, "6", "weights of no negatives"
    maps = {name: [v, v] for name, v in GOOD["drift_loss"].items()}
    yield "drift_loss", "fixed_pos", maps | {"fixed_pos": [t(2, 4, 3)]}, "1", "too few maps"
    yield "drift_loss", "fixed_pos", maps | {"fixed_pos": t(2, 4, 3)}, "Tensor", "one tensor for two maps"
    yield "drift_loss", "weight_gen", maps | {"weight_gen": [t(2, 5), t(2, 8)]}, "8", "second map"
    yield "drift_loss", "gen", maps | {"gen": [t(2, 5, 3), [[0.0]]]}, "list", "nested list"
    yield "drift_loss", "gen", {"gen": []}, r"\[\]|empty|0", "no maps"
    for function in GOOD:
        yield function, "backend", {"backend": "gpu"}, "gpu", "unknown"
        yield function, "backend", {"backend": 3}, "3|int", "number"


@pytest.mark.parametrize(
    ("function", "argument", "changes", "received"),
    [pytest.param(*call, id=f"{call[0]}-{call[1]}-{what}") for *call, what in bad_calls()],
)
def test_error_names_argument_and_what_it_received(function, argument, changes, received):
    with pytest.raises((ValueError, TypeError), match=rf"(?s)\b{argument}\b") as error:
        getattr(drift_ops, function)(**(GOOD[function] | changes))
    message = str(error.value)
    assert len(message) > len(argument) + len(received) + 10, f"nothing about what is expected: {message}"
    assert re.search(received, message), message


@pytest.mark.parametrize("function", GOOD)
def test_good_arguments_are_accepted(function):
    """Otherwise the errors above could have any cause."""
    arguments = {n: v + torch.rand_like(v) if isinstance(v, torch.Tensor) else v for n, v in GOOD[function].items()}
    getattr(drift_ops, function)(**arguments)


def test_an_unknown_backend_is_told_the_known_ones():
    with pytest.raises(ValueError, match="reference"):
        drift_ops.compute_V(**GOOD["compute_V"], backend="gpu")


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_gpu_backend_refuses_cpu_tensors(name):
    """With the reason that ``backends()`` gives where there is one, or because the tensors are on the CPU."""
    status = drift_ops.backends().get(name)
    if status is None:
        pytest.skip(f"{name} is not in drift_ops.backends()")
    with pytest.raises(ValueError) as error:
        drift_ops.drift_field(**GOOD["drift_field"], backend=name)
    assert name in str(error.value)
    assert (status.reason or "cpu") in str(error.value)
