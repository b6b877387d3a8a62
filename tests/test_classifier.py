"""The classifier that images are judged by, and the measures in its features."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from drifting import evaluate, train_classifier
from drifting.config.reading import load_config
from drifting.config.schema import EvaluationConfig
from drifting.data import load_digits
from drifting.errors import UserError
from drifting.evaluation.evaluator import FEATURE_SAMPLES, NotMeasurable, open_evaluator
from drifting.evaluation.features import ImageFeatures, Values
from drifting.evaluation.measures import fit_gaussian, frechet_distance
from drifting.hub.sources import load_generator
from drifting.models import Classifier
from drifting.models.network_files import read_model
from drifting.train import train
from drifting.utils.images import to_uint8

ROUNDING = 5e-3  # of the digits' 17 grey levels to those of an image file


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "classifier"
    assert train_classifier.main(["--data", "digits", "--out", str(out), "--epochs", "8"]) == 0
    return out


@pytest.fixture(scope="module")
def evaluator(digits, trained):
    return open_evaluator(EvaluationConfig(features=str(trained)), digits)


def test_recognises_digits(trained, digits):
    accuracy = json.loads((trained / "model.json").read_text())["test_accuracy"]
    assert accuracy > 0.9
    assert train_classifier.measure_accuracy(read_model(trained)[0], digits.test) == accuracy


def test_measures_are_those_of_its_features(evaluator, trained, digits):
    classifier, _ = read_model(trained, kinds=["classifier"])
    with torch.no_grad():
        train, test = (
            fit_gaussian(classifier.features(split.samples()).double().numpy()) for split in (digits.train, digits.test)
        )
    images = to_uint8(digits.train.samples(), digits.pixel_range)
    quality = evaluator(images, digits.train.labels.numpy())
    assert quality["frechet_distance_train"] == pytest.approx(frechet_distance(train, test), rel=ROUNDING)
    assert quality["frechet_ratio"] == pytest.approx(1, abs=ROUNDING)
    assert quality["recognised_share"] > 0.9 and quality["precision"] > 0.8 and quality["recall"] > 0.8
    for measure in ("precision", "recall"):
        assert quality[f"{measure}_train"] == pytest.approx(quality[measure], abs=0.01)
    assert evaluator(images, (digits.train.labels.numpy() + 1) % 10)["recognised_share"] < 0.1
    noise = np.random.default_rng(0).integers(0, 256, images.shape).astype(np.uint8)
    assert evaluator(noise, digits.train.labels.numpy())["frechet_ratio"] > 5
    one_class = images[digits.train.labels.numpy() == 3]
    quality = evaluator(one_class, np.full(len(one_class), 3))
    assert quality["frechet_ratio"] > 5 and quality["recall"] < 0.2 < 0.8 < quality["precision"]
    with pytest.raises(ValueError, match=r"received samples uint8 \[8, 4, 1\], expected uint8 \[8, 8, 1\]"):
        evaluator(images[:3, :, :4], np.zeros(3, np.int64))


def test_configuration_chooses_the_evaluator(trained, digits):
    assert isinstance(open_evaluator(EvaluationConfig(), digits).features, Values)
    config = EvaluationConfig(features=str(trained))
    assert isinstance(open_evaluator(config, digits).features, ImageFeatures)
    with pytest.raises(UserError, match="trained on other data"):
        open_evaluator(config, replace(digits, class_names=("zero", "one")))
    with pytest.raises(NotMeasurable, match="measured of latents.*evaluation.reference=FILE.npz"):
        open_evaluator(EvaluationConfig(), replace(digits, latent=True))
    with pytest.raises(UserError, match="evaluation.reference must name"):
        open_evaluator(config, replace(digits, latent=True))


def test_run_is_evaluated_with_it(trained, tmp_path, capsys):
    config = load_config(
        "digits",
        ["model=drifting_dit",
         "model.embed_dim=16", "model.depth=1", "model.num_heads=2", "train.steps=2", "step.gen_per_label=4",
         "train.eval_every=0", f"evaluation.features={trained}"],
    )  # fmt: skip
    train(config, tmp_path)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    assert evaluate.main([str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_samples"] == FEATURE_SAMPLES
    for measure in ("frechet_distance", "frechet_ratio", "recognised_share", "frechet_distance_train"):
        assert report[measure] == pytest.approx(last[measure], rel=1e-6)


def test_mistakes_are_told(trained, tmp_path):
    with pytest.raises(UserError, match="holds a classifier, not a generator"):
        load_generator(trained)
    with pytest.raises(UserError, match="there is no run directory"):
        read_model(tmp_path / "absent")
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="holds a run of another kind"):
        train_classifier.main(["--data", "digits", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="--epochs is 0"):
        train_classifier.main(["--data", "digits", "--epochs", "0"])


def test_features_are_one_vector_an_image():
    classifier = Classifier(3, 5, (8, 16)).eval()
    x = torch.randn(2, 3, 10, 10)
    assert classifier.features(x).shape == (2, 16) and classifier(x).shape == (2, 5)
    assert Classifier(**classifier.config).config == classifier.config
