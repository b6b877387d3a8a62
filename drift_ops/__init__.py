"""Fused operators for the drifting field of "Generative Modeling via Drifting" (arXiv 2602.04770)."""
# Stand-in while the backends are being written: same signatures, dense.

import torch

from . import reference


def _group(t):
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def compute_V(x, x_data, x_gen, sigma=1.0, temperature=1.0, normalize_features=True, normalize_drift=True, *, backend=None):
    return reference.compute_V(x, x_data, x_gen, (sigma,), temperature, normalize_features, normalize_drift)


def compute_V_multiscale(x, x_data, x_gen, sigmas=(0.1, 0.5, 1.0, 2.0), temperature=1.0, normalize_features=True, normalize_drift=True, *, backend=None):
    return reference.compute_V(x, x_data, x_gen, sigmas, temperature, normalize_features, normalize_drift)


def drift_field(x, pos, neg=None, *, temperature, weight_pos=None, weight_neg=None, include_self=True, affinity_floor=0.0, backend=None):
    many = not isinstance(temperature, (int, float))
    neg = x.new_zeros(*x.shape[:-2], 0, x.shape[-1]) if neg is None else neg
    V = reference.drift_field(x, pos, neg, temperature if many else (temperature,), weight_pos, weight_neg, include_self, affinity_floor)
    return V if many else V[0]


def drift_loss(gen, fixed_pos, fixed_neg=None, weight_gen=None, weight_pos=None, weight_neg=None, R_list=(0.02, 0.05, 0.2), *, affinity_floor=1e-6, process_group=None, backend=None):
    if isinstance(gen, (list, tuple)):
        n = len(gen)
        per_map = lambda v: v if isinstance(v, (list, tuple)) else [v] * n
        out = [drift_loss(g, p, q, a, b, c, R_list, affinity_floor=affinity_floor) for g, p, q, a, b, c in zip(gen, fixed_pos, per_map(fixed_neg), per_map(weight_gen), per_map(weight_pos), per_map(weight_neg))]
        return [o[0] for o in out], [o[1] for o in out]
    ones = lambda t, w: t.new_ones(t.shape[:2]) if w is None else w
    neg = gen[:, :0].detach() if fixed_neg is None else fixed_neg
    args = [t.detach().float() for t in (gen, neg, fixed_pos, ones(gen, weight_gen), ones(neg, weight_neg), ones(fixed_pos, weight_pos))]
    with torch.no_grad():
        sums = reference.drift_loss_sums(*args)
        G, N, D = gen.shape
        M = N + neg.shape[1] + fixed_pos.shape[1]
        scale = sums[0] / (G * N * M) / (sums[1] / (G * M))
        forces = reference.drift_loss_forces(*args, scale, R_list, affinity_floor)
        lam = forces.square().mean((1, 2, 3))
        F = (forces / lam.clamp(min=1e-8).sqrt().view(-1, 1, 1, 1)).sum(0)
        s = (scale / D**0.5).clamp(min=1e-3)
    x = gen.float() / s
    loss = (x - (x + F).detach()).square().mean((1, 2))
    return loss, {"scale": scale, **{f"loss_{R}": l for R, l in zip(R_list, lam)}}


def backends():
    return {"reference": {"usable": True, "reason": None}}
