"""The definition of the drifting field in dense PyTorch: what every kernel is judged against.

Each function materialises its ``[..., N, M]`` matrices and computes in the dtype it is given, so that float64
in means float64 throughout. Distances are direct differences, never a Gram matrix. Nothing is checked here:
the public functions of :mod:`drift_ops` do that.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .spec import Field, LossMap, LossSpec, PairGradients, PairProblem, PairSpec, PairWeights, by_map

MASKED = -1e30  # a logit whose softmax is exactly 0; finite, so that a fully masked row has no NaN gradient


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances ``[..., N, M]`` of ``x [..., N, D]`` and ``y [..., M, D]``; gradient 0 at 0."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def affinity(logits: Tensor) -> Tensor:
    """``sqrt(softmax_rows · softmax_cols)`` of ``logits [..., N, M]``, in log space."""
    return ((logits.log_softmax(-1) + logits.log_softmax(-2)) / 2).exp()


def compute_V(
    x: Tensor,
    x_data: Tensor,
    x_gen: Tensor,
    sigmas: Sequence[float],
    temperature: float,
    normalize_features: bool,
    normalize_drift: bool,
) -> Tensor:
    """Form A: Gaussian kernel, each side normalised on its own, averaged over ``sigmas``. ``[..., N, D]``."""

    def mean_under_kernel(y: Tensor, sigma: float) -> Tensor:
        if y.shape[-2] == 0:
            return torch.zeros_like(x)
        d = distances(unit_features(x), unit_features(y)) if normalize_features else distances(x, y)
        A = affinity(torch.exp(-d.square() / (2 * sigma**2)) / temperature)  # [..., N, M]
        A = A / A.sum((-2, -1), keepdim=True)
        W = A / (A.sum(-1, keepdim=True) + 1e-8)
        return W @ y

    V = torch.stack([mean_under_kernel(x_data, s) - mean_under_kernel(x_gen, s) for s in sigmas]).mean(0)
    return unit_drift(V) if normalize_drift else V


def unit_features(x: Tensor) -> Tensor:
    """Rows of ``x [..., D]`` scaled to norm √D."""
    return F.normalize(x, dim=-1, eps=1e-12) * x.shape[-1] ** 0.5


def unit_drift(V: Tensor) -> Tensor:
    """``V [..., N, D]`` divided by its mean row norm, per problem."""
    return V / ((V.norm(dim=-1, keepdim=True) + 1e-8).mean(-2, keepdim=True) + 1e-8)


def costs(x: Tensor, y: Tensor, cost: str, least_distance: float = 0.0) -> Tensor:
    """C ``[..., N, M]``: distances, or their squares."""
    d = distances(x, y)
    d = d.clamp(min=least_distance) if least_distance else d
    return d.square() if cost == "l2_sq" else d


def logits_of(C: Tensor, width: Any, self_cost: float) -> Tensor:
    """L = −(C + self_cost)/width, where the first targets are the samples themselves; −∞ where a pair is left out."""
    is_self = torch.eye(*C.shape[-2:], dtype=torch.bool, device=C.device)
    if self_cost == math.inf:
        return (-C / width).masked_fill(is_self, -math.inf)  # not an infinite cost, whose gradient w.r.t. width is NaN
    return -torch.where(is_self, C + self_cost, C) / width


def potentials(logits: Tensor, dim: int) -> Tensor:
    """Log-sum-exps along ``dim``, which stays as 1; 0 where all is masked."""
    sums = logits.logsumexp(dim, keepdim=True)
    return torch.where(sums < MASKED / 2, 0.0, sums)


def sinkhorn(logits: Tensor, log_shares: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The plan ``exp(L + u + v)`` with rows that sum to 1, and columns ``[..., 1, M]`` to ``N·exp(log_shares)``.

    Also the mean error ``[...]`` of the sums of columns before they were scaled for the last time.
    """
    log_columns, v = log_shares + math.log(logits.shape[-2]), torch.zeros_like(log_shares)
    for _ in range(iterations):
        u, old = -potentials(logits + v, -1), v
        v = log_columns - potentials(logits + u, -2)
    errors = log_columns.exp() * (old - v).expm1().abs()  # Σ_i exp(L + u + old) = exp(log_columns + old − v)
    return (logits + u + v).exp(), errors.where(log_columns > MASKED / 2, 0.0).mean((-2, -1))


def coupled(logits: Tensor, weights: Tensor, field: Field) -> tuple[Tensor, Tensor]:
    """A of ``logits [..., N, M]`` of targets with ``weights [..., M]``, and Sinkhorn's residual ``[...]``, else 0."""
    none = logits.new_zeros(logits.shape[:-2])
    if field.coupling == "row":
        return logits.softmax(-1), none
    if field.coupling == "two_sided":
        return affinity(logits), none
    share = weights if field.weights == "marginal" else (weights > 0).to(logits.dtype)
    log_shares = (share / share.sum(-1, keepdim=True)).log().clamp(min=MASKED).unsqueeze(-2)
    return sinkhorn(logits, log_shares, field.iterations)


class Coefficients(NamedTuple):
    """What the targets of a field are multiplied by, and what was found on the way."""

    c: Tensor  # [..., N, M]: V = c @ targets
    log_row_sums: Tensor  # [..., N]: log Σ_j exp(L_ij)
    log_mass: Tensor  # [..., N]: log Σ_{j in pos} softmax_j(L)
    sums: tuple[Tensor, Tensor]  # [..., N]: of A over negatives and over positives
    residual: Tensor  # [...]: Sinkhorn's error of the sums of columns, of both sides where these are split


def _log_weights(weights: Tensor) -> Tensor:
    """−∞ with a gradient of 0 at 0."""
    return weights.masked_fill(weights == 0, 1.0).log().masked_fill(weights == 0, -math.inf)


def coefficients(logits: Tensor, weights: Tensor, negatives: int, field: Field) -> Coefficients:
    """Of ``logits [..., N, M]``, −∞ where a pair is left out, and weights ``[..., M]``; the first are negatives."""
    if field.weights == "kernel":
        logits = logits + _log_weights(weights).unsqueeze(-2)
    left_out = logits == -math.inf
    logits = logits.masked_fill(left_out, MASKED)
    counts = [negatives, logits.shape[-1] - negatives]
    if field.sides == "joint":
        A, residual = coupled(logits, weights, field)
    else:
        sides = zip(logits.split(counts, -1), weights.split(counts, -1), strict=True)
        parts, residuals = zip(*(coupled(*side, field) for side in sides), strict=True)
        A, residual = torch.cat(parts, -1), sum(residuals) / 2
    A = A.clamp(min=field.affinity_floor**0.5).masked_fill(left_out, 0.0)
    if field.weights == "affinity":
        A = A * weights.unsqueeze(-2)
    of_neg, of_pos = A.split(counts, -1)
    sum_neg, sum_pos = of_neg.sum(-1, keepdim=True), of_pos.sum(-1, keepdim=True)
    by_neg, by_pos = sum_pos, sum_neg
    if field.sides == "split":
        empty = (sum_neg == 0) | (sum_pos == 0)
        by_neg, by_pos = (s.masked_fill(empty, 1.0).reciprocal().masked_fill(empty, 0.0) for s in (sum_neg, sum_pos))
    log_row_sums = potentials(logits, -1).squeeze(-1)
    log_mass = logits[..., negatives:].logsumexp(-1) - log_row_sums
    sums = sum_neg.squeeze(-1), sum_pos.squeeze(-1)
    return Coefficients(torch.cat([-of_neg * by_neg, of_pos * by_pos], -1), log_row_sums, log_mass, sums, residual)


def drift_field(
    x: Tensor,
    pos: Tensor,
    neg: Tensor,
    temperatures: Sequence[float] | Tensor,
    weight_pos: Tensor | None,
    weight_neg: Tensor | None,
    field: Field,
) -> Tensor:
    """The family, of which form B, Algorithm 2 of the paper, is ``Field()``. ``[T, ..., N, D]``."""
    ones = x.new_ones
    own = [x] if field.include_self else []
    targets = torch.cat([*own, neg, pos], -2)
    given = [ones(y.shape[:-1]) if w is None else w for y, w in ((neg, weight_neg), (pos, weight_pos))]
    weights = torch.cat([*(ones(y.shape[:-1]) for y in own), *given], -1)
    C = costs(x, targets, field.cost)  # [..., N, M]
    negatives = targets.shape[-2] - pos.shape[-2]
    self_cost = field.self_cost if field.include_self else 0.0
    logits = [logits_of(C, T, self_cost) for T in temperatures]
    return torch.stack([coefficients(of_T, weights, negatives, field).c @ targets for of_T in logits])


def _logits(problem: PairProblem) -> Tensor:
    """``[S, G, N, M]``, −∞ where a pair is left out."""
    spec, q, keys, width, unit = problem
    delta = costs(q, torch.cat(tuple(keys), 1), spec.cost, spec.least_distance)
    if unit is not None:
        delta = delta / unit.to(q.dtype).view(-1, 1, 1)
    return logits_of(delta, width.to(q.dtype).view(-1, 1, 1, 1), spec.self_cost if spec.has_self else 0.0)


def log_sums(problem: PairProblem, potential: Tensor | None, by_row: bool) -> Tensor:
    """See :func:`drift_ops.ops.log_sums`."""
    logits = _logits(problem)
    if potential is not None:
        logits = logits - potential.unsqueeze(2 if by_row else 3)
    return logits.logsumexp(3 if by_row else 2)


def weighted_sums(problem: PairProblem, weights: PairWeights) -> tuple[Tensor, Tensor]:
    """See :func:`drift_ops.ops.weighted_sums`."""
    A = _affinities(problem.spec, _logits(problem), weights.alpha, weights.beta)
    return _sums(problem, A, weights.w, weights.centre)


def _affinities(spec: PairSpec, logits: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    exponents = logits - alpha.unsqueeze(3) - beta.unsqueeze(2)
    return exponents.exp().clamp(min=spec.floor**0.5).masked_fill(exponents < MASKED / 2, 0.0)


def _sums(problem: PairProblem, A: Tensor, w: Tensor | None, centre: Tensor | None) -> tuple[Tensor, Tensor]:
    A = A if w is None else A * w.unsqueeze(1)
    values = torch.cat(tuple(problem.keys), 1)
    values = values if centre is None else values - centre.unsqueeze(1)
    first = problem.first_keys
    counts = [first, A.shape[3] - first][: problem.spec.sides]
    sides = list(zip(A.split(counts, 3), values.split(counts, 1), strict=True))
    return torch.stack([A @ v for A, v in sides], 2), torch.stack([A.sum(3) for A, _ in sides], 2)


def pair_gradients(
    problem: PairProblem, weights: PairWeights, incoming: PairGradients
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """See :func:`drift_ops.ops.pairs._pair_gradients`; by autograd."""
    with torch.enable_grad():
        q, alpha, beta, *keys = (
            t.detach().requires_grad_() for t in (problem.q, weights.alpha, weights.beta, *problem.keys)
        )
        problem = problem._replace(q=q, keys=keys)
        w = None if weights.w is None else weights.w.detach().requires_grad_()
        by = alpha.new_ones(*alpha.shape, 1).requires_grad_()  # of L: its gradient is Σ_j flow_ij L_ij
        A = _affinities(problem.spec, _logits(problem).clamp(min=MASKED) * by, alpha, beta)
        outputs = [*_sums(problem, A, w, weights.centre), A.sum(2)]
        grads = [torch.zeros_like(o) if g is None else g for o, g in zip(outputs, incoming, strict=True)]
        inputs = [q, alpha, beta, by, *keys, *([] if w is None else [w])]
        found = torch.autograd.grad(outputs, inputs, grads, allow_unused=True, materialize_grads=True)
    grad_q, grad_alpha, grad_beta, width_flow, *grads = found
    grad_w = q.new_empty(0) if w is None else grads.pop()
    return grad_q, grads, grad_w, -grad_alpha, -grad_beta, width_flow.squeeze(3)


def kept_shape(spec: LossSpec, of_map: LossMap) -> tuple[int, ...]:
    """Shape of what phase 1 of form C keeps for phase 2: the distances ``[G, N, M]``."""
    return of_map.groups, of_map.counts[0], sum(of_map.counts[0 if spec.include_self else 1 :])


def state_shape(spec: LossSpec, of_map: LossMap) -> tuple[int, ...]:
    """Shape of what phase 2 of form C keeps for phase 3: the forces ``[R, G, N, D]``."""
    return of_map.shape_of_forces(spec)


def loss_scale(spec: LossSpec, maps: Sequence[LossMap]) -> list[tuple[Tensor, Tensor]]:
    """Form C, phase 1: of each map ``[mean C·w, mean w]`` over all pairs, ``[1, 2]``, or ``[G, 2]`` where every group
    has its own scale; and the costs ``C [G, N, M]``."""
    return [_loss_scale(spec, *_targets(spec, of_map)) for of_map in maps]


def _targets(spec: LossSpec, of_map: LossMap) -> tuple[Tensor, Tensor, Tensor]:
    """gen ``[G, N, D]``, the targets ``[G, M, D]`` and their weights ``[G, M]``."""
    points, weights = of_map.in_groups()
    first = 0 if spec.include_self else 1
    return points[0], torch.cat(points[first:], 1), torch.cat(weights[first:], 1)


def _is_self(spec: LossSpec, of_pairs: Tensor) -> Tensor:
    """1 for the pairs of a sample with itself, else 0, ``[N, M]``."""
    eye = torch.eye(*of_pairs.shape[-2:], dtype=of_pairs.dtype, device=of_pairs.device)
    return eye if spec.include_self else torch.zeros_like(eye)


def _loss_scale(spec: LossSpec, gen: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    C = costs(gen, targets, spec.cost, spec.least_distance)
    w = weights.unsqueeze(1).expand_as(C)
    if not spec.scale_self_pairs:
        w = w * (1 - _is_self(spec, C))
    means = torch.stack([(C * w).double().mean((1, 2)), w.double().mean((1, 2))], 1)  # [G, 2]
    return means if spec.scale != "global" else means.mean(0, keepdim=True), C


def loss_moments(
    spec: LossSpec, maps: Sequence[LossMap], kept: Sequence[Tensor], scale: Tensor, R: Tensor | None = None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Form C, phase 2, with a scale for each map or for each group, and ``R``, where the spec does not have them.

    Of each map: the forces ``F_R [R, G, N, D]``; the means over i and dim of ``F_r F_s``, ``[G, R, R]``; and the
    details ``[6, R, G, N]``, see :data:`drift_ops.spec.DETAILS`.
    """
    widths = spec.R_list if R is None else R.unbind()
    given = zip(maps, kept, by_map(maps, scale), strict=True)
    return [_loss_moments(spec, widths, *_targets(spec, of_map), C, s, of_map.counts[2]) for of_map, C, s in given]


def _loss_moments(
    spec: LossSpec,
    widths: Sequence[Any],
    gen: Tensor,
    targets: Tensor,
    weights: Tensor,
    C: Tensor,
    scale: Tensor,
    positives: int,
) -> tuple[Tensor, Tensor, Tensor]:
    N, D = gen.shape[1:]
    scale = scale.to(gen.dtype).view(-1, 1, 1)
    targets = targets / (scale / D**0.5).clamp(min=spec.least_scale)
    delta = C / scale.clamp(min=spec.least_scale)
    self_cost = spec.self_distance if spec.include_self else 0.0
    forces, details = [], []
    for R in widths:
        logits = logits_of(delta, R, self_cost)
        of_R = coefficients(logits, weights, C.shape[2] - positives, spec.field)
        forces.append(of_R.c @ targets)
        if spec.details:
            details.append(torch.stack(_details(of_R, logits, R, weights, positives, spec)))
    F_R = torch.stack(forces)
    moments = torch.einsum("rgnd,sgnd->grs", F_R.double(), F_R.double()) / (N * D)
    return F_R, moments.to(gen.dtype), torch.stack(details, 1) if spec.details else gen.new_empty(0)


def _details(
    found: Coefficients, logits: Tensor, R: Any, weights: Tensor, positives: int, spec: LossSpec
) -> tuple[Tensor, ...]:
    """In the order of :data:`drift_ops.spec.DETAILS`, each ``[G, N]``."""
    with_weights = logits + _log_weights(weights).unsqueeze(1) if spec.weights == "kernel" else logits
    with_weights = with_weights.clamp(min=MASKED)
    moved = -logits.masked_fill(logits == -math.inf, 0.0) / R  # dL/dR = −L/R
    of_pos = (with_weights[..., -positives:].softmax(-1) * moved[..., -positives:]).sum(-1)
    slope = of_pos - (with_weights.softmax(-1) * moved).sum(-1)
    slope = slope.masked_fill(found.log_mass < MASKED / 2, 0.0)
    residual = found.residual.unsqueeze(-1).expand_as(slope)
    return found.log_row_sums, found.log_mass, *found.sums, slope, residual


def loss_gradient(
    spec: LossSpec,
    maps: Sequence[LossMap],
    forces: Sequence[Tensor],
    scale: Tensor,
    factors: Tensor,
    incoming: Sequence[Tensor],
) -> list[Tensor]:
    """Form C, phase 3: with ``F = Σ_R F_R/λ_R``, the gradient ``−2F/(N·D·s)`` times ``incoming [G]``, of every map.

    ``scale`` and ``factors``, 1/λ_R, are of each map or of each group.
    """
    grads = []
    statistics = by_map(maps, scale), by_map(maps, factors)
    for of_map, F_R, of_scale, by, of_loss in zip(maps, forces, *statistics, incoming, strict=True):
        N, D = of_map.gen.shape[2:]
        F_total = (F_R * by.to(F_R.dtype).T[:, :, None, None]).sum(0)
        s = (of_scale / D**0.5).clamp(min=spec.least_scale)
        F_total = F_total * (of_loss * (-2 / (N * D * s)).to(F_R.dtype))[:, None, None]
        grads.append(torch.empty_like(of_map.gen).copy_(F_total.view(of_map.gen.shape)))
    return grads
