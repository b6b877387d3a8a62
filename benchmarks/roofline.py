"""What the device can do at most, measured, and the least time that a case can take on it."""

import contextlib
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .cases import Case
from .measure import event_seconds, wall_seconds

Ceilings = dict[str, float]  # bytes/s of "copy"; flop/s of "ieee", "tf32" and "bf16" matrix products


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Of float32 matrix products, of torch's and of ours: ``"highest"`` or ``"high"``."""
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(usual)


def measure_ceilings(device: str, megabytes: int = 2048, size: int = 8192, runs: int = 10) -> Ceilings:
    """Copy bandwidth of a large buffer, bytes read plus bytes written, and the rate of ``size``³ matrix products of
    random numbers. Medians."""
    seconds_of = wall_seconds if device == "cpu" else event_seconds(device)

    def rate(amount: float, call: Callable[..., object], *operands: Tensor) -> float:
        call(*operands)
        call(*operands)
        return amount / statistics.median(seconds_of(lambda: call(*operands)) for _ in range(runs))

    source = torch.randint(0, 256, (megabytes * 2**20,), dtype=torch.uint8, device=device)
    ceilings = {"copy": rate(2 * source.numel(), torch.Tensor.copy_, torch.empty_like(source), source)}
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    for name, precision in (("ieee", "highest"), ("tf32", "high")):
        with matmul_precision(precision):
            ceilings[name] = rate(2 * size**3, torch.mm, a, b)
    return ceilings | {"bf16": rate(2 * size**3, torch.mm, a.bfloat16(), b.bfloat16())}


def matrix_rate(ceilings: Ceilings, precision: str) -> float:
    """The best known rate of float32 products: of IEEE arithmetic, or of TF32 or 16-bit ones.

    ``"high"`` allows TF32, whose ten bits float16 has too. ``"highest"`` is float32: three products of two parts each
    give about as many digits, be they TF32 or float16. (Products of float16 and of bfloat16 have one rate.)
    """
    return max(ceilings["ieee"], max(ceilings["tf32"], ceilings["bf16"]) / (3 if precision == "highest" else 1))


def floor_seconds(case: Case, ceilings: Ceilings, precision: str) -> float:
    """No algorithm is faster: it moves each input and output once, and computes the matrix products once."""
    return max(case.bytes / ceilings["copy"], case.flops / matrix_rate(ceilings, precision))
