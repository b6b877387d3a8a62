"""Form C, phase by phase; two scalars over all groups part the work, the scale and λ.

Many groups of a size that one program holds go to group kernels, in which distances stay in registers; :mod:`.plan`
says which, and maps of one shape share launches, as a :class:`.batch.Batch`:

- :mod:`.scale`: distances, walking the points once, and their mean. Where it takes less memory than the gradient will,
  products of all targets are kept (:mod:`.memory`); otherwise distances are worked out again by those that need them.
- :mod:`.moments`: :mod:`.statistics` of both softmaxes and the sums of affinities, for every R, or of other members of
  the family of fields the :mod:`.potentials`; and products of the forces, from the kept products (:mod:`.gram`) or from
  weighted sums (:mod:`.weighted`).
- :mod:`.gradient`: :mod:`.coefficients` of all R together, and one weighted sum.

Larger groups are streamed: :mod:`.streamed_scale`, and for what follows :mod:`drift_ops.streamed_loss`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ... import streamed_loss
from ...spec import DETAILS, LossMap, LossSpec, by_map
from .. import pairs
from ..affinity import affinity_sums
from .batch import Batch, batches
from .gradient import gradient_kernel
from .moments import moments_kernel
from .plan import plan_of
from .scale import scale_kernel, slices_kernel
from .streamed_scale import streamed_scale

PROGRAMS = 1024  # that fill a GPU of today; where there are fewer groups, several programs share one
LEAST_SHARE = 256  # dimensions of a program then, at least


def kept_shape(spec: LossSpec, of_map: LossMap) -> tuple[int, ...]:
    """Shape of what phase 1 keeps for phase 2: products of the targets, or nothing."""
    plan = plan_of(spec, of_map)
    return (of_map.groups, plan.floats_kept) if plan is not None and plan.floats_kept else (0,)


def state_shape(spec: LossSpec, of_map: LossMap) -> tuple[int, ...]:
    """Shape of what phase 2 keeps for phase 3: see :mod:`.memory`; of streamed groups the forces ``[R, G, N, D]``."""
    plan = plan_of(spec, of_map)
    return of_map.shape_of_forces(spec) if plan is None else (of_map.groups, plan.floats_of_state)


def loss_scale(spec: LossSpec, maps: Sequence[LossMap]) -> list[tuple[Tensor, Tensor]]:
    """Phase 1: of each map ``[mean C·w, mean w]`` in float64, ``[1, 2]`` or ``[G, 2]``, and what it keeps."""

    def in_groups(batch: Batch) -> list[tuple[Tensor, Tensor]]:
        keeps = batch.plan.floats_kept
        means, kept = batch.empty(2), batch.empty(keeps) if keeps else [gen.new_empty(0) for gen in batch.gens]
        results: dict[str, Any] = {"means": batch.filled_up(means), "kept": batch.filled_up(kept) if keeps else None}
        slices, grid = None, (batch.programs, batch.plan.slices)
        if grid[1] > 1:
            slices = batch.gens[0].new_empty(*grid, keeps, dtype=torch.float32)
            batch.start(slices_kernel, "scale", spec, grid, slices=slices, share=batch.plan.share)
        batch.start(scale_kernel, "scale", spec, (batch.programs,), slices=slices, **results)
        if spec.scale == "global":
            means = [of_map.mean(0, keepdim=True, dtype=torch.float64) for of_map in means]
        return [(of_map.double(), k) for of_map, k in zip(means, kept, strict=True)]

    def streamed(place: int) -> tuple[Tensor, Tensor]:
        of_map = maps[place]
        if spec.is_of_release:
            return streamed_scale(spec, of_map), of_map.gen.new_empty(0)
        return streamed_loss.composed_means(pairs, spec, of_map), of_map.gen.new_empty(0)

    return _of_all_maps(spec, maps, in_groups, streamed)


def loss_moments(
    spec: LossSpec, maps: Sequence[LossMap], kept: Sequence[Tensor], scale: Tensor, R_list: Tensor | None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Phase 2: of each map the state of :func:`state_shape`, the means of the forces' products ``[G, R, R]``, details.

    ``scale`` is that of all maps of the call, or of all their groups.
    """
    of_maps, of_groups = by_map(maps, scale), len(scale) != len(maps)

    def in_groups(batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
        R, states = len(spec.R_list), batch.empty(batch.plan.floats_of_state)
        moments, details = batch.empty(R, R), [gen.new_empty(0, dtype=torch.float32) for gen in batch.gens]
        if spec.details:
            details = batch.empty(len(DETAILS), R, batch.gens[0].shape[2])
        of_batch = [kept[place] for place in batch.places]
        given: dict[str, Any] = {"kept": batch.filled_up(of_batch) if batch.plan.floats_kept else None}
        given |= {"state": batch.filled_up(states), "scale": scale, "moments": batch.filled_up(moments)}
        given |= {"widths": R_list, "details": batch.filled_up(details) if spec.details else None}
        batch.start(moments_kernel, "moments", spec, (batch.programs,), of_groups=of_groups, **given)
        details = [of_map.permute(1, 2, 0, 3).contiguous() if spec.details else of_map for of_map in details]
        return list(zip(states, moments, details, strict=True))

    def streamed(place: int) -> tuple[Tensor, Tensor, Tensor]:
        if not spec.is_of_release:
            return streamed_loss.composed_moments(pairs, spec, maps[place], of_maps[place], R_list)
        forces, moments = streamed_loss.loss_moments(affinity_sums, spec, maps[place], of_maps[place][0])
        return forces, moments, forces.new_empty(0)

    return _of_all_maps(spec, maps, in_groups, streamed)


def loss_gradient(
    spec: LossSpec,
    maps: Sequence[LossMap],
    states: Sequence[Tensor],
    scale: Tensor,
    factors: Tensor,
    incoming: Sequence[Tensor],
) -> list[Tensor]:
    """Phase 3: of each map the gradient w.r.t. gen, in its dtype and with its strides.

    ``scale`` and ``factors`` are those of all maps of the call, or of all their groups.
    """
    statistics = list(zip(by_map(maps, scale), by_map(maps, factors), strict=True))
    of_groups = max(len(scale), len(factors)) != len(maps)
    if len(scale) != len(factors):
        scale, factors = (_of_groups(maps, values) for values in (scale, factors))

    def in_groups(batch: Batch) -> list[Tensor]:
        keeps, D = batch.plan.keeps_distances, batch.plan.D
        grads = [torch.empty_like(gen) for gen in batch.gens]
        shares = max(1, min(PROGRAMS // batch.programs, D // LEAST_SHARE)) if keeps else 1  # who else finds distances
        share = triton.cdiv(D, shares * LEAST_SHARE) * LEAST_SHARE
        given: dict[str, Any] = {"scale": scale, "factors": factors, "share": share}
        given["state"], given["incoming"] = (
            batch.filled_up([of_maps[place].contiguous() for place in batch.places]) for of_maps in (states, incoming)
        )
        grid = (batch.programs, triton.cdiv(D, share))
        batch.start(gradient_kernel, "gradient", spec, grid, others=(grads,), of_groups=of_groups, **given)
        return grads

    def streamed(place: int) -> Tensor:
        of_map = maps[place].gen, states[place], *statistics[place], incoming[place]
        return streamed_loss.loss_gradient(spec, *of_map)

    return _of_all_maps(spec, maps, in_groups, streamed)


def _of_groups(maps: Sequence[LossMap], values: Tensor) -> Tensor:
    """Those of each map, or of each of their groups, as those of each group."""
    of_maps = zip(maps, by_map(maps, values), strict=True)
    return torch.cat([of_map.expand(of_groups.groups, *of_map.shape[1:]) for of_groups, of_map in of_maps])


def _of_all_maps(
    spec: LossSpec, maps: Sequence[LossMap], in_groups: Callable[[Batch], list[Any]], streamed: Callable[[int], Any]
) -> list[Any]:
    """A phase's results for every map: of those with small groups in batches, of the others one at a time."""
    results: dict[int, Any] = {}
    for places in batches(maps):
        plan = plan_of(spec, maps[places[0]])
        found = [streamed(place) for place in places] if plan is None else in_groups(Batch(plan, places, maps))
        results |= dict(zip(places, found, strict=True))
    return [results[place] for place in range(len(maps))]
