"""Fixtures shared by all tests: which backends run, and memory that tells on whoever reads it unwritten."""

import os

import pytest
import torch

import drift_ops

LONGEST = ("test_triton_compile.py", "test_cuda_build.py", "test_cuda_emulated.py")
REQUIRED = [name for name in os.environ.get("DRIFT_OPS_REQUIRE", "").split(",") if name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Has the longest files run first: they would keep the workers of pytest-xdist waiting at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def _backends_to_test() -> list[str]:
    """``reference`` and ``cpu`` always, a GPU backend where it can run, and whatever DRIFT_OPS_REQUIRE names."""
    usable = [name for name, status in drift_ops.backends().items() if status.usable]
    return list(dict.fromkeys(["reference", "cpu", *usable, *REQUIRED]))


def _usable(name: str) -> str:
    status = drift_ops.backends().get(name)
    if status is None or not status.usable:
        reason = f"backend {name!r}: {status.reason if status else 'not in drift_ops.backends()'}"
        if name in REQUIRED:
            pytest.fail(f"{reason}, but DRIFT_OPS_REQUIRE={','.join(REQUIRED)}")
        pytest.skip(reason)
    return name


@pytest.fixture(scope="session", params=_backends_to_test())
def backend(request: pytest.FixtureRequest) -> str:
    """Name of a usable backend. An unusable one is skipped with its reason, or fails where it is required."""
    return _usable(request.param)


@pytest.fixture(scope="session", params=_backends_to_test()[1:])
def kernel_backend(request: pytest.FixtureRequest) -> str:
    """Like ``backend``, without ``reference``: for what is judged against the reference anyway."""
    return _usable(request.param)


@pytest.fixture(scope="session", params=[name for name in _backends_to_test() if name != "triton"])
def float64_backend(request: pytest.FixtureRequest) -> str:
    """Like ``backend``, of those that compute in float64."""
    return _usable(request.param)


@pytest.fixture(scope="session")
def torchvision():
    """torchvision, whose Python needs two operators declared where its compiled part was built for another torch."""
    try:
        return pytest.importorskip("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        return pytest.importorskip("torchvision")


@pytest.fixture(scope="session", autouse=True)
def nan_in_uninitialised_memory():
    """``torch.empty`` returns NaN (integers: their maximum), so a kernel that leaves an element unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
