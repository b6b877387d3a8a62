"""Values that others computed: ``compute_V*`` by the description's repository in float64, ``drift_loss_*`` by the
release in float32. A file holds the inputs by name, the options that are not default, and the results."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import device_of, relative_error

import drift_ops

GOLDEN = Path(__file__).parent / "golden"


def load(path: Path, backend: str) -> dict:
    with np.load(path) as file:
        return {
            name: torch.from_numpy(value).to(device_of(backend)) if value.ndim else value.item()
            for name, value in file.items()
        }


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("compute_V*.npz")), ids=lambda path: path.stem)
def test_compute_V(path, float64_backend):
    arguments = load(path, float64_backend)
    expected = arguments.pop("V")
    multiscale = path.stem.startswith("compute_V_multiscale")
    function = drift_ops.compute_V_multiscale if multiscale else drift_ops.compute_V
    assert relative_error(function(**arguments, backend=float64_backend), expected) < 1e-9


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("drift_loss_*.npz")), ids=lambda path: path.stem)
def test_drift_loss(path, backend):
    arguments = load(path, backend)
    expected_loss, expected_gradient = arguments.pop("loss"), arguments.pop("grad_gen")
    expected_info = {name: arguments.pop(name) for name in list(arguments) if name.startswith("info_")}
    R_list = [float(str(R)) for R in arguments.pop("R_list").cpu().numpy()]  # 0.02, not float32's 0.0199999996
    for name in ("pos", "neg"):
        if name in arguments:
            arguments[f"fixed_{name}"] = arguments.pop(name)
    arguments["gen"].requires_grad_()
    loss, info = drift_ops.drift_loss(**arguments, R_list=R_list, backend=backend)
    loss.sum().backward()
    assert relative_error(loss.detach(), expected_loss) < 1e-4
    assert relative_error(arguments["gen"].grad, expected_gradient) < 1e-4
    for name, expected in expected_info.items():
        assert info[name.removeprefix("info_")].item() == pytest.approx(expected, rel=1e-4)


def test_goldens_are_there():
    assert len(list(GOLDEN.glob("*.npz"))) == 9
