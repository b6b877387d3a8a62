"""What is logged of a run, and how long its phases take."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainer import batch, make_trainer

from drifting.config import PretrainConfig, read_config
from drifting.config.reading import load_config
from drifting.errors import UserError
from drifting.pretrain import pretrain
from drifting.train import train
from drifting.training.metrics import MetricsLog
from drifting.training.run_evaluation import GeneratorRun
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
    tiny = ["model=residual_mlp", "model.width=16", "step.gen_per_label=4", "train.log_every=2", "train.steps=4"]
    train(load_config("digits", tiny), tmp_path)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert PHASES < set(json.loads(line)["timing"])


def events_of(run: Path) -> dict[str, list]:
    """The events of each scalar, in the order in which TensorBoard shows the scalars."""
    events = EventAccumulator(str(run))
    events.Reload()
    return {tag: events.Scalars(tag) for tag in sorted(events.Tags()["scalars"])}


def squares(images: torch.Tensor) -> torch.Tensor:
    """Features of images."""
    return images.flatten(1).square()


def test_what_to_look_at_first(tmp_path):
    """Mean λ, learning rate and images a second are a group at the top of TensorBoard, and in the records."""
    settings = ["model=residual_mlp", "model.width=16", "step.gen_per_label=4", "train.log_every=2", "train.steps=4"]
    settings += ["optimizer.learning_rate=0.008", "optimizer.warmup_steps=8", "optimizer.cosine_decay=false"]
    settings += ["loss.feature_extractor=[input,test_metrics_log:squares]"]
    train(load_config("digits", settings), tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["learning_rate"] for record in records] == pytest.approx([0.002, 0.004])  # of steps 2 and 4
    for record in records:
        lambdas = [value for of_map in record["lambda"].values() for value in of_map.values()]
        assert len(lambdas) > 3 and record["lambda_mean"] == pytest.approx(sum(lambdas) / len(lambdas))
        assert list(record["scale"]) == list(record["lambda"]) and record["loss"] > 0
    events = events_of(tmp_path)
    first = {"images_per_second": [record["timing"]["images_per_second"] for record in records]}
    first |= {"lambda": [r["lambda_mean"] for r in records], "learning_rate": [r["learning_rate"] for r in records]}
    assert list(events)[:3] == [f"0_overview/{name}" for name in first]
    for name, values in first.items():
        assert [event.value for event in events[f"0_overview/{name}"]] == pytest.approx(values)
        assert [event.step for event in events[f"0_overview/{name}"]] == [2, 4]
    assert {"loss", "sample_spread", "timing/step", "scale/input", "lambda/squares/0.02"} < set(events)
    assert not {"lambda_mean", "learning_rate", "timing/images_per_second"} & set(events)


def test_an_autoencoder_has_no_field_to_look_at(tmp_path):
    settings = ["data=digits", "model.base_channels=4", "train.batch_size=16", "train.log_every=1", "train.steps=1"]
    pretrain(read_config("mae_fashion_mnist", settings, PretrainConfig), tmp_path)
    assert list(events_of(tmp_path))[:3] == ["0_overview/images_per_second", "0_overview/learning_rate", "cls_loss"]
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["learning_rate"] > 0 and "lambda_mean" not in json.loads(line)


def test_the_progress_line_is_short():
    """Also where every number is long."""
    run: Any = SimpleNamespace(evaluator=SimpleNamespace(distance="frechet_distance"))
    record = {"lambda_mean": 0.12345, "sample_spread": 0.987, "skipped_steps": 0}
    assert GeneratorRun.describe(run, record, {}) == "λ=0.1235 spread=0.99"
    measured = {"frechet_distance": 24.351, "frechet_ratio": 1.0657, "precision": 0.913, "recall": 0.886}
    expected = "λ=0.1235 spread=0.99 Fréchet=24.35 (1.07x train) precision=91% recall=89%"
    assert GeneratorRun.describe(run, record, measured) == expected
    long = {"frechet_distance": 12345.678, "frechet_ratio": 123.456, "precision": 1.0, "recall": 1.0}
    assert len(GeneratorRun.describe(run, record | {"skipped_steps": 100, "sample_spread": 10.0}, long)) < 100


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
        log.write({"step": step + 1, "loss": 0.5, "lambda": {"pixels": {"0.2": 0.1}}, "lambda_mean": 0.1})
        log.close()
    first, second = runs
    assert first.records == [(1, {"0_overview/lambda": 0.1, "loss": 0.5, "lambda/pixels/0.2": 0.1})] and first.finished
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
