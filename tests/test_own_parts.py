"""A user's own networks, data and features in the trainer: any shapes, any labels, and one line where nothing fits."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

import drifting
from drifting import evaluate, sample
from drifting.config import load_config
from drifting.config.reading import save_config
from drifting.errors import UserError
from drifting.training import create_trainer

ACCEPTANCE = Path(__file__).parent / "acceptance"


@pytest.mark.parametrize("script", ["own_vectors.py", "own_unconditional.py", "own_by_name.sh"])
def test_scripts_as_users_write_them(script, tmp_path):
    """They run as they are, from another folder."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    root = os.pathsep.join([str(Path(drifting.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = ["bash" if script.endswith(".sh") else sys.executable, ACCEPTANCE / script]
    environment = os.environ | {"PATH": path, "PYTHONPATH": root}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "ok", result.stdout + result.stderr


class Net(nn.Module):
    """A network from vectors of ``noise`` numbers to samples of any shape."""

    def __init__(self, *shape: int, noise: int = 4, classes: int = 8):
        super().__init__()
        self.noise_shape, self.shape = (noise,), shape
        self.label = nn.Embedding(classes, noise)
        self.net = nn.Sequential(nn.Linear(noise, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.SiLU())
        self.out = nn.Linear(16, int(torch.tensor(shape).prod()) if shape else 1)

    def forward(self, z):
        return self.out(self.net(z)).reshape(-1, *self.shape)


class Labelled(Net):
    def forward(self, z, y):
        return super().forward(z + self.label(y))


class Guided(Net):
    def forward(self, z, y, cfg_scale):
        return super().forward(z + self.label(y) * cfg_scale[:, None])


def trainer_of(model, **settings):
    sizes = {"gen_per_label": 6, "pos_per_label": 5, "uncond_per_label": 3, "queue_size": 20, "warmup_steps": 1}
    return create_trainer(model, **({"feature_extractor": "input", "device": "cpu"} | sizes | settings))


@pytest.mark.parametrize("shape", [(), (3,), (5, 2), (1, 6, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize("kind", [Net, Labelled, Guided])
def test_samples_of_any_shape(kind, shape, tmp_path):
    """From scalars to volumes, for networks of one, two and three arguments."""
    trainer = trainer_of(kind(*shape))
    loader = DataLoader(TensorDataset(torch.randn(40, *shape), torch.arange(40) % 3), batch_size=20)
    metrics = trainer.train_epoch(loader)
    assert metrics["num_steps"] == 2 and metrics["avg_loss"] > 0 and metrics["grad_norm"] > 0
    labels = torch.tensor([0, 1, 2, 1])
    drawn = trainer.generate(4, None if kind is Net else labels, generator=torch.Generator().manual_seed(1))
    assert drawn.shape == (4, *shape)
    trainer.save(tmp_path)
    again = drifting.load_generator(tmp_path, model=kind(*shape))
    assert again.sample_shape == shape and again.class_names == (("all",) if kind is Net else (0, 1, 2))
    same = again.generate(4, None if kind is Net else labels, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn, same)


@pytest.mark.parametrize("noise", [(), (2, 3), (1, 4, 4)])
def test_noise_of_any_shape(noise):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.LazyLinear(3)
            self.net(torch.zeros(1, int(torch.tensor(noise).prod()) if noise else 1))

        def forward(self, z):
            return self.net(z.reshape(len(z), -1))

    trainer = trainer_of(Flat(), noise_shape=noise)
    trainer.train_step(torch.randn(10, 3))
    assert trainer.generate(7).shape == (7, 3)
    assert drifting.generate(Flat(), 7, noise_shape=noise).shape == (7, 3)


@pytest.mark.parametrize("items", [lambda x: x, lambda x: (x,), lambda x: (x, 0)])
def test_what_a_loader_may_yield(items):
    data = [items(x) for x in torch.randn(30, 3)]
    metrics = trainer_of(Net(3)).train_epoch(DataLoader(data, batch_size=10))
    assert metrics["num_steps"] == 3


# ---------------------------------------------------------------------------------------------------------- labels


class ByName(torch.utils.data.Dataset):
    def __len__(self):
        return 30

    def __getitem__(self, index):
        return torch.full((2,), float(index % 3)), ("cat", "bird", "dog")[index % 3]


@pytest.mark.parametrize(
    "data, names",
    [
        (TensorDataset(torch.randn(30, 2), torch.tensor([42, 3, 7] * 10)), (3, 7, 42)),
        (ByName(), ("bird", "cat", "dog")),
        (torch.utils.data.Subset(ByName(), range(15)), ("bird", "cat", "dog")),
    ],
)
def test_labels_are_numbered_once_and_told(data, names, capsys, tmp_path):
    model = Labelled(2, classes=3)  # which has room for three
    trainer = trainer_of(model)
    trainer.train_epoch(DataLoader(data, batch_size=15))
    assert capsys.readouterr().err.count(f"labels {', '.join(map(str, names))} are classes 0 to 2") == 1
    assert trainer.groups.class_names == names
    assert trainer.generate(3, list(names)).shape == (3, 2)
    with pytest.raises(ValueError, match="there is no label 'cow', expected one of: "):
        trainer.generate(1, ["cow"])
    trainer.save(tmp_path)
    again = drifting.load_generator(tmp_path, model=Labelled(2, classes=3))
    assert again.class_names == names
    drawn = [g.generate(3, list(names), generator=torch.Generator().manual_seed(0)) for g in (trainer, again)]
    assert torch.equal(*drawn)


class Pairs(torch.utils.data.Dataset):
    """Points and labels, and an attribute that tells something else than the labels."""

    def __init__(self, make, **attributes):
        self.make = make
        vars(self).update(attributes)

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return self.make(torch.full((2,), float(index)), [3, 7][index % 2])


def columns(items):
    return torch.stack([item["x"] for item in items]), [item["label"] for item in items]


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Pairs(lambda x, y: {"x": x, "label": y}), batch_size=8, collate_fn=columns),
        DataLoader(Pairs(lambda x, y: (x, y), targets=None, labels={3: "cat", 7: "dog"}), batch_size=8),
        DataLoader(Pairs(lambda x, y: (x, y), targets=[4, 8] * 10), batch_size=8),
        DataLoader(ConcatDataset([Pairs(lambda x, y: (x, y))] * 2), batch_size=8),
    ],
)
def test_labels_are_those_of_the_batches(loader):
    trainer = trainer_of(Labelled(2))
    trainer.train_epoch(loader)
    assert trainer.groups.class_names == (3, 7)


def test_a_compiled_network_is_saved_as_itself(tmp_path):
    trainer = trainer_of(torch.compile(Labelled(2), backend="eager"), class_names=[0, 1, 2])
    trainer.train_step(torch.randn(9, 2), [0, 1, 2] * 3)
    trainer.save(tmp_path)
    again = drifting.load_generator(tmp_path, model=Labelled(2))
    drawn = [each.generate(2, [0, 2], generator=torch.Generator().manual_seed(0)) for each in (trainer, again)]
    assert torch.equal(*drawn)


def test_labels_that_are_left_aside_are_told(capsys):
    trainer = trainer_of(Net(2))
    for _ in range(2):
        trainer.train_step(torch.randn(4, 2), [0, 1, 0, 1])
    assert capsys.readouterr().err == "the network takes no labels: all samples form one group\n"


def test_labels_of_steps_without_a_loader():
    trainer = trainer_of(Labelled(2), class_names=["b", "a"])
    trainer.train_step(torch.randn(4, 2), ["a", "b", "b", "a"])
    with pytest.raises(ValueError, match="there is no label 'c', expected one of: b, a"):
        trainer.train_step(torch.randn(1, 2), ["c"])
    trainer = trainer_of(Labelled(2))
    trainer.train_step(torch.randn(4, 2), torch.tensor([5, 9, 9, 5]))
    assert trainer.groups.class_names == (5, 9)


def test_labels_that_are_neither_numbers_nor_text():
    with pytest.raises(ValueError, match="a label is 0.*, expected an integer or text"):
        trainer_of(Labelled(2)).train_step(torch.randn(2, 2), torch.tensor([0.7, 1.7]))


def test_a_network_without_labels_sees_one_group():
    trainer = trainer_of(Net(2))
    trainer.train_epoch(DataLoader(TensorDataset(torch.randn(30, 2), torch.arange(30) % 3), batch_size=30))
    assert trainer.groups.class_names == ("all",) and trainer.groups.size == 1


# -------------------------------------------------------------------------------------------------------- features


def halves(x):
    return x.unflatten(1, (2, -1))  # [B, T, D]


class Maps(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x):
        return {"linear": self.net(x), "squares": x.square()[:, None]}


@pytest.mark.parametrize(
    "extractor, maps",
    [
        ("input", {"input"}),
        (halves, {"halves"}),
        (lambda x: x.sin(), {"lambda"}),
        (Maps(), {"linear", "squares"}),
        (["input", halves, Maps()], {"input", "halves", "Maps/linear", "Maps/squares"}),
        ([Maps(), Maps()], {"Maps_1/linear", "Maps_1/squares", "Maps_2/linear", "Maps_2/squares"}),
    ],
)
def test_features_of_any_kind(extractor, maps):
    trainer = trainer_of(Net(4), feature_extractor=extractor)
    info = trainer.train_step(torch.randn(10, 4))
    assert {name.removesuffix("/scale") for name in info if name.endswith("/scale")} == maps


# -------------------------------------------------------------------------------------------------------- commands


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A module of the user's own in the current folder, and a trainer of its network with labels -1, 3 and 7."""
    (tmp_path / "parts_of_a_test.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\nfrom tests_of_parts import Labelled\n"
        "class Net(Labelled):\n    def __init__(self): super().__init__(2)\n"
        "def data():\n    y = torch.tensor([-1, 3, 7] * 20)\n    x = torch.randn(60, 2) / 9 + y[:, None]\n"
        "    return TensorDataset(x, y), TensorDataset(x, y)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tests_of_parts", sys.modules[__name__])
    monkeypatch.delitem(sys.modules, "parts_of_a_test", raising=False)

    def save(**settings):
        trainer = trainer_of(Labelled(2), class_names=[-1, 3, 7], **settings)
        trainer.train_step(torch.randn(9, 2), [-1, 3, 7] * 3)
        trainer.save("saved")

    return save


def test_what_a_script_has_saved_is_evaluated_on_data_of_its_own(saved, capsys):
    saved()
    command = ["saved", "--model", "parts_of_a_test:Net", "--num", "30"]
    evaluate.main([*command, "--data", "parts_of_a_test:data"])
    assert json.loads(capsys.readouterr().out)["frechet_distance"] > 0
    with pytest.raises(UserError, match="--reference must name .*, or --data data of your own"):
        evaluate.main(command)


def test_labels_in_files_of_samples(saved, capsys):
    """They are the labels of the data, negative ones too, whether or not the option names them."""
    saved()
    for option, expected in (([], [-1] * 2 + [3] * 2 + [7] * 2), (["--labels=7,-1"], [7] * 3 + [-1] * 3)):
        sample.main(["saved", "--model", "parts_of_a_test:Net", "--num", "6", "--out", "samples.npz", *option])
        assert np.load("samples.npz")["arr_1"].tolist() == expected
    real = torch.tensor([-1.0, 3.0, 7.0])[:, None].expand(3, 2).numpy()
    np.savez("real.npz", real, np.array([-1, 3, 7]))
    capsys.readouterr()
    save_config(load_config(overrides=["data=parts_of_a_test:data"]), Path("saved/config.yaml"))
    evaluate.main(["real.npz", "--reference", "saved", "--data", "parts_of_a_test:data"])
    assert json.loads(capsys.readouterr().out)["recognised_share"] == 1


def test_labels_that_are_text_of_integers():
    """A data set by name has such names; its labels 1, 2 and 3 are no class numbers."""
    generator = drifting.Generator(Labelled(2).eval(), (4,), (2,), ("1", "2", "3"))
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert torch.equal(*[generator.generate(2, y, generator=seed) for y, seed in zip(([1, 2], ["1", "2"]), seeds)])  # noqa: B905
    with pytest.raises(ValueError, match="there is no label 0, expected one of: 1, 2, 3"):
        generator.generate(1, [0])


def test_a_range_of_values_makes_no_images_of_vectors(saved):
    """They are clamped, and stay vectors."""
    saved(pixel_range=(0, 1))
    sample.main(["saved", "--model", "parts_of_a_test:Net", "--num", "6", "--out", "samples.npz"])
    samples = np.load("samples.npz")["arr_0"]
    assert samples.shape == (6, 2) and samples.dtype == np.float32 and samples.min() >= 0 and samples.max() <= 1


# -------------------------------------------------------------------------------------------------------- refusals


class Four(nn.Module):
    def forward(self, a, b, c, d):
        return a


class Rounded(Net):
    def forward(self, z):
        return super().forward(z).long()


class NoGradient(Net):
    def forward(self, z):
        return super().forward(z).detach()


STEP = torch.ones(4, 4)
REFUSALS = [
    (lambda: trainer_of(nn.Linear(3, 2)), "Linear does not say what noise it takes: give it an attribute noise_shape"),
    (lambda: trainer_of(nn.Linear(3, 2), noise_shape=(4,)), r"Linear \(z\) with z \[2, 4\] fails: RuntimeError"),
    (lambda: trainer_of(nn.Bilinear(3, 2, 2), noise_shape=(3,)), r"Bilinear \(z, y\) with z \[2, 3\] fails: "),
    (lambda: trainer_of(nn.LSTM(3, 2), noise_shape=(3,)), r"LSTM .* returns tuple, expected a tensor \[2, …\]"),
    (lambda: trainer_of(Four(), noise_shape=(3,)), r"Four takes \(a, b, c, d\), expected \(z\), \(z, y\) or"),
    (lambda: trainer_of(Net(2)).train_step(STEP), r"makes samples \[2\], the data have \[4\]"),
    (lambda: trainer_of(Net(4), feature_extractor="latent"), "is for images .C, H, W.: use 'input' or one of your own"),
    (lambda: trainer_of(Net(4), feature_extractor="conv"), "feature_extractor is 'conv', expected 'input'"),
    (lambda: trainer_of(Net(4), feature_extractor=lambda x: x.sum()).train_step(STEP), r"has shape \[\] and"),
    (
        lambda: trainer_of(Net(4), feature_extractor=lambda x: x.long()).train_step(STEP),
        "int64 for 2 samples, expected",
    ),
    (lambda: trainer_of(Net(4), feature_extractor=lambda x: {}).train_step(STEP), "returned no maps"),
    (lambda: trainer_of(Net(4), feature_extractor=lambda x: x.detach()).train_step(STEP), "no_grad"),
    (lambda: trainer_of(Net(4), activation_checkpointing=True), "Net has no attribute of that name"),
    (lambda: trainer_of(Net), "the network is <class .*Net'>, expected an instance of torch.nn.Module"),
    (lambda: trainer_of(nn.Linear(3, 2), noise_shape=(4.0,)), r"noise_shape is \(4.0,\), expected sizes of 1 or more"),
    (lambda: trainer_of(Rounded(2)), r"Rounded \(z\) with z \[2, 4\] returns torch.int64, expected floating-point"),
    (lambda: trainer_of(NoGradient(2)).train_step(STEP[:, :2]), "NoGradient have no gradient: its forward must not"),
    (lambda: trainer_of(Net(2).requires_grad_(False)), "Net has no parameters to train"),
    (lambda: trainer_of(Labelled(2, classes=2), class_names=[0, 1, 2]), r"and y \[0, 2\] fails: IndexError"),
    (lambda: trainer_of(Net(4), feature_extractor=lambda x: 1 / 0), r"samples \[2, 4\], fails: ZeroDivisionError"),
    (lambda: trainer_of(Net(4), class_names=[1, 1]), r"class_names is \[1, 1\], expected different"),
    (lambda: trainer_of(Labelled(4), class_names=[0, 1]).train_step(STEP), "no labels, expected 4 of"),
    (lambda: trainer_of(Labelled(4)).train_epoch(iter([(STEP, [n] * 4) for n in (0, 1)])), "create_trainer.class_n"),
    (lambda: drifting.generate(Labelled(2), 3), "takes labels and has no num_classes: give labels y"),
    (lambda: drifting.generate(Labelled(2), 3, torch.zeros(2).long()), r"y has shape \[2\], expected \[3\]"),
    (lambda: drifting.generate(Labelled(2), 3, torch.zeros(3).long(), torch.ones(2)), r"cfg_scale has shape \[2\]"),
]


@pytest.mark.parametrize("make, message", REFUSALS)
def test_what_does_not_fit_is_told_in_one_line(make, message):
    with pytest.raises((ValueError, UserError), match=message) as refusal:
        make()
    assert len(str(refusal.value).splitlines()) == 1


def test_an_unknown_argument_of_the_trainer():
    with pytest.raises(TypeError, match="unexpected keyword argument 'labels_per_steps'"):
        trainer_of(Net(2), labels_per_steps=3)


# ---------------------------------------------------------------------------------------------------------- resume


def test_a_run_of_a_network_with_dropout_and_buffers_goes_on_exactly():
    """Three steps and three more in another trainer are six, to the last bit; also a part at a time."""
    data = [(torch.randn(12, 3), torch.arange(12) % 3) for _ in range(6)]
    model = Labelled(3)
    whole, first, second = (trainer_of(deepcopy(model), labels_per_step=3, ema_decay=(0.5, 0.9)) for _ in range(3))
    for x, y in data:
        whole.train_step(x, y)
    for x, y in data[:3]:
        first.train_step(x, y)
    second.load_state_dict(first.state_dict())
    for x, y in data[3:]:
        second.train_step(x, y)
    for one, other in ((whole.model, second.model), (whole.ema_model, second.ema_model)):
        a, b = one.state_dict(), other.state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_dropout_is_the_same_in_both_passes_of_a_part():
    class Dropping(nn.Module):
        noise_shape = (4,)

        def __init__(self):
            super().__init__()
            self.net, self.seen = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), []

        def forward(self, z, y):
            self.seen.append(self.net(z).detach())
            return self.net[0](z) + y[:, None]

    trainer = trainer_of(Dropping(), labels_per_step=4, labels_at_once=2)
    trainer.model.seen.clear()
    trainer.train_step(torch.randn(12, 3), torch.arange(12) % 4)
    first, second, first_again, second_again = trainer.model.seen
    assert torch.equal(first, first_again) and torch.equal(second, second_again) and not torch.equal(first, second)
