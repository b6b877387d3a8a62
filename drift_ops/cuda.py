"""The ``cuda`` backend: the CUDA C++ kernels of ``csrc/cuda`` on float32 or float64 CUDA tensors.

Everything here takes and returns plain tensors and is called by :mod:`drift_ops.ops` only. float32 products are made of
float16 ones: 22 bits where ``torch.get_float32_matmul_precision()`` is ``"highest"``, otherwise 11, as many as of TF32.
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import streamed_loss
from .points import gathered, scattered
from .spec import AffinitySpec, LossMap, LossSpec, PairGradients, PairProblem, PairWeights, by_map

_cuda: Any = None
load_error: str | None = None  # why the compiled module cannot be used
try:
    _cuda = import_module("._cuda", __package__)
except ImportError as error:
    load_error = f"drift_ops._cuda cannot be imported ({error}); reinstall where nvcc and a GPU are: pip install ."


def why_not() -> str | None:
    """Why the backend cannot be used on this machine; None where it can."""
    if _cuda is None:
        return load_error
    if not torch.cuda.is_available():
        return "no CUDA device"
    if error := _cuda.device_error():
        return f"no CUDA device for the runtime that drift_ops._cuda was built with: {error}"
    if max(torch.cuda.get_device_capability(d) for d in range(torch.cuda.device_count())) < (8, 0):
        return "no CUDA device of compute capability 8.0 or later"
    return None


def _launch(tensor: Tensor) -> Any:
    """Where and how kernels run for ``tensor`` (on the CPU, their emulation in tests)."""
    device, stream = 0, 0
    if tensor.is_cuda:
        device, stream = tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream
    float64, splits_products = tensor.dtype == torch.float64, torch.get_float32_matmul_precision() == "highest"
    allocate = functools.partial(torch.empty, dtype=torch.float64, device=tensor.device)
    return _cuda.Launch(float64, splits_products, device, stream, allocate)


def _in_chunks(spec: AffinitySpec) -> Iterator[tuple[AffinitySpec, slice]]:
    """The spec with as many widths at a time as a call takes, and which they are."""
    for start in range(0, len(spec.widths), _cuda.MAX_WIDTHS):
        chunk = slice(start, start + _cuda.MAX_WIDTHS)
        yield replace(spec, widths=spec.widths[chunk]), chunk


def affinity_sums(
    spec: AffinitySpec,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor] | None,
    w: Tensor | None,
    unit: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`drift_ops.ops.affinity_sums`; widths and the self distance are in units of ``unit``, a 0-d float64
    tensor on the device."""
    q, k, v, centre = gathered(q, keys, values)
    points = q, k, v, None if w is None else w.contiguous()
    num, den, row_stats, col_stats = (q.new_empty(shape) for shape in spec.shapes(q, [k])[:-1])
    for of_chunk, at in _in_chunks(spec):
        sums = num[at], den[at], row_stats[at], col_stats[at]
        _cuda.affinity_forward(of_chunk, points, k.shape[1] - keys[-1].shape[1], unit, sums, _launch(q))
    return num, den, row_stats, col_stats, centre


def affinity_sums_backward(
    spec: AffinitySpec,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor] | None,
    w: Tensor | None,
    row_stats: Tensor,
    col_stats: Tensor,
    centre: Tensor,
    *incoming: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """See :func:`drift_ops.ops.affinity_sums`; ``incoming`` are grad_num and grad_den."""
    q, k, v, _ = gathered(q, keys, values, centre)
    points = q, k, v, None if w is None else w.contiguous()
    grads: list[Tensor] = []
    for of_chunk, at in _in_chunks(spec):
        found = tuple(q.new_empty(0) if t is None else torch.empty_like(t) for t in points)
        known = tuple(t[at] for t in (row_stats, col_stats, *incoming))
        _cuda.affinity_backward(of_chunk, points, k.shape[1] - keys[-1].shape[1], known, found, _launch(q))
        grads = [grad.add_(more) for grad, more in zip(grads, found, strict=True)] if grads else list(found)
    grad_q, grad_k, grad_v, grad_w = grads
    return grad_q, *scattered(keys, values, grad_k, grad_v), grad_w


def log_sums(problem: PairProblem, potential: Tensor | None, by_row: bool) -> Tensor:
    """See :func:`drift_ops.ops.log_sums`."""
    S, G, N, M = problem.shape
    q, k, _, _ = gathered(problem.q, problem.keys, None)
    sums = q.new_empty(S, G, N if by_row else M)
    of_others = None if potential is None else potential.contiguous()
    _cuda.log_sums(problem.spec, (q, k, None, None), _widths(problem), of_others, by_row, sums, _launch(q))
    return sums


def weighted_sums(problem: PairProblem, weights: PairWeights) -> tuple[Tensor, Tensor]:
    """See :func:`drift_ops.ops.weighted_sums`."""
    (S, G, N, _), sides = problem.shape, problem.spec.sides
    q, k, v, w = _gathered(problem, weights)
    num, den = q.new_empty(S, G, sides, N, q.shape[2]), q.new_empty(S, G, sides, N)
    known = problem.first_keys, _widths(problem), _as_statistics(weights.alpha, weights.beta)
    _cuda.weighted_sums(problem.spec, (q, k, v, w), *known, (num, den), _launch(q))
    return num, den


def pair_gradients(
    problem: PairProblem, weights: PairWeights, incoming: PairGradients
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """See :func:`drift_ops.ops.pairs._pair_gradients`."""
    (alpha, beta, _, _), spec = weights, problem.spec
    q, k, v, w = _gathered(problem, weights)
    grad_v = None if incoming.num is None else torch.empty_like(v)
    grad_q, grad_k, grad_w = torch.empty_like(q), torch.empty_like(k), q.new_empty(0 if w is None else w.shape)
    flows = q.new_empty(alpha.shape), q.new_empty(beta.shape), q.new_empty(alpha.shape)
    known, grads = (*_as_statistics(alpha, beta), *incoming), (grad_q, grad_k, grad_v, grad_w)
    first, widths = problem.first_keys, _widths(problem)
    _cuda.pair_gradients(spec, (q, k, v, w), first, widths, known, grads, flows, _launch(q))
    of_keys, _ = scattered(problem.keys, None, grad_k, grad_v)
    return grad_q, of_keys, grad_w, *flows


def _gathered(problem: PairProblem, weights: PairWeights) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Points as the kernels take them, see :func:`gathered`, and the weights of keys."""
    q, k, v, _ = gathered(problem.q, problem.keys, None, weights.centre)
    return q, k, v, None if weights.w is None else weights.w.contiguous()


def _widths(problem: PairProblem) -> tuple[Tensor, Tensor]:
    """The widths ``[S, G]`` of costs, and the distances ``[G]`` that give pairs of a query with itself their costs."""
    spec, q, _, width, unit = problem
    unit = q.new_ones(len(q)) if unit is None else unit.to(q.dtype)
    added = spec.self_cost * unit
    own = added + spec.least_distance if spec.cost == "l2" else (added + spec.least_distance**2).sqrt()
    return width.to(q.dtype).unsqueeze(1) * unit, own


def _as_statistics(*potentials: Tensor) -> tuple[Tensor, ...]:
    """Each ``[S, G, count]`` as the statistics ``[S, G, 2, count]`` of softmaxes: twice the values, and ones."""
    return tuple(torch.stack([2 * t, torch.ones_like(t)], 2) for t in potentials)


def _in_shared_memory(spec: LossSpec, of_map: LossMap) -> bool:
    """Whether the groups of a map go through the kernels that hold one in shared memory; others are streamed."""
    gen, targets = of_map.gen, sum(of_map.counts)
    if not spec.is_of_release or gen.dtype != torch.float32 or targets >= 1 << 16:
        return False
    return _cuda.group_fits(of_map.counts[0], targets, len(spec.R_list), gen.device.index or 0)


def kept_shape(spec: LossSpec, of_map: LossMap) -> tuple[int, ...]:
    """Shape of what phase 1 of form C keeps for phase 2: the distances ``[G, N, targets]`` if they take no more memory
    than gen, as the gradient does later; otherwise nothing."""
    (N, D), targets = of_map.gen.shape[2:], sum(of_map.counts)
    return (of_map.groups, N, targets) if targets <= D and _in_shared_memory(spec, of_map) else (0,)


def state_shape(spec: LossSpec, of_map: LossMap) -> tuple[int, ...]:
    """Shape of what phase 2 keeps for phase 3, which makes the gradient: the distances if they are small beside it,
    otherwise nothing; the forces ``[R, G, N, D]`` where groups are streamed."""
    if not _in_shared_memory(spec, of_map):
        return of_map.shape_of_forces(spec)
    return kept_shape(spec, of_map) if 4 * sum(of_map.counts) <= of_map.gen.shape[3] else (0,)


def loss_scale(spec: LossSpec, maps: Sequence[LossMap]) -> list[tuple[Tensor, Tensor]]:
    """Phase 1: of each map ``[mean C·w, mean w]`` in float64, and what :func:`kept_shape` says."""
    results = []
    for of_map in maps:
        gen = of_map.gen
        means, kept = gen.new_empty(1, 2, dtype=torch.float64), gen.new_empty(kept_shape(spec, of_map))
        if _in_shared_memory(spec, of_map):
            _cuda.loss_scale(spec, of_map, kept, means, _launch(gen))
        elif not spec.is_of_release:
            means = streamed_loss.composed_means(sys.modules[__name__], spec, of_map)
        else:
            q, targets, w = streamed_loss.centred(of_map)
            affinity = AffinitySpec("laplace", (), has_self=True, least_distance=spec.least_distance, self_distance=0.0)
            _cuda.affinity_scale(affinity, (q, targets, None, w), means, _launch(gen))
        results.append((means, kept))
    return results


def loss_moments(
    spec: LossSpec, maps: Sequence[LossMap], kept: Sequence[Tensor], scale: Tensor, R_list: Tensor | None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Phase 2: of each map the state of :func:`state_shape`, the means of the forces' products ``[G, R, R]``, and the
    details."""
    results = []
    for of_map, distances, s in zip(maps, kept, by_map(maps, scale), strict=True):
        if not spec.is_of_release:
            results.append(streamed_loss.composed_moments(sys.modules[__name__], spec, of_map, s, R_list))
            continue
        if not _in_shared_memory(spec, of_map):
            forces, moments = streamed_loss.loss_moments(affinity_sums, spec, of_map, s[0])
            results.append((forces, moments, forces.new_empty(0)))
            continue
        gen, R = of_map.gen, len(spec.R_list)
        moments = gen.new_empty(of_map.groups, R, R)
        _cuda.loss_moments(spec, of_map, distances, s, moments, _launch(gen))
        keeps = state_shape(spec, of_map) == distances.shape
        state = distances.clone() if keeps else gen.new_empty(0)  # an op returns no input
        results.append((state, moments, gen.new_empty(0)))
    return results


def loss_gradient(
    spec: LossSpec,
    maps: Sequence[LossMap],
    states: Sequence[Tensor],
    scale: Tensor,
    factors: Tensor,
    incoming: Sequence[Tensor],
) -> list[Tensor]:
    """Phase 3: of each map the gradient w.r.t. gen, with its strides."""
    grads = []
    statistics = by_map(maps, scale), by_map(maps, factors.contiguous())
    for of_map, state, s, by_R, of_loss in zip(maps, states, *statistics, incoming, strict=True):
        if not _in_shared_memory(spec, of_map):
            grads.append(streamed_loss.loss_gradient(spec, of_map.gen, state, s, by_R, of_loss))
            continue
        grad = torch.empty_like(of_map.gen)
        _cuda.loss_gradient(spec, of_map, state, s, by_R, of_loss.contiguous(), grad, _launch(grad))
        grads.append(grad)
    return grads
