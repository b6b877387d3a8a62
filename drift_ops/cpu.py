"""The ``cpu`` backend: the C++ kernels of ``csrc/cpu`` on contiguous float32 or float64 CPU tensors.

Everything here takes and returns plain tensors and is called by :mod:`drift_ops.ops` only.
"""

import os
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import streamed_loss
from .native import address, of_dtype
from .points import gathered, scattered
from .spec import AffinitySpec, LossMap, LossSpec

# Groups up to this many query-target pairs keep them in cache and go through the group kernel of form C; larger ones
# are streamed. In the group kernel the distances of phase 1 are kept for phase 2 unless D is so small that computing
# them again is cheaper than the memory.
GROUP_PAIRS = 1 << 18
KEEP_DISTANCES_FROM_D = 32


_cpu: ModuleType | None = None
load_error: str | None = None  # why the compiled module cannot be used
try:
    _cpu = import_module("._cpu", __package__)
    if _wanted := os.environ.get("DRIFT_OPS_CPU_ISA"):
        _cpu.choose(_wanted)
except ImportError as error:
    load_error = f"drift_ops._cpu cannot be imported ({error}); reinstall with a C++17 compiler: pip install ."
except ValueError as error:
    load_error = f"DRIFT_OPS_CPU_ISA: {error}"


def _affinity(spec: AffinitySpec, q: Tensor, k: Tensor, first: int, unit: float = 1.0) -> Any:
    G, N, D = q.shape
    assert _cpu is not None
    return _cpu.Affinity(
        groups=G,
        N=N,
        M=k.shape[1],
        D=D,
        split=first if spec.sides == 2 else 0,
        sides=spec.sides,
        gaussian=spec.logit == "gaussian",
        has_self=spec.has_self,
        widths=[width * unit for width in spec.widths],
        temperature=spec.temperature,
        floor=spec.floor,
        least_distance=spec.least_distance,
        self_distance=spec.self_distance * unit,
        threads=torch.get_num_threads(),
    )


def affinity_sums(
    spec: AffinitySpec,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor] | None,
    w: Tensor | None,
    unit: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`drift_ops.ops.affinity_sums`; widths and the self distance are in units of ``unit``, a 0-d tensor."""
    q, k, v, centre = gathered(q, keys, values)
    (G, N, D), M, S = q.shape, k.shape[1], len(spec.widths)
    num, den = q.new_empty(S, G, spec.sides, N, D), q.new_empty(S, G, spec.sides, N)
    row_stats, col_stats = q.new_empty(S, G, 2, N), q.new_empty(S, G, 2, M)
    problem = _affinity(spec, q, k, M - keys[-1].shape[1], 1.0 if unit is None else float(unit))
    w = None if w is None else w.contiguous()
    of_dtype(problem, "forward", q.dtype)(*map(address, (q, k, v, w, num, den, row_stats, col_stats)))
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
    grad_num: Tensor,
    grad_den: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """See :func:`drift_ops.ops.affinity_sums`."""
    q, k, v, _ = gathered(q, keys, values, centre)
    w = None if w is None else w.contiguous()
    grads = [torch.zeros_like(t) for t in (q, k, v)]
    grad_w = q.new_zeros(0) if w is None else torch.zeros_like(w)
    problem = _affinity(spec, q, k, k.shape[1] - keys[-1].shape[1])
    arguments = (q, k, v, w, row_stats, col_stats, grad_num, grad_den, *grads, grad_w)
    of_dtype(problem, "backward", q.dtype)(*map(address, arguments))
    grad_q, grad_k, grad_v = grads
    return grad_q, *scattered(keys, values, grad_k, grad_v), grad_w


def _loss(points: Sequence[Tensor], weights: Sequence[Tensor]) -> Any:
    assert _cpu is not None
    return _cpu.Loss(
        groups=points[0].shape[0],
        D=points[0].shape[2],
        counts=[t.shape[1] for t in points],
        points=[address(t) for t in points],
        weights=[address(w) for w in weights],
        threads=torch.get_num_threads(),
    )


def _contiguous(of_map: LossMap) -> tuple[list[Tensor], list[Tensor]]:
    points, weights = of_map.in_groups()
    return [t.contiguous() for t in points], [w.contiguous() for w in weights]


def kept_shape(spec: LossSpec, of_map: LossMap) -> tuple[int, ...]:
    """Shape of the distances that phase 1 of form C keeps for phase 2: [G, N, M padded to 16], or [0] for none."""
    (N, D), M = of_map.gen.shape[2:], sum(of_map.counts)
    keeps = N * M <= GROUP_PAIRS and D >= KEEP_DISTANCES_FROM_D
    return (of_map.groups, N, -(-M // 16) * 16) if keeps else (0,)


def state_shape(spec: LossSpec, of_map: LossMap) -> tuple[int, ...]:
    """Shape of what phase 2 keeps for phase 3: the forces ``[R, G, N, D]`` before the division by λ."""
    return len(spec.R_list), of_map.groups, *of_map.gen.shape[2:]


def loss_scale(spec: LossSpec, maps: Sequence[LossMap]) -> list[tuple[Tensor, Tensor]]:
    """Phase 1: of each map ``[mean d·w, mean w]`` in float64, and the distances kept for phase 2."""
    results = []
    for of_map in maps:
        points, weights = _contiguous(of_map)
        G, N, M = of_map.groups, points[0].shape[1], sum(of_map.counts)
        means = torch.empty(2, dtype=torch.float64)
        kept = points[0].new_empty(kept_shape(spec, of_map))
        of_dtype(_loss(points, weights), "scale", points[0].dtype)(means.data_ptr(), address(kept))
        results.append((means.div_(torch.tensor([G * N * M, G * M])), kept))
    return results


def loss_moments(
    spec: LossSpec, maps: Sequence[LossMap], kept: Sequence[Tensor], scale: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Phase 2: of each map the forces ``[R, G, N, D]``, and the means of their products ``[G, R, R]``."""
    results = []
    for of_map, distances, s in zip(maps, kept, scale, strict=True):
        points, weights = _contiguous(of_map)
        if points[0].shape[1] * sum(of_map.counts) > GROUP_PAIRS:
            results.append(streamed_loss.loss_moments(affinity_sums, spec, of_map, s))
            continue
        R = len(spec.R_list)
        forces, moments = points[0].new_empty(state_shape(spec, of_map)), points[0].new_empty(of_map.groups, R, R)
        native = of_dtype(_loss(points, weights), "moments", points[0].dtype)
        native(float(s), list(spec.R_list), spec.floor, *map(address, (distances, forces, moments)))
        results.append((forces, moments))
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
    results = []
    for of_map, forces, s, f, of_loss in zip(maps, states, scale, factors, incoming, strict=True):
        _, G, N, D = forces.shape
        grad = forces.new_empty(G, N, D)
        by = of_loss * (-2 / (N * D * max(float(s) / D**0.5, spec.least_scale)))
        native = of_dtype(_cpu, "loss_gradient", forces.dtype)
        native(G, N * D, f.tolist(), torch.get_num_threads(), *map(address, (forces, by, grad)))
        results.append(torch.empty_like(of_map.gen).copy_(grad.view(of_map.gen.shape)))
    return results
