"""What is logged of a run, and how long its phases take."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from test_trainer import batch, make_trainer

from drifting.config.reading import load_config
from drifting.errors import UserError
from drifting.train import train
from drifting.training.metrics import MetricsLog
from drifting.utils.stopwatch import Stopwatch

PHASES = {"data", "communication", "generator", "encoder", "operator", "optimizer", "other"}


class Clock:
    """Stands in for the clock: moves by a second whenever it is told to."""

    now = 0.0

    def perf_counter(self):
        return self.now


def test_a_phase_lasts_until_another_is_entered(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock.perf_counter)
    watch = Stopwatch("cpu")
    for phase, seconds in [("a", 1), ("b", 2), ("b", 3), ("a", 4)]:
        watch.enter(phase)
        clock.now += seconds
    assert watch.take() == {"a": 5, "b": 5} and watch.take() == {"a": 0}
    clock.now += 6
    assert watch.take() == {"a": 6}

    x = torch.ones(1, requires_grad=True)
    y = x * 2
    watch.enter_at_gradient(y, "backward")
    watch.enter_at_gradient(x.detach(), "never")
    clock.now += 1
    y.sum().backward()
    clock.now += 2
    assert watch.take() == {"a": 1, "backward": 2}


def test_phases_make_up_the_step():
    trainer = make_trainer()
    trainer.stopwatch.enter("data")
    for step in (1, 2):
        trainer.train_step(*batch())
        trainer.stopwatch.enter("evaluation")
        time.sleep(0.01)
        trainer.stopwatch.enter("data")
        if step == 2:
            timing = trainer.stopwatch.read(step, trainer.images_per_step)
    assert set(timing) == {*PHASES, "step", "images_per_second", "memory_gb"}
    assert timing["step"] == pytest.approx(sum(timing[phase] for phase in PHASES))
    assert timing["images_per_second"] == pytest.approx(trainer.images_per_step / timing["step"])
    assert 0.05 < timing["memory_gb"] < 100 and all(timing[phase] > 0 for phase in PHASES)


def test_the_log_says_where_time_went(tmp_path):
    tiny = ["model.embed_dim=16", "model.num_heads=2", "step.gen_per_label=4", "train.log_every=2", "train.steps=4"]
    train(load_config("digits", tiny), tmp_path)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert PHASES < set(json.loads(line)["timing"])


def test_weights_and_biases_gets_the_same_records(tmp_path, monkeypatch):
    runs = []

    def init(**settings):
        run = SimpleNamespace(settings=settings, records=[], finished=False)
        run.log = lambda record, step: run.records.append((step, record))
        run.finish = lambda: setattr(run, "finished", True)
        runs.append(run)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=ConnectionError))
    for step in (0, 5):
        log = MetricsLog(tmp_path / "metrics.jsonl", step, "project", {"seed": 3})
        log.write({"step": step + 1, "loss": 0.5, "lambda": {"pixels": {"0.2": 0.1}}})
        log.close()
    first, second = runs
    assert first.records == [(1, {"loss": 0.5, "lambda/pixels/0.2": 0.1})] and first.finished
    assert first.settings == second.settings  # a resumed run goes on in the same one
    assert first.settings["project"] == "project" and first.settings["config"] == {"seed": 3}

    def refuse(**settings):
        raise ConnectionError("no key.")

    sys.modules["wandb"].init = refuse
    with pytest.raises(UserError, match="train.wandb: .*no key; WANDB_MODE=offline"):
        MetricsLog(tmp_path / "metrics.jsonl", 0, "project")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'drifting\[wandb\]'"):
        MetricsLog(tmp_path / "metrics.jsonl", 0, "project")
