"""The public functions: check the arguments, bring the points into shape, call the backend, shape the result back.

Distances and softmaxes do not change when all points move together, so the points are moved to their common mean first:
float32 then resolves small distances between points far from the origin.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import ops, reference
from .arguments import check_floor, check_points, check_positive, check_positives, check_same, check_weights
from .backends import choose


def compute_V(
    x: Tensor, x_data: Tensor, x_gen: Tensor, sigma: float = 1.0, temperature: float = 1.0, normalize_features: bool = True,
    normalize_drift: bool = True, *, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Drifting field of the Gaussian kernel, each side normalised on its own.

    For each side s, ``K = exp(−d²/(2σ²))``, ``A = sqrt(softmax_rows(K/T)·softmax_cols(K/T))``, ``A ← A/ΣA``,
    ``W = A/(rowsum(A) + 1e-8)`` and ``m_s = W y_s``; the field is ``V = m_data − m_gen``.

    Args:
        x: queries (generated samples) ``[..., N, D]``; float64, float32, bfloat16 or float16. Leading dimensions are
            independent problems.
        x_data: data samples ``[..., P, D]``.
        x_gen: generated samples ``[..., M, D]``; with M = 0 there is no repulsion. Not masked where equal to ``x``.
        sigma: kernel width σ > 0, in the units of the distances.
        temperature: softmax temperature T > 0.
        normalize_features: take the distances between features scaled to norm √D; the means are of the points as given.
        normalize_drift: divide V by its mean row norm, per problem.
        backend: ``"cpu"``, ``"reference"``, … or None for the best one available (see :func:`backends`).

    Returns:
        V ``[..., N, D]`` in the dtype of ``x``, differentiable once w.r.t. the three tensors.

    Raises:
        TypeError, ValueError: an argument is not what is described here.

    Source: github.com/91gaozhidao/Generative-Modeling-via-Drifting, ``drifting/utils/drifting_field.py``.
    """
    return _gaussian_field(x, x_data, x_gen, (check_positive("sigma", sigma),), temperature, normalize_features, normalize_drift, backend)


def compute_V_multiscale(
    x: Tensor, x_data: Tensor, x_gen: Tensor, sigmas: Sequence[float] = (0.1, 0.5, 1.0, 2.0), temperature: float = 1.0,
    normalize_features: bool = True, normalize_drift: bool = True, *, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Mean of :func:`compute_V` over several ``sigmas``, normalised (``normalize_drift``) after the mean.

    All sigmas share one set of distances. Arguments, result and errors otherwise as for :func:`compute_V`.
    """
    sigmas = check_positives("sigmas", sigmas)
    return _gaussian_field(x, x_data, x_gen, sigmas, temperature, normalize_features, normalize_drift, backend)


def _gaussian_field(
    x: Tensor, x_data: Tensor, x_gen: Tensor, sigmas: tuple[float, ...], temperature: float, normalize_features: bool,
    normalize_drift: bool, backend: str | None,
) -> Tensor:  # fmt: skip
    check_points("x", x)
    check_points("x_data", x_data, x, "x")
    check_points("x_gen", x_gen, x, "x", empty=True)
    temperature = check_positive("temperature", temperature)
    chosen = choose(backend, x.device)
    with torch.autocast(x.device.type, enabled=False):
        points, data, gen = (_compute_dtype(t) for t in (x, x_data, x_gen))
        if chosen == "reference":
            V = reference.compute_V(points, data, gen, sigmas, temperature, normalize_features, normalize_drift)
            return V.to(x.dtype)
        q, sides = _problems(points), [_problems(data), _problems(gen)]
        keys = sides
        if normalize_features:
            q, keys = reference.unit_features(q), [reference.unit_features(y) for y in sides]
        key_centre = _mean_point(q, *keys)
        value_centre = _mean_point(*sides) if normalize_features else key_centre
        V = torch.zeros_like(q)
        for sign, k, v in zip((1, -1), keys, sides, strict=True):
            if k.shape[1] == 0:
                continue
            k, v = k - key_centre, v - value_centre
            num, den, _, _ = ops.affinity_sums(q - key_centre, k, v, None, "gaussian", sigmas, temperature, 0, False, 0.0, chosen)
            den = den.unsqueeze(-1)  # [S, G, 1, N, 1]
            slack = 1e-8 * den.sum(-2, keepdim=True)  # the 1e-8 beside rowsum(A), before A is divided by its sum
            # m − centre = (num − slack·centre) / (den + slack); the centres of the two sides cancel, unless one is empty
            mean = (num - slack * value_centre.unsqueeze(1)) / (den + slack)
            V = V + sign * mean[:, :, 0].mean(0)
        if gen.shape[-2] == 0:
            V = V + value_centre
        V = V.reshape(x.shape)
        return (reference.unit_drift(V) if normalize_drift else V).to(x.dtype)


def drift_field(
    x: Tensor, pos: Tensor, neg: Tensor | None = None, *, temperature: float | Sequence[float], weight_pos: Tensor | None = None,
    weight_neg: Tensor | None = None, include_self: bool = True, affinity_floor: float = 0.0, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Drifting field of the Laplacian kernel with both sides normalised jointly: Algorithm 2 of the paper.

    Over the targets ``[x (if include_self), neg, pos]``, ``L_ij = −‖x_i − y_j‖/T`` and
    ``A_ij = sqrt(max(softmax_j(L)·softmax_i(L), affinity_floor))``, the pair (x_i, x_i) masked out; weights multiply A
    after both softmaxes; ``V_i = (Σ⁻A)(Σ_j A⁺_ij y⁺_j) − (Σ⁺A)(Σ_j A⁻_ij y⁻_j)``.

    Args:
        x: queries (generated samples) ``[..., N, D]``; float64, float32, bfloat16 or float16. Leading dimensions are
            independent problems.
        pos: data ``[..., P, D]``, P ≥ 1.
        neg: further negatives ``[..., M, D]``; M = 0 and None mean none.
        temperature: T > 0, or a sequence of them, which share one set of distances.
        weight_pos, weight_neg: weights of A ``[..., P]``, ``[..., M]``; None means 1. The weight of x itself is 1.
        include_self: count x among the negatives.
        affinity_floor: in [0, 1); the release's training loss has 1e-6.
        backend: ``"cpu"``, ``"reference"``, … or None for the best one available (see :func:`backends`).

    Returns:
        V ``[..., N, D]``, or ``[T, ..., N, D]`` for a sequence of temperatures, in the dtype of ``x``; differentiable once
        w.r.t. every tensor.

    Raises:
        TypeError, ValueError: an argument is not what is described here, or there are no negatives at all.
    """
    check_points("x", x)
    check_points("pos", pos, x, "x")
    if neg is None:
        neg = x.new_zeros(*x.shape[:-2], 0, x.shape[-1])
    check_points("neg", neg, x, "x", empty=True)
    if neg.shape[-2] == 0 and not include_self:
        raise ValueError("neg: got no negatives with include_self=False, expected at least one; pass neg or set include_self=True")
    check_weights("weight_pos", weight_pos, pos, "pos")
    check_weights("weight_neg", weight_neg, neg, "neg")
    several = isinstance(temperature, Sequence)
    temperatures = check_positives("temperature", temperature) if several else (check_positive("temperature", temperature),)
    affinity_floor = check_floor(affinity_floor)
    chosen = choose(backend, x.device)
    with torch.autocast(x.device.type, enabled=False):
        q, p, n = (_compute_dtype(t) for t in (x, pos, neg))
        w_pos, w_neg = (None if w is None else w.to(q.dtype) for w in (weight_pos, weight_neg))
        if chosen == "reference":
            V = reference.drift_field(q, p, n, temperatures, w_pos, w_neg, include_self, affinity_floor)
        else:
            targets = torch.cat([q, n, p] if include_self else [n, p], -2)
            weights = None
            if w_pos is not None or w_neg is not None:
                given = [q.new_ones(q.shape[:-1])] if include_self else []
                given += [t.new_ones(t.shape[:-1]) if w is None else w for t, w in ((n, w_neg), (p, w_pos))]
                weights = _problems(torch.cat(given, -1), 1)
            q, targets = _problems(q), _problems(targets)
            centre = _mean_point(q, targets)
            q, targets = q - centre, targets - centre
            num, den, _, _ = ops.affinity_sums(
                q, targets, targets, weights, "laplace", temperatures, 1.0, targets.shape[1] - pos.shape[-2], include_self,
                affinity_floor, chosen,
            )  # fmt: skip
            den = den.unsqueeze(-1)  # [T, G, 2, N, 1]
            V = (den[:, :, 0] * num[:, :, 1] - den[:, :, 1] * num[:, :, 0]).reshape(-1, *x.shape)
        return (V if several else V[0]).to(x.dtype)


def drift_loss(
    gen: Tensor | Sequence[Tensor], fixed_pos: Tensor | Sequence[Tensor],
    fixed_neg: Tensor | Sequence[Tensor | None] | None = None, weight_gen: Tensor | Sequence[Tensor | None] | None = None,
    weight_pos: Tensor | Sequence[Tensor | None] | None = None, weight_neg: Tensor | Sequence[Tensor | None] | None = None,
    R_list: Sequence[float] = (0.02, 0.05, 0.2), *, affinity_floor: float = 1e-6,
    process_group: dist.ProcessGroup | None = None, backend: str | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """The release's training loss over all groups of one feature map, or of several maps at once.

    Distances are divided by their weighted mean over **all** groups, the forces of each R by their root mean square λ_R
    over all groups; the loss is the mean square of the summed forces, and its gradient w.r.t. ``gen`` moves the samples
    along them. Only ``gen`` gets a gradient.

    Args:
        gen: generated samples ``[G, N, D]``; float64, float32, or bfloat16/float16 computed in float32.
        fixed_pos: data ``[G, P, D]``, P ≥ 1.
        fixed_neg: further negatives ``[G, M, D]``; M = 0 and None mean none. ``gen`` itself is always among them.
        weight_gen, weight_pos, weight_neg: ``[G, N]``, ``[G, P]``, ``[G, M]``; None means 1.
        R_list: kernel widths > 0, in units of the mean distance.
        affinity_floor: in [0, 1). 1e-6 is the release's; 0 where it would swamp the field (large N, small D).
        process_group: sum the statistics over these ranks, so that K ranks with G/K groups each equal one with G. All
            maps together cost two all-reduces.
        backend: ``"cpu"``, ``"reference"``, … or None for the best one available (see :func:`backends`).

        ``gen``, ``fixed_pos``, ``fixed_neg`` and the weights may be lists with one entry a feature map; statistics are per map.

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
    device = maps[0][0][0].device
    chosen = choose(backend, device)
    with torch.autocast(device.type, enabled=False):
        losses = _loss_of_maps(maps, R_list, affinity_floor, process_group, chosen)
    infos = [{"scale": scale, **{f"loss_{R}": squared[r] for r, R in enumerate(R_list)}} for _, scale, squared in losses]
    if isinstance(gen, Tensor):
        return losses[0][0], infos[0]
    return [loss for loss, _, _ in losses], infos


Map = tuple[list[Tensor], list[Tensor]]  # points of gen, neg, pos [G, count, D] and their weights [G, count]


def _loss_of_maps(
    maps: list[Map], R_list: tuple[float, ...], affinity_floor: float, process_group: dist.ProcessGroup | None, backend: str
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each map its loss ``[G]``, scale and λ_R² ``[R]``, in the three phases that the two global statistics separate."""
    gens = [points[0] for points, _ in maps]
    all_points = [t.detach().contiguous() for points, _ in maps for t in points]
    all_weights = [w.detach().contiguous() for _, weights in maps for w in weights]
    phases = reference if backend == "reference" else ops

    means, kept = phases.loss_scale(all_points, all_weights, backend)
    mean_distance, mean_weight = _mean_over_ranks(means, gens, process_group).unbind(1)
    scale = mean_distance / mean_weight  # [maps]
    forces, means = phases.loss_forces(all_points, all_weights, kept, scale, R_list, affinity_floor, backend)
    squared_lambda = _mean_over_ranks(means, gens, process_group)  # [maps, R]
    losses, grads = phases.loss_gradient(forces, squared_lambda, scale, backend)
    losses = [ops.attach_gradient(*each) for each in zip(gens, losses, grads, strict=True)]
    return [(loss, scale[m].to(loss.dtype), squared_lambda[m].to(loss.dtype)) for m, loss in enumerate(losses)]


def _mean_over_ranks(means: Tensor, gens: list[Tensor], process_group: dist.ProcessGroup | None) -> Tensor:
    """``means [maps, …]`` over this rank's groups to means over the groups of all ranks, in one all-reduce."""
    if process_group is None:
        return means
    groups = means.new_tensor([[gen.shape[0]] for gen in gens])
    totals = torch.cat([means * groups, groups], 1)
    dist.all_reduce(totals, group=process_group)
    return totals[:, :-1] / totals[:, -1:]


def _check_maps(gen: object, *others: object) -> list[Map]:
    """The arguments of :func:`drift_loss` given as lists, one entry a map; a None or missing list is None for every map."""
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
    """Checks the six tensors of one map, fills in what is None, and brings all to the dtype computed in."""
    gen, pos, neg, weight_gen, weight_pos, weight_neg = given
    check_points(f"gen{index}", gen, rank=3)
    check_points(f"fixed_pos{index}", pos, gen, f"gen{index}")
    neg = gen.new_zeros(gen.shape[0], 0, gen.shape[2]) if neg is None else neg
    check_points(f"fixed_neg{index}", neg, gen, f"gen{index}", empty=True)
    points, weights = [], []
    for kind, p, w in (("gen", gen, weight_gen), ("neg", neg, weight_neg), ("pos", pos, weight_pos)):
        name = kind if kind == "gen" else f"fixed_{kind}"
        check_weights(f"weight_{kind}{index}", w, p, f"{name}{index}")
        points.append(_compute_dtype(p))
        weights.append(points[-1].new_ones(p.shape[:2]) if w is None else w.to(points[-1].dtype))
    return points, weights


def _compute_dtype(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def _problems(t: Tensor, trailing: int = 2) -> Tensor:
    """All leading dimensions as one: ``[..., count, D]`` to ``[G, count, D]`` (``trailing=1``: ``[..., count]``)."""
    leading = t.dim() - trailing
    return t.flatten(0, leading - 1) if leading else t.unsqueeze(0)


def _mean_point(*points: Tensor) -> Tensor:
    """Mean ``[G, 1, D]`` of all points of each problem; a constant for autograd, as nothing depends on it."""
    count = sum(p.shape[1] for p in points)
    return sum((p.detach().sum(1, keepdim=True) for p in points), points[0].new_zeros(())) / count
