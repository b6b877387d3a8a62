"""The drifting fields that have a name, as arguments of :func:`drift_ops.drift_loss`: docs/fields.md explains them."""

from typing import Any

from drift_ops import Field

Drift = dict[str, Any]  # A ``field``, and maybe ``scale``, ``scale_self_pairs`` and ``normalize``.

# Sinkhorn undoes weights of the kernel, so that negatives are weighted by the sums of columns.
SINKHORN: Drift = {"coupling": "sinkhorn", "sides": "split", "weights": "marginal"}
FIELDS: dict[str, Drift | None] = {
    "paper": {"field": Field(mask_self=100.0)},
    "release": {"field": Field(mask_self=100.0, affinity_floor=1e-6)},
    "sinkhorn_split": {"field": Field(**SINKHORN), "scale_self_pairs": False},
    "one_positive": {
        "field": Field(mask_self=100.0, affinity_floor=1e-6),
        "scale": "group", "scale_self_pairs": False, "normalize": "group_mean",
    },
    "wflow": {"field": Field(**SINKHORN, cost="l2_sq", include_self=False)},
    "gaussian": None,  # It is form A, drift_ops.compute_V, outside of the family.
}  # fmt: skip


def arguments_of(drift: Drift) -> dict[str, Any]:
    """The arguments of the operator, which serves the release's field faster where that is not named."""
    floor = drift["field"].affinity_floor
    if drift["field"] != Field(mask_self=100.0, affinity_floor=floor):
        return drift
    return {name: value for name, value in drift.items() if name != "field"} | {"affinity_floor": floor}
