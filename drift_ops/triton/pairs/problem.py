"""What the kernels are told of sums over pairs.

Widths and units stay on the device: kernels read their products, of which each problem has one for every width.
"""

import math

import triton.language as tl
from torch import Tensor

from ...spec import PairProblem
from ..affinity.logit import LOG2E
from ..affinity.pairs import Pairs, shared_fields

LOGIT_OF_COST = {"l2": "laplace", "l2_sq": "square"}


def pairs_of(problem: PairProblem, q: Tensor, k: Tensor, w: Tensor | None) -> Pairs:
    """Of contiguous centred points."""
    spec, unit, width = problem.spec, problem.unit, problem.width.to(q.dtype).unsqueeze(1)
    widths = width * (q.new_ones(len(q)) if unit is None else unit.to(q.dtype))  # [S, G]
    self_logits = None
    if spec.has_self and 0 < spec.self_cost < math.inf:
        least_cost = spec.least_distance if spec.cost == "l2" else spec.least_distance**2
        self_logits = (least_cost / widths + spec.self_cost / width) * -LOG2E.value
    return Pairs(
        **shared_fields(spec, q, k, w, problem.first_keys, apart=spec.self_cost < math.inf),
        widths=widths,
        temperature=1.0,
        self_distance=0.0,
        unit=None,
        self_logits=self_logits,
        S=tl.constexpr(len(widths)),
        IN_MEMORY=tl.constexpr(True),
        LOGIT=tl.constexpr(LOGIT_OF_COST[spec.cost]),
    )
