"""Form C: the release's training loss, over all groups of one feature map or of several."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import ops
from .arguments import check_floor, check_points, check_positives, check_same, check_weights
from .backends import choose
from .points import to_compute_dtype


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
        gen: generated samples ``[G, N, D]``; float64, float32, or bfloat16/float16 computed in float32.
        fixed_pos: data ``[G, P, D]``, P ≥ 1.
        fixed_neg: further negatives ``[G, M, D]``; M = 0 and None mean none. ``gen`` itself is always among them.
        weight_gen, weight_pos, weight_neg: ``[G, N]``, ``[G, P]``, ``[G, M]``; None means 1.
        R_list: kernel widths from 1e-12 to 1e12, in units of the mean distance.
        affinity_floor: in [0, 1). 1e-6 is the release's; 0 where it would swamp the field (large N, small D).
        process_group: sum the statistics over these ranks, so that K ranks with G/K groups each equal one with G. All
            maps together cost two all-reduces.
        backend: ``"cpu"``, ``"reference"``, … or None for the best one available (see :func:`backends`).

        ``gen``, ``fixed_pos``, ``fixed_neg`` and the weights may be lists with one entry a feature map; statistics are
        per map.

    Returns:
        ``(loss [G], info)``, or a list of each for lists. ``info`` has 0-d tensors ``scale`` and ``loss_{R}`` (= λ_R²).

    Raises:
        TypeError, ValueError: an argument is not what is described here.

    Source: the release's ``drift_loss.py``.
    """
    if isinstance(gen, Tensor):
        given = (gen, fixed_pos, fixed_neg, weight_gen, weight_pos, weight_neg)
        maps = [_check_map(given, "")]
    else:
        maps = _check_maps(gen, fixed_pos, fixed_neg, weight_gen, weight_pos, weight_neg)
    R_list = check_positives("R_list", R_list)
    affinity_floor = check_floor(affinity_floor)
    if not isinstance(process_group, (dist.ProcessGroup, type(None))):
        raise TypeError(f"process_group: got {type(process_group).__name__}, expected a ProcessGroup or None")
    first = maps[0][0][0]
    chosen = choose(backend, first.device, first.dtype)
    with torch.autocast(first.device.type, enabled=False):
        if chosen != "triton":  # whose kernels read 16-bit points as they are
            maps = [([to_compute_dtype(p) for p in points], weights) for points, weights in maps]
        losses = _loss_of_maps(maps, R_list, affinity_floor, process_group, chosen)
    infos = [
        {"scale": scale, **{f"loss_{R}": squared[r] for r, R in enumerate(R_list)}} for _, scale, squared in losses
    ]
    if isinstance(gen, Tensor):
        return losses[0][0], infos[0]
    return [loss for loss, _, _ in losses], infos


Map = tuple[list[Tensor], list[Tensor]]  # points of gen, neg, pos [G, count, D] and their weights [G, count]


def _loss_of_maps(
    maps: list[Map],
    R_list: tuple[float, ...],
    affinity_floor: float,
    process_group: dist.ProcessGroup | None,
    backend: str,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each map its loss ``[G]``, scale and λ_R² ``[R]``, in three phases, parted by the global statistics.

    The third, the gradient, is for the backward.
    """
    points = [t.contiguous() for (gen, *fixed), _ in maps for t in (gen, *(t.detach() for t in fixed))]
    constants = [t.detach() for t in points]
    weights = [w.detach().contiguous() for _, of_map in maps for w in of_map]

    means, kept = ops.loss_scale(constants, weights, backend)
    mean_distance, mean_weight = _mean_over_ranks(means, maps, process_group).unbind(1)
    scale = mean_distance / mean_weight  # [maps]
    states, moments = ops.loss_moments(constants, weights, kept, scale, R_list, affinity_floor, backend)
    # λ_r² is the mean of F_r²
    squares = torch.stack([of_map.diagonal(dim1=1, dim2=2).mean(0, dtype=torch.float64) for of_map in moments])
    squared_lambda = _mean_over_ranks(squares, maps, process_group)  # [maps, R]
    factors = squared_lambda.clamp(min=1e-8).rsqrt()
    options = (R_list, affinity_floor, backend)
    losses = _LossOfMaps.apply(options, scale, factors, *points, *weights, *states, *moments)
    dtype = moments[0].dtype
    return list(zip(losses, scale.to(dtype).unbind(), squared_lambda.to(dtype).unbind(), strict=True))


class _LossOfMaps(torch.autograd.Function):
    """``mean (Σ_r F_r/λ_r)²`` of each group, ``[G]`` for every map; its gradient w.r.t. gen is
    :func:`drift_ops.ops.loss_gradient`.

    ``tensors`` are gen, neg, pos of every map, then their weights, then the states and then the moments of phase 2.
    """

    @staticmethod
    def forward(
        ctx: Any, options: tuple[Any, ...], scale: Tensor, factors: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        points, weights, states, moments = _by_kind(tensors, (3, 3, 1, 1))
        ctx.options = options
        ctx.save_for_backward(scale, factors, *points, *weights, *states)
        products = (factors.unsqueeze(2) * factors.unsqueeze(1)).to(moments[0].dtype)  # [maps, R, R]
        return tuple((of_map * by).sum((1, 2)) for of_map, by in zip(moments, products.unbind(), strict=True))

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        scale, factors, *tensors = ctx.saved_tensors
        points, weights, states = _by_kind(tensors, (3, 3, 1))
        grads = ops.loss_gradient(points, weights, states, scale, factors, incoming, *ctx.options)
        of_points = [t for grad in grads for t in (grad, None, None)]
        return None, None, None, *of_points, *[None] * (5 * len(grads))


def _by_kind(tensors: Sequence[Tensor], numbers: tuple[int, ...]) -> list[Sequence[Tensor]]:
    """``tensors`` parted into lists, which have so many tensors a map."""
    maps = len(tensors) // sum(numbers)
    ends = [maps * end for end in accumulate(numbers, initial=0)]
    return [tensors[start:end] for start, end in pairwise(ends)]


def _mean_over_ranks(means: Tensor, maps: list[Map], process_group: dist.ProcessGroup | None) -> Tensor:
    """``means [maps, …]`` over this rank's groups to means over the groups of all ranks, in one all-reduce."""
    if process_group is None:
        return means
    counts = torch.tensor([[gen.shape[0]] for (gen, *_), _ in maps], dtype=means.dtype, pin_memory=means.is_cuda)
    groups = counts.to(means.device, non_blocking=True)  # the host waits for nothing
    totals = torch.cat([means * groups, groups], 1)
    dist.all_reduce(totals, group=process_group)
    return totals[:, :-1] / totals[:, -1:]


def _check_maps(gen: object, *others: object) -> list[Map]:
    """The arguments of :func:`drift_loss` given as lists, one entry a map; None is None for every map."""
    names = ("gen", "fixed_pos", "fixed_neg", "weight_gen", "weight_pos", "weight_neg")
    if not isinstance(gen, Sequence) or isinstance(gen, str) or len(gen) == 0:
        raise TypeError(f"gen: got {type(gen).__name__}, expected a torch.Tensor [G, N, D] or a non-empty list of them")
    lists = [list(gen)]
    for name, other in zip(names[1:], others, strict=True):
        if other is None and name != "fixed_pos":
            other = [None] * len(gen)
        if not isinstance(other, Sequence) or len(other) != len(gen):
            got = f"{len(other)} entries" if isinstance(other, Sequence) else type(other).__name__
            raise ValueError(f"{name}: got {got}, expected a list of {len(gen)}, one entry for each map of gen")
        lists.append(list(other))
    maps = [_check_map(entries, f"[{m}]") for m, entries in enumerate(zip(*lists, strict=True))]
    for m, (points, _) in enumerate(maps):
        check_same("device", f"gen[{m}]", points[0].device, "gen[0]", maps[0][0][0].device)
        check_same("dtype", f"gen[{m}]", points[0].dtype, "gen[0]", maps[0][0][0].dtype)
    return maps


def _check_map(given: tuple[Any, ...], index: str) -> Map:
    """Checks the six tensors of one map, fills in what is None, and brings the weights to the dtype computed in."""
    gen, pos, neg, weight_gen, weight_pos, weight_neg = given
    check_points(f"gen{index}", gen, rank=3)
    check_points(f"fixed_pos{index}", pos, gen, f"gen{index}")
    neg = gen.new_zeros(gen.shape[0], 0, gen.shape[2]) if neg is None else neg
    check_points(f"fixed_neg{index}", neg, gen, f"gen{index}", empty=True)
    points, weights = [], []
    for kind, p, w in (("gen", gen, weight_gen), ("neg", neg, weight_neg), ("pos", pos, weight_pos)):
        name = kind if kind == "gen" else f"fixed_{kind}"
        check_weights(f"weight_{kind}{index}", w, p, f"{name}{index}")
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        points.append(p)
        weights.append(p.new_ones(p.shape[:2], dtype=dtype) if w is None else w.to(dtype))
    return points, weights
