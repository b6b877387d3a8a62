"""The dense reference, and every other backend, against the formulas written out as loops over single numbers."""

import numpy as np
import pytest
import torch
from cases import compute_V_inputs, device_of, field_inputs, loss_inputs, relative_error

import drift_ops


@pytest.fixture
def backend(float64_backend):
    return float64_backend


def loop_affinity(logits: np.ndarray, masked: np.ndarray, floor: float) -> np.ndarray:
    """sqrt(max(softmax over the row · softmax over the column, floor)), 0 where masked."""
    A = np.zeros_like(logits)
    for i, j in zip(*np.nonzero(~masked), strict=True):
        row = sum(np.exp(logits[i, k] - logits[i, j]) for k in range(logits.shape[1]) if not masked[i, k])
        column = sum(np.exp(logits[k, j] - logits[i, j]) for k in range(logits.shape[0]) if not masked[k, j])
        A[i, j] = np.sqrt(max(1 / row / column, floor))
    return A


def loop_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.array([[np.sqrt(((a - b) ** 2).sum()) for b in y] for a in x]).reshape(len(x), len(y))


def loop_compute_V(x, x_data, x_gen, sigmas, temperature, normalize_features, normalize_drift):
    def unit(y):
        return np.array([row / max(np.linalg.norm(row), 1e-12) * np.sqrt(len(row)) for row in y])

    def weighted_mean(y, sigma):
        d = loop_distances(unit(x), unit(y)) if normalize_features else loop_distances(x, y)
        K = np.exp(-(d**2) / (2 * sigma**2))
        A = loop_affinity(K / temperature, np.zeros(K.shape, bool), 0.0)
        A = A / A.sum()
        return np.array([sum(a * row for a, row in zip(A_i, y, strict=True)) / (A_i.sum() + 1e-8) for A_i in A])

    V = sum(weighted_mean(x_data, s) - weighted_mean(x_gen, s) for s in sigmas) / len(sigmas)
    if normalize_drift:
        V = V / (np.mean([np.linalg.norm(row) + 1e-8 for row in V]) + 1e-8)
    return V


def loop_drift_field(x, pos, neg, temperature, weight_pos, weight_neg, include_self, floor):
    N = len(x)
    negatives = np.concatenate([x, neg]) if include_self else neg
    targets = np.concatenate([negatives, pos])
    w = np.concatenate([np.ones(len(negatives) - len(neg)), weight_neg, weight_pos])
    masked = np.zeros((N, len(targets)), bool)
    if include_self:
        masked[range(N), range(N)] = True
    A = loop_affinity(-loop_distances(x, targets) / temperature, masked, floor) * w
    n_neg = len(negatives)
    V = np.zeros_like(x)
    for i in range(N):
        sum_neg, sum_pos = A[i, :n_neg].sum(), A[i, n_neg:].sum()
        for j in range(len(targets)):
            V[i] += (sum_neg if j >= n_neg else -sum_pos) * A[i, j] * targets[j]
    return V


def loop_drift_loss(gen, pos, neg, w_gen, w_pos, w_neg, R_list, floor):
    """Loss per group, gradient of the sum of losses, scale, λ² per R."""
    G, N, D = gen.shape
    targets, w = np.concatenate([gen, neg, pos], 1), np.concatenate([w_gen, w_neg, w_pos], 1)
    M, n_neg = targets.shape[1], N + neg.shape[1]
    d = np.array([np.maximum(loop_distances(gen[g], targets[g]), 1e-4) for g in range(G)])
    scale = np.mean([d[g, i, j] * w[g, j] for g in range(G) for i in range(N) for j in range(M)]) / w.mean()
    s = max(scale / np.sqrt(D), 1e-3)
    total, lambdas = np.zeros_like(gen), []
    for R in R_list:
        F = np.zeros_like(gen)
        for g in range(G):
            delta = d[g] / max(scale, 1e-3) + 100 * np.eye(N, M)
            A = loop_affinity(-delta / R, np.zeros((N, M), bool), floor) * w[g]
            for i in range(N):
                sum_neg, sum_pos = A[i, :n_neg].sum(), A[i, n_neg:].sum()
                for j in range(M):
                    F[g, i] += (sum_neg if j >= n_neg else -sum_pos) * A[i, j] * targets[g, j] / s
        lambdas.append((F**2).mean())
        total += F / np.sqrt(max(lambdas[-1], 1e-8))
    return (total**2).mean((1, 2)), -2 * total / (N * D * s), scale, lambdas


def numpy_of(tensors):
    return {name: t.numpy() for name, t in tensors.items()}


def on_device(tensors, backend):
    return {name: t.to(device_of(backend)) for name, t in tensors.items()}


@pytest.fixture(autouse=True)
def overflow_is_fine():
    with np.errstate(over="ignore"):  # exp of a far pair's difference: 1 / inf is the 0 wanted
        yield


@pytest.mark.parametrize("normalize_features", [True, False])
@pytest.mark.parametrize("normalize_drift", [True, False])
@pytest.mark.parametrize(("sigmas", "temperature"), [((1.0,), 1.0), ((0.7,), 0.3), ((0.1, 0.5, 1.0, 2.0), 0.5)])
def test_compute_V(backend, sigmas, temperature, normalize_features, normalize_drift):
    inputs = compute_V_inputs(4, 5, 3, 2)
    options = {
        "temperature": temperature, "normalize_features": normalize_features, "normalize_drift": normalize_drift,
    }  # fmt: skip
    expected = loop_compute_V(**numpy_of(inputs), sigmas=sigmas, **options)
    inputs = on_device(inputs, backend)
    V = drift_ops.compute_V_multiscale(**inputs, sigmas=sigmas, **options, backend=backend)
    assert relative_error(V.cpu(), torch.from_numpy(expected)) < 1e-12
    if len(sigmas) == 1:
        V = drift_ops.compute_V(**inputs, sigma=sigmas[0], **options, backend=backend)
        assert relative_error(V.cpu(), torch.from_numpy(expected)) < 1e-12


@pytest.mark.parametrize("affinity_floor", [0.0, 0.05])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("M", "include_self"), [(3, True), (3, False), (0, True)])
def test_drift_field(backend, M, include_self, weighted, affinity_floor):
    inputs = field_inputs(4, 5, M, 3, weighted=weighted)
    temperatures = [0.3, 1.0, 5.0]
    ones = {"weight_pos": np.ones(5), "weight_neg": np.ones(M)}
    expected = np.stack([
        loop_drift_field(
            **(ones | numpy_of(inputs)), temperature=T, include_self=include_self, floor=affinity_floor
        ) for T in temperatures
    ])  # fmt: skip
    inputs = on_device(inputs, backend)
    options = {"include_self": include_self, "affinity_floor": affinity_floor, "backend": backend}
    V = drift_ops.drift_field(**inputs, temperature=temperatures, **options)
    assert relative_error(V.cpu(), torch.from_numpy(expected)) < 1e-12
    V = drift_ops.drift_field(**inputs, temperature=temperatures[1], **options)
    assert relative_error(V.cpu(), torch.from_numpy(expected[1])) < 1e-12


@pytest.mark.parametrize("groups", [(), (2,), (2, 3)])
def test_leading_dimensions_are_independent_problems(backend, groups):
    inputs = on_device(field_inputs(4, 5, 3, 3, groups, weighted=True), backend)
    V = drift_ops.drift_field(**inputs, temperature=(0.5, 1.0), backend=backend)
    assert V.shape == (2, *groups, 4, 3)
    flat = {name: t.reshape(-1, *t.shape[len(groups) :]) for name, t in inputs.items()}
    for g in range(flat["x"].shape[0]):
        alone = drift_ops.drift_field(**{n: t[g] for n, t in flat.items()}, temperature=(0.5, 1.0), backend=backend)
        torch.testing.assert_close(V.reshape(2, -1, 4, 3)[:, g], alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("affinity_floor", [1e-6, 0.0, 0.02])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("M", [0, 2])
def test_drift_loss(backend, M, weighted, affinity_floor):
    G, N, P, D, R_list = 2, 4, 5, 3, (0.05, 0.2, 1.0)
    inputs = loss_inputs(N, P, M, D, G, weighted)
    ones = {"weight_gen": np.ones((G, N)), "weight_pos": np.ones((G, P)), "weight_neg": np.ones((G, M))}
    loop = ones | numpy_of(inputs)
    loss, gradient, scale, lambdas = loop_drift_loss(
        loop["gen"], loop["fixed_pos"], loop["fixed_neg"], loop["weight_gen"], loop["weight_pos"], loop["weight_neg"],
        R_list, affinity_floor,
    )  # fmt: skip
    inputs = on_device(inputs, backend)
    gen = inputs.pop("gen").requires_grad_()
    ours, info = drift_ops.drift_loss(gen, **inputs, R_list=R_list, affinity_floor=affinity_floor, backend=backend)
    per_group = torch.tensor([1.0, -3.0], dtype=torch.float64, device=gen.device)  # any incoming gradient
    (ours * per_group).sum().backward()
    assert relative_error(ours.detach().cpu(), torch.from_numpy(loss)) < 1e-12
    assert relative_error(gen.grad.cpu(), torch.from_numpy(gradient) * per_group.cpu().view(2, 1, 1)) < 1e-12
    assert relative_error(info["scale"].cpu(), torch.tensor(scale)) < 1e-12
    for R, expected in zip(R_list, lambdas, strict=True):
        assert relative_error(info[f"loss_{R}"].cpu(), torch.tensor(expected)) < 1e-12
