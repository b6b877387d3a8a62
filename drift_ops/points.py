"""How the points of users become the points of kernels: dtype, leading dimensions, origin."""

import torch
from torch import Tensor


def to_compute_dtype(t: Tensor) -> Tensor:
    """16-bit dtypes to float32, in which they are computed."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


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
