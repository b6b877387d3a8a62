"""The family of fields: values that others computed, and every backend against the reference."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import device_of, relative_error

import drift_ops
from drift_ops import Field

FAMILY = sorted((Path(__file__).parent / "golden" / "family").glob("*.npz"))
COUPLINGS = {"partial_two_sided": "two_sided", "row": "row", "sinkhorn": "sinkhorn"}


def load(path: Path, device: torch.device) -> dict:
    with np.load(path) as file:
        return {name: torch.from_numpy(v).to(device) if v.ndim else v.item() for name, v in file.items()}


@pytest.mark.parametrize("path", [p for p in FAMILY if not p.stem.startswith("one")], ids=lambda path: path.stem)
def test_golden_of_reachomk(path, backend):
    """``imagenet/drifting_loss.py`` of reachomk/sinkhorn, in float32."""
    given = load(path, device_of(backend))
    masked, marginal = given["mask_self_neg"], given["sinkhorn_marginal"] != "none"
    field = Field(
        cost=given["dist_metric"],
        coupling=COUPLINGS[given["coupling"]],
        sides="split" if given["drift_form"] == "split" else "joint",
        iterations=given["sinkhorn_iters"],
        weights="marginal" if marginal else "kernel",
        mask_self=masked,
    )
    gen = given["x"].requires_grad_()
    weights = [torch.full_like(gen[..., 0], 1.0), torch.full_like(given["neg"][..., 0], given["weight_neg"])]
    loss, info = drift_ops.drift_loss(
        gen,
        given["pos"],
        given["neg"],
        None,
        None,
        weights[1],
        given["R_list"].tolist(),
        field=field,
        scale_self_pairs=not masked,
        backend=backend,
    )
    loss.mean().backward()
    assert loss.mean().item() == pytest.approx(given["loss"], rel=1e-4)
    assert relative_error(gen.grad, given["grad"]) < 1e-4


@pytest.mark.parametrize("path", [p for p in FAMILY if p.stem.startswith("one")], ids=lambda path: path.stem)
def test_golden_of_one_positive(path, float64_backend):
    """``training/modules/samplers.py`` of kyutai-labs/pocket-tts, in float64."""
    given = load(path, device_of(float64_backend))
    R = torch.tensor([given["temperature"]], dtype=torch.float64, requires_grad=True)
    gen = given["x"].requires_grad_()
    arguments = {
        "R_list": R,
        "field": Field(mask_self=100.0, affinity_floor=1e-6),
        "scale_self_pairs": False,
        "normalize": {"batch": "group_mean", "True": "group", "False": None}[given["normalize"]],
        "backend": float64_backend,
    }
    loss, info = drift_ops.drift_loss(gen, given["pos"], scale="group", **arguments)
    loss.sum().backward()
    # 2e-6, because their scale counts a cost of 1e-4 for the pairs of a sample with itself.
    assert relative_error(info["scale"], given["scale"]) < 2e-6
    assert relative_error(loss.detach(), given["loss"]) < 2e-6
    assert relative_error(gen.grad, given["grad"]) < 2e-6
    assert relative_error(info["log_mass"][0].detach(), given["log_mass"] - np.log(gen.shape[1])) < 2e-6
    _, info = drift_ops.drift_loss(gen, given["pos"], scale=given["scale"], **arguments)
    (-info["log_mass"].amax(-1).mean()).backward()
    assert R.grad.item() == pytest.approx(given["grad_temperature"], rel=1e-9)


def test_goldens_are_there():
    assert len(FAMILY) == 41
