"""A user's file that calls every public function: test_types.py has mypy --strict check it, and runs it.

``assert_type`` says what mypy must know a result to be, which a forgotten annotation would make Any.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import drift_ops
import drifting
from drift_ops import Backend, Field, backends, compute_V, compute_V_multiscale, drift_field, drift_loss
from drifting import config, data, hub, models, training, utils


def the_operator() -> None:
    assert_type((drift_ops.__version__, drifting.__version__), tuple[str, str])
    status: Backend = backends()["reference"]
    assert_type((status.name, status.usable, status.reason), tuple[str, bool, str | None])
    x, y = torch.randn(6, 4, requires_grad=True), torch.randn(8, 4)
    assert_type(compute_V(x, y, x.detach(), sigma=0.5), Tensor)
    assert_type(compute_V_multiscale(x, y, y, temperature=2, backend="reference"), Tensor)
    assert_type(drift_field(x, y, temperature=(0.5, 2.0), field=Field(cost="l2_sq", sides="split")), Tensor)

    gen, pos = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 7, 4)
    losses, info = drift_loss(gen, pos, R_list=(0.1, 0.5))
    assert_type((losses, info["scale"]), tuple[Tensor, Tensor])
    of_maps, infos = drift_loss([gen, gen], [pos, pos], scale=[1.0, torch.ones(2)], normalize=None)
    assert_type((of_maps, infos[0]["scale"]), tuple[list[Tensor], Tensor])


def the_helpers() -> None:
    x, y = torch.randn(6, 4), torch.randn(8, 4)
    V = drifting.compute_V(x, y, utils.compute_V(x, y, x))
    assert_type(utils.drifting_loss(x, V + utils.compute_V_multiscale(x, y, x, sigmas=[0.5, 1])), Tensor)
    assert_type(utils.softmax_normalize_2d(drifting.compute_kernel(x, y) - utils.compute_kernel(x, y)), Tensor)


def the_networks() -> None:
    model = models.DriftingDiT(4, patch_size=2, in_chans=1, num_classes=3, embed_dim=8, depth=1, num_heads=2)
    assert_type(model.generate(2, torch.tensor([0, 2]), 1.5, "cpu"), Tensor)
    assert_type(drifting.generate(models.ConvDecoder((1, 8, 8), channels=(8,)), 2, cfg_scale=torch.ones(2)), Tensor)
    assert_type(drifting.generate(models.ResidualMLP([2], width=8), 2, noise_shape=[64]), Tensor)
    assert_type(sorted([*models.FIELDS, *models.NETWORKS, *models.MODELS]), list[str])
    assert_type(models.Classifier(num_classes=3, channels=[4]).features(torch.zeros(1, 1, 8, 8)), Tensor)


def the_loss() -> None:
    images = torch.randn(2, 4, 8, 8, requires_grad=True)
    encoder = models.MAE(base_channels=8, layers=[1, 1, 1, 1], num_classes=3).feature_extractor()
    latent = models.LatentFeatureExtractor(4, 8, (1, 1, 1, 1))
    stack = models.FeatureStack([("input", models.InputFeatureExtractor()), ("mae", encoder)])
    assert_type(latent.forward(images) | models.PyramidExtractor().forward(images), dict[str, Tensor])
    loss = models.DriftingLoss([stack, "input", lambda x: x.flatten(1)], temperatures=[0.1, 0.5], field="release")
    assert_type(loss.forward(images, torch.randn(2, 4, 8, 8)), Tensor)
    assert_type(models.SimpleDriftingLoss(sigma=0.5).forward(torch.zeros(3, 2), torch.ones(3, 2)), Tensor)


def the_trainer(folder: Path) -> None:
    with training.join_ranks() as ranks:
        assert_type(ranks, training.Ranks)
        trainer = training.create_trainer(nn.Linear(3, 2), "input", device="cpu", noise_shape=(3,), ranks=ranks)
    assert_type(trainer, training.DriftingTrainer)
    assert_type(trainer.train_epoch([torch.randn(64, 2)], use_cfg_training=False)["avg_loss"], float)
    assert_type(trainer.train_step(torch.randn(64, 2))["loss"], Tensor)
    assert_type(trainer.generate(4, cfg_scale=1.0), Tensor)
    trainer.save(folder / "run")
    loaded = drifting.load_generator(folder / "run", model=nn.Linear(3, 2))
    assert_type(loaded.generate(4), Tensor)
    hub.save_generator(hub.RunDirectory(folder / "again"), drifting.Generator(loaded.model, (3,), (2,)))


def the_autoencoder(folder: Path) -> None:
    mae = models.MAE(in_chans=1, base_channels=8, layers=[1, 1, 1, 1], num_classes=10)
    trainer = training.MAETrainer(mae, config.PretrainConfig(), "cpu")
    assert_type(trainer.train_step(torch.randn(4, 1, 8, 8), [0, 1, 2, 3])["recon_loss"], Tensor)
    hub.write_model(folder / "mae", trainer.ema_model, {"step": trainer.step})
    assert_type(drifting.load_mae(folder / "mae").features(torch.randn(1, 1, 8, 8)), dict[str, Tensor])


def the_data(folder: Path) -> None:
    digits = config.load_config("digits", ["train.steps=10"])
    assert_type((digits, digits.loss), tuple[config.Config, config.LossConfig])
    assert_type(config.read_config("mae_256", [], config.PretrainConfig), config.PretrainConfig)
    config.save_config(digits, folder / "config.yaml")
    assert_type((config.EvaluationConfig().num_samples, sorted(data.DATASETS)), tuple[int | None, list[str]])
    images: data.Dataset = data.open_dataset(config.DataConfig(name="digits"), seed=1)
    split: data.Split = data.load_digits().train
    assert_type((images.num_classes, split[data.Draw(0, 5)]), tuple[int, tuple[Tensor, int]])
    batches: Iterator[tuple[Tensor, Tensor]] = data.training_batches(split, 32, seed=0)
    queue = data.SampleQueue(queue_size=8, num_classes=10, latent_shape=(1, 8, 8))
    queue.add(*next(batches))
    assert_type(queue.sample(queue.available_labels, 2), Tensor)


def what_only_mypy_sees(convnext: nn.Module) -> None:
    """These networks are large, or need further libraries."""
    pretrained = [models.FeatureExtractor(in_chans=1, pretrained=False), models.ConvNeXtFeatureExtractor(convnext)]
    generators = [models.DriftingDiTSmall(num_classes=2), models.DriftingDiTBase(), models.DriftingDiTLarge()]
    assert_type(
        (len(pretrained), models.DriftingDiTXL().generate(2), generators[0].num_classes), tuple[int, Tensor, int]
    )


def main(folder: Path) -> None:
    the_operator()
    the_helpers()
    the_networks()
    the_loss()
    the_trainer(folder)
    the_autoencoder(folder)
    the_data(folder)
