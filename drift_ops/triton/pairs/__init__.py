"""The two sums over pairs that the family of fields is composed of, and the vector-Jacobian product of both.

- :mod:`.log_sum_exps`: log-sum-exps along either axis, of some widths in one walk.
- :mod:`.problem`: widths and units in memory, as the streaming kernels of forms A and B want them.
- :mod:`.potentials`: the potentials as statistics of softmaxes. With these, the kernels of :mod:`..affinity` that
  follow the softmaxes serve here too: weighted sums, flows, and the gradients of points and of values.
"""

from collections.abc import Sequence

from torch import Tensor

from ...points import gathered, scattered
from ...spec import PairSpec
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


def log_sums(
    spec: PairSpec,
    q: Tensor,
    keys: Sequence[Tensor],
    width: Tensor,
    unit: Tensor | None,
    potential: Tensor | None,
    by_row: bool,
) -> Tensor:
    """See :func:`drift_ops.ops.log_sums`."""
    with launch.on_device_of(q):
        q, k, _, _ = gathered(q, keys, None)
        return find_log_sums(pairs_of(spec, q, k, None, k.shape[1], width, unit), potential, by_row)


def weighted_sums(
    spec: PairSpec,
    q: Tensor,
    keys: Sequence[Tensor],
    width: Tensor,
    unit: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    w: Tensor | None,
    centre: Tensor,
) -> tuple[Tensor, Tensor]:
    """See :func:`drift_ops.ops.weighted_sums`."""
    with launch.on_device_of(q):
        q, k, v, _ = gathered(q, keys, None, centre)
        pairs = pairs_of(spec, q, k, w, _first_keys(spec, keys), width, unit)
        stats = Statistics(as_statistics(alpha), as_statistics(beta))
        return find_weighted_sums(pairs, stats, None if pairs.k_halves is not None else split_rows(v))


def pair_gradients(
    spec: PairSpec,
    q: Tensor,
    keys: Sequence[Tensor],
    width: Tensor,
    unit: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    w: Tensor | None,
    centre: Tensor | None,
    grad_num: Tensor | None,
    grad_den: Tensor | None,
    grad_columns: Tensor | None,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """See :func:`drift_ops.ops.pairs._pair_gradients`."""
    with launch.on_device_of(q):
        q, k, v, _ = gathered(q, keys, None, centre)
        pairs = pairs_of(spec, q, k, w, _first_keys(spec, keys), width, unit)
        stats = Statistics(as_statistics(alpha), as_statistics(beta))
        incoming = Incoming(None, None, grad_den, grad_columns)
        if grad_num is not None:
            of_values = split_rows(v) if pairs.k_halves is None else pairs.k_halves
            incoming = incoming._replace(v=of_values, grad_num=split_rows(grad_num))
        flows, grad_w = find_flows(pairs, stats, incoming, with_logits=True)
        grad_q, grad_k = find_point_gradients(pairs, stats, None, incoming)
        grad_v = None if grad_num is None else find_value_gradients(pairs, stats, incoming.grad_num)
    of_keys, _ = scattered(keys, None, grad_k, grad_v)
    return grad_q, of_keys, q.new_empty(0) if grad_w is None else grad_w, *flows


def _first_keys(spec: PairSpec, keys: Sequence[Tensor]) -> int:
    """How many are of the first side."""
    return sum(key.shape[1] for key in (keys[:-1] if spec.sides == 2 else keys))
