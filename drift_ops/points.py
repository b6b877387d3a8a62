"""How the points of users become the points of kernels: dtype, leading dimensions, origin."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def to_compute_dtype(t: Tensor) -> Tensor:
    """16-bit dtypes to float32, in which they are computed."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast is off within, where it was on."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def saveable(t: Tensor) -> Tensor:
    """``t``; a copy of what was made in inference mode, which no graph takes."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not t.is_inference():
        return t
    return t.clone()


def as_problems(t: Tensor, trailing: int = 2) -> Tensor:
    """All leading dimensions as one: ``[..., count, D]`` to ``[G, count, D]`` (``trailing=1``: ``[..., count]``)."""
    leading = t.dim() - trailing
    return t.flatten(0, leading - 1) if leading else t.unsqueeze(0)


def find_centre(*points: Tensor) -> Tensor:
    """A point ``[G, 1, D]`` amid each problem's points ``[G, count, D]``, to be subtracted from all of them.

    Distances and softmaxes do not change when all points move together, and near the origin float32 resolves small
    distances that it loses far away. It is the mean of the points that are no farther than average from the mean of
    all, because a few far outliers must not draw it away from the rest. A constant for autograd, as no result depends
    on it. Written so as to need no copy of all points.
    """
    points = tuple(t.detach() for t in points)
    count = sum(t.shape[1] for t in points)
    mean = sum(t.sum(1, keepdim=True) for t in points) / count  # [G, 1, D]
    radii = [(t - mean).norm(dim=-1) for t in points]  # [G, count]
    average = sum(radius.sum(1, keepdim=True) for radius in radii) / count  # [G, 1]
    near = [(radius <= 1.001 * average).to(radius.dtype).unsqueeze(1) for radius in radii]  # [G, 1, count]
    total = sum(n @ t for n, t in zip(near, points, strict=True))
    return total / sum(n.sum(2, keepdim=True) for n in near)


def gathered(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor] | None, centre: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contiguous ``q [G, N, D]``, ``k, v [G, M, D]`` about points amid them, and that of the values, ``[G, D]``.

    For backends that stream: they want all keys in one array. ``centre`` is that of the values where it is known; keys
    that are the values share it.
    """
    if centre is None:
        centre = (find_centre(q, *keys) if values is None else find_centre(*values)).squeeze(1)
    origin = centre.unsqueeze(1)
    v = torch.cat(list(keys if values is None else values), 1).sub_(origin)
    if values is None:
        return (q - origin).contiguous(), v, v, centre
    origin = find_centre(q, *keys)
    return (q - origin).contiguous(), torch.cat(list(keys), 1).sub_(origin), v, centre


def scattered(
    keys: Sequence[Tensor], values: Sequence[Tensor] | None, grad_k: Tensor, grad_v: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of what was :func:`gathered`: of every tensor of keys, and of values where these are not the keys."""
    counts = [key.shape[1] for key in keys]
    if values is None or grad_v is None:
        total = grad_k if grad_v is None else grad_k.add_(grad_v)
        return [grad.clone() for grad in total.split(counts, 1)], []
    of_keys, of_values = grad_k.split(counts, 1), grad_v.split(counts, 1)
    return [grad.clone() for grad in of_keys], [grad.clone() for grad in of_values]
