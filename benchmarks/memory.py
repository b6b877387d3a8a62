"""Memory of one large problem, forward and backward: ``python -m benchmarks.memory FORM [--points N] [--device cuda]``.

Prints a line of JSON: seconds, and by how many MB memory peaks over what it is after a small problem: resident memory
on a CPU (Linux only), that of torch's allocator on a GPU. A dense ``[N, M]`` matrix of float32 would take
``dense_matrix_mb``.
"""

import argparse
import json
import time

import torch

import drift_ops

from .measure import peak_extra_memory, synchronised

FORMS = {"compute_V": "N = P = M", "drift_field": "N = P = M", "sinkhorn": "N = P", "drift_loss": "N = P"}


def run(form: str, points: int, dim: int, iterations: int, device: str) -> None:
    x, pos, neg = (torch.randn(points, dim, device=device, requires_grad=True) for _ in range(3))
    if form == "compute_V":
        V = drift_ops.compute_V(x, pos, neg)
    elif form == "drift_field":
        V = drift_ops.drift_field(x, pos, neg, temperature=0.1 * dim**0.5)
    elif form == "sinkhorn":
        field = drift_ops.Field(coupling="sinkhorn", weights="kernel", iterations=iterations)
        V = drift_ops.drift_field(x, pos, temperature=0.1 * dim**0.5, field=field)
    else:
        V, _ = drift_ops.drift_loss(x.unsqueeze(0), pos.unsqueeze(0))
    V.square().sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("--points", type=int, default=32768, help="N = P = M, or N = P (default 32768)")
    parser.add_argument("--dim", type=int, default=16, help="D (default 16)")
    parser.add_argument("--iterations", type=int, default=20, help="of sinkhorn (default 20)")
    parser.add_argument("--device", default="cpu", help="default cpu")
    args = parser.parse_args()
    run(args.form, 64, args.dim, args.iterations, args.device)
    start = time.perf_counter()
    large = synchronised(lambda: run(args.form, args.points, args.dim, args.iterations, args.device), args.device)
    growth = peak_extra_memory(large, args.device)
    result = {
        "form": args.form,
        "counts": FORMS[args.form],
        "points": args.points,
        "dim": args.dim,
        "seconds": round(time.perf_counter() - start, 2),
        "growth_mb": None if growth is None else round(growth / 2**20, 1),
        "dense_matrix_mb": args.points**2 * 4 / 2**20,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
