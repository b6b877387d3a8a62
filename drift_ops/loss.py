"""Form C: the release's training loss, over all groups of one feature map or of several."""

import functools
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import ops
from .arguments import check_floor, check_points, check_positives, check_same, check_weights
from .backends import choose
from .points import saveable, to_compute_dtype
from .spec import LossMap, LossSpec


def drift_loss(
    gen: Tensor | Sequence[Tensor],
    fixed_pos: Tensor | Sequence[Tensor],
    fixed_neg: Tensor | Sequence[Tensor | None] | None = None,
    weight_gen: Tensor | Sequence[Tensor | None] | None = None,
    weight_pos: Tensor | Sequence[Tensor | None] | None = None,
    weight_neg: Tensor | Sequence[Tensor | None] | None = None,
    R_list: Sequence[float] = (0.02, 0.05, 0.2),
    *,
    affinity_floor: float = 1e-6,
    process_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Any, Any]:
    """The release's training loss over all groups of one feature map, or of several maps at once.

    Distances are divided by their weighted mean over **all** groups, the forces of each R by their root mean square λ_R
    over all groups; the loss is the mean square of the summed forces, and its gradient w.r.t. ``gen`` moves the samples
    along them. Only ``gen`` gets a gradient.

    Args:
        gen: generated samples ``[G, N, D]``; float64, float32, or bfloat16/float16 computed in float32. There may be
            more leading dimensions, and any strides: maps ``[labels, samples, locations, D]`` go in as
            ``[labels, locations, samples, D]`` by a transpose, and nothing is copied.
        fixed_pos: data ``[G, P, D]``, P ≥ 1.
        fixed_neg: further negatives ``[G, M, D]``; M = 0 and None mean none. ``gen`` itself is always among them.
        weight_gen, weight_pos, weight_neg: ``[G, N]``, ``[G, P]``, ``[G, M]``; None means 1.
        R_list: kernel widths from 1e-12 to 1e12, in units of the mean distance.
        affinity_floor: in [0, 1), of the squared affinity. 1e-6 is the release's, which this form reproduces; it is 0
            in :func:`drift_field`, and should be here where it would swamp the field (large N, small D).
        process_group: sum the statistics over these ranks, so that K ranks with G/K groups each equal one with G. All
            maps together cost two all-reduces. A rank may have no groups at all.
        backend: ``"cpu"``, ``"reference"``, … or None for the best one available (see :func:`backends`).

        ``gen``, ``fixed_pos``, ``fixed_neg`` and the weights may be lists with one entry a feature map; statistics are
        per map.

    Returns:
        ``(loss [G], info)``, or a list of each for lists. ``info`` has 0-d tensors ``scale`` and ``loss_{R}`` (= λ_R²).

    Raises:
        TypeError, ValueError: an argument is not what is described here.

    Source: the release's ``drift_loss.py``.
    """
    if not isinstance(process_group, (dist.ProcessGroup, type(None))):
        raise TypeError(f"process_group: got {type(process_group).__name__}, expected a ProcessGroup or None")
    empty = process_group is not None
    if isinstance(gen, Tensor):
        checked = [_check_map((gen, fixed_pos, fixed_neg, weight_gen, weight_pos, weight_neg), "", empty)]
    else:
        checked = _check_maps((gen, fixed_pos, fixed_neg, weight_gen, weight_pos, weight_neg), empty)
    spec = LossSpec(check_positives("R_list", R_list), check_floor(affinity_floor))
    first = checked[0][0]
    chosen = choose(backend, first.device, first.dtype)
    at_once = None if process_group is not None else ops.loss_at_once(first, chosen)
    if at_once is not None:
        losses, statistics = at_once([_lean_map(of_map) for of_map in checked], spec)
    else:
        one = first.new_ones((), dtype=torch.float64 if first.dtype == torch.float64 else torch.float32)
        maps = [_loss_map(of_map, one, reads_16_bits=chosen == "triton") for of_map in checked]
        reduce = None if process_group is None else functools.partial(_mean_over_ranks, maps, process_group)
        losses, statistics = ops.loss(maps, spec, chosen, reduce)
    if at_once is None or max([of_map.dim() for of_map, *_ in checked]) > 4:
        losses = [loss.view(of_map.shape[:-2]) for loss, (of_map, *_) in zip(losses, checked, strict=True)]
    names = ["scale", *[f"loss_{R}" for R in spec.R_list]]
    infos = [dict(zip(names, of_map.unbind(), strict=True)) for of_map in statistics]
    return (losses[0], infos[0]) if isinstance(gen, Tensor) else (list(losses), infos)


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
