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
from ..spec import PairSpec
from .registration import Step, apply_step, define, finish, given, is_plain, once, rows


class _LogSums(Step):
    """:func:`log_sums`; ``tensors`` are q, width, unit, the potential, and the keys."""

    @staticmethod
    def compute(spec: PairSpec, backend: str, by_row: bool, *tensors: Any) -> Tensor:
        q, width, unit, potential, *keys = tensors
        if is_plain(q):
            arguments = width.detach(), unit, potential, by_row
            return implementation(backend).log_sums(spec, rows(q), rows(keys), *arguments)
        return _log_sums(q, keys, width, unit, potential, by_row, *spec.values(), backend)

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.spec, ctx.backend, ctx.by_row, *tensors = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Any, ...]:
        q, width, unit, potential, *keys, sums = ctx.saved_tensors
        axis = sum(k.shape[1] for k in keys) if ctx.by_row else q.shape[1]
        # d log Σ exp(L − potential) = exp(L − potential − log Σ …) dL; where nothing is left there are no terms at all.
        sums = sums.masked_fill(sums == -math.inf, 0.0)
        other = q.new_zeros(len(width), len(q), axis) if potential is None else potential
        alpha, beta = (sums, other) if ctx.by_row else (other, sums)
        of_rows, of_cols = (incoming.unsqueeze(2), None) if ctx.by_row else (None, incoming)
        tensors = (q, keys, width, unit, alpha, beta, None, None, None, of_rows, of_cols)
        found = _gradients(ctx.spec, ctx.backend, *tensors)
        grad_q, *grad_keys, _, row_flow, col_flow, width_flow = found
        grad_potential = None if potential is None else -(col_flow if ctx.by_row else row_flow)
        return None, None, None, grad_q, _grad_width(width, width_flow), None, grad_potential, *grad_keys


def log_sums(
    spec: PairSpec,
    q: Tensor,
    keys: Sequence[Tensor],
    width: Tensor,
    unit: Tensor | None,
    potential: Tensor | None,
    by_row: bool,
    backend: str,
) -> Tensor:
    """Log-sum-exps of logits, −∞ where nothing is left to be summed.

    ``q [G, N, D]``; keys ``[G, count, D]`` each, together M a problem; ``width [S]``; ``unit [G]`` or None for 1, a
    constant. By row: ``log Σ_j exp(L_ij − potential_j)``, ``[S, G, N]``, with a potential ``[S, G, M]``; else
    ``log Σ_i exp(L_ij − potential_i)``, ``[S, G, M]``, with one ``[S, G, N]``. None is 0; what has a potential of ∞ is
    left out. Differentiable w.r.t. all other tensors.
    """
    keys = [k.view_as(k) for k in keys]  # dynamo wants to see no tensor twice, and queries may be keys
    return apply_step(_LogSums, spec, backend, by_row, q, width, unit, potential, *keys)


@define("Tensor q, Tensor[] keys, Tensor width, Tensor? unit, Tensor? potential, bool by_row", PairSpec, "Tensor")
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
    return backend.log_sums(spec, rows(q), rows(keys), width, unit, potential, by_row)


@_log_sums.register_fake
def _(q, keys, width, unit, potential, by_row, *rest):  # type: ignore[no-untyped-def]
    return q.new_empty(len(width), q.shape[0], q.shape[1] if by_row else sum(k.shape[1] for k in keys))


class _WeightedSums(Step):
    """:func:`weighted_sums`; ``tensors`` are q, width, unit, alpha, beta, w, centre, and the keys."""

    @staticmethod
    def compute(spec: PairSpec, backend: str, *tensors: Any) -> tuple[Tensor, Tensor]:
        q, width, unit, alpha, beta, w, centre, *keys = tensors
        if is_plain(q):
            arguments = width.detach(), unit, alpha, beta, w, centre
            return implementation(backend).weighted_sums(spec, rows(q), rows(keys), *arguments)
        return _weighted_sums(q, keys, width, unit, alpha, beta, w, centre, *spec.values(), backend)

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.spec, ctx.backend, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_num: Tensor | None, grad_den: Tensor | None) -> tuple[Any, ...]:
        q, width, unit, alpha, beta, w, centre, *keys = ctx.saved_tensors
        tensors = (q, keys, width, unit, alpha, beta, w, centre, grad_num, grad_den, None)
        grad_q, *grad_keys, grad_w, row_flow, col_flow, width_flow = _gradients(ctx.spec, ctx.backend, *tensors)
        of_width = _grad_width(width, width_flow)
        of_w = None if w is None else grad_w
        return None, None, grad_q, of_width, None, -row_flow, -col_flow, of_w, None, *grad_keys


def weighted_sums(
    spec: PairSpec,
    q: Tensor,
    keys: Sequence[Tensor],
    width: Tensor,
    unit: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    w: Tensor | None,
    centre: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Sums under ``A_ij = max(exp(L_ij − α_i − β_j), √floor)``, which is 0 for pairs that are left out.

    ``q``, keys, ``width``, ``unit`` as for :func:`log_sums`; ``alpha [S, G, N]``; ``beta [S, G, M]``, ∞ leaves a key
    out; ``w [G, M]`` or None for 1; ``centre [G, D]``, a constant.

    Returns:
        ``num[s, g, side, i] = Σ_{j in side} w_j A_ij (k_j − centre)``, ``[S, G, sides, N, D]``, and
        ``den[...] = Σ_{j in side} w_j A_ij``, ``[S, G, sides, N]``; differentiable w.r.t. all but the constants.
    """
    keys = [k.view_as(k) for k in keys]
    return apply_step(_WeightedSums, spec, backend, q, width, unit, alpha, beta, w, centre, *keys)


class DifferentiableSums(NamedTuple):
    """Both sums of a backend, with derivatives."""

    backend: str

    def log_sums(self, *arguments: Any) -> Tensor:
        return log_sums(*arguments, self.backend)  # type: ignore[call-arg]

    def weighted_sums(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        return weighted_sums(*arguments, self.backend)  # type: ignore[call-arg]


_PAIRS = "Tensor q, Tensor[] keys, Tensor width, Tensor? unit, Tensor alpha, Tensor beta, Tensor? w"


@define(f"{_PAIRS}, Tensor centre", PairSpec, "(Tensor, Tensor)")
def _weighted_sums(
    q: Tensor,
    keys: Sequence[Tensor],
    width: Tensor,
    unit: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    w: Tensor | None,
    centre: Tensor,
    *rest: Any,
) -> Any:
    spec, backend = given(PairSpec, rest)
    return backend.weighted_sums(spec, rows(q), rows(keys), width, unit, alpha, beta, w, centre)


@_weighted_sums.register_fake
def _(q, keys, width, unit, alpha, beta, w, centre, *rest):  # type: ignore[no-untyped-def]
    (G, N, D), S, sides = q.shape, len(width), PairSpec.of(rest[:-1]).sides
    return q.new_empty(S, G, sides, N, D), q.new_empty(S, G, sides, N)


@define(
    f"{_PAIRS}, Tensor? centre, Tensor? grad_num, Tensor? grad_den, Tensor? grad_columns",
    PairSpec,
    "(Tensor, Tensor[], Tensor, Tensor, Tensor, Tensor)",
)
def _pair_gradients(q: Tensor, keys: Sequence[Tensor], *rest: Any) -> Any:
    """The vector-Jacobian product of both sums, with A as in :func:`weighted_sums`.

    The gradient of A_ij is ``w_j (grad_num_i·(k_j − centre) + grad_den_i) + grad_columns_j``, of which each term may be
    missing. With ``flow_ij``, that times A_ij where A is above its floor:

    Returns:
        gradients of q, of each tensor of keys, and of w (empty without w); and ``Σ_j flow_ij [S, G, N]``,
        ``Σ_i flow_ij [S, G, M]`` and ``Σ_j flow_ij L_ij [S, G, N]``.
    """
    tensors, (spec, backend) = rest[:9], given(PairSpec, rest[9:])
    return backend.pair_gradients(spec, rows(q), rows(keys), *tensors)


@_pair_gradients.register_fake
def _(q, keys, width, unit, alpha, beta, w, *rest):  # type: ignore[no-untyped-def]
    def alike(t: Tensor) -> Tensor:
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    flows = alike(alpha), alike(beta), alike(alpha)
    return alike(q), [alike(k) for k in keys], q.new_empty(0) if w is None else alike(w), *flows


def _gradients(spec: PairSpec, backend: str, *tensors: Any) -> list[Tensor]:
    """All results of :func:`_pair_gradients`, one after the other."""
    q, keys, *others = tensors
    others = [t.contiguous() if isinstance(t, Tensor) else t for t in others]
    if is_plain(q) and not torch.is_grad_enabled():
        return tree_leaves(implementation(backend).pair_gradients(spec, rows(q), rows(keys), *others))
    return once(_pair_gradients, q, keys, *others, *spec.values(), backend)


def _grad_width(width: Tensor, width_flow: Tensor) -> Tensor:
    return -width_flow.sum((1, 2)).to(width) / width


finish(_log_sums)
finish(_weighted_sums)
finish(_pair_gradients, of_backward=True)
