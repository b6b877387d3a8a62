"""The ``triton`` backend: float32 kernels on contiguous CUDA tensors; form C also reads bfloat16 and float16.

Problems that one program can hold go to the group kernels, all others are streamed: :mod:`drift_ops.triton.group`
draws the line. Called by :mod:`drift_ops.ops` only.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .. import streamed_loss
from . import group, group_field, group_loss, launch, streaming, streaming_loss
from .group_loss import Batch
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


Maps = Sequence[Sequence[Tensor]]  # of each map gen, neg, pos [G, count, D], or their weights [G, count]


def loss_scale(points: Maps, weights: Maps) -> list[tuple[Tensor, Tensor]]:
    """Phase 1: of each map ``[mean d·w, mean w]`` in float64, and what it keeps."""
    return _of_all_maps(
        points,
        lambda places: group_loss.loss_scale(Batch(places, points, weights)),
        lambda place: streaming_loss.loss_scale(points[place], weights[place]),
    )


def loss_moments(
    points: Maps, weights: Maps, kept: Sequence[Tensor], scale: Tensor, R_list: Sequence[float], floor: float
) -> list[tuple[Tensor, Tensor]]:
    """Phase 2: of each map the state of :func:`state_shape`, and the means of the forces' products ``[G, R, R]``."""

    def streamed(place: int) -> tuple[Tensor, Tensor]:
        of_map = points[place], weights[place], scale[place]
        return streamed_loss.loss_moments(streaming.affinity_sums, *of_map, R_list, floor)

    def of_batch(places: list[int]) -> list[tuple[Tensor, Tensor]]:
        batch = Batch(places, points, weights)
        return group_loss.loss_moments(batch, [kept[place] for place in places], scale, R_list, floor)

    return _of_all_maps(points, of_batch, streamed)


def loss_gradient(
    points: Maps,
    weights: Maps,
    states: Sequence[Tensor],
    scale: Tensor,
    factors: Tensor,
    incoming: Sequence[Tensor],
    R_list: Sequence[float],
    floor: float,
) -> list[Tensor]:
    """Phase 3: of each map the gradient w.r.t. gen ``[G, N, D]``, in its dtype."""

    def streamed(place: int) -> Tensor:
        of_map = points[place][0], states[place], scale[place], factors[place], incoming[place]
        return streamed_loss.loss_gradient(*of_map)

    def of_batch(places: list[int]) -> list[Tensor]:
        of_maps = [states[place] for place in places], scale, factors, [incoming[place] for place in places]
        return group_loss.loss_gradient(Batch(places, points, weights), *of_maps, R_list, floor)

    return _of_all_maps(points, of_batch, streamed)


def _of_all_maps(points: Maps, of_batch: Callable[[list[int]], list[Any]], streamed: Callable[[int], Any]) -> list[Any]:
    """A phase's results for every map: of those with small groups in batches, of the others one at a time."""
    results: dict[int, Any] = {}
    for places in group_loss.batches(points):
        in_groups = _in_groups(points[places[0]])
        results |= dict(zip(places, of_batch(places) if in_groups else map(streamed, places), strict=True))
    return [results[place] for place in range(len(points))]
