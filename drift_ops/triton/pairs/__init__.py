"""The two sums over pairs that the family of fields is composed of, and the vector-Jacobian product of both.

- :mod:`.log_sum_exps`: log-sum-exps along either axis, of some widths in one walk.
- :mod:`.problem`: widths and units in memory, as the streaming kernels of forms A and B want them.
- :mod:`.potentials`: the potentials as statistics of softmaxes. With these, the kernels of :mod:`..affinity` that
  follow the softmaxes serve here too: weighted sums, flows, and the gradients of points and of values.
"""

from torch import Tensor

from ...points import gathered, scattered
from ...spec import PairGradients, PairProblem, PairWeights
from .. import launch
from ..affinity.flows import Incoming, find_flows
from ..affinity.point_gradients import find_point_gradients
from ..affinity.rows import split_rows
from ..affinity.softmax import Statistics
from ..affinity.value_gradients import find_value_gradients
from ..affinity.weighted_sums import find_weighted_sums
from .log_sum_exps import find_log_sums
from .potentials import as_statistics
from .problem import pairs_of


def log_sums(problem: PairProblem, potential: Tensor | None, by_row: bool) -> Tensor:
    """See :func:`drift_ops.ops.log_sums`."""
    with launch.on_device_of(problem.q):
        q, k, _, _ = gathered(problem.q, problem.keys, None)
        return find_log_sums(pairs_of(problem, q, k, None), potential, by_row)


def weighted_sums(problem: PairProblem, weights: PairWeights) -> tuple[Tensor, Tensor]:
    """See :func:`drift_ops.ops.weighted_sums`."""
    with launch.on_device_of(problem.q):
        q, k, v, _ = gathered(problem.q, problem.keys, None, weights.centre)
        pairs = pairs_of(problem, q, k, weights.w)
        stats = Statistics(as_statistics(weights.alpha), as_statistics(weights.beta))
        return find_weighted_sums(pairs, stats, None if pairs.k_halves is not None else split_rows(v))


def pair_gradients(
    problem: PairProblem, weights: PairWeights, incoming: PairGradients
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """See :func:`drift_ops.ops.pairs._pair_gradients`."""
    with launch.on_device_of(problem.q):
        q, k, v, _ = gathered(problem.q, problem.keys, None, weights.centre)
        pairs = pairs_of(problem, q, k, weights.w)
        stats = Statistics(as_statistics(weights.alpha), as_statistics(weights.beta))
        given = Incoming(None, None, incoming.den, incoming.columns)
        if incoming.num is not None:
            of_values = split_rows(v) if pairs.k_halves is None else pairs.k_halves
            given = given._replace(v=of_values, grad_num=split_rows(incoming.num))
        flows, grad_w = find_flows(pairs, stats, given, with_logits=True)
        grad_q, grad_k = find_point_gradients(pairs, stats, None, given)
        grad_v = None if incoming.num is None else find_value_gradients(pairs, stats, given.grad_num)
    of_keys, _ = scattered(problem.keys, None, grad_k, grad_v)
    return grad_q, of_keys, q.new_empty(0) if grad_w is None else grad_w, *flows
