"""Small ragged problems of all forms, forward and backward: ``python -m benchmarks.small_calls BACKEND``.

For running under compute-sanitizer. Results are held against the float64 reference, so that it is known what ran.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch

import drift_ops

from .cases import GPU_BACKENDS

MOST_ERROR = 1e-3  # relative, of a gradient or an output
# (N, P, M, D, G): small groups, ragged ones, more features than fit a tile, one problem larger than a tile
SHAPES = [(16, 16, 0, 32, 3), (5, 7, 3, 2, 2), (17, 33, 9, 130, 2), (64, 64, 16, 256, 2), (150, 140, 70, 20, 1)]

FORMS: dict[str, Callable[..., Any]] = {
    "compute_V": lambda x, pos, neg, backend: drift_ops.compute_V(
        x, pos, neg, sigma=x.shape[-1] ** 0.5, backend=backend
    ),
    "drift_field": lambda x, pos, neg, backend: drift_ops.drift_field(
        x, pos, neg, temperature=[0.1 * x.shape[-1] ** 0.5, x.shape[-1] ** 0.5], backend=backend
    ),
    "drift_loss": lambda x, pos, neg, backend: drift_ops.drift_loss(x, pos, neg, backend=backend)[0],
}


def results(form: str, points: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
    """The output, and its gradients that there are."""
    leaves = [t.clone().requires_grad_() for t in points]
    output = FORMS[form](*leaves, backend)
    incoming = torch.linspace(-1, 1, output.numel()).view_as(output).to(output)
    gradients = torch.autograd.grad(output, leaves, incoming, allow_unused=True)
    return [output.detach(), *(g for g in gradients if g is not None)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=["cpu", *GPU_BACKENDS])
    backend = parser.parse_args().backend
    device = "cuda" if backend in GPU_BACKENDS else "cpu"
    torch.manual_seed(0)
    worst = 0.0
    for form in FORMS:
        for N, P, M, D, G in SHAPES:
            points = [torch.randn(G, n, D) for n in (N, P, M)]
            ours = results(form, [t.to(device) for t in points], backend)
            exact = results(form, [t.double() for t in points], "reference")
            errors = [(a.cpu() - b).norm() / b.norm().clamp(min=1e-6) for a, b in zip(ours, exact, strict=True)]
            print(f"{form} G={G} [{N}, {M}, {P}] D={D}: errors {', '.join(f'{error:.1e}' for error in errors)}")
            worst = max([worst, *(error.nan_to_num(nan=torch.inf).item() for error in errors)])
    sys.exit(f"an error of {worst:.1e}" if worst > MOST_ERROR else 0)


if __name__ == "__main__":
    main()
