"""DriftingLoss: what it asks of the operator, its gradient, its guidance weights, its errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import drift_ops
from drifting.models import DriftingLoss, LatentFeatureExtractor, SimpleDriftingLoss
from drifting.models.resnet_encoder import multiscale_maps

TEMPERATURES = (0.05, 0.2)


class TwoMaps(nn.Module):
    """A cheap extractor: the pixels by location and their mean and spread."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.calls = 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        maps = multiscale_maps("f", self.scale * x)
        return {name: maps[name] for name in ("f", "f_mean", "f_std_2")}


def by_hand(loss: DriftingLoss, gen: Tensor, real: Tensor, *guidance: Tensor) -> Tensor:
    """The loss of ``[L, n, C, H, W]`` images, one drift_loss call a map, every location and label spelled out."""
    maps = [[loss.feature_extractor(label) for label in images] for images in (gen, real, *guidance[:1])]
    total = torch.zeros(())
    for name in maps[0][0]:
        locations = maps[0][0][name].shape[1]
        gen_groups, *fixed = (
            torch.stack([label[name][:, t] for label in side for t in range(locations)]) for side in maps
        )
        options = {"R_list": loss.temperatures, "affinity_floor": loss.drift["field"].affinity_floor}
        if guidance:
            uncond, weight = guidance
            options["weight_neg"] = torch.stack([w.repeat(uncond.shape[1]) for w in weight for _ in range(locations)])
        losses, _ = drift_ops.drift_loss(gen_groups, *fixed, **options)
        total = total + losses.mean()
    return total


@settings(max_examples=12, deadline=None)
@given(
    labels=st.integers(1, 3),
    generated=st.integers(2, 5),
    positives=st.integers(1, 4),
    negatives=st.integers(0, 3),
    channels=st.integers(1, 3),
    floor=st.sampled_from([0.0, 1e-6]),
)
def test_equals_one_call_a_map_by_hand(labels, generated, positives, negatives, channels, floor):
    loss_fn = DriftingLoss(TwoMaps(), TEMPERATURES, affinity_floor=floor)
    gen = torch.randn(labels, generated, channels, 4, 4, requires_grad=True)
    real = torch.randn(labels, positives, channels, 4, 4)
    guidance = (torch.randn(labels, negatives, channels, 4, 4), torch.rand(labels) * 3) if negatives else ()
    loss = loss_fn(gen, real, *guidance)
    expected = by_hand(loss_fn, gen, real, *guidance)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    gradient, wanted = (torch.autograd.grad(value, gen)[0] for value in (loss, expected))
    assert (gradient - wanted).norm() <= 1e-3 * wanted.norm() + 1e-7


def test_two_passes_of_the_extractor_and_one_call_of_the_operator(monkeypatch):
    extractor = TwoMaps()
    calls = []
    original = drift_ops.drift_loss
    monkeypatch.setattr(drift_ops, "drift_loss", lambda *a, **k: calls.append(a) or original(*a, **k))
    images = torch.randn(2, 3, 1, 4, 4)
    DriftingLoss(extractor, TEMPERATURES)(images.clone().requires_grad_(), images, images, torch.ones(2))
    assert extractor.calls == 2 and len(calls) == 1


def test_one_label_may_go_without_the_label_dimension():
    loss_fn = DriftingLoss(TwoMaps(), TEMPERATURES)
    gen, real = torch.randn(4, 1, 4, 4), torch.randn(5, 1, 4, 4)
    assert torch.equal(loss_fn(gen, real), loss_fn(gen.unsqueeze(0), real.unsqueeze(0)))


def test_info_names_and_values():
    loss_fn = DriftingLoss(TwoMaps(), TEMPERATURES)
    gen, real = torch.randn(6, 1, 4, 4), torch.randn(5, 1, 4, 4)
    loss, info = loss_fn.loss_and_info(gen.unsqueeze(0), real.unsqueeze(0))
    maps = ("f", "f_mean", "f_std_2")
    assert set(info) == {f"{m}/{kind}" for m in maps for kind in ("scale", "lambda_0.05", "lambda_0.2")}
    assert all(value.ndim == 0 and value > 0 and not value.requires_grad for value in info.values())
    mean = loss_fn.feature_extractor(torch.cat([gen, real]))["f_mean"][:, 0]
    torch.testing.assert_close(info["f_mean/scale"], torch.cdist(mean[:6], mean).mean(), rtol=1e-3, atol=1e-3)
    assert torch.equal(loss, loss_fn(gen, real))


def test_lambda_falls_as_the_samples_approach_the_data():
    loss_fn = DriftingLoss("pixels", (0.2,))
    real = torch.randn(64, 1, 2, 2)
    gen = (torch.randn(1, 64, 1, 2, 2) + shift for shift in (0.0, 1.0))
    near, far = (loss_fn.loss_and_info(of_shift, real.unsqueeze(0))[1] for of_shift in gen)
    assert near["pixels/lambda_0.2"] < 0.5 * far["pixels/lambda_0.2"]


@pytest.mark.parametrize("field", ["paper", "gaussian"])
def test_descent_moves_samples_to_the_data(field):
    temperatures = (0.05, 0.2) if field == "paper" else (1.0, 4.0)
    loss_fn = DriftingLoss("pixels", temperatures, normalize_features=field == "paper", field=field)
    real = torch.randn(64, 2, 1, 1) * 0.5 + torch.tensor([2.0, -1.0]).view(2, 1, 1)
    x = torch.randn(32, 2, 1, 1).requires_grad_()
    start = (x.mean(0) - real.mean(0)).norm().item()
    for _ in range(100):
        (gradient,) = torch.autograd.grad(loss_fn(x, real), x)
        with torch.no_grad():
            x -= 2.0 * gradient
    assert (x.mean(0) - real.mean(0)).norm() < 0.2 * start


def test_unconditional_negatives_repel():
    """They sit on one side of the data: with weight the drift points away from them, with weight 0 it ignores them."""
    loss_fn = DriftingLoss("pixels", (0.2,))
    torch.manual_seed(0)
    gen = (0.1 * torch.randn(16, 2, 1, 1)).requires_grad_()
    real = 0.5 * torch.randn(64, 2, 1, 1)
    uncond = 0.1 * torch.randn(8, 2, 1, 1) + torch.tensor([0.5, 0.0]).view(2, 1, 1)

    def drift(*guidance: Tensor) -> Tensor:
        return -torch.autograd.grad(loss_fn(gen, real, *guidance), gen)[0].mean((0, 2, 3))

    assert drift(uncond, torch.tensor([4.0]))[0] < drift()[0] - 1e-3
    ignored, moved = (drift(uncond + shift, torch.tensor([0.0])) for shift in (0.0, 0.2))
    cosine = torch.cosine_similarity(ignored, moved, dim=0)
    assert cosine > 0.99


def test_a_weight_counts_like_copies():
    """Weight 3 on one negative is three times it within the weighted sums: the operator gets it as weight_neg."""
    captured = {}

    def spy(*args, **kwargs):
        captured.update(kwargs)
        return original(*args, **kwargs)

    original = drift_ops.drift_loss
    images = torch.randn(2, 3, 1, 4, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drift_ops, "drift_loss", spy)
        DriftingLoss(TwoMaps(), TEMPERATURES)(images, images, images[:, :2], torch.tensor([1.0, 3.0]))
    weights = dict(zip(("f", "f_mean", "f_std_2"), captured["weight_neg"], strict=True))
    assert weights["f"].shape == (2, 16, 2) and weights["f_mean"].tolist() == [[[1.0, 1.0]], [[3.0, 3.0]]]
    assert weights["f"][0].eq(1).all() and weights["f"][1].eq(3).all()


def test_gradient_reaches_only_the_generated_samples():
    extractor = TwoMaps()
    loss_fn = DriftingLoss(extractor, TEMPERATURES)
    gen, real, uncond = (torch.randn(3, 1, 4, 4, requires_grad=True) for _ in range(3))
    loss_fn(gen, real, uncond).backward()
    assert gen.grad.any() and real.grad is None and uncond.grad is None and extractor.scale.grad is None


def test_the_extractor_is_frozen_and_stays_in_evaluation_mode():
    extractor = nn.Sequential(TwoMaps())
    loss_fn = DriftingLoss(extractor).train()
    assert loss_fn.training and not extractor.training and not extractor[0].training
    assert not any(p.requires_grad for p in loss_fn.parameters())


def test_latent_extractor_by_name():
    loss_fn = DriftingLoss("latent", in_chans=3)
    assert isinstance(loss_fn.feature_extractor, LatentFeatureExtractor) and loss_fn.feature_extractor.in_chans == 3


def test_gaussian_field_is_form_a_by_group():
    loss_fn = DriftingLoss(TwoMaps(), (0.5, 2.0), field="gaussian")
    gen, real = torch.randn(2, 3, 1, 4, 4, requires_grad=True), torch.randn(2, 5, 1, 4, 4)
    loss, info = loss_fn.loss_and_info(gen, real)
    expected = torch.zeros(())
    for name in ("f", "f_mean", "f_std_2"):
        x, y = (torch.stack([loss_fn.feature_extractor(label)[name] for label in side]) for side in (gen, real))
        terms = []
        for label in range(2):
            for t in range(x.shape[2]):
                points = x[label, :, t]
                V = drift_ops.compute_V_multiscale(points.detach(), y[label, :, t], points.detach(), (0.5, 2.0))
                terms.append((points - (points + V).detach()).square().mean())
        expected = expected + torch.stack(terms).mean()
    torch.testing.assert_close(loss, expected)
    assert set(info) == {"f/drift", "f_mean/drift", "f_std_2/drift"}
    loss.backward()
    assert gen.grad.any()


def test_simple_loss_drifts_points_directly():
    x, data = torch.randn(6, 3, requires_grad=True), torch.randn(9, 3)
    loss = SimpleDriftingLoss(sigma=0.7, temperature=0.5, normalize_features=False)(x, data)
    V = drift_ops.compute_V(x.detach(), data, x.detach(), 0.7, 0.5, normalize_features=False)
    torch.testing.assert_close(loss, V.square().mean())
    loss.backward()
    torch.testing.assert_close(x.grad, -2 * V / V.numel())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"feature_extractor": "vgg"}, "feature_extractor is 'vgg'"),
        ({"field": "laplace"}, "field is 'laplace'"),
        ({"normalize_drift": False}, "field='gaussian'"),
        ({"normalize_features": False}, "field='gaussian'"),
    ],
)
def test_bad_constructor_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DriftingLoss(**{"feature_extractor": "pixels", **arguments})


@pytest.mark.parametrize(
    ("shapes", "weight", "message"),
    [
        (((4,), (4,)), None, r"x_gen has shape \[4\]"),
        (((2, 3, 1, 4, 4), (3, 3, 1, 4, 4)), None, "labels and sample shapes must agree"),
        (((3, 1, 4, 4), (3, 2, 4, 4)), None, "x_real has shape"),
        (((3, 1, 4, 4), (3, 1, 4, 4), (3, 1, 2, 2)), None, "x_uncond has shape"),
        (((2, 3, 1, 4, 4), (2, 3, 1, 4, 4), (2, 3, 1, 4, 4)), torch.ones(3), r"weight_uncond has shape \[3\]"),
        (((3, 1, 4, 4), (3, 1, 4, 4)), torch.ones(1), "without x_uncond"),
    ],
)
def test_bad_inputs(shapes, weight, message):
    gen, real, *uncond = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        DriftingLoss("pixels")(gen, real, *(uncond or [None]), weight)


def test_gaussian_field_refuses_unconditional_negatives():
    images = torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match="no unconditional negatives"):
        DriftingLoss("pixels", field="gaussian")(images, images, images)


def test_an_extractor_that_does_not_give_maps():
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"flat": x.flatten()}

    with pytest.raises(ValueError, match=r"map 'flat' has shape \[8\]"):
        DriftingLoss(Flat())(torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2))
