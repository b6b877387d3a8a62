"""Configurations: what a mistake is answered with, and that a good one arrives."""

import dataclasses
import inspect

import pytest
import torch

from drifting.config.reading import (
    CONFIG_DIR,
    changed_keys,
    flatten,
    load_config,
    load_pretrain_config,
    read_config,
    save_config,
)
from drifting.config.schema import Config, DataConfig, PretrainConfig
from drifting.data import open_dataset
from drifting.errors import UserError
from drifting.models import MAE, DriftingDiT
from drifting.train import build_trainer
from drifting.training import MAETrainer, create_trainer
from drifting.training.distributed import Ranks

GENERATORS = {  # configuration: channels, size and classes of its data, parameters
    "digits": ((1, 8, 10), None),
    "fashion_mnist": ((1, 28, 10), None),
    "cifar10": ((3, 32, 10), None),
    "ablation": ((4, 32, 1000), 133e6),
    "latent_B": ((4, 32, 1000), 133e6),
    "latent_L": ((4, 32, 1000), 463e6),
    "pixel_B": ((3, 256, 1000), 134e6),
    "pixel_L": ((3, 256, 1000), 464e6),
}
ENCODERS = {
    "mae_fashion_mnist": (1, 28, 10), "mae_cifar10": (3, 32, 10), "mae_256": (4, 32, 1000),
    "mae_640": (4, 32, 1000), "mae_pixel": (3, 256, 1000),
}  # fmt: skip


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


def test_every_shipped_configuration_is_tested():
    assert {path.stem for path in CONFIG_DIR.glob("*.yaml")} == GENERATORS.keys() | ENCODERS.keys()


@pytest.mark.parametrize("name", GENERATORS)
def test_shipped_generators_build(name):
    (channels, size, classes), parameters = GENERATORS[name]
    with torch.device("meta"):
        model = DriftingDiT(size, in_chans=channels, num_classes=classes, **vars(load_config(name).model))
    if parameters is not None:  # the paper's count
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, abs=0.5e6)


@pytest.mark.parametrize("name", ENCODERS)
def test_shipped_encoders_build(name):
    channels, size, classes = ENCODERS[name]
    with torch.device("meta"):
        model = MAE(channels, num_classes=classes, **vars(load_pretrain_config(name).model))
        mask = model.random_mask(torch.empty(2, channels, size, size))
    grid = size // model.encoder.input_patch_size
    assert mask.shape == (2, 1, grid, grid)


@pytest.mark.parametrize(
    "name, schema, overrides",
    [("digits", Config, ["seed=3", "optimizer.cosine_decay=false", "loss.feature_extractor=[latent,pixels]"]),
     ("mae_fashion_mnist", PretrainConfig, ["loss.mask_ratio_range=[0.5,0.5]", "model.layers=[1,2,1,2]"])],
)  # fmt: skip
def test_round_trip(name, schema, overrides, tmp_path):
    config = read_config(name, overrides, schema)
    save_config(config, tmp_path / "config.yaml")
    assert read_config(str(tmp_path / "config.yaml"), (), schema) == config


def test_feature_extractors_are_one_or_several():
    assert load_config("digits", ["loss.feature_extractor=latent"]).loss.feature_extractor == ["latent"]
    several = ["loss.feature_extractor=[pixels,mae]", "loss.mae=runs/mae"]
    assert load_config("digits", several).loss.feature_extractor == ["pixels", "mae"]
    for overrides in (["loss.feature_extractor=mae"], ["loss.mae=runs/mae"]):
        with pytest.raises(UserError, match="expected both or neither to name a masked autoencoder"):
            load_config("digits", overrides)


def test_the_large_ones_are_computed_as_the_release_does():
    for name, (_, parameters) in GENERATORS.items():
        step, large = load_config(name).step, parameters is not None
        assert (step.bf16, step.compile) == (large, large)
        assert step.activation_checkpointing == (not step.clamp) == name.startswith("pixel")
    for name in ENCODERS:
        config, large = load_pretrain_config(name), name in ("mae_256", "mae_640", "mae_pixel")
        assert config.step.bf16 == config.data.crop == large
        assert config.step.latents == (name in ("mae_256", "mae_640"))


def test_pixels_are_clamped_unless_the_configuration_says_otherwise():
    overrides = ["model.embed_dim=16", "model.depth=1", "model.num_heads=2"]
    for clamp, expected in (("true", (-1, 1)), ("false", None)):
        config = load_config("digits", [*overrides, f"step.clamp={clamp}"])
        assert build_trainer(config, open_dataset(config.data), Ranks()).pixel_range == expected


def test_a_list_may_be_given_as_its_only_entry():
    assert load_config("digits", ["optimizer.ema_decay=0.5"]).optimizer.ema_decay == [0.5]
    assert load_config("digits", ["optimizer.ema_decay=[0.5,0.9]"]).optimizer.ema_decay == [0.5, 0.9]
    assert load_config("digits", ["evaluation.cfg_scales=2"]).evaluation.cfg_scales == [2.0]
    with pytest.raises(UserError, match="expected float"):
        load_pretrain_config("mae_256", ["optimizer.ema_decay=[0.5,0.9]"])


def test_configurations_of_the_other_kind_are_told_apart():
    with pytest.raises(UserError, match="no configuration 'digits': expected a .yaml file or one of: mae_256"):
        load_pretrain_config("digits")
    with pytest.raises(UserError, match="no configuration 'mae_256'"):
        load_config("mae_256")


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
     ("loss.temperatures=a", r"is 'a', expected list\[float\], for example \[0.02, 0.05, 0.2\]"),
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
     ("loss.feature_extractor=[]", "or a list of them"), ("loss.feature_extractor=[pixels,pixels]", "or a list"),
     ("loss.temperatures=[0.1,0]", "positive numbers"), ("guidance.cfg_scale_range=[0.5,2]", "least"),
     ("optimizer.ema_decay=[0.9,2]", "from 0 to 1"), ("optimizer.ema_decay=[0.9,0.9]", "several different ones"),
     ("optimizer.ema_decay=[]", "from 0 to 1"), ("guidance.cfg_scale_range=1", "least"),
     ("guidance.cfg_scale_range=[1]", "least"), ("model.embed_dim=30", "a multiple of"),
     ("step.queue_device=disk", "cpu, cuda, or null"), ("train.max_skipped_steps=-1", "0 or more")],
)  # fmt: skip
def test_value_out_of_range_is_named(override, expected):
    with pytest.raises(UserError, match=f"{override.partition('=')[0]} is .*{expected}|{expected}"):
        load_config("digits", [override])


@pytest.mark.parametrize(
    "override, expected",
    [("loss.mask_ratio_range=[0,0.5]", "least"), ("loss.lambda_cls=2", "from 0 to 1"),
     ("model.layers=[1,1,1]", "four numbers"), ("model.base_channels=0", "1 or more"),
     ("loss.finetune_steps=-1", "0 or more"), ("model.embed_dim=4", "unknown key")],
)  # fmt: skip
def test_values_of_encoders_are_checked_too(override, expected):
    with pytest.raises(UserError, match=f"{override.partition('=')[0]}.*{expected}|{expected}"):
        load_pretrain_config("mae_fashion_mnist", [override])


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
    with pytest.raises(UserError, match="expected a .yaml file or one of: ablation, cifar10, digits"):
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
    passed = set(flatten(dataclasses.asdict(config))) - {"seed", "optimizer.cosine_decay", "loss.mae", "step.clamp"}
    others = ("data", "model", "train", "evaluation")
    names = {key.partition(".")[2] for key in passed if key.split(".")[0] not in others}
    assert names <= set(inspect.signature(create_trainer).parameters)
    pretraining = PretrainConfig()
    assert set(vars(pretraining.model)) <= set(inspect.signature(MAE).parameters)
    names = {name for part in (pretraining.loss, pretraining.step, pretraining.optimizer) for name in vars(part)}
    assert names <= set(inspect.signature(MAETrainer).parameters)
