"""Forms A and B in KeOps, which never holds an N×M matrix either: a contender where ``pykeops`` is installed.

In log space, as one would write them: both softmaxes' log-sum-exp, then the weighted sums. Forward, of one problem
``[1, N, D]``.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def compute_V(x: Tensor, x_data: Tensor, x_gen: Tensor, sigma: float = 1.0, temperature: float = 1.0) -> Tensor:
    """Form A with both normalisations, forward."""

    def weighted_mean(y: Tensor) -> Tensor:
        root_D = x.shape[-1] ** 0.5
        squares = _squared_distances(F.normalize(x[0], dim=-1) * root_D, F.normalize(y[0], dim=-1) * root_D)
        logits = (-squares / (2 * sigma**2)).exp() / temperature
        A = (logits - _half_sum(logits.logsumexp(1), logits.logsumexp(0))).exp()
        sums = A.sum(1)  # [N, 1]
        return (A @ y[0]) / sums.sum() / (sums / sums.sum() + 1e-8)

    V = weighted_mean(x_data) - weighted_mean(x_gen)
    return (V / (V.norm(dim=-1, keepdim=True).mean(-2, keepdim=True) + 1e-8)).unsqueeze(0)


def drift_field(x: Tensor, pos: Tensor, temperature: float) -> Tensor:
    """Form B, x being its own negatives, forward."""
    from pykeops.torch import LazyTensor

    index = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device)
    is_self = 0.5 - (LazyTensor(index[:, None, None]) - LazyTensor(index[None, :, None])).abs()  # > 0 on self pairs
    to_pos = -_squared_distances(x[0], pos[0]).sqrt() / temperature
    to_x = -_squared_distances(x[0], x[0]).sqrt() / temperature - 1e10 * is_self.step()
    rows = torch.logaddexp(to_pos.logsumexp(1), to_x.logsumexp(1))  # [N, 1]
    A_pos = (to_pos - _half_sum(rows, to_pos.logsumexp(0))).exp()
    A_neg = (to_x - _half_sum(rows, to_x.logsumexp(0))).exp()
    return (A_neg.sum(1) * (A_pos @ pos[0]) - A_pos.sum(1) * (A_neg @ x[0])).unsqueeze(0)


def _squared_distances(x: Tensor, y: Tensor):  # type: ignore[no-untyped-def]
    from pykeops.torch import LazyTensor

    return ((LazyTensor(x[:, None]) - LazyTensor(y[None])) ** 2).sum(-1)  # [N, M] of KeOps


def _half_sum(rows: Tensor, columns: Tensor):  # type: ignore[no-untyped-def]
    from pykeops.torch import LazyTensor

    return LazyTensor((rows / 2)[:, None]) + LazyTensor((columns / 2)[None])  # [N, M] of KeOps
