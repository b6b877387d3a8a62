"""One, two and four ranks take the same steps: gloo, four processes for all tests."""

import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from checkpoint_cases import bits
from processes import groups_with, meeting, results_of
from run_records import read_records
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict

import drifting.pretrain
from drifting.config import Config, PretrainConfig, load_config, read_config
from drifting.config.schema import MAELossConfig, MAEOptimizerConfig, MAEStepConfig, StepConfig, TrainConfig
from drifting.data import training_batches
from drifting.data.image_split import ImageSplit
from drifting.errors import UserError
from drifting.hub.run_directory import RunDirectory
from drifting.models import MAE, ConvDecoder, DriftingDiT
from drifting.train import main as command_line
from drifting.training import MAETrainer, create_trainer
from drifting.training.checkpoint import load_checkpoint, save_checkpoint
from drifting.training.distributed import Ranks
from drifting.training.groups import ClassGroups
from drifting.training.loop import opened_run
from drifting.training.optimization import WHOLE

STEPS, BATCH, CLASSES = 20, 16, 6


def transformer():
    return DriftingDiT(
        img_size=8, patch_size=2, in_chans=2, num_classes=CLASSES, embed_dim=16, depth=2, num_heads=2,
        num_style_tokens=2, style_vocab=4, n_cls_tokens=1,
    )  # fmt: skip


def decoder():
    return ConvDecoder((2, 8, 8), CLASSES, noise_dim=8, channels=(8, 4), width=16, depth=1, cond_dim=8)


MAE_STEPS = 2  # an encoder's ReLUs turn differences of rounding into others soon
PAIRS_IN_SHARDS = "pairs, fsdp, in parts"
RUNS = {  # settings of trainers, the numbers of ranks that they are tried with
    "ddp": ({}, (2, 4)),
    "fsdp": ({"fsdp": True}, (2, 4)),
    "ddp, uneven": ({"labels_per_step": 5}, (2, 4)),
    "ddp, in parts": ({"labels_at_once": 1}, (2,)),
    "pairs": ({"groups": "pairs", "gen_per_pair": 3, "learn_temperature": True}, (2, 4)),
    PAIRS_IN_SHARDS: (
        {"groups": "pairs", "gen_per_pair": 3, "normalize": "group", "fsdp": True, "labels_at_once": 2},
        (2,),
    ),
    "a second batch repels": ({"field": "wflow", "learn_temperature": True}, (2,)),
    "ddp, features kept": ({"queue_features": True}, (2,)),
    "fsdp, weights in channels_last": ({"fsdp": True, "network": decoder}, (2,)),
    "fsdp, in parts, checkpointing": ({"fsdp": True, "labels_at_once": 1, "activation_checkpointing": True}, (2,)),
}


class Patches(torch.nn.Module):
    """Maps of all pixels, and of 16 patches behind a convolution."""

    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(2, 12, 2, stride=2)

    def forward(self, x):
        return {"pixels": x.flatten(1).unsqueeze(1), "patches": self.convolution(x).tanh().flatten(2).transpose(1, 2)}


def make_trainer(ranks, network=transformer, **settings):
    torch.manual_seed(0)
    model = network()
    for name, parameter in model.named_parameters():  # otherwise most gradients are 0 at first
        if "modulation" in name or "proj" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    defaults = dict(
        feature_extractor=Patches(), temperatures=(0.2, 0.5),
        learning_rate=1e-3, device="cpu", queue_size=8, labels_per_step=4, gen_per_label=6, pos_per_label=5,
        uncond_per_label=3, uncond_prob=0.3, cfg_scale_range=(1.0, 3.0), warmup_steps=5, decay_steps=STEPS,
        ema_decay=(0.5, 0.9),
    )  # fmt: skip
    return create_trainer(model, ranks=ranks, **(defaults | settings))


def batch(step: int, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    images = torch.randn(BATCH, 2, 8, 8, generator=generator) * 0.3 + labels.view(-1, 1, 1, 1) / CLASSES
    part = ranks.share(BATCH)
    return images[part], labels[part]


def train(trainer):
    """Metrics of each step, and at the end weights, averages and queue."""
    metrics = [trainer.train_step(*batch(step, trainer.ranks)) for step in range(STEPS)]
    state = trainer.groups.state_dict()
    return metrics, weights_of(trainer), state.get("queue") or state


def weights_of(trainer):
    """The network's weights and those of its averages, whole, on every rank."""
    modules = [trainer.model, *(average.module for average in trainer.weights.averages.values())]
    states = [get_model_state_dict(module, options=WHOLE) for module in modules]
    return [{name: tensor.clone() for name, tensor in state.items()} for state in states]


def save(trainer, folder):
    state = trainer.state_dict()
    trainer.ranks.on_main(lambda: save_checkpoint(Path(folder), state))


def pretrain(trainer):
    batches = [batch(step, trainer.ranks) for step in range(MAE_STEPS)]
    metrics = [trainer.train_step(images.double(), labels) for images, labels in batches]
    return metrics, weights_of(trainer), {}


def make_mae_trainer(ranks, fsdp=False):
    torch.manual_seed(0)
    model = MAE(2, base_channels=32, layers=(1, 1, 1, 1), num_classes=CLASSES).double()
    config = PretrainConfig(
        loss=MAELossConfig(mask_ratio_range=[0.3, 0.7], lambda_cls=0.1),
        step=MAEStepConfig(images_at_once=3 if ranks.size == 2 else None, fsdp=fsdp),
        optimizer=MAEOptimizerConfig(learning_rate=1e-3, warmup_steps=5),
        train=TrainConfig(steps=STEPS),
    )
    return MAETrainer(model, config, "cpu", ranks)


def queues(ranks: Ranks) -> dict[str, Any]:
    """A queue of bytes after nine steps, the same read anew, and the bytes that both take of this rank's memory."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), np.uint8)
    split = ImageSplit(pixels, np.arange(50) % CLASSES, 32, flip=True, crop=True)
    step = StepConfig(labels_per_step=4, queue_size=8, unconditional_queue_size=30, queue_device="cpu")
    config = Config(seed=3, step=step, train=TrainConfig(batch_size=12))
    first, second = [
        ClassGroups(
            config, (3, 32, 32), ranks, torch.device("cpu"), tuple(range(CLASSES)), True, CLASSES, 0, split=split
        )
        for _ in range(2)
    ]
    batches = training_batches(split, 12, 3, part=ranks.share(12), stored=True)
    for samples, labels in islice(batches, 9):
        first.add(samples, labels)
    second.refill(9)
    ranks.on_all(lambda: None)  # Until here, another rank may still be writing.
    tensors = [
        ring.samples for groups in (first, second) for ring in (groups.queue.by_class, groups.queue.unconditional)
    ]
    taken = ranks.on_all(lambda: sum(map(taken_by, tensors))) if ranks.size > 1 else []
    states = [bits(groups.queue.state_dict()) for groups in (first, second)]
    return {"states": states, "taken": taken, "needed": sum(tensor.nbytes for tensor in tensors)}


def taken_by(tensor: torch.Tensor) -> int:
    """This process's share of the memory of a tensor in a file without a name, in bytes."""
    region = r"^([0-9a-f]+)-([0-9a-f]+) .* /memfd:drifting \(deleted\)\n(?:[A-Z].*\n)*?Pss: +(\d+) kB"
    for start, end, pss in re.findall(region, Path("/proc/self/smaps").read_text(), re.MULTILINE):
        if int(start, 16) <= tensor.data_ptr() < int(end, 16):
            return 1024 * int(pss)
    raise AssertionError("the tensor is not in such memory")


def encoder_run(out, ranks):
    """What ``drifting.pretrain`` leaves of a run in shards, its evaluation and checkpoint included."""
    settings = ["data=digits", "model.base_channels=8", "train.batch_size=16", "train.steps=2", "train.eval_every=1"]
    drifting.pretrain.pretrain(
        read_config("mae_fashion_mnist", [*settings, "step.fsdp=true"], PretrainConfig), out, ranks
    )


def worker(rank: int, directory: Path) -> dict:
    results = {}
    with meeting(rank, 4, directory):
        groups = groups_with(rank, (2, 4))
        for size, ranks in groups.items():
            for name, (settings, sizes) in RUNS.items():
                if size in sizes:
                    trainer = make_trainer(ranks, **settings)
                    results[name, size] = train(trainer)
                    if name == "fsdp":
                        save(trainer, directory / str(size))
                    if name == PAIRS_IN_SHARDS:
                        save(trainer, directory / "pairs")
            for name in ("mae", "mae, fsdp"):
                results[name, size] = pretrain(make_mae_trainer(ranks, fsdp="fsdp" in name))
            encoder_run(directory / f"encoder_{size}", ranks)
            results["queues", size] = queues(ranks)
        dist.barrier()
        for size, other in ((2, 4), (4, 2)):  # A run in shards goes on at other numbers of ranks, in shards or not.
            if rank < other:
                trainers = [make_trainer(groups[other], fsdp=fsdp, seed=9) for fsdp in (True, False)]
                for trainer in trainers:
                    trainer.load_state_dict(load_checkpoint(directory / str(size)))
                stepped = [(t.step, weights_of(t), t.train_step(*batch(0, groups[other]))) for t in trainers]
                results["loaded", size, other] = stepped
        if rank < 2:
            trainer = make_trainer(groups[2], **RUNS[PAIRS_IN_SHARDS][0], seed=9)
            trainer.load_state_dict(load_checkpoint(directory / "pairs"))
            results["pairs loaded", 2] = weights_of(trainer)
    return results


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    """Results of every rank, by name and number of ranks."""
    directory = tmp_path_factory.mktemp("ranks")
    ranks = results_of(worker, 4, directory)
    for results in ranks:
        results["directory", 4] = directory
    return {key: [results[key] for results in ranks[: key[-1]]] for key in ranks[0]}


@pytest.fixture(scope="module")
def alone():
    """What one process gets, by the settings that may change that."""
    found: dict[str, Any] = {}

    def get(settings):
        torch.set_num_threads(1)
        settings = {key: value for key, value in settings.items() if key not in ("fsdp", "queue_features")}
        if str(settings) not in found:
            found[str(settings)] = train(make_trainer(Ranks(), **settings))
        return found[str(settings)]

    return get


@pytest.fixture(scope="module")
def pretrained_alone():
    torch.set_num_threads(1)
    return pretrain(make_mae_trainer(Ranks()))


def assert_same(results, expected):
    (metrics, weights, queue), (expected_metrics, expected_weights, expected_queue) = results, expected
    for step, (got, want) in enumerate(zip(metrics, expected_metrics, strict=True)):
        assert got.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-7, msg=f"{name}, step {step}")
    for got, want in zip(weights, expected_weights, strict=True):
        assert got.keys() == want.keys()
        a, b = (torch.cat([tensor.flatten().double() for tensor in w.values()]) for w in (got, want))
        assert (a - b).norm() <= 1e-5 * b.norm()
    torch.testing.assert_close(queue, expected_queue, rtol=0, atol=0)


@pytest.mark.parametrize("name, size", [(name, size) for name, (_, sizes) in RUNS.items() for size in sizes])
def test_ranks_take_the_same_steps(of_ranks, alone, name, size):
    """Statistics, losses, weights and queues, on every rank, are those of one process, up to rounding."""
    expected = alone(RUNS[name][0])
    last = list(expected[1][0])[-1]
    moved = expected[1][0][last] - expected[1][1][last]
    assert moved.abs().max() > 1e-5 and all(any("/scale" in key for key in metrics) for metrics in expected[0])
    for results in of_ranks[name, size]:
        assert_same(results, expected)


@pytest.mark.parametrize("size, other", [(2, 4), (4, 2)])
def test_a_run_goes_on_at_another_number_of_ranks(of_ranks, size, other):
    """Weights and averages are those that were saved, to the last bit, and the next step is the same."""
    saved = of_ranks["fsdp", size][0][1]
    for of_rank in of_ranks["loaded", size, other]:
        for step, weights, metrics in of_rank:
            assert step == STEPS
            for got, want in zip(weights, saved, strict=True):
                assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
            torch.testing.assert_close(metrics["loss"], of_rank[0][2]["loss"], rtol=1e-5, atol=1e-7)
            assert metrics["grad_norm"] > 0


def test_a_run_by_pair_goes_on_in_shards(of_ranks):
    """Its network is tried on conditions of the checkpoint before the weights are loaded."""
    saved = of_ranks[PAIRS_IN_SHARDS, 2][0][1]
    for loaded in of_ranks["pairs loaded", 2]:
        for got, want in zip(loaded, saved, strict=True):
            assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("name, size", [(name, size) for name in ("mae", "mae, fsdp") for size in (2, 4)])
def test_ranks_pretrain_alike(of_ranks, pretrained_alone, name, size):
    for results in of_ranks[name, size]:
        assert_same(results, pretrained_alone)


@pytest.mark.parametrize("size", [2, 4])
def test_the_ranks_of_a_host_hold_one_queue(of_ranks, size):
    """It is that of one process, to the last bit, when it is filled and when it is read anew."""
    expected = queues(Ranks())["states"]
    for of_rank in of_ranks["queues", size]:
        assert of_rank["states"] == expected and expected[0] == expected[1]
    assert of_rank["needed"] <= sum(of_rank["taken"]) < 1.1 * of_rank["needed"]


def test_an_encoder_in_shards_is_evaluated_and_saved(of_ranks, tmp_path):
    encoder_run(tmp_path, Ranks())
    (directory, *_) = of_ranks["directory", 4]
    (*_, expected), whole = read_records(tmp_path), load_file(tmp_path / "model.safetensors")
    for size in (2, 4):
        *_, last = read_records(directory / f"encoder_{size}")
        assert last["recon_loss_test"] == pytest.approx(expected["recon_loss_test"], rel=1e-3)
        weights = load_file(directory / f"encoder_{size}" / "model.safetensors")
        assert weights.keys() == whole.keys() and all(weights[name].shape == its.shape for name, its in whole.items())


def test_ranks_without_a_label_are_refused():
    with pytest.raises(ValueError, match="labels_per_step is 4, expected at least the 8 ranks"):
        make_trainer(Ranks(0, 8))
    with pytest.raises(ValueError, match="labels_per_step is 4, expected a multiple of the 3 ranks"):
        make_trainer(Ranks(0, 3), labels_at_once=1)


def test_torchrun_and_going_on_alone(tmp_path):
    """Two processes with shards, then one: the run is that of one process. Cosine decay is off: steps change."""
    tiny = [
        "model=drifting_dit",
        "model.patch_size=4", "model.embed_dim=16", "model.depth=1", "model.num_heads=2", "model.num_style_tokens=2",
        "step.gen_per_label=6", "step.pos_per_label=8", "train.batch_size=40", "train.log_every=1",
        "loss.temperatures=[0.5]", "optimizer.cosine_decay=false",
    ]  # fmt: skip
    train = ["-m", "drifting.train", "--out", str(tmp_path / "two"), *tiny]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run([*torchrun, *train, "train.steps=3", "step.fsdp=true"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Fréchet distance to the test images") == 1
    command_line([*train[2:], "train.steps=5"])
    command_line(["--out", str(tmp_path / "one"), *tiny, "train.steps=5"])
    one, two = (read_records(tmp_path / name) for name in ("one", "two"))
    assert [record["step"] for record in two] == [1, 2, 3, 4, 5]
    for a, b in zip(one, two, strict=True):
        assert a["scale"] == pytest.approx(b["scale"], rel=1e-5) and a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    a, b = (torch.cat([tensor.flatten().double() for tensor in w.values()]) for w in weights)
    assert (a - b).norm() <= 1e-5 * a.norm()


def test_ranks_that_cannot_share_are_told(tmp_path):
    config = load_config("digits", ["train.batch_size=40"])
    with pytest.raises(UserError, match="train.batch_size is 40, expected a multiple of the 3 ranks"):
        with opened_run(RunDirectory(tmp_path), config, Ranks(0, 3)):
            pass
