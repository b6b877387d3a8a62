"""Settings of ``pytest benchmarks/``: short runs, and the eager medians that the other rows are compared with."""

import pytest
import torch


@pytest.fixture(scope="session")
def medians() -> dict:
    """Median seconds by (case, contender); eager comes first in every group."""
    return {}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.manual_seed(0)
    torch._dynamo.reset()
