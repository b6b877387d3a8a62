"""Any member of the family of fields, composed of two streamed sums over pairs: nothing is ever N×M in memory.

The matrix A of every coupling is ``exp(L_ij − α_i − β_j)`` with potentials α of queries and β of keys that are
log-sum-exps of L, or halves of them. All of this is differentiable, Sinkhorn's iterations included.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .points import find_centre
from .spec import Field, PairSpec


class Coupled(NamedTuple):
    """A side of a field, or both: sums over the keys of each side, ``[S, G, sides, N, D]`` and ``[S, G, sides, N]``."""

    num: Tensor  # Σ_j A_ij w_j (y_j − centre)
    den: Tensor  # Σ_j A_ij w_j
    residual: Tensor | None  # [S, G], of Sinkhorn


class Pairs(NamedTuple):
    """Queries ``[G, N, D]`` and keys ``[G, count, D]``, whose pairs have logits ``L = −(C/unit + self_cost)/width``."""

    spec: PairSpec
    q: Tensor
    keys: Sequence[Tensor]
    width: Tensor  # [S]
    unit: Tensor | None  # [G]; None is 1
    backend: str

    def log_sums_of_rows(self, beta: Tensor) -> Tensor:
        """``log Σ_j exp(L_ij − β_j)``, ``[S, G, N]``, −∞ where nothing is left."""
        return ops.log_sums(self.spec, self.q, self.keys, self.width, self.unit, beta, True, self.backend)

    def log_sums_of_columns(self, alpha: Tensor | None) -> Tensor:
        """``log Σ_i exp(L_ij − α_i)``, ``[S, G, M]``, −∞ where nothing is left."""
        return ops.log_sums(self.spec, self.q, self.keys, self.width, self.unit, alpha, False, self.backend)


def drifting_field(
    x: Tensor,
    pos: Tensor,
    neg: Tensor,
    width: Tensor,
    unit: Tensor | None,
    weight_x: Tensor | None,
    weight_neg: Tensor | None,
    weight_pos: Tensor | None,
    field: Field,
    backend: str,
    least_distance: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """V ``[S, G, N, D]``; the sums of A over negatives and positives, ``[S, G, 2, N]``; Sinkhorn's residual ``[S, G]``.

    ``x [G, N, D]``, ``pos``, ``neg`` and their weights ``[G, count]`` (None: 1) in the dtype computed in.
    """
    own = [(x, weight_x)] if field.include_self else []
    negatives = [*own, *([(neg, weight_neg)] if neg.shape[1] else [])]
    centre = find_centre(*(y for y, _ in negatives), pos).squeeze(1)
    sides = [negatives, [(pos, weight_pos)]]
    both = [[*negatives, (pos, weight_pos)]] if field.sides == "joint" else sides
    found = []
    for n, targets in enumerate(both):
        keys = [y for y, _ in targets]
        spec = PairSpec(
            field.cost,
            has_self=field.include_self and n == 0,
            self_cost=field.self_cost,
            sides=2 if field.sides == "joint" else 1,
            floor=field.affinity_floor,
            least_distance=least_distance,
        )
        found.append(
            _couple(Pairs(spec, x, keys, width, unit, backend), _joined(keys, [w for _, w in targets]), centre, field)
        )
    den = torch.cat([of_side.den for of_side in found], 2)  # [S, G, 2, N]
    num = torch.cat([of_side.num for of_side in found], 2)
    by = den.flip(2)
    if field.sides == "split":
        empty = (den == 0).any(2, keepdim=True)
        by = den.masked_fill(empty, 1.0).reciprocal().masked_fill(empty, 0.0)
    num = num * by.unsqueeze(-1)
    residuals = [of_side.residual for of_side in found if of_side.residual is not None]
    return num[:, :, 1] - num[:, :, 0], den, torch.stack(residuals).mean(0) if residuals else None


def _joined(keys: Sequence[Tensor], weights: Sequence[Tensor | None]) -> Tensor | None:
    """Weights of all keys ``[G, M]``, None where all are 1."""
    if all(w is None for w in weights):
        return None
    return torch.cat([k.new_ones(k.shape[:2]) if w is None else w for k, w in zip(keys, weights, strict=True)], 1)


def _couple(pairs: Pairs, w: Tensor | None, centre: Tensor, field: Field) -> Coupled:
    """The sums of one coupling of all keys of ``pairs``, whose weights are ``w [G, M]``."""
    (G, N, _), M = pairs.q.shape, sum(k.shape[1] for k in pairs.keys)
    zeros = pairs.q.new_zeros(len(pairs.width), G, M)
    beta = zeros - _log(w) if field.weights == "kernel" and w is not None else zeros
    residual = None
    if field.coupling == "row":
        alpha = _finite(pairs.log_sums_of_rows(beta))
    elif field.coupling == "two_sided":
        # softmax_j(L − β)·softmax_i(L − β) = exp(2L − β_j − rows_i − columns_j), where columns_j are those of L itself
        alpha = _finite(pairs.log_sums_of_rows(beta)) / 2
        beta = (_finite(pairs.log_sums_of_columns(None)) + beta) / 2
    else:
        share = w if field.weights == "marginal" and w is not None else (beta[:1] < math.inf).to(zeros.dtype).squeeze(0)
        log_columns = _log(share / share.sum(1, keepdim=True)) + math.log(N)
        for _ in range(field.iterations):
            alpha, old = _finite(pairs.log_sums_of_rows(beta)), beta
            beta = _finite(pairs.log_sums_of_columns(alpha)) - log_columns
        errors = log_columns.exp() * (beta - old).expm1().abs()  # the sums of columns under (alpha, old) against c
        residual = errors.masked_fill(log_columns == -math.inf, 0.0).mean(2)
    by = w if field.weights == "affinity" else None
    num, den = ops.weighted_sums(
        pairs.spec, pairs.q, pairs.keys, pairs.width, pairs.unit, alpha, beta, by, centre, pairs.backend
    )
    return Coupled(num, den, residual)


def _log(w: Tensor) -> Tensor:
    """Logarithms of weights, −∞ with a gradient of 0 at 0."""
    return w.masked_fill(w == 0, 1.0).log().masked_fill(w == 0, -math.inf)


def _finite(log_sums: Tensor) -> Tensor:
    """Potentials of log-sum-exps: any number does where nothing is left, as nothing is weighted with it."""
    return log_sums.masked_fill(log_sums == -math.inf, 0.0)
