"""The convolutional decoder and the residual MLP: shapes, conditions, and that runs keep and load them."""

import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drifting import generate, load_generator
from drifting.config import load_config
from drifting.data import load_digits
from drifting.errors import UserError
from drifting.generation import Generator
from drifting.hub import RunDirectory, save_generator
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_weights_of_any_type_and_no_samples_at_all(dtype):
    for network in networks():
        network.to(dtype)
        samples = generate(network, 4, cfg_scale=2.0)
        assert samples.dtype == dtype and samples.isfinite().all()
        assert generate(network, 0).shape == (0, 1, 8, 8)


@pytest.mark.filterwarnings("error")
def test_autocast_warns_of_nothing():
    for network in networks():
        with torch.autocast("cpu", torch.bfloat16):
            samples = generate(network, 4)
        assert samples.isfinite().all()


@pytest.mark.parametrize(
    "changes, message",
    [({"width": 0}, "width is 0"), ({"depth": 1.5}, "depth is 1.5"), ({"noise_dim": -1}, "noise_dim is -1"),
     ({"num_classes": 0}, "num_classes is 0"), ({"cond_dim": None}, "cond_dim is None")],
)  # fmt: skip
def test_impossible_sizes(changes, message):
    for network in (ConvDecoder, ResidualMLP):
        with pytest.raises(ValueError, match=f"{message}, expected a whole number, 1 or more"):
            network((1, 8, 8), **SMALL | changes)


def test_more_blocks_than_a_file_may_ask_for():
    for network in (ConvDecoder, ResidualMLP):
        with pytest.raises(ValueError, match="depth is 1000000000, expected 512 at most"):
            network((1, 8, 8), depth=10**9)


def test_impossible_shapes():
    for shape in ((8, 8), 8, None):
        with pytest.raises(ValueError, match=r"sample_shape is .*, expected \[channels, height, width\]"):
            ConvDecoder(shape)
    for shape in (8, None, (1,) * 33):
        with pytest.raises(ValueError, match="sample_shape is .*, expected a list of sizes"):
            ResidualMLP(shape)
    for network in (ConvDecoder, ResidualMLP):
        for size in (0, -3, 1.5, True, "8"):
            with pytest.raises(ValueError, match=rf"sample_shape\[1\] is {size!r}, expected a whole number"):
                network((1, size, 8))
    for channels in ((), (4,) * 17, 3, None):
        with pytest.raises(ValueError, match="channels is .*, expected a list of one number for each of 1 to 16"):
            ConvDecoder((1, 8, 8), channels=channels)
    for count in (0, [8], True):
        with pytest.raises(ValueError, match=rf"channels\[1\] is {re.escape(repr(count))}"):
            ConvDecoder((1, 8, 8), channels=(4, count))


@pytest.mark.parametrize("network", networks(), ids=lambda network: type(network).__name__)
def test_bad_inputs(network):
    z = torch.randn(4, 5)
    for y, message in ((torch.tensor([0, 1, 2]), "y is torch.int64 .3."), (torch.tensor([3]), "y has values from 3")):
        with pytest.raises(ValueError, match=message):
            network(z, y)
    for noise in (z[:, 1:], z.unsqueeze(1)):
        with pytest.raises(ValueError, match=r"z has shape .*, expected \[B, 5\]"):
            network(noise, torch.zeros(4, dtype=torch.long))
    for scale in (0.0, -1.0, 0.5, math.nan, math.inf, torch.tensor([1.0, 2.0, 0.0, 1.0])):  # Its logarithm is taken.
        with pytest.raises(ValueError, match="cfg_scale is .*, expected finite numbers of 1 or more"):
            network(z, torch.zeros(4, dtype=torch.long), scale)
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


@pytest.mark.parametrize("saved", networks(), ids=lambda network: type(network).__name__)
def test_a_description_that_does_not_fit_the_network(saved, tmp_path):
    run, names = RunDirectory(tmp_path), ("0", "1", "2")
    save_generator(run, Generator(saved, (5,), (1, 8, 8), names))
    described = json.loads(run.description.read_text())
    run.description.write_text(json.dumps(described | {"noise_shape": [3], "sample_shape": [1, 4, 4], "name": "mlp"}))
    loaded = load_generator(tmp_path)  # The network knows better.
    assert (loaded.noise_shape, loaded.sample_shape, loaded.arguments) == ((5,), (1, 8, 8), saved.config)
    assert type(saved) is NETWORKS[loaded.name]
    for change, message in (
        ({"class_names": [*names, "3"]}, "has 4 class_names, its network 3"),
        ({"model": saved.config | {"depth": 10**9}}, "depth is 1000000000"),
        ({"model": saved.config | {"width": 2**40}}, "Storage size|does not fit"),
    ):
        run.description.write_text(json.dumps(described | change))
        with pytest.raises(UserError, match=message):
            load_generator(tmp_path)


def test_mistaken_arguments_of_a_network_by_name():
    for keys, message in (
        (["model=residual_mlp", "model.widht=16"], "unknown key model.widht: ResidualMLP .* did you mean width?"),
        (["model=conv_decoder", "model.channels=[8,0]"], r"no ConvDecoder of .*: channels\[1\] is 0"),
        (["model=conv_decoder", "model.channels=8"], "no ConvDecoder of .*: channels is 8, expected a list"),
        (["model=residual_mlp", "step.activation_checkpointing=true"], "no attribute of that name: set it to false"),
    ):
        with pytest.raises(UserError, match=message):
            build_trainer(load_config("digits", keys), load_digits(), Ranks())
