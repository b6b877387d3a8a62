"""The operator as ``torch.library`` custom ops: what autograd, ``torch.compile`` and autocast see.

Points are contiguous ``[G, count, D]`` float32 or float64 tensors; the public functions bring them there.
Each op has a fake implementation (shapes only) and dispatches to the backend named in its last argument.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import cpu

BACKENDS = {"cpu": cpu}  # modules that implement the ops


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
    return BACKENDS[backend].affinity_sums(
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
    return BACKENDS[backend].affinity_sums_backward(
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
    results = [BACKENDS[backend].loss_scale(points[i : i + 3], weights[i : i + 3]) for i in range(0, len(points), 3)]
    return torch.stack([means for means, _ in results]), [kept for _, kept in results]


@loss_scale.register_fake
def _(points, weights, backend):  # type: ignore[no-untyped-def]
    kept = [points[i].new_empty(BACKENDS[backend].kept_shape(points[i : i + 3])) for i in range(0, len(points), 3)]
    return points[0].new_empty(len(kept), 2, dtype=torch.float64), kept


@torch.library.custom_op("drift_ops::loss_forces", mutates_args=())
def loss_forces(
    points: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: Sequence[Tensor],
    scale: Tensor,
    R_list: Sequence[float],
    floor: float,
    backend: str,
) -> tuple[list[Tensor], Tensor]:
    """Form C, phase 2, for all maps: forces ``[R, G, N, D]`` before the division by λ, and λ_R² ``[maps, R]``.

    ``scale [maps]`` is the global scale of each map.
    """
    results = [
        BACKENDS[backend].loss_forces(
            points[3 * m : 3 * m + 3], weights[3 * m : 3 * m + 3], kept[m], scale[m], R_list, floor
        )
        for m in range(len(kept))
    ]
    return [forces for forces, _ in results], torch.stack([means for _, means in results])


@loss_forces.register_fake
def _(points, weights, kept, scale, R_list, floor, backend):  # type: ignore[no-untyped-def]
    forces = [gen.new_empty(len(R_list), *gen.shape) for gen in points[::3]]
    return forces, points[0].new_empty(len(kept), len(R_list), dtype=torch.float64)


@torch.library.custom_op("drift_ops::loss_gradient", mutates_args=())
def loss_gradient(
    forces: Sequence[Tensor], squared_lambda: Tensor, scale: Tensor, backend: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Form C, phase 3, for all maps: losses ``[G]`` and gradients w.r.t. gen ``[G, N, D]``.

    ``squared_lambda [maps, R]`` and ``scale [maps]`` are the global statistics.
    """
    results = [BACKENDS[backend].loss_gradient(f, squared_lambda[m], scale[m]) for m, f in enumerate(forces)]
    return [loss for loss, _ in results], [grad for _, grad in results]


@loss_gradient.register_fake
def _(forces, squared_lambda, scale, backend):  # type: ignore[no-untyped-def]
    return [f.new_empty(f.shape[1]) for f in forces], [f.new_empty(f.shape[1:]) for f in forces]


@torch.library.custom_op("drift_ops::attach_gradient", mutates_args=())
def attach_gradient(gen: Tensor, loss: Tensor, grad: Tensor) -> Tensor:
    """``loss [G]``, whose gradient w.r.t. ``gen [G, N, D]`` is the precomputed ``grad``."""
    return loss.clone()


@attach_gradient.register_fake
def _(gen, loss, grad):  # type: ignore[no-untyped-def]
    return torch.empty_like(loss)


@torch.library.custom_op("drift_ops::scale_gradient", mutates_args=())
def scale_gradient(grad: Tensor, by: Tensor) -> Tensor:
    """``grad [G, N, D]`` times ``by [G]``."""
    return grad * by[:, None, None]


@scale_gradient.register_fake
def _(grad, by):  # type: ignore[no-untyped-def]
    return torch.empty_like(grad)


attach_gradient.register_autograd(
    lambda ctx, by: (scale_gradient(ctx.saved_tensors[0], by), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[2]),
)


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("drift_ops: there is no double backward; use backend='reference' for second derivatives")


for op in (affinity_sums_backward, scale_gradient):
    op.register_autograd(_no_double_backward)
