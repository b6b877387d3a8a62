"""How the operator's tests make inputs, run a form on a backend and judge the error of what comes out."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from drift_ops.backends import implementation
from drift_ops.spec import LossMap, LossSpec

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# Relative RMS error that is always good enough: some roundings of the dtype. Beyond it, the dense form in the same
# dtype says what can be had: an error up to DENSE_FACTOR times its own passes.
FLOOR = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
DENSE_FACTOR = 4.0
SMALLEST = {torch.float64: 1e-60, torch.float32: 1e-30, torch.bfloat16: 1e-30, torch.float16: 6e-8}

Tensors = dict[str, Tensor]


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the Triton kernels run in Python, on CPU tensors
EVERY_KERNEL = os.environ.get("DRIFT_EVERY_KERNEL") == "1"  # make test-kernels: what takes too long for every change


def device_of(backend: str | None) -> str:
    return "cuda" if backend == "cuda" or (backend == "triton" and not INTERPRETED) else "cpu"


def skip_unless_served(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels compute in float32")


def load_library(path: Path) -> ModuleType:
    """The compiled module in a file ``NAME.so``."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def points(*shape: int, shift: float = 0.0, seed: int = 0) -> Tensor:
    """Standard normal points, float64, the same for the same shape and seed."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + shift


def weights(*shape: int, seed: int = 0) -> Tensor:
    """Uniform weights in [0, 2), about one in four exactly zero."""
    w = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2
    return torch.where(w < 0.5, 0.0, w)


def loss_phases(
    backend: str,
    points: list[list[Tensor]],
    weights: list[list[Tensor]],
    incoming: list[Tensor],
    R_list: tuple[float, ...],
    floor: float,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The three phases of form C: scales ``[maps]``, and of each map the moments ``[G, R, R]`` and the gradient.

    ``points`` and ``weights`` are those of gen, neg, pos of each map, ``incoming`` the gradient of its loss ``[G]``.
    """
    spec, module = LossSpec(R_list, floor), implementation(backend)
    of_maps = zip(points, weights, strict=True)
    maps = [LossMap(*(tuple(t.unsqueeze(1) for t in tensors) for tensors in of_map)) for of_map in of_maps]
    means, kept = zip(*module.loss_scale(spec, maps), strict=True)
    scale = torch.cat([of_map[:, 0] / of_map[:, 1] for of_map in means])
    states, moments, _ = zip(*module.loss_moments(spec, maps, kept, scale, None), strict=True)
    factors = torch.stack([m.double().mean(0).diagonal() for m in moments]).clamp(min=1e-8).rsqrt()
    incoming = [of_map.to(m) for of_map, m in zip(incoming, moments, strict=True)]
    grads = module.loss_gradient(spec, maps, states, scale, factors, incoming)
    return scale, list(moments), [grad.squeeze(1) for grad in grads]


def field_inputs(N: int, P: int, M: int, D: int, groups: tuple[int, ...] = (), weighted: bool = False) -> Tensors:
    """Tensors of ``drift_field``; ``M = 0`` gives an empty ``neg``."""
    tensors = {
        "x": points(*groups, N, D, seed=1),
        "pos": points(*groups, P, D, shift=0.5, seed=2),
        "neg": points(*groups, M, D, shift=-0.5, seed=3),
    }
    if weighted:
        tensors |= {"weight_pos": weights(*groups, P, seed=4), "weight_neg": weights(*groups, M, seed=5)}
    return tensors


def compute_V_inputs(N: int, P: int, M: int, D: int, groups: tuple[int, ...] = ()) -> Tensors:
    tensors = field_inputs(N, P, M, D, groups)
    return {"x": tensors["x"], "x_data": tensors["pos"], "x_gen": tensors["neg"]}


def loss_inputs(N: int, P: int, M: int, D: int, G: int, weighted: bool = False) -> Tensors:
    """Tensors of ``drift_loss``; ``M = 0`` gives an empty ``fixed_neg``."""
    tensors = field_inputs(N, P, M, D, (G,), weighted)
    renamed = {"gen": tensors["x"], "fixed_pos": tensors["pos"], "fixed_neg": tensors["neg"]}
    if weighted:
        renamed |= {"weight_gen": weights(G, N, seed=6) + 0.1}
        renamed |= {name: tensors[name] for name in ("weight_pos", "weight_neg")}
    return renamed


def run(function: Callable[..., Any], tensors: Tensors, options: dict[str, Any], backend: str | None) -> Tensors:
    """Outputs and gradients by name. The incoming gradient is random, and bfloat16-valued, so exact in every dtype."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    before = {name: t.detach().clone() for name, t in leaves.items()}
    result = function(**leaves, **options, backend=backend)
    output, info = result if isinstance(result, tuple) else (result, {})
    incoming = points(*output.shape, seed=7).bfloat16().to(output)
    gradients = torch.autograd.grad(output, list(leaves.values()), incoming, allow_unused=True)
    for name, leaf in leaves.items():
        assert torch.equal(leaf.nan_to_num(), before[name].nan_to_num()), f"{name} was modified"
    outputs = {"output": output.detach(), **info}
    return outputs | {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True) if g is not None}


def check(
    function: Callable[..., Any],
    tensors: Tensors,
    options: dict[str, Any],
    dtype: torch.dtype,
    backend: str,
    layout: Callable[[Tensor], Tensor] = lambda t: t,
    rtol: float = 0.0,
    atol: float = 0.0,
    dense_factor: float = DENSE_FACTOR,
) -> Tensors:
    """Assert that ``backend`` in ``dtype``, on inputs in ``layout``, is about as near the float64 truth as the
    dense form in the same dtype (float32 for the 16-bit ones, rounded at the end). ``rtol`` and ``atol`` allow a larger
    relative or absolute RMS error where the problem itself is ill-conditioned, and ``dense_factor=0`` leaves the dense
    form's error out of it. Returns what was computed.
    """
    skip_unless_served(backend, dtype)
    device = device_of(backend)
    rounded = {name: t.to(dtype) for name, t in tensors.items()}
    dense_dtype = dtype if dtype in (torch.float64, torch.float32) else torch.float32
    truth = run(function, {n: t.double() for n, t in rounded.items()}, options, "reference")
    dense = run(function, {n: t.to(dense_dtype) for n, t in rounded.items()}, options, "reference")
    ours = run(function, {n: layout(t.to(device)) for n, t in rounded.items()}, options, backend)
    assert ours.keys() == truth.keys()
    largest_gradient = max((rms(t) for name, t in truth.items() if name.startswith("gradient")), default=0.0)
    for name, value in ours.items():
        exact = truth[name]
        assert value.shape == exact.shape, f"{name}: {value.shape} instead of {exact.shape}"
        assert value.isfinite().all(), f"{name} is not finite"
        error = rms(value.cpu().double() - exact)
        dense_error = rms(dense[name].to(value.dtype).double() - exact)
        allowed = max(dense_factor * dense_error, max(FLOOR[dtype], rtol) * rms(exact), SMALLEST[dtype], atol)
        if name.startswith("gradient"):  # one that is zero but for roundings of terms as large as its siblings
            allowed = max(allowed, torch.finfo(dtype).eps * largest_gradient)
        if name == "log_mass":  # a difference of logarithms
            allowed = max(allowed, torch.finfo(value.dtype).eps * truth["log_row_sums"].abs().max().item())
        assert error <= allowed, (
            f"{name}: RMS error {error:.3g} of RMS {rms(exact):.3g}; dense {dense_error:.3g}, allowed {allowed:.3g}"
        )
    return ours


def rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item() if t.numel() else 0.0


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """``‖ours − truth‖ / ‖truth‖`` in float64."""
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


# Memory layouts: the same values, stored otherwise. What lies between them is NaN.


def transposed(t: Tensor) -> Tensor:
    """Last two axes stored in the other order."""
    return t.mT.contiguous().mT if t.dim() > 1 else t


def every_other(t: Tensor) -> Tensor:
    """Every other element of a longer last axis."""
    D = t.shape[-1]
    return t.new_full((*t.shape[:-1], 2 * D + 3), float("nan"))[..., 2 : 2 + 2 * D : 2].copy_(t)


def padded(t: Tensor) -> Tensor:
    """Unit stride along rows that lie in longer rows."""
    D = t.shape[-1]
    return t.new_full((*t.shape[:-1], D + 4), float("nan"))[..., 1 : 1 + D].copy_(t)


def unaligned(t: Tensor) -> Tensor:
    """Contiguous, but three elements into a larger buffer."""
    buffer = t.new_full((t.numel() + 8,), float("nan"))
    return buffer[3 : 3 + t.numel()].view(t.shape).copy_(t)
