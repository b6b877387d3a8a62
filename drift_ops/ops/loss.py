"""Form C: the loss of all maps in three phases, parted by the statistics over all groups."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ..backends import implementation
from ..points import full_precision
from ..spec import DETAILS, LossMap, LossSpec, by_map
from .registration import Once, Step, apply_step, define, finish, given, is_plain, once, rows


class Statistics(NamedTuple):
    """What the loss of a map was made with."""

    scale: Tensor  # 0-d, or [G]
    squared_lambdas: Sequence[Tensor]  # of each R, 0-d or [G]
    details: Tensor | None = None  # [6, R, G, N], see drift_ops.spec.DETAILS


MeanOverRanks = Callable[[Tensor], Tensor]


class _LossGradient(Step):
    """The losses of all maps as they are; their gradient w.r.t. gen is :func:`_loss_gradient`.

    ``tensors`` are the losses, then gen, neg, pos of every map, then their weights, then what phase 2 has left.
    """

    @staticmethod
    def compute(spec: LossSpec, backend: str, scale: Tensor, factors: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple([loss.clone() for loss in tensors[: len(tensors) // 8]])

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.spec, ctx.backend, scale, factors, *tensors = inputs
        ctx.save_for_backward(scale, factors, *tensors[len(output) :])

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        scale, factors, *tensors = ctx.saved_tensors
        maps = len(incoming)
        points, weights, states = tensors[: 3 * maps], tensors[3 * maps : 6 * maps], tensors[6 * maps :]
        if is_plain(scale) and not torch.is_grad_enabled():
            by_map = _by_map(points, weights)
            grads = implementation(ctx.backend).loss_gradient(ctx.spec, by_map, states, scale, factors, incoming)
        else:
            statistics = (states, scale, factors, incoming)
            grads = once(_loss_gradient, points, weights, *statistics, *ctx.spec.values(), ctx.backend)
        of_points = [t for grad in grads for t in (grad, None, None)]
        return None, None, None, None, *[None] * maps, *of_points, *[None] * (4 * maps)


class _LossAtOnce(torch.autograd.Function):
    """Losses, statistics and details of all maps, by a backend that has both phases in one call."""

    @staticmethod
    def forward(
        ctx: Any, spec: LossSpec, backend: Any, maps: Sequence[LossMap], scale: Any, *gens: Tensor
    ) -> tuple[Tensor, ...]:
        losses, statistics, details, states, numbers = backend.loss_at_once(spec, maps, scale)
        ctx.spec, ctx.backend, ctx.numbers = spec, backend, numbers
        ctx.save_for_backward(*gens, *states)
        ctx.mark_non_differentiable(*statistics, *details)
        return *losses, *statistics, *details

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        tensors, maps = ctx.saved_tensors, len(ctx.numbers)
        given = tensors[:maps], tensors[maps:], ctx.numbers, incoming[:maps]
        gradient = functools.partial(ctx.backend.gradient_at_once, ctx.spec)
        if not torch.is_grad_enabled():
            return None, None, None, None, *gradient(*given)
        leaves, layout = tree_flatten(given)
        return None, None, None, None, *Once.apply(gradient, layout, *leaves)


def has_loss_at_once(gen: Tensor, backend: str) -> bool:
    """Whether a backend has the first two phases in one call, the short way for the smallest of problems."""
    return is_plain(gen) and hasattr(implementation(backend), "loss_at_once")


def loss_at_once(
    maps: Sequence[LossMap], spec: LossSpec, backend: str, R: Tensor | None, scale: Tensor | None
) -> tuple[Sequence[Tensor], list[Statistics]] | None:
    """:func:`loss` without other ranks, by such a backend; None where it has no kernel for groups as large as these."""
    module = implementation(backend)
    if any([module.is_composed(spec, of_map) for of_map in maps]):
        return None
    spec = spec if R is None else replace(spec, R_list=tuple(R.tolist()))
    given, gens, count = None if scale is None else by_map(maps, scale), [of_map.gen for of_map in maps], len(maps)
    results = _LossAtOnce.apply(spec, module, maps, given, *gens)
    losses, statistics, details = results[:count], results[count : 2 * count], results[2 * count :] or (None,) * count
    return losses, [_of_map(spec, *found) for found in zip(statistics, details, strict=True)]


def _of_map(spec: LossSpec, statistics: Tensor, details: Tensor | None) -> Statistics:
    """The statistics of a map from ``[1 + R]``, or ``[1 + R, G]``."""
    scale, *squares = statistics.unbind()
    if spec.has_statistics_of_groups:
        scale = scale[0] if spec.scale == "global" else scale
        squares = squares if spec.normalize == "group" else [of_all[0] for of_all in squares]
    return Statistics(scale, squares, details)


def loss(
    maps: Sequence[LossMap],
    spec: LossSpec,
    backend: str,
    mean_over_ranks: MeanOverRanks | None,
    R: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Sequence[Tensor], Sequence[Statistics]]:
    """Form C: the loss ``[G]`` of every map, differentiable w.r.t. gen, and its statistics.

    The third phase, the gradient, is for the backward. ``mean_over_ranks`` takes float64 means ``[maps, n]`` over this
    rank's groups to those over all ranks'; a map may have no groups here. ``R [R]`` are widths that the spec does not
    know, ``scale`` those of each map or of each group, where the spec says that they are given.
    """
    here = [of_map for of_map in maps if of_map.groups]
    plain = is_plain(maps[0].gen) or not here
    with torch.no_grad(), full_precision(maps[0].gen.device):
        losses, statistics, *for_gradient = loss_in_phases(maps, spec, backend, plain, mean_over_ranks, R, scale)
    if torch.is_grad_enabled() and any([of_map.gen.requires_grad for of_map in here]):
        points, weights = [t for of_map, _ in here for t in of_map], [w for _, of_map in here for w in of_map]
        scales, factors, states = for_gradient
        losses = apply_step(_LossGradient, spec, backend, scales, factors, *losses, *points, *weights, *states)
    if len(here) < len(maps):
        of_here = iter(losses)
        losses = [next(of_here) if m.groups else m.gen.sum((2, 3)).flatten().to(_dtype(m)) for m in maps]
    return losses, statistics


def loss_in_phases(
    maps: Sequence[LossMap],
    spec: LossSpec,
    backend: str,
    plain: bool,
    mean_over_ranks: MeanOverRanks | None,
    R: Tensor | None,
    given_scale: Tensor | None,
) -> tuple[Sequence[Tensor], Sequence[Statistics], Tensor, Tensor, Sequence[Tensor]]:
    """Losses; statistics of all ``maps``; for phase 3 scales ``[S]`` and 1/λ_R ``[S, R]`` in float64, of each map or of
    each group, and what phase 2 has left for it. All but the second are of the maps that have groups here."""
    here = [of_map for of_map in maps if of_map.groups]
    points = [t.detach() for of_map, _ in here for t in of_map]
    weights = [w.detach() for _, of_map in here for w in of_map]
    if plain:
        found = implementation(backend).loss_scale(spec, here)
        means, kept = _joined([of_map for of_map, _ in found], maps, 2), [k for _, k in found]
    else:
        means, kept = _loss_scale(points, weights, *spec.values(), backend)
    of_all = means
    if spec.scale == "global":
        means, of_all = _over_ranks(maps, means, mean_over_ranks)
    scale, scale_of_all = (
        given_scale.double() if given_scale is not None else m[:, 0] / m[:, 1] for m in (means, of_all)
    )
    if plain:
        results = implementation(backend).loss_moments(spec, here, kept, scale, R)
        states, moments, details = ([result[n] for result in results] for n in range(3))
    else:
        states, moments, details = _loss_moments(points, weights, kept, scale, R, *spec.values(), backend)
    factors, squares = _normalisation(spec, maps, moments, mean_over_ranks)
    losses = [_loss_of_map(*of_map) for of_map in zip(moments, by_map(here, factors), strict=True)]
    return losses, _statistics(spec, maps, scale_of_all, squares, details), scale, factors, states


def _normalisation(
    spec: LossSpec, maps: Sequence[LossMap], moments: Sequence[Tensor], mean_over_ranks: MeanOverRanks | None
) -> tuple[Tensor, Tensor]:
    """1/λ_R of the maps or groups here, ``[S, R]``, and λ_R² of all, both in float64. λ_R² is the mean of F_R²."""
    R = len(spec.R_list)
    of_groups = [of_map.diagonal(dim1=1, dim2=2).double() for of_map in moments]  # [G, R] each
    if spec.normalize == "group":
        squares = of_all = _joined(of_groups, maps, R)
    else:
        of_roots = spec.normalize == "group_mean"
        means = [(m.sqrt() if of_roots else m).mean(0, keepdim=True) for m in of_groups]
        squares, of_all = _over_ranks(maps, _joined(means, maps, R), mean_over_ranks)
        if of_roots:
            squares, of_all = squares.square(), of_all.square()
    factors = squares.clamp(min=spec.least_squared_lambda).rsqrt()
    return torch.ones_like(factors) if spec.normalize == "none" else factors, of_all


def _loss_of_map(moments: Tensor, factors: Tensor) -> Tensor:
    """The mean square of ``Σ_R F_R/λ_R``, ``[G]``, from the mean products ``[G, R, R]`` of the F_R."""
    return (moments.double() * (factors.unsqueeze(2) * factors.unsqueeze(1))).sum((1, 2)).to(moments.dtype)


def _joined(rows: list[Tensor], maps: Sequence[LossMap], columns: int) -> Tensor:
    return torch.cat(rows) if rows else maps[0].gen.new_empty(0, columns, dtype=torch.float64)


def _over_ranks(maps: Sequence[LossMap], means: Tensor, mean_over_ranks: MeanOverRanks | None) -> tuple[Tensor, Tensor]:
    """``means`` of the maps that have groups here, over the groups of all ranks; the same of all maps."""
    if mean_over_ranks is None:
        return means, means
    places = [place for place, of_map in enumerate(maps) if of_map.groups]
    if len(places) == len(maps):
        means = mean_over_ranks(means)
        return means, means
    of_all = means.new_zeros(len(maps), means.shape[1])
    of_all[places] = means
    of_all = mean_over_ranks(of_all)
    return of_all[places], of_all


def _statistics(
    spec: LossSpec, maps: Sequence[LossMap], scale: Tensor, squares: Tensor, details: Sequence[Tensor]
) -> list[Statistics]:
    """Of all maps, from those of each map or of each group; ``details`` are of the maps that have groups here."""
    dtype, of_groups = _dtype(maps[0]), [of_map.groups for of_map in maps]
    scales = scale.to(dtype).unbind() if spec.scale == "global" else scale.to(dtype).split(of_groups)
    lambdas = squares.to(dtype).unbind() if spec.normalize != "group" else squares.to(dtype).T.split(of_groups, 1)
    lambdas = [of_map.unbind() for of_map in lambdas]
    of_here = iter(details)
    found = [next(of_here) if spec.details and groups else None for groups in of_groups]
    return [Statistics(*of_map) for of_map in zip(scales, lambdas, found, strict=True)]


_MAPS = "Tensor[] points, Tensor[] w"  # gen, neg, pos of map 0, then of map 1, and so on


@define(_MAPS, LossSpec, "(Tensor, Tensor[])")
def _loss_scale(points: Sequence[Tensor], weights: Sequence[Tensor], *rest: Any) -> Any:
    """Phase 1 for all maps: ``[mean d·w, mean w]`` of each, ``[maps, 2]`` float64, and what phase 2 keeps."""
    spec, backend = given(LossSpec, rest)
    found = backend.loss_scale(spec, _by_map(points, weights))
    return torch.cat([means for means, _ in found]), [kept for _, kept in found]


@_loss_scale.register_fake
def _(points, weights, *rest):  # type: ignore[no-untyped-def]
    spec, backend = given(LossSpec, rest)
    maps = _by_map(points, weights)
    rows = len(maps) if spec.scale == "global" else sum(of_map.groups for of_map in maps)
    kept = [_fake(of_map, backend.kept_shape(spec, of_map)) for of_map in maps]
    return points[0].new_empty(rows, 2, dtype=torch.float64), kept


@define(f"{_MAPS}, Tensor[] kept, Tensor scales, Tensor? R", LossSpec, "(Tensor[], Tensor[], Tensor[])")
def _loss_moments(
    points: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: Sequence[Tensor],
    scale: Tensor,
    R: Tensor | None,
    *rest: Any,
) -> Any:
    """Phase 2 for all maps: what phase 3 needs, ``mean_{i,dim}(F_r F_s)`` of the forces, ``[G, R, R]``, and the details
    ``[6, R, G, N]``, empty where the spec does not want them.

    ``scale`` is that of each map or of each group; ``R [R]`` are the widths, None: those of the spec. λ_r² is the mean
    over groups of the moments' diagonal, and the loss a quadratic form in them, so that the forces themselves are
    wanted in the backward only.
    """
    spec, backend = given(LossSpec, rest)
    found = backend.loss_moments(spec, _by_map(points, weights), kept, scale, R)
    return tuple([of_map[n] for of_map in found] for n in range(3))


@_loss_moments.register_fake
def _(points, weights, kept, scale, *rest):  # type: ignore[no-untyped-def]
    spec, backend = given(LossSpec, rest[1:])
    maps, R = _by_map(points, weights), len(spec.R_list)
    states = [_fake(of_map, backend.state_shape(spec, of_map)) for of_map in maps]
    moments = [_fake(of_map, (of_map.groups, R, R)) for of_map in maps]
    return states, moments, [_fake(of_map, of_map.shape_of_details(spec)) for of_map in maps]


@define(f"{_MAPS}, Tensor[] states, Tensor scales, Tensor factors, Tensor[] incoming", LossSpec, "Tensor[]")
def _loss_gradient(
    points: Sequence[Tensor],
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    scale: Tensor,
    factors: Tensor,
    incoming: Sequence[Tensor],
    *rest: Any,
) -> Any:
    """Phase 3 for all maps: the gradient w.r.t. gen, ``−2 incoming_g Σ_r factors_r F_r / (N·D·s)``, laid out as gen is.

    ``scale [S]`` and ``factors [S, R]`` (= 1/λ_r), in float64, are of each map or of each group; ``incoming [G]`` is
    the gradient of a map's loss.
    """
    spec, backend = given(LossSpec, rest)
    return backend.loss_gradient(spec, _by_map(points, weights), states, scale, factors, incoming)


@_loss_gradient.register_fake
def _(points, *rest):  # type: ignore[no-untyped-def]
    return [torch.empty_like(gen) for gen in points[::3]]


def _by_map(points: Sequence[Tensor], weights: Sequence[Tensor]) -> list[LossMap]:
    starts = range(0, len(points), 3)
    return [LossMap(tuple(rows(points[n : n + 3])), tuple(weights[n : n + 3])) for n in starts]  # type: ignore[arg-type]


def _fake(of_map: LossMap, shape: Sequence[int]) -> Tensor:
    return of_map.gen.new_empty(shape, dtype=_dtype(of_map))


def _dtype(of_map: LossMap) -> torch.dtype:
    """What a backend computes in: float64 for float64, float32 for all else."""
    return torch.float64 if of_map.gen.dtype == torch.float64 else torch.float32


class _LogMass(Step):
    """log_mass ``[R, G, N]`` of the details as it is; its derivative w.r.t. ``R`` is in the details as well."""

    @staticmethod
    def compute(R: Tensor, log_mass: Tensor, slope: Tensor) -> Tensor:
        return log_mass.clone()

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        R, _, slope = inputs
        ctx.save_for_backward(R, slope)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        R, slope = ctx.saved_tensors
        return (incoming * slope).sum((1, 2)).to(R), None, None


def log_mass(details: Tensor, R: Tensor | None) -> Tensor:
    """log_mass ``[R, G, N]`` of the details, differentiable w.r.t. ``R``, where that is given."""
    found, slope = details[DETAILS.index("log_mass")], details[DETAILS.index("slope")]
    return found if R is None else apply_step(_LogMass, R, found, slope)


finish(_loss_scale)
finish(_loss_moments)
finish(_loss_gradient, of_backward=True)
