"""The ``triton`` backend: float32 kernels on CUDA tensors; form C also reads bfloat16 and float16.

Problems that one program can hold go to the group kernels, all others are streamed: :mod:`drift_ops.triton.group`
draws the line. Called by :mod:`drift_ops.ops` only.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import streamed_loss
from ..spec import LossMap, LossSpec
from . import group, group_loss, launch, streaming_loss
from .affinity import affinity_sums as affinity_sums
from .affinity import affinity_sums_backward as affinity_sums_backward
from .group_loss import Batch


def _in_groups(of_map: LossMap) -> bool:
    """Whether the groups of a map go through the group kernels of form C; larger ones are streamed."""
    N, M, P = of_map.counts
    return group.fits_loss(launch.limits(of_map.gen.device), N, N, M, P)


def _points(maps: Sequence[LossMap]) -> tuple[list[Any], list[Any]]:
    in_groups = [of_map.in_groups() for of_map in maps]
    return (
        [[t.contiguous() for t in points] for points, _ in in_groups],
        [[w.contiguous() for w in weights] for _, weights in in_groups],
    )


def kept_shape(spec: LossSpec, of_map: LossMap) -> tuple[int, ...]:
    """Shape of what phase 1 of form C keeps for phase 2: distances, or nothing."""
    return group_loss.kept_shape(of_map.in_groups()[0]) if _in_groups(of_map) else (0,)


def state_shape(spec: LossSpec, of_map: LossMap) -> tuple[int, ...]:
    """Shape of what phase 2 keeps for phase 3: statistics, or the forces ``[R, G, N, D]`` of streamed groups."""
    R = len(spec.R_list)
    if _in_groups(of_map):
        return group_loss.state_shape(of_map.in_groups()[0], R)
    return R, of_map.groups, *of_map.gen.shape[2:]


def loss_scale(spec: LossSpec, maps: Sequence[LossMap]) -> list[tuple[Tensor, Tensor]]:
    """Phase 1: of each map ``[mean d·w, mean w]`` in float64, and what it keeps."""
    points, weights = _points(maps)
    return _of_all_maps(
        maps,
        points,
        lambda places: group_loss.loss_scale(Batch(places, points, weights)),
        lambda place: streaming_loss.loss_scale(spec, maps[place]),
    )


def loss_moments(
    spec: LossSpec, maps: Sequence[LossMap], kept: Sequence[Tensor], scale: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Phase 2: of each map the state of :func:`state_shape`, and the means of the forces' products ``[G, R, R]``."""
    points, weights = _points(maps)

    def of_batch(places: list[int]) -> list[tuple[Tensor, Tensor]]:
        batch = Batch(places, points, weights)
        return group_loss.loss_moments(batch, [kept[place] for place in places], scale, spec.R_list, spec.floor)

    def streamed(place: int) -> tuple[Tensor, Tensor]:
        return streamed_loss.loss_moments(affinity_sums, spec, maps[place], scale[place])

    return _of_all_maps(maps, points, of_batch, streamed)


def loss_gradient(
    spec: LossSpec,
    maps: Sequence[LossMap],
    states: Sequence[Tensor],
    scale: Tensor,
    factors: Tensor,
    incoming: Sequence[Tensor],
) -> list[Tensor]:
    """Phase 3: of each map the gradient w.r.t. gen, with its strides and in its dtype."""
    points, weights = _points(maps)

    def streamed(place: int) -> Tensor:
        of_map = states[place], scale[place], factors[place], incoming[place]
        return streamed_loss.loss_gradient(spec, maps[place].gen, *of_map)

    def of_batch(places: list[int]) -> list[Tensor]:
        given = [states[place] for place in places], scale, factors, [incoming[place].contiguous() for place in places]
        grads = group_loss.loss_gradient(Batch(places, points, weights), *given, spec.R_list, spec.floor)
        gens = [maps[place].gen for place in places]
        return [torch.empty_like(gen).copy_(grad.view(gen.shape)) for gen, grad in zip(gens, grads, strict=True)]

    return _of_all_maps(maps, points, of_batch, streamed)


def _of_all_maps(
    maps: Sequence[LossMap], points: Any, of_batch: Callable[[list[int]], list[Any]], streamed: Callable[[int], Any]
) -> list[Any]:
    """A phase's results for every map: of those with small groups in batches, of the others one at a time."""
    results: dict[int, Any] = {}
    for places in group_loss.batches(points):
        in_groups = _in_groups(maps[places[0]])
        results |= dict(zip(places, of_batch(places) if in_groups else map(streamed, places), strict=True))
    return [results[place] for place in range(len(points))]
