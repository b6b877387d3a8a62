"""Feature extractors: the maps they give, gradients to the images, frozen parameters."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from drifting.errors import UserError
from drifting.models import DriftingLoss, FeatureExtractor, FeatureStack, InputFeatureExtractor, LatentFeatureExtractor
from drifting.models.drifting_loss import build_extractor
from drifting.models.resnet_encoder import group_norm, multiscale_maps


@pytest.fixture(scope="module")
def latent() -> LatentFeatureExtractor:
    return LatentFeatureExtractor(in_chans=4, base_channels=8, layers=(1, 2, 2, 1))


def test_pixels():
    x = torch.randn(3, 2, 4, 5)
    for name in ("input", "pixels"):  # its name and its old name
        ((found, pixels),) = build_extractor(name, None)(x).items()
        assert found == name and torch.equal(pixels, x.reshape(3, 1, 40))


@settings(deadline=None, max_examples=30)
@given(channels=st.integers(1, 3), height=st.integers(1, 13), width=st.integers(1, 13))
def test_pyramid(channels, height, width):
    x = torch.randn(2, channels, height, width, dtype=torch.float64, requires_grad=True)
    maps = build_extractor("pyramid", channels)(x)
    assert list(maps) == ["global", "half", "quarter", "patches_2", "patches_4"]
    assert torch.equal(maps["global"], x.flatten(1).unsqueeze(1))
    for parts, name in ((2, "half"), (4, "quarter")):
        if height % parts == width % parts == 0:
            torch.testing.assert_close(maps[name][:, 0], F.avg_pool2d(x, parts).flatten(1))
        h, w, down, across = (-(-side // part) for part in (parts, 4) for side in (height, width))
        rows, columns = -(-(height - h) // down) + 1, -(-(width - w) // across) + 1
        patches = maps[f"patches_{parts}"].unflatten(2, (channels, h, w))
        assert patches.shape[1] == rows * columns
        for t in range(patches.shape[1]):  # what reaches beyond the image repeats its border
            at = [(torch.arange(n) + start).clamp(max=side - 1) for n, start, side in
                  ((h, t // columns * down, height), (w, t % columns * across, width))]  # fmt: skip
            assert torch.equal(patches[:, t], x[:, :, at[0]][:, :, :, at[1]])
    sum(value.sum() for value in maps.values()).backward()
    assert (x.grad > 0).all()  # every pixel counts


def test_stack_has_the_maps_of_all(latent):
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    stack = FeatureStack([("a", latent), ("b", latent), ("input", InputFeatureExtractor())]).train()
    alone, maps = latent(x), stack(x)
    assert list(maps)[0] == "global" and torch.equal(maps["global"], alone.pop("global"))  # once
    assert set(maps) == {"global", "input"} | {f"{part}/{name}" for part in "ab" for name in alone}
    assert all(torch.equal(maps[f"b/{name}"], value) for name, value in alone.items())
    sum(value.sum() for value in maps.values()).backward()
    assert x.grad.any() and not any(p.requires_grad for p in stack.parameters()) and not stack.training
    assert isinstance(DriftingLoss(["latent", "pixels"]).feature_extractor, FeatureStack)


def test_latent_maps(latent):
    x = torch.randn(3, 4, 16, 16)
    maps = latent(x)
    scales = ["", "_mean", "_std", "_mean_2", "_std_2", "_mean_4", "_std_4"]
    names = {"global", "norm_x"}
    for feature in ("conv1", "layer1", "layer2_blk2", "layer2", "layer3_blk2", "layer3"):
        names |= {feature + scale for scale in scales}
    names |= {"layer4" + scale for scale in scales[:5]}  # 2 × 2 is too small for patches of 4
    assert set(maps) == names
    assert all(m.ndim == 3 and m.shape[0] == 3 and m.isfinite().all() for m in maps.values())
    shapes = {name: tuple(m.shape[1:]) for name, m in maps.items()}
    assert shapes["conv1"] == (256, 8) and shapes["layer2"] == (64, 16)
    assert shapes["layer3_mean_2"] == (4, 32) and shapes["layer4_std"] == (1, 64)
    assert torch.equal(maps["global"], x.reshape(3, 1, -1))
    torch.testing.assert_close(maps["norm_x"], (x.square().mean((2, 3)) + 1e-6).sqrt()[:, None])


def test_default_latent_extractor_has_86_maps():
    with torch.device("meta"):
        maps = LatentFeatureExtractor().to("meta")(torch.empty(1, 4, 32, 32))
    assert len(maps) == 86
    assert sum(m.shape[1] for m in maps.values()) == 6734  # locations, each a problem of its own


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 3), channels=st.integers(1, 4), height=st.integers(1, 9), width=st.integers(1, 9))
def test_multiscale_statistics(batch, channels, height, width):
    x = torch.randn(batch, channels, height, width, dtype=torch.float64)
    maps = multiscale_maps("f", x)
    torch.testing.assert_close(maps["f"][:, -1], x[..., -1, -1])
    torch.testing.assert_close(maps["f_mean"][:, 0], x.mean((2, 3)), check_dtype=False, atol=1e-6, rtol=1e-5)
    for p in (2, 4):
        assert (f"f_mean_{p}" in maps) == (f"f_std_{p}" in maps) == (height % p == 0 and width % p == 0)
        if f"f_mean_{p}" in maps:
            patch = x[:, :, :p, -p:].flatten(2)  # the last patch of the first row
            index = width // p - 1
            std = (patch.var(2, correction=0) + 1e-6).sqrt()
            torch.testing.assert_close(maps[f"f_mean_{p}"][:, index], patch.mean(2), atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(maps[f"f_std_{p}"][:, index], std, atol=1e-6, rtol=1e-5)


def test_constant_image_has_a_finite_gradient(latent):
    x = torch.zeros(1, 4, 8, 8, requires_grad=True)
    sum(m.sum() for m in latent(x).values()).backward()
    assert x.grad.isfinite().all()


def test_gradient_reaches_the_image_from_every_map(latent):
    x = torch.randn(1, 4, 16, 16, requires_grad=True)
    for name, feature in latent(x).items():
        (gradient,) = torch.autograd.grad(feature.square().sum(), x, retain_graph=True)
        assert gradient.any(), name


def test_frozen_for_good(latent):
    assert not any(p.requires_grad for p in latent.parameters())
    parent = torch.nn.Sequential(latent).train()
    assert not latent.training and not any(m.training for m in latent.modules())
    assert parent.training


def test_weights_come_from_the_seed_alone():
    torch.manual_seed(1)
    first = LatentFeatureExtractor(base_channels=8, seed=5)
    torch.manual_seed(2)
    second = LatentFeatureExtractor(base_channels=8, seed=5)
    other = LatentFeatureExtractor(base_channels=8, seed=6)
    assert torch.equal(first.encoder.conv1.weight, second.encoder.conv1.weight)
    assert not torch.equal(first.encoder.conv1.weight, other.encoder.conv1.weight)


def test_scales_stay_alive_through_the_stages(latent):
    """Random weights neither blow up nor die out, or the deeper maps would tell nothing apart."""
    maps = latent(torch.randn(8, 4, 16, 16))
    for name in ("conv1", "layer1", "layer2", "layer3", "layer4"):
        spread = maps[name].std(0).mean()
        assert 0.05 < spread < 5, (name, spread)


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (48, 24), (7, 7), (1, 1), (33, 11), (512, 32)])
def test_group_norm_divides(channels, groups):
    assert group_norm(channels).num_groups == groups


def test_wrong_input(latent):
    with pytest.raises(ValueError, match=r"images have shape \[2, 3, 8, 8\], expected \[B, 4, H, W\]"):
        latent(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="four stages"):
        LatentFeatureExtractor(layers=(2, 2, 2))


def test_resnet_without_torchvision_says_what_to_do(monkeypatch):
    for name in ("torchvision", "torchvision.models"):  # Another test may have imported it.
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"not installed: pip install 'drifting\[resnet\]'"):
        FeatureExtractor()


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_resnet_maps(in_chans, torchvision):
    extractor = FeatureExtractor(in_chans, pretrained=False)
    x = torch.rand(2, in_chans, 32, 32, requires_grad=True)
    maps = extractor(x)
    assert maps["conv1"].shape == (2, 256, 64) and maps["layer4"].shape == (2, 1, 512)
    maps["layer4"].sum().backward()
    assert x.grad.any() and not any(p.requires_grad for p in extractor.parameters())
