"""The definition of the drifting field in dense PyTorch: what every kernel is judged against.

Each function materialises its ``[..., N, M]`` matrices and computes in the dtype it is given, so that float64
in means float64 throughout. Distances are direct differences, never a Gram matrix. Nothing is checked here:
the public functions of :mod:`drift_ops` do that.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .spec import LossMap, LossSpec

MASKED = -1e30  # a logit whose softmax is exactly 0; finite, so that a fully masked row has no NaN gradient


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances ``[..., N, M]`` of ``x [..., N, D]`` and ``y [..., M, D]``; gradient 0 at 0."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def affinity(logits: Tensor, floor: float = 0.0) -> Tensor:
    """``sqrt(max(softmax_rows · softmax_cols, floor))`` of ``logits [..., N, M]``, in log space."""
    return ((logits.log_softmax(-1) + logits.log_softmax(-2)) / 2).exp().clamp(min=floor**0.5)


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


def drift_field(
    x: Tensor,
    pos: Tensor,
    neg: Tensor,
    temperatures: Sequence[float],
    weight_pos: Tensor | None,
    weight_neg: Tensor | None,
    include_self: bool,
    affinity_floor: float,
) -> Tensor:
    """Form B, Algorithm 2 of the paper: Laplacian kernel, both sides normalised jointly. ``[T, ..., N, D]``."""
    negatives = torch.cat([x, neg], -2) if include_self else neg
    targets = torch.cat([negatives, pos], -2)
    n, n_neg = x.shape[-2], negatives.shape[-2]
    is_self = torch.zeros(n, targets.shape[-2], dtype=torch.bool, device=x.device)
    if include_self:
        is_self.fill_diagonal_(True)
    d = distances(x, targets)  # [..., N, M]
    fields = []
    for T in temperatures:
        A = affinity((-d / T).masked_fill(is_self, MASKED), affinity_floor).masked_fill(is_self, 0.0)
        A_neg, A_pos = A[..., :n_neg], A[..., n_neg:]
        if weight_neg is not None:
            ones = weight_neg.new_ones(*weight_neg.shape[:-1], n_neg - neg.shape[-2])
            A_neg = A_neg * torch.cat([ones, weight_neg], -1).unsqueeze(-2)
        if weight_pos is not None:
            A_pos = A_pos * weight_pos.unsqueeze(-2)
        sum_neg, sum_pos = A_neg.sum(-1, keepdim=True), A_pos.sum(-1, keepdim=True)
        fields.append(sum_neg * (A_pos @ pos) - sum_pos * (A_neg @ negatives))
    return torch.stack(fields)


def kept_shape(spec: LossSpec, of_map: LossMap) -> tuple[int, ...]:
    """Shape of what phase 1 of form C keeps for phase 2: the distances ``[G, N, M]``."""
    return of_map.groups, of_map.counts[0], sum(of_map.counts)


def state_shape(spec: LossSpec, of_map: LossMap) -> tuple[int, ...]:
    """Shape of what phase 2 of form C keeps for phase 3: the forces ``[R, G, N, D]``."""
    return of_map.shape_of_forces(spec)


def loss_scale(spec: LossSpec, maps: Sequence[LossMap]) -> list[tuple[Tensor, Tensor]]:
    """Form C, phase 1: of each map ``[mean d·w, mean w]`` over all groups, and the distances ``d [G, N, M]``."""
    return [_loss_scale(spec, *of_map.in_groups()) for of_map in maps]


def _loss_scale(spec: LossSpec, points: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    w = torch.cat(tuple(weights), 1)  # [G, M]
    d = distances(points[0], torch.cat(tuple(points), 1)).clamp(min=spec.least_distance)
    return torch.stack([(d * w.unsqueeze(1)).double().mean(), w.double().mean()]), d


def loss_moments(
    spec: LossSpec, maps: Sequence[LossMap], kept: Sequence[Tensor], scale: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Form C, phase 2: of each map the forces ``F_R [R, G, N, D]``, and the means over i and dim of ``F_r F_s``,
    ``[G, R, R]``."""
    in_groups = (of_map.in_groups() for of_map in maps)
    return [_loss_moments(spec, *of_map, d, s) for of_map, d, s in zip(in_groups, kept, scale.unbind(), strict=True)]


def _loss_moments(
    spec: LossSpec, points: Sequence[Tensor], weights: Sequence[Tensor], d: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    gen, neg, _ = points
    N, D = gen.shape[1:]
    scale = scale.to(gen.dtype)
    targets = torch.cat(tuple(points), 1) / (scale / D**0.5).clamp(min=spec.least_scale)
    w = torch.cat(tuple(weights), 1).unsqueeze(1)  # [G, 1, M]
    is_self = torch.eye(N, targets.shape[1], dtype=gen.dtype, device=gen.device)
    delta = d / scale.clamp(min=spec.least_scale) + spec.self_distance * is_self
    forces = []
    for R in spec.R_list:
        A = affinity(-delta / R, spec.floor) * w
        A_neg, A_pos = A.split([N + neg.shape[1], A.shape[2] - N - neg.shape[1]], -1)
        c = torch.cat([-A_neg * A_pos.sum(-1, keepdim=True), A_pos * A_neg.sum(-1, keepdim=True)], -1)
        forces.append(c @ targets)
    F_R = torch.stack(forces)
    return F_R, (torch.einsum("rgnd,sgnd->grs", F_R.double(), F_R.double()) / (N * D)).to(gen.dtype)


def loss_gradient(
    spec: LossSpec,
    maps: Sequence[LossMap],
    forces: Sequence[Tensor],
    scale: Tensor,
    factors: Tensor,
    incoming: Sequence[Tensor],
) -> list[Tensor]:
    """Form C, phase 3: with ``F = Σ_R F_R/λ_R``, the gradient ``−2F/(N·D·s)`` times ``incoming [G]``, of every map."""
    grads = []
    for m, of_map in enumerate(maps):
        grad = torch.empty_like(of_map.gen)
        N, D = grad.shape[2:]
        F_total = (forces[m] * factors[m].to(forces[m].dtype).view(-1, 1, 1, 1)).sum(0)
        s = (scale[m] / D**0.5).clamp(min=spec.least_scale)
        by = incoming[m] * (-2 / (N * D * s)).to(F_total.dtype)
        grads.append(grad.copy_((F_total * by[:, None, None]).view(grad.shape)))
    return grads
