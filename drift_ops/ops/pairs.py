"""The two sums over pairs that the family of fields is composed of, and the vector-Jacobian product of both.

With logits ``L_ij = −(C_ij/unit + self_cost)/width`` of queries i and keys j, for S widths at once:
``log Σ exp(L_ij − potential)`` along either axis, and weighted sums of keys under ``exp(L_ij − α_i − β_j)``.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..backends import implementation
from ..spec import PairGradients, PairProblem, PairSpec, PairWeights
from .registration import Step, apply_step, define, finish, given, is_plain, once, rows


class _LogSums(Step):
    """:func:`log_sums`; ``tensors`` are q, width, unit, the potential, and the keys."""

    @staticmethod
    def compute(spec: PairSpec, backend: str, by_row: bool, *tensors: Any) -> Tensor:
        q, width, unit, potential, *keys = tensors
        if is_plain(q):
            return implementation(backend).log_sums(_problem(spec, q, keys, width, unit), potential, by_row)
        return _log_sums(q, keys, width, unit, potential, by_row, *spec.values(), backend)

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.spec, ctx.backend, ctx.by_row, *tensors = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Any, ...]:
        q, width, unit, potential, *keys, sums = ctx.saved_tensors
        problem = PairProblem(ctx.spec, q, keys, width, unit)
        S, G, N, M = problem.shape
        # d log Σ exp(L − potential) = exp(L − potential − log Σ …) dL; where nothing is left there are no terms at all.
        sums = sums.masked_fill(sums == -math.inf, 0.0)
        other = q.new_zeros(S, G, M if ctx.by_row else N) if potential is None else potential
        weights = PairWeights(sums, other) if ctx.by_row else PairWeights(other, sums)
        of_sums = PairGradients(den=incoming.unsqueeze(2)) if ctx.by_row else PairGradients(columns=incoming)
        grad_q, *grad_keys, _, row_flow, col_flow, width_flow = _gradients(problem, ctx.backend, weights, of_sums)
        grad_potential = None if potential is None else -(col_flow if ctx.by_row else row_flow)
        return None, None, None, grad_q, _grad_width(width, width_flow), None, grad_potential, *grad_keys


def log_sums(problem: PairProblem, potential: Tensor | None, by_row: bool, backend: str) -> Tensor:
    """Log-sum-exps of logits, −∞ where nothing is left to be summed.

    By row: ``log Σ_j exp(L_ij − potential_j)``, ``[S, G, N]``, with a potential ``[S, G, M]``; else
    ``log Σ_i exp(L_ij − potential_i)``, ``[S, G, M]``, with one ``[S, G, N]``. None is 0; what has a potential of ∞ is
    left out. Differentiable w.r.t. all tensors that are no constants.
    """
    spec, q, keys, width, unit = problem
    keys = [k.view_as(k) for k in keys]  # dynamo wants to see no tensor twice, and queries may be keys
    return apply_step(_LogSums, spec, backend, by_row, q, width, unit, potential, *keys)


def _problem(spec: PairSpec, q: Tensor, keys: Sequence[Tensor], width: Tensor, unit: Tensor | None) -> PairProblem:
    """For a backend: points with contiguous rows, and no graph."""
    return PairProblem(spec, rows(q), rows(keys), width.detach(), unit)


_PROBLEM = "Tensor q, Tensor[] keys, Tensor width, Tensor? unit"


@define(f"{_PROBLEM}, Tensor? potential, bool by_row", PairSpec, "Tensor")
def _log_sums(
    q: Tensor,
    keys: Sequence[Tensor],
    width: Tensor,
    unit: Tensor | None,
    potential: Tensor | None,
    by_row: bool,
    *rest: Any,
) -> Tensor:
    spec, backend = given(PairSpec, rest)
    return backend.log_sums(_problem(spec, q, keys, width, unit), potential, by_row)


@_log_sums.register_fake
def _(q, keys, width, unit, potential, by_row, *rest):  # type: ignore[no-untyped-def]
    S, G, N, M = PairProblem(PairSpec.of(rest[:-1]), q, keys, width, unit).shape
    return q.new_empty(S, G, N if by_row else M)


class _WeightedSums(Step):
    """:func:`weighted_sums`; ``tensors`` are q, width, unit, the fields of PairWeights, and the keys."""

    @staticmethod
    def compute(spec: PairSpec, backend: str, *tensors: Any) -> tuple[Tensor, Tensor]:
        (q, width, unit), weights, keys = tensors[:3], PairWeights(*tensors[3:7]), tensors[7:]
        if is_plain(q):
            return implementation(backend).weighted_sums(_problem(spec, q, keys, width, unit), weights)
        return _weighted_sums(q, keys, width, unit, *weights, *spec.values(), backend)

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.spec, ctx.backend, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_num: Tensor | None, grad_den: Tensor | None) -> tuple[Any, ...]:
        q, width, unit, alpha, beta, w, centre, *keys = ctx.saved_tensors
        problem, weights = PairProblem(ctx.spec, q, keys, width, unit), PairWeights(alpha, beta, w, centre)
        found = _gradients(problem, ctx.backend, weights, PairGradients(grad_num, grad_den))
        grad_q, *grad_keys, grad_w, row_flow, col_flow, width_flow = found
        of_width = _grad_width(width, width_flow)
        of_w = None if w is None else grad_w
        return None, None, grad_q, of_width, None, -row_flow, -col_flow, of_w, None, *grad_keys


def weighted_sums(problem: PairProblem, weights: PairWeights, backend: str) -> tuple[Tensor, Tensor]:
    """Sums of keys with ``weights``, where pairs that are left out have ``A_ij = 0``.

    Returns:
        ``num[s, g, side, i] = Σ_{j in side} w_j A_ij (k_j − centre)``, ``[S, G, sides, N, D]``, and
        ``den[...] = Σ_{j in side} w_j A_ij``, ``[S, G, sides, N]``; differentiable w.r.t. all but the constants.
    """
    spec, q, keys, width, unit = problem
    keys = [k.view_as(k) for k in keys]
    return apply_step(_WeightedSums, spec, backend, q, width, unit, *weights, *keys)


class DifferentiableSums(NamedTuple):
    """Both sums of a backend, with derivatives."""

    backend: str

    def log_sums(self, problem: PairProblem, potential: Tensor | None, by_row: bool) -> Tensor:
        return log_sums(problem, potential, by_row, self.backend)

    def weighted_sums(self, problem: PairProblem, weights: PairWeights) -> tuple[Tensor, Tensor]:
        return weighted_sums(problem, weights, self.backend)


_WEIGHTS = "Tensor alpha, Tensor beta, Tensor? w, Tensor? centre"


@define(f"{_PROBLEM}, {_WEIGHTS}", PairSpec, "(Tensor, Tensor)")
def _weighted_sums(q: Tensor, keys: Sequence[Tensor], width: Tensor, unit: Tensor | None, *rest: Any) -> Any:
    weights, (spec, backend) = PairWeights(*rest[:4]), given(PairSpec, rest[4:])
    return backend.weighted_sums(_problem(spec, q, keys, width, unit), weights)


@_weighted_sums.register_fake
def _(q, keys, width, unit, alpha, *rest):  # type: ignore[no-untyped-def]
    (S, G, N), D, sides = alpha.shape, q.shape[2], PairSpec.of(rest[3:-1]).sides
    return q.new_empty(S, G, sides, N, D), q.new_empty(S, G, sides, N)


@define(
    f"{_PROBLEM}, {_WEIGHTS}, Tensor? grad_num, Tensor? grad_den, Tensor? grad_columns",
    PairSpec,
    "(Tensor, Tensor[], Tensor, Tensor, Tensor, Tensor)",
)
def _pair_gradients(q: Tensor, keys: Sequence[Tensor], width: Tensor, unit: Tensor | None, *rest: Any) -> Any:
    """The vector-Jacobian product of both sums. With ``flow_ij``, the gradient of A_ij times A_ij where A is above its
    floor:

    Returns:
        gradients of q, of each tensor of keys, and of w (empty without w); and ``Σ_j flow_ij [S, G, N]``,
        ``Σ_i flow_ij [S, G, M]`` and ``Σ_j flow_ij L_ij [S, G, N]``.
    """
    weights, incoming, (spec, backend) = PairWeights(*rest[:4]), PairGradients(*rest[4:7]), given(PairSpec, rest[7:])
    return backend.pair_gradients(_problem(spec, q, keys, width, unit), weights, incoming)


@_pair_gradients.register_fake
def _(q, keys, width, unit, alpha, beta, w, *rest):  # type: ignore[no-untyped-def]
    def alike(t: Tensor) -> Tensor:
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    flows = alike(alpha), alike(beta), alike(alpha)
    return alike(q), [alike(k) for k in keys], q.new_empty(0) if w is None else alike(w), *flows


def _gradients(problem: PairProblem, backend: str, weights: PairWeights, incoming: PairGradients) -> list[Tensor]:
    """All results of :func:`_pair_gradients`, one after the other."""
    spec, *tensors = problem
    given: list[Any] = [t if t is None else t.contiguous() for t in (*weights, *incoming)]
    if is_plain(problem.q) and not torch.is_grad_enabled():
        arguments = _problem(*problem), PairWeights(*given[:4]), PairGradients(*given[4:])
        return tree_leaves(implementation(backend).pair_gradients(*arguments))
    return once(_pair_gradients, *tensors, *given, *spec.values(), backend)


def _grad_width(width: Tensor, width_flow: Tensor) -> Tensor:
    return -width_flow.sum((1, 2)).to(width) / width


finish(_log_sums)
finish(_weighted_sums)
finish(_pair_gradients, of_backward=True)
