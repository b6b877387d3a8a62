"""Form B: the drifting field of the paper's Algorithm 2, a Laplacian kernel with both sides normalised jointly."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops, reference
from .arguments import check_flag, check_floor, check_points, check_positive, check_positives, check_weights
from .backends import choose
from .points import as_problems, full_precision, to_compute_dtype
from .spec import AffinitySpec


def drift_field(
    x: Tensor,
    pos: Tensor,
    neg: Tensor | None = None,
    *,
    temperature: float | Sequence[float],
    weight_pos: Tensor | None = None,
    weight_neg: Tensor | None = None,
    include_self: bool = True,
    affinity_floor: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Drifting field of the Laplacian kernel with both sides normalised jointly: Algorithm 2 of the paper.

    Over the targets ``[x (if include_self), neg, pos]``, ``L_ij = −‖x_i − y_j‖/T`` and
    ``A_ij = sqrt(max(softmax_j(L)·softmax_i(L), affinity_floor))``, the pair (x_i, x_i) masked out; weights multiply A
    after both softmaxes; ``V_i = (Σ⁻A)(Σ_j A⁺_ij y⁺_j) − (Σ⁺A)(Σ_j A⁻_ij y⁻_j)``.

    Args:
        x: queries (generated samples) ``[..., N, D]``; float64, float32, bfloat16 or float16. Leading dimensions are
            independent problems.
        pos: data ``[..., P, D]``, P ≥ 1.
        neg: further negatives ``[..., M, D]``; M = 0 and None mean none.
        temperature: T from 1e-12 to 1e12, or a sequence of them, which share one set of distances.
        weight_pos, weight_neg: weights of A ``[..., P]``, ``[..., M]``; None means 1. The weight of x itself is 1.
        include_self: count x among the negatives.
        affinity_floor: in [0, 1), of the squared affinity. 0 is the paper's; only :func:`drift_loss`, the release's
            training loss, has 1e-6 by default.
        backend: ``"cpu"``, ``"reference"``, … or None for the best one available (see :func:`backends`).

    Returns:
        V ``[..., N, D]``, or ``[T, ..., N, D]`` for a sequence of temperatures, in the dtype of ``x``;
        differentiable once w.r.t. every tensor.

    Raises:
        TypeError, ValueError: an argument is not what is described here, or there are no negatives at all.
    """
    check_flag("include_self", include_self)
    check_points("x", x)
    check_points("pos", pos, x, "x")
    if neg is None:
        neg = x.new_zeros(*x.shape[:-2], 0, x.shape[-1])
    check_points("neg", neg, x, "x", empty=True)
    if neg.shape[-2] == 0 and not include_self:
        raise ValueError(
            "neg: got no negatives with include_self=False, expected at least one; pass neg or include_self=True"
        )
    check_weights("weight_pos", weight_pos, pos, "pos")
    check_weights("weight_neg", weight_neg, neg, "neg")
    several = isinstance(temperature, Sequence)
    temperatures = (
        check_positives("temperature", temperature) if several else (check_positive("temperature", temperature),)
    )
    affinity_floor = check_floor(affinity_floor)
    chosen = choose(backend, x.device, x.dtype)
    with full_precision(x.device):
        q, p, n = (to_compute_dtype(t) for t in (x, pos, neg))
        w_pos, w_neg = (None if w is None else w.to(q.dtype) for w in (weight_pos, weight_neg))
        if chosen == "reference":
            V = reference.drift_field(q, p, n, temperatures, w_pos, w_neg, include_self, affinity_floor)
        else:
            weights = None
            if w_pos is not None or w_neg is not None:
                given = [q.new_ones(q.shape[:-1])] if include_self else []
                given += [t.new_ones(t.shape[:-1]) if w is None else w for t, w in ((n, w_neg), (p, w_pos))]
                weights = as_problems(torch.cat(given, -1), 1)
            q, n, p = (as_problems(t) for t in (q, n, p))
            keys = [q, n, p] if include_self else [n, p]
            spec = AffinitySpec("laplace", temperatures, floor=affinity_floor, has_self=include_self, sides=2)
            num, den, _ = ops.affinity_sums(q, keys, None, weights, spec, chosen)
            den = den.unsqueeze(-1)  # [T, G, 2, N, 1]
            V = torch.addcmul(den[:, :, 0] * num[:, :, 1], den[:, :, 1], num[:, :, 0], value=-1).reshape(-1, *x.shape)
        return (V if several else V[0]).to(x.dtype)
