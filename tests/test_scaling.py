"""What ranks exchange in a step, counted at 2, 4, 8 and 16 processes, is what ``benchmarks/scaling.py`` predicts; and
the memory that a step takes is what a run says before its first."""

import math
import re
from collections import Counter
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from processes import groups_with, meeting, results_of
from torch.profiler import ProfilerActivity, profile

from benchmarks import scaling
from drifting.config import load_config
from drifting.models import DriftingDiT
from drifting.models.feature_extractor import LatentFeatureExtractor
from drifting.train import main as command
from drifting.training import create_trainer, memory
from drifting.training.distributed import Ranks
from drifting.training.memory import memory_needed

ROOT = Path(__file__).parent.parent

SIZES = (2, 4, 8, 16)
RUNS = {"replicas": {}, "shards": {"fsdp": True, "labels_at_once": 2}}  # four parts, then two, then one
BYTES = {"unsigned char": 1, "long int": 8, "float": 4, "double": 8}
CLASSES, BATCH, SHAPE = 4, 16, (1, 4, 4)


def make_trainer(ranks, **settings):
    torch.manual_seed(0)
    model = DriftingDiT(
        img_size=4, patch_size=2, in_chans=1, num_classes=CLASSES, embed_dim=8, depth=1, num_heads=2,
        num_style_tokens=2, style_vocab=4, n_cls_tokens=1,
    )  # fmt: skip
    trainer = create_trainer(
        model, feature_extractor=["input", "pyramid"], device="cpu", labels_per_step=16, gen_per_label=2,
        pos_per_label=2, uncond_per_label=2, queue_size=2, class_names=range(CLASSES), ranks=ranks, **settings,
    )  # fmt: skip
    trainer.config.train.batch_size = BATCH
    return trainer


def take_step(trainer):
    """What the loop does, too."""
    part = trainer.ranks.share(BATCH)
    trainer.train_step(torch.randn(BATCH, *SHAPE)[part], (torch.arange(BATCH) % CLASSES)[part])
    trainer.ranks.on_all(lambda: 0)


def exchanged(trace) -> Counter:
    """How often each kind of collective was there with so many bytes of a rank. Gloo has no reduce_scatter: it sums the
    whole, as long as what the operation above has for its input."""
    found = Counter()
    for event in trace.profiler.kineto_results.events():
        name = event.name()
        if name.startswith("gloo:"):
            found[name.removeprefix("gloo:"), math.prod(event.shapes()[0]) * BYTES[event.dtypes()[0]]] += 1
        elif name == "c10d::_reduce_scatter_base_":
            size = math.prod(event.shapes()[1]) * BYTES[event.dtypes()[1]]
            found["all_reduce", size] -= 1
            found["reduce_scatter", size] += 1
    return +found


def worker(rank: int, directory: Path) -> dict[tuple[str, int], Counter]:
    counted = {}
    with meeting(rank, max(SIZES), directory):
        for size, ranks in groups_with(rank, SIZES).items():
            for name, settings in RUNS.items():
                trainer = make_trainer(ranks, **settings)
                for _ in range(1 if "fsdp" in settings else 2):  # Only then are DDP's buckets as they stay.
                    take_step(trainer)
                with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
                    take_step(trainer)
                counted[name, size] = exchanged(trace)
    return counted


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """What each rank exchanged, by run and number of ranks."""
    return results_of(worker, max(SIZES), tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name, size", [(name, size) for name in RUNS for size in SIZES])
def test_collectives_and_bytes_are_as_predicted(counted, name, size):
    trainer = make_trainer(Ranks(0, size), **RUNS[name])
    maps = len(trainer.layout.places)
    predicted = Counter()
    stored = trainer.groups.dtype
    for its in scaling.collectives(trainer.config, trainer.model, maps, trainer.sample_shape, stored, size):
        predicted[its.kind, its.values * its.itemsize] += its.count
    for of_rank in counted[:size]:
        assert of_rank[name, size] == predicted


def test_the_page_has_the_predictions():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for name, overrides in (("ablation", ()), ("latent_L", ()), ("latent_L", ["step.fsdp=true"])):
        assert scaling.table(name, load_config(name, overrides), scaling.SIZES) in page


# ------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("settings", [{}, {"labels_at_once": 1}, {"labels_at_once": 2, "gen_per_label": 4}], ids=str)
def test_memory_needed_is_what_a_step_takes(settings):
    """All that there is before a step is counted to the byte; its peak over that, which torch's allocator tells, has
    some buffers of the operator beside what is counted."""
    torch.manual_seed(0)
    model = DriftingDiT(
        8, 2, num_classes=CLASSES, embed_dim=32, depth=2, num_heads=2, num_style_tokens=2, style_vocab=4
    )
    settings = {"labels_per_step": 4, "gen_per_label": 8, "pos_per_label": 8, "uncond_per_label": 4} | settings
    trainer = create_trainer(
        model, feature_extractor=LatentFeatureExtractor(4, 32, (1, 1, 2, 1)), device="cpu", queue_size=8,
        class_names=range(CLASSES), cfg_scale_range=(2.0, 3.0), ema_decay=(0.5, 0.9), **settings,
    )  # fmt: skip
    needed = memory_needed(trainer)
    images, labels = torch.randn(16, 4, 8, 8), torch.arange(16) % CLASSES
    trainer.train_step(images, labels)
    trainer.weights.zero_grad()
    queue, optimizer = trainer.groups.queue, trainer.weights.optimizer
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    there = {
        "parameters": list(model.parameters()), "optimizer": moments,
        "averages": [t for its in trainer.weights.averages.values() for t in its.module.state_dict().values()],
        "feature extractor": list(trainer.loss_fn.feature_extractor.parameters()),
        "queue": [queue.by_class.samples, queue.unconditional.samples],
    }  # fmt: skip
    assert {name: sum(t.nbytes for t in tensors) for name, tensors in there.items()} == {n: needed[n] for n in there}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        trainer.train_step(images, labels)
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    peak = needed["in all"] - sum(needed[name] for name in there)
    assert 0.85 * max(accumulate(sizes)) < peak < 1.05 * max(accumulate(sizes))


def test_a_run_says_first_what_a_step_needs(tmp_path, capsys, monkeypatch):
    tiny = ["model=residual_mlp", "model.width=8", "train.steps=1", "step.gen_per_label=4", "step.pos_per_label=4"]
    command(["--out", str(tmp_path / "a"), *tiny])
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("a step needs"))
    part = r"(?:[a-z ]+) [0-9.]+k?B, "
    assert re.fullmatch(rf"a step needs about [0-9.]+kB of the [0-9.]+GB that a process has: (?:{part}){{5}}…", line)
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    command(["--out", str(tmp_path / "b"), *tiny])
    assert re.search(
        r"a step needs about .*kB of the .*B that .*, … \(lower step.labels_at_once", capsys.readouterr().err
    )
