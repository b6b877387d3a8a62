"""The shapes that are timed, and for each the contenders: dense eager, ``torch.compile`` of it, and ours."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import drift_ops

from . import dense

R_LIST = (0.02, 0.05, 0.2)


@dataclass(frozen=True)
class Case:
    """A form at a shape: N queries, which are their own negatives, M further negatives, P positives, G problems."""

    form: str
    N: int
    P: int
    D: int
    M: int = 0
    G: int = 1
    eager_ratio: float | None = None  # how many times faster than dense eager ours is meant to be, at least
    compile_ratio: float | None = None
    matmul_ratio: float | None = None  # how much longer than its matrix products alone ours may take, at most

    @property
    def name(self) -> str:
        return f"{self.form} G={self.G} [{self.N}, {self.M}, {self.P}] D={self.D}"

    @property
    def bytes(self) -> int:
        """Each input read once and the output written once, float32."""
        points = self.N + self.P + self.M
        return 4 * self.G * self.D * (points + self.N)

    @property
    def flops(self) -> int:
        """Of the matrix products: the distances, and one weighted sum for each R."""
        targets = self.N + self.M + self.P
        return 2 * self.G * self.N * targets * self.D * (1 + (len(R_LIST) if self.form == "drift_loss" else 1))

    def contenders(self) -> dict[str, Callable[[], object]]:
        """``eager``, ``compile`` and ``ours``: functions of no arguments on the same inputs."""
        x, pos, neg = (torch.randn(self.G, n, self.D) for n in (self.N, self.P, self.M))
        T = 0.1 * self.D**0.5

        def forward(function: Callable[..., Tensor], *arguments: object) -> Callable[[], object]:
            return torch.no_grad()(lambda: function(*arguments))

        def training(loss_of: Callable[[Tensor], Tensor]) -> Callable[[], object]:
            gen = x.clone().requires_grad_()
            return lambda: torch.autograd.grad(loss_of(gen).sum(), gen)

        if self.form == "compute_V":
            compiled = torch.compile(dense.compute_V, dynamic=False)
            return {
                "eager": forward(dense.compute_V, x, pos, x, 1.0, 1.0),
                "compile": forward(compiled, x, pos, x, 1.0, 1.0),
                "ours": forward(drift_ops.compute_V, x, pos, x, 1.0, 1.0),
            }
        if self.form == "drift_field":
            compiled = torch.compile(dense.drift_field, dynamic=False)
            return {
                "eager": forward(dense.drift_field, x, pos, T),
                "compile": forward(compiled, x, pos, T),
                "ours": forward(lambda: drift_ops.drift_field(x, pos, temperature=T)),
            }
        compiled = torch.compile(dense.drift_loss, dynamic=False)
        return {
            "eager": training(lambda gen: dense.drift_loss(gen, pos, neg, R_LIST)),
            "compile": training(lambda gen: compiled(gen, pos, neg, R_LIST)),
            "ours": training(lambda gen: drift_ops.drift_loss(gen, pos, neg, R_list=R_LIST)[0]),
        }


CASES = [
    Case("drift_loss", G=64, N=64, M=32, P=64, D=640, eager_ratio=3.0, compile_ratio=1.5, matmul_ratio=1.25),
    Case("drift_loss", G=1024, N=64, M=32, P=64, D=64, eager_ratio=5.0, compile_ratio=1.5),
    Case("drift_loss", G=256, N=64, M=32, P=64, D=256, eager_ratio=2.5, compile_ratio=1.5),
    Case("drift_loss", G=8, N=16, P=16, D=32),
    Case("drift_field", N=4096, P=4096, D=32, eager_ratio=6.0),
    Case("drift_field", N=1024, P=1024, D=2),
    Case("compute_V", N=4096, P=4096, D=32, eager_ratio=5.0),
    Case("compute_V", N=1024, P=1024, D=2),
]


def matrix_products(case: Case) -> Callable[[], object]:
    """The batched matrix products alone that the direct form C needs: distances, and one weighted sum for each R."""
    targets = case.N + case.M + case.P
    x, t = torch.randn(case.G, case.N, case.D), torch.randn(case.G, targets, case.D)
    c = torch.randn(len(R_LIST), case.G, case.N, targets)
    return lambda: [torch.bmm(x, t.mT), *(torch.bmm(c_R, t) for c_R in c)]
