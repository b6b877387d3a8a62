"""Form C for groups too large for a backend's group kernels: phases 2 and 3 from the weighted sums of forms A and B.

The same on every backend, which gives its own ``affinity_sums``. Nothing is read on the host.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .points import find_centre, to_compute_dtype

# Of the release's training loss, as in csrc/math.hpp.
LEAST_DISTANCE, LEAST_SCALE, SELF_DISTANCE = 1e-4, 1e-3, 100.0


def centred(points: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Samples ``[G, N, D]``, targets ``[G, M, D]``, both about a point amid them, and the weights ``[G, M]``."""
    targets = to_compute_dtype(torch.cat(tuple(points), 1))
    targets = targets - find_centre(targets)
    return targets[:, : points[0].shape[1]].contiguous(), targets, torch.cat(tuple(weights), 1)


def loss_moments(
    affinity_sums: Callable[..., Any],
    points: Sequence[Tensor],
    weights: Sequence[Tensor],
    scale: Tensor,
    R_list: Sequence[float],
    floor: float,
) -> tuple[Tensor, Tensor]:
    """Phase 2: the forces ``[R, G, N, D]``, and the means of their products ``[G, R, R]``.

    ``affinity_sums`` takes, beyond what :func:`drift_ops.ops.affinity_sums` does, a least distance, a distance that is
    added to self pairs, and the 0-d tensor in whose units widths and distances are.
    """
    q, targets, w = centred(points, weights)
    split, unit = q.shape[1] + points[1].shape[1], scale.clamp(min=LEAST_SCALE)
    num, den, _, _ = affinity_sums(
        q, targets, targets, w, "laplace", R_list, 1.0, split, True, floor, LEAST_DISTANCE, SELF_DISTANCE, unit
    )
    den = (den / _unit_of_points(scale, q)).unsqueeze(-1)  # [R, G, 2, N, 1]
    forces = num[:, :, 1].mul_(den[:, :, 0]).sub_(num[:, :, 0].mul_(den[:, :, 1])).contiguous()
    # no matrix products, which TF32 might round
    moments = torch.stack([torch.stack([(f * other).mean((1, 2)) for other in forces], -1) for f in forces], -1)
    return forces, moments


def loss_gradient(gen: Tensor, forces: Tensor, scale: Tensor, factors: Tensor, incoming: Tensor) -> Tensor:
    """Phase 3: the gradient w.r.t. ``gen [G, N, D]``, in its dtype."""
    by_R = factors.to(forces.dtype) * (-2 / (gen.shape[1] * gen.shape[2])) / _unit_of_points(scale, forces)
    grad = forces[0] * by_R[0]
    for of_R, by in zip(forces[1:], by_R[1:], strict=True):
        grad.addcmul_(of_R, by)
    return grad.mul_(incoming.view(-1, 1, 1)).to(gen.dtype)


def _unit_of_points(scale: Tensor, like: Tensor) -> Tensor:
    """``s = max(scale/√D, 1e-3)``, 0-d."""
    return (scale / like.shape[-1] ** 0.5).clamp(min=LEAST_SCALE).to(like.dtype)
