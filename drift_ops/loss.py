"""Form C: the release's training loss, over all groups of one feature map or of several."""

import functools
from collections.abc import Sequence
from itertools import groupby
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from . import ops
from .arguments import (
    check_choice,
    check_flag,
    check_floor,
    check_points,
    check_positive,
    check_same,
    check_weights,
    check_widths,
)
from .backends import choose
from .points import saveable, to_compute_dtype
from .spec import DETAILS, Field, LossMap, LossSpec, check_field, check_suits


@overload
def drift_loss(
    gen: Tensor, fixed_pos: Tensor, fixed_neg: Tensor | None = None, weight_gen: Tensor | None = None,
    weight_pos: Tensor | None = None, weight_neg: Tensor | None = None, R_list: Sequence[float] | Tensor = ..., *,
    affinity_floor: float = ..., field: Field | None = None, scale: str | float | Tensor = ...,
    scale_self_pairs: bool = True, normalize: str | None = ..., process_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]: ...  # fmt: skip
@overload
def drift_loss(
    gen: Sequence[Tensor], fixed_pos: Sequence[Tensor], fixed_neg: Sequence[Tensor | None] | None = None,
    weight_gen: Sequence[Tensor | None] | None = None, weight_pos: Sequence[Tensor | None] | None = None,
    weight_neg: Sequence[Tensor | None] | None = None, R_list: Sequence[float] | Tensor = ..., *,
    affinity_floor: float = ..., field: Field | None = None, scale: str | float | Sequence[float | Tensor] = ...,
    scale_self_pairs: bool = True, normalize: str | None = ..., process_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[list[Tensor], list[dict[str, Tensor]]]: ...  # fmt: skip
def drift_loss(
    gen: Tensor | Sequence[Tensor],
    fixed_pos: Tensor | Sequence[Tensor],
    fixed_neg: Tensor | Sequence[Tensor | None] | None = None,
    weight_gen: Tensor | Sequence[Tensor | None] | None = None,
    weight_pos: Tensor | Sequence[Tensor | None] | None = None,
    weight_neg: Tensor | Sequence[Tensor | None] | None = None,
    R_list: Sequence[float] | Tensor = (0.02, 0.05, 0.2),
    *,
    affinity_floor: float = 1e-6,
    field: Field | None = None,
    scale: str | float | Tensor | Sequence[float | Tensor] = "global",
    scale_self_pairs: bool = True,
    normalize: str | None = "global",
    process_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Any, Any]:
    """The training loss over all groups of one feature map, or of several maps at once: the release's by default.

    Distances are divided by their weighted mean over **all** groups, the forces of each R by their root mean square λ_R
    over all groups; the loss is the mean square of the summed forces, and its gradient w.r.t. ``gen`` moves the samples
    along them. Only ``gen`` gets a gradient.

    Args:
        gen: generated samples ``[G, N, D]``; float64, float32, or bfloat16/float16 computed in float32. There may be
            more leading dimensions, and any strides: maps ``[labels, samples, locations, D]`` go in as
            ``[labels, locations, samples, D]`` by a transpose, and nothing is copied.
        fixed_pos: data ``[G, P, D]``, P ≥ 1.
        fixed_neg: further negatives ``[G, M, D]``; M = 0 and None mean none. ``gen`` itself is always among them.
        weight_gen, weight_pos, weight_neg: ``[G, N]``, ``[G, P]``, ``[G, M]``; None means 1. What they do is the
            field's ``weights``; the scale is a mean under them.
        R_list: kernel widths from 1e-12 to 1e12, in units of the scale; or a tensor ``[R]`` of them, which may learn
            through ``info["log_mass"]``.
        affinity_floor: in [0, 1), of the squared affinity. 1e-6 is the release's, which this form reproduces; it is 0
            in :func:`drift_field`, and should be here where it would swamp the field (large N, small D).
        field: another member of the family, which has a floor of its own; None is
            ``Field(mask_self=100.0, affinity_floor=affinity_floor)``, the release's.
        scale: what costs are divided by: ``"global"``, their mean over all groups; ``"group"``, that of each group; or
            the scale itself, a positive number or a tensor ``[G]`` (for lists of maps also a list of either).
        scale_self_pairs: count the pairs of a sample with itself, whose cost is 0, in the scale.
        normalize: what the forces of each R are divided by: ``"global"``, their root mean square over all groups;
            ``"group"``, that of each group; ``"group_mean"``, the mean over groups of theirs; None, nothing.
        process_group: sum the statistics over these ranks, so that K ranks with G/K groups each equal one with G. All
            maps together cost two all-reduces. A rank may have no groups at all.
        backend: ``"cpu"``, ``"reference"``, … or None for the best one available (see :func:`backends`).

        ``gen``, ``fixed_pos``, ``fixed_neg`` and the weights may be lists with one entry a feature map; statistics are
        per map.

    Returns:
        ``(loss [G], info)``, or a list of each for lists. ``info`` has tensors ``scale`` and ``loss_{R}`` (= λ_R²;
        ``loss_{place}`` for a tensor of R), 0-d or, where each group has its own, ``[G]``. With a ``field`` or a tensor
        of R it also has, ``[R, G, N]``, ``log_row_sums`` (``log Σ_j exp(L_ij)``), ``log_mass`` (the logarithm of the
        share of data in them), ``sum_neg`` and ``sum_pos`` (of A), and for Sinkhorn ``residual [R, G]``, the mean error
        of the sums of columns before the last time they were scaled.

    Raises:
        TypeError, ValueError: an argument is not what is described here.

    Source: the release's ``drift_loss.py``; the family is described in docs/fields.md.
    """
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"process_group: got {type(process_group).__name__}, expected a ProcessGroup or None")
    empty = process_group is not None
    if isinstance(gen, Tensor):
        checked = [_check_map((gen, fixed_pos, fixed_neg, weight_gen, weight_pos, weight_neg), "", empty)]
    else:
        checked = _check_maps((gen, fixed_pos, fixed_neg, weight_gen, weight_pos, weight_neg), empty)
    first = checked[0][0]
    chosen = choose(backend, first.device, first.dtype)
    widths, R = check_widths("R_list", R_list, first)
    spec = _spec(checked, widths, R, affinity_floor, field, scale, scale_self_pairs, normalize)
    found: tuple[Sequence[Tensor], Sequence[ops.Statistics]] | None = None
    if process_group is None and ops.has_loss_at_once(first, chosen):
        maps = [_lean_map(of_map) for of_map in checked]
        scales = _given_scales(scale, maps) if spec.scale == "given" else None
        found = ops.loss_at_once(maps, spec, chosen, R, scales)
    if found is None:
        one = first.new_ones((), dtype=torch.float64 if first.dtype == torch.float64 else torch.float32)
        maps = [_loss_map(of_map, one, reads_16_bits=chosen == "triton") for of_map in checked]
        reduce = None if process_group is None else functools.partial(_mean_over_ranks, maps, process_group)
        scales = _given_scales(scale, maps) if spec.scale == "given" else None
        found = ops.loss(maps, spec, chosen, reduce, R, scales)
    losses, statistics = found
    losses = [
        loss if loss.dim() + 2 == of_map.dim() else loss.view(of_map.shape[:-2])
        for loss, (of_map, *_) in zip(losses, checked, strict=True)
    ]
    names = (_names if torch.compiler.is_compiling() else _known_names)(widths, R is not None)
    infos = [dict(zip(names, (scale, *squares), strict=True)) for scale, squares, _ in statistics]
    if spec.details:
        for info, of_map in zip(infos, statistics, strict=True):
            info |= _named_details(spec, of_map, R)
    return (losses[0], infos[0]) if isinstance(gen, Tensor) else (list(losses), infos)


def _spec(
    checked: list[tuple[Any, ...]],
    widths: tuple[float, ...],
    R: Tensor | None,
    affinity_floor: float,
    field: Field | None,
    scale: Any,
    scale_self_pairs: bool,
    normalize: str | None,
) -> LossSpec:
    """What is asked for, checked; ``checked`` are the maps, which must suit the field."""
    check_flag("scale_self_pairs", scale_self_pairs)
    if normalize is not None:
        check_choice("normalize", normalize, ("global", "group", "group_mean"))
    if isinstance(scale, str):
        check_choice("scale", scale, ("global", "group"))
    else:
        scale = "given"
    if field is None:
        floor, self_distance = check_floor(affinity_floor), LossSpec.self_distance
    else:
        _check_field(field, affinity_floor, checked)
        floor, self_distance = field.affinity_floor, field.self_cost
    make = LossSpec.of_field if torch.compiler.is_compiling() else _known_spec
    details = field is not None or R is not None
    return make(field, widths, floor, self_distance, scale, scale_self_pairs, normalize or "none", details)


def _names(widths: tuple[float, ...], of_places: bool) -> tuple[str, ...]:
    """Of the statistics in ``info``."""
    return ("scale", *[f"loss_{R}" for R in (range(len(widths)) if of_places else widths)])


# To make them, and what backends make of a spec, would take a good part of a small call.
_known_spec, _known_names = functools.lru_cache(maxsize=64)(LossSpec.of_field), functools.lru_cache(maxsize=64)(_names)


def _check_field(field: Field, affinity_floor: float, checked: list[tuple[Any, ...]]) -> None:
    check_field(field, affinity_floor=(affinity_floor, 1e-6))
    for m, (_, neg, _, *weights) in enumerate(checked):
        index = f"[{m}]" if len(checked) > 1 else ""
        names = (f"weight_gen{index}", f"weight_neg{index}", f"weight_pos{index}")
        check_suits(field, f"fixed_neg{index}", neg, dict(zip(names, weights, strict=True)))
        if weights[0] is not None and not field.include_self:
            raise ValueError(f"{names[0]}: got weights, but samples are no targets with include_self=False; omit it")


def _given_scales(scale: Any, maps: list[LossMap]) -> Tensor:
    """The scale of each group of each map, from that of all, or from those of each map."""
    of_maps = list(scale) if isinstance(scale, (tuple, list)) else [scale] * len(maps)
    if len(of_maps) != len(maps):
        raise ValueError(f"scale: got {len(of_maps)} entries, expected {len(maps)}, one for each map of gen")
    like = maps[0].gen
    found = []
    for m, (of_map, given) in enumerate(zip(maps, of_maps, strict=True)):
        if isinstance(given, Tensor) and given.numel() not in (1, of_map.groups):
            shape = tuple(given.shape)
            raise ValueError(f"scale[{m}]: got shape {shape}, expected [{of_map.groups}], a scale for each group")
        given = given.flatten() if isinstance(given, Tensor) else (check_positive(f"scale[{m}]", given),)
        numbers, of_tensor = check_widths(f"scale[{m}]", given, like)
        scales = like.new_tensor(numbers, dtype=torch.float64) if of_tensor is None else of_tensor.detach()
        found.append(scales.expand(of_map.groups))
    return torch.cat(found)


def _named_details(spec: LossSpec, statistics: ops.Statistics, R: Tensor | None) -> dict[str, Tensor]:
    """What ``info`` tells of every sample and R."""
    if statistics.details is None:  # a rank without groups
        return {}
    found = dict(zip(DETAILS, statistics.details.unbind(), strict=True))
    residual, _ = found.pop("residual"), found.pop("slope")
    found["log_mass"] = ops.log_mass(statistics.details, R)
    return found | ({"residual": residual[..., 0]} if spec.coupling == "sinkhorn" else {})


def _mean_over_ranks(maps: list[LossMap], process_group: dist.ProcessGroup, means: Tensor) -> Tensor:
    """``means [maps, n]`` over this rank's groups to means over the groups of all ranks, in one all-reduce."""
    totals = torch.cat([means, means.new_empty(len(maps), 1)], 1)
    start = 0
    for groups, alike in groupby(of_map.groups for of_map in maps):  # no copy from the host, which capture forbids
        stop = start + len(list(alike))
        totals[start:stop, -1].fill_(groups)
        totals[start:stop, :-1].mul_(groups)
        start = stop
    dist.all_reduce(totals, group=process_group)
    return totals[:, :-1] / totals[:, -1:]


def _check_maps(given: tuple[Any, ...], empty: bool) -> list[tuple[Any, ...]]:
    """See :func:`_check_map`, of arguments given as lists, one entry a map; None is None for every map."""
    gen, *others = given
    names = ("gen", "fixed_pos", "fixed_neg", "weight_gen", "weight_pos", "weight_neg")
    if not isinstance(gen, (list, Sequence)) or isinstance(gen, str) or len(gen) == 0:
        raise TypeError(f"gen: got {type(gen).__name__}, expected a torch.Tensor [G, N, D] or a non-empty list of them")
    lists = [list(gen)]
    for name, other in zip(names[1:], others, strict=True):
        if other is None and name != "fixed_pos":
            other = [None] * len(gen)
        if not isinstance(other, (list, Sequence)) or len(other) != len(gen):
            got = f"{len(other)} entries" if isinstance(other, Sequence) else type(other).__name__
            raise ValueError(f"{name}: got {got}, expected a list of {len(gen)}, one entry for each map of gen")
        lists.append(list(other))
    maps = [_check_map(entries, f"[{m}]", empty) for m, entries in enumerate(zip(*lists, strict=True))]
    first = maps[0][0]
    for m, (of_map, *_) in enumerate(maps[1:], 1):
        check_same("device", f"gen[{m}]", of_map.device, "gen[0]", first.device)
        check_same("dtype", f"gen[{m}]", of_map.dtype, "gen[0]", first.dtype)
    return maps


def _check_map(given: tuple[Any, ...], index: str, empty: bool) -> tuple[Any, ...]:
    """gen, neg, pos and their weights or None, from the arguments for a map; with ``empty`` it may have no groups."""
    gen, pos, neg, weight_gen, weight_pos, weight_neg = given
    check_points(f"gen{index}", gen, least_rank=3, no_groups=empty)
    check_points(f"fixed_pos{index}", pos, gen, f"gen{index}", no_groups=empty)
    if neg is None:
        neg = gen.new_empty(*gen.shape[:-2], 0, gen.shape[-1])
    else:
        check_points(f"fixed_neg{index}", neg, gen, f"gen{index}", empty=True, no_groups=empty)
    check_weights(f"weight_gen{index}", weight_gen, gen, f"gen{index}")
    check_weights(f"weight_pos{index}", weight_pos, pos, f"fixed_pos{index}")
    check_weights(f"weight_neg{index}", weight_neg, neg, f"fixed_neg{index}")
    return gen, neg, pos, weight_gen, weight_neg, weight_pos


def _loss_map(checked: tuple[Any, ...], one: Tensor, reads_16_bits: bool) -> LossMap:
    """The map as kernels want it, in the dtype computed in; ``one`` is the weight of points that have none."""
    points = [_in_two_dimensions(saveable(ops.rows(p)), 2) for p in checked[:3]]
    weights = [
        one.expand(p.shape[:-1]) if w is None else _in_two_dimensions(saveable(w.to(one.dtype)), 1)
        for p, w in zip(points, checked[3:], strict=True)
    ]
    if not reads_16_bits:
        points = [to_compute_dtype(p) for p in points]
    return LossMap(tuple(points), tuple(weights))  # type: ignore[arg-type]


def _lean_map(checked: tuple[Any, ...]) -> LossMap:
    """The map for a backend that has all phases in one call: as it was given, as far as can be."""
    gen, neg, pos, *weights = checked
    points = [to_compute_dtype(saveable(ops.rows(p))) for p in (gen, neg, pos)]
    if gen.dim() > 4:
        points = [p.flatten(1, -3) for p in points]
        weights = [w if w is None else w.flatten(1, -2) for w in weights]
    return LossMap(tuple(points), tuple([w if w is None else w.to(points[0].dtype) for w in weights]))  # type: ignore[arg-type]


def _in_two_dimensions(t: Tensor, trailing: int) -> Tensor:
    """The leading dimensions as two: ``[..., count, D]`` to ``[L, T, count, D]``; ``trailing=1``: ``[..., count]``."""
    leading = t.dim() - trailing
    return t.unsqueeze(1) if leading == 1 else t if leading == 2 else t.flatten(1, leading - 1)
