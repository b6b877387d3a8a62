"""The ``cpu`` backend: the C++ functions of ``csrc/cpu`` on float32 or float64 CPU tensors.

Everything here takes and returns plain tensors and is called by :mod:`drift_ops.ops` only.
"""

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import reference
from .spec import AffinitySpec, LossMap, LossSpec, PairSpec

_cpu: Any = None
load_error: str | None = None  # why the compiled module cannot be used
try:
    _cpu = import_module("._cpu", __package__)
    if _wanted := os.environ.get("DRIFT_OPS_CPU_ISA"):
        _cpu.choose(_wanted)
except ImportError as error:
    load_error = f"drift_ops._cpu cannot be imported ({error}); reinstall with a C++17 compiler: pip install ."
except ValueError as error:
    load_error = f"DRIFT_OPS_CPU_ISA: {error}"


def affinity_sums(
    spec: AffinitySpec, q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor] | None, w: Tensor | None
) -> tuple[Tensor, ...]:
    """See :func:`drift_ops.ops.affinity_sums`."""
    results = tuple([q.new_empty(shape) for shape in spec.shapes(q, keys)])
    w = None if w is None else w.contiguous()
    _cpu.affinity_forward(spec, q, list(keys), list(values or ()), w, *results, torch.get_num_threads())
    return results


def affinity_sums_backward(
    spec: AffinitySpec,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor] | None,
    w: Tensor | None,
    *statistics_and_gradients: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """See :func:`drift_ops.ops.affinity_sums`; after ``w`` come row_stats, col_stats, centre, grad_num, grad_den."""
    grad_q, *grads = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, *keys, *(values or ())))
    of_keys, of_values = grads[: len(keys)], grads[len(keys) :]
    w = None if w is None else w.contiguous()
    grad_w = q.new_empty(0) if w is None else torch.zeros_like(w)
    given = (spec, q, list(keys), list(values or ()), w, *statistics_and_gradients)
    _cpu.affinity_backward(*given, grad_q, of_keys, of_values, grad_w, torch.get_num_threads())
    return grad_q, of_keys, of_values, grad_w


def log_sums(
    spec: PairSpec,
    q: Tensor,
    keys: Sequence[Tensor],
    width: Tensor,
    unit: Tensor | None,
    potential: Tensor | None,
    by_row: bool,
) -> Tensor:
    """See :func:`drift_ops.ops.log_sums`."""
    sums = q.new_empty(len(width), q.shape[0], q.shape[1] if by_row else sum(k.shape[1] for k in keys))
    widths_and_units, (potential,) = _of_pairs(q, width, unit, potential)
    _cpu.log_sums(spec, q, list(keys), *widths_and_units, potential, by_row, sums, torch.get_num_threads())
    return sums


def weighted_sums(
    spec: PairSpec,
    q: Tensor,
    keys: Sequence[Tensor],
    width: Tensor,
    unit: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    w: Tensor | None,
    centre: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`drift_ops.ops.weighted_sums`."""
    (G, N, D), S = q.shape, len(width)
    num, den = q.new_empty(S, G, spec.sides, N, D), q.new_empty(S, G, spec.sides, N)
    widths_and_units, others = _of_pairs(q, width, unit, alpha, beta, w, centre)
    _cpu.weighted_sums(spec, q, list(keys), *widths_and_units, *others, num, den, torch.get_num_threads())
    return num, den


def pair_gradients(
    spec: PairSpec,
    q: Tensor,
    keys: Sequence[Tensor],
    width: Tensor,
    unit: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    w: Tensor | None,
    centre: Tensor | None,
    grad_num: Tensor | None,
    grad_den: Tensor | None,
    grad_columns: Tensor | None,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """See :func:`drift_ops.ops.pairs._pair_gradients`."""
    grad_q, *of_keys = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, *keys))
    grad_w = q.new_zeros(0 if w is None else w.shape)
    flows = q.new_zeros(alpha.shape), q.new_zeros(beta.shape), q.new_zeros(alpha.shape)
    widths_and_units, others = _of_pairs(q, width, unit, alpha, beta, w, centre, grad_num, grad_den, grad_columns)
    results = grad_q, of_keys, grad_w, *flows
    _cpu.pair_gradients(spec, q, list(keys), *widths_and_units, *others, *results, torch.get_num_threads())
    return results


def _of_pairs(
    q: Tensor, width: Tensor, unit: Tensor | None, *others: Tensor | None
) -> tuple[tuple[list[float], list[float]], list[Tensor | None]]:
    """Widths ``[S]`` and units ``[G]`` as numbers, and the other tensors as the kernels take them."""
    numbers = width.tolist(), [1.0] * len(q) if unit is None else unit.tolist()
    return numbers, [None if t is None else t.to(q.dtype).contiguous() for t in others]


def kept_shape(spec: LossSpec, of_map: LossMap) -> tuple[int, ...]:
    """Shape of the distances that phase 1 of form C keeps for phase 2: [G, N, M padded], or [0] for none."""
    if not spec.of_release:
        return reference.kept_shape(spec, of_map)
    (N, D), M = of_map.gen.shape[-2:], sum(of_map.counts)
    keeps = N * M <= _cpu.GROUP_PAIRS and D >= _cpu.KEEP_DISTANCES_FROM_D
    return (of_map.groups, N, -(-M // _cpu.KEPT_ALIGN) * _cpu.KEPT_ALIGN) if keeps else (0,)


def state_shape(spec: LossSpec, of_map: LossMap) -> tuple[int, ...]:
    """Shape of what phase 2 keeps for phase 3: the forces ``[R, G, N, D]`` before the division by λ."""
    return of_map.shape_of_forces(spec)


def loss_scale(spec: LossSpec, maps: Sequence[LossMap]) -> list[tuple[Tensor, Tensor]]:
    """Phase 1: of each map ``[mean d·w, mean w]`` in float64, and the distances kept for phase 2."""
    if not spec.of_release:
        return reference.loss_scale(spec, maps)
    results = []
    for of_map in maps:
        means = of_map.gen.new_empty(2, dtype=torch.float64)
        kept = of_map.gen.new_empty(kept_shape(spec, of_map))
        _cpu.loss_scale(spec, of_map, means, kept, torch.get_num_threads())
        results.append((means.view(1, 2), kept))
    return results


def loss_moments(
    spec: LossSpec, maps: Sequence[LossMap], kept: Sequence[Tensor], scale: Tensor, R: Tensor | None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Phase 2: of each map the forces ``[R, G, N, D]``, and the means of their products ``[G, R, R]``."""
    if not spec.of_release:
        return reference.loss_moments(spec, maps, kept, scale, R)
    results = []
    for of_map, distances, of_scale in zip(maps, kept, scale.tolist(), strict=True):
        R, gen = len(spec.R_list), of_map.gen
        forces, moments = gen.new_empty(state_shape(spec, of_map)), gen.new_empty(of_map.groups, R, R)
        # The distances are moved in place where they belong to the sample itself, and an op must not change its input.
        _cpu.loss_moments(spec, of_map, of_scale, distances.clone(), forces, moments, torch.get_num_threads())
        results.append((forces, moments, gen.new_empty(0)))
    return results


def loss_gradient(
    spec: LossSpec,
    maps: Sequence[LossMap],
    states: Sequence[Tensor],
    scale: Tensor,
    factors: Tensor,
    incoming: Sequence[Tensor],
) -> list[Tensor]:
    """Phase 3: of each map the gradient w.r.t. gen, from the forces and the global statistics."""
    if not spec.of_release:
        return reference.loss_gradient(spec, maps, states, scale, factors, incoming)
    numbers = torch.cat([scale.unsqueeze(1), factors], 1).tolist()
    return gradient_at_once(spec, numbers, [of_map.gen for of_map in maps], states, incoming)


Numbers = list[list[float]]  # of each map its scale and 1/λ_R


def loss_at_once(spec: LossSpec, maps: Sequence[LossMap]) -> tuple[list[Tensor], list[Tensor], Numbers, list[Tensor]]:
    """Phases 1 and 2: of each map the losses, scale and λ_R² ``[1 + R]``, and for phase 3 numbers and the forces."""
    R = len(spec.R_list)
    losses = [of_map.gen.new_empty(of_map.gen.shape[:-2]) for of_map in maps]
    statistics = [of_map.gen.new_empty(1 + R) for of_map in maps]
    forces = [of_map.gen.new_empty(state_shape(spec, of_map)) for of_map in maps]
    numbers = _cpu.loss_forward(spec, maps, losses, statistics, forces, torch.get_num_threads())
    return losses, statistics, numbers, forces


def gradient_at_once(
    spec: LossSpec, numbers: Numbers, gens: Sequence[Tensor], forces: Sequence[Tensor], incoming: Sequence[Tensor]
) -> list[Tensor]:
    """Phase 3: the gradients w.r.t. ``gens``, with their strides."""
    grads = [torch.empty_like(gen) for gen in gens]
    of_losses = [of_map.contiguous() for of_map in incoming]
    _cpu.loss_gradient(spec, numbers, list(forces), of_losses, grads, torch.get_num_threads())
    return grads
