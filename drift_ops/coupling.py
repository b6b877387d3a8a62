"""Any member of the family of fields, composed of two streamed sums over pairs: nothing is ever N×M in memory.

The matrix A of every coupling is ``exp(L_ij − α_i − β_j)`` with potentials α of queries and β of keys that are
log-sum-exps of L, or halves of them. All of this is differentiable, Sinkhorn's iterations included.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .points import find_centre
from .spec import Field, PairGradients, PairProblem, PairSpec, PairWeights


class Coupled(NamedTuple):
    """Queries and the keys that are coupled with them at once."""

    problem: PairProblem
    weights: Tensor | None  # [G, M]; None is 1
    sums: Any  # has log_sums and weighted_sums: a backend, or drift_ops.ops.DifferentiableSums of one

    def log_sums_of_rows(self, beta: Tensor) -> Tensor:
        """``log Σ_j exp(L_ij − β_j)``, ``[S, G, N]``, −∞ where nothing is left."""
        return self._log_sums(beta, True)

    def log_sums_of_columns(self, alpha: Tensor | None) -> Tensor:
        """``log Σ_i exp(L_ij − α_i)``, ``[S, G, M]``, −∞ where nothing is left."""
        return self._log_sums(alpha, False)

    def _log_sums(self, potential: Tensor | None, by_row: bool) -> Tensor:
        spec = replace(self.problem.spec, sides=1, floor=0.0)
        return self.sums.log_sums(self.problem._replace(spec=spec), potential, by_row)

    def beta(self, field: Field) -> Tensor:
        """What weights in the kernel take from the logits of their keys, ``[S, G, M]``; ∞ leaves a key out."""
        S, G, _, M = self.problem.shape
        zeros = self.problem.q.new_zeros(S, G, M)
        return zeros - _log(self.weights) if field.weights == "kernel" and self.weights is not None else zeros


class Problem(NamedTuple):
    """What a field is of, in the dtype computed in: points ``[G, count, D]`` and their weights, None for 1."""

    x: Tensor
    neg: Tensor
    pos: Tensor
    weight_x: Tensor | None
    weight_neg: Tensor | None
    weight_pos: Tensor | None
    width: Tensor  # [S]
    unit: Tensor | None  # [G]; None is 1
    field: Field
    sums: Any
    least_distance: float = 0.0

    def sides(self) -> list[Coupled]:
        """x with all targets, or with negatives and with positives, as the field couples them."""
        own = [(self.x, self.weight_x)] if self.field.include_self else []
        negatives = [*own, *([(self.neg, self.weight_neg)] if self.neg.shape[1] else [])]
        positives = [(self.pos, self.weight_pos)]
        if self.field.sides == "joint":
            return [self._coupled(negatives + positives, self.field.include_self, 2)]
        return [self._coupled(negatives, self.field.include_self, 1), self._coupled(positives, False, 1)]

    def _coupled(self, targets: Sequence[tuple[Tensor, Tensor | None]], has_self: bool, sides: int) -> Coupled:
        field, weights = self.field, None
        if any(w is not None for _, w in targets):
            weights = torch.cat([y.new_ones(y.shape[:2]) if w is None else w for y, w in targets], 1)
        spec = PairSpec(field.cost, has_self, field.self_cost, sides, field.affinity_floor, self.least_distance)
        problem = PairProblem(spec, self.x, [y for y, _ in targets], self.width, self.unit)
        return Coupled(problem, weights, self.sums)


def drifting_field(problem: Problem) -> tuple[Tensor, Tensor, Tensor | None]:
    """V ``[S, G, N, D]``; sums of A over negatives and positives, ``[S, G, 2, N]``; Sinkhorn's residual ``[S, G]``."""
    sides = problem.sides()
    centre = find_centre(*(key for side in sides for key in side.problem.keys)).squeeze(1)
    nums, dens, residuals = zip(*(_couple(side, centre, problem.field) for side in sides), strict=True)
    den = torch.cat(dens, 2)  # [S, G, 2, N]
    by = den.flip(2)
    if problem.field.sides == "split":
        empty = (den == 0).any(2, keepdim=True)
        by = den.masked_fill(empty, 1.0).reciprocal().masked_fill(empty, 0.0)
    num = torch.cat(nums, 2) * by.unsqueeze(-1)
    return num[:, :, 1] - num[:, :, 0], den, None if residuals[0] is None else torch.stack(residuals).mean(0)


def masses(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """``log Σ_j exp(L_ij)`` over all targets; log_mass, the share of positives in it; the derivative of that by width.

    ``[S, G, N]`` each. The sums of the problem are those of a backend, which has ``pair_gradients`` as well.
    """
    split = problem._replace(field=replace(problem.field, sides="split"))
    logs, logits = zip(*(_log_sum_and_mean_logit(side, problem.field) for side in split.sides()), strict=True)
    total = torch.logaddexp(*logs)
    mean = sum((log - total).exp() * logit for log, logit in zip(logs, logits, strict=True))
    slope = (mean - logits[1]) / problem.width.view(-1, 1, 1)  # L moves by −L/width
    return total, logs[1] - total, slope.masked_fill(logs[1] == -math.inf, 0.0)


def _log_sum_and_mean_logit(side: Coupled, field: Field) -> tuple[Tensor, Tensor]:
    """``log Σ_j exp(L_ij)``, and the mean of L_ij under these exponentials, ``[S, G, N]`` each."""
    beta = side.beta(field)
    log_sums = side.log_sums_of_rows(beta)
    problem = side.problem._replace(spec=replace(side.problem.spec, floor=0.0))
    ones = PairGradients(den=log_sums.new_ones(log_sums.unsqueeze(2).shape))
    *_, mean = side.sums.pair_gradients(problem, PairWeights(_finite(log_sums), beta), ones)
    return log_sums, mean


def _couple(side: Coupled, centre: Tensor, field: Field) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of one coupling of all keys, the sums over each side: ``Σ_j A_ij w_j (y_j − centre)``, ``[S, G, sides, N, D]``,
    and ``Σ_j A_ij w_j``, ``[S, G, sides, N]``; and Sinkhorn's residual ``[S, G]``."""
    (_, _, N, _), beta, residual = side.problem.shape, side.beta(field), None
    if field.coupling == "row":
        alpha = _finite(side.log_sums_of_rows(beta))
    elif field.coupling == "two_sided":
        # softmax_j(L − β)·softmax_i(L − β) = exp(2L − β_j − rows_i − columns_j), where columns_j are those of L itself
        alpha = _finite(side.log_sums_of_rows(beta)) / 2
        beta = (_finite(side.log_sums_of_columns(None)) + beta) / 2
    else:
        share = (beta[0] < math.inf).to(beta.dtype)
        if field.weights == "marginal" and side.weights is not None:
            share = side.weights
        log_columns = _log(share / share.sum(1, keepdim=True)) + math.log(N)
        for _ in range(field.iterations):
            alpha, old = _finite(side.log_sums_of_rows(beta)), beta
            beta = _finite(side.log_sums_of_columns(alpha)) - log_columns
        errors = log_columns.exp() * (beta - old).expm1().abs()  # the sums of columns under (alpha, old) against c
        residual = errors.masked_fill(log_columns == -math.inf, 0.0).mean(2)
    w = side.weights if field.weights == "affinity" else None
    num, den = side.sums.weighted_sums(side.problem, PairWeights(alpha, beta, w, centre))
    return num, den, residual


def _log(w: Tensor) -> Tensor:
    """Logarithms of weights, −∞ with a gradient of 0 at 0."""
    return w.masked_fill(w == 0, 1.0).log().masked_fill(w == 0, -math.inf)


def _finite(log_sums: Tensor) -> Tensor:
    """Potentials of log-sum-exps: any number does where nothing is left, as nothing is weighted with it."""
    return log_sums.masked_fill(log_sums == -math.inf, 0.0)
