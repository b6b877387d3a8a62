"""Form C for groups that a backend has no group kernel for: phases 2 and 3 from weighted sums that it streams.

The same on every backend, which gives its own sums. Nothing is read on the host.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .coupling import Problem, drifting_field, masses
from .points import gathered, to_compute_dtype
from .spec import AffinitySpec, LossMap, LossSpec, PairGradients, PairProblem, PairSpec, PairWeights


def centred(of_map: LossMap) -> tuple[Tensor, Tensor, Tensor]:
    """Samples ``[G, N, D]``, targets ``[G, M, D]``, both about a point amid them, and the weights ``[G, M]``."""
    points, weights = of_map.in_groups()
    points = [to_compute_dtype(t) for t in points]
    q, targets, _, _ = gathered(points[0], points, None)
    return q, targets, torch.cat(weights, 1)


def loss_moments(
    affinity_sums: Callable[..., Any], spec: LossSpec, of_map: LossMap, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Phase 2: the forces ``[R, G, N, D]``, and the means of their products ``[G, R, R]``."""
    (gen, neg, pos), weights = of_map.in_groups()
    affinity = AffinitySpec(
        "laplace",
        spec.R_list,
        floor=spec.floor,
        has_self=True,
        sides=2,
        least_distance=spec.least_distance,
        self_distance=spec.self_distance,
    )
    q, *others = (to_compute_dtype(t) for t in (gen, neg, pos) if t.shape[1])
    unit = scale.clamp(min=spec.least_scale)
    num, den, *_ = affinity_sums(affinity, q, [q, *others], None, torch.cat(weights, 1), unit)
    den = (den / _unit_of_points(spec, scale, q)).unsqueeze(-1)  # [R, G, 2, N, 1]
    forces = num[:, :, 1].mul_(den[:, :, 0]).sub_(num[:, :, 0].mul_(den[:, :, 1])).contiguous()
    return forces, _moments(forces)


def composed_moments(
    sums: Any, spec: LossSpec, of_map: LossMap, scale: Tensor, R: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Phase 2 of any member of the family, from a backend's ``sums`` over pairs, with the details."""
    (gen, neg, pos), weights = of_map.in_groups()
    gen, neg, pos = (to_compute_dtype(t) for t in (gen, neg, pos))
    width = gen.new_tensor(spec.R_list) if R is None else R.to(gen.dtype)
    unit = scale.clamp(min=spec.least_scale).to(gen.dtype).expand(len(gen))
    of_gen, of_neg, of_pos = weights
    problem = Problem(gen, neg, pos, of_gen, of_neg, of_pos, width, unit, spec.field, sums, spec.least_distance)
    V, of_sides, residual = drifting_field(problem)
    forces = (V / _unit_of_points(spec, scale, V).view(-1, 1, 1)).contiguous()
    details = V.new_empty(0)
    if spec.details:
        residual = V.new_zeros(()) if residual is None else residual.unsqueeze(2)
        log_row_sums, log_mass, slope = masses(problem)
        found = log_row_sums, log_mass, *of_sides.unbind(2), slope, residual.expand(log_mass.shape)
        details = torch.stack(found)
    return forces, _moments(forces), details


def _moments(forces: Tensor) -> Tensor:
    """Mean products ``[G, R, R]`` of forces ``[R, G, N, D]``: no matrix products, which TF32 might round."""
    return torch.stack([torch.stack([(f * other).mean((1, 2)) for other in forces], -1) for f in forces], -1)


def composed_means(sums: Any, spec: LossSpec, of_map: LossMap) -> Tensor:
    """Phase 1 of any member of the family: means of C·w and w over all pairs, ``[1, 2]`` or ``[G, 2]``, in float64."""
    (gen, neg, pos), weights = of_map.in_groups()
    points = [to_compute_dtype(t) for t in (gen, neg, pos)]
    kinds = [n for n in range(3) if points[n].shape[1] and (n or spec.include_self)]
    keys, w = [points[n] for n in kinds], torch.cat([weights[n] for n in kinds], 1).to(points[0].dtype)
    # Under so large a width all pairs count alike, and mean logits are mean costs.
    pairs = PairSpec(spec.cost, has_self=spec.include_self, least_distance=spec.least_distance)
    problem = PairProblem(pairs, points[0], keys, w.new_tensor([ALL_ALIKE]), None)
    alpha, beta = (gen.new_zeros(1, *t.shape[:2], dtype=w.dtype) for t in (gen, w))
    *_, logits = sums.pair_gradients(problem, PairWeights(alpha, beta, w), PairGradients(den=alpha.unsqueeze(2) + 1))
    costs, total = logits[0].sum(1, dtype=torch.float64) * -ALL_ALIKE, w.sum(1, dtype=torch.float64) * gen.shape[1]
    if spec.include_self and not spec.scale_self_pairs:
        of_self = weights[0].sum(1, dtype=torch.float64)
        costs, total = costs - of_self * spec.least_cost, total - of_self
    means = torch.stack([costs, total], 1) / (gen.shape[1] * w.shape[1])  # [G, 2]
    return means if spec.scale != "global" else means.mean(0, keepdim=True)


ALL_ALIKE = 1e15  # a width beside which costs are nothing


def loss_gradient(
    spec: LossSpec, gen: Tensor, forces: Tensor, scale: Tensor, factors: Tensor, incoming: Tensor
) -> Tensor:
    """Phase 3: the gradient w.r.t. ``gen [L, T, N, D]``, with its strides and in its dtype."""
    by = factors.to(forces.dtype).T * (-2 / (gen.shape[2] * gen.shape[3])) / _unit_of_points(spec, scale, forces)
    by_R = (by * incoming)[:, :, None, None]  # [R, G, 1, 1]
    total = forces[0] * by_R[0]
    for of_R, of_groups in zip(forces[1:], by_R[1:], strict=True):
        total.addcmul_(of_R, of_groups)
    return torch.empty_like(gen).copy_(total.view(gen.shape))


def _unit_of_points(spec: LossSpec, scale: Tensor, like: Tensor) -> Tensor:
    """``s = max(scale/√D, least_scale)``, of the shape of the scale."""
    return (scale / like.shape[-1] ** 0.5).clamp(min=spec.least_scale).to(like.dtype)
