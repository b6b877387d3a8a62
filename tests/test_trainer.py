"""Algorithm 1: what a step draws, weighs, optimises and averages."""

import copy
import io
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import drift_ops
from drifting.config.schema import GuidanceConfig
from drifting.data import SampleQueue
from drifting.errors import UserError
from drifting.models import DriftingDiT, LatentFeatureExtractor
from drifting.training import create_trainer
from drifting.training.groups import sample_cfg_scale, uncond_weight

CLASSES = 5
L, G, P, U = 3, 4, 6, 2
SETTINGS: dict[str, Any] = dict(
    feature_extractor="pixels", learning_rate=1e-3, device="cpu", queue_size=8, labels_per_step=L, gen_per_label=G,
    pos_per_label=P, uncond_per_label=U, uncond_prob=0.0, cfg_scale_range=(2.0, 3.0), warmup_steps=0,
)  # fmt: skip


def make_trainer(**settings):
    torch.manual_seed(0)
    model = DriftingDiT(
        img_size=4, patch_size=2, in_chans=2, num_classes=CLASSES, embed_dim=16, depth=1, num_heads=2,
        num_style_tokens=2, style_vocab=4, n_cls_tokens=1,
    )  # fmt: skip
    return create_trainer(model, **(SETTINGS | settings))


def batch(size: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose values lie within 0.1 of their label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % CLASSES
    noise = torch.rand(size, 2, 4, 4, generator=generator) * 0.2 - 0.1
    return labels.view(-1, 1, 1, 1) + noise, labels


class Recorder:
    """Stands between trainer and loss or model and keeps what passes."""

    def __init__(self, trainer):
        backward, forward = trainer._backward, trainer.model.forward
        self.loss_inputs, self.model_inputs = [], []

        def record_step(groups):
            gen, *rest = backward(groups)
            self.loss_inputs.append((gen, groups.pos, groups.uncond, groups.weight))
            return gen, *rest

        def record_model(z, y, cfg_scale, style=None):
            self.model_inputs.append((z, y, cfg_scale, style))
            return forward(z, y, cfg_scale, style)

        trainer._backward, trainer.model.forward = record_step, record_model


# ---------------------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("exponent", [0.0, 1.0, 3.0, 5.0])
def test_guidance_follows_its_power_law(exponent):
    """Kolmogorov-Smirnov distance to the integral of α^-k, well under the 0.1% critical value 1.95/√n."""
    low, high, n = 1.5, 6.0, 20_000
    law = GuidanceConfig([low, high], exponent, 0.0)
    alpha = sample_cfg_scale(n, law, torch.Generator().manual_seed(0)).double().sort().values
    if exponent == 1:
        cdf = (alpha / low).log() / math.log(high / low)
    else:
        q = 1 - exponent
        cdf = (alpha**q - low**q) / (high**q - low**q)
    steps = torch.arange(n) / n
    assert (cdf - steps).abs().max() < 1.95 / math.sqrt(n)
    assert low <= alpha[0] and alpha[-1] <= high


def test_guidance_share_at_one():
    alpha = sample_cfg_scale(20_000, GuidanceConfig([2.0, 4.0], 3.0, 0.3), torch.Generator().manual_seed(0))
    assert abs((alpha == 1).float().mean() - 0.3) < 0.015
    assert alpha[alpha != 1].min() >= 2
    assert (sample_cfg_scale(100, GuidanceConfig([1.0, 1.0], 3.0, 0.0)) == 1).all()


@settings(deadline=None)
@given(st.floats(1, 10), st.integers(1, 200), st.integers(1, 50))
def test_uncond_weight(alpha, num_gen, num_uncond):
    weight = uncond_weight(torch.tensor([alpha, 1.0], dtype=torch.float64), num_gen, num_uncond)
    assert weight[0].item() * num_uncond == pytest.approx((alpha - 1) * (num_gen - 1))
    assert weight[1] == 0


# ---------------------------------------------------------------------------------------------------- one step


def test_step_has_the_shapes_of_algorithm_1():
    trainer = make_trainer()
    seen = Recorder(trainer)
    metrics = trainer.train_step(*batch())
    ((gen, pos, uncond, weight, *_),) = seen.loss_inputs
    ((z, y, alpha, style),) = seen.model_inputs
    assert gen.shape == (L, G, 2, 4, 4) and pos.shape == (L, P, 2, 4, 4) and uncond.shape == (L, U, 2, 4, 4)
    assert z.shape == (L * G, 2, 4, 4) and style.shape == (L * G, 2)
    assert y.shape == alpha.shape == (L,) and len(set(y.tolist())) == L  # one label a group, no repeats
    assert ((pos - y.view(L, 1, 1, 1, 1)).abs() <= 0.1 + 1e-6).all()  # positives of that very label
    assert (2 <= alpha).all() and (alpha <= 3).all()
    torch.testing.assert_close(weight, (alpha - 1) * (G - 1) / U)
    assert {"loss", "grad_norm", "sample_spread", "pixels/scale", "pixels/lambda_0.02"} <= set(metrics)
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())


def test_unconditional_negatives_come_from_all_classes():
    trainer = make_trainer(uncond_per_label=20)
    seen = Recorder(trainer)
    trainer.train_step(*batch())
    uncond = seen.loss_inputs[0][2]
    assert set(uncond.mean((2, 3, 4)).round().long().flatten().tolist()) == set(range(CLASSES))


def test_labels_repeat_only_when_the_classes_run_out():
    trainer = make_trainer(labels_per_step=7)
    seen = Recorder(trainer)
    trainer.train_step(*batch())
    labels = seen.model_inputs[0][1]
    assert sorted(np.bincount(labels, minlength=CLASSES)) == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("trained", [dict(use_cfg_training=False), {}])
def test_without_guidance_negatives_weigh_nothing_and_count_in_the_softmaxes(trained):
    """So it is in the release, whatever the scales that a step draws."""
    trainer, without = (make_trainer(uncond_per_label=num, uncond_prob=1.0) for num in (U, 0))
    seen = Recorder(trainer)
    metrics, others = (each.train_step(*batch(), **trained) for each in (trainer, without))
    ((gen, pos, uncond, weight, *_),) = seen.loss_inputs
    assert uncond.shape == (L, U, 2, 4, 4) and weight.tolist() == [0] * L
    assert (seen.model_inputs[0][2] == 1).all()
    gen, pos, uncond = (x.detach().flatten(2) for x in (gen, pos, uncond))
    options = dict(weight_neg=torch.zeros(L, U), affinity_floor=0.0, backend="reference")
    _, info = drift_ops.drift_loss(gen, pos, uncond, **options)
    lambdas = [lambda_of["pixels/lambda_0.2"].item() for lambda_of in (metrics, others)]
    assert lambdas[0] == pytest.approx(info["loss_0.2"].sqrt().item(), rel=1e-4) != pytest.approx(lambdas[1], rel=1e-3)


def test_guidance_needs_negatives():
    for without, cause in (({"field": "gaussian"}, "loss.field=gaussian"), ({"uncond_per_label": 0}, "per_label=0")):
        trainer = make_trainer(**without)
        with pytest.raises(ValueError, match=rf"cfg_scale_range is \[2.0, 3.0\], but with .*{cause}"):
            trainer.train_step(*batch())
        assert make_trainer(**without).train_step(*batch(), use_cfg_training=False)["skipped_steps"] == 0


def test_pixel_range_clamps_what_the_loss_and_the_caller_see():
    trainer = make_trainer(pixel_range=(-0.01, 0.01))
    torch.nn.init.normal_(trainer.model.final.proj.weight)
    torch.nn.init.normal_(trainer.ema_model.final.proj.weight)
    seen = Recorder(trainer)
    trainer.train_step(*batch())
    assert seen.loss_inputs[0][0].detach().abs().max() == pytest.approx(0.01)
    assert trainer.generate(8).abs().max() == pytest.approx(0.01)


def test_step_is_a_function_of_seed_and_step():
    first, again, other = make_trainer(seed=3), make_trainer(seed=3), make_trainer(seed=4)
    for trainer in (first, again, other):
        torch.manual_seed(id(trainer) % 1000)  # the global generator must not matter
        trainer.train_step(*batch())
        trainer.train_step(*batch(seed=1))
    weights = [torch.cat([p.flatten() for p in t.model.parameters()]) for t in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# ------------------------------------------------------------------------------- optimiser, schedule, average


def test_warmup_counts_steps():
    trainer = make_trainer(learning_rate=0.5, warmup_steps=4)
    rates = []
    for epoch in range(3):  # three epochs of two steps
        for part in range(2):
            trainer.train_step(*batch(seed=2 * epoch + part))
            rates.append(trainer.weights.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])


def test_cosine_decay_ends_at_zero():
    trainer = make_trainer(learning_rate=0.1, decay_steps=4)
    rates = [trainer.weights.learning_rate(step) for step in range(5)]
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * n / 4)) for n in range(5)])


def test_optimizer_and_clipping():
    trainer = make_trainer(max_grad_norm=1e-3)
    assert isinstance(trainer.weights.optimizer, torch.optim.AdamW)
    assert trainer.weights.optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    metrics = trainer.train_step(*batch())
    norm = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm()
    assert metrics["grad_norm"] > 1e-3 and norm == pytest.approx(1e-3, rel=1e-3)


def test_average_follows_the_weights():
    trainer = make_trainer(ema_decay=0.75, learning_rate=1e-2)
    expected = None
    for n in range(4):
        trainer.train_step(*batch(seed=n))
        now = [p.detach().clone() for p in trainer.model.parameters()]
        expected = now if expected is None else [0.75 * e + 0.25 * p for e, p in zip(expected, now, strict=True)]
    for average, e in zip(trainer.ema_model.parameters(), expected, strict=True):
        torch.testing.assert_close(average, e)
    assert not torch.equal(trainer.ema_model.patch_embed.weight, trainer.model.patch_embed.weight)


def test_several_averages_are_those_of_single_ones():
    decays = (0.5, 0.9)
    both, *single = (make_trainer(ema_decay=decay, learning_rate=1e-2) for decay in (decays, *decays))
    for trainer in (both, *single):
        for n in range(3):
            trainer.train_step(*batch(seed=n))
    weights = [both.weights.average(decay).final.proj.weight for decay in decays]
    assert not torch.equal(*weights)
    for weight, trainer in zip(weights, single, strict=True):
        assert torch.equal(weight, trainer.ema_model.final.proj.weight)


def test_generate_uses_the_best_average():
    trainer = make_trainer(ema_decay=(0.5, 0.9))
    with torch.no_grad():
        trainer.weights.average(0.5).final.proj.bias.fill_(7.0)
        trainer.weights.average(0.9).final.proj.bias.fill_(8.0)
    images = trainer.generate(batch_size=3, labels=torch.tensor([0, 1, 2]), cfg_scale=2.0)
    assert images.shape == (3, 2, 4, 4) and (images == 7).all()
    trainer.best_decay = 0.9
    assert (trainer.generate(batch_size=3) == 8).all()


def test_generate_uses_the_best_guidance_scale(monkeypatch):
    def scaled(self, z, y, cfg_scale, style=None):
        return torch.zeros_like(z) + cfg_scale.repeat_interleave(len(z) // len(y)).view(-1, 1, 1, 1)

    monkeypatch.setattr(DriftingDiT, "forward", scaled)
    trainer = make_trainer()
    assert (trainer.generate(2) == 1).all()
    trainer.best_cfg_scale = 2.5
    assert (trainer.generate(2) == 2.5).all() and trainer.generator().cfg_scale == 2.5
    assert (trainer.generate(2, cfg_scale=1.5) == 1.5).all()
    other = make_trainer()
    other.load_state_dict(state := trainer.state_dict())
    assert other.best_cfg_scale == 2.5
    del state["best_cfg_scale"]  # Earlier checkpoints do not say it.
    other.load_state_dict(state)
    assert other.best_cfg_scale == 1


def test_state_dict_continues_exactly():
    """Weights after 3 + 3 steps in two trainers equal those after 6 in one, bit for bit."""
    whole, first, second = (make_trainer(decay_steps=6, ema_decay=(0.5, 0.9)) for _ in range(3))
    for n in range(6):
        whole.train_step(*batch(seed=n))
    for n in range(3):
        first.train_step(*batch(seed=n))
    first.best_decay = 0.9
    second.load_state_dict(first.state_dict())
    for n in range(3, 6):
        second.train_step(*batch(seed=n))
    assert second.step == 6 and second.best_decay == 0.9
    models = [[t.model, t.weights.average(0.5), t.weights.average(0.9)] for t in (whole, second)]
    for one, other in zip(*models, strict=True):
        a, b = one.state_dict(), other.state_dict()
        assert all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------ epochs


def test_train_epoch_averages(monkeypatch):
    trainer = make_trainer()
    step, losses = trainer.train_step, []

    def recording(*args):
        metrics = step(*args)
        losses.append(metrics["loss"].item())
        return metrics

    monkeypatch.setattr(trainer, "train_step", recording)
    metrics = trainer.train_epoch([batch(seed=n) for n in range(3)], use_cfg_training=True)
    assert metrics["avg_loss"] == pytest.approx(np.mean(losses))
    assert metrics["num_steps"] == 3 == trainer.step
    with pytest.raises(ValueError, match="yielded no batch"):
        trainer.train_epoch([])


def test_training_draws_each_class_to_its_images():
    trainer = make_trainer(
        learning_rate=2e-2, labels_per_step=CLASSES, gen_per_label=16, pos_per_label=8, uncond_prob=1.0, ema_decay=0.9,
        decay_steps=200,
    )  # fmt: skip
    for n in range(200):
        trainer.train_step(*batch(seed=n))
    labels = torch.arange(CLASSES).repeat_interleave(20)
    means = trainer.generate(len(labels), labels).mean((1, 2, 3)).view(CLASSES, 20).mean(1)
    assert (means - torch.arange(CLASSES)).abs().max() < 0.25


@pytest.mark.parametrize(
    "argument, value",
    [("learning_rate", 0.0), ("learning_rate", math.nan), ("gen_per_label", 1), ("uncond_prob", 1.5),
     ("ema_decay", -0.1), ("ema_decay", ()), ("ema_decay", (0.9, 2.0)),
     ("cfg_scale_range", (0.5, 2.0)), ("cfg_scale_range", (3.0, 2.0)), ("queue_size", 0)],
)  # fmt: skip
def test_arguments_out_of_range_are_named(argument, value):
    with pytest.raises(ValueError, match=f"{argument} is"):
        make_trainer(**{argument: value})


# ---------------------------------------------------------------------------------------- how a step is computed


def small_extractor() -> LatentFeatureExtractor:
    return LatentFeatureExtractor(2, base_channels=64, layers=(1, 1, 1, 1))


def trained_pair(**settings):
    """Two trainers of the same model, the second with these settings.

    Samples far from each other and a wide kernel: the field amplifies no rounding.
    """
    plain, special = (
        make_trainer(feature_extractor=small_extractor(), temperatures=(0.5,), **own) for own in ({}, settings)
    )
    for name, parameter in plain.model.named_parameters():
        if "modulation" in name or "proj" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    special.load_state_dict(plain.state_dict())
    return plain, special


def gradient(trainer) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


def test_bf16_is_of_the_networks_alone(monkeypatch):
    """The gradient is that of float32 up to 8 bits; what trains is float32, and so is the field."""
    plain, half = trained_pair(bf16=True)
    seen, drift_loss = [], drift_ops.drift_loss

    def record(gen, pos, neg, **options):
        losses, infos = drift_loss(gen, pos, neg, **options)
        seen.append(({t.dtype for t in (*gen, *pos, *neg)}, {loss.dtype for loss in losses}))
        return losses, infos

    plain.train_step(*batch())
    monkeypatch.setattr(drift_ops, "drift_loss", record)
    half.train_step(*batch())
    assert seen == [({torch.bfloat16}, {torch.float32})]
    assert {p.dtype for p in (*half.model.parameters(), *half.ema_model.parameters())} == {torch.float32}
    a, b = gradient(plain), gradient(half)
    assert not torch.equal(a, b) and (a - b).norm() < 0.1 * a.norm()
    assert half.generate(2).dtype == torch.float32


def test_bf16_in_parts_is_one_big_step():
    _, whole = trained_pair(bf16=True)
    _, parts = trained_pair(bf16=True, labels_at_once=2, activation_checkpointing=True)
    for trainer in (whole, parts):
        trainer.train_step(*batch())
    assert (gradient(whole) - gradient(parts)).norm() < 0.02 * gradient(whole).norm()


def test_checkpointing_computes_blocks_twice():
    plain, checkpointing = trained_pair(activation_checkpointing=True)
    calls = {id(plain): [], id(checkpointing): []}
    for trainer in (plain, checkpointing):
        trainer.model.blocks[0].register_forward_pre_hook(
            lambda *_, t=trainer: calls[id(t)].append(torch.is_grad_enabled())
        )
        trainer.train_step(*batch())
        trainer.model.generate(2)
    assert calls[id(plain)] == [True, False] and calls[id(checkpointing)] == [True, True, False]
    torch.testing.assert_close(gradient(checkpointing), gradient(plain))


def test_compile_is_of_both_networks(monkeypatch):
    compiled = []

    def backend(graph, inputs):
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]  # blocks are parts
        compiled.append({str(node.target) for part in parts for node in part.graph.nodes})
        return graph

    module_compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: module_compile(module, backend=backend))
    torch._dynamo.reset()
    plain, compiling = trained_pair(compile=True, activation_checkpointing=True)
    for trainer in (plain, compiling):
        trainer.train_step(*batch())
    used = set().union(*compiled)
    assert any("scaled_dot_product_attention" in t for t in used) and any("group_norm" in t for t in used)
    torch.testing.assert_close(gradient(compiling), gradient(plain), rtol=1e-3, atol=1e-5)
    assert compiling.model.state_dict().keys() == plain.model.state_dict().keys()
    graphs = len(compiled)
    compiling.generate(3)
    assert len(compiled) == graphs, "the averages are not compiled"


# ------------------------------------------------------------------------------------------------ steps in parts


@pytest.mark.parametrize("labels_at_once", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"uncond_prob": 1.0}], ids=["guided", "unguided"])
def test_step_in_parts_is_one_big_step(labels_at_once, settings):
    """Gradient and report agree though the field's statistics are over all labels; each part's own would not do."""
    whole, parts = (
        make_trainer(feature_extractor=small_extractor(), labels_at_once=at_once, **settings)
        for at_once in (None, labels_at_once)
    )
    for _ in range(2):
        whole.train_step(*batch())  # a fresh model's gradients are 0 but for the last layer's
    parts.load_state_dict(whole.state_dict())
    expected, metrics = whole.train_step(*batch()), parts.train_step(*batch())
    assert expected.keys() == metrics.keys()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-5, atol=1e-7)
    for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        assert a.grad is not None and a.grad.any(), name
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5 * float(a.grad.abs().max()), msg=name)


def test_parts_hold_less_at_once():
    """The maps of all labels are gone by the time that the gradient of a part is computed."""
    sizes, maps = [], []
    trainer = make_trainer(labels_at_once=2)
    forward, of_groups = trainer.model.forward, trainer.loss_fn.of_groups

    def record(z, *args, **extra):
        sizes.append((len(z), torch.is_grad_enabled(), sum(of_map() is not None for of_map in maps)))
        return forward(z, *args, **extra)

    def remember(*sides):
        maps.extend(weakref.ref(of_map) for side in sides[:3] for of_map in side.values())
        return of_groups(*sides)

    trainer.model.forward, trainer.loss_fn.of_groups = record, remember
    trainer.train_step(*batch())
    assert sizes == [(2 * G, False, 0), (G, False, 0), (2 * G, True, 0), (G, True, 0)] and maps


# ------------------------------------------------------------------------------------------- what a trainer is given


def trained_on(x, y, **settings) -> torch.Tensor:
    trainer = make_trainer(**settings)
    trainer.train_step(x, y)
    return gradient(trainer)


X, Y = batch()


@pytest.mark.parametrize(
    "x, y",
    [(X.numpy(), Y.numpy()), (X.tolist(), Y.tolist()), (X.double(), Y.to(torch.uint8)), (X.clone().requires_grad_(), Y),
     (X, list(Y)), (X, list(Y.numpy())), (X, tuple(Y.tolist())), (X.numpy().astype("f8"), Y.int())],
)  # fmt: skip
def test_batches_may_be_arrays_and_lists(x, y):
    assert torch.equal(trained_on(x, y), trained_on(X, Y))
    trainer = make_trainer()
    assert trainer.train_epoch([(x, y)])["num_steps"] == 1
    assert torch.equal(gradient(trainer), trained_on(X, Y))
    drawn = [trainer.generate(40, labels, generator=torch.Generator().manual_seed(0)) for labels in (y, Y)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    "x, y, expected",
    [
        (X, Y + 0.7, "a label is 0.69.*, expected an integer or text"),
        (X, Y.float(), "a label is 0.0"),
        (X, Y > 2, "a label is False"),
        (X, Y * math.nan, "a label is nan"),
        (X, [None] * 40, "a label is None"),
        (X, torch.eye(CLASSES)[Y], r"a label is \[1.0, 0.0"),
        (X, Y.unsqueeze(1), r"a label is \[0\]"),
        (X, Y[:5], r"labels are tensor\(\[0, 1, 2, 3, 4\]\), expected 40, one for each sample"),
        (X, 3, "labels are 3, expected 40"),
        (X, "cat", "labels are cat, expected 40"),
        ((X.abs() * 50).to(torch.uint8), Y, r"samples are torch.uint8, expected floating-point .* x / 127.5 - 1"),
        ((X.abs() * 50).long(), Y, "samples are torch.int64"),
        (X > 0, Y, "samples are torch.bool"),
        (X + 0j, Y, "samples are torch.complex64"),
        (X * math.nan, Y, "samples have NaN or infinity"),
        (X[:0], Y[:0], r"shape \[0, 2, 4, 4\], expected"),
        (X[0, 0, 0, 0], None, r"shape \[\], expected"),
        (X[:, :1], Y, r"makes samples \[2, 4, 4\], the data have \[1, 4, 4\]"),
        ("abc", Y, "samples are abc, expected a tensor"),
        ({"image": X}, Y, "samples are {'image': .*, expected a tensor"),
        (None, Y, "samples are None, expected a tensor"),
    ],
)
def test_a_batch_that_cannot_be_used_is_refused_in_a_line_and_leaves_no_trace(x, y, expected):
    trainer = make_trainer()
    for step in (trainer.train_step, lambda x, y: make_trainer().train_epoch([(x, y)])):
        with pytest.raises(UserError, match=expected) as caught:
            step(x, y)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert trainer.step == 0
    trainer.train_step(X, Y)
    assert torch.equal(gradient(trainer), trained_on(X, Y))


def test_labels_are_refused_wherever_they_are_given():
    trainer = make_trainer(class_names=np.arange(CLASSES))
    for labels, shown in (([0.7, 1.7], "0.7"), (torch.tensor([0.0, 1.0]), "0.0"), ([True, False], "True")):
        with pytest.raises(ValueError, match=f"no label {shown}, expected one of: 0, 1, 2, 3, 4"):
            trainer.generate(2, labels)
        with pytest.raises(ValueError, match=f"no label {shown}, expected one of: 0, 1, 2, 3, 4"):
            trainer.train_step(X[:2], labels)
        with pytest.raises(ValueError, match="labels are torch.*, expected integers from 0 to 4"):
            SampleQueue(4, CLASSES, (2, 4, 4)).add(X[:2], labels)
    queue = SampleQueue(4, CLASSES, (2, 4, 4))
    queue.add(X[:2].numpy(), [0, 1])
    assert queue.available_labels.tolist() == [0, 1]


def test_a_network_without_labels_takes_targets_of_any_kind():
    network = torch.nn.Linear(3, 2)
    for targets in (torch.rand(6), torch.rand(6, 4), ["a", "b"] * 3):
        trainer = create_trainer(network, "input", noise_shape=(3,), device="cpu", gen_per_label=4)
        assert trainer.train_step(torch.rand(6, 2), targets)["skipped_steps"] == 0


EVERY_PATH = [
    {}, {"queue_features": True}, {"labels_at_once": 1}, {"field": "wflow"}, {"learn_temperature": True},
]  # fmt: skip


@pytest.mark.parametrize("settings", EVERY_PATH, ids=str)
def test_defaults_of_torch_change_nothing(settings):
    def used(trainer):
        trainer.train_step(X.numpy(), Y.tolist())
        other.load_state_dict(trainer.state_dict())
        other.train_step(X, Y)
        samples = other.generate(3, [0, 1, 2], generator=torch.Generator().manual_seed(0))
        return samples, gradient(other)

    first, second, other = make_trainer(**settings), make_trainer(**settings), make_trainer(**settings)
    expected = used(first)
    model = second.model
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        again, other = (create_trainer(copy.deepcopy(model), **(SETTINGS | settings)) for _ in range(2))
        found = used(again)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


def test_the_weights_of_our_encoder_follow_from_its_seed_alone():
    expected = small_extractor()
    try:
        torch.set_default_dtype(torch.float64)
        found = small_extractor()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(expected.parameters(), found.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_network_in_double_precision():
    try:
        torch.set_default_dtype(torch.float64)
        trainer = make_trainer(feature_extractor=["pixels", small_extractor()])
        metrics = trainer.train_step(X, Y)
    finally:
        torch.set_default_dtype(torch.float32)
    assert gradient(trainer).dtype == torch.float64 and metrics["skipped_steps"] == 0


@pytest.mark.parametrize("settings", EVERY_PATH, ids=str)
def test_a_trainer_can_be_pickled(settings):
    trainer, file = make_trainer(**settings), io.BytesIO()
    trainer.train_step(X, Y)
    torch.save(trainer, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    for each in (trainer, other):
        each.train_step(X, Y)
    assert torch.equal(gradient(trainer), gradient(other)) and other.step == 2
