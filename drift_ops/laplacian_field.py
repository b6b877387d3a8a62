"""Form B, the drifting field of the paper's Algorithm 2, and the family of fields around it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops, reference
from .arguments import check_flag, check_floor, check_points, check_positive, check_weights, check_widths
from .backends import choose
from .coupling import Problem, drifting_field
from .points import as_problems, full_precision, saveable, to_compute_dtype
from .spec import AffinitySpec, Field, check_field, check_suits, is_form_b


def drift_field(
    x: Tensor,
    pos: Tensor,
    neg: Tensor | None = None,
    *,
    temperature: float | Sequence[float] | Tensor,
    weight_pos: Tensor | None = None,
    weight_neg: Tensor | None = None,
    include_self: bool = True,
    affinity_floor: float = 0.0,
    field: Field | None = None,
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
        temperature: T from 1e-12 to 1e12, or a sequence of them, which share one set of distances; or a tensor, 0-d or
            ``[T]``, which may have a gradient.
        weight_pos, weight_neg: weights of A ``[..., P]``, ``[..., M]``; None means 1. The weight of x itself is 1.
        include_self: count x among the negatives.
        affinity_floor: in [0, 1), of the squared affinity. 0 is the paper's; only :func:`drift_loss`, the release's
            training loss, has 1e-6 by default.
        field: another member of the family (docs/fields.md), which says itself what ``include_self`` and
            ``affinity_floor`` are; None is ``Field(include_self=…, affinity_floor=…)``, with what is said of weights
            above.
        backend: ``"cpu"``, ``"reference"``, … or None for the best one available (see :func:`backends`).

    Returns:
        V ``[..., N, D]``, or ``[T, ..., N, D]`` for a sequence of temperatures, in the dtype of ``x``;
        differentiable once w.r.t. every tensor.

    Raises:
        TypeError, ValueError: an argument is not what is described here, or there are no negatives at all.
    """
    if field is None:
        field = Field(include_self=check_flag("include_self", include_self), affinity_floor=check_floor(affinity_floor))
    else:
        check_field(field, include_self=(include_self, True), affinity_floor=(affinity_floor, 0.0))
    check_points("x", x)
    check_points("pos", pos, x, "x")
    if neg is None:
        neg = x.new_zeros(*x.shape[:-2], 0, x.shape[-1])
    check_points("neg", neg, x, "x", empty=True)
    check_weights("weight_pos", weight_pos, pos, "pos")
    check_weights("weight_neg", weight_neg, neg, "neg")
    check_suits(field, "neg", neg, {"weight_neg": weight_neg, "weight_pos": weight_pos})
    several = isinstance(temperature, Sequence) or (isinstance(temperature, Tensor) and temperature.dim() == 1)
    given = temperature if several or isinstance(temperature, Tensor) else (check_positive("temperature", temperature),)
    temperatures, of_tensor = check_widths("temperature", given, x)
    chosen = choose(backend, x.device, x.dtype)
    with full_precision(x.device):
        q, p, n = (to_compute_dtype(saveable(t)) for t in (x, pos, neg))
        w_pos, w_neg = (None if w is None else saveable(w).to(q.dtype) for w in (weight_pos, weight_neg))
        if chosen == "reference":
            V = reference.drift_field(q, p, n, temperatures if of_tensor is None else of_tensor, w_pos, w_neg, field)
            return (V if several else V[0]).to(x.dtype)
        q, n, p = (as_problems(t) for t in (q, n, p))
        w_neg, w_pos = (None if w is None else as_problems(w, 1) for w in (w_neg, w_pos))
        if of_tensor is None and is_form_b(field):
            V = _form_b(q, p, n, w_pos, w_neg, temperatures, field, chosen)
        else:
            width = q.new_tensor(temperatures) if of_tensor is None else saveable(of_tensor).to(q.dtype)
            sums = ops.DifferentiableSums(chosen)
            V, _, _ = drifting_field(Problem(q, n, p, None, w_neg, w_pos, width, None, field, sums))
        V = V.reshape(-1, *x.shape)
        return (V if several else V[0]).to(x.dtype)


def _form_b(
    q: Tensor,
    pos: Tensor,
    neg: Tensor,
    weight_pos: Tensor | None,
    weight_neg: Tensor | None,
    temperatures: tuple[float, ...],
    field: Field,
    backend: str,
) -> Tensor:
    """Algorithm 2 of problems ``[G, count, D]``: ``[T, G, N, D]``."""
    weights = None
    if weight_pos is not None or weight_neg is not None:
        given = [q.new_ones(q.shape[:-1])] if field.include_self else []
        given += [t.new_ones(t.shape[:-1]) if w is None else w for t, w in ((neg, weight_neg), (pos, weight_pos))]
        weights = torch.cat(given, -1)
    keys = [q, neg, pos] if field.include_self else [neg, pos]
    spec = AffinitySpec(
        "laplace",
        temperatures,
        floor=field.affinity_floor,
        has_self=field.include_self,
        sides=2,
        self_distance=field.self_cost,
    )
    num, den, _ = ops.affinity_sums(q, keys, None, weights, spec, backend)
    den = den.unsqueeze(-1)  # [T, G, 2, N, 1]
    return torch.addcmul(den[:, :, 0] * num[:, :, 1], den[:, :, 1], num[:, :, 0], value=-1)
