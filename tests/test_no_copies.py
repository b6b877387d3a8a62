"""Between an extractor's output and the kernels nothing of the size of a map is copied, concatenated or centred, and
nothing between the kernels' gradient and the extractor's backward."""

import pytest
import torch
from cases import device_of, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import drift_ops
from drifting.models import DriftingLoss
from drifting.models.drifting_loss import split_groups

LABELS, GEN, REAL, LOCATIONS, DIM = 3, 8, 12, 5, 32
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided")  # what kernels write their results to


class LargeResults(TorchDispatchMode):
    """Names the operations that write as many numbers as a map has, other than into views of their inputs."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.found = numbers, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        known = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.numel() >= self.numbers and name not in ALLOCATIONS:
                if t.untyped_storage().data_ptr() not in known or name.endswith("_"):
                    self.found.append(f"{name} {list(t.shape)}")
        return result


def maps_of(count: int, device: str) -> dict[str, torch.Tensor]:
    return {name: torch.randn(LABELS * count, LOCATIONS, DIM, device=device) for name in ("a", "b")}


@pytest.mark.parametrize("negatives", [0, 4])
def test_loss_of_feature_maps(kernel_backend, negatives):
    device = device_of(kernel_backend)
    loss_fn = DriftingLoss(lambda samples: samples, backend=kernel_backend).to(device)
    features = {name: t.requires_grad_() for name, t in maps_of(GEN, device).items()}
    real = maps_of(REAL + negatives, device)
    weight = torch.rand(LABELS, device=device)
    smallest = LABELS * LOCATIONS * DIM * (negatives or GEN)

    def loss_and_gradients():
        with LargeResults(smallest) as large:
            views = {name: t.unflatten(0, (LABELS, -1)).transpose(1, 2) for name, t in features.items()}
            fixed = {name: t.unflatten(0, (LABELS, -1)).transpose(1, 2) for name, t in real.items()}
            loss, _ = loss_fn.of_groups(views, *split_groups(fixed, REAL), weight)
            return large.found, loss, torch.autograd.grad(loss, list(features.values()))

    found, loss, grads = loss_and_gradients()
    assert not found, found
    loss_fn.backend = "reference"
    found, expected, expected_grads = loss_and_gradients()
    assert found, "the dense reference copies, and this test must see it"
    assert relative_error(loss, expected) < 1e-4
    for grad, exact in zip(grads, expected_grads, strict=True):
        assert relative_error(grad, exact) < 1e-4


def test_groups_are_views_of_what_the_extractor_returns():
    loss_fn = DriftingLoss(lambda samples: samples.flatten(2), backend="cpu", in_chans=None)
    samples = torch.randn(LABELS, GEN, LOCATIONS, 4, 8)
    (groups,) = loss_fn.groups(samples).values()
    assert groups.shape == (LABELS, LOCATIONS, GEN, 32)
    assert groups.untyped_storage().data_ptr() == samples.untyped_storage().data_ptr()


@pytest.mark.parametrize("leading", [(6,), (2, 3), (2, 3, 2)])
def test_any_number_of_leading_dimensions(kernel_backend, leading):
    device = device_of(kernel_backend)
    gen, pos = (torch.randn(*leading, n, 20, device=device) for n in (5, 7))
    gen.requires_grad_()
    loss, info = drift_ops.drift_loss(gen, pos, backend=kernel_backend)
    flat, flat_info = drift_ops.drift_loss(gen.flatten(0, -3), pos.flatten(0, -3), backend=kernel_backend)
    assert loss.shape == leading and torch.equal(loss.flatten(), flat)
    assert torch.equal(info["scale"], flat_info["scale"])
    (grad,), (expected,) = torch.autograd.grad(loss.sum(), gen), torch.autograd.grad(flat.sum(), gen)
    assert torch.equal(grad, expected)
