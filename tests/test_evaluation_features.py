"""FID and its kin: Inception and DINOv2 with random weights, references in files, guidance sweeps, the best kept."""

import json
import socket
import sys
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from drifting import evaluate, sample
from drifting.config.reading import load_config
from drifting.config.schema import EvaluationConfig
from drifting.errors import UserError
from drifting.evaluation import evaluator as evaluation
from drifting.evaluation import features as evaluation_features
from drifting.evaluation.archives import read_reference, read_samples
from drifting.evaluation.drawing import draw_batches, draw_samples, spread_labels
from drifting.evaluation.evaluator import open_evaluator
from drifting.evaluation.features import Features, ImageFeatures, open_features
from drifting.evaluation.measures import fit_gaussian, frechet_distance, inception_score
from drifting.hub.sources import load_generator
from drifting.models import MAE, Classifier, DriftingDiT
from drifting.models.network_files import write_model
from drifting.train import train
from drifting.training import Ranks, run_evaluation

SMALL = ["model=residual_mlp", "model.width=16", "model.depth=1", "step.gen_per_label=4", "train.eval_every=0"]


def pictures(count: int, seed: int, channels: int = 3, size: int = 16) -> np.ndarray:
    """uint8 images that differ from each other in colour and contrast."""
    rng = np.random.default_rng(seed)
    level = rng.uniform(60, 190, (count, 1, 1, channels))
    noise = rng.standard_normal((count, size, size, channels)) * rng.uniform(5, 60, (count, 1, 1, 1))
    return (level + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def inception(tmp_path_factory, torchvision):
    """torch-fidelity's Inception with random weights, and the file of these."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # so that what is seen reaches the end
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.05, generator=generator)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return network, path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    train(load_config("digits", ["train.steps=2", *SMALL]), out)
    return out


@pytest.fixture
def classifier(tmp_path):
    """A directory with an untrained classifier of digits."""
    path = tmp_path / "classifier"
    path.mkdir()
    write_model(path, Classifier(1, 10, (8, 16)), {"data": "digits"})
    return path


def report(capsys, *arguments: object) -> dict:
    capsys.readouterr()
    assert evaluate.main([str(argument) for argument in arguments]) == 0
    return json.loads(capsys.readouterr().out)


def by_hand(network: nn.Module, images: np.ndarray, channels: int) -> list[torch.Tensor]:
    """Inception's features, logits, and ADM's spatial features ``[N, 17 · 17 · channels]``: the first channels of what
    a block's branches give."""
    caught = []
    handle = network.Mixed_6e.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    with torch.no_grad():
        points, logits = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    handle.remove()
    first = caught[0].permute(0, 2, 3, 1).numpy()[..., :channels]  # of the 1 × 1 convolution
    assert first.shape == (len(images), 17, 17, channels)
    return [points, logits, torch.from_numpy(first.reshape(len(images), -1).copy())]


def distance_of_few(a: torch.Tensor, b: torch.Tensor) -> float:
    """Fréchet distance of few points: the root's trace is the nuclear norm of their products."""
    mean = (a.double().mean(0) - b.double().mean(0)).square().sum()
    a, b = ((part.double() - part.double().mean(0)) / (len(part) - 1) ** 0.5 for part in (a, b))
    return float(mean + a.square().sum() + b.square().sum() - 2 * torch.linalg.matrix_norm(a @ b.T, "nuc"))


def test_inception_measures(inception, tmp_path, capsys, monkeypatch):
    """On the command line, against an ADM-style batch with statistics of more images than it holds."""
    network, weights = inception
    monkeypatch.setattr(evaluation_features, "SPATIAL_CHANNELS", 1)  # takes a fraction of the time of all seven
    real_points, _, real_spatial = by_hand(network, pictures(5, 0), 1)
    points, logits, spatial = by_hand(network, pictures(4, 1), 1)
    assert points.std(0).mean() > 1e-3 * points.abs().mean() > 0  # random weights tell the images apart
    whole, of_space = (fit_gaussian(part.double().numpy()) for part in (real_points, real_spatial))
    np.savez(
        tmp_path / "adm.npz", arr_0=pictures(5, 0)[:4], mu=whole.mean, sigma=whole.covariance, mu_s=of_space.mean,
        sigma_s=of_space.covariance,
    )  # fmt: skip
    np.savez(tmp_path / "samples.npz", pictures(4, 1))
    measures = report(capsys, tmp_path / "samples.npz", "--reference", tmp_path / "adm.npz", "--features", weights)
    assert measures["num_samples"] == 4
    assert measures["fid"] == pytest.approx(distance_of_few(points, real_points), rel=1e-4)
    assert measures["sfid"] == pytest.approx(distance_of_few(spatial, real_spatial), rel=1e-4)
    assert measures["inception_score"] == pytest.approx(inception_score(logits)[0], rel=1e-4)
    assert 0 <= measures["precision"] <= 1 and 0 <= measures["recall"] <= 1


def test_inception_takes_grey_images_as_rgb(inception):
    features = open_features(str(inception[1]))
    grey = pictures(2, 0, channels=1)
    torch.testing.assert_close(features(grey).points, features(grey.repeat(3, axis=3)).points)


def test_spatial_features_are_adms(inception):
    """Whatever the sample's size; no two features are alike."""
    network, weights = inception
    features = open_features(str(weights))
    images = pictures(3, 0, size=20)
    seen = features(images)
    *_, expected = by_hand(network, images, 7)
    assert seen.spatial.shape == (3, 2023) and seen.points.shape == (3, features.dim)
    torch.testing.assert_close(seen.spatial, expected, rtol=1e-4, atol=1e-5)
    assert expected.std(1).min() > 0.1 * expected.abs().mean() > 0


TINY_VIT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 56, "image_size": 224}


def test_dinov2_class_token(tmp_path, torchvision):
    """Of a tiny one with random weights: the normalised first token of ImageNet-normalised images."""
    transformers = pytest.importorskip("transformers")
    model = transformers.Dinov2Model(transformers.Dinov2Config(**TINY_VIT)).eval()
    model.save_pretrained(tmp_path)
    features = open_features(str(tmp_path))
    assert features.distance == "fd_dinov2" and features.dim == 24
    constant = np.full((1, 32, 32, 3), 51, np.uint8)  # which resizing leaves as it is
    points, logits, *_ = features(constant)
    pixels = (0.2 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        hidden = model(pixels.view(1, 3, 1, 1).expand(1, 3, 224, 224)).last_hidden_state
    assert logits is None
    torch.testing.assert_close(points, hidden[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind, lacking", [("ViT", ""), ("Dinov2WithRegisters", ""), ("Dinov2", "layernorm.weight")])
def test_other_transformers_are_told(kind, lacking, tmp_path, torchvision):
    """Rather than measured in with what weights are left random, or out."""
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**TINY_VIT))
    weights = {name: weight for name, weight in model.state_dict().items() if name != lacking}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(UserError, match="holds no DINOv2 in the format of transformers: .* is missing or left over"):
        open_features(str(tmp_path))


class BrightestPixels(nn.Module):
    """Stands for transformers' Dinov2Model."""

    config = SimpleNamespace(hidden_size=3)

    @classmethod
    def from_pretrained(cls, model, output_loading_info):
        assert model == "facebook/dinov2-large" and output_loading_info
        return cls(), {"missing_keys": [], "unexpected_keys": []}

    def forward(self, x):
        assert x.shape[1:] == (3, 224, 224)
        return SimpleNamespace(pooler_output=x.amax((2, 3)))


def test_dinov2_is_given_normalised_images(monkeypatch):
    module = "transformers.models.dinov2.modeling_dinov2"
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(Dinov2Model=BrightestPixels))
    features = open_features("dinov2")
    bright = np.array([255, 51, 0], np.uint8) * np.ones((60, 7, 7, 1), np.uint8)  # more than a batch
    points, logits, *_ = features(bright)
    assert points.shape == (60, features.dim) and logits is None and features.distance == "fd_dinov2"
    assert points[59].tolist() == pytest.approx([(1 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, -0.406 / 0.225], abs=1e-4)


def test_features_of_an_autoencoder(tmp_path):
    mae = MAE(1, 32, (1, 1, 1, 1), 10, input_patch_size=2).eval()
    write_model(tmp_path, mae, {"data": "digits", "step": 1})
    features = open_features(str(tmp_path))
    images = pictures(3, 0, channels=1)
    points, *others = features(images)
    assert points.shape == (3, features.dim) and others == [None] * 4 and features.num_classes is None
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        result = mae(x, torch.arange(3), torch.zeros(3, 1, 8, 8))["cls_loss"]
        torch.testing.assert_close(cross_entropy(mae.fc(points), torch.arange(3), reduction="none"), result)


def forget(library: str, monkeypatch) -> None:
    """Undo, for one test, that the library was imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    "module, source, extra", [("torch_fidelity", "inception", "fid"), ("transformers", "dinov2", "dinov2")]
)
def test_missing_libraries_are_told(module, source, extra, monkeypatch):
    forget(module, monkeypatch)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install 'drifting\[{extra}\]'"):
        open_features(source)


@pytest.mark.parametrize("module, source", [("torch_fidelity", "inception"), ("transformers", "dinov2")])
def test_libraries_that_cannot_be_imported_are_told(module, source, tmp_path, monkeypatch):
    """With what lies at the bottom of it, and no advice to install what is there."""
    cause = "operator torchvision::nms does not exist"
    (tmp_path / f"{module}.py").write_text(
        f"try:\n    raise RuntimeError('{cause}')\nexcept RuntimeError as error:\n    raise ImportError('x') from error"
    )
    monkeypatch.syspath_prepend(tmp_path)
    forget(module, monkeypatch)
    with pytest.raises(UserError, match=f"needs {module}, which is there but .*RuntimeError: {cause}") as told:
        open_features(source)
    assert "pip install" not in str(told.value)


def test_download_that_stalls_is_given_up(torchvision, tmp_path, monkeypatch):
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        end = threading.Timer(20, silent.close)  # so that waiting for ever fails the test
        end.start()
        monkeypatch.setattr(fidelity, "URL_INCEPTION_V3", f"http://127.0.0.1:{silent.getsockname()[1]}/weights.pth")
        monkeypatch.setattr(evaluation_features, "DOWNLOAD_SECONDS", 0.1)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with pytest.raises(
            UserError, match=r"cannot load Inception's weights from the web \(.*timed out\).*name the file"
        ):
            open_features("inception")
        end.cancel()
    assert socket.getdefaulttimeout() is None


def test_weights_of_something_else_are_told(inception, tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("text")
    torch.save(print, tmp_path / "code.pth")
    for name in ("other", "text", "code", "absent"):
        with pytest.raises(UserError, match=f"cannot load Inception's weights from .*{name}.pth"):
            open_features(str(tmp_path / f"{name}.pth"))


def test_references_of_every_kind(tmp_path):
    images, mean, covariance = pictures(3, 0), np.arange(4.0, dtype=np.float32), np.eye(4)
    np.savez(tmp_path / "images.npz", images, np.array([4, 5, 6]))
    np.savez(tmp_path / "statistics.npz", mu=mean, sigma=covariance)
    np.savez(tmp_path / "renamed.npz", ref_mu=mean, ref_sigma=covariance)
    np.savez(tmp_path / "both.npz", arr_0=images, mu=mean, sigma=covariance, mu_s=mean[:3], sigma_s=covariance[:3, :3])
    assert (read_reference(tmp_path / "images.npz").images == images).all()
    assert read_samples(tmp_path / "images.npz")[1].tolist() == [4, 5, 6]
    assert read_samples(tmp_path / "both.npz")[1] is None
    for name in ("statistics", "renamed", "both"):
        reference = read_reference(tmp_path / f"{name}.npz")
        assert reference.statistics.mean.dtype == np.float64
        assert (reference.statistics.mean == mean).all() and (reference.statistics.covariance == covariance).all()
        assert (reference.images is None) == (reference.spatial_statistics is None) == (name != "both")
    assert reference.spatial_statistics.mean.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mean": np.zeros(3)}, r"holds mean, expected statistics \(mu and sigma\), images \(arr_0\), or both"),
        ({}, "holds nothing, expected"),
        ({"mu": np.zeros(3)}, "holds mu, but no sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(3)}, "mu_s, but no sigma_s"),
        ({"mu_s": np.zeros(3), "sigma_s": np.eye(3)}, r"holds mu_s, sigma_s, expected statistics \(mu and sigma\)"),
        (
            {"mu": np.zeros(3), "sigma": np.eye(4)},
            r"sigma is float64 \[4, 4\], expected finite floats, mu \[D\] and sigma \[D, D\]",
        ),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"arr_0 is uint8 \[2, 3, 8, 8\], expected uint8 \[N, H, W, C\]"),
        ({"arr_0": np.zeros((2, 8, 8, 3))}, "arr_0 is float64"),
        ({"arr_0": np.array([None])}, "cannot be read as an .npz file: ValueError: Object arrays"),
    ],
)
def test_wrong_references_are_told(arrays, message, tmp_path):
    np.savez(tmp_path / "reference.npz", **arrays)
    with pytest.raises(UserError, match=message):
        read_reference(tmp_path / "reference.npz")


def test_files_that_are_no_archives_are_told(tmp_path):
    (tmp_path / "text.npz").write_text("text")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    np.savez(tmp_path / "labels.npz", arr_0=pictures(3, 0), arr_1=np.zeros(2))
    no_archive = "cannot be read as an .npz file: expected a zip archive"
    for name, message in (("text", no_archive), ("array", no_archive), ("absent", "there is no file")):
        with pytest.raises(UserError, match=message):
            read_reference(tmp_path / f"{name}.npz")
    with pytest.raises(UserError, match=r"arr_1 is float64 \[2\], expected integers below 2147483648 \[3\]"):
        read_samples(tmp_path / "labels.npz")


def test_statistics_of_other_features_are_told(classifier, tmp_path):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(5), sigma=np.eye(5))
    config = EvaluationConfig(features=str(classifier), reference=[str(tmp_path / "statistics.npz")])
    with pytest.raises(UserError, match="statistics are of 5 features, classifier has 16"):
        open_evaluator(config, None)


@pytest.fixture
def corners(monkeypatch):
    """Features that are mean colours, and spatial ones that are the four pixels in a corner."""

    def network(x: torch.Tensor) -> Features:
        return Features(x.float().mean((2, 3)), spatial=x[:, 0, :2, :2].flatten(1).float())

    features = ImageFeatures("corners", 3, network, torch.device("cpu"))
    monkeypatch.setattr(evaluation, "open_features", lambda source: features)


def test_spatial_distance_to_images(corners, tmp_path):
    """Where the reference has no statistics."""
    np.savez(tmp_path / "images.npz", pictures(60, 0))
    evaluator = open_evaluator(EvaluationConfig("corners", [str(tmp_path / "images.npz")]), None)
    real, generated = (pictures(60, seed) for seed in (0, 1))
    expected = frechet_distance(*(fit_gaussian(part[:, :2, :2, 0].reshape(60, 4)) for part in (generated, real)))
    assert evaluator(generated, None)["sfid"] == pytest.approx(expected, rel=1e-4)
    assert evaluator(real, None)["sfid"] == pytest.approx(0, abs=1e-6)


def test_spatial_statistics_of_other_features_are_told(corners, tmp_path):
    np.savez(tmp_path / "reference.npz", mu=np.zeros(3), sigma=np.eye(3), mu_s=np.zeros(5), sigma_s=np.eye(5))
    evaluator = open_evaluator(EvaluationConfig("corners", [str(tmp_path / "reference.npz")]), None)
    with pytest.raises(UserError, match="received 4 features, but the reference's statistics are of 5"):
        evaluator(pictures(2, 0), None)


def test_statistics_and_images_may_be_in_two_files(classifier, tmp_path):
    images = pictures(40, 0, channels=1, size=8)
    np.savez(tmp_path / "images.npz", images)
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(16), sigma=np.eye(16))
    paths = [str(tmp_path / "statistics.npz"), str(tmp_path / "images.npz")]
    measures = open_evaluator(EvaluationConfig(str(classifier), paths), None)(images, None)
    assert measures["precision"] == measures["recall"] == 1 and measures["frechet_distance"] > 1
    assert open_evaluator(EvaluationConfig(str(classifier), paths[1:]), None)(images, None)[
        "frechet_distance"
    ] == pytest.approx(0, abs=1e-6)
    assert "precision" not in open_evaluator(EvaluationConfig(str(classifier), paths[:1]), None)(images, None)


@pytest.fixture
def guided():
    """Our network's images change with the guidance scale, which those of an untrained one do not."""
    forward = DriftingDiT.forward

    def shifted(self, z, y, cfg_scale, style=None):
        scale = cfg_scale.repeat_interleave(len(z) // len(cfg_scale))  # Consecutive samples may share one.
        return forward(self, z, y) + scale.view(-1, 1, 1, 1) * z / 5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DriftingDiT, "forward", shifted)
        yield


def test_sweep_reports_the_best_scale_and_saves_its_images(trained, guided, tmp_path, capsys):
    path = tmp_path / "some" / "best.npz"
    swept = report(capsys, trained, "--num", 100, "--cfg", 3.0, 1.0, 2.0, "--save-npz", path)
    scales = {row["cfg_scale"]: row["frechet_distance"] for row in swept["sweep"]}
    assert list(scales) == [3, 1, 2] and len(set(scales.values())) == 3
    assert swept["frechet_distance"] == min(scales.values()) == scales[swept["cfg_scale"]]
    best = swept["cfg_scale"]
    alone = report(capsys, trained, "--num", 100, "--cfg-scale", best)
    assert "sweep" not in alone and alone["frechet_distance"] == swept["frechet_distance"]
    saved = report(capsys, path, "--reference", trained)
    for measure in ("frechet_distance", "recognised_share", "nearest_distance"):
        assert saved[measure] == swept[measure]
    images, labels = read_samples(path)
    expected = draw_samples(load_generator(trained), torch.from_numpy(labels), best)
    assert np.abs(images.astype(int) - expected).max() <= 1  # Batches of other sizes round otherwise.


def test_samples_are_let_go_of(trained, tmp_path, capsys, monkeypatch):
    """50,000 images of ImageNet are 10 GB: those of a batch are gone before the next, unless they are to be saved."""
    drawn, held = [], []

    def draw(*arguments):
        for images in draw_batches(*arguments):
            held.append(sum(len(part()) for part in drawn if part() is not None))
            drawn.append(weakref.ref(images))
            yield images
            del images

    monkeypatch.setattr(evaluation, "draw_batches", draw)
    report(capsys, trained, "--num", 64, "--cfg", 1.0, 2.0, 3.0)
    scales = ["evaluation.cfg_scales=[1.0,2.0]", "optimizer.ema_decay=[0.9,0.99]", "evaluation.num_samples=64"]
    train(load_config("digits", ["train.steps=1", *SMALL, *scales]), trained.parent / "swept")
    assert len(drawn) == (2 + 3 * 32) + (2 + 4 * 32) and max(held) <= 2  # each with a trial of two samples
    held.clear()
    report(capsys, trained, "--num", 64, "--cfg", 1.0, 2.0, 3.0, "--save-npz", tmp_path / "best.npz")
    assert 62 <= max(held) <= 2 * 64


def test_report_is_there_if_images_cannot_be_written(trained, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        evaluate.main([str(trained), "--num", "20", "--save-npz", str(tmp_path / "file" / "images.npz")])
    assert json.loads(capsys.readouterr().out)["num_samples"] == 20


def test_few_images_are_warned_of(trained, capsys):
    assert evaluate.main([str(trained), "--num", "50"]) == 0
    captured = capsys.readouterr()
    assert "warning: 50 samples are few" in captured.err and "warning" not in captured.out
    assert evaluate.main([str(trained), "--num", "300"]) == 0
    assert "warning" not in capsys.readouterr().err
    for num in (50, 300):
        settings = ["train.steps=1", f"evaluation.num_samples={num}"]
        train(load_config("digits", [*SMALL, *settings]), trained.parent / f"of_{num}")
        assert ("samples are few" in capsys.readouterr().err) == (num == 50)


def test_nothing_to_compare_with_is_told(trained, tmp_path):
    np.savez(tmp_path / "samples.npz", pictures(3, 0))
    with pytest.raises(UserError, match="nothing to compare .*samples.npz with: --reference must name"):
        evaluate.main([str(tmp_path / "samples.npz")])
    with pytest.raises(UserError, match="hf://latent_L comes without its data: --reference must name"):
        evaluate.main(["hf://latent_L"])  # before it is downloaded
    with pytest.raises(UserError, match="there is no file or folder absent.npz, which --reference"):
        evaluate.main(["hf://latent_L", "--reference", "absent.npz"])
    with pytest.raises(UserError, match=r"received samples uint8 \[16, 16, 3\], expected uint8 \[8, 8, 1\]"):
        evaluate.main([str(tmp_path / "samples.npz"), "--reference", str(trained)])


def test_training_is_measured_against_files(classifier, tmp_path, capsys):
    np.savez(tmp_path / "reference.npz", pictures(60, 0, channels=1, size=8))
    settings = [
        f"evaluation.features={classifier}", f"evaluation.reference={tmp_path / 'reference.npz'}",
        "evaluation.num_samples=80", "evaluation.cfg_scales=[1.0,2.0]", "train.steps=2",
    ]  # fmt: skip
    train(load_config("digits", [*SMALL, *settings]), tmp_path / "run")
    assert "Fréchet distance to the reference" in capsys.readouterr().out
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    measured = report(capsys, tmp_path / "run")  # everything as in training, at the scale that was best
    assert measured["num_samples"] == 80 and "sweep" not in measured
    for measure in ("frechet_distance", "precision", "recall", "cfg_scale"):
        assert measured[measure] == pytest.approx(last[measure], rel=1e-6)


def test_images_of_another_size_stop_training_at_once(classifier, tmp_path):
    np.savez(tmp_path / "reference.npz", pictures(60, 0, channels=1))
    settings = [f"evaluation.features={classifier}", f"evaluation.reference={tmp_path / 'reference.npz'}"]
    with pytest.raises(UserError, match=r"received samples uint8 \[8, 8, 1\], expected uint8 \[16, 16, 1\]"):
        train(load_config("digits", [*SMALL, *settings]), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    np.savez(tmp_path / "reference.npz", pictures(60, 0))
    with pytest.raises(UserError, match="received images of 3 channels, the features are of 1"):
        train(load_config("digits", [*SMALL, *settings]), tmp_path / "run")


def test_the_best_guidance_scale_is_kept(guided, tmp_path, monkeypatch, capsys):
    """It is the default of all that draws; ``best`` keeps that of its own weights."""
    out, distances = tmp_path / "run", [0.0, 9.0, 3.0, 5.0, 8.0, 7.0, 4.0]  # of the trial, then of each scale
    monkeypatch.setattr(run_evaluation.evaluation, "open_evaluator", lambda *args: Scripted(*distances))
    drawn = []
    monkeypatch.setattr(run_evaluation, "draw_samples", lambda *args: drawn.append(draw_samples(*args)) or drawn[-1])
    settings = [*SMALL, "train.steps=4", "train.eval_every=2", "evaluation.cfg_scales=[1.0,2.0,3.5]"]
    train(load_config("digits", settings), out)
    assert "\nbest guidance scale 3.5," in capsys.readouterr().out
    scales = {folder: json.loads((folder / "model.json").read_text())["cfg_scale"] for folder in (out, out / "best")}
    assert scales == {out: 3.5, out / "best": 2.0}
    monkeypatch.undo()
    labels = spread_labels(100, range(10))
    generator = load_generator(out)
    assert (drawn[-1] == draw_samples(generator, labels, 3.5)).all()  # the picture's
    assert (drawn[-1] != draw_samples(generator, labels, 1.0)).any()
    arguments = [str(out), "--num", "100", "--out", str(tmp_path / "a.npz")]
    assert sample.main(arguments) == 0
    assert (np.load(tmp_path / "a.npz")["arr_0"] == drawn[-1]).all()
    assert sample.main([*arguments, "--cfg-scale", "1"]) == 0
    assert (np.load(tmp_path / "a.npz")["arr_0"] == draw_samples(generator, labels, 1.0)).all()
    measured = report(capsys, out, "--num", 20)
    assert measured["cfg_scale"] == 3.5 and "sweep" not in measured
    assert measured == report(capsys, out, "--num", 20, "--cfg", 3.5) != report(capsys, out, "--num", 20, "--cfg", 2)
    assert report(capsys, out / "best", "--num", 20)["cfg_scale"] == 2


class Scripted:
    """An evaluator that says what it is told to, and keeps the images of each call."""

    num_samples, distance, ranks = 20, "frechet_distance", Ranks()

    def __init__(self, *distances: float) -> None:
        self.distances, self.images = list(distances), []

    def tell(self, num):
        pass

    def measure(self, samples, labels):
        self.images.append(np.concatenate(list(samples)))
        return {"frechet_distance": self.distances.pop(0)}


def test_best_weights_are_kept(tmp_path, monkeypatch, capsys):
    out, settings = tmp_path / "run", [*SMALL, "train.eval_every=2", "train.save_every=4", "train.log_every=2"]

    def train_to(steps: int, *distances: float) -> Scripted:
        evaluator = Scripted(0.0, *distances)  # the first is a trial that counts for nothing
        monkeypatch.setattr(run_evaluation.evaluation, "open_evaluator", lambda *args: evaluator)
        train(load_config("digits", [*settings, f"train.steps={steps}"]), out)
        assert not evaluator.distances
        return evaluator

    def kept_step() -> int:
        return json.loads((out / "best" / "model.json").read_text())["step"]

    evaluator = train_to(6, 5.0, 3.0, 4.0)
    assert kept_step() == 4
    assert f"best: 3.00 at step 4, kept in {out / 'best'}" in capsys.readouterr().out
    labels = torch.arange(10).repeat_interleave(2)
    drawn = draw_samples(load_generator(out / "best"), labels)
    differences = [np.abs(drawn.astype(int) - images) for images in evaluator.images[2:4]]
    assert differences[0].max() <= 1 and differences[0].sum() < differences[1].sum()
    train_to(8, 3.5)  # a resumed run knows the best before it
    assert kept_step() == 4
    train_to(10, 2.5)
    assert kept_step() == 10
    settings.append("evaluation.num_samples=40")
    train_to(12, 9.0)  # measured in another way, it cannot be compared
    assert kept_step() == 12
    monkeypatch.undo()
    assert report(capsys, out / "best", "--num", 100)["step"] == 12  # its configuration is there too
