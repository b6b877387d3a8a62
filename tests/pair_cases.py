"""The sums over pairs of a backend against their dense definition: cases for backends with kernels of their own."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from cases import DENSE_FACTOR, FLOOR, points, rms, unaligned, weights
from torch import Tensor

from drift_ops import reference
from drift_ops.spec import PairGradients, PairProblem, PairSpec, PairWeights


class Case(NamedTuple):
    """The first keys are the queries where the spec says so."""

    spec: PairSpec
    G: int
    N: int
    keys: tuple[int, ...]
    D: int
    widths: tuple[float, ...]
    units: bool = False
    weighted: bool = False


CASES = {
    "masked": Case(PairSpec("l2", True, math.inf, 2), 2, 17, (17, 9, 7), 3, (0.5, 3.0), True, True),
    "self cost": Case(PairSpec("l2_sq", True, 2.0, 2, 1e-3), 1, 18, (18, 16), 17, (4.0, 8.0, 16.0), weighted=True),
    "self counts": Case(PairSpec("l2", True, 0.0, 1, 1e-6), 2, 5, (5, 17), 20, (0.7,), weighted=True),
    "squares": Case(PairSpec("l2_sq", floor=1e-2), 1, 35, (4,), 2, (2.0, 0.5, 1.0), units=True),
    "least distance": Case(PairSpec("l2", True, 3.0, 2, 0.0, 4.0), 1, 18, (18, 16), 19, (2.0,), True, True),
    "one of each": Case(PairSpec("l2"), 1, 1, (1,), 1, (1.0,)),
}


def inputs(case: Case) -> dict[str, Any]:
    """All that the sums take, float64. Some keys are left out; potentials are such that affinities are near 1/M."""
    G, N, M = case.G, case.N, sum(case.keys)
    q = points(G, N, case.D, seed=1)
    keys = [points(G, n, case.D, shift=0.3 * at, seed=2 + at) for at, n in enumerate(case.keys)]
    if case.spec.has_self:
        keys[0] = q
    keys[-1][:, 0] = q[:, -1] + 0.03  # too close for products
    width = torch.tensor(case.widths, dtype=torch.float64)
    unit = points(G, seed=9).exp() if case.units else None
    beta = points(len(width), G, M, seed=8)
    if M > 1:
        beta[:, 0, 1::7] = math.inf
    alpha = reference.log_sums(PairProblem(case.spec, q, keys, width, unit), beta, True)
    alpha = alpha.masked_fill(alpha == -math.inf, 0.0) + 0.3
    w = weights(G, M, seed=5) if case.weighted else None
    centre = points(G, case.D, seed=6)
    return {
        "q": q, "keys": keys, "width": width, "unit": unit, "alpha": alpha, "beta": beta, "w": w, "centre": centre
    }  # fmt: skip


def converted(given: dict[str, Any], by: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Every tensor; queries that are keys stay the same."""
    new = {name: by(t) if isinstance(t, Tensor) else t for name, t in given.items()}
    return new | {"keys": [new["q"] if t is given["q"] else by(t) for t in given["keys"]]}


def results(
    module: Any, spec: PairSpec, given: dict[str, Any], layout: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Of all three functions, by name."""
    problem = PairProblem(spec, *(given[name] for name in ("q", "keys", "width", "unit")))
    alpha, beta, *_ = weights = PairWeights(*(given[name] for name in ("alpha", "beta", "w", "centre")))
    found = {}
    for name, potential, by_row in (
        ("rows", beta, True),
        ("columns", alpha, False),
        ("rows, no potential", None, True),
        # what is left is one pair of a query with itself, if it counts
        ("one key", layout(only_first(beta)), True),
        ("one query", layout(only_first(alpha)), False),
    ):
        found[name] = module.log_sums(problem, potential, by_row)
    found["num"], found["den"] = module.weighted_sums(problem, weights)
    of_num, of_den = (unaligned(points(*found[name].shape, seed=n).to(beta)) for n, name in enumerate(("num", "den")))
    of_columns = unaligned(points(*beta.shape, seed=7).to(beta))
    for name, under, incoming in (
        ("all", weights, PairGradients(of_num, of_den, of_columns)),
        ("columns", PairWeights(alpha, beta), PairGradients(columns=of_columns)),
    ):
        of_q, of_keys, *rest = module.pair_gradients(problem, under, incoming)
        of_names = ["q", *(f"keys {n}" for n in range(len(problem.keys))), "w", "alpha", "beta", "width"]
        for what, gradient in zip(of_names, (of_q, *of_keys, *rest), strict=True):
            found[f"gradient of {what} from {name}"] = gradient
    return found


def only_first(potential: Tensor) -> Tensor:
    first = torch.arange(potential.shape[2], device=potential.device) == 0
    return potential.masked_fill(~first, math.inf)


def check_pairs(
    module: Any, case: Case, dtype: torch.dtype, layout: Callable[[Tensor], Tensor], device: str = "cpu"
) -> None:
    """As near the float64 truth as :func:`cases.check` asks for; −∞ exactly where the truth has it."""
    rounded = converted(inputs(case), lambda t: t.to(dtype))
    ours = results(module, case.spec, converted(rounded, lambda t: layout(t.to(device))), layout)
    truth = results(reference, case.spec, converted(rounded, lambda t: t.double()), lambda t: t)
    dense = results(reference, case.spec, rounded, lambda t: t)
    for name, value in ours.items():
        exact, nothing = truth[name], truth[name] == -math.inf
        assert value.shape == exact.shape and value.dtype == dtype, name
        value = value.cpu().double()
        assert torch.equal(value == -math.inf, nothing), name
        value, exact, same = (t.masked_fill(nothing, 0.0) for t in (value, exact, dense[name].double()))
        assert value.isfinite().all(), name
        allowed = max(FLOOR[dtype] * rms(exact), DENSE_FACTOR * rms(same - exact))
        if name.startswith("gradient"):  # one that is zero but for roundings of terms as large as its siblings
            from_same = name.partition(" from ")[2]
            largest = max(rms(t) for other, t in truth.items() if other.endswith(f" from {from_same}"))
            allowed = max(allowed, torch.finfo(dtype).eps * largest)
        error = rms(value - exact)
        assert error <= allowed, f"{name}: RMS error {error:.3g} of RMS {rms(exact):.3g}, allowed {allowed:.3g}"
