"""A user's own networks in run directories: saved with all they have, loaded into what the user gives."""

import json
import sys

import pytest
import torch
from torch import nn

from drifting.config import load_config
from drifting.errors import UserError
from drifting.generation import Generator, generate
from drifting.hub import RunDirectory, load_generator, load_mae, save_generator, write_model
from drifting.models import Classifier, DriftingDiT, ResidualMLP
from drifting.training import DriftingTrainer, create_trainer

FACTS = {
    "noise_shape": (6,), "sample_shape": (5,), "class_names": ("n", "e"), "data": "own_parts:stripes", "step": 7,
    "cfg_scale": 1.5,
}  # fmt: skip


class Net(nn.Module):
    """What networks have beside plain weights: tied ones, buffers, a mask of infinities, views, BatchNorm, dropout."""

    noise_shape = (6,)

    def __init__(self, width: int = 8, tied: bool = True):
        super().__init__()
        self.start, self.label = nn.Linear(6, width), nn.Embedding(2, width)
        self.inner, self.outer = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        if tied:
            self.outer.weight = self.inner.weight
        self.norm, self.dropout, self.end = nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, 5)
        self.register_buffer("mask", torch.full((5,), float("-inf")))
        self.register_buffer("whole", torch.randn(4, 2))
        self.register_buffer("view", self.whole[1:3].t())
        self.register_buffer("unsaved", torch.zeros(1), persistent=False)

    def forward(self, z, y):
        x = self.outer(self.inner(self.start(z) + self.label(y)))
        x = self.end(self.dropout(self.norm(x))) + self.view.sum()
        return torch.maximum(x, self.mask)


class Elsewhere(nn.Module):
    """Another network."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.start, self.more = nn.Linear(5, width), nn.ModuleList(nn.Linear(1, 1) for _ in range(9))


def trained(**arguments) -> Generator:
    net = Net(**arguments)
    net(torch.randn(16, 6), torch.arange(16) % 2)  # BatchNorm counts and averages
    return Generator(net.eval(), name="own_parts:ConvNet", arguments=arguments, **FACTS)


@pytest.fixture
def run(tmp_path):
    """A run directory of a network of one's own, and the network."""
    generator = trained(width=12)
    save_generator(RunDirectory(tmp_path), generator, {"frechet_distance": 1.5})
    return tmp_path, generator


def drawn(generator: Generator) -> torch.Tensor:
    return generator.generate(3, ["e", "n", "n"], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "model",
    [lambda: Net(width=12), lambda: Net, lambda: lambda **arguments: Net(**arguments)],
    ids=["net", "class", "f"],
)
def test_saved_and_loaded(run, model):
    folder, saved = run
    loaded = load_generator(str(folder), model=model())
    assert torch.equal(drawn(loaded), drawn(saved))
    assert not loaded.model.training and loaded.model.outer.weight is loaded.model.inner.weight
    expected = saved.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.model.state_dict().items())
    assert loaded.model.norm.num_batches_tracked == 1
    assert vars(loaded) | {"model": None} == vars(saved) | {"model": None, "arguments": {"width": 12}}


def test_what_is_written(run):
    folder, _ = run
    assert json.loads((folder / "model.json").read_text()) == {
        "kind": "own", "name": "own_parts:ConvNet", "model": {"width": 12}, "noise_shape": [6], "sample_shape": [5],
        "class_names": ["n", "e"], "pixel_range": None, "latent": False, "data": "own_parts:stripes", "step": 7,
        "cfg_scale": 1.5, "condition_shape": None, "quality": {"frechet_distance": 1.5},
    }  # fmt: skip
    again = load_generator(folder, model=Net)
    (folder / "again").mkdir()
    save_generator(RunDirectory(folder / "again"), again)
    assert (folder / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_there():
    network = ResidualMLP([5], 2, width=8, depth=1)
    for use in (lambda: generate(network, 2, device="cuda"), lambda: create_trainer(network, "input", device="cuda")):
        with pytest.raises(ValueError, match="^device is 'cuda', where the network cannot be moved: AssertionError: "):
            use()


def test_the_kept_guidance_scale_is_the_default():
    class Scaled(nn.Module):
        def forward(self, z, y, cfg_scale):
            return cfg_scale[:, None].expand(-1, 5)

    generator = Generator(Scaled(), **FACTS)
    assert (generator.generate(3) == 1.5).all() and (generator.generate(3, cfg_scale=2.0) == 2).all()
    assert (generator.generate(3, cfg_scale=torch.ones(3)) == 1).all()


def test_samples_that_are_scalars(tmp_path):
    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, z):
            return self.scale * z.sum(1)

    facts = {"noise_shape": (2,), "sample_shape": (), "class_names": ("all",)}
    save_generator(RunDirectory(tmp_path), Generator(Scalar(), **facts))
    loaded = load_generator(tmp_path, model=Scalar())
    assert loaded.sample_shape == () and loaded.generate(4).shape == (4,) and loaded.name.endswith("Scalar")


def test_a_name_is_asked_for_and_never_imported(run, monkeypatch):
    folder, _ = run
    (folder / "own_parts.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as caught:
        load_generator(folder)
    assert str(caught.value) == (
        f"{folder} holds a network of your own, own_parts:ConvNet: name it with --model own_parts:ConvNet "
        "(or load_generator(folder, model=...))"
    )
    load_generator(folder, model=Net)
    assert "own_parts" not in sys.modules


@pytest.mark.parametrize(
    "model, expected",
    [
        (Elsewhere, r"does not fit Elsewhere: end.bias is torch.float32 \[5\], expected nothing; .*; .*…$"),
        (
            lambda width: Net(),
            r"does not fit Net: end.weight is .*\[5, 12\], expected .*\[5, 8\]; .*\[12, 6\], expected .*\[8, 6\]$",
        ),
        (lambda width: Net(width).double(), r"end.bias is torch.float32 \[5\], expected torch.float64 \[5\]; .*…$"),
        (lambda width: Net(width, tied=False), r"does not fit Net: outer.weight is nothing, expected .*32 \[12, 12\]$"),
        (lambda: Net(), r"there is no <lambda> of the arguments \{'width': 12\}: TypeError: .*width"),
        (lambda width: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda width: {}, "<lambda> returns a dict, expected a torch.nn.Module"),
    ],
    ids=range(7),
)
def test_a_network_that_does_not_fit(run, model, expected):
    with pytest.raises(UserError, match=expected) as caught:
        load_generator(run[0], model=model)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_weights_of_ones_own_must_be_finite(run):
    folder, generator = run
    with torch.no_grad():
        generator.model.label.weight[1, 2] = float("nan")
    save_generator(RunDirectory(folder), generator)
    with pytest.raises(UserError, match="does not fit Net: label.weight has NaN or infinity$"):
        load_generator(folder, model=Net)


@pytest.mark.parametrize(
    "change",
    [
        {"noise_shape": None}, {"noise_shape": [6, -1]}, {"noise_shape": [2**20, 2**20]}, {"sample_shape": [1.5]},
        {"class_names": []}, {"class_names": [[0]]}, {"pixel_range": [1, -1]}, {"latent": 1}, {"data": {}},
        {"name": 5}, {"step": -1}, {"model": [12]}, {"kind": "owl"}, {"kind": ["own"]}, {"cfg_scale": 0.9},
        {"cfg_scale": True}, {"cfg_scale": "2"}, {"cfg_scale": None}, {"cfg_scale": 10**40}, {"cfg_scale": 1e39},
    ],
    ids=str,
)  # fmt: skip
def test_a_description_that_is_not_right(run, change):
    path = run[0] / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as caught:
        load_generator(run[0], model=Net(width=12))
    assert "\n" not in str(caught.value) and next(iter(change)) in str(caught.value)


def test_a_name_is_shown_in_one_line(run):
    path = run[0] / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name": "a\n\x1b[2J" + 9999 * "b"}))
    with pytest.raises(UserError) as caught:
        load_generator(run[0])
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_networks_of_ours_need_no_model(tmp_path):
    write_model(tmp_path, tiny(), {"step": 1})
    with pytest.raises(UserError, match="holds a DriftingDiT, a network of ours: leave out --model"):
        load_generator(tmp_path, model=Net)
    with pytest.raises(UserError, match="holds a generator, not a masked autoencoder"):
        load_mae(tmp_path)
    write_model(tmp_path, Classifier(1, 2, (2, 3)), {"step": 1})
    with pytest.raises(UserError, match="holds a classifier, not a generator or network of your own"):
        load_generator(tmp_path, model=Net)


def test_a_class_derived_from_ours_is_ones_own(tmp_path):
    class Halved(DriftingDiT):
        def forward(self, *arguments):
            return super().forward(*arguments) / 2

    save_generator(RunDirectory(tmp_path), Generator(Halved(**tiny().config), (1, 4, 4), (1, 4, 4)))
    with pytest.raises(UserError, match="holds a network of your own, test_own_networks:.*Halved: name it"):
        load_generator(tmp_path)
    with pytest.raises(UserError, match="holds a network of your own, not a masked autoencoder"):
        load_mae(tmp_path)


class Mirrored(ResidualMLP):
    def __init__(self, size):
        super().__init__((size,), num_classes=2)

    def forward(self, z, y, cfg_scale):
        return super().forward(z, y, cfg_scale).flip(1)


def test_a_derived_class_keeps_its_name_and_the_arguments_it_was_built_of(tmp_path):
    named = {"model.name": f"{__name__}:Mirrored", "model.size": 5, "loss.feature_extractor": "input"}
    config = load_config("digits", [f"{key}={value}" for key, value in named.items()])
    trainer = DriftingTrainer(Mirrored(5), config, "input", device="cpu", name=config.model.name, arguments={"size": 5})
    trainer.save(tmp_path)
    loaded = load_generator(tmp_path, model=Mirrored)
    assert (loaded.name, loaded.arguments, loaded.sample_shape) == (config.model.name, {"size": 5}, (5,))


def test_a_network_that_wrongly_inherits_labels_once_is_told_at_once():
    class Tinted(ResidualMLP):
        def forward(self, z, y, cfg_scale):
            return super().forward(z, y, cfg_scale) + y.unsqueeze(1)

    with pytest.raises(ValueError, match="Tinted .*conditions_once is true.* fails: RuntimeError"):
        create_trainer(Tinted((5,), 2), "input", device="cpu")
    Tinted.conditions_once = False
    assert create_trainer(Tinted((5,), 2), "input", device="cpu").sample_shape == (5,)


def test_a_state_that_safetensors_cannot_hold(tmp_path):
    class Counting(nn.Module):
        def get_extra_state(self):
            return {"count": 3}

    with pytest.raises(UserError, match="_extra_state of Counting is a dict, expected tensors only"):
        write_model(tmp_path, Counting(), {"step": 1})


def tiny(**changes) -> DriftingDiT:
    sizes = {"img_size": 4, "in_chans": 1, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 3}
    return DriftingDiT(**{**sizes, "num_style_tokens": 2, "style_vocab": 4, **changes})


@pytest.mark.parametrize(
    "in_chans, data, latent",
    [(1, "digits", False), (4, "latents", True), (4, "imagenet", True), (4, "folder", False), (1, "latents", True)],
)
def test_model_json_of_earlier_runs(tmp_path, in_chans, data, latent):
    """These say neither shapes nor names nor whether samples are latents."""
    model = tiny(in_chans=in_chans)
    write_model(tmp_path, model, {})
    earlier = {
        "kind": "gen", "model": model.config, "num_classes": 3, "data": data, "pixel_range": [-1.0, 1.0], "step": 20,
        "quality": {"accuracy": 0.5},
    }  # fmt: skip
    (tmp_path / "model.json").write_text(json.dumps(earlier))
    loaded = load_generator(tmp_path)
    assert loaded.noise_shape == loaded.sample_shape == (in_chans, 4, 4)
    assert loaded.class_names == ("0", "1", "2") and loaded.pixel_range == (-1, 1)
    assert (loaded.latent, loaded.data, loaded.step, loaded.name) == (latent, data, 20, "drifting_dit")
    assert loaded.arguments == model.config and loaded.cfg_scale == 1
    again = tmp_path / "again"
    save_generator(RunDirectory(again), loaded)
    facts = [vars(one) | {"model": None} for one in (load_generator(again), loaded)]
    assert facts[0] == facts[1]
    assert json.loads((again / "model.json").read_text())["latent"] is latent


def test_more_names_than_the_network_has_classes(tmp_path):
    save_generator(RunDirectory(tmp_path), Generator(tiny(), (1, 4, 4), (1, 4, 4), tuple("abcd"), (-1.0, 1.0)))
    with pytest.raises(UserError, match="has 4 class_names, its network 3"):
        load_generator(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"depth": 10**9}, {"depth": 513}, {"num_style_tokens": 10**9}, {"n_cls_tokens": 10**9}, {"img_size": 2**40},
        {"num_classes": 10**300}, {"embed_dim": 2.0}, {"embed_dim": "8"}, {"use_rope": 1}, {"mlp_ratio": 1e308},
        {"cond_dim": {"a": [[1]]}}, {"x": 1}, [8], None, 5,
    ],
    ids=str,
)  # fmt: skip
def test_arguments_that_build_no_generator(tmp_path, change):
    write_model(tmp_path, tiny(), {"step": 1})
    path = tmp_path / "model.json"
    arguments = tiny().config | change if isinstance(change, dict) else change
    path.write_text(json.dumps({"kind": "gen", "model": arguments, "step": 1}))
    with pytest.raises(UserError, match="there is no DriftingDiT of the arguments") as caught:
        load_generator(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float8_e4m3fn], ids=str)
def test_numbers_that_are_no_weights(tmp_path, run, dtype):
    """Neither is written, nor loaded into a network that has such; the message is one line."""

    class Odd(Net):
        def __init__(self, width: int = 12):
            super().__init__(width)
            self.register_buffer("odd", torch.zeros(2).to(dtype))

    for act in (
        lambda: save_generator(RunDirectory(tmp_path / "odd"), Generator(Odd(), **FACTS)),
        lambda: load_generator(run[0], model=Odd),
    ):
        with pytest.raises(UserError, match=f"odd of Odd is a {dtype}, expected tensors only, of real") as caught:
            act()
        assert "\n" not in str(caught.value)


def test_a_lazy_network_is_refused_in_one_line(run):
    """Its parameters have no shapes yet."""

    class Lazy(Net):
        def __init__(self, width: int = 12):
            super().__init__(width)
            self.start = nn.LazyLinear(width)

    with pytest.raises(UserError, match="model.safetensors cannot be loaded: .*uninitialized parameter"):
        load_generator(run[0], model=Lazy)
