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
    distances that it loses far away. It is the mean of the half of the points nearest to their mean, because a few far
    outliers must not draw it away from the rest. A constant for autograd, as no result depends on it.
    """
    together = torch.cat(points, 1).detach()
    radius = (together - together.mean(1, keepdim=True)).norm(dim=-1, keepdim=True)  # [G, count, 1]
    near = (radius <= radius.median(1, keepdim=True).values).to(radius.dtype)
    return (together * near).sum(1, keepdim=True) / near.sum(1, keepdim=True)
