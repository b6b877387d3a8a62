"""Losses and gradients that are not finite: they change nothing, and end a run."""

import json

import pytest
import torch
from test_trainer import batch, make_trainer

from drifting.config.reading import load_config
from drifting.errors import UserError
from drifting.models import InputFeatureExtractor
from drifting.train import train
from drifting.training.metrics import check_finite

TINY = [
    "model=drifting_dit",
    "model.patch_size=4", "model.embed_dim=16", "model.depth=1", "model.num_heads=2", "step.gen_per_label=4",
    "step.pos_per_label=8", "train.batch_size=40", "train.log_every=1", "train.save_every=2", "train.steps=6",
]  # fmt: skip


class Spoiler:
    """Puts NaN into the feature maps of chosen steps."""

    def __init__(self, monkeypatch, steps, value=float("nan")):
        forward = InputFeatureExtractor.forward
        self.calls = 0

        def spoilt(extractor, images):
            maps = forward(extractor, images)
            if images.requires_grad and len(images) > 4:  # So many are tried out before the first step.
                self.calls += 1  # once a step
                if self.calls in steps:
                    maps = {name: of_map * value for name, of_map in maps.items()}
            return maps

        monkeypatch.setattr(InputFeatureExtractor, "forward", spoilt)


def tensors_of(trainer):
    state = trainer.state_dict()
    leaves = [state["model"], *state["optimizer"].values()]
    return [tensor.clone() for leaf in leaves for tensor in leaf.values()]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(monkeypatch, value):
    trainer, spared = make_trainer(), make_trainer()
    Spoiler(monkeypatch, [2], value)
    trainer.train_step(*batch())
    before = tensors_of(trainer)
    metrics = trainer.train_step(*batch())
    assert metrics["skipped_steps"] == 1 and not metrics["loss"].isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(trainer), strict=True))
    metrics = trainer.train_step(*batch())
    assert metrics["skipped_steps"] == 1 and metrics["loss"].isfinite()
    assert all(tensor.isfinite().all() for tensor in tensors_of(trainer))
    assert not all(torch.equal(a, b) for a, b in zip(before, tensors_of(trainer), strict=True))
    spared.load_state_dict(trainer.state_dict())
    assert spared.weights.skipped_steps == 1


def test_the_run_ends_and_names_step_map_and_checkpoint(monkeypatch, tmp_path):
    Spoiler(monkeypatch, [4])
    message = (
        r"step 4: the loss is nan and its gradient's norm nan, in the feature map pixels; skipped so far: 1\..*"
        rf"the last checkpoint is {tmp_path}/checkpoints/step_00000002.pt: .*max_skipped_steps"
    )
    with pytest.raises(UserError, match=message):
        train(load_config("digits", TINY), tmp_path)
    Spoiler(monkeypatch, [])
    train(load_config("digits", TINY), tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]


def test_some_steps_may_be_skipped(monkeypatch, tmp_path):
    Spoiler(monkeypatch, [2, 5])
    with pytest.raises(UserError, match="step 5: .*skipped so far: 2"):
        train(load_config("digits", [*TINY, "train.max_skipped_steps=1"]), tmp_path / "one")
    Spoiler(monkeypatch, [2, 5])
    train(load_config("digits", [*TINY, "train.max_skipped_steps=2"]), tmp_path / "two")
    text = (tmp_path / "two" / "metrics.jsonl").read_text()
    records = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]  # NaN is no JSON
    assert [record["skipped_steps"] for record in records] == [0, 1, 1, 1, 2, 2]
    assert records[1]["loss"] is None and records[2]["loss"] is not None


def test_what_is_not_finite_is_told(tmp_path):
    def metrics(skipped, **values):
        named = {"loss": 1.0, "grad_norm": float("inf"), "a/scale": 1.0, "b/scale": 2.0} | values
        tensors = {name: torch.tensor(value) for name, value in named.items()}
        return tensors | {"skipped_steps": torch.tensor(skipped)}

    check_finite(7, metrics(1), 1, tmp_path)
    with pytest.raises(UserError, match="step 8: the loss is 1 and .* inf, behind the feature maps.*not there yet"):
        check_finite(8, metrics(2), 1, tmp_path)
    maps = {"b/scale": float("inf"), "c/scale": 1.0, "c/lambda_0.2": float("nan"), "c/lambda_0.5": 1.0}
    with pytest.raises(UserError, match="in the feature maps b, c;"):
        check_finite(1, metrics(1, **maps), 0, tmp_path)
