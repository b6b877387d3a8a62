"""Forms A and B: weighted sums under the doubly normalised affinity, and their vector-Jacobian product.

- :mod:`.group`: small problems, one program each.
- :mod:`.statistics`, :mod:`.weighted_sums`: large ones, and those of form C. Tiles over both axes; nothing of size N×M
  is kept, distances are worked out again by each kernel, and no sum depends on timing.
- :mod:`.flows`, :mod:`.point_gradients`, :mod:`.value_gradients`: the backward of both. These and the weighted sums
  also serve the sums over pairs of :mod:`..pairs`.
- :mod:`.logit`, :mod:`.softmax`: what is computed of a pair's distance. :mod:`.pairs`: what the streaming kernels are
  told of a problem, and its distances; :mod:`.rows`: its points as float16 halves; :mod:`.blocks`: its tiles.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from ...points import gathered, scattered
from ...spec import AffinitySpec
from .. import group as groups
from .. import launch
from . import group
from .flows import Incoming, find_flows
from .pairs import pairs_of
from .point_gradients import find_point_gradients
from .rows import split_rows
from .softmax import Statistics
from .statistics import find_statistics
from .value_gradients import find_value_gradients
from .weighted_sums import find_weighted_sums


def affinity_sums(
    spec: AffinitySpec,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor] | None,
    w: Tensor | None,
    unit: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """See :func:`drift_ops.ops.affinity_sums`; widths and the self distance are in units of ``unit``, a 0-d tensor."""
    plain = unit is None and not spec.least_distance and math.isinf(spec.self_distance)
    if plain and groups.fits_field(q.shape[1], *(key.shape[1] for key in keys)):
        return group.affinity_sums(spec, q, keys, values, w)
    return streamed_sums(spec, q, keys, values, w, unit)


def streamed_sums(
    spec: AffinitySpec,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor] | None,
    w: Tensor | None,
    unit: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The same of problems of any size."""
    with launch.on_device_of(q):
        q, k, v, centre = gathered(q, keys, values)
        pairs = pairs_of(spec, q, k, w, _first_keys(spec, keys), unit)
        stats = find_statistics(pairs)
        keys_serve = values is None and pairs.k_halves is not None
        num, den = find_weighted_sums(pairs, stats, None if keys_serve else split_rows(v))
    return num, den, *stats, centre


def affinity_sums_backward(
    spec: AffinitySpec,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor] | None,
    w: Tensor | None,
    row_stats: Tensor,
    col_stats: Tensor,
    centre: Tensor,
    grad_num: Tensor,
    grad_den: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """See :func:`drift_ops.ops.affinity_sums`; the same kernels for problems of any size."""
    with launch.on_device_of(q):
        q, k, v, _ = gathered(q, keys, values, centre)
        pairs, stats = pairs_of(spec, q, k, w, _first_keys(spec, keys)), Statistics(row_stats, col_stats)
        keys_serve = values is None and pairs.k_halves is not None
        of_values = pairs.k_halves if keys_serve else split_rows(v)
        incoming = Incoming(of_values, split_rows(grad_num.contiguous()), grad_den.contiguous())
        of_pairs, grad_w = find_flows(pairs, stats, incoming)
        grad_q, grad_k = find_point_gradients(pairs, stats, of_pairs, incoming)
        grad_v = find_value_gradients(pairs, stats, incoming.grad_num)
    return grad_q, *scattered(keys, values, grad_k, grad_v), q.new_empty(0) if grad_w is None else grad_w


def _first_keys(spec: AffinitySpec, keys: Sequence[Tensor]) -> int:
    """How many are of the first side."""
    return sum(key.shape[1] for key in (keys[:-1] if spec.sides == 2 else keys))
