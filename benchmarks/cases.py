"""The shapes that are timed, and the contenders: dense PyTorch, eager and compiled, KeOps, and ours."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import drift_ops
from drift_ops import Field

from . import dense, keops
from .measure import Call

R_LIST = (0.02, 0.05, 0.2)
DENSE = {"eager": None, "compile": "default", "max-autotune": "max-autotune"}  # contender to mode of torch.compile
GPU_BACKENDS = ("triton", "cuda")

Points = tuple[Tensor, Tensor, Tensor]  # x, pos, neg [G, count, D] of one map


def our_contenders(device: str) -> list[str]:
    """Ours by name: ``ours``, the default backend, on a CPU; each usable backend on a GPU."""
    if device == "cpu":
        return ["ours"]
    return [name for name in GPU_BACKENDS if drift_ops.backends()[name].usable]


def implementation(form: str, contender: str, dynamic: bool, field: Field | None = None) -> Callable[..., Any]:
    if contender in DENSE:
        function, mode = getattr(dense, form), DENSE[contender]
        if field is not None:
            of_family = {"drift_loss": dense.coupled_loss, "drift_field": dense.coupled_field}[form]
            function = functools.partial(of_family, coupling=field.coupling, sides=field.sides)
        return function if mode is None else torch.compile(function, mode=mode, dynamic=dynamic)
    if contender == "keops":
        return getattr(keops, form)
    ours = functools.partial(getattr(drift_ops, form), backend=None if contender == "ours" else contender)
    return ours if field is None else functools.partial(ours, field=field)


@dataclass(frozen=True)
class Case:
    """A form at a shape: N queries, which are their own negatives, M further negatives, P positives, G problems.

    ``drift_loss`` is forward and backward to the gradient of the queries. The others are forward, or with ``backward``
    to the gradients of queries and positives too.
    """

    form: str
    N: int
    P: int
    D: int
    M: int = 0
    G: int = 1
    backward: bool = False
    eager_ratio: float | None = None  # how many times faster than dense eager ours is meant to be, at least
    compile_ratio: float | None = None
    matmul_ratio: float | None = None  # how much longer than its matrix products alone ours may take, at most
    busy_ratio: float | None = None  # as eager_ratio, where another process keeps a core busy
    field: Field | None = None  # of the family; None is the form itself

    @property
    def name(self) -> str:
        backward = " with backward" if self.backward else ""
        field = f" {self.field.coupling} {self.field.sides}" if self.field else ""
        return f"{self.form}{backward}{field} G={self.G} [{self.N}, {self.M}, {self.P}] D={self.D}"

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """``(problems, D)`` of every feature map."""
        return [(self.G, self.D)]

    @property
    def input_bytes(self) -> int:
        return sum(4 * G * D * (self.N + self.M + self.P) for G, D in self.shapes)

    @property
    def output_bytes(self) -> int:
        """Of the field; with backward, of the gradients too, and of the loss the gradient alone."""
        points = self.N + (self.N + self.P if self.backward else 0)
        return sum(4 * G * D * points for G, D in self.shapes)

    @property
    def bytes(self) -> int:
        """Each input read once and each output written once, float32."""
        return self.input_bytes + self.output_bytes

    @property
    def flops(self) -> int:
        """Of the matrix products: distances once, and one weighted sum for each R; in the backward distances again, the
        values' part of the affinities' gradient, and three sums: of the values, queries and keys."""
        targets = self.N + self.M + self.P
        products = 1 + (len(R_LIST) if self.form == "drift_loss" else 1) + (5 if self.backward else 0)
        return sum(2 * G * self.N * targets * D * products for G, D in self.shapes)

    @property
    def dense_bytes(self) -> int:
        """About what the dense form has in memory at its peak: some [N, targets] matrices, and copies of the points."""
        targets = self.N + self.M + self.P
        matrices = 13 if self.form == "drift_loss" else 10 if self.backward else 5  # as seen on a CPU
        of_maps = [4 * G * (matrices * self.N * targets + D * (2 * targets + 5 * self.N)) for G, D in self.shapes]
        kept = [4 * G * 2 * self.N * D for G, D in self.shapes]  # until the backward of all maps
        return max(of_maps) + sum(kept)

    def inputs(self, device: str) -> list[Points]:
        """Standard normal points of every map."""
        counts = (self.N, self.P, self.M)
        return [tuple(torch.randn(G, n, D, device=device) for n in counts) for G, D in self.shapes]  # type: ignore[misc]

    def part(self, maps: list[Points], G: int) -> list[Points]:
        """The first ``G`` of the problems (of every map, G/self.G of its problems), without a copy."""
        return [tuple(t[: t.shape[0] * G // self.G] for t in points) for points in maps]  # type: ignore[misc]

    def call(self, contender: str, maps: list[Points]) -> Call:
        """A function of no arguments that runs the contender on these inputs and returns its outputs."""
        function = implementation(self.form, contender, dynamic=len(maps) > 1, field=self.field)
        if self.form == "drift_loss":
            return self._loss_call(function, contender in DENSE, maps)
        ((x, pos, _),) = maps
        options: dict[str, Any] = {"sigma": 1.0, "temperature": 1.0}
        if self.form == "drift_field":
            options = {"temperature": 0.1 * self.D**0.5}

        def field(x: Tensor, pos: Tensor) -> Tensor:
            return function(x, pos, x, **options) if self.form == "compute_V" else function(x, pos, **options)

        if not self.backward:
            return torch.no_grad()(lambda: (field(x, pos),))
        leaves = [t.detach().requires_grad_() for t in (x, pos)]
        return lambda: torch.autograd.grad(field(*leaves), leaves, x)

    @staticmethod
    def _loss_call(function: Callable[..., Any], is_dense: bool, maps: list[Points]) -> Call:
        gens = [x.detach().requires_grad_() for x, _, _ in maps]
        pos, neg = [pos for _, pos, _ in maps], [neg for _, _, neg in maps]
        incoming = [x.new_ones(x.shape[0]) for x, _, _ in maps]

        def losses() -> list[Tensor]:
            if is_dense:
                return [function(*points, R_list=R_LIST) for points in zip(gens, pos, neg, strict=True)]
            return function(gens, pos, neg, R_list=R_LIST)[0]

        return lambda: torch.autograd.grad(losses(), gens, incoming)

    def contenders(self, device: str) -> dict[str, Call]:
        """``eager``, ``compile`` and ours, on the same inputs."""
        maps = self.inputs(device)
        return {name: self.call(name, maps) for name in ("eager", "compile", *our_contenders(device))}


@dataclass(frozen=True)
class Step(Case):
    """The loss of one training step: all feature maps in one call, G labels. ``maps`` are (locations, D) of one label;
    every location of every label is a problem."""

    maps: tuple[tuple[int, int], ...] = ()

    @property
    def name(self) -> str:
        return f"step of {len(self.maps)} maps, {self.G} labels [{self.N}, {self.M}, {self.P}]"

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(self.G * locations, D) for locations, D in self.maps]


CASES = [
    Case("drift_loss", G=64, N=64, M=32, P=64, D=640, eager_ratio=3.5, compile_ratio=1.5, matmul_ratio=1.25),
    Case("drift_loss", G=1024, N=64, M=32, P=64, D=64, eager_ratio=5.0, compile_ratio=1.5),
    Case("drift_loss", G=256, N=64, M=32, P=64, D=256, eager_ratio=2.5, compile_ratio=1.5),
    Case("drift_loss", G=8, N=16, P=16, D=32, eager_ratio=4.0, compile_ratio=2.0),
    Case("drift_loss", G=1, N=64, P=64, D=2, eager_ratio=4.0, compile_ratio=2.0),
    Case("drift_loss", G=1024, N=64, P=1, D=32, eager_ratio=18.0, compile_ratio=15.0),
    Case("drift_field", N=4096, P=4096, D=32, eager_ratio=6.0, busy_ratio=6.0),
    Case("drift_field", N=1024, P=1024, D=2),
    Case("compute_V", N=4096, P=4096, D=32, eager_ratio=5.0, busy_ratio=6.0),
    Case("compute_V", N=1024, P=1024, D=2),
]
SIDES = ("joint", "split")
COUPLINGS = [
    Field(coupling=coupling, sides=sides, weights="kernel")
    for coupling in ("row", "two_sided", "sinkhorn")
    for sides in SIDES
]
CASES += [
    Case("drift_loss", G=1024, N=64, M=16, P=64, D=D, field=field, eager_ratio=ratio)
    for D in (64, 256)
    for field in COUPLINGS
    for ratio in [15.0 if (field.coupling, field.sides, D) == ("sinkhorn", "split", 64) else None]
]
CASES += [Case("drift_field", N=8192, P=8192, D=32, field=COUPLINGS[4], eager_ratio=3.0)]


def matrix_products(case: Case) -> Call:
    """The batched matrix products alone that the direct form C needs: distances, and one weighted sum for each R."""
    targets = case.N + case.M + case.P
    x, t = torch.randn(case.G, case.N, case.D), torch.randn(case.G, targets, case.D)
    c = torch.randn(len(R_LIST), case.G, case.N, targets)
    return lambda: [torch.bmm(x, t.mT), *(torch.bmm(c_R, t) for c_R in c)]
