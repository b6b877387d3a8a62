"""Memory of one large problem, forward and backward: ``python -m benchmarks.memory FORM [--points N] [--dim D]``.

Prints a line of JSON: seconds, and by how many MB peak resident memory grew over that of a small problem run before
it. A dense ``[N, M]`` matrix of float32 would take ``dense_matrix_mb``.
"""

import argparse
import json
import resource
import sys
import time

import torch

import drift_ops


def run(form: str, points: int, dim: int) -> None:
    x, pos, neg = (torch.randn(points, dim, requires_grad=True) for _ in range(3))
    if form == "compute_V":
        V = drift_ops.compute_V(x, pos, neg)
    else:
        V = drift_ops.drift_field(x, pos, neg, temperature=0.1 * dim**0.5)
    V.square().sum().backward()


def peak_mb() -> float:
    """Highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=["compute_V", "drift_field"])
    parser.add_argument("--points", type=int, default=32768, help="N = P = M (default 32768)")
    parser.add_argument("--dim", type=int, default=16, help="D (default 16)")
    args = parser.parse_args()
    run(args.form, 64, args.dim)
    before, start = peak_mb(), time.perf_counter()
    run(args.form, args.points, args.dim)
    result = {
        "form": args.form, "points": args.points, "dim": args.dim,
        "seconds": round(time.perf_counter() - start, 2),
        "growth_mb": round(peak_mb() - before, 1),
        "dense_matrix_mb": args.points**2 * 4 / 2**20,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
