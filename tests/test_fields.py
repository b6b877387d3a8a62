"""Fields by name and by key, temperatures that learn, and the experiment that compares couplings."""

import json
from dataclasses import fields

import pytest
import torch
from run_records import read_records
from torch import nn

import drift_ops
from drift_ops import Field
from drifting.config import load_config, save_config
from drifting.config.schema import FIELDS as NAMES
from drifting.config.schema import FieldConfig
from drifting.data import open_dataset
from drifting.errors import UserError
from drifting.experiments import couplings
from drifting.models import FIELDS, DriftingLoss
from drifting.models.fields import arguments_of
from drifting.train import build_trainer, train
from drifting.training import Ranks, create_trainer
from drifting.training.trainer import drift_of

SMALL = [
    "step.labels_per_step=3", "step.gen_per_label=6", "step.pos_per_label=5", "step.uncond_per_label=3",
    "step.queue_size=8", "train.batch_size=16", "train.log_every=1", "optimizer.cosine_decay=false",
    "model.width=16", "model.depth=1",
]  # fmt: skip


class Net(nn.Module):
    noise_shape = (3,)

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Linear(16, 4))

    def forward(self, z, y):
        return self.net(torch.cat([z, nn.functional.one_hot(y, 2).float()], 1))


def make_trainer(**settings):
    torch.manual_seed(0)
    sizes = {"gen_per_label": 6, "pos_per_label": 5, "uncond_per_label": 3, "queue_size": 8, "labels_per_step": 2}
    defaults = {"learning_rate": 1e-2, "warmup_steps": 0, "class_names": [0, 1], "feature_extractor": "input"}
    return create_trainer(Net(), device="cpu", **(defaults | sizes | settings))


def take(trainer, steps, first=0):
    random = [torch.Generator().manual_seed(step) for step in range(first, first + steps)]
    return [trainer.train_step(torch.randn(8, 4, generator=g), torch.arange(8) % 2) for g in random]


# ----------------------------------------------------------------------------------------------------------- keys


def test_names_and_keys_are_the_operators():
    assert tuple(FIELDS) == NAMES
    assert [key.name for key in fields(FieldConfig)][1:] == [key.name for key in fields(Field)]


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ([], {"field": Field(mask_self=100.0)}),
        (["loss.affinity_floor=1e-6"], FIELDS["release"]),
        (["step.groups=pairs"], FIELDS["one_positive"]),
        (["loss.field=wflow"], FIELDS["wflow"]),
        (["loss.field=wflow", "loss.field.iterations=5", "loss.normalize=none"],
         {"field": Field("l2_sq", "sinkhorn", "split", 5, "marginal", False), "normalize": None}),
        (["loss.field={coupling: row, mask_self: false}", "loss.scale=group", "loss.scale_self_pairs=false"],
         {"field": Field(coupling="row", mask_self=False), "scale": "group", "scale_self_pairs": False}),
        (["loss={field: release}"], FIELDS["release"]), (["loss.field=gaussian"], "gaussian"),
    ],
)  # fmt: skip
def test_what_a_configuration_asks_for(overrides, expected, tmp_path):
    config = load_config("digits", overrides)
    assert drift_of(config) == expected
    save_config(config, tmp_path / "config.yaml")
    assert load_config(str(tmp_path / "config.yaml")) == config


def test_a_command_line_that_names_another_field_starts_from_its_keys(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("loss: {field: {name: sinkhorn_split, iterations: 3}}\n")
    assert drift_of(load_config(str(file)))["field"].iterations == 3
    assert drift_of(load_config(str(file), ["loss.field=wflow"])) == FIELDS["wflow"]
    assert drift_of(load_config(str(file), ["loss.field.cost=l2_sq"]))["field"].iterations == 3


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["loss.field=laplace"], "loss.field.name is 'laplace', expected str, one of: paper, release"),
        (["loss.field.copling=row"], "unknown key 'loss.field.copling': did you mean 'loss.field.coupling'?"),
        (["loss.field={sides: 3.5x, coupling: [row]}"], "loss.field.coupling is .*, expected str"),
        (["loss.field.coupling=rows"], "loss.field.coupling: got 'rows', expected one of 'row'"),
        (["loss.field.coupling=sinkhorn"], "loss.field.weights: got 'affinity' with coupling='sinkhorn'"),
        (["loss.field.iterations=0"], "loss.field.iterations: got 0, expected at least 1"),
        (["loss.field.mask_self=maybe"], r"loss.field.mask_self is 'maybe', expected float \| bool, or null"),
        (["loss.scale=groups"], "loss.scale is 'groups', expected str, one of: global, group"),
        (["loss.field=gaussian", "loss.field.sides=split"], "loss.field is gaussian, which has none of the keys sides"),
        (["loss.field=gaussian", "loss.learn_temperature=true"], "temperatures of field='gaussian' do not learn"),
    ],
)
def test_mistakes_end_in_one_line(overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        config = load_config("digits", overrides)
        build_trainer(config, open_dataset(config.data), Ranks())
    assert "\n" not in str(caught.value)


def test_the_release_keeps_its_kernels():
    """A field that is given by name makes the operator report details, which its fastest paths do not have."""
    assert arguments_of(FIELDS["release"]) == {"affinity_floor": 1e-6}
    assert "field" not in arguments_of(FIELDS["one_positive"]) and "field" in arguments_of(FIELDS["wflow"])


def test_a_script_may_give_a_field():
    for given in (Field(coupling="row"), {"coupling": "row", "mask_self": True}):
        assert make_trainer(field=given).loss_fn.drift == {"field": Field(coupling="row")}
    assert make_trainer(field="wflow").loss_fn.drift == FIELDS["wflow"]


# ---------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at_once", [None, 1])
def test_every_field_trains(name, at_once):
    """With guidance, where the field has it, and in parts, which is the same step."""
    scales = (1.0, 1.0) if name == "gaussian" else (1.0, 3.0)
    settings = {"field": name, "cfg_scale_range": scales, "uncond_prob": 0.5}
    if name == "gaussian" and at_once:
        return
    whole, parts = make_trainer(**settings), make_trainer(labels_at_once=at_once, **settings)
    for a, b in zip(take(whole, 3), take(parts, 3), strict=True):
        assert a.keys() == b.keys() and a["grad_norm"] > 0
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-6)


def test_the_second_batch_repels_in_place_of_the_first(monkeypatch):
    calls, original = [], drift_ops.drift_loss
    monkeypatch.setattr(drift_ops, "drift_loss", lambda *a, **k: calls.append((a, k)) or original(*a, **k))
    take(make_trainer(field="wflow", cfg_scale_range=(2.0, 3.0)), 1)
    ((gens, _, negs), keywords) = calls[0]
    assert gens[0].shape == (2, 1, 6, 4) and negs[0].shape == (2, 1, 6 + 3, 4) and not negs[0].requires_grad
    assert not torch.equal(gens[0], negs[0][:, :, :6]) and (keywords["weight_neg"][0][..., :6] == 1).all()


def test_groups_have_a_scale_and_a_normalisation_of_their_own():
    x, y = torch.randn(3, 5, 4, requires_grad=True), torch.randn(3, 6, 4)
    options = {"field": Field(mask_self=100.0), "scale": "group", "normalize": "group"}
    loss, info = DriftingLoss("input", (0.2, 0.5), field=options).loss_and_info(x, y)
    expected, of_groups = drift_ops.drift_loss(
        x, y, R_list=(0.2, 0.5), affinity_floor=0.0, scale="group", normalize="group"
    )
    torch.testing.assert_close(loss, expected.mean())
    torch.testing.assert_close(info["input/scale"], of_groups["scale"].mean())
    torch.testing.assert_close(info["input/lambda_0.5"], of_groups["loss_0.5"].sqrt().mean())


def test_gaussian_runs_from_the_command_line(tmp_path):
    one = ["loss.field=gaussian", "loss.temperatures=[0.5]", "guidance.cfg_scale_range=[1,1]", "train.steps=2"]
    train(load_config("digits", [*SMALL, *one]), tmp_path)
    assert read_records(tmp_path)[-1]["drift"]["pixels"] > 0


# --------------------------------------------------------------------------------------------------- temperatures


def test_temperatures_learn_as_kyutais():
    """The loss is theirs, and the temperatures of each map have an optimizer of their own."""
    trainer = make_trainer(
        field="one_positive",
        learn_temperature=True,
        temperatures=(0.2, 0.5),
        feature_extractor=["input", lambda x: x[:, :2]],
    )
    assert trainer.loss_fn.log_R.shape == (2, 2)
    metrics = take(trainer, 4)
    assert metrics[0]["input/temperature_0.2"].item() == pytest.approx(0.2)
    names = [name for name in metrics[-1] if "/temperature_" in name]
    assert len(names) == 4 and all(metrics[0][name] != metrics[-1][name] for name in names)
    assert {name.partition("/")[2] for name in metrics[0] if "lambda_" in name} == {"lambda_0.2", "lambda_0.5"}

    x, y, R = torch.randn(2, 6, 4), torch.randn(2, 5, 4), trainer.loss_fn.log_R.detach().exp()
    loss, _ = trainer.loss_fn.loss_and_info(x, y)
    expected = 0
    for width, of_map in zip(R, (slice(None), slice(2)), strict=True):
        losses, info = drift_ops.drift_loss(
            x[..., of_map], y[..., of_map], R_list=width, scale="group", scale_self_pairs=False, normalize="group_mean"
        )
        expected = expected + losses.mean() - info["log_mass"].amax(-1).mean()
    torch.testing.assert_close(loss, expected)


def test_steps_in_parts_teach_temperatures_the_same():
    settings = {"field": "wflow", "learn_temperature": True, "temperatures": (0.2,), "cfg_scale_range": (1.0, 1.0)}
    whole, parts = make_trainer(**settings), make_trainer(labels_at_once=1, **settings)
    take(whole, 3), take(parts, 3)
    torch.testing.assert_close(whole.loss_fn.log_R, parts.loss_fn.log_R, rtol=1e-5, atol=1e-6)


LEARNING = [
    "loss.learn_temperature=true",
    "loss.temperatures=[0.3]",
    "loss.field=one_positive",
    "guidance.uncond_prob=0.5",
]


def test_learnt_temperatures_are_saved_and_resumed(tmp_path):
    """A run that goes on from its checkpoint is one that never stopped; file and log have what was learnt."""
    overrides = [*SMALL, *LEARNING, "train.save_every=2"]
    train(load_config("digits", [*overrides, "train.steps=4"]), tmp_path / "whole")
    train(load_config("digits", [*overrides, "train.steps=2"]), tmp_path / "parts")
    train(load_config("digits", [*overrides, "train.steps=4"]), tmp_path / "parts")
    whole, parts = (read_records(tmp_path / name) for name in ("whole", "parts"))
    assert [record["temperature"] for record in whole] == [record["temperature"] for record in parts]
    assert whole[-1]["loss"] == parts[-1]["loss"] and set(whole[0]["lambda"]["pixels"]) == {"0.3"}
    for folder in ("whole", "parts", "whole/best"):
        learnt = json.loads((tmp_path / folder / "model.json").read_text())["temperatures"]["pixels"]
        assert len(learnt) == 1 and 0 < learnt[0] != 0.3
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


# ---------------------------------------------------------------------------------------------------- experiment


def test_couplings_side_by_side(tmp_path, capsys):
    assert couplings.main(["--seconds", "0", "--out", str(tmp_path)]) == 0
    table = (tmp_path / "table.txt").read_text()
    assert table in capsys.readouterr().out and (tmp_path / "couplings.png").stat().st_size > 10_000
    assert [line.split("  ")[0] for line in table.splitlines()[1:]] == list(couplings.METHODS)
    with pytest.raises(UserError, match="--seconds is -1.0, expected 0 or more"):
        couplings.main(["--seconds=-1"])


def test_the_right_mode_has_a_tenth():
    points = couplings.unbalanced(4000, torch.Generator().manual_seed(0))
    assert 0.07 < (points[:, 0] > 0).float().mean() < 0.13
