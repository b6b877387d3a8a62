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
from .points import gathered, scattered
from .spec import AffinitySpec, LossMap, LossSpec

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


def _affinity(spec: AffinitySpec, q: Tensor, k: Tensor, first: int, unit: Tensor | None) -> Any:
    G, N, D = q.shape
    assert _cuda is not None
    return _cuda.Affinity(
        groups=G,
        N=N,
        M=k.shape[1],
        D=D,
        split=first if spec.sides == 2 else 0,
        gaussian=spec.logit == "gaussian",
        has_self=spec.has_self,
        widths=list(spec.widths),
        temperature=spec.temperature,
        floor=spec.floor,
        least_distance=spec.least_distance,
        self_distance=spec.self_distance,
        unit=address(unit),
        **_launch_options(q),
    )


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
    (G, N, D), M, S = q.shape, k.shape[1], len(spec.widths)
    num, den = q.new_empty(S, G, spec.sides, N, D), q.new_empty(S, G, spec.sides, N)
    row_stats, col_stats = q.new_empty(S, G, 2, N), q.new_empty(S, G, 2, M)
    problem = _affinity(spec, q, k, M - keys[-1].shape[1], unit)
    scratch = q.new_empty(of_dtype(problem, "forward_scratch", q.dtype)())
    w = None if w is None else w.contiguous()
    of_dtype(problem, "forward", q.dtype)(*map(address, (q, k, v, w, num, den, row_stats, col_stats, scratch)))
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
    grads = [torch.empty_like(t) for t in (q, k, v)]
    grad_w = q.new_empty(0) if w is None else torch.empty_like(w)
    problem = _affinity(spec, q, k, k.shape[1] - keys[-1].shape[1], None)
    scratch = q.new_empty(of_dtype(problem, "backward_scratch", q.dtype)())
    arguments = (q, k, v, w, row_stats, col_stats, grad_num, grad_den, *grads, grad_w, scratch)
    of_dtype(problem, "backward", q.dtype)(*map(address, arguments))
    grad_q, grad_k, grad_v = grads
    return grad_q, *scattered(keys, values, grad_k, grad_v), grad_w


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


def kept_shape(spec: LossSpec, of_map: LossMap) -> tuple[int, ...]:
    """Shape of what phase 1 of form C keeps for phase 2: the distances ``[G, N, targets]`` if they take no more memory
    than gen, as the gradient does later; otherwise nothing."""
    (N, D), targets = of_map.gen.shape[2:], sum(of_map.counts)
    keeps = targets <= D and _in_shared_memory(of_map.in_groups()[0], R=1)
    return (of_map.groups, N, targets) if keeps else (0,)


def loss_scale(spec: LossSpec, maps: Sequence[LossMap]) -> list[tuple[Tensor, Tensor]]:
    """Phase 1: of each map ``[mean d·w, mean w]`` in float64, and what :func:`kept_shape` says."""
    return [_loss_scale(spec, of_map) for of_map in maps]


def _contiguous(of_map: LossMap) -> tuple[list[Tensor], list[Tensor]]:
    points, weights = of_map.in_groups()
    return [t.contiguous() for t in points], [w.contiguous() for w in weights]


def _loss_scale(spec: LossSpec, of_map: LossMap) -> tuple[Tensor, Tensor]:
    points, weights = _contiguous(of_map)
    gen = points[0]
    means, kept = gen.new_empty(2, dtype=torch.float64), gen.new_empty(kept_shape(spec, of_map))
    if _in_shared_memory(points, R=1):
        groups = _groups(points, weights, kept, None, (), 0.0)
        scratch = gen.new_empty(groups.scratch(), dtype=torch.float64)
        groups.scale(address(means), address(scratch))
        return means, kept
    q, targets, w = streamed_loss.centred(of_map)
    affinity = AffinitySpec("laplace", (), has_self=True, least_distance=spec.least_distance, self_distance=0.0)
    problem = _affinity(affinity, q, targets, 0, None)
    scratch = gen.new_empty(of_dtype(problem, "scale_scratch", gen.dtype)(), dtype=torch.float64)
    of_dtype(problem, "scale", gen.dtype)(*map(address, (q, targets, w, means, scratch)))
    return means, kept


def state_shape(spec: LossSpec, of_map: LossMap) -> tuple[int, ...]:
    """Shape of what phase 2 keeps for phase 3, which makes the gradient: the distances if they are small beside it,
    otherwise nothing; the forces ``[R, G, N, D]`` where groups are streamed."""
    R = len(spec.R_list)
    if not _in_shared_memory(of_map.in_groups()[0], R):
        return R, of_map.groups, *of_map.gen.shape[2:]
    return kept_shape(spec, of_map) if 4 * sum(of_map.counts) <= of_map.gen.shape[3] else (0,)


def loss_moments(
    spec: LossSpec, maps: Sequence[LossMap], kept: Sequence[Tensor], scale: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Phase 2: of each map the state of :func:`state_shape`, and the means of the forces' products ``[G, R, R]``."""
    return [_loss_moments(spec, *of_map) for of_map in zip(maps, kept, scale, strict=True)]


def _loss_moments(spec: LossSpec, of_map: LossMap, kept: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    points, weights = _contiguous(of_map)
    gen, R = points[0], len(spec.R_list)
    if not _in_shared_memory(points, R):
        return streamed_loss.loss_moments(affinity_sums, spec, of_map, scale)
    state = kept.clone() if state_shape(spec, of_map) == kept.shape else gen.new_empty(0)  # an op returns no input
    moments = gen.new_empty(gen.shape[0], R, R)
    groups = _groups(points, weights, kept, scale, spec.R_list, spec.floor)
    scratch = gen.new_empty(groups.scratch(), dtype=torch.float64)
    groups.moments(address(moments), address(scratch))
    return state, moments


def loss_gradient(
    spec: LossSpec,
    maps: Sequence[LossMap],
    states: Sequence[Tensor],
    scale: Tensor,
    factors: Tensor,
    incoming: Sequence[Tensor],
) -> list[Tensor]:
    """Phase 3: of each map the gradient w.r.t. gen, with its strides."""
    of_maps = zip(maps, states, scale, factors, incoming, strict=True)
    return [_loss_gradient(spec, *of_map) for of_map in of_maps]


def _loss_gradient(
    spec: LossSpec, of_map: LossMap, state: Tensor, scale: Tensor, factors: Tensor, incoming: Tensor
) -> Tensor:
    points, weights = _contiguous(of_map)
    if not _in_shared_memory(points, len(spec.R_list)):
        return streamed_loss.loss_gradient(spec, of_map.gen, state, scale, factors, incoming)
    grad = torch.empty_like(points[0])
    groups = _groups(points, weights, state, scale, spec.R_list, spec.floor)
    groups.gradient(*map(address, (factors.contiguous(), incoming.contiguous(), grad)))
    return torch.empty_like(of_map.gen).copy_(grad.view(of_map.gen.shape))
