"""Configurations: what a mistake is answered with, and that a good one arrives."""

import dataclasses
import inspect

import pytest

from drifting.cli import UserError
from drifting.config import CONFIG_DIR, Config, changed_keys, flatten, load_config, save_config
from drifting.data import DataConfig
from drifting.models import DriftingDiT
from drifting.training import create_trainer


def test_overrides_arrive():
    config = load_config(
        "digits", ["seed=7", "train.steps=12", "optimizer.learning_rate=1e-3", "loss.temperatures=[0.1,1]"]
    )
    assert (config.seed, config.train.steps, config.optimizer.learning_rate) == (7, 12, 1e-3)
    assert config.loss.temperatures == [0.1, 1.0]


def test_data_may_be_named_without_its_section(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("data: fashion_mnist\n")
    assert load_config(str(file)) == load_config(str(file), ["data.name=fashion_mnist"])
    config = load_config(str(file), ["data=cifar10", "data.path=/there", "data.flip=true", "data.image_size=16"])
    assert config.data == DataConfig("cifar10", "/there", 16, flip=True)
    with pytest.raises(UserError, match="data.image_size is 'big', expected int | None"):
        load_config("digits", ["data.image_size=big"])


@pytest.mark.parametrize("path", sorted(CONFIG_DIR.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_load(path):
    assert isinstance(load_config(path.stem), Config)


def test_round_trip(tmp_path):
    config = load_config("digits", ["seed=3", "optimizer.cosine_decay=false"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(str(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize(
    "override, key",
    [("train.stepz=5", "train.steps"), ("steps=5", "train.steps"), ("tain.log_every=5", "train.log_every"),
     ("lr=1", None), ("learningrate=1", "optimizer.learning_rate"), ("sed=1", "seed"),
     ("train.steps.x=1", "train.steps"), ("model.embeddim=4", "model.embed_dim"), ("optimizer.steps=4", "train.steps")],
)  # fmt: skip
def test_unknown_key_names_the_nearest(override, key):
    with pytest.raises(UserError, match="unknown key.*did you mean") as caught:
        load_config("digits", [override])
    assert key is None or f"did you mean {key!r}?" in str(caught.value)


@pytest.mark.parametrize(
    "override, expected",
    [("train.steps=many", "train.steps is 'many', expected int"), ("train.steps=2.5", "expected int"),
     ("train.steps=true", "expected int"), ("train.steps=", "expected int"), ("train.steps=[1]", "expected int"),
     ("optimizer.learning_rate=fast", "expected float"), ("optimizer.cosine_decay=perhaps", "expected bool"),
     ("loss.temperatures=0.1", r"expected list\[float\], for example \[0.02, 0.05, 0.2\]"),
     ("loss.temperatures=[a]", r"expected list\[float\]"), ("seed=${nowhere}", "expected int"),
     ("train=5", "train is a section, set one of its keys: train.steps"),
     ("seed", "expected key=value"), ("seed=[1", "not valid YAML")],
)  # fmt: skip
def test_ill_typed_value_says_what_was_expected(override, expected):
    with pytest.raises(UserError, match=expected):
        load_config("digits", [override])


@pytest.mark.parametrize(
    "override, expected",
    [("train.steps=0", "train.steps is 0, expected 1 or more"), ("train.eval_every=-1", "expected 0 or more"),
     ("optimizer.learning_rate=-1", "expected a positive number"), ("optimizer.learning_rate=nan", "a positive"),
     ("guidance.uncond_prob=2", "from 0 to 1"), ("data=mnst", "data.name is mnst, expected one of: digits, mnist"),
     ("data.image_size=0", "1 or more"), ("data.workers=-1", "0 or more"), ("seed=-1", "0 or more"),
     ("loss.feature_extractor=pixel", "expected one of: latent, pixels"), ("loss.temperatures=[]", "positive numbers"),
     ("loss.temperatures=[0.1,0]", "positive numbers"), ("guidance.cfg_scale_range=[0.5,2]", "least"),
     ("guidance.cfg_scale_range=[1]", "least"), ("model.embed_dim=30", "a multiple of")],
)  # fmt: skip
def test_value_out_of_range_is_named(override, expected):
    with pytest.raises(UserError, match=f"{override.partition('=')[0]} is .*{expected}|{expected}"):
        load_config("digits", [override])


def test_mistakes_in_files_name_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train:\n  step: 5\n")
    with pytest.raises(UserError, match=r"mine.yaml: unknown key 'train.step': did you mean 'train.steps'"):
        load_config(str(file))
    file.write_text("train: [")
    with pytest.raises(UserError, match="mine.yaml is not valid YAML"):
        load_config(str(file))
    file.write_text("- 1\n")
    with pytest.raises(UserError, match="holds a list"):
        load_config(str(file))
    file.write_text("")
    assert load_config(str(file)) == Config()
    with pytest.raises(UserError, match="no configuration file"):
        load_config(str(tmp_path / "absent.yaml"))
    with pytest.raises(UserError, match="expected a .yaml file or one of: digits"):
        load_config("digit")


def test_only_length_and_intervals_may_change():
    old = load_config("digits")
    free = ["data.path=elsewhere", "data.workers=9", "train.steps=9"]
    free += ["train.log_every=9", "train.save_every=9", "train.eval_every=9"]
    assert changed_keys(old, load_config("digits", free)) == []
    (change,) = changed_keys(old, load_config("digits", [*free, "step.gen_per_label=9"]))
    assert change == f"step.gen_per_label: {old.step.gen_per_label}, now 9"


def test_sections_hold_arguments_that_exist():
    """The sections are passed on as keyword arguments, so each of their keys must be one."""
    config = Config()
    assert set(vars(config.model)) <= set(inspect.signature(DriftingDiT).parameters)
    passed = set(flatten(dataclasses.asdict(config))) - {"seed", "optimizer.cosine_decay"}
    names = {key.partition(".")[2] for key in passed if key.split(".")[0] not in ("data", "model", "train")}
    assert names <= set(inspect.signature(create_trainer).parameters)
