"""ConvNeXt V2's maps, of a tiny network with random weights: against transformers, in a loss, and what goes wrong."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from drifting.config.reading import load_config
from drifting.errors import UserError
from drifting.models import ConvNeXtFeatureExtractor, DriftingLoss, drifting_loss
from drifting.models.feature_extractor import load_convnext

WIDTHS = (8, 12, 16, 24)


@pytest.fixture(scope="module")
def transformers(torchvision):
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def classifier(transformers):
    """transformers' own network, whose every weight does something."""
    config = transformers.ConvNextV2Config(depths=[1, 1, 2, 1], hidden_sizes=list(WIDTHS))
    network = transformers.ConvNextV2ForImageClassification(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3 + name.endswith("layernorm.weight"))
    return network


@pytest.fixture(scope="module")
def extractor(classifier, tmp_path_factory):
    """As it comes from a directory."""
    path = tmp_path_factory.mktemp("convnext")
    classifier.save_pretrained(path)
    return load_convnext(source=str(path))


def by_location(hidden: Tensor) -> Tensor:
    """``[B, C, H, W]`` to ``[B, H·W, C]``, normalised over channels as the release does."""
    points = hidden.double().flatten(2).transpose(1, 2)
    return (points - points.mean(2, keepdim=True)) / (points.std(2, correction=0, keepdim=True) + 1e-3)


def test_maps_are_those_of_the_network(classifier, extractor):
    x = torch.rand(2, 3, 224, 224) * 2 - 1
    colours = ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))
    normalized = torch.stack([((x[:, i] + 1) / 2 - mean) / std for i, (mean, std) in enumerate(colours)], 1)
    with torch.no_grad():
        output = classifier.convnextv2(normalized, output_hidden_states=True)
    expected = {"global": x.reshape(2, 1, -1)}
    for index, hidden in enumerate(output.hidden_states[-4:]):
        points = by_location(hidden)
        expected |= {f"stage_{index}": points} if index else {}
        expected[f"stage_{index}_mean"] = points.mean(1, keepdim=True)
        expected[f"stage_{index}_std"] = (points.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    expected["global_mean"] = output.pooler_output.unsqueeze(1)
    expected["global_std"] = expected["stage_3_std"]
    maps = extractor(x)
    assert list(maps) == list(expected)
    assert [maps[f"stage_{i}"].shape for i in (1, 2, 3)] == [(2, 784, 12), (2, 196, 16), (2, 49, 24)]
    for name, value in expected.items():
        torch.testing.assert_close(maps[name], value.float(), rtol=1e-4, atol=1e-4, msg=name)
        assert maps[name].std() > 0.05, name


@pytest.mark.parametrize("size", [(300, 500), (40, 30)])
def test_images_are_resized_as_pillow_resizes_them(extractor, size):
    x = torch.rand(1, 3, *size) * 2 - 1
    planes = [Image.fromarray(plane.numpy()).resize((224, 224), Image.Resampling.BILINEAR) for plane in x[0]]
    resized = torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]))[None]
    maps, expected = extractor(x), extractor(resized)
    for name in maps.keys() - {"global"}:
        torch.testing.assert_close(maps[name], expected[name], rtol=1e-3, atol=1e-3)


def test_gradient_reaches_the_image_from_every_map_and_stops_at_the_weights(extractor):
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    for name, feature in extractor.train()(x).items():
        (gradient,) = torch.autograd.grad(feature.pow(3).sum(), x, retain_graph=True)
        assert gradient.any() and gradient.isfinite().all(), name
    assert not any(p.requires_grad for p in extractor.parameters())
    assert not any(m.training for m in extractor.modules())


def test_loss_in_bfloat16(extractor):
    images = torch.rand(2, 5, 3, 32, 32) * 2 - 1
    exact, rounded = (DriftingLoss(extractor, bf16=bf16).groups(images) for bf16 in (False, True))
    for name, groups in rounded.items():
        assert groups.dtype == torch.bfloat16 and groups.shape == exact[name].shape
        assert (groups.float() - exact[name]).norm() < 0.03 * exact[name].norm(), name
    assert rounded["stage_3"].shape == (2, 49, 5, 24)
    gen = images[:, :3].clone().requires_grad_()
    loss, info = DriftingLoss(extractor, bf16=True).loss_and_info(gen, images[:, 3:])
    loss.backward()
    assert gen.grad.isfinite().all() and gen.grad.any() and info["stage_1/scale"] > 0


def test_beside_others_by_name(extractor, monkeypatch):
    assert load_config("pixel_L").loss.feature_extractor == ["mae", "convnext_v2"]  # as in the release
    monkeypatch.setattr(drifting_loss, "load_convnext", lambda in_chans: extractor)
    groups = DriftingLoss(["pixels", "convnext_v2"], in_chans=3).groups(torch.randn(1, 2, 3, 8, 8))
    assert {"global", "pixels", "convnext_v2/stage_0_mean", "convnext_v2/global_std"} <= groups.keys()


def test_grey_images_are_told():
    with pytest.raises(UserError, match="convnext_v2 takes images of 3 channels, the data have 1"):
        DriftingLoss("convnext_v2", in_chans=1)


def test_missing_library_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'drifting\[convnext\]'"):
        load_convnext()


def test_missing_weights_are_told(transformers, classifier, tmp_path):
    with pytest.raises(UserError, match="cannot load ConvNeXt V2 .*absent"):
        load_convnext(source=str(tmp_path / "absent"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot load ConvNeXt V2"):
        load_convnext(source=str(tmp_path))
    transformers.ResNetModel(transformers.ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1])).save_pretrained(tmp_path)
    classifier.config.save_pretrained(tmp_path)  # weights of another network
    with pytest.raises(UserError, match=r"holds no ConvNeXt V2 .*, it lacks convnextv2\."):
        load_convnext(source=str(tmp_path))


def test_network_may_be_given(classifier, extractor):
    x = torch.randn(1, 3, 224, 224)
    given = ConvNeXtFeatureExtractor(classifier.convnextv2)(x)
    assert all(torch.equal(value, given[name]) for name, value in extractor(x).items())
