"""What is asked of the kernels, written down once and passed whole to every backend.

The ops of :mod:`drift_ops.ops` take the fields of a spec one by one, in the order in which they stand here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor

from .arguments import check_amount, check_choice, check_count, check_flag, check_floor, known_here

LOGITS = ("laplace", "gaussian")  # the functions L of the distance that the kernels of forms A and B know
COSTS = ("l2", "l2_sq")  # what the family makes of a distance: itself, or its square

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
class Field:
    """A member of the family of drifting fields, for :func:`drift_field` and :func:`drift_loss`.

    Over the targets ``t = [x (if include_self), neg, pos]`` and with logits ``L = −C/T`` of their costs C, samples move
    along ``V = Σ_j c_ij t_j``, where the rows of c sum to 0: positive for data, negative for all other targets.

    Args:
        cost: C, ``"l2"`` (the distance) or ``"l2_sq"`` (its square).
        coupling: the matrix A of the logits. ``"row"`` is the softmax over targets; ``"two_sided"`` the geometric mean
            of the softmaxes over targets and over samples; ``"sinkhorn"`` the plan with rows that sum to 1 and columns
            that share N evenly, after so many ``iterations``, of which each scales the rows, then the columns.
        sides: ``"joint"`` couples all targets at once, and ``V = (Σ⁻A)(A⁺y⁺) − (Σ⁺A)(A⁻y⁻)`` with row sums ``Σ±A``;
            ``"split"`` couples positives and negatives each on their own, and ``V = P⁺y⁺ − P⁻y⁻`` with rows of A
            divided by their sums. A sample that has nothing on one side does not move.
        iterations: of Sinkhorn, at least 1.
        weights: what weights of targets do. ``"affinity"`` multiplies A; ``"kernel"`` adds log w to L, and a target of
            weight 0 is left out; ``"marginal"`` (Sinkhorn only) makes the sums of columns proportional to w.
        include_self: count the samples themselves among the negatives.
        mask_self: True leaves out the pair of a sample with itself, False counts it as any other; a number is added to
            its cost (in :func:`drift_loss` to its cost in units of the scale).
        affinity_floor: in [0, 1), of A², whatever the coupling.

    Raises:
        TypeError, ValueError: a value is not what is described here, or does not go with another.

    ``Field(mask_self=100.0, affinity_floor=1e-6)`` is the release's training loss, ``Field()`` the paper's Algorithm 2.
    """

    cost: str = "l2"
    coupling: str = "two_sided"
    sides: str = "joint"
    iterations: int = 20
    weights: str = "affinity"
    include_self: bool = True
    mask_self: bool | float = True
    affinity_floor: float = 0.0

    def __post_init__(self) -> None:
        check_choice("cost", self.cost, COSTS)
        check_choice("coupling", self.coupling, ("row", "two_sided", "sinkhorn"))
        check_choice("sides", self.sides, ("joint", "split"))
        check_choice("weights", self.weights, ("affinity", "kernel", "marginal"))
        check_count("iterations", self.iterations)
        check_flag("include_self", self.include_self)
        check_amount("mask_self", self.mask_self)
        check_floor(self.affinity_floor)
        if self.coupling == "sinkhorn" and self.weights == "affinity":
            raise ValueError(
                "weights: got 'affinity' with coupling='sinkhorn', whose sums they would undo; "
                "expected 'kernel' or 'marginal'"
            )
        if self.coupling != "sinkhorn" and self.weights == "marginal":
            raise ValueError(
                f"weights: got 'marginal' with coupling={self.coupling!r}, which has no marginals to set; "
                "expected 'kernel' or 'affinity', or coupling='sinkhorn'"
            )

    @property
    def self_cost(self) -> float:
        """What is added to the cost of the pair of a sample with itself; infinity leaves it out."""
        return (math.inf if self.mask_self else 0.0) if isinstance(self.mask_self, bool) else float(self.mask_self)


def check_field(field: object, **beside: tuple[Any, Any]) -> Field:
    """``field`` as a Field, and no argument ``beside`` it, (got, default), that says what a field says."""
    if not isinstance(field, Field):
        raise TypeError(f"field: got {type(field).__name__}, expected a drift_ops.Field or None")
    for name, (got, default) in beside.items():
        if got != default:
            raise ValueError(f"{name}: got {got} beside a field, which has its own; say Field({name}={got}, …)")
    return field


def check_suits(field: Field, neg_name: str, neg: Tensor, weights: dict[str, Tensor | None]) -> None:
    """There are negatives for ``field``, and weights that its couplings can take, as far as can be seen for free."""
    if neg.shape[-2] == 0 and not field.include_self:
        raise ValueError(
            f"{neg_name}: got no negatives with include_self=False, expected at least one; "
            "pass some or include_self=True"
        )
    if field.weights == "affinity":
        return
    for name, w in weights.items():
        if w is None or not known_here(w):
            continue
        if field.weights == "marginal" and not bool((w > 0).all()):
            raise ValueError(
                f"{name}: got a weight that is not above 0 with weights='marginal', where a column would get nothing; "
                "leave the target out, or take weights='kernel'"
            )
        if not bool((w >= 0).all()):
            raise ValueError(f"{name}: got a negative weight with weights='kernel', which takes its logarithm")


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
class PairSpec(_Flat):
    """Sums over pairs of queries and keys under ``exp(L_ij − α_i − β_j)``, with ``L = −(C/unit + self_cost)/width``.

    The family of fields is composed of them. Units, of each problem, and widths are tensors.
    """

    cost: str  # "l2": C = d; "l2_sq": C = d²
    has_self: bool = False  # the first keys are the queries
    self_cost: float = 0.0  # of a query to itself; infinity leaves the pair out
    sides: int = 1  # 2: the last tensor of keys is a side of its own, whose sums are apart from the others'
    floor: float = 0.0  # of the square of what values are weighted with; pairs that are left out have 0
    least_distance: float = 0.0


class PairProblem(NamedTuple):
    """Queries, and keys of which all together are M a problem, with logits of their pairs for S widths at once."""

    spec: PairSpec
    q: Tensor  # [G, N, D]
    keys: Sequence[Tensor]  # [G, count, D] each
    width: Tensor  # [S]
    unit: Tensor | None  # [G], a constant; None is 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """S, G, N, M."""
        return len(self.width), *self.q.shape[:2], sum(k.shape[1] for k in self.keys)

    @property
    def first_keys(self) -> int:
        """How many keys are of the first side."""
        return self.shape[3] - (self.keys[-1].shape[1] if self.spec.sides == 2 else 0)


class PairWeights(NamedTuple):
    """What keys, from ``centre``, are summed with: ``w_j A_ij``, ``A_ij = max(exp(L_ij − α_i − β_j), √floor)``."""

    alpha: Tensor  # [S, G, N]
    beta: Tensor  # [S, G, M]; ∞ leaves a key out
    w: Tensor | None = None  # [G, M]; None is 1
    centre: Tensor | None = None  # [G, D], a constant; None is 0


class PairGradients(NamedTuple):
    """The gradient of A_ij is ``w_j (num_i·(k_j − centre) + den_i) + columns_j``, of which each term may be missing."""

    num: Tensor | None = None  # [S, G, sides, N, D]
    den: Tensor | None = None  # [S, G, sides, N]
    columns: Tensor | None = None  # [S, G, M]


@dataclass(frozen=True)
class LossSpec(_Flat):
    """Form C: a member of the family as a training loss, with the constants of the release's."""

    R_list: tuple[float, ...]
    floor: float  # of the squared affinity
    least_distance: float = 1e-4
    least_scale: float = 1e-3  # of what costs and points are divided by
    self_distance: float = 100.0  # in units of the scale, added to the cost of a sample to itself; infinity: left out
    least_squared_lambda: float = 1e-8
    cost: str = "l2"
    coupling: str = "two_sided"
    sides: str = "joint"
    iterations: int = 20
    weights: str = "affinity"
    include_self: bool = True
    scale: str = "global"  # or "group": each group has its own; or "given": known before
    scale_self_pairs: bool = True  # count the pairs of a sample with itself in the scale
    normalize: str = "global"  # or "group": each group has its own λ; "group_mean": the mean of theirs; "none"
    details: bool = False  # give the log-sum-exps of rows and what else phase 2 knows of them

    @classmethod
    def of_field(
        cls,
        field: Field | None,
        R_list: tuple[float, ...],
        floor: float,
        self_distance: float,  # apart from the field, in which True and 1.0 are the same to a cache
        scale: str,
        scale_self_pairs: bool,
        normalize: str,
        details: bool,
    ) -> "LossSpec":
        """The loss of a field, the release's for None."""
        same = {} if field is None else {name: getattr(field, name) for name in _SAME}
        others = {"scale": scale, "scale_self_pairs": scale_self_pairs, "normalize": normalize, "details": details}
        return cls(R_list, floor, self_distance=self_distance, **same, **others)  # type: ignore[arg-type]

    @property
    def least_cost(self) -> float:
        return self.least_distance**2 if self.cost == "l2_sq" else self.least_distance

    @property
    def field(self) -> Field:
        mask_self = self.self_distance if self.self_distance < math.inf else True
        return Field(mask_self=mask_self, affinity_floor=self.floor, **{name: getattr(self, name) for name in _SAME})

    @property
    def is_form_b(self) -> bool:
        """Whether the weighted sums of form B have the whole force."""
        return is_form_b(self) and self.include_self and not self.details

    @property
    def is_of_release(self) -> bool:
        """Whether kernels do that have one scale and one λ_R for all groups of a map."""
        shared = self.scale == "global" and self.scale_self_pairs and self.normalize != "group"
        return self.is_form_b and shared and self.self_distance < math.inf

    @property
    def has_statistics_of_groups(self) -> bool:
        """Whether groups have a scale or λ_R of their own."""
        return self.scale != "global" or self.normalize == "group"


def is_form_b(member: Field | LossSpec) -> bool:
    """Whether this is form B's matrix, of which one kernel has both statistics and both sides."""
    return (member.cost, member.coupling, member.sides, member.weights) == ("l2", "two_sided", "joint", "affinity")


# What phase 2 finds for every sample and R. "slope" is the derivative of log_mass w.r.t. R; "residual", Sinkhorn's
# error of the sums of columns before the last time they were scaled, is the same for all samples of a group.
DETAILS = ("log_row_sums", "log_mass", "sum_neg", "sum_pos", "slope", "residual")

_SAME = ("cost", "coupling", "sides", "iterations", "weights", "include_self")


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

    def targets(self, spec: LossSpec) -> int:
        gen, neg, pos = self.counts
        return gen + neg + pos if spec.include_self else neg + pos

    def shape_of_moments(self, spec: LossSpec) -> tuple[int, ...]:
        """``[G, R, R]``."""
        return self.groups, len(spec.R_list), len(spec.R_list)

    def shape_of_forces(self, spec: LossSpec) -> tuple[int, ...]:
        """``[R, G, N, D]``."""
        return len(spec.R_list), self.groups, *self.gen.shape[-2:]

    def shape_of_details(self, spec: LossSpec) -> tuple[int, ...]:
        """``[6, R, G, N]``, see :data:`DETAILS`, or ``[0]`` where they are not wanted."""
        return (len(DETAILS), len(spec.R_list), self.groups, self.counts[0]) if spec.details else (0,)

    def in_groups(self) -> tuple[list[Tensor], list[Tensor]]:
        """Points ``[G, count, D]`` and weights ``[G, count]``, copied where their strides ask for it."""
        return [t.flatten(0, 1) for t in self.points], [w.flatten(0, 1) for w in self.weights]


def by_map(maps: Sequence[LossMap], values: Tensor) -> tuple[Tensor, ...]:
    """``values [maps, …]`` or ``[all groups of all maps, …]`` as those of each map: ``[1, …]`` or ``[G, …]``."""
    if values.shape[0] == len(maps):
        return values.split(1)[: len(maps)]  # of nothing there is one part
    return values.split([of_map.groups for of_map in maps])
