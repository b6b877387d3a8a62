"""The convolutional decoder and the residual MLP: shapes, conditions, and that runs keep and load them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drifting import generate, load_generator
from drifting.config import load_config
from drifting.data import load_digits
from drifting.errors import UserError
from drifting.models import NETWORKS, ConvDecoder, ResidualMLP
from drifting.train import build_trainer
from drifting.training import Ranks

SMALL = {"num_classes": 3, "noise_dim": 5, "width": 16, "depth": 1, "cond_dim": 8}


def networks(shape: tuple[int, ...] = (1, 8, 8)) -> list[torch.nn.Module]:
    return [ConvDecoder(shape, channels=(8, 4), **SMALL), ResidualMLP(shape, **SMALL)]


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 13), st.integers(1, 13)),
    labels=st.integers(1, 3),
    each=st.integers(1, 3),
    stages=st.integers(1, 3),
)
def test_images_of_any_size_and_labels_given_once(shape, labels, each, stages):
    z, y, scale = torch.randn(labels * each, 5), torch.arange(labels), 1 + torch.rand(labels)
    for network in (ConvDecoder(shape, channels=[8, 4, 3][:stages], **SMALL), ResidualMLP(shape, **SMALL)):
        samples = network(z, y.repeat_interleave(each), scale.repeat_interleave(each))
        assert samples.shape == (labels * each, *shape)
        torch.testing.assert_close(network(z, y, scale), samples)


def test_the_mlp_makes_samples_of_any_shape():
    for shape in ((), (7,), (4, 2), (2, 3, 4, 5)):
        assert ResidualMLP(shape, **SMALL)(torch.randn(6, 5), torch.zeros(6, dtype=torch.long)).shape == (6, *shape)


@pytest.mark.parametrize("network", networks(), ids=lambda network: type(network).__name__)
def test_noise_label_and_guidance_scale_all_matter_at_once(network):
    z, y, scale = torch.randn(2, 5), torch.tensor([0, 1]), torch.tensor([1.0, 2.0])
    samples = network(z, y, scale)
    for changed in (network(z + 1, y, scale), network(z, y + 1, scale), network(z, y, scale + 1)):
        assert ((changed - samples).flatten(1).norm(dim=1) > 0.05 * samples.flatten(1).norm(dim=1)).all()
    samples.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("network", networks(), ids=lambda network: type(network).__name__)
def test_the_config_builds_the_same_network(network):
    again = type(network)(**network.config)
    again.load_state_dict(network.state_dict())
    drawn = [generate(net, 4, generator=torch.Generator().manual_seed(0)) for net in (network, again)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    "changes, message",
    [({"width": 0}, "width is 0"), ({"depth": 1.5}, "depth is 1.5"), ({"noise_dim": -1}, "noise_dim is -1"),
     ({"num_classes": 0}, "num_classes is 0"), ({"cond_dim": None}, "cond_dim is None")],
)  # fmt: skip
def test_impossible_sizes(changes, message):
    for network in (ConvDecoder, ResidualMLP):
        with pytest.raises(ValueError, match=f"{message}, expected a whole number, 1 or more"):
            network((1, 8, 8), **SMALL | changes)


def test_impossible_shapes():
    for shape, channels in (((8, 8), (4,)), ((1, 8, 8), ()), ((1, 8, 8), (4,) * 17)):
        with pytest.raises(ValueError, match=r"expected \[channels, height, width\] and 1 to 16 stages"):
            ConvDecoder(shape, channels=channels)
    with pytest.raises(ValueError, match=r"channels\[1\] is 0"):
        ConvDecoder((1, 8, 8), channels=(4, 0))


@pytest.mark.parametrize("network", networks(), ids=lambda network: type(network).__name__)
def test_bad_inputs(network):
    z = torch.randn(4, 5)
    for y, message in ((torch.tensor([0, 1, 2]), "y is torch.int64 .3."), (torch.tensor([3]), "y has values from 3")):
        with pytest.raises(ValueError, match=message):
            network(z, y)
    with pytest.raises(ValueError, match=r"cfg_scale has shape \[3\]"):
        network(z, torch.zeros(2, dtype=torch.long), torch.ones(3))


@pytest.mark.parametrize("name", ["conv_decoder", "residual_mlp"])
def test_by_name_in_a_configuration(name, tmp_path):
    keys = [f"model={name}", "model.width=16", "model.depth=1", "model.noise_dim=5", "loss.feature_extractor=pyramid"]
    config = load_config("digits", keys)
    trainer = build_trainer(config, load_digits(), Ranks())
    assert type(trainer.model) is NETWORKS[name] and trainer.sample_shape == (1, 8, 8)
    trainer.save(tmp_path)
    loaded = load_generator(tmp_path)
    assert (loaded.name, loaded.arguments) == (name, trainer.model.config) and loaded.noise_shape == (5,)
    drawn = [source.generate(4, [1, 2, 3, 4], 2.0, generator=torch.Generator()) for source in (trainer, loaded)]
    assert torch.equal(*drawn)


def test_mistaken_arguments_of_a_network_by_name():
    for keys, message in (
        (["model=residual_mlp", "model.widht=16"], "unknown key model.widht: ResidualMLP .* did you mean width?"),
        (["model=conv_decoder", "model.channels=[8,0]"], r"no ConvDecoder of .*: channels\[1\] is 0"),
    ):
        with pytest.raises(UserError, match=message):
            build_trainer(load_config("digits", keys), load_digits(), Ranks())
