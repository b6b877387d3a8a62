"""Forms A and B: weighted sums under the doubly normalised affinity."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..backends import implementation
from ..points import saveable
from ..spec import AffinitySpec
from .registration import Step, apply_step, define, finish, given, is_plain, once, rows


class _AffinitySums(Step):
    """:func:`affinity_sums`; ``tensors`` are q, w, the keys, and the values where these are not the keys."""

    @staticmethod
    def compute(spec: AffinitySpec, backend: str, keys: int, *tensors: Any) -> tuple[Tensor, ...]:
        q, w, *others = tensors
        if is_plain(q):
            of_keys, of_values = rows(others[:keys]), rows(others[keys:])
            return implementation(backend).affinity_sums(spec, rows(q), of_keys, of_values or None, w)
        return _affinity_sums(q, others[:keys], others[keys:], w, *spec.values(), backend)

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.spec, ctx.backend, ctx.keys, *tensors = inputs
        ctx.save_for_backward(*tensors, *output[2:])
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Any, ...]:
        q, w, *others, row_stats, col_stats, centre = ctx.saved_tensors
        keys, values = others[: ctx.keys], others[ctx.keys :]
        shapes = ctx.spec.shapes(q, keys)[:2]
        grads = [q.new_zeros(s) if g is None else g for g, s in zip(incoming[:2], shapes, strict=True)]
        tensors = (q, keys, values, w, row_stats, col_stats, centre, *grads)
        if is_plain(q) and not torch.is_grad_enabled():
            found = tree_leaves(_affinity_sums_backward_of(ctx.spec, implementation(ctx.backend), *tensors))
        else:
            found = once(_affinity_sums_backward, *tensors, *ctx.spec.values(), ctx.backend)
        grad_q, *of_points, grad_w = found
        return None, None, None, grad_q, None if w is None else grad_w, *of_points


def affinity_sums(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor] | None,
    w: Tensor | None,
    spec: AffinitySpec,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sums of values under the doubly normalised affinity of queries and keys (forms A and B).

    ``q`` is ``[G, N, D]``; ``keys`` and ``values`` (None: the keys) are ``[G, count, D]`` each, together M a problem;
    ``w`` is ``[G, M]`` or None for ones.

    Returns:
        ``num[s, g, side, i] = Σ_{j in side} w_j A_ij (v_j − centre)`` and ``den[...] = Σ_{j in side} w_j A_ij`` for
        each of S widths and of the sides, ``[S, G, sides, N, D]`` and ``[S, G, sides, N]``, differentiable w.r.t. every
        tensor; and ``centre [G, D]``, a constant that the backend has chosen amid the values.
    """
    keys = [k.view_as(k) for k in keys]  # dynamo wants to see no tensor twice, and queries may be keys
    tensors = [t if t is None else saveable(t) for t in (q, w, *keys, *(values or ()))]
    num, den, _, _, centre = apply_step(_AffinitySums, spec, backend, len(keys), *tensors)
    return num, den, centre


@define("Tensor q, Tensor[] keys, Tensor[] values, Tensor? w", AffinitySpec, "(Tensor, Tensor, Tensor, Tensor, Tensor)")
def _affinity_sums(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], w: Tensor | None, *rest: Any) -> Any:
    """``num``, ``den``, for the backward the softmax statistics ``[S, G, 2, N]``, ``[S, G, 2, M]``, and the centre."""
    spec, backend = given(AffinitySpec, rest)
    return backend.affinity_sums(spec, rows(q), rows(keys), rows(values) or None, w)


@_affinity_sums.register_fake
def _(q, keys, values, w, *rest):  # type: ignore[no-untyped-def]
    return tuple(q.new_empty(shape) for shape in AffinitySpec.of(rest[:-1]).shapes(q, keys))


@define(
    "Tensor q, Tensor[] keys, Tensor[] values, Tensor? w, Tensor row_stats, Tensor col_stats, Tensor centre, "
    "Tensor grad_num, Tensor grad_den",
    AffinitySpec,
    "(Tensor, Tensor[], Tensor[], Tensor)",
)
def _affinity_sums_backward(*arguments: Any) -> Any:
    """Vector-Jacobian product of :func:`affinity_sums`: gradients of q, keys, values, and w (empty without w)."""
    return _affinity_sums_backward_of(*given(AffinitySpec, arguments[9:]), *arguments[:9])


def _affinity_sums_backward_of(
    spec: AffinitySpec,
    backend: Any,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    w: Tensor | None,
    row_stats: Tensor,
    col_stats: Tensor,
    centre: Tensor,
    grad_num: Tensor,
    grad_den: Tensor,
) -> Any:
    incoming = grad_num.contiguous(), grad_den.contiguous()
    statistics = row_stats, col_stats, centre
    return backend.affinity_sums_backward(spec, rows(q), rows(keys), rows(values) or None, w, *statistics, *incoming)


@_affinity_sums_backward.register_fake
def _(q, keys, values, w, *rest):  # type: ignore[no-untyped-def]
    def alike(t: Tensor) -> Tensor:
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    return alike(q), [alike(k) for k in keys], [alike(v) for v in values], q.new_empty(0) if w is None else alike(w)


finish(_affinity_sums)
finish(_affinity_sums_backward, of_backward=True)
