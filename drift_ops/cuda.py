"""The ``cuda`` backend: the CUDA C++ kernels of ``csrc/cuda`` on contiguous float32 or float64 CUDA tensors.

Everything here takes and returns plain tensors and is called by :mod:`drift_ops.ops` only. float32 products are made of
float16 ones: 22 bits where ``torch.get_float32_matmul_precision()`` is ``"highest"``, otherwise 11, as many as of TF32.
"""

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import streamed_loss
from .native import address, of_dtype

_cuda: ModuleType | None = None
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


def _launch_options(tensor: Tensor) -> dict[str, Any]:
    """Device, stream and precision of the kernels launched for ``tensor`` (on the CPU, by their emulation in tests)."""
    on_device = {"device": 0, "stream": 0}
    if tensor.is_cuda:
        on_device = {"device": tensor.device.index, "stream": torch.cuda.current_stream(tensor.device).cuda_stream}
    return {**on_device, "split_products": torch.get_float32_matmul_precision() == "highest"}


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
    unit: Tensor | None,
) -> Any:
    G, N, D = q.shape
    assert _cuda is not None
    return _cuda.Affinity(
        groups=G,
        N=N,
        M=k.shape[1],
        D=D,
        split=split,
        gaussian=kernel == "gaussian",
        has_self=has_self,
        widths=list(widths),
        temperature=temperature,
        floor=floor,
        least_distance=least_distance,
        self_distance=self_distance,
        unit=address(unit),
        **_launch_options(q),
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

    ``widths`` and ``self_distance`` are in units of ``unit``, a 0-d float64 tensor on the device (None: 1).
    """
    (G, N, D), M, S = q.shape, k.shape[1], len(widths)
    sides = 2 if split else 1
    num, den = q.new_empty(S, G, sides, N, D), q.new_empty(S, G, sides, N)
    row_stats, col_stats = q.new_empty(S, G, 2, N), q.new_empty(S, G, 2, M)
    problem = _affinity(q, k, kernel, widths, temperature, split, has_self, floor, least_distance, self_distance, unit)
    scratch = q.new_empty(of_dtype(problem, "forward_scratch", q.dtype)())
    of_dtype(problem, "forward", q.dtype)(*map(address, (q, k, v, w, num, den, row_stats, col_stats, scratch)))
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
    grads = [torch.empty_like(t) for t in (q, k, v)]
    grad_w = q.new_empty(0) if w is None else torch.empty_like(w)
    problem = _affinity(q, k, kernel, widths, temperature, split, has_self, floor, 0.0, float("inf"), None)
    scratch = q.new_empty(of_dtype(problem, "backward_scratch", q.dtype)())
    arguments = (q, k, v, w, row_stats, col_stats, grad_num, grad_den, *grads, grad_w, scratch)
    of_dtype(problem, "backward", q.dtype)(*map(address, arguments))
    return grads[0], grads[1], grads[2], grad_w


def _in_shared_memory(points: Sequence[Tensor], R: int) -> bool:
    """Whether the groups of a map go through the kernels that hold one in shared memory; larger ones are streamed."""
    assert _cuda is not None
    if points[0].dtype != torch.float32 or max(t.shape[1] for t in points) >= 1 << 16:
        return False
    return _cuda.group_fits([t.shape[1] for t in points], R, points[0].device.index or 0)


def _groups(
    points: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: Tensor,
    scale: Tensor | None,
    R_list: Sequence[float],
    floor: float,
) -> Any:
    assert _cuda is not None
    return _cuda.Loss(
        groups=points[0].shape[0],
        D=points[0].shape[2],
        counts=[t.shape[1] for t in points],
        points=[address(t) for t in points],
        weights=[address(w) for w in weights],
        scale=address(scale),
        kept=address(kept),
        R_list=list(R_list),
        floor=floor,
        **_launch_options(points[0]),
    )


def kept_shape(points: Sequence[Tensor]) -> tuple[int, ...]:
    """Shape of what phase 1 of form C keeps for phase 2: the distances ``[G, N, targets]`` if they take no more memory
    than gen, as the gradient does later; otherwise nothing."""
    G, N, D = points[0].shape
    targets = sum(t.shape[1] for t in points)
    return (G, N, targets) if targets <= D and _in_shared_memory(points, R=1) else (0,)


def loss_scale(points: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Phase 1 of one map: ``[mean d·w, mean w]`` in float64, and what :func:`kept_shape` says."""
    gen = points[0]
    means, kept = gen.new_empty(2, dtype=torch.float64), gen.new_empty(kept_shape(points))
    if _in_shared_memory(points, R=1):
        groups = _groups(points, weights, kept, None, (), 0.0)
        scratch = gen.new_empty(groups.scratch(), dtype=torch.float64)
        groups.scale(address(means), address(scratch))
        return means, kept
    q, targets, w = streamed_loss.centred(points, weights)
    least = streamed_loss.LEAST_DISTANCE
    problem = _affinity(q, targets, "laplace", (), 1.0, 0, True, 0.0, least, 0.0, None)
    scratch = gen.new_empty(of_dtype(problem, "scale_scratch", gen.dtype)(), dtype=torch.float64)
    of_dtype(problem, "scale", gen.dtype)(*map(address, (q, targets, w, means, scratch)))
    return means, kept


def state_shape(points: Sequence[Tensor], R: int) -> tuple[int, ...]:
    """Shape of what phase 2 keeps for phase 3, which makes the gradient: the distances if they are small beside it,
    otherwise nothing; the forces ``[R, G, N, D]`` where groups are streamed."""
    if not _in_shared_memory(points, R):
        return (R, *points[0].shape)
    return kept_shape(points) if 4 * sum(t.shape[1] for t in points) <= points[0].shape[2] else (0,)


def loss_moments(
    points: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: Tensor,
    scale: Tensor,
    R_list: Sequence[float],
    floor: float,
) -> tuple[Tensor, Tensor]:
    """Phase 2 of one map: the state of :func:`state_shape`, and the means of the forces' products ``[G, R, R]``."""
    gen, R = points[0], len(R_list)
    if not _in_shared_memory(points, R):
        return streamed_loss.loss_moments(affinity_sums, points, weights, scale, R_list, floor)
    state = kept.clone() if state_shape(points, R) == kept.shape else gen.new_empty(0)  # an op returns no input
    moments = gen.new_empty(gen.shape[0], R, R)
    groups = _groups(points, weights, kept, scale, R_list, floor)
    scratch = gen.new_empty(groups.scratch(), dtype=torch.float64)
    groups.moments(address(moments), address(scratch))
    return state, moments


def loss_gradient(
    points: Sequence[Tensor],
    weights: Sequence[Tensor],
    state: Tensor,
    scale: Tensor,
    factors: Tensor,
    incoming: Tensor,
    R_list: Sequence[float],
    floor: float,
) -> Tensor:
    """Phase 3 of one map: the gradient w.r.t. gen ``[G, N, D]``."""
    gen = points[0]
    if _in_shared_memory(points, len(R_list)):
        grad = torch.empty_like(gen)
        groups = _groups(points, weights, state, scale, R_list, floor)
        groups.gradient(*map(address, (factors.contiguous(), incoming, grad)))
        return grad
    return streamed_loss.loss_gradient(gen, state, scale, factors, incoming)
