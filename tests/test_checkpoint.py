"""Checkpoint files, and runs resumed from them."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from drifting.cli import UserError
from drifting.config import load_config
from drifting.train import train
from drifting.training.checkpoint import load_checkpoint, save_checkpoint

TINY = [
    "model.patch_size=4", "model.embed_dim=16", "model.depth=1", "model.num_heads=2", "model.num_style_tokens=2",
    "step.gen_per_label=4", "step.pos_per_label=8", "train.batch_size=40", "train.log_every=1", "train.eval_every=0",
    "guidance.uncond_prob=0.5", "train.save_every=3", "train.steps=6",
]  # fmt: skip


def test_keeps_the_newest(tmp_path):
    for step in (5, 10, 900, 1000):
        save_checkpoint(tmp_path, {"step": step, "weights": torch.full((2,), float(step))}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000900.pt", "step_00001000.pt"]
    state = load_checkpoint(tmp_path)
    assert state["step"] == 1000 and torch.equal(state["weights"], torch.full((2,), 1000.0))
    assert load_checkpoint(tmp_path / "nothing here") is None


def test_a_failed_save_leaves_no_trace(tmp_path):
    save_checkpoint(tmp_path, {"step": 1})
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(tmp_path, {"step": 2, "unpicklable": lambda: None})
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001.pt"]


def test_unreadable_checkpoint_is_named(tmp_path):
    path = save_checkpoint(tmp_path, {"step": 1})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="step_00000001.pt cannot be read"):
        load_checkpoint(tmp_path)


class NotData:
    pass


def test_loads_data_only(tmp_path):
    """A pickle that would build objects of other classes, and so could run code, is refused."""
    save_checkpoint(tmp_path, {"step": 1, "object": NotData()})
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 6 steps with checkpoints at 3 and 6."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train(load_config("digits", TINY), out) == 0
    return out


def test_resumed_run_equals_an_uninterrupted_one(finished, tmp_path):
    out = tmp_path / "resumed"
    shutil.copytree(finished, out)
    (out / "checkpoints" / "step_00000006.pt").unlink()
    (out / "model.safetensors").unlink()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "los')  # cut short by a crash
    assert train(load_config("digits", TINY), out) == 0
    assert (out / "metrics.jsonl").read_text() == (finished / "metrics.jsonl").read_text()
    expected, weights = load_file(finished / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(expected[name], weights[name]) for name in expected)
    states = [load_checkpoint(folder / "checkpoints") for folder in (finished, out)]
    assert torch.equal(*(state["sample_queue"]["by_class"]["samples"] for state in states))
    assert states[0]["step"] == states[1]["step"] == 6


def test_finished_run_has_nothing_to_do(finished, capsys):
    before = (finished / "metrics.jsonl").read_text()
    assert train(load_config("digits", TINY), finished) == 0
    assert (finished / "metrics.jsonl").read_text() == before
    assert "recognised as their class" in capsys.readouterr().out


def test_metrics_have_one_record_a_step(finished):
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for record in records:
        assert record["loss"] > 0 and record["scale"]["pixels"] > 0 and record["sample_spread"] >= 0
        assert set(record["lambda"]["pixels"]) == {"0.02", "0.05", "0.2"}
    assert "frechet_ratio" in records[-1] and "frechet_ratio" not in records[-2]


def test_resumes_a_run_of_a_version_with_fewer_keys(finished, tmp_path):
    """One average by the name `ema`, its decay a number, and no key for how a step is computed."""
    out = tmp_path / "older"
    shutil.copytree(finished, out)
    values = yaml.safe_load((out / "config.yaml").read_text())
    (values["optimizer"]["ema_decay"],) = values["optimizer"]["ema_decay"]
    for key in ("bf16", "compile", "activation_checkpointing"):
        del values["step"][key]
    (out / "config.yaml").write_text(yaml.safe_dump(values))
    state = load_checkpoint(out / "checkpoints")
    (state["ema"],) = state.pop("averages").values()
    del state["best_decay"]
    save_checkpoint(out / "checkpoints", state)
    assert train(load_config("digits", [*TINY, "train.steps=7"]), out) == 0
    assert load_checkpoint(out / "checkpoints")["step"] == 7
    with pytest.raises(UserError, match=r"optimizer.ema_decay: \[0.99\], now \[0.9, 0.99\]"):
        train(load_config("digits", [*TINY, "train.steps=7", "optimizer.ema_decay=[0.9,0.99]"]), out)


def test_evaluation_chooses_among_averages(tmp_path, monkeypatch):
    """Each is measured; the best is reported, saved and kept."""
    distances = [9.0, 1.0, 3.0]  # of the check before the run, then of each average

    class Evaluator:
        num_samples = fewest = 2
        distance = "frechet_distance"

        def __call__(self, images, labels):
            return {"frechet_distance": distances.pop(0)}

    monkeypatch.setattr("drifting.train.open_evaluator", lambda config, dataset: Evaluator())
    config = load_config("digits", [*TINY, "optimizer.ema_decay=[0.5,0.75]", "train.steps=3"])
    assert train(config, tmp_path) == 0
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert not distances and (record["ema_decay"], record["frechet_distance"]) == (0.5, 1.0)
    state = load_checkpoint(tmp_path / "checkpoints")
    assert list(state["averages"]) == [0.5, 0.75] and state["best_decay"] == 0.5

    distances[:] = [9.0, 0.8, 0.5]
    assert train(config, tmp_path) == 0  # a finished run is evaluated again
    for folder in (tmp_path, tmp_path / "best"):
        weights = load_file(folder / "model.safetensors")
        assert all(torch.equal(weight, state["averages"][0.75][f"module.{name}"]) for name, weight in weights.items())
    assert json.loads((tmp_path / "best" / "model.json").read_text())["quality"]["ema_decay"] == 0.75


def test_another_configuration_is_refused(finished):
    with pytest.raises(UserError, match=r"seed: 0, now 1.*choose another --out"):
        train(load_config("digits", [*TINY, "seed=1"]), finished)
    with pytest.raises(UserError, match="at step 6 already"):
        train(load_config("digits", [*TINY, "train.steps=2"]), finished)


def test_length_and_intervals_may_change(finished, tmp_path):
    out = tmp_path / "longer"
    shutil.copytree(finished, out)
    assert train(load_config("digits", [*TINY, "train.steps=8", "train.log_every=2"]), out) == 0
    assert load_checkpoint(out / "checkpoints")["step"] == 8
    assert load_config(str(out / "config.yaml")).train.steps == 8
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6, 8]
