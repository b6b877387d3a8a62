"""Features of real samples that are kept in a queue: those of the samples drawn with them, and the same steps."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drifting.config import load_config
from drifting.config.schema import Config, GuidanceConfig, StepConfig
from drifting.data import SampleQueue
from drifting.errors import UserError
from drifting.models import DriftingDiT, DriftingLoss, LatentFeatureExtractor
from drifting.training import Ranks, create_trainer, real_features
from drifting.training.groups import ClassGroups
from drifting.training.real_features import MapLayout, keep_features
from drifting.utils.memory import free_memory

CLASSES, BATCH = 5, 12
L, G, P, U = 3, 4, 6, 2


def small_latent(seed: int = 0) -> LatentFeatureExtractor:
    return LatentFeatureExtractor(2, base_channels=64, layers=(1, 1, 1, 1), seed=seed)


def patches(x):
    """A map of several locations, and another of one."""
    return {"values": x.flatten(2).transpose(1, 2), "mean": x.mean((2, 3))}


def in_place(x):
    return x.mul_(2).flatten(1)


EXTRACTORS = {
    "latent": small_latent,
    "input": lambda: "input",
    "list": lambda: [small_latent(), "input", patches],
    "in place": lambda: in_place,
}


def make_trainer(extractor: str = "latent", **settings):
    torch.manual_seed(0)
    model = DriftingDiT(
        img_size=4, patch_size=2, in_chans=2, num_classes=CLASSES, embed_dim=16, depth=1, num_heads=2,
        num_style_tokens=2, style_vocab=4, n_cls_tokens=1,
    )  # fmt: skip
    for name, parameter in model.named_parameters():  # otherwise most gradients are 0 at first
        if "modulation" in name or "proj" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    defaults = dict(
        feature_extractor=EXTRACTORS[extractor](), temperatures=(0.5,), learning_rate=1e-3, device="cpu", queue_size=8,
        unconditional_queue_size=20, labels_per_step=L, gen_per_label=G, pos_per_label=P, uncond_per_label=U,
        uncond_prob=0.3, cfg_scale_range=(1.5, 3.0), warmup_steps=0,
    )  # fmt: skip
    return create_trainer(model, **(defaults | settings))


def batch(seed: int, size: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(size) + seed) % CLASSES
    return labels.view(-1, 1, 1, 1) + torch.randn(size, 2, 4, 4, generator=generator), labels


def train(trainer, steps) -> list[dict[str, torch.Tensor]]:
    return [trainer.train_step(*batch(step)) for step in steps]


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def gradient(trainer) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def assert_same_metrics(results, expected, **tolerance):
    for got, want in zip(results, expected, strict=True):
        assert got.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(got[name], want[name], msg=f"{name}: {got[name]}, {want[name]}", **tolerance)


# ----------------------------------------------------------------------------------------- whose features they are


@st.composite
def layouts(draw):
    """Maps ``[1, T, n, D]`` of n samples."""
    n, dtype = draw(st.integers(0, 4)), draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    places = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4))
    return {str(i): torch.randn(1, T, n, D).to(dtype) for i, (T, D) in enumerate(places)}


@settings(deadline=None)
@given(layouts(), st.integers(1, 3))
def test_maps_pass_through_vectors_unchanged(maps, labels):
    layout = MapLayout(maps)
    vectors = layout.pack(maps)
    unpacked = layout.unpack(vectors.expand(labels, *vectors.shape))
    assert list(unpacked) == list(maps)
    for name, of_map in maps.items():
        assert unpacked[name].dtype == of_map.dtype and unpacked[name].stride(-1) == 1
        assert torch.equal(unpacked[name], of_map.expand(labels, -1, -1, -1))


@settings(deadline=None, max_examples=60)
@given(
    batches=st.lists(st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=12), min_size=1, max_size=4),
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    places=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=3),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 9)),
    drawn=st.tuples(st.integers(1, 8), st.integers(1, 5)),
    guided=st.booleans(),
)
def test_drawn_features_are_those_of_the_drawn_samples(batches, shape, places, sizes, drawn, guided):
    """They have been encoded in other batches, by an extractor that rounds each sample alike in any batch."""

    def extractor(x):
        flat = x.reshape(len(x), -1)
        cells = [torch.arange(T * D).view(T, D) for T, D in places]
        return {str(cell.shape): flat[:, cell % flat.shape[1]] * (cell + 1) for cell in cells}

    step = StepConfig(
        labels_per_step=4, pos_per_label=drawn[0], uncond_per_label=drawn[1], queue_size=sizes[0],
        unconditional_queue_size=sizes[1],
    )  # fmt: skip
    config = Config(step=step, guidance=GuidanceConfig(cfg_scale_range=[2.0, 3.0]))
    loss_fn, device = DriftingLoss(extractor), torch.device("cpu")
    layout = MapLayout(loss_fn.check_extractor(shape, device))
    groups = ClassGroups(
        config, tuple(shape), Ranks(), device, tuple(range(CLASSES)), labelled=True, num_classes=CLASSES,
        num_uncond=drawn[1] if guided else 0,
        keep_features=lambda queue, ranks: keep_features(loss_fn, layout, device, queue, ranks),
    )  # fmt: skip
    for n, labels in enumerate(batches):
        groups.add(torch.randn(len(labels), *shape), torch.tensor(labels))
        of_step = groups.draw(n, guided)
        pos, neg = of_step.maps
        assert (of_step.uncond is not None) == guided
        expected = loss_fn.groups(of_step.pos)
        assert list(pos) == list(expected) and all(torch.equal(pos[name], expected[name]) for name in expected)
        none = {name: of_map[:, :, :0] for name, of_map in pos.items()}
        expected = loss_fn.groups(of_step.uncond) if guided else none
        assert list(neg) == list(expected) and all(torch.equal(neg[name], expected[name]) for name in expected)


# ----------------------------------------------------------------------------------------------------- the same steps


@pytest.mark.parametrize(
    "extractor, special",
    [
        ("latent", {}),
        ("latent", {"labels_at_once": 2}),
        ("latent", {"uncond_prob": 1.0}),
        ("input", {}),
        ("list", {}),
        ("list", {"labels_at_once": 1}),
        ("in place", {"labels_at_once": 1}),
    ],
)
def test_steps_are_those_of_encoding_anew(extractor, special):
    anew, kept = (make_trainer(extractor, queue_features=queue_features, **special) for queue_features in (False, True))
    expected, results = (train(trainer, range(4)) for trainer in (anew, kept))
    assert kept.groups.features is not None and anew.groups.features is None
    assert_same_metrics(results, expected, rtol=1e-4, atol=1e-6)
    assert (gradient(kept) - gradient(anew)).norm() <= 1e-4 * gradient(anew).norm() and gradient(anew).norm() > 0
    assert (weights(kept) - weights(anew)).norm() <= 1e-5 * weights(anew).norm()
    assert torch.equal(kept.groups.queue.by_class.samples, anew.groups.queue.by_class.samples)


@pytest.mark.parametrize("special", [{}, {"labels_at_once": 1}], ids=["whole", "parts"])
def test_bf16_steps_are_those_of_encoding_anew(special):
    """Features are kept in bfloat16, and differ by its rounding, which a batch of another size may do otherwise."""
    anew, kept = (make_trainer(bf16=True, queue_features=queue_features, **special) for queue_features in (False, True))
    expected, results = (train(trainer, range(2)) for trainer in (anew, kept))
    assert kept.groups.features.queue.by_class.samples.dtype == torch.bfloat16
    assert_same_metrics(results, expected, rtol=0.02, atol=1e-4)
    assert (gradient(kept) - gradient(anew)).norm() <= 0.05 * gradient(anew).norm()


@pytest.mark.parametrize(
    "special, generated", [({}, L * G), ({"labels_at_once": 1}, 2 * L * G), ({"uncond_prob": 1.0}, L * G)]
)
def test_a_step_encodes_new_and_generated_samples_only(special, generated):
    trainer = make_trainer(queue_features=True, pos_per_label=50, uncond_per_label=40, **special)
    seen = []
    trainer.loss_fn.feature_extractor.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    for step in range(3):
        seen.clear()
        trainer.train_step(*batch(step))
        assert seen[0] == BATCH and sum(seen) == BATCH + generated


def test_new_samples_are_encoded_in_the_phase_of_the_encoder():
    trainer = make_trainer(queue_features=True)
    phases, enter = [], trainer.stopwatch.enter

    def record(phase):
        phases.append(phase)
        enter(phase)

    trainer.stopwatch.enter = record
    train(trainer, range(1))
    assert phases[:4] == ["communication", "encoder", "communication", "other"]


# ----------------------------------------------------------------------------------------------------------- resuming


def same_queues(one, other) -> bool:
    rings = [(t.groups.features.queue.by_class, t.groups.features.queue.unconditional) for t in (one, other)]
    return all(torch.equal(a.samples, b.samples) for a, b in zip(*rings, strict=True))


@pytest.mark.parametrize("special", [{}, {"bf16": True}, {"labels_at_once": 1}], ids=str)
def test_a_resumed_run_repeats_the_bits(special):
    whole, first, second = (make_trainer("list", queue_features=True, **special) for _ in range(3))
    expected = train(whole, range(6))
    train(first, range(3))
    second.load_state_dict(first.state_dict())
    assert same_queues(first, second)
    assert_same_metrics(train(second, range(3, 6)), expected[3:], rtol=0, atol=0)
    assert torch.equal(weights(second), weights(whole)) and same_queues(second, whole)


@pytest.mark.parametrize("before", [False, True])
def test_a_run_goes_on_with_the_other_value(before, monkeypatch):
    monkeypatch.setattr(real_features, "ENCODED_AT_ONCE", 7)
    whole, first, second = (make_trainer(queue_features=value) for value in (before, before, not before))
    expected = train(whole, range(6))
    train(first, range(3))
    state = first.state_dict()
    if not before:
        del state["groups"]["features"]  # as versions without the key have saved it
    second.load_state_dict(state)
    assert_same_metrics(train(second, range(3, 6)), expected[3:], rtol=1e-4, atol=1e-6)
    assert (weights(second) - weights(whole)).norm() <= 1e-5 * weights(whole).norm()


@pytest.mark.parametrize("other", ["weights", "layout", "type"])
def test_features_of_another_extractor_are_encoded_anew(other):
    """``--change loss.feature_extractor`` and ``--change step.bf16`` leave the queue with what is of no use."""
    first = make_trainer(queue_features=True)
    train(first, range(2))
    special = {"weights": {"feature_extractor": small_latent(seed=1)}, "type": {"bf16": True}, "layout": {}}[other]
    second = make_trainer("input" if other == "layout" else "latent", queue_features=True, **special)
    second.load_state_dict(first.state_dict())
    of_step = second.groups.draw(second.step, True)
    for maps, samples in zip(of_step.maps, (of_step.pos, of_step.uncond), strict=True):
        for name, expected in second.loss_fn.groups(samples).items():
            assert maps[name].dtype == expected.dtype
            torch.testing.assert_close(maps[name], expected, rtol=0.05, atol=0.05)


def test_the_command_changes_it_freely(tmp_path, capfd):
    from drifting.train import train as run

    tiny = [
        "model=drifting_dit",
        "model.patch_size=4", "model.embed_dim=16", "model.depth=1", "model.num_heads=2", "model.num_style_tokens=2",
        "step.gen_per_label=4", "step.pos_per_label=8", "train.batch_size=40",
    ]  # fmt: skip
    for steps, value in ((2, "true"), (3, "false"), (4, "true")):
        run(load_config("digits", [*tiny, f"train.steps={steps}", f"step.queue_features={value}"]), tmp_path)
        state = torch.load(tmp_path / "checkpoints" / f"step_{steps:08d}.pt", weights_only=True)
        assert (state["groups"]["features"] is not None) == (value == "true")


# ------------------------------------------------------------------------------------------------------- what may fail


@pytest.mark.parametrize("share, kept", [(2.0, True), (1.9, False)])
def test_they_are_kept_where_they_take_half_of_the_free_memory(share, kept, monkeypatch, capfd):
    need = (CLASSES * 8 + 20) * 32 * 4  # slots, values of an image, bytes of a value
    monkeypatch.setattr(real_features, "free_memory", lambda device: int(need * share))
    trainer = make_trainer("input", queue_features=True)
    results = train(trainer, range(3))
    assert (trainer.groups.features is not None) == kept
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == (not kept)
    if not kept:
        assert "would take 7.68kB, more than half of the 14.6kB that a process has free on cpu" in lines[0]
        assert "lower step.queue_size (8) or step.unconditional_queue_size (20)" in lines[0]
        assert_same_metrics(results, train(make_trainer("input"), range(3)), rtol=0, atol=0)
        again = make_trainer("input", queue_features=True)
        again.load_state_dict(trainer.state_dict())
        assert again.groups.features is None


@pytest.mark.parametrize(
    "found, kept",
    [([96, 96], True), ([96, 95], False)],
)
def test_all_ranks_need_the_memory(found, kept, capsys):
    """Only rank 0 tells."""

    class Two(Ranks):
        zeros = staticmethod(torch.zeros)

        def on_all(self, action):
            return found

    loss_fn, device = DriftingLoss("input"), torch.device("cpu")
    layout = MapLayout({"input": torch.zeros(1, 1, 2, 1)})
    for rank in range(2):
        queue = SampleQueue(2, 5, (1,), unconditional_queue_size=2)  # Twelve slots of four bytes take 48.
        features = keep_features(loss_fn, layout, device, queue, Two(rank, 2))
        assert (features is not None) == kept
        assert (capsys.readouterr().err == "") == (kept or rank == 1)


def test_free_memory_is_that_of_the_host():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_memory(torch.device("cpu")) <= total


def test_features_that_depend_on_the_batch_are_refused():
    trainer = make_trainer(queue_features=True, feature_extractor=lambda x: x.flatten(1).expand(len(x), -1, -1))
    message = r"map 'lambda' is \(12, 32\), expected \(2, 32\) .* set step.queue_features=false"
    with pytest.raises(UserError, match=message):
        trainer.train_step(*batch(0))
    assert len(trainer.groups.queue) == 0
