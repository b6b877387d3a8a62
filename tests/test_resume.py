"""Runs that go on from their checkpoints."""

import json
import re
import shutil

import pytest
import torch
import yaml
from checkpoint_cases import read, same_checkpoints
from run_records import read_records
from safetensors.torch import load_file

from drifting.config.reading import load_config
from drifting.data import SampleQueue
from drifting.errors import UserError
from drifting.train import train
from drifting.training import Ranks

TINY = [
    "model=drifting_dit",
    "model.patch_size=4", "model.embed_dim=16", "model.depth=1", "model.num_heads=2", "model.num_style_tokens=2",
    "step.gen_per_label=4", "step.pos_per_label=8", "train.batch_size=40", "train.log_every=1", "train.eval_every=0",
    "guidance.uncond_prob=0.5", "train.save_every=3", "train.steps=6",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 6 steps with checkpoints at 3 and 6."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(load_config("digits", TINY), out)
    return out


def test_resumed_run_equals_an_uninterrupted_one(finished, tmp_path):
    out = tmp_path / "resumed"
    shutil.copytree(finished, out)
    (out / "checkpoints" / "step_00000006.pt").unlink()
    (out / "model.safetensors").unlink()
    with (out / "metrics.jsonl").open("ab") as file:
        file.write(b'7\n[1]\n{"step": "x"}\n\x00\xff\n{"step": 7, "los')  # not records; the last cut short by a crash
    train(load_config("digits", TINY), out)
    assert read_records(out) == read_records(finished)
    assert (out / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    last = [folder / "checkpoints" / "step_00000006.pt" for folder in (finished, out)]
    assert same_checkpoints(*last)
    assert read(last[0])["groups"]["queue"] is None


QUEUES = ["step.queue_size=5", "step.unconditional_queue_size=70"]  # They hold less than 3 steps bring.


@pytest.mark.parametrize(
    "settings",
    [["data.flip=true", "data.crop=true", "data.workers=1"], ["step.queue_features=true"]],
    ids=lambda settings: settings[0],
)
def test_what_is_in_the_queue_is_read_anew(settings, tmp_path):
    """As it was augmented, whatever an earlier version has saved of it."""
    settings = [*TINY, *QUEUES, *settings]
    whole, out = tmp_path / "whole", tmp_path / "resumed"
    train(load_config("digits", settings), whole)
    shutil.copytree(whole, out)
    (out / "checkpoints" / "step_00000006.pt").unlink()
    file = out / "checkpoints" / "step_00000003.pt"
    state = read(file)
    assert state["groups"]["queue"] is None
    state["groups"]["queue"] = SampleQueue(5, 10, (1, 8, 8), unconditional_queue_size=70).state_dict()
    torch.save(state, file)
    train(load_config("digits", settings), out)
    assert same_checkpoints(*(folder / "checkpoints" / "step_00000006.pt" for folder in (whole, out)))


def test_goes_on_from_the_one_before_a_damaged_checkpoint(finished, tmp_path, capfd):
    out = tmp_path / "damaged"
    shutil.copytree(finished, out)
    file = out / "checkpoints" / "step_00000006.pt"
    file.write_bytes(file.read_bytes()[:-1])
    train(load_config("digits", TINY), out)
    assert "step_00000006.pt is damaged and left out: " in capfd.readouterr().err
    assert same_checkpoints(*(folder / "checkpoints" / "step_00000006.pt" for folder in (finished, out)))
    for checkpoint in (out / "checkpoints").iterdir():
        checkpoint.write_text("{}")
    with pytest.raises(UserError, match="put one back from a copy, or delete .*checkpoints to begin anew"):
        train(load_config("digits", TINY), out)


def test_finished_run_has_nothing_to_do(finished, capsys):
    before = (finished / "metrics.jsonl").read_text()
    train(load_config("digits", TINY), finished)
    assert (finished / "metrics.jsonl").read_text() == before
    printed = capsys.readouterr().out
    assert "recognised as their class" in printed and "best guidance scale" not in printed
    for measure, real in (("precision", "90.7%"), ("recall", "89.8%")):
        assert re.search(rf"^{measure} +\d+\.\d%  +{real}  \(train images\)$", printed, re.MULTILINE)


def test_metrics_have_one_record_a_step(finished):
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for record in records:
        assert record["loss"] > 0 and record["scale"]["pixels"] > 0 and record["sample_spread"] >= 0
        assert set(record["lambda"]["pixels"]) == {"0.02", "0.05", "0.2"}
    assert "frechet_ratio" in records[-1] and "frechet_ratio" not in records[-2]


def test_resumes_a_run_of_a_version_with_fewer_keys(finished, tmp_path):
    """Its decay a number, and no key for how a step is computed."""
    out = tmp_path / "older"
    shutil.copytree(finished, out)
    values = yaml.safe_load((out / "config.yaml").read_text())
    (values["optimizer"]["ema_decay"],) = values["optimizer"]["ema_decay"]
    for key in ("bf16", "compile", "activation_checkpointing"):
        del values["step"][key]
    (out / "config.yaml").write_text(yaml.safe_dump(values))
    train(load_config("digits", [*TINY, "train.steps=7"]), out)
    assert (out / "checkpoints" / "step_00000007.pt").is_file()
    with pytest.raises(UserError, match=r"optimizer.ema_decay: \[0.99\], now \[0.9, 0.99\]"):
        train(load_config("digits", [*TINY, "train.steps=7", "optimizer.ema_decay=[0.9,0.99]"]), out)


def test_evaluation_chooses_among_averages(tmp_path, monkeypatch):
    """Each is measured; the best is reported, saved and kept."""
    distances = [9.0, 1.0, 3.0]  # of the check before the run, then of each average

    class Evaluator:
        num_samples, distance, ranks = 2, "frechet_distance", Ranks()

        def tell(self, num):
            pass

        def measure(self, samples, labels):
            return {"frechet_distance": distances.pop(0)}

    monkeypatch.setattr("drifting.evaluation.evaluator.open_evaluator", lambda *arguments: Evaluator())
    config = load_config("digits", [*TINY, "optimizer.ema_decay=[0.5,0.75]", "train.steps=3"])
    train(config, tmp_path)
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert not distances and (record["ema_decay"], record["frechet_distance"]) == (0.5, 1.0)
    state = read(tmp_path / "checkpoints" / "step_00000003.pt")
    assert set(state["averages"]) == {"0.5", "0.75"} and state["best_decay"] == 0.5

    distances[:] = [9.0, 0.8, 0.5]
    train(config, tmp_path)  # a finished run is evaluated again
    for folder in (tmp_path, tmp_path / "best"):
        weights = load_file(folder / "model.safetensors")
        assert all(torch.equal(w, state["averages"]["0.75"]["weights"][name]) for name, w in weights.items())
    assert json.loads((tmp_path / "best" / "model.json").read_text())["quality"]["ema_decay"] == 0.75


def test_another_configuration_is_refused(finished):
    with pytest.raises(UserError, match=r"seed: 0, now 1.*choose another --out"):
        train(load_config("digits", [*TINY, "seed=1"]), finished)
    with pytest.raises(UserError, match="at step 6 already"):
        train(load_config("digits", [*TINY, "train.steps=2"]), finished)


def test_length_and_intervals_may_change(finished, tmp_path):
    out = tmp_path / "longer"
    shutil.copytree(finished, out)
    train(load_config("digits", [*TINY, "train.steps=8", "train.log_every=2"]), out)
    assert (out / "checkpoints" / "step_00000008.pt").is_file()
    assert load_config(str(out / "config.yaml")).train.steps == 8
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6, 8]
