"""The three forms as one would write them in PyTorch: what the operator is timed against.

Plain and idiomatic: ``torch.cdist`` with its default settings, both softmaxes, matrix products; form C as in the
release, with ``bmm`` distances and ``einsum``. Every one materialises its ``[..., N, M]`` matrices.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def compute_V(x: Tensor, x_data: Tensor, x_gen: Tensor, sigma: float = 1.0, temperature: float = 1.0) -> Tensor:
    """Form A with both normalisations, forward."""

    def weighted_mean(y: Tensor) -> Tensor:
        root_D = x.shape[-1] ** 0.5
        d = torch.cdist(F.normalize(x, dim=-1) * root_D, F.normalize(y, dim=-1) * root_D)
        logits = torch.exp(-d.square() / (2 * sigma**2)) / temperature
        A = torch.sqrt(logits.softmax(-1) * logits.softmax(-2))
        A = A / A.sum((-2, -1), keepdim=True)
        return (A / (A.sum(-1, keepdim=True) + 1e-8)) @ y

    V = weighted_mean(x_data) - weighted_mean(x_gen)
    return V / (V.norm(dim=-1, keepdim=True).mean(-2, keepdim=True) + 1e-8)


def drift_field(x: Tensor, pos: Tensor, temperature: float) -> Tensor:
    """Form B, x being its own negatives, forward."""
    N = x.shape[-2]
    targets = torch.cat([x, pos], -2)
    logits = -torch.cdist(x, targets) / temperature
    logits.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
    A = torch.sqrt(logits.softmax(-1) * logits.softmax(-2))
    A_neg, A_pos = A[..., :N], A[..., N:]
    return A_neg.sum(-1, keepdim=True) * (A_pos @ pos) - A_pos.sum(-1, keepdim=True) * (A_neg @ x)


def drift_loss(
    gen: Tensor, fixed_pos: Tensor, fixed_neg: Tensor, R_list: Sequence[float] = (0.02, 0.05, 0.2), floor: float = 1e-6
) -> Tensor:
    """Form C without weights: losses ``[G]``, to be differentiated by autograd."""
    G, N, D = gen.shape
    with torch.no_grad():
        targets = torch.cat([gen, fixed_neg, fixed_pos], 1)  # [G, M, D]
        squares = targets.square().sum(-1)
        products = torch.bmm(gen, targets.mT)
        d = (squares[:, :N, None] + squares[:, None] - 2 * products).clamp(min=1e-8).sqrt()
        scale = d.mean()
        unit = (scale / D**0.5).clamp(min=1e-3)
        logits = d / scale.clamp(min=1e-3) + 100 * torch.eye(N, targets.shape[1], device=gen.device)
        force = torch.zeros_like(gen)
        for R in R_list:
            A = (-logits / R).softmax(-1) * (-logits / R).softmax(-2)
            A = A.clamp(min=floor).sqrt()
            A_neg, A_pos = A.split([N + fixed_neg.shape[1], fixed_pos.shape[1]], -1)
            c = torch.cat([-A_neg * A_pos.sum(-1, keepdim=True), A_pos * A_neg.sum(-1, keepdim=True)], -1)
            force_R = torch.einsum("gnm,gmd->gnd", c, targets / unit)
            force = force + force_R / force_R.square().mean().clamp(min=1e-8).sqrt()
        goal = gen / unit + force
    return (gen / unit - goal).square().mean((1, 2))


def coupled(logits: Tensor, coupling: str, iterations: int = 20) -> Tensor:
    """A of the family, from logits ``[..., N, M]``."""
    if coupling == "row":
        return logits.softmax(-1)
    if coupling == "two_sided":
        return torch.sqrt(logits.softmax(-1) * logits.softmax(-2))
    N, M = logits.shape[-2:]
    v = logits.new_zeros(*logits.shape[:-2], 1, M)
    for _ in range(iterations):
        u = -(logits + v).logsumexp(-1, keepdim=True)
        v = math.log(N / M) - (logits + u).logsumexp(-2, keepdim=True)
    return (logits + u + v).exp()


def coupled_coefficients(logits: Tensor, negatives: int, coupling: str, sides: str) -> Tensor:
    """What the targets, negatives first, are multiplied by."""
    counts = [negatives, logits.shape[-1] - negatives]
    if sides == "split":
        A_neg, A_pos = (coupled(part, coupling) for part in logits.split(counts, -1))
        return torch.cat([-A_neg / A_neg.sum(-1, keepdim=True), A_pos / A_pos.sum(-1, keepdim=True)], -1)
    A_neg, A_pos = coupled(logits, coupling).split(counts, -1)
    return torch.cat([-A_neg * A_pos.sum(-1, keepdim=True), A_pos * A_neg.sum(-1, keepdim=True)], -1)


def coupled_field(x: Tensor, pos: Tensor, temperature: float, coupling: str, sides: str) -> Tensor:
    """The family's field, x being its own negatives, forward."""
    targets = torch.cat([x, pos], -2)
    logits = -torch.cdist(x, targets) / temperature
    logits.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
    return coupled_coefficients(logits, x.shape[-2], coupling, sides) @ targets


def coupled_loss(
    gen: Tensor, fixed_pos: Tensor, fixed_neg: Tensor, R_list: Sequence[float], coupling: str, sides: str
) -> Tensor:
    """The family's loss without weights: losses ``[G]``, to be differentiated by autograd."""
    G, N, D = gen.shape
    with torch.no_grad():
        targets = torch.cat([gen, fixed_neg, fixed_pos], 1)  # [G, M, D]
        squares = targets.square().sum(-1)
        products = torch.bmm(gen, targets.mT)
        d = (squares[:, :N, None] + squares[:, None] - 2 * products).clamp(min=1e-8).sqrt()
        scale = d.mean()
        unit = (scale / D**0.5).clamp(min=1e-3)
        delta = (d / scale.clamp(min=1e-3)).masked_fill(
            torch.eye(N, targets.shape[1], dtype=torch.bool, device=gen.device), math.inf
        )
        force = torch.zeros_like(gen)
        for R in R_list:
            force_R = coupled_coefficients(-delta / R, N + fixed_neg.shape[1], coupling, sides) @ (targets / unit)
            force = force + force_R / force_R.square().mean().clamp(min=1e-8).sqrt()
        goal = gen / unit + force
    return (gen / unit - goal).square().mean((1, 2))
