"""The ``cpu`` backend: the C++ functions of ``csrc/cpu`` on float32 or float64 CPU tensors.

Everything here takes and returns plain tensors and is called by :mod:`drift_ops.ops` only.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import streamed_loss
from .spec import AffinitySpec, LossMap, LossSpec, PairGradients, PairProblem, PairSpec, PairWeights, by_map

_cpu: Any = None
load_error: str | None = None  # why the compiled module cannot be used
try:
    _cpu = import_module("._cpu", __package__)
    if _wanted := os.environ.get("DRIFT_OPS_CPU_ISA"):
        _cpu.choose(_wanted)
except ModuleNotFoundError:  # Python takes the folder of the sources, where it is the working one, for the package.
    load_error = (
        f"there are no compiled kernels in {os.path.dirname(__file__)}; `pip install -e .` beside it builds them with "
        "a C++17 compiler, and those of another installation serve in other working folders"
    )
except ImportError as error:
    load_error = f"drift_ops._cpu cannot be imported ({error}); build it anew with a C++17 compiler: pip install ."
except ValueError as error:
    load_error = f"DRIFT_OPS_CPU_ISA: {error}"


def _native(spec: AffinitySpec | PairSpec | LossSpec) -> Any:
    """The spec as the compiled module has it, made once: a conversion takes as long as the smallest of problems."""
    if "native" not in spec.__dict__:
        spec.__dict__["native"] = getattr(_cpu, type(spec).__name__)(spec)
    return spec.__dict__["native"]


def affinity_sums(
    spec: AffinitySpec, q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor] | None, w: Tensor | None
) -> tuple[Tensor, ...]:
    """See :func:`drift_ops.ops.affinity_sums`."""
    results = tuple([q.new_empty(shape) for shape in spec.shapes(q, keys)])
    w = None if w is None else w.contiguous()
    _cpu.affinity_forward(_native(spec), q, list(keys), list(values or ()), w, *results, torch.get_num_threads())
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
    given = (_native(spec), q, list(keys), list(values or ()), w, *statistics_and_gradients)
    _cpu.affinity_backward(*given, grad_q, of_keys, of_values, grad_w, torch.get_num_threads())
    return grad_q, of_keys, of_values, grad_w


def log_sums(problem: PairProblem, potential: Tensor | None, by_row: bool) -> Tensor:
    """See :func:`drift_ops.ops.log_sums`."""
    S, G, N, M = problem.shape
    sums = problem.q.new_empty(S, G, N if by_row else M)
    (potential,) = _as_kernels_take(problem.q, potential)
    _cpu.log_sums(*_of_problem(problem), potential, by_row, sums, torch.get_num_threads())
    return sums


def weighted_sums(problem: PairProblem, weights: PairWeights) -> tuple[Tensor, Tensor]:
    """See :func:`drift_ops.ops.weighted_sums`."""
    (S, G, N, _), sides = problem.shape, problem.spec.sides
    num, den = problem.q.new_empty(S, G, sides, N, problem.q.shape[2]), problem.q.new_empty(S, G, sides, N)
    given = _as_kernels_take(problem.q, *weights)
    _cpu.weighted_sums(*_of_problem(problem), *given, num, den, torch.get_num_threads())
    return num, den


def pair_gradients(
    problem: PairProblem, weights: PairWeights, incoming: PairGradients
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """See :func:`drift_ops.ops.pairs._pair_gradients`."""
    q, (alpha, beta, w, _) = problem.q, weights
    grad_q, *of_keys = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, *problem.keys))
    grad_w = q.new_zeros(0 if w is None else w.shape)
    flows = q.new_zeros(alpha.shape), q.new_zeros(beta.shape), q.new_zeros(alpha.shape)
    given, results = _as_kernels_take(q, *weights, *incoming), (grad_q, of_keys, grad_w, *flows)
    _cpu.pair_gradients(*_of_problem(problem), *given, *results, torch.get_num_threads())
    return results


def _of_problem(problem: PairProblem) -> tuple[Any, ...]:
    """The problem as the compiled module takes it: widths ``[S]`` and units ``[G]`` as numbers."""
    spec, q, keys, width, unit = problem
    return _native(spec), q, list(keys), width.tolist(), [1.0] * len(q) if unit is None else unit.tolist()


def _as_kernels_take(q: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(q.dtype).contiguous() for t in tensors]


def kept_shape(spec: LossSpec, of_map: LossMap) -> tuple[int, ...]:
    """Shape of the costs that phase 1 of form C keeps for phase 2: ``[G, N, columns]``, or ``[0]`` for none."""
    (N, D), (gen, neg, pos) = of_map.gen.shape[-2:], of_map.counts
    negatives = neg + gen if spec.include_self else neg
    keeps = N * (negatives + pos) <= _cpu.GROUP_PAIRS and D >= _cpu.KEEP_DISTANCES_FROM_D
    return (of_map.groups, N, _cpu.loss_columns(negatives, pos)) if keeps else (0,)


def state_shape(spec: LossSpec, of_map: LossMap) -> tuple[int, ...]:
    """Shape of what phase 2 keeps for phase 3: the forces ``[R, G, N, D]`` before the division by λ."""
    return of_map.shape_of_forces(spec)


def is_composed(spec: LossSpec, of_map: LossMap) -> bool:
    """Whether the groups are so large that phase 2 is composed of sums over pairs, for want of a kernel of its own."""
    return of_map.counts[0] * of_map.targets(spec) > _cpu.GROUP_PAIRS and not spec.is_form_b


def loss_scale(spec: LossSpec, maps: Sequence[LossMap]) -> list[tuple[Tensor, Tensor]]:
    """Phase 1: of each map ``[mean C·w, mean w]`` in float64, ``[1, 2]`` or ``[G, 2]``, and costs kept for phase 2."""
    results = []
    for of_map in maps:
        means = of_map.gen.new_empty(1 if spec.scale == "global" else of_map.groups, 2, dtype=torch.float64)
        kept = of_map.gen.new_empty(kept_shape(spec, of_map))
        _cpu.loss_scale(_native(spec), of_map, means, kept, torch.get_num_threads())
        results.append((means, kept))
    return results


def loss_moments(
    spec: LossSpec, maps: Sequence[LossMap], kept: Sequence[Tensor], scale: Tensor, R: Tensor | None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Phase 2: of each map the forces ``[R, G, N, D]``, the means of their products ``[G, R, R]``, and the details."""
    results = []
    for of_map, costs, of_scale in zip(maps, kept, by_map(maps, scale), strict=True):
        if is_composed(spec, of_map):
            results.append(streamed_loss.composed_moments(sys.modules[__name__], spec, of_map, of_scale, R))
            continue
        known, gen = spec if R is None else replace(spec, R_list=tuple(R.tolist())), of_map.gen
        forces, moments = gen.new_empty(state_shape(spec, of_map)), gen.new_empty(of_map.shape_of_moments(spec))
        details = gen.new_empty(of_map.shape_of_details(spec))
        _cpu.loss_moments(_native(known), of_map, of_scale, costs, forces, moments, details, torch.get_num_threads())
        results.append((forces, moments, details))
    return results


def loss_gradient(
    spec: LossSpec,
    maps: Sequence[LossMap],
    states: Sequence[Tensor],
    scale: Tensor,
    factors: Tensor,
    incoming: Sequence[Tensor],
) -> list[Tensor]:
    """Phase 3: of each map the gradient w.r.t. gen, from the forces, the scale and 1/λ_R."""
    statistics = zip(by_map(maps, scale), by_map(maps, factors), strict=True)
    numbers = [
        torch.cat([s.unsqueeze(1).expand(max(len(s), len(f)), 1), f.expand(max(len(s), len(f)), -1)], 1)
        for s, f in statistics
    ]
    return gradient_at_once(spec, [of_map.gen for of_map in maps], states, numbers, incoming)


def loss_at_once(spec: LossSpec, maps: Sequence[LossMap], scale: Sequence[Tensor] | None) -> tuple[list[Tensor], ...]:
    """Phases 1 and 2: of each map the losses; scale and λ_R² ``[1 + R]``, or ``[1 + R, G]`` where groups have theirs;
    the details; and for phase 3 the forces, and scale and 1/λ_R in float64, ``[1, 1 + R]`` or ``[G, 1 + R]``."""
    columns, of_groups = 1 + len(spec.R_list), spec.has_statistics_of_groups
    results: tuple[list[Tensor], ...] = ([], [], [], [], [])
    losses, statistics, details, forces, numbers = results
    for of_map in maps:
        gen, shape = of_map.gen, of_map.shape_of_forces(spec)
        losses.append(gen.new_empty(gen.shape[:-2]))
        statistics.append(gen.new_empty((columns, shape[1]) if of_groups else columns))
        forces.append(gen.new_empty(shape))
        numbers.append(gen.new_empty(shape[1] if of_groups else 1, columns, dtype=torch.float64))
        if spec.details:
            details.append(gen.new_empty(of_map.shape_of_details(spec)))
    for of_gradient, given in zip(numbers, scale or (), strict=False):
        of_gradient[:, 0] = given
    _cpu.loss_forward(_native(spec), maps, losses, statistics, numbers, forces, details, torch.get_num_threads())
    return results


def gradient_at_once(
    spec: LossSpec,
    gens: Sequence[Tensor],
    forces: Sequence[Tensor],
    numbers: Sequence[Tensor],
    incoming: Sequence[Tensor],
) -> list[Tensor]:
    """Phase 3: the gradients w.r.t. ``gens``, with their strides."""
    grads = [torch.empty_like(gen) for gen in gens]
    of_losses = [of_map.contiguous() for of_map in incoming]
    _cpu.loss_gradient(_native(spec), list(numbers), list(forces), of_losses, grads, torch.get_num_threads())
    return grads
