"""The operator as ``torch.library`` custom ops: what autograd, ``torch.compile`` and autocast see.

Points are contiguous ``[G, count, D]`` float32 or float64 tensors; the public functions bring them there.
Each op has a fake implementation (shapes only) and dispatches to the backend named in its last argument.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import implementation


@torch.library.custom_op("drift_ops::affinity_sums", mutates_args=())
def affinity_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    kernel: str,
    widths: Sequence[float],
    temperature: float,
    split: int,
    has_self: bool,
    floor: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted sums of values under the doubly normalised affinity of queries and keys (forms A and B).

    ``num[s, g, side, i] = Σ_{j in side} w_j A_ij v_j`` and ``den[...] = Σ_{j in side} w_j A_ij`` for each of S
    ``widths`` (temperatures of the ``"laplace"`` kernel, sigmas of the ``"gaussian"`` one). Keys ``[0, split)``
    are side 0 (negatives), the rest the last side; with ``split=0`` there is one side. ``has_self``: key i is query i,
    and masked.

    Returns:
        ``num [S, G, sides, N, D]``, ``den [S, G, sides, N]``, and the softmax statistics the backward needs:
        ``[S, G, 2, N]`` and ``[S, G, 2, M]``.
    """
    return implementation(backend).affinity_sums(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        None if w is None else w.contiguous(),
        kernel,
        widths,
        temperature,
        split,
        has_self,
        floor,
    )


@affinity_sums.register_fake
def _(q, k, v, w, kernel, widths, temperature, split, has_self, floor, backend):  # type: ignore[no-untyped-def]
    (G, N, D), M, S, sides = q.shape, k.shape[1], len(widths), 2 if split else 1
    return (
        q.new_empty(S, G, sides, N, D),
        q.new_empty(S, G, sides, N),
        q.new_empty(S, G, 2, N),
        q.new_empty(S, G, 2, M),
    )


@torch.library.custom_op("drift_ops::affinity_sums_backward", mutates_args=())
def affinity_sums_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    row_stats: Tensor,
    col_stats: Tensor,
    grad_num: Tensor,
    grad_den: Tensor,
    kernel: str,
    widths: Sequence[float],
    temperature: float,
    split: int,
    has_self: bool,
    floor: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Vector-Jacobian product of :func:`affinity_sums`: gradients of q, k, v, w (empty without w)."""
    return implementation(backend).affinity_sums_backward(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        None if w is None else w.contiguous(),
        row_stats,
        col_stats,
        grad_num.contiguous(),
        grad_den.contiguous(),
        kernel,
        widths,
        temperature,
        split,
        has_self,
        floor,
    )


@affinity_sums_backward.register_fake
def _(q, k, v, w, row_stats, col_stats, grad_num, grad_den, *rest):  # type: ignore[no-untyped-def]
    grad_w = q.new_empty(0) if w is None else torch.empty_like(w, memory_format=torch.contiguous_format)
    return (*(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)), grad_w)


def _save_for_affinity_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, w, *ctx.options = inputs
    _, _, row_stats, col_stats = output
    ctx.save_for_backward(q, k, v, w, row_stats, col_stats)


def _affinity_backward(ctx: Any, grad_num: Tensor, grad_den: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, w, row_stats, col_stats = ctx.saved_tensors
    *grads, grad_w = affinity_sums_backward(q, k, v, w, row_stats, col_stats, grad_num, grad_den, *ctx.options)
    return (*grads, None if w is None else grad_w, *[None] * len(ctx.options))


affinity_sums.register_autograd(_affinity_backward, setup_context=_save_for_affinity_backward)


@torch.library.custom_op("drift_ops::loss_scale", mutates_args=())
def loss_scale(points: Sequence[Tensor], weights: Sequence[Tensor], backend: str) -> tuple[Tensor, list[Tensor]]:
    """Form C, phase 1, for all maps: ``[mean d·w, mean w]`` of each, ``[maps, 2]`` float64, and what phase 2 keeps.

    ``points`` and ``weights`` hold gen, neg, pos of map 0, then of map 1, and so on.
    """
    results = _phase("loss_scale", backend, _by_map(points), _by_map(weights))
    return torch.stack([means for means, _ in results]), [kept for _, kept in results]


@loss_scale.register_fake
def _(points, weights, backend):  # type: ignore[no-untyped-def]
    kept = [_fake_like(of_map[0], implementation(backend).kept_shape(of_map)) for of_map in _by_map(points)]
    return points[0].new_empty(len(kept), 2, dtype=torch.float64), kept


@torch.library.custom_op("drift_ops::loss_moments", mutates_args=())
def loss_moments(
    points: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: Sequence[Tensor],
    scale: Tensor,
    R_list: Sequence[float],
    floor: float,
    backend: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """Form C, phase 2, for all maps: what phase 3 needs, and ``mean_{i,dim}(F_r F_s)`` of the forces, ``[G, R, R]``.

    ``scale [maps]`` is the global scale of each map. λ_r² is the mean over groups of the moments' diagonal, and the
    loss a quadratic form in them, so that the forces themselves are wanted in the backward only.
    """
    results = _phase("loss_moments", backend, _by_map(points), _by_map(weights), kept, scale, shared=(R_list, floor))
    return [state for state, _ in results], [moments for _, moments in results]


@loss_moments.register_fake
def _(points, weights, kept, scale, R_list, floor, backend):  # type: ignore[no-untyped-def]
    R, maps = len(R_list), _by_map(points)
    states = [_fake_like(of_map[0], implementation(backend).state_shape(of_map, R)) for of_map in maps]
    return states, [_fake_like(of_map[0], (of_map[0].shape[0], R, R)) for of_map in maps]


@torch.library.custom_op("drift_ops::loss_gradient", mutates_args=())
def loss_gradient(
    points: Sequence[Tensor],
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    scale: Tensor,
    factors: Tensor,
    incoming: Sequence[Tensor],
    R_list: Sequence[float],
    floor: float,
    backend: str,
) -> list[Tensor]:
    """Form C, phase 3, for all maps: the gradient w.r.t. gen, ``−2 incoming_g Σ_r factors_r F_r / (N·D·s)``.

    ``scale [maps]`` and ``factors [maps, R]`` (= 1/λ_r), in float64, are the global statistics; ``incoming [G]`` is the
    gradient of a map's loss.
    """
    statistics = (states, scale, factors, [of_map.contiguous() for of_map in incoming])
    return _phase("loss_gradient", backend, _by_map(points), _by_map(weights), *statistics, shared=(R_list, floor))


@loss_gradient.register_fake
def _(points, *rest):  # type: ignore[no-untyped-def]
    return [torch.empty_like(gen, memory_format=torch.contiguous_format) for gen, _, _ in _by_map(points)]


def _phase(name: str, backend: str, *of_maps: Iterable[Any], shared: tuple[Any, ...] = ()) -> list[Any]:
    """The results of a phase for every map. Triton takes them all at once, for fewer launches; others one by one."""
    phase = getattr(implementation(backend), name)
    if backend == "triton":
        return phase(*of_maps, *shared)
    return [phase(*of_map, *shared) for of_map in zip(*of_maps, strict=True)]


def _by_map(of_all_maps: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """gen, neg, pos of each map."""
    return [of_all_maps[i : i + 3] for i in range(0, len(of_all_maps), 3)]


def _fake_like(t: Tensor, shape: Sequence[int]) -> Tensor:
    """What a backend computes from ``t``: float64 for float64, float32 for all else."""
    return t.new_empty(shape, dtype=torch.float64 if t.dtype == torch.float64 else torch.float32)


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("drift_ops: there is no double backward; use backend='reference' for second derivatives")


for op in (affinity_sums_backward, loss_gradient):
    op.register_autograd(_no_double_backward)
