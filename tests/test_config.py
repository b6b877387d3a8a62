"""Configurations: what a mistake is answered with, and that a good one arrives."""

import inspect
import json
import sys
import time
from dataclasses import fields

import pytest
import torch

from drifting.cli import parse_training_command
from drifting.config import Config, DataConfig, PretrainConfig, load_config, read_config, save_config
from drifting.config.changes import FREE, NEVER, config_in_force, differences, keep_config, recorded, resume_of
from drifting.config.keys import expected_of, key_help, keys_of
from drifting.config.reading import CONFIG_DIR, MOST_BYTES, values_of
from drifting.data import open_dataset, training_batches
from drifting.errors import UserError
from drifting.models import MAE, NETWORKS, DriftingDiT
from drifting.train import build_trainer
from drifting.training.distributed import Ranks
from drifting.utils.named import facts_taken


def load_pretrain_config(name: str = "mae_fashion_mnist", overrides=()) -> PretrainConfig:
    return read_config(name, overrides, PretrainConfig)


def build(overrides):
    """The trainer of the digits with these values, and what a user gets to read where it cannot be built."""
    small = ["model=drifting_dit", "model.embed_dim=16", "model.depth=1", "model.num_heads=2"]
    config = load_config("digits", [*small, *overrides])
    return build_trainer(config, open_dataset(config.data), Ranks())


def changes(old, new) -> list[str]:
    return [f"{key}: {was}, now {now}" for key, was, now in differences(values_of(old), values_of(new))]


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
    ((channels, size, classes), parameters), config = GENERATORS[name], load_config(name).model
    facts = {"img_size": size, "in_chans": channels, "num_classes": classes, "sample_shape": (channels, size, size)}
    network = NETWORKS[config.name]
    with torch.device("meta"):
        model = network(**facts_taken(network, facts), **config.keywords())
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
            build(overrides)


def test_the_large_ones_are_computed_as_the_release_does():
    for name, (_, parameters) in GENERATORS.items():
        step, large = load_config(name).step, parameters is not None
        assert (step.bf16, step.compile) == (large, large)
        assert step.activation_checkpointing == (not step.clamp) == name.startswith("pixel")
    for name in ENCODERS:
        config, large = load_pretrain_config(name), name in ("mae_256", "mae_640", "mae_pixel")
        assert config.step.bf16 == config.data.crop == large
        assert config.step.latents == (name in ("mae_256", "mae_640"))


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
     ("train.steps.x=1", "train.steps"), ("optimizer.steps=4", "train.steps"),
     ("loss.temperature=4", "loss.temperatures")],
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
     ("loss.temperatures=a", r"is 'a', expected list\[float\], a positive .*, for example \[0.02, 0.05, 0.2\]"),
     ("loss.temperatures=[a]", r"expected list\[float\]"), ("seed=${nowhere}", "expected int"),
     ("train=5", "train is a section, set one of its keys: train.steps"),
     ("seed", "expected key=value"), ("seed=[1", "not valid YAML")],
)  # fmt: skip
def test_ill_typed_value_says_what_was_expected(override, expected):
    with pytest.raises(UserError, match=expected):
        load_config("digits", [override])


@pytest.mark.parametrize(
    "override, expected",
    [("train.steps=0", "train.steps is 0, expected int, 1 or more"), ("train.eval_every=-1", "expected int, 0 or more"),
     ("optimizer.learning_rate=-1", "expected float, a positive number"), ("optimizer.learning_rate=nan", "a positive"),
     ("guidance.uncond_prob=2", "from 0 to 1"),
     ("data=mnst", "data.name is 'mnst', expected str, one of: digits, mnist"),
     ("data.image_size=0", "1 or more"), ("data.workers=-1", "0 or more"), ("seed=-1", "0 or more"),
     ("loss.feature_extractor=pixel", r"expected list\[str\], one of: latent, input"),
     ("loss.temperatures=[]", "a positive number"),
     ("loss.feature_extractor=[]", "or a list of"), ("loss.feature_extractor=[pixels,pixels]", "or a list"),
     ("loss.temperatures=[0.1,0]", "a positive number"), ("guidance.cfg_scale_range=[0.5,2]", "least"),
     ("optimizer.ema_decay=[0.9,2]", "from 0 to 1"), ("optimizer.ema_decay=[0.9,0.9]", "a list of different ones"),
     ("optimizer.ema_decay=[]", "from 0 to 1"), ("guidance.cfg_scale_range=1", "least"),
     ("guidance.cfg_scale_range=[1]", "least"),
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


def test_sizes_of_the_network_that_do_not_fit_each_other_are_refused():
    for overrides in (["model.embed_dim=30"], ["model.embed_dim=20", "model.num_heads=4"]):
        with pytest.raises(UserError, match="there is no DriftingDiT of the arguments .*: ValueError: .*embed_dim"):
            build(overrides)


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
    file.write_text("train:\n  steps: 0\n")
    with pytest.raises(UserError, match="mine.yaml: train.steps is 0, expected int, 1 or more, for example 30000"):
        load_config(str(file))
    assert load_config(str(file), ["train.steps=5"]).train.steps == 5
    with pytest.raises(UserError, match="there is no configuration '.*absent.yaml'"):
        load_config(str(tmp_path / "absent.yaml"))
    with pytest.raises(UserError, match="expected a .yaml file or one of: ablation, cifar10, digits"):
        load_config("digit")


def test_only_length_and_intervals_may_change():
    old = load_config("digits")
    free = ["data.path=elsewhere", "data.workers=9", "train.steps=9"]
    free += ["train.log_every=9", "train.save_every=9", "train.eval_every=9"]
    assert changes(old, load_config("digits", free)) == []
    (change,) = changes(old, load_config("digits", [*free, "step.gen_per_label=9"]))
    assert change == f"step.gen_per_label: {old.step.gen_per_label}, now 9"


def test_sections_hold_arguments_that_exist():
    """The sections of networks are passed on as keyword arguments, so each of their keys must be one."""
    assert set(Config().model.keywords()) <= set(inspect.signature(DriftingDiT).parameters)
    assert set(vars(PretrainConfig().model)) <= set(inspect.signature(MAE).parameters)


# The schema


@pytest.mark.parametrize("schema", [Config, PretrainConfig])
def test_every_key_stands_in_the_help_with_type_default_range_and_sentence(schema):
    text = key_help(schema)
    assert max(map(len, text.splitlines())) <= 100
    words = " ".join(text.split())
    defaults = values_of(schema())
    for section in fields(schema):
        assert section.metadata["sentence"] in words
    for key, field in keys_of(schema).items():
        assert field.metadata["sentence"] in words and field.metadata["sentence"][-1] == "."
        assert f"({expected_of(field)})" in words and f" {key}=" in words and key in defaults
    assert "train.steps=30000 (int, 1 or more) Training ends after this many steps." in words


def test_plain_values_are_those_of_yaml_1_2(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "optimizer: {learning_rate: 1e-3, max_grad_norm: 2, weight_decay: 3.0e-3}\ntrain: {steps: 30_000}\n"
        "data: {path: 2020-01-01, subset: 007, label_column: on, image_size: ~}\n"
    )
    config = load_config(str(file))
    assert config.optimizer.learning_rate == 1e-3 and config.optimizer.weight_decay == 3e-3
    assert type(config.optimizer.max_grad_norm) is float and config.train.steps == 30000
    data = config.data
    assert (data.path, data.subset, data.label_column, data.image_size) == ("2020-01-01", "007", "on", None)
    config.data.path, config.train.wandb = "1e-3", "null"
    save_config(config, file)
    assert load_config(str(file)) == config


@pytest.mark.parametrize(
    "text, expected",
    [("train: {steps: 5}\ntrain: {steps: 6}", "train 2 times"), ("a: &a 1\nb: *a", "aliases"),
     ("[" * 5000, "valid YAML"),
     ("seed: !!python/object/apply:os.system [true]", "could not determine a constructor"), ("\0", "valid YAML"),
     ("seed: ${oc.env:HOME}", "seed is '..oc.env:HOME.', expected int"), ("text", "holds a str"),
     ("x: " + "y" * MOST_BYTES, f"more than {MOST_BYTES} bytes"), ("? [1, 2]\n: 3", "valid YAML"),
     ("seed: 1" + "0" * 5000, "valid YAML"), ("1: 2", "unknown key '1'"), ("train: {steps: {a: 1}}", "expected int")],
)  # fmt: skip
def test_files_that_are_no_configuration_end_in_one_line(tmp_path, text, expected):
    file, started = tmp_path / "mine.yaml", time.monotonic()
    file.write_text(text)
    with pytest.raises(UserError, match=expected) as caught:
        load_config(str(file))
    assert "\n" not in str(caught.value) and str(file) in str(caught.value) and time.monotonic() - started < 10


# Parts of the user's own


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The current folder, with a module ``own_of_test``."""
    (tmp_path / "own_of_test.py").write_text(
        "class ConvNet:\n    def __init__(self, num_classes=4, width=16, path=None): ...\n"
        "class Anything:\n    def __init__(self, **arguments): ...\n"
        "def data(path, flip=False, config=None): ...\n"
        "number, seen = 3, []\n"
        "def spy(x):\n    seen.append(float(x.detach().abs().max()))\n    return x.flatten(1)\n"
    )
    (tmp_path / "own_broken.py").write_text("import not_there\n")
    (tmp_path / "own_exit.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("own_of_test", None)


def test_keys_of_own_parts_are_their_arguments(own):
    config = load_config(
        "cifar10",
        ["model.width=24", "model=own_of_test:ConvNet", "model.path=p", "data=own_of_test:data", "data.workers=2",
         "data.path=there", "data.flip=true", "loss.mae=null", "loss.feature_extractor=[input,own_of_test:Anything]"],
    )  # fmt: skip
    assert config.model.name == "own_of_test:ConvNet" and config.model.arguments == {"width": 24, "path": "p"}
    assert config.model.keywords() == config.model.arguments
    assert config.data.arguments == {"path": "there", "flip": True} and config.data.workers == 2
    assert config.data.path is None and not config.data.flip
    assert config.loss.feature_extractor == ["input", "own_of_test:Anything"]


def test_own_parts_survive_the_round_trip(own):
    overrides = ["model=own_of_test:Anything", "model.width=24", "model.rate=1e-3", "model.sizes=[1,2]",
                 "model.table={a: {b: null}}", "model.depth=3", "model.text='1'", "data=own_of_test:data"]  # fmt: skip
    config, file = load_config("digits", overrides), own / "config.yaml"
    assert config.model.arguments == {
        "width": 24, "rate": 1e-3, "sizes": [1, 2], "table": {"a": {"b": None}}, "depth": 3, "text": "1",
    }  # fmt: skip
    save_config(config, file)
    assert load_config(str(file)) == config
    text = file.read_text()
    assert "width: 24" in text and "embed_dim" not in text and "arguments" not in text and "image_size" not in text


def test_another_network_starts_from_its_own_defaults(own):
    file = own / "mine.yaml"
    file.write_text("model: {name: own_of_test:ConvNet, width: 3}\ndata: {name: own_of_test:data, path: p}\n")
    assert load_config(str(file), ["model.path=q"]).model.arguments == {"width": 3, "path": "q"}
    assert load_config(str(file), ["model=own_of_test:Anything", "model.a=1"]).model.arguments == {"a": 1}
    config = load_config(str(file), ["model=drifting_dit", "data=digits"])
    assert (config.model, config.data) == (Config().model, Config().data)
    config = load_config("digits", ["model=residual_mlp", "model.depth=2"])  # the same network
    assert config.model.arguments == {"width": 128, "depth": 2}
    assert load_config("digits", ["model=drifting_dit", "model.depth=3"]).model.embed_dim == Config().model.embed_dim
    assert load_config("ablation", ["model=conv_decoder"]).model.arguments == {}


@pytest.mark.parametrize(
    "overrides, expected",
    [(["model=own_of_test:ConvNet", "model.widht=24"], "key model.widht: ConvNet has no .* widht; did you mean width?"),
     (["data=own_of_test:data", "data.fip=1"], "unknown key data.fip: data has no .*; did you mean flip?"),
     (["model=own_of_test:ConvNt"], "model.name is own_of_test:ConvNt, but .* did you mean ConvNet?"),
     (["model=own_of_test:number"], "no class or function number"),
     (["model=own_absent:Net"], "the module own_absent cannot be imported from .*No module named"),
     (["model=own_broken:Net"], "cannot be imported .*not_there"), (["model=own_exit:Net"], "cannot be imported"),
     (["model=:Net"], "cannot be imported"), (["loss.feature_extractor=own_of_test:Rows"], "loss.feature_extractor is"),
     (["model=convnet", "model.width=24"], "name is 'convnet', expected str, one of: drifting_dit, .*, or module:Name"),
     (["model=drifting_dit", "model.width=24"], "unknown key 'model.width'"), (["model=[a]"], "expected str")],
)  # fmt: skip
def test_mistakes_about_own_parts_end_in_one_line(own, overrides, expected):
    with pytest.raises(UserError, match=expected) as caught:
        config = load_config("digits", overrides)
        build_trainer(config, open_dataset(config.data), Ranks())
    assert "\n" not in str(caught.value)


def test_nothing_is_imported_for_a_file(own):
    file = own / "config.yaml"
    file.write_text(
        "model: {name: own_exit:Net, width: 3}\ndata: own_broken:data\nloss: {feature_extractor: [own_exit:F]}\n"
    )
    config = read_config(str(file), (), Config)
    assert config.model.name == "own_exit:Net" and config.model.arguments == {"width": 3}
    assert config.data.name == "own_broken:data" and config.loss.feature_extractor == ["own_exit:F"]
    assert not {"own_exit", "own_broken"} & set(sys.modules)


def test_pixels_are_clamped_unless_the_configuration_says_otherwise(own):
    for clamp in (True, False):
        config = load_config(
            "digits",
            ["model=drifting_dit",
             "model.embed_dim=16", "model.depth=1", "model.num_heads=2", "loss.feature_extractor=own_of_test:spy",
             f"step.clamp={clamp}"],
        )  # fmt: skip
        dataset = open_dataset(config.data)
        trainer = build_trainer(config, dataset, Ranks())
        torch.nn.init.constant_(trainer.model.final.proj.bias, 3.0)
        sys.modules["own_of_test"].seen.clear()
        trainer.train_step(*next(training_batches(dataset.train, 128, seed=0, stored=True)))
        assert max(sys.modules["own_of_test"].seen) == (1 if clamp else pytest.approx(3, abs=0.5))


# Changes of a run in progress


def test_asked_changes_are_recorded_and_stay_in_force(tmp_path):
    path, command, rate = tmp_path / "config.yaml", load_config("digits"), "optimizer.learning_rate"
    assert recorded(path) == [] and config_in_force(path, command) == command
    keep_config(path, command, 0)
    assert recorded(path) == []

    lower = load_config("digits", [f"{rate}=1e-3", "train.steps=900"])  # the number of steps is free
    assert changes(command, lower) == ["optimizer.learning_rate: 0.002, now 0.001"]
    with pytest.raises(UserError, match="holds a run with another .*learning_rate: 0.002, now 0.001.*say --change"):
        config_in_force(path, lower)
    released, one = [0.02, 0.05, 0.2], [0.1]
    for step, value, temperatures in ((40, 1e-3, released), (60, 1e-3, one), (80, 2e-3, one), (90, 1e-4, one)):
        config = load_config("digits", [f"{rate}={value}", f"loss.temperatures={temperatures}"])
        config = config_in_force(path, config, [rate, "loss.temperatures"])
        keep_config(path, config, step)
        assert load_config(str(path)) == config
    assert recorded(path) == [
        {"step": 40, "key": rate, "old": 2e-3, "new": 1e-3},
        {"step": 60, "key": "loss.temperatures", "old": [0.02, 0.05, 0.2], "new": [0.1]},
        {"step": 80, "key": rate, "old": 1e-3, "new": 2e-3},
        {"step": 90, "key": rate, "old": 2e-3, "new": 1e-4},
    ]

    resumed = config_in_force(path, command)
    assert resumed.optimizer.learning_rate == 1e-4 and resumed.loss.temperatures == [0.1]
    assert command.optimizer.learning_rate == 2e-3
    assert config_in_force(path, command, asked=[rate]).optimizer.learning_rate == 2e-3
    with pytest.raises(UserError, match="learning_rate: 0.0001, now 5.0"):
        config_in_force(path, load_config("digits", [f"{rate}=5"]))


@pytest.mark.parametrize("again", [[], ["optimizer.learning_rate=1e-3"]])
def test_a_kill_between_record_and_configuration_refuses_nothing(tmp_path, again):
    path, command, rate = tmp_path / "config.yaml", load_config("digits"), "optimizer.learning_rate"
    keep_config(path, command, 0)
    before = path.read_bytes()
    keep_config(path, load_config("digits", [f"{rate}=1e-3"]), 7)
    path.write_bytes(before)
    config = config_in_force(path, load_config("digits", again), [rate] if again else [])
    keep_config(path, config, 7)
    assert config.optimizer.learning_rate == load_config(str(path)).optimizer.learning_rate == 1e-3
    assert recorded(path) == [{"step": 7, "key": rate, "old": 2e-3, "new": 1e-3}]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"changes": 3}', '{"changes": [{"step": 1}]}', '{"changes": [3]}', "[" * 9999]
)
def test_a_damaged_record_of_changes_ends_in_one_line(tmp_path, content):
    (tmp_path / "changes.json").write_text(content)
    for function in (lambda: recorded(tmp_path / "config.yaml"),
                     lambda: config_in_force(tmp_path / "config.yaml", load_config("digits"))):  # fmt: skip
        with pytest.raises(UserError, match="changes.json cannot be read") as caught:
            function()
        assert "\n" not in str(caught.value)


def test_recorded_values_are_checked(tmp_path):
    path, change = tmp_path / "config.yaml", {"step": 1, "key": "optimizer.learning_rate", "old": 2e-3, "new": "fast"}
    save_config(load_config("digits"), path)
    for damage, expected in (
        ({}, "a recorded change: optimizer.learning_rate is 'fast', expected float"),
        ({"new": -1.0}, "a recorded change: .* expected float, a positive number"),
        ({"key": ["x"]}, "x.*: fast, now unset"),
    ):
        (tmp_path / "changes.json").write_text(json.dumps({"changes": [change | damage]}))
        with pytest.raises(UserError, match=expected) as caught:
            config_in_force(path, load_config("digits"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key, here, there, expected",
    [
        (
            "loss.feature_extractor",
            ["input"],
            ["evil:Part"],
            "which only a command line or a configuration file of yours",
        ),
        ("model.name", "residual_mlp", "evil:Net", "model.name: evil:Net, now residual_mlp"),
        ("data.name", "digits", "evil:data", "data.name: evil:data, now digits"),
    ],
)
def test_a_run_directory_names_nothing_to_import(tmp_path, key, here, there, expected):
    """Its record says that the user has changed a part of ours to one of his own."""
    path, config = tmp_path / "config.yaml", load_config("digits", ["loss.feature_extractor=input"])
    save_config(config, path)
    change = {"step": 1, "key": key, "old": here, "new": there}
    (tmp_path / "changes.json").write_text(json.dumps({"changes": [change]}))
    with pytest.raises(UserError, match=expected) as caught:
        config_in_force(path, config)
    assert "\n" not in str(caught.value)
    asked = load_config("digits", ["loss.feature_extractor=[evil:Part]"])
    if key == "loss.feature_extractor":
        assert config_in_force(path, asked, [key]) == asked


def test_some_keys_cannot_change_within_a_run(own):
    def asked(schema, key, value="1"):
        return parse_training_command(["--change", f"{key}={value}"], "train", "", schema, default[schema])[2]

    default = {Config: "digits", PretrainConfig: "mae_fashion_mnist"}
    for key, value in (("seed", 1), ("model.depth", 1), ("data.name", "mnist"), ("step.queue_size", 1),
                       ("optimizer.ema_decay", 1), ("model", "own_of_test:ConvNet")):  # fmt: skip
        with pytest.raises(UserError, match=f"--change {key}.*: it cannot change within a run"):
            asked(Config, key, value)
    for key in ("optimizer.learning_rate", "data.flip", "train.steps", "train.batch_size"):
        assert asked(Config, key, "true" if key == "data.flip" else 1) == [key]
    with pytest.raises(UserError, match="--change step.latents: it cannot change within a run"):
        asked(PretrainConfig, "step.latents", "true")
    assert resume_of("data.anything") == resume_of("train.batch_size") == "asked"
    assert resume_of("model.width") == "never"
    old = load_config("digits", ["model=own_of_test:ConvNet", "model.width=24"])
    new = load_config("digits", ["model=own_of_test:ConvNet", "model.path=p"])
    assert changes(old, new) == ["model.width: 24, now unset", "model.path: unset, now p"]


def test_what_may_change_is_said_of_keys_that_exist():
    keys = keys_of(Config) | keys_of(PretrainConfig)
    assert set(FREE + NEVER) <= keys.keys() | {key.partition(".")[0] for key in keys}
