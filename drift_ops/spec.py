"""What is asked of the kernels, written down once and passed whole to every backend.

The ops of :mod:`drift_ops.ops` take the fields of a spec one by one, in the order in which they stand here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor

LOGITS = ("laplace", "gaussian")  # the functions L of the distance that the kernels know

_SCHEMA_TYPES = {str: "str", float: "float", bool: "bool", int: "int", tuple[float, ...]: "float[]"}
_Spec = TypeVar("_Spec", bound="_Flat")


class _Flat:
    """A dataclass that ops take field by field."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @classmethod
    def schema(cls) -> str:
        """The arguments of an op that hold one."""
        return ", ".join(f"{_SCHEMA_TYPES[field.type]} {field.name}" for field in fields(cls))  # type: ignore[index]

    @classmethod
    def of(cls: type[_Spec], values: Any) -> _Spec:
        """The spec with these values of its fields, lists of numbers as tuples."""
        return cls(*(tuple(value) if isinstance(value, list) else value for value in values))

    def values(self) -> tuple[Any, ...]:
        return tuple([getattr(self, name) for name in self.__dataclass_fields__])


@dataclass(frozen=True)
class AffinitySpec(_Flat):
    """Weighted sums under the doubly normalised affinity of queries and keys.

    Raises:
        ValueError: ``logit`` is unknown.
    """

    logit: str  # "laplace": L = −d/width; "gaussian": L = exp(−d²/(2·width²))/temperature
    widths: tuple[float, ...]  # one result for each
    temperature: float = 1.0
    floor: float = 0.0  # of the squared affinity
    has_self: bool = False  # the first keys are the queries
    sides: int = 1  # 2: the last tensor of keys is a side of its own, whose sums are apart from the others'
    least_distance: float = 0.0
    self_distance: float = math.inf  # is added to the distance of a query to itself; infinity leaves the pair out

    def __post_init__(self) -> None:
        if self.logit not in LOGITS:
            raise ValueError(f"logit: got {self.logit!r}, expected one of {', '.join(map(repr, LOGITS))}")

    def shapes(self, q: Tensor, keys: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
        """Of the sums of queries ``[G, N, D]`` and keys: num, den, statistics by row and by column, centre."""
        (G, N, D), M, S = q.shape, sum(k.shape[1] for k in keys), len(self.widths)
        return (S, G, self.sides, N, D), (S, G, self.sides, N), (S, G, 2, N), (S, G, 2, M), (G, D)


@dataclass(frozen=True)
class LossSpec(_Flat):
    """Form C, with the constants of the release's training loss."""

    R_list: tuple[float, ...]
    floor: float  # of the squared affinity
    least_distance: float = 1e-4
    least_scale: float = 1e-3  # of what distances and points are divided by
    self_distance: float = 100.0  # in units of the scale, added to the distance of a sample to itself
    least_squared_lambda: float = 1e-8


class LossMap(NamedTuple):
    """One feature map: gen, neg, pos ``[L, T, count, D]`` of L·T groups, and their weights ``[L, T, count]``.

    Strides are any, but for the last dimension of points, which is contiguous. For the backends that have all phases in
    one call, groups may have one dimension, and weights of 1 may be None.
    """

    points: tuple[Tensor, Tensor, Tensor]
    weights: tuple[Any, Any, Any]

    @property
    def gen(self) -> Tensor:
        return self.points[0]

    @property
    def groups(self) -> int:
        return math.prod(self.gen.shape[:-2])

    @property
    def counts(self) -> tuple[int, int, int]:
        gen, neg, pos = self.points
        return gen.shape[-2], neg.shape[-2], pos.shape[-2]

    def shape_of_forces(self, spec: LossSpec) -> tuple[int, ...]:
        """``[R, G, N, D]``."""
        return len(spec.R_list), self.groups, *self.gen.shape[-2:]

    def in_groups(self) -> tuple[list[Tensor], list[Tensor]]:
        """Points ``[G, count, D]`` and weights ``[G, count]``, copied where their strides ask for it."""
        return [t.flatten(0, 1) for t in self.points], [w.flatten(0, 1) for w in self.weights]
