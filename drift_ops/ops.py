"""How the public functions reach a backend, and what autograd, ``torch.compile`` and autocast see of it.

Each step of the operator is a ``torch.library`` custom op with a fake implementation (shapes only), whose schema is
made from its spec. In eager mode the backend is called as it is: the dispatcher would take longer than a small problem.
Either way the values are the same.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from .backends import implementation
from .points import full_precision, saveable
from .spec import AffinitySpec, LossMap, LossSpec

_Spec = TypeVar("_Spec", AffinitySpec, LossSpec)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a backend may look at the memory of ``tensor``: nobody traces, and no transform of torch.func is on."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and all(torch._C._get_dispatch_mode(key) is None for key in _TRACERS)
    )


_TRACERS = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)


def _define(tensors: str, spec: type[_Spec], results: str) -> Callable[[Callable[..., Any]], Any]:
    """Makes a custom op of a function of tensors, a spec and a backend; see :func:`_given`."""

    def define(function: Callable[..., Any]) -> Any:
        schema = f"({tensors}, {spec.schema()}, str backend) -> {results}"
        name = f"drift_ops::{function.__name__.removeprefix('_')}"
        return torch.library.custom_op(name, function, mutates_args=(), schema=schema)

    return define


def _given(spec: type[_Spec], arguments: Sequence[Any]) -> tuple[_Spec, Any]:
    """The spec and the module of the backend that the last arguments of an op stand for."""
    *values, backend = arguments
    return spec.of(values), implementation(backend)


class _Step(torch.autograd.Function):
    """A step of the operator: it ``compute``s a result and ``keep``s what its backward needs."""

    compute: Callable[..., Any]
    keep: Callable[..., None]
    of_transforms: Any  # the same as torch.func wants it, its context set up apart, which takes longer

    def __init_subclass__(cls) -> None:
        if "of_transforms" in cls.__dict__:
            return

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = cls.compute(*inputs)
            cls.keep(ctx, inputs, output)
            return output

        apart = {"forward": staticmethod(cls.compute), "setup_context": staticmethod(cls.keep)}
        cls.of_transforms = type(cls.__name__, (cls,), apart | {"generate_vmap_rule": True, "of_transforms": None})
        cls.forward = staticmethod(forward)  # type: ignore[assignment]


def _apply(step: Any, *inputs: Any) -> Any:
    return (step.of_transforms if torch._C._are_functorch_transforms_active() else step).apply(*inputs)


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("drift_ops: there is no double backward; use backend='reference' for second derivatives")


class _Once(_Step):
    """The results of an op of a backward under torch.func, which takes no op that autograd is registered for."""

    @staticmethod
    def compute(op: Any, layout: Any, *leaves: Any) -> tuple[Tensor, ...]:
        return tuple(tree_leaves(op(*tree_unflatten(leaves, layout))))

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    backward = staticmethod(_no_double_backward)


def _once(op: Any, *arguments: Any) -> Any:
    """All results of an op of a backward, which has no derivative of its own."""
    if not torch._C._are_functorch_transforms_active():
        return tree_leaves(op(*arguments))
    leaves, layout = tree_flatten(arguments)
    return _Once.of_transforms.apply(op, layout, *leaves)


# Forms A and B.


class _AffinitySums(_Step):
    """:func:`affinity_sums`; ``tensors`` are q, w, the keys, and the values where these are not the keys."""

    @staticmethod
    def compute(spec: AffinitySpec, backend: str, keys: int, *tensors: Any) -> tuple[Tensor, ...]:
        q, w, *others = tensors
        if _is_plain(q):
            of_keys, of_values = rows(others[:keys]), rows(others[keys:])
            return implementation(backend).affinity_sums(spec, rows(q), of_keys, of_values or None, w)
        return _affinity_sums(q, others[:keys], others[keys:], w, *spec.values(), backend)

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.spec, ctx.backend, ctx.keys, *tensors = inputs
        ctx.save_for_backward(*tensors, *output[2:])
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Any, ...]:
        q, w, *others, row_stats, col_stats, centre = ctx.saved_tensors
        keys, values = others[: ctx.keys], others[ctx.keys :]
        shapes = ctx.spec.shapes(q, keys)[:2]
        grads = [q.new_zeros(s) if g is None else g for g, s in zip(incoming[:2], shapes, strict=True)]
        tensors = (q, keys, values, w, row_stats, col_stats, centre, *grads)
        if _is_plain(q) and not torch.is_grad_enabled():
            found = tree_leaves(_affinity_sums_backward_of(ctx.spec, implementation(ctx.backend), *tensors))
        else:
            found = _once(_affinity_sums_backward, *tensors, *ctx.spec.values(), ctx.backend)
        grad_q, *of_points, grad_w = found
        return None, None, None, grad_q, None if w is None else grad_w, *of_points


def affinity_sums(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor] | None,
    w: Tensor | None,
    spec: AffinitySpec,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sums of values under the doubly normalised affinity of queries and keys (forms A and B).

    ``q`` is ``[G, N, D]``; ``keys`` and ``values`` (None: the keys) are ``[G, count, D]`` each, together M a problem;
    ``w`` is ``[G, M]`` or None for ones.

    Returns:
        ``num[s, g, side, i] = Σ_{j in side} w_j A_ij (v_j − centre)`` and ``den[...] = Σ_{j in side} w_j A_ij`` for
        each of S widths and of the sides, ``[S, G, sides, N, D]`` and ``[S, G, sides, N]``, differentiable w.r.t. every
        tensor; and ``centre [G, D]``, a constant that the backend has chosen amid the values.
    """
    keys = [k.view_as(k) for k in keys]  # dynamo wants to see no tensor twice, and queries may be keys
    tensors = [t if t is None else saveable(t) for t in (q, w, *keys, *(values or ()))]
    num, den, _, _, centre = _apply(_AffinitySums, spec, backend, len(keys), *tensors)
    return num, den, centre


@_define(
    "Tensor q, Tensor[] keys, Tensor[] values, Tensor? w", AffinitySpec, "(Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _affinity_sums(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], w: Tensor | None, *rest: Any) -> Any:
    """``num``, ``den``, for the backward the softmax statistics ``[S, G, 2, N]``, ``[S, G, 2, M]``, and the centre."""
    spec, backend = _given(AffinitySpec, rest)
    return backend.affinity_sums(spec, rows(q), rows(keys), rows(values) or None, w)


@_affinity_sums.register_fake
def _(q, keys, values, w, *rest):  # type: ignore[no-untyped-def]
    return tuple(q.new_empty(shape) for shape in AffinitySpec.of(rest[:-1]).shapes(q, keys))


@_define(
    "Tensor q, Tensor[] keys, Tensor[] values, Tensor? w, Tensor row_stats, Tensor col_stats, Tensor centre, "
    "Tensor grad_num, Tensor grad_den",
    AffinitySpec,
    "(Tensor, Tensor[], Tensor[], Tensor)",
)
def _affinity_sums_backward(*arguments: Any) -> Any:
    """Vector-Jacobian product of :func:`affinity_sums`: gradients of q, keys, values, and w (empty without w)."""
    return _affinity_sums_backward_of(*_given(AffinitySpec, arguments[9:]), *arguments[:9])


def _affinity_sums_backward_of(
    spec: AffinitySpec,
    backend: Any,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    w: Tensor | None,
    row_stats: Tensor,
    col_stats: Tensor,
    centre: Tensor,
    grad_num: Tensor,
    grad_den: Tensor,
) -> Any:
    incoming = grad_num.contiguous(), grad_den.contiguous()
    statistics = row_stats, col_stats, centre
    return backend.affinity_sums_backward(spec, rows(q), rows(keys), rows(values) or None, w, *statistics, *incoming)


@_affinity_sums_backward.register_fake
def _(q, keys, values, w, *rest):  # type: ignore[no-untyped-def]
    def alike(t: Tensor) -> Tensor:
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    return alike(q), [alike(k) for k in keys], [alike(v) for v in values], q.new_empty(0) if w is None else alike(w)


def rows(t: Any) -> Any:
    """Points, or lists of them, whose last dimension is contiguous; the others' strides are the backend's business."""
    if isinstance(t, Tensor):
        return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
    return [rows(each) for each in t]


# Form C.


class _LossGradient(_Step):
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
        if _is_plain(scale) and not torch.is_grad_enabled():
            by_map = _by_map(points, weights)
            grads = implementation(ctx.backend).loss_gradient(ctx.spec, by_map, states, scale, factors, incoming)
        else:
            statistics = (states, scale, factors, incoming)
            grads = _once(_loss_gradient, points, weights, *statistics, *ctx.spec.values(), ctx.backend)
        of_points = [t for grad in grads for t in (grad, None, None)]
        return None, None, None, None, *[None] * maps, *of_points, *[None] * (4 * maps)


class _LossAtOnce(torch.autograd.Function):
    """Losses and statistics ``[1 + R]`` of all maps, by a backend that has both phases in one call."""

    @staticmethod
    def forward(ctx: Any, spec: LossSpec, backend: Any, maps: Sequence[LossMap], *gens: Tensor) -> tuple[Tensor, ...]:
        losses, statistics, ctx.numbers, states = backend.loss_at_once(spec, maps)
        ctx.spec, ctx.backend = spec, backend
        ctx.save_for_backward(*gens, *states)
        ctx.mark_non_differentiable(*statistics)
        return *losses, *statistics

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        tensors, maps = ctx.saved_tensors, len(incoming) // 2
        given = tensors[:maps], tensors[maps:], incoming[:maps]
        gradient = functools.partial(ctx.backend.gradient_at_once, ctx.spec, ctx.numbers)
        if not torch.is_grad_enabled():
            return None, None, None, *gradient(*given)
        leaves, layout = tree_flatten(given)
        return None, None, None, *_Once.apply(gradient, layout, *leaves)


def loss_at_once(gen: Tensor, backend: str) -> Callable[..., Any] | None:
    """:func:`loss` of a list of maps and a spec, the short way for the smallest of problems, if there is one."""
    if not _is_plain(gen) or not hasattr(implementation(backend), "loss_at_once"):
        return None
    module = implementation(backend)

    def loss_of(maps: Sequence[LossMap], spec: LossSpec) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        results = _LossAtOnce.apply(spec, module, maps, *[of_map.gen for of_map in maps])
        return results[: len(maps)], results[len(maps) :]

    return loss_of


MeanOverRanks = Callable[[Tensor], Tensor]


def loss(
    maps: Sequence[LossMap], spec: LossSpec, backend: str, mean_over_ranks: MeanOverRanks | None
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Form C: the loss ``[G]`` of every map, differentiable w.r.t. gen, and its scale and λ_R², ``[1 + R]``.

    Three phases, parted by the statistics over all groups, of which the third, the gradient, is for the backward.
    ``mean_over_ranks`` takes float64 means ``[maps, n]`` over this rank's groups to those over all ranks'; a map may
    have no groups here.
    """
    here = [of_map for of_map in maps if of_map.groups]
    plain = _is_plain(maps[0].gen) or not here
    with torch.no_grad(), full_precision(maps[0].gen.device):
        losses, statistics, scale, factors, states = loss_in_phases(maps, spec, backend, plain, mean_over_ranks)
    if torch.is_grad_enabled() and any([of_map.gen.requires_grad for of_map in here]):
        points, weights = [t for of_map, _ in here for t in of_map], [w for _, of_map in here for w in of_map]
        losses = _apply(_LossGradient, spec, backend, scale, factors, *losses, *points, *weights, *states)
    if len(here) < len(maps):
        of_here = iter(losses)
        losses = [next(of_here) if m.groups else m.gen.sum((2, 3)).flatten().to(statistics.dtype) for m in maps]
    return losses, statistics.unbind()


def loss_in_phases(
    maps: Sequence[LossMap], spec: LossSpec, backend: str, plain: bool, mean_over_ranks: MeanOverRanks | None
) -> tuple[Sequence[Tensor], Tensor, Tensor, Tensor, Sequence[Tensor]]:
    """Losses; scale and λ_R² of all ``maps``, ``[maps, 1 + R]``; for phase 3 scales ``[maps]`` and 1/λ_R ``[maps, R]``
    in float64, and what phase 2 has left for it. All but the second are of the maps that have groups here."""
    places = [place for place, of_map in enumerate(maps) if of_map.groups]
    here = [maps[place] for place in places]

    def over_ranks(means: Tensor) -> tuple[Tensor, Tensor]:
        """Means of all maps, and of those here."""
        if mean_over_ranks is None or len(here) == len(maps):
            means = means if mean_over_ranks is None else mean_over_ranks(means)
            return means, means
        of_all = means.new_zeros(len(maps), means.shape[1])
        of_all[places] = means
        of_all = mean_over_ranks(of_all)
        return of_all, of_all[places]

    points = [t.detach() for of_map, _ in here for t in of_map]
    weights = [w.detach() for _, of_map in here for w in of_map]
    if plain:
        found = implementation(backend).loss_scale(spec, here)
        means, kept = _stacked([of_map for of_map, _ in found], maps, 2), [k for _, k in found]
    else:
        means, kept = _loss_scale(points, weights, *spec.values(), backend)
    of_all, of_here = over_ranks(means)
    scales, scale = of_all[:, 0] / of_all[:, 1], of_here[:, 0] / of_here[:, 1]
    if plain:
        results = implementation(backend).loss_moments(spec, here, kept, scale)
        states, moments = [state for state, _ in results], [of_map for _, of_map in results]
    else:
        states, moments = _loss_moments(points, weights, kept, scale, *spec.values(), backend)
    # λ_r² is the mean of F_r², and the loss that of the square of Σ_r F_r/λ_r.
    squares = [of_map.diagonal(dim1=1, dim2=2).mean(0, dtype=torch.float64) for of_map in moments]
    of_all, of_here = over_ranks(_stacked(squares, maps, len(spec.R_list)))
    factors = of_here.clamp(min=spec.least_squared_lambda).rsqrt()
    products = (factors.unsqueeze(2) * factors.unsqueeze(1)).unbind()  # [R, R] of each map
    losses = [(m.double() * by).sum((1, 2)).to(m.dtype) for m, by in zip(moments, products, strict=True)]
    dtype = torch.float64 if maps[0].gen.dtype == torch.float64 else torch.float32
    return losses, torch.cat([scales.unsqueeze(1), of_all], 1).to(dtype), scale, factors, states


def _stacked(rows: list[Tensor], maps: Sequence[LossMap], columns: int) -> Tensor:
    return torch.stack(rows) if rows else maps[0].gen.new_empty(0, columns, dtype=torch.float64)


_MAPS = "Tensor[] points, Tensor[] weights"  # gen, neg, pos of map 0, then of map 1, and so on


@_define(_MAPS, LossSpec, "(Tensor, Tensor[])")
def _loss_scale(points: Sequence[Tensor], weights: Sequence[Tensor], *rest: Any) -> Any:
    """Phase 1 for all maps: ``[mean d·w, mean w]`` of each, ``[maps, 2]`` float64, and what phase 2 keeps."""
    spec, backend = _given(LossSpec, rest)
    found = backend.loss_scale(spec, _by_map(points, weights))
    return torch.stack([means for means, _ in found]), [kept for _, kept in found]


@_loss_scale.register_fake
def _(points, weights, *rest):  # type: ignore[no-untyped-def]
    spec, backend = _given(LossSpec, rest)
    kept = [_fake(of_map, backend.kept_shape(spec, of_map)) for of_map in _by_map(points, weights)]
    return points[0].new_empty(len(kept), 2, dtype=torch.float64), kept


@_define(f"{_MAPS}, Tensor[] kept, Tensor scale", LossSpec, "(Tensor[], Tensor[])")
def _loss_moments(
    points: Sequence[Tensor], weights: Sequence[Tensor], kept: Sequence[Tensor], scale: Tensor, *rest: Any
) -> Any:
    """Phase 2 for all maps: what phase 3 needs, and ``mean_{i,dim}(F_r F_s)`` of the forces, ``[G, R, R]``.

    ``scale [maps]`` is the global scale of each map. λ_r² is the mean over groups of the moments' diagonal, and the
    loss a quadratic form in them, so that the forces themselves are wanted in the backward only.
    """
    spec, backend = _given(LossSpec, rest)
    found = backend.loss_moments(spec, _by_map(points, weights), kept, scale)
    return [state for state, _ in found], [moments for _, moments in found]


@_loss_moments.register_fake
def _(points, weights, kept, scale, *rest):  # type: ignore[no-untyped-def]
    spec, backend = _given(LossSpec, rest)
    maps, R = _by_map(points, weights), len(spec.R_list)
    states = [_fake(of_map, backend.state_shape(spec, of_map)) for of_map in maps]
    return states, [_fake(of_map, (of_map.groups, R, R)) for of_map in maps]


@_define(f"{_MAPS}, Tensor[] states, Tensor scale, Tensor factors, Tensor[] incoming", LossSpec, "Tensor[]")
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

    ``scale [maps]`` and ``factors [maps, R]`` (= 1/λ_r), in float64, are the global statistics; ``incoming [G]`` is the
    gradient of a map's loss.
    """
    spec, backend = _given(LossSpec, rest)
    return backend.loss_gradient(spec, _by_map(points, weights), states, scale, factors, incoming)


@_loss_gradient.register_fake
def _(points, *rest):  # type: ignore[no-untyped-def]
    return [torch.empty_like(gen) for gen in points[::3]]


def _by_map(points: Sequence[Tensor], weights: Sequence[Tensor]) -> list[LossMap]:
    starts = range(0, len(points), 3)
    return [LossMap(tuple(rows(points[n : n + 3])), tuple(weights[n : n + 3])) for n in starts]  # type: ignore[arg-type]


def _fake(of_map: LossMap, shape: Sequence[int]) -> Tensor:
    """What a backend computes from a map: float64 for float64, float32 for all else."""
    dtype = torch.float64 if of_map.gen.dtype == torch.float64 else torch.float32
    return of_map.gen.new_empty(shape, dtype=dtype)


def _entry(argument: Any, dim: Any, n: int) -> Any:
    """Entry n of an argument of an op, or of each tensor in it, that has a batch at ``dim``; None: it has none."""
    if isinstance(dim, (list, tuple)):
        return [_entry(each, of_each, n) for each, of_each in zip(argument, dim, strict=True)]
    return argument if dim is None else argument.select(dim, n)


def _one_by_one(op: Any, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """An op under torch.func.vmap: its calls one after the other. Leading dimensions are faster."""
    calls = ([_entry(*of_one, n) for of_one in zip(arguments, in_dims, strict=True)] for n in range(info.batch_size))
    results = [op(*call) for call in calls]
    return tree_map(lambda *entries: torch.stack(entries), *results), tree_map(lambda _: 0, results[0])


for _op in (_affinity_sums, _affinity_sums_backward, _loss_scale, _loss_moments, _loss_gradient):
    _op.register_vmap(functools.partial(_one_by_one, _op))
for _op in (_affinity_sums_backward, _loss_gradient):
    _op.register_autograd(_no_double_backward)
