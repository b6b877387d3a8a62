"""Training of the masked autoencoder, and of a generator in its feature space."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from run_records import read_records
from safetensors.torch import load_file

from drifting import pretrain as command
from drifting.config import PretrainConfig, load_config, read_config
from drifting.data import open_dataset
from drifting.errors import UserError
from drifting.hub import vae
from drifting.hub.sources import load_mae
from drifting.models import MAE
from drifting.pretrain import build_trainer, pretrain
from drifting.train import train
from drifting.training import MAETrainer
from drifting.training.checkpoint import load_checkpoint
from drifting.training.distributed import Ranks

TINY = [
    "data=digits", "model.base_channels=4", "model.dropout_prob=0.2", "loss.finetune_steps=3",
    "loss.finetune_warmup_steps=2", "train.batch_size=16", "train.log_every=1", "train.eval_every=0",
    "train.save_every=3", "train.steps=6",
]  # fmt: skip


def make_trainer(base_channels: int = 8, in_chans: int = 1, **settings) -> MAETrainer:
    torch.manual_seed(0)
    config = PretrainConfig()
    config.train.steps = 40
    for name, value in ({"learning_rate": 3e-3, "warmup_steps": 1} | settings).items():
        (section,) = (part for part in (config.loss, config.step, config.optimizer) if hasattr(part, name))
        setattr(section, name, value)
    return MAETrainer(MAE(in_chans, base_channels, (1, 1, 1, 1), 2), config, "cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 6 steps with checkpoints at 3 and 6."""
    out = tmp_path_factory.mktemp("runs") / "mae"
    pretrain(read_config("mae_fashion_mnist", TINY, PretrainConfig), out)
    return out


def test_leaves_a_complete_run_directory(finished):
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["lambda_cls"] for record in records] == pytest.approx([0, 0, 0, 0, 0.05, 0.1])
    assert records[-1]["recon_loss_test"] > 0 and "recon_loss_test" not in records[-2]
    assert json.loads((finished / "model.json").read_text())["kind"] == "mae"
    width, height = Image.open(finished / "samples" / "step_00000006.png").size
    assert width > 2.9 * height  # image, visible part and reconstruction side by side


def test_resumed_run_equals_an_uninterrupted_one(finished, tmp_path):
    out = tmp_path / "resumed"
    shutil.copytree(finished, out)
    (out / "checkpoints" / "step_00000006.pt").unlink()
    pretrain(read_config("mae_fashion_mnist", TINY, PretrainConfig), out)
    assert read_records(out) == read_records(finished)
    expected, weights = (load_file(folder / "model.safetensors") for folder in (finished, out))
    assert all(torch.equal(expected[name], weights[name]) for name in expected)


def test_saved_weights_are_the_average(finished):
    state = load_checkpoint(finished / "checkpoints")
    (average,) = state["averages"].values()
    for name, weight in load_mae(finished).state_dict().items():
        assert torch.equal(weight, average["weights"][name])
        assert name.endswith("bias") or not torch.equal(weight, state["model"][name])


def test_generator_trains_in_its_features(finished, tmp_path):
    settings = [
        "model=residual_mlp", "model.width=16", "step.gen_per_label=4", "step.pos_per_label=4",
        "train.steps=2", "train.log_every=1", f"loss.mae={finished}",
    ]  # fmt: skip
    for extractors, expected in (("mae", {"global", "layer4_mean"}), ("[mae,pixels]", {"mae/layer4", "global"})):
        out = tmp_path / extractors
        train(load_config("digits", [*settings, f"loss.feature_extractor={extractors}"]), out)
        record = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        assert expected <= record["scale"].keys() and record["lambda"].keys() == record["scale"].keys()
    assert "pixels" in record["scale"]


def test_share_of_the_classification_loss():
    trainer = make_trainer(lambda_cls=0.3, finetune_steps=10, finetune_warmup_steps=4, finetune_lambda_cls=0.2)
    assert [trainer.lambda_at(step) for step in (0, 29)] == [0.3, 0.3]
    assert [trainer.lambda_at(step) for step in (30, 31, 34, 39)] == pytest.approx([0, 0.05, 0.2, 0.2])


def test_learns_what_can_be_known():
    """Images that are bright at the left or at the top: from the visible part, the hidden one and the label follow."""
    trainer = make_trainer(lambda_cls=0.5, ema_decay=0.5)
    labels = torch.arange(16) % 2
    bright = (torch.arange(8) < 4).expand(1, 8, 8).float() * 2 - 1
    images = torch.stack([bright, bright.mT])[labels]
    metrics = [trainer.train_step(images, labels) for _ in range(40)]
    assert metrics[0]["recon_loss"] > 0.3 and metrics[-1]["recon_loss"] < 0.1
    assert metrics[0]["cls_loss"] > 0.6 and metrics[-1]["cls_loss"] < 0.4
    hidden = trainer.model.random_mask(images)
    restored = trainer.ema_model.eval().reconstruct(images, hidden)
    assert (restored - images).square().mean() < 0.2


@pytest.mark.parametrize(
    "images, labels, expected",
    [
        (torch.rand(4, 1, 16, 16), torch.tensor([0.7, 1.7, 0.2, 1.0]), "labels is torch.float32"),
        (torch.rand(4, 1, 16, 16), torch.tensor([True, False] * 2), "labels is torch.bool"),
        (torch.rand(4, 1, 16, 16), torch.tensor([0, 1, 2, 0]), "labels has values from 0 to 2, expected 0 … 1"),
        (torch.rand(4, 1, 16, 16), torch.tensor([0, 1]), r"labels is torch.int64 \[2\], expected .*\[4\]"),
        (torch.randint(256, (4, 1, 16, 16)).to(torch.uint8), torch.zeros(4).long(), "samples are torch.uint8"),
        (torch.full((4, 1, 16, 16), torch.nan), torch.zeros(4).long(), "samples have NaN"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(images, labels, expected):
    with pytest.raises(ValueError, match=expected):
        make_trainer().train_step(images, labels)


def test_arrays_and_defaults_of_torch_change_nothing():
    images, labels, trainers = torch.rand(4, 1, 16, 16), torch.tensor([0, 1, 1, 0]), [make_trainer(), make_trainer()]
    trainers[1].model.load_state_dict(trainers[0].model.state_dict())
    expected = trainers[0].train_step(images, labels)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        found = trainers[1].train_step(images.numpy(), labels.tolist())
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_bf16_is_of_the_model_alone():
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
    whole, half = (make_trainer(base_channels=64, lambda_cls=0.5, bf16=bf16) for bf16 in (False, True))
    dtypes = []
    half.model.encoder.conv1.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    expected, metrics = whole.train_step(images, labels), half.train_step(images, labels)
    assert dtypes == [torch.bfloat16] and {p.dtype for p in half.model.parameters()} == {torch.float32}
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, rtol=0.05, atol=0)
    assert metrics["loss"].dtype == torch.float32 and metrics["loss"] != expected["loss"]


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_a_step_in_parts_is_the_same_step(at_once):
    """Parts of unequal size among them; in float64, as norms of few values magnify what is rounded."""
    images, labels = torch.randn(8, 1, 8, 8, dtype=torch.float64), torch.arange(8) % 2
    whole, parts = (make_trainer(lambda_cls=0.3, images_at_once=n, max_grad_norm=1e6) for n in (None, at_once))
    sizes = []
    for trainer in (whole, parts):
        trainer.model.double()
    parts.model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    expected, metrics = whole.train_step(images, labels), parts.train_step(images, labels)
    assert sum(sizes) == 8 and max(sizes) == at_once
    torch.testing.assert_close(metrics, expected, rtol=1e-6, atol=0)
    gradients = [torch.cat([p.grad.flatten() for p in trainer.model.parameters()]) for trainer in (whole, parts)]
    assert (gradients[0] - gradients[1]).norm() <= 1e-9 * gradients[0].norm()


def test_compile_is_of_the_network_in_training(monkeypatch):
    graphs = []
    module_compile = torch.nn.Module.compile
    backend = lambda graph, inputs: graphs.append(graph) or graph  # noqa: E731
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: module_compile(module, backend=backend))
    torch._dynamo.reset()
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4) % 2
    plain, compiling = (make_trainer(lambda_cls=0.5, compile=on) for on in (False, True))
    expected, metrics = plain.train_step(images, labels), compiling.train_step(images, labels)
    assert graphs
    torch.testing.assert_close(metrics, expected, rtol=1e-3, atol=1e-5)
    assert compiling.model.state_dict().keys() == plain.model.state_dict().keys()
    compiled = len(graphs)
    compiling.ema_model.eval().reconstruct(images, plain.model.random_mask(images))
    assert len(graphs) == compiled


@pytest.fixture
def fake_vae(monkeypatch):
    """Latents of half the size, of standard deviation 0.1: RGB and its mean."""

    class FakeVae:
        dtype = torch.float32

        def encode(self, images):
            assert images.shape[1] == 3
            colours = torch.nn.functional.avg_pool2d(images, 2) / vae.LATENT_SCALE
            mean = torch.cat([colours, colours.mean(1, keepdim=True)], 1)
            return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=0.1 / vae.LATENT_SCALE + 0 * mean))

        def decode(self, latents):
            return SimpleNamespace(sample=latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3))

    monkeypatch.setattr(vae, "require_vae", lambda device: FakeVae())


def test_latents_are_drawn_in_each_step(fake_vae):
    trainer = make_trainer(in_chans=4, learning_rate=0.0, latents=True, images_at_once=6)
    seen = []
    trainer.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.rand(12, 1, 16, 16) * 2 - 1
    for _ in range(2):
        trainer.train_step(images, torch.arange(12) % 2)
    mean = torch.nn.functional.avg_pool2d(images, 2).expand(-1, 4, -1, -1)
    noise = torch.stack([torch.cat(seen[:2]), torch.cat(seen[2:])]) - mean  # of two steps
    assert noise.shape == (2, 12, 4, 8, 8) and noise.std(1).mean() == pytest.approx(0.1, rel=0.05)
    assert noise.mean().abs() < 0.01 and (noise[0] * noise[1]).mean().abs() < 1e-3


def test_learns_latents_of_cropped_images(tmp_path, fake_vae):
    """As the configurations of the latent encoders do, at a small size."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (tmp_path / split / "class").mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / "class" / f"{number}.png")
    small = [
        f"data.path={tmp_path}", "data.image_size=16", "data.workers=0", "model.base_channels=32",
        "model.layers=[1,1,1,1]", "train.batch_size=4", "train.steps=2", "step.images_at_once=3",
    ]  # fmt: skip
    config = read_config("mae_256", small, PretrainConfig)
    assert config.data.crop and config.data.flip and config.step.latents
    pretrain(config, tmp_path / "mae")
    mae = load_mae(tmp_path / "mae")
    assert mae.config["in_chans"] == 4 and mae.config["num_classes"] == 1
    assert (tmp_path / "mae" / "samples" / "step_00000002.png").is_file()


def test_latents_cannot_be_encoded_again():
    digits = dataclasses.replace(open_dataset(read_config("mae_fashion_mnist", TINY, PretrainConfig).data), latent=True)
    with pytest.raises(UserError, match="step.latents is true, but the data are latents already"):
        build_trainer(read_config("mae_256", (), PretrainConfig), digits, Ranks())


def test_mistakes_are_told(finished, tmp_path):
    with pytest.raises(UserError, match=r"seed: 0, now 1.*choose another --out"):
        pretrain(read_config("mae_fashion_mnist", [*TINY, "seed=1"], PretrainConfig), finished)
    with pytest.raises(UserError, match="model.patch_size, model.input_patch_size: images are 8 × 8"):
        command.main(["--out", str(tmp_path / "a"), *TINY, "model.patch_size=3"])
    with pytest.raises(UserError, match="loss.mae is .*, of 1 channels: the data have 3"):
        folder = tmp_path / "images" / "class"
        folder.mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
        overrides = ["data=folder", f"data.path={folder.parent}", "data.image_size=8"]
        overrides += ["loss.feature_extractor=mae", f"loss.mae={finished}"]
        train(load_config("digits", overrides), tmp_path / "c")
    with pytest.raises(UserError, match="loss.mae: there is no run directory .*drifting.pretrain"):
        overrides = ["loss.feature_extractor=mae", f"loss.mae={tmp_path / 'absent'}"]
        train(load_config("digits", overrides), tmp_path / "b")
