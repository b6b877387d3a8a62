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


def _affinity(
    q: Tensor,
    k: Tensor,
    kernel: str,
    widths: Sequence[float],
    temperature: float,
    split: int,
    has_self: bool,
    floor: float,
    least_distance: float,
    self_distance: float,
) -> Any:
    G, N, D = q.shape
    assert _cpu is not None
    return _cpu.Affinity(
        groups=G,
        N=N,
        M=k.shape[1],
        D=D,
        split=split,
        sides=2 if split else 1,
        gaussian=kernel == "gaussian",
        has_self=has_self,
        widths=list(widths),
        temperature=temperature,
        floor=floor,
        least_distance=least_distance,
        self_distance=self_distance,
        threads=torch.get_num_threads(),
    )


def affinity_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    kernel: str,
    widths: Sequence[float],
    temperature: float,
    split: int,
    has_self: bool,
    floor: float,
    least_distance: float = 0.0,
    self_distance: float = float("inf"),
    unit: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`drift_ops.ops.affinity_sums`; ``self_distance`` is added to the self pairs, infinity masks them.

    ``widths`` and ``self_distance`` are in units of ``unit``, a 0-d tensor (None: 1).
    """
    (G, N, D), M, S = q.shape, k.shape[1], len(widths)
    if unit is not None:
        widths, self_distance = [width * float(unit) for width in widths], self_distance * float(unit)
    sides = 2 if split else 1
    num, den = q.new_empty(S, G, sides, N, D), q.new_empty(S, G, sides, N)
    row_stats, col_stats = q.new_empty(S, G, 2, N), q.new_empty(S, G, 2, M)
    problem = _affinity(q, k, kernel, widths, temperature, split, has_self, floor, least_distance, self_distance)
    of_dtype(problem, "forward", q.dtype)(*map(address, (q, k, v, w, num, den, row_stats, col_stats)))
    return num, den, row_stats, col_stats


def affinity_sums_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    row_stats: Tensor,
    col_stats: Tensor,
    grad_num: Tensor,
    grad_den: Tensor,
    kernel: str,
    widths: Sequence[float],
    temperature: float,
    split: int,
    has_self: bool,
    floor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`drift_ops.ops.affinity_sums_backward`."""
    grads = [torch.zeros_like(t) for t in (q, k, v)]
    grad_w = q.new_zeros(0) if w is None else torch.zeros_like(w)
    problem = _affinity(q, k, kernel, widths, temperature, split, has_self, floor, 0.0, float("inf"))
    arguments = (q, k, v, w, row_stats, col_stats, grad_num, grad_den, *grads, grad_w)
    of_dtype(problem, "backward", q.dtype)(*map(address, arguments))
    return grads[0], grads[1], grads[2], grad_w


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


def kept_shape(points: Sequence[Tensor]) -> tuple[int, ...]:
    """Shape of the distances that phase 1 of form C keeps for phase 2: [G, N, M padded to 16], or [0] for none."""
    (G, N, D), M = points[0].shape, sum(t.shape[1] for t in points)
    return (G, N, -(-M // 16) * 16) if N * M <= GROUP_PAIRS and D >= KEEP_DISTANCES_FROM_D else (0,)


def loss_scale(points: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Phase 1 of one map: ``[mean d·w, mean w]`` in float64, and the distances kept for phase 2."""
    (G, N, _), M = points[0].shape, sum(t.shape[1] for t in points)
    means = torch.empty(2, dtype=torch.float64)
    kept = points[0].new_empty(kept_shape(points))
    of_dtype(_loss(points, weights), "scale", points[0].dtype)(means.data_ptr(), address(kept))
    return means.div_(torch.tensor([G * N * M, G * M])), kept


def state_shape(points: Sequence[Tensor], R: int) -> tuple[int, ...]:
    """Shape of what phase 2 keeps for phase 3: the forces ``[R, G, N, D]`` before the division by λ."""
    return (R, *points[0].shape)


def loss_moments(
    points: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: Tensor,
    scale: Tensor,
    R_list: Sequence[float],
    floor: float,
) -> tuple[Tensor, Tensor]:
    """Phase 2 of one map: the forces ``[R, G, N, D]``, and the means of their products ``[G, R, R]``."""
    gen, R = points[0], len(R_list)
    (G, N, D), M = gen.shape, sum(t.shape[1] for t in points)
    if N * M > GROUP_PAIRS:
        return streamed_loss.loss_moments(affinity_sums, points, weights, scale, R_list, floor)
    forces, moments = gen.new_empty(R, G, N, D), gen.new_empty(G, R, R)
    native = of_dtype(_loss(points, weights), "moments", gen.dtype)
    native(float(scale), list(R_list), floor, *map(address, (kept, forces, moments)))
    return forces, moments


def loss_gradient(
    points: Sequence[Tensor],
    weights: Sequence[Tensor],
    forces: Tensor,
    scale: Tensor,
    factors: Tensor,
    incoming: Tensor,
    R_list: Sequence[float],
    floor: float,
) -> Tensor:
    """Phase 3 of one map: the gradient w.r.t. gen ``[G, N, D]``, from the forces and the global statistics."""
    _, G, N, D = forces.shape
    grad = forces.new_empty(G, N, D)
    by = incoming * (-2 / (N * D * max(float(scale) / D**0.5, 1e-3)))
    native = of_dtype(_cpu, "loss_gradient", forces.dtype)
    native(G, N * D, factors.tolist(), torch.get_num_threads(), *map(address, (forces, by, grad)))
    return grad
