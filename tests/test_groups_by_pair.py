"""Groups by pair: each (sample, condition) of a batch is one, in scripts and from the command line."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from run_records import read_records
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import drifting
from drifting import evaluate, sample
from drifting.config import load_config
from drifting.data import open_dataset
from drifting.errors import UserError
from drifting.experiments import policy
from drifting.train import build_trainer
from drifting.train import main as command_line
from drifting.training import Ranks, create_trainer

SCRIPT = Path(__file__).parent / "acceptance" / "own_pairs.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(drifting.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
PARTS = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Net(nn.Module):
    noise_shape = (4,)

    def __init__(self, condition_shape=(2, 3)):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 16), nn.SiLU(), nn.Dropout(0.2), nn.Linear(16, 5))

    def forward(self, z, condition):
        return self.net(torch.cat([z, condition.flatten(1)], 1))


def data():
    condition = torch.randn(60, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return TensorDataset(condition.flatten(1)[:, :5].sin(), condition)


def lone():
    return TensorDataset(torch.randn(60, 5))


def uneven():
    return [(torch.randn(5), torch.randn(1 + index % 2)) for index in range(60)]
"""
RUN = [
    "data=parts_of_pairs:data", "model=parts_of_pairs:Net", "step.groups=pairs", "step.gen_per_pair=4",
    "train.batch_size=8", "train.log_every=1", "train.save_every=2", "optimizer.cosine_decay=false",
]  # fmt: skip


class Net(nn.Module):
    """From 3 numbers and conditions of any shape to 4."""

    noise_shape = (3,)

    def __init__(self, size: int = 2):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3 + size, 16), nn.SiLU(), nn.Linear(16, 4))

    def forward(self, z, condition):
        return self.net(torch.cat([z, condition.flatten(1)], 1))


def make_trainer(model=None, **settings):
    torch.manual_seed(0)
    defaults = {"feature_extractor": "input", "device": "cpu", "warmup_steps": 1, "gen_per_pair": 5}
    return create_trainer(model or Net(), groups="pairs", **(defaults | settings))


@pytest.fixture
def parts(tmp_path, monkeypatch):
    (tmp_path / "parts_of_pairs.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("parts_of_pairs", None)


def test_the_script_as_a_user_writes_it(tmp_path):
    """Its 60 epochs take a minute of one core; here it has two, which show that all of it runs."""
    text = SCRIPT.read_text()
    short = text.replace("range(60)", "range(2)").replace("assert left", "assert True or left")
    assert short.count("range(2)") == 1
    (tmp_path / "short.py").write_text(short)
    result = subprocess.run(
        [sys.executable, "short.py"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "ok", result.stdout + result.stderr


def test_a_step_compares_each_pair_on_its_own(monkeypatch):
    calls, original = [], drifting.models.drifting_loss.drift_ops.drift_loss
    spy = lambda *a, **k: calls.append((a, k)) or original(*a, **k)  # noqa: E731
    monkeypatch.setattr(drifting.models.drifting_loss.drift_ops, "drift_loss", spy)
    trainer = make_trainer()
    x, condition = torch.randn(6, 4), torch.randn(6, 2)
    metrics = trainer.train_step(x, condition)
    (((gen, pos, neg), options),) = calls
    assert gen[0].shape == (6, 1, 5, 4) and torch.equal(pos[0], x[:, None, None]) and neg[0].shape == (6, 1, 0, 4)
    assert (options["scale"], options["scale_self_pairs"], options["normalize"]) == ("group", False, "group_mean")
    assert options["R_list"] == (0.05, 0.2, 0.5) and trainer.images_per_step == 30
    spread = 2 * gen[0].var(2).mean() / (gen[0] - pos[0]).square().mean()
    torch.testing.assert_close(metrics["sample_spread"], spread.detach())
    assert metrics["grad_norm"] > 0 and metrics["input/scale"].ndim == 0


def test_spread_is_1_where_samples_are_as_the_real_ones():
    groups = drifting.training.groups.Groups(5000, 8, torch.zeros(5000), torch.ones(5000), [0], torch.randn(5000, 1, 3))
    a, b = groups.spreads(torch.randn(5000, 8, 3))
    assert a / b == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("shape, dtype", [((2,), torch.float64), ((3, 2), torch.float32), ((), torch.int64)])
def test_conditions_of_any_shape(shape, dtype, tmp_path):
    class Any(Net):
        def __init__(self):
            super().__init__(max(1, int(np.prod(shape))))

        def forward(self, z, condition):
            return super().forward(z, condition.reshape(len(z), -1).float())

    trainer = make_trainer(Any())
    data = TensorDataset(torch.randn(20, 4), torch.randn(20, *shape).to(dtype))
    with pytest.raises(ValueError, match="the trainer has seen no conditions yet"):
        trainer.generate(2, data[:2][1])
    metrics = trainer.train_epoch(DataLoader(data, batch_size=7))
    assert metrics["num_steps"] == 3 and metrics["sample_spread"] > 0
    asked = data[:5][1]
    trainer.save(tmp_path)
    again = drifting.load_generator(tmp_path, model=Any())
    assert again.condition_shape == shape
    drawn = [g.generate(5, asked, generator=torch.Generator().manual_seed(1)) for g in (trainer, again)]
    assert drawn[0].shape == (5, 4) and torch.equal(*drawn)
    for wrong in (None, asked[:4]):
        with pytest.raises(ValueError, match=r"conditions are \[.*\], expected \[5"):
            again.generate(5, wrong)


@pytest.mark.parametrize(
    "batch, message",
    [
        ((torch.randn(3, 4), None), r"conditions are None, expected a tensor \[3, …\] in a batch \(x, condition\)"),
        ((torch.randn(3, 4), torch.randn(2, 2)), r"expected a tensor \[3, …\]"),
        ((torch.randn(3, 4), ["a", "b", "c"]), r"conditions are \['a', 'b', 'c'\], expected a tensor"),
        ((torch.randn(3, 5), torch.randn(3, 2)), r"the network makes samples \[4\], the data have \[5\]"),
        ((torch.randn(3, 4), torch.randn(3, 9)), r"Net \(z, y\) with z \[2, 3\] and conditions \[2, 9\] fails"),
    ],
)
def test_batches_that_are_no_pairs(batch, message):
    with pytest.raises(ValueError, match=message):
        make_trainer().train_step(*batch)


def test_networks_and_settings_that_have_no_place_among_pairs():
    with pytest.raises(ValueError, match=r"step.groups is pairs, expected a network that takes \(z, condition\)"):
        make_trainer(nn.Linear(3, 4), noise_shape=(3,))
    with pytest.raises(ValueError, match="step.queue_features=false"):
        make_trainer(queue_features=True)
    with pytest.raises(ValueError, match="step.gen_per_pair is 1, expected int, 2 or more"):
        make_trainer(gen_per_pair=1)


def test_parts_of_a_step_and_a_resumed_trainer():
    """In parts it is the same step; from its state another trainer goes on to the last bit, temperatures included."""
    settings = {"learn_temperature": True, "field": "wflow"}
    trainers = [make_trainer(**settings), make_trainer(labels_at_once=2, **settings), make_trainer(**settings)]
    batches = [(torch.randn(5, 4), torch.randn(5, 2)) for _ in range(4)]
    whole, parts = ([trainer.train_step(*batch) for batch in batches[:2]] for trainer in trainers[:2])
    for key in whole[1]:
        torch.testing.assert_close(whole[1][key], parts[1][key], rtol=1e-4, atol=1e-6)
    trainers[2].load_state_dict(copy.deepcopy(trainers[0].state_dict()))  # or both would have the same moments
    assert torch.equal(trainers[2].loss_fn.log_R, trainers[0].loss_fn.log_R)
    first, again = ([t.train_step(*batch) for batch in batches[2:]] for t in (trainers[0], trainers[2]))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(first, again, strict=True) for key in a)


# -------------------------------------------------------------------------------------------------------- commands


def test_from_the_command_line(parts, capsys):
    """A run, and one that is interrupted, which ends alike; then samples of conditions in a file."""
    command_line(["--out", "whole", *RUN, "train.steps=4"])
    told = capsys.readouterr()
    assert told.err.count("evaluation is left out: it draws by label, and pairs have conditions") == 1
    assert "--conditions FILE.npy" in told.out
    for steps in (2, 4):
        command_line(["--out", "parts", *RUN, f"train.steps={steps}"])
    assert read_records(Path("whole")) == read_records(Path("parts"))
    weights = [Path(name, "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1] and json.loads(Path("whole/model.json").read_text())["condition_shape"] == [2, 3]

    np.save("asked.npy", np.random.default_rng(0).normal(size=(3, 2, 3)))
    command = ["whole", "--model", "parts_of_pairs:Net", "--num", "7", "--out", "samples.npz"]
    sample.main([*command, "--conditions", "asked.npy"])
    assert "wrote 7 samples of 3 conditions" in capsys.readouterr().out
    file = np.load("samples.npz")
    assert file["arr_0"].shape == (7, 5) and np.array_equal(
        file["conditions"], np.load("asked.npy")[[0, 0, 0, 1, 1, 2, 2]]
    )
    np.save("wrong.npy", np.zeros((3, 2)))
    np.save("nan.npy", np.full((1, 2, 3), np.nan))
    np.save("complex.npy", np.ones((1, 2, 3), complex))
    for options, message in (
        ([], r"--conditions is None, the generator was trained by pair"),
        (["--conditions", "wrong.npy"], r"wrong.npy has the shape \[3, 2\], expected"),
        (["--conditions", "absent.npy"], "absent.npy cannot be read"),
        (["--conditions", "nan.npy"], "nan.npy has NaN or infinity, expected finite numbers"),
        (["--conditions", "complex.npy"], r"complex.npy has torch.complex128: .* \[2, 2, 3\] fails: RuntimeError: "),
    ):
        with pytest.raises(UserError, match=message):
            sample.main([*command, *options])
    with pytest.raises(UserError, match="whole was trained by pair, which labels do not tell"):
        evaluate.main(["whole", "--model", "parts_of_pairs:Net", "--data", "parts_of_pairs:data"])


def test_labels_of_our_data_are_conditions(tmp_path):
    config = load_config("digits", ["step.groups=pairs", "model.width=16", "train.batch_size=6"])
    dataset = open_dataset(config.data, pairs=True)
    trainer = build_trainer(config, dataset, Ranks())
    metrics = trainer.train_step(dataset.train.samples(range(6)), dataset.train.labels[:6])
    assert metrics["grad_norm"] > 0 and trainer.generate(3, [1, 2, 3]).shape == (3, 1, 8, 8)
    trainer.save(tmp_path)
    assert drifting.load_generator(tmp_path).condition_shape == ()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data=parts_of_pairs:lone"], r"it has no condition, expected \(x, condition\) with step.groups=pairs"),
        (["model.condition_shape=[1]", "step.queue_features=true"], "step.queue_features=false"),
        (["model=residual_mlp"], "the network ResidualMLP .* fails"),
    ],
)
def test_mistakes_end_before_the_first_step(parts, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        command_line(["--out", "run", *RUN, *overrides])
    assert "\n" not in str(caught.value)


def test_the_policy_runs(tmp_path, capsys):
    assert policy.main(["--steps", "3", "--out", str(tmp_path)]) == 0
    assert "through the obstacle" in capsys.readouterr().out and (tmp_path / "policy.png").stat().st_size > 5000
    with pytest.raises(UserError, match="--steps is 0, expected 1 or more"):
        policy.main(["--steps", "0"])
