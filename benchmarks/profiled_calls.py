"""One call each of the main cases on one backend, for a profiler: ``python -m benchmarks.profiled_calls BACKEND``.

The profiler is told to start after a first call of each, which compiles.
"""

import argparse

import torch

from .cases import GPU_BACKENDS, Case

CASES = [
    Case("drift_loss", G=4096, N=64, M=16, P=64, D=256),
    Case("drift_loss", G=1024, N=64, M=16, P=64, D=1024),
    Case("drift_field", N=16384, P=16384, D=256),
    Case("compute_V", N=16384, P=16384, D=64),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=GPU_BACKENDS)
    backend = parser.parse_args().backend
    calls = [case.call(backend, case.inputs("cuda")) for case in CASES]
    for call in calls:
        call()
    torch.cuda.synchronize()
    for case, call in zip(CASES, calls, strict=True):
        print(case.name, flush=True)
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
