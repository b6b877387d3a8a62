"""The ``triton`` backend: float32 kernels on contiguous CUDA tensors; form C also reads bfloat16 and float16.

Problems that one program can hold go to the group kernels, all others are streamed: :mod:`drift_ops.triton.group`
draws the line. Called by :mod:`drift_ops.ops` only.
"""

from collections.abc import Sequence

from torch import Tensor

from .. import streamed_loss
from . import group, group_field, group_loss, launch, streaming, streaming_loss
from .streaming_backward import affinity_sums_backward as affinity_sums_backward


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`drift_ops.ops.affinity_sums`."""
    implementation = group_field if group.fits_field(q.shape[1], split, k.shape[1] - split) else streaming
    return implementation.affinity_sums(q, k, v, w, kernel, widths, temperature, split, has_self, floor)


def _in_groups(points: Sequence[Tensor]) -> bool:
    """Whether the groups of a map go through the group kernels of form C; larger ones are streamed."""
    N, M, P = (t.shape[1] for t in points)
    return group.fits_loss(launch.limits(points[0].device), N, N, M, P)


def kept_shape(points: Sequence[Tensor]) -> tuple[int, ...]:
    """Shape of what phase 1 of form C keeps for phase 2: distances, or nothing."""
    return group_loss.kept_shape(points) if _in_groups(points) else (0,)


def state_shape(points: Sequence[Tensor], R: int) -> tuple[int, ...]:
    """Shape of what phase 2 keeps for phase 3: statistics, or the forces ``[R, G, N, D]`` of streamed groups."""
    return group_loss.state_shape(points, R) if _in_groups(points) else (R, *points[0].shape)


def loss_scale(points: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Phase 1 of one map: ``[mean d·w, mean w]`` in float64, and nothing kept."""
    return (group_loss if _in_groups(points) else streaming_loss).loss_scale(points, weights)


def loss_moments(
    points: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: Tensor,
    scale: Tensor,
    R_list: Sequence[float],
    floor: float,
) -> tuple[Tensor, Tensor]:
    """Phase 2 of one map: the state of :func:`state_shape`, and the means of the forces' products ``[G, R, R]``."""
    if _in_groups(points):
        return group_loss.loss_moments(points, weights, kept, scale, R_list, floor)
    return streamed_loss.loss_moments(streaming.affinity_sums, points, weights, scale, R_list, floor)


def loss_gradient(
    points: Sequence[Tensor],
    weights: Sequence[Tensor],
    state: Tensor,
    scale: Tensor,
    factors: Tensor,
    incoming: Tensor,
    R_list: Sequence[float],
    floor: float,
) -> Tensor:
    """Phase 3 of one map: the gradient w.r.t. gen ``[G, N, D]``, in its dtype."""
    if _in_groups(points):
        return group_loss.loss_gradient(points, weights, state, scale, factors, incoming, R_list, floor)
    return streamed_loss.loss_gradient(points[0], state, scale, factors, incoming)
