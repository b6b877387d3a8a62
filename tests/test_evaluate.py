"""Measures of generated images against what they are by definition."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import nn

from drifting import evaluate
from drifting.config.schema import Config, DataConfig, EvaluationConfig
from drifting.data import Dataset, Split, load_digits
from drifting.errors import UserError
from drifting.evaluation.archives import read_reference, read_samples, write_samples
from drifting.evaluation.drawing import draw_samples, spread_labels
from drifting.evaluation.evaluator import NotMeasurable, check_evaluation, evaluate_model, open_evaluator
from drifting.evaluation.measures import Manifold, fit_gaussian, frechet_distance, inception_score, nearest_distance
from drifting.generation import Generator
from drifting.models import DriftingDiT
from drifting.utils.images import grid, save_panels, to_uint8

ROUNDING = 2e-3  # relative, on a measure of the data: their 17 grey levels do not divide the 255 of an image file


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture(scope="module")
def evaluator(digits):
    return open_evaluator(EvaluationConfig(), digits)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    return frechet_distance(fit_gaussian(a), fit_gaussian(b))


def with_moments(mean: np.ndarray, covariance: np.ndarray, n: int, seed: int) -> np.ndarray:
    """``n`` points whose sample mean and covariance are exactly these."""
    points = np.random.default_rng(seed).standard_normal((n, len(mean)))
    points -= points.mean(0)
    whitened = points @ np.linalg.inv(np.linalg.cholesky(np.cov(points, rowvar=False))).T
    return whitened @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_axis_aligned_gaussians():
    """Squared distances of means and of standard deviations add up."""
    mean_a, mean_b = np.array([1.0, -2.0, 0.5]), np.array([0.0, 3.0, 0.5])
    std_a, std_b = np.array([1.0, 0.3, 2.0]), np.array([0.5, 0.4, 5.0])
    a, b = with_moments(mean_a, np.diag(std_a**2), 50, 0), with_moments(mean_b, np.diag(std_b**2), 70, 1)
    expected = np.square(mean_a - mean_b).sum() + np.square(std_a - std_b).sum()
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_tilted_gaussians():
    """In two dimensions tr (AB)^½ = (tr AB + 2 √det AB)^½, also for covariances that do not commute."""
    A, B = np.array([[2.0, 0.9], [0.9, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    root = np.sqrt(np.trace(A @ B) + 2 * np.sqrt(np.linalg.det(A @ B)))
    a, b = with_moments(np.zeros(2), A, 40, 0), with_moments(np.ones(2), B, 40, 1)
    assert frechet(a, b) == pytest.approx(2 + np.trace(A) + np.trace(B) - 2 * root, rel=1e-9)


def test_frechet_distance_of_one_dimension_and_of_constants():
    line = np.linspace(0, 1, 20)[:, None]
    assert frechet(line, 3 * line) == pytest.approx((2 * line.mean()) ** 2 + (2 * line.std(ddof=1)) ** 2)
    padded = np.hstack([line, np.zeros((20, 2))])  # singular covariance
    assert frechet(padded, padded) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_is_that_of_the_matrix_root_and_of_torch_fidelity(torchvision):
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((2, 24, 24))
    few, many = rng.standard_normal((10, 24)) @ mix[0], rng.standard_normal((300, 24)) @ mix[1] + 1  # few: singular
    a, b = fit_gaussian(few), fit_gaussian(many)
    root = sqrtm(a.covariance @ b.covariance).real
    expected = np.square(a.mean - b.mean).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    theirs = fidelity.fid_statistics_to_metric(
        *({"mu": gaussian.mean, "sigma": gaussian.covariance} for gaussian in (a, b)), verbose=False
    )
    assert frechet_distance(a, b) == pytest.approx(theirs[fidelity.KEY_METRIC_FID], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussian_of_blocks(dtype, monkeypatch):
    """Far from the origin, where squares lose digits; the last block is smaller."""
    monkeypatch.setattr("drifting.evaluation.measures.BLOCK", 7)
    points = (torch.randn(25, 3) @ torch.randn(3, 3) + 1000).to(dtype)
    gaussian = fit_gaussian(points)
    assert gaussian.mean.dtype == gaussian.covariance.dtype == np.float64
    np.testing.assert_allclose(gaussian.mean, points.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(gaussian.covariance, np.cov(points.double().numpy(), rowvar=False), rtol=1e-9)


def test_inception_score():
    """As many as there are classes, if each is drawn equally often and recognised beyond doubt, in whatever order."""
    certain = 100 * torch.eye(8).repeat_interleave(1000, 0)  # class by class
    mean, std = inception_score(certain)
    assert mean == pytest.approx(8, rel=0.01) and std < 0.05
    assert inception_score(torch.randn(1, 8).expand(50, 8)) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    assert inception_score(certain[:3])[0] == pytest.approx(1)  # fewer than the splits


def test_inception_score_is_that_of_torch_fidelity(torchvision):
    fidelity = pytest.importorskip("torch_fidelity.metric_isc")
    logits = 3 * torch.randn(200, 20)
    theirs = fidelity.isc_features_to_metric(logits)
    assert inception_score(logits) == (
        pytest.approx(theirs[fidelity.KEY_METRIC_ISC_MEAN], rel=1e-9),
        pytest.approx(theirs[fidelity.KEY_METRIC_ISC_STD], rel=1e-6),
    )


def inside(points: np.ndarray, centres: np.ndarray) -> float:
    """Share of ``points`` that are no farther from some centre than its third-nearest neighbour, point by point."""
    points, centres = np.asarray(points), np.asarray(centres)
    radii = [np.sort(np.linalg.norm(centres - centre, axis=1))[3] for centre in centres]
    return np.mean([(np.linalg.norm(centres - point, axis=1) <= radii).any() for point in points])


def test_precision_and_recall_by_definition(torchvision, monkeypatch):
    monkeypatch.setattr("drifting.evaluation.measures.BLOCK", 37)  # not a divisor
    rng = np.random.default_rng(0)
    real, generated = rng.standard_normal((120, 4)), 0.5 * rng.standard_normal((90, 4)) + 0.5
    a, b = (torch.from_numpy(points + 1000) for points in (real, generated))  # far from the origin
    precision, recall = Manifold(a).precision_and_recall(b)
    assert precision == inside(generated, real) and recall == inside(real, generated)
    assert 0.1 < recall < precision - 0.1 < 0.9  # narrow, so plausible but not varied
    fidelity = pytest.importorskip("torch_fidelity.metric_prc")
    settings = {"prc_neighborhood": 3, "prc_batch_size": 1000, "save_cpu_ram": False, "verbose": False}
    theirs = fidelity.prc_features_to_metric(b - 1000, a - 1000, **settings)
    assert theirs["precision"] == pytest.approx(precision) and theirs["recall"] == pytest.approx(recall)


def test_nearest_distance():
    a, b = np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[0.0, 1.0], [3.0, 0.0]])
    assert nearest_distance(a, b) == pytest.approx((1 + 4) / 2)
    assert nearest_distance(a + 1e6, b + 1e6) == pytest.approx((1 + 4) / 2)  # far from the origin


def test_digits_are_split_as_stated(digits):
    train, test = digits.train.samples(), digits.test.samples()
    assert train.shape == (1297, 1, 8, 8) and test.shape == (500, 1, 8, 8)
    assert train.min() == -1 and train.max() == 1
    assert not digits.train.labels[:20].eq(digits.test.labels[:20]).all()
    both = torch.cat([train, test])
    assert len(both.flatten(1).unique(dim=0)) == 1797  # nothing twice, so nothing in both


def test_training_images_score_as_memorised(digits, evaluator):
    quality = evaluator(to_uint8(digits.train.samples(), digits.pixel_range), digits.train.labels.numpy())
    assert quality["frechet_ratio"] == pytest.approx(1, rel=ROUNDING)
    assert quality["nearest_ratio"] == pytest.approx(0, abs=0.01)  # not 0, for the same roundings
    assert quality["recognised_share"] > 0.99
    assert quality["frechet_distance_train"] == pytest.approx(22.85, rel=0.01)


def test_wrong_labels_and_noise_are_noticed(digits, evaluator):
    images = to_uint8(digits.test.samples(), digits.pixel_range)
    labels = digits.test.labels.numpy()
    assert evaluator(images, labels)["nearest_ratio"] == pytest.approx(1, rel=ROUNDING)
    assert evaluator(images, (labels + 1) % 10)["recognised_share"] < 0.02
    noise = np.random.default_rng(0).integers(0, 256, images.shape).astype(np.uint8)
    quality = evaluator(noise, labels)
    assert quality["frechet_ratio"] > 20 and quality["nearest_ratio"] > 1.5
    with pytest.raises(ValueError, match=r"received 1 samples, expected at least 2 to compare"):
        evaluator(images[:1], labels[:1])


def test_collapse_shows_in_recall(digits, evaluator):
    """Also where every single sample is a training image. What the training images measure stands beside."""
    images, labels = to_uint8(digits.train.samples(), digits.pixel_range), digits.train.labels.numpy()
    whole, half, few = (evaluator(images[chosen], None) for chosen in (labels >= 0, labels < 5, np.arange(1297) % 20))
    for measure in ("precision", "recall"):
        assert whole[measure] == pytest.approx(whole[f"{measure}_train"], abs=0.01) and whole[measure] > 0.85
    assert half["precision"] > 0.85 and half["recall"] == pytest.approx(0.5, abs=0.05)
    assert few["precision"] > 0.5 and few["recall"] == 0


def test_the_manifold_of_real_samples_is_built_once(monkeypatch):
    built, build = [], Manifold.__init__
    monkeypatch.setattr(Manifold, "__init__", lambda self, points: built.append(len(points)) or build(self, points))
    data = blobs((2,), counts=(90, 60))
    evaluator = open_evaluator(EvaluationConfig(), data)
    assert built == [60, 90]
    for count in (30, 40):
        evaluator(data.train.samples().numpy()[:count], None)
    assert built == [60, 90, 30, 40]


def test_pixels():
    images = torch.tensor([-2.0, -1.0, 0.0, 1.0, 1.5]).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    pixels = to_uint8(images, (-1.0, 1.0))
    assert pixels.shape == (5, 2, 2, 3) and pixels.dtype == np.uint8
    assert pixels[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]


def test_pictures_show_every_image(tmp_path):
    bright = np.full((6, 8, 8, 1), 255, np.uint8)
    picture = np.asarray(grid(bright, columns=3))
    assert picture.shape[0] * 3 == pytest.approx(picture.shape[1] * 2, abs=8)  # two rows of three
    assert (picture == 255).mean() > 0.75
    save_panels({"generated": bright, "real": np.zeros_like(bright)}, 3, tmp_path / "picture.png")
    pixels = np.asarray(Image.open(tmp_path / "picture.png"))
    middle = pixels.shape[1] // 2
    assert (pixels[30:, :middle] == 255).mean() > 0.75 and (pixels[30:, middle + 20 :] == 0).mean() > 0.75


def test_labels_are_spread():
    assert spread_labels(7, [3, 5]).tolist() == [3, 3, 3, 3, 5, 5, 5]
    assert spread_labels(1300, range(10)).bincount().tolist() == [130] * 10
    assert spread_labels(2, range(10)).tolist() == [0, 1]


def test_samples_of_several_batches(monkeypatch):
    monkeypatch.setattr("drifting.evaluation.features.BATCH", 3)
    model = DriftingDiT(img_size=8, patch_size=4, in_chans=1, num_classes=5, embed_dim=16, depth=1, num_heads=2).eval()
    torch.nn.init.normal_(model.final.proj.weight)
    generator = Generator(model, model.noise_shape, (1, 8, 8), tuple("abcde"), (-1.0, 1.0))
    images = draw_samples(generator, torch.arange(7) % 5)
    assert images.shape == (7, 8, 8, 1) and len(np.unique(images.reshape(7, -1), axis=0)) == 7
    assert (images[:6] == draw_samples(generator, torch.arange(6) % 5)).all()
    assert (images != draw_samples(generator, torch.arange(7) % 5, seed=1)).any((1, 2, 3)).all()
    monkeypatch.undo()
    passes = []
    model.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    at_once = draw_samples(generator, torch.arange(7) % 5)
    assert passes == [7] and np.abs(at_once.astype(int) - images).max() <= 1


# ------------------------------------------------------------------------------------- samples that are no grey images


class Blobs(Split):
    """Samples of any shape: in each class they lie around a centre of its own."""

    def __init__(self, count: int, shape: tuple[int, ...], classes: int, seed: int) -> None:
        super().__init__(torch.arange(count) % classes)
        centres = 6 * torch.randn(classes, *shape, generator=torch.Generator().manual_seed(9))
        self.points = centres[self.labels] + torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))

    def sample(self, index, draw):
        return self.points[index]


def blobs(shape: tuple[int, ...], classes: int = 3, counts: tuple[int, int] = (90, 60), **facts) -> Dataset:
    train, test = (Blobs(count, shape, classes, seed) for seed, count in enumerate(counts))
    facts = {"pixel_range": None, "class_names": ("a", "b", "c")[:classes]} | facts
    return Dataset(name="blobs", train=train, test=test, sample_shape=shape, **facts)


@pytest.mark.parametrize("shape", [(), (2,), (5, 3), (2, 3, 4, 2)], ids=["scalars", "vectors", "sequences", "volumes"])
def test_samples_of_any_shape_are_measured_flattened(shape):
    data = blobs(shape)
    evaluator = open_evaluator(EvaluationConfig(), data)
    train, test = (split.samples().reshape(len(split), -1).double() for split in (data.train, data.test))
    labels = data.train.labels.numpy()
    memorised = evaluator(data.train.samples().numpy(), labels)
    floor = frechet_distance(fit_gaussian(train), fit_gaussian(test))
    assert memorised["frechet_distance"] == memorised["frechet_distance_train"] == pytest.approx(floor)
    assert memorised["frechet_ratio"] == 1 and memorised["nearest_ratio"] == pytest.approx(0, abs=1e-5)
    assert memorised["nearest_distance_test"] == pytest.approx(float(torch.cdist(test, train).amin(1).mean()))
    for measure, share in (("precision", inside(train, test)), ("recall", inside(test, train))):
        assert memorised[measure] == memorised[f"{measure}_train"] == pytest.approx(share, abs=0.02)
    assert memorised["recognised_share"] > 0.8 and memorised["recognised_share_test"] > 0.8
    assert evaluator(data.train.samples().numpy(), (labels + 1) % 3)["recognised_share"] < 0.2
    shifted = evaluator((data.test.samples() + 3).numpy(), None)
    assert "recognised_share" not in shifted
    assert shifted["frechet_distance"] == pytest.approx(9 * train.shape[1])  # the means' difference alone
    assert evaluator.fewest == 4 * train.shape[1] and not evaluator.real.lacking and not evaluator.real.copies


def test_samples_of_one_class_have_nothing_to_be_recognised_as():
    data = blobs((2,), classes=1)
    quality = open_evaluator(EvaluationConfig(), data)(data.test.samples().numpy(), data.test.labels.numpy())
    assert quality["nearest_ratio"] == pytest.approx(1)
    assert set(quality) == {
        "frechet_distance", "frechet_ratio", "frechet_distance_train", "nearest_distance", "nearest_ratio",
        "nearest_distance_test", "precision", "recall", "precision_train", "recall_train",
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 4, 6), (1, 8, 12)])
def test_images_in_colour_or_not_square(shape):
    """Their values are compared in one order: training images are their own nearest."""
    data = blobs(shape, pixel_range=(-30.0, 30.0))
    images = to_uint8(data.train.samples(), data.pixel_range)
    evaluator = open_evaluator(EvaluationConfig(), data)
    quality = evaluator(images, data.train.labels.numpy())
    assert quality["nearest_ratio"] == pytest.approx(0, abs=0.1) and quality["recognised_share"] == 1
    assert quality["frechet_ratio"] == pytest.approx(1, rel=0.05)
    with pytest.raises(UserError, match="received samples uint8 .*, expected uint8 .* as the real ones"):
        evaluator(images.transpose(0, 2, 1, 3), None)


def test_what_cannot_be_measured_is_told():
    for data, message in (
        (blobs((2049,)), "up to 2048 values, these have 2049: evaluation.features must name a network"),
        (blobs((4, 2, 2), latent=True, pixel_range=(-1.0, 1.0)), "measured of latents.*evaluation.reference=FILE.npz"),
        (blobs((2,), counts=(90, 1)), "there are 90 training and 1 test samples, expected at least 2 of each"),
        (blobs((2,), counts=(0, 9)), "there are 0 training and 9 test samples, expected at least 2 of each"),
    ):
        with pytest.raises(NotMeasurable, match=message):
            open_evaluator(EvaluationConfig(), data)
    with pytest.raises(UserError, match="evaluation.features is inception, but samples of blobs are no images"):
        open_evaluator(EvaluationConfig("inception"), blobs((2,)))
    broken = blobs((2,))
    broken.train.points[7] = float("nan")
    with pytest.raises(UserError, match="the data set has samples with NaN or infinity"):
        open_evaluator(EvaluationConfig(), broken)
    evaluator = open_evaluator(EvaluationConfig(), blobs((2,)))
    for samples, message in (
        (np.zeros((1, 2), np.float32), "received 1 samples, expected at least 2 to compare"),
        (np.zeros((5, 2)), r"received samples float64 \[2\], expected float32 \[2\], as the real ones"),
        (np.full((5, 2), np.inf, np.float32), "received samples with NaN or infinity"),
    ):
        with pytest.raises(UserError, match=message):
            evaluator(samples, None)


@pytest.mark.parametrize("count", [30, 90])  # fewer than there are features, and more
def test_test_samples_that_are_training_samples_are_told(count, capsys):
    """No ratio is relative to their distances, which are 0 but for rounding; of a part of them it is."""
    data = blobs((60,), counts=(count, count))
    evaluator = open_evaluator(EvaluationConfig(), replace(data, test=data.train))
    quality = evaluator((data.train.samples() + 1000).numpy(), None)
    assert quality["frechet_distance_train"] >= 0 and not {"frechet_ratio", "nearest_ratio"} & set(quality)
    evaluator.tell(1000)
    said = capsys.readouterr().err
    assert f"\nwarning: {count} of {count} test samples are training samples too: hold out others" in said
    assert "frechet_ratio (frechet_distance_train is about 0); nearest_ratio (nearest_distance_test is abo" in said
    data.test.points[:7] = data.train.points[:7]
    evaluator = open_evaluator(EvaluationConfig(), data)
    evaluator.tell(1000)
    said = capsys.readouterr().err
    assert f"warning: 7 of {count} test samples are training" in said and "not measured" not in said
    assert {"frechet_ratio", "nearest_ratio"} < set(evaluator(data.test.samples().numpy(), None))


def test_distances_are_at_least_zero():
    """Rounding would make some of these negative."""
    for seed in range(5):
        points = 1000 * np.random.default_rng(seed).standard_normal((20, 50))
        assert 0 <= frechet(points, points) < 1e-6 * points.var() * 50


@pytest.mark.parametrize("classes, counts, lacking", [
    (1, (90, 60), "recognised_share (the data have one"),
    (3, (6, 3), "precision and recall (3 real samples, expected 4 or more)"),
    (1, (2, 2), "precision and recall (2 real samples, expected 4 or more); recognised_share (the data have one"),
])  # fmt: skip
def test_measures_that_small_sets_lack_are_left_out(classes, counts, lacking, capsys):
    data = blobs((5,), classes, counts)
    evaluator = open_evaluator(EvaluationConfig(), data)
    evaluator.tell(100)
    assert f"not measured: {lacking}" in capsys.readouterr().err
    quality = evaluator(data.train.samples().numpy(), data.train.labels.numpy())
    assert quality["frechet_distance"] > 0 and all(np.isfinite(value) for value in quality.values())
    for measure in ("precision", "recall", "precision_train", "recognised_share", "recognised_share_test"):
        assert (measure in quality) == (measure.partition("_")[0] not in lacking)


def test_few_samples_have_no_precision(capsys):
    evaluator = open_evaluator(EvaluationConfig(), blobs((2,)))
    for num in (3, 4):
        evaluator.tell(num)
        told = "precision and recall (3 generated samples, expected 4 or more)" in capsys.readouterr().err
        quality = evaluator(np.ones((num, 2), np.float32), None)
        assert told == (num == 3) == ("precision" not in quality)


def test_samples_that_are_all_alike():
    """Real ones, generated ones, both: what can be measured is finite."""
    same = blobs((5,))
    for split in (same.train, same.test):
        split.points[:] = 7.0
    for data in (same, blobs((5,))):
        evaluator = open_evaluator(EvaluationConfig(), data)
        for samples in (same.test.samples(), blobs((5,)).test.samples()):
            quality = evaluator(samples.numpy(), same.test.labels.numpy())
            assert all(np.isfinite(value) and value >= 0 for value in quality.values())
            assert ("frechet_ratio" in quality) == (data is not same)


def test_features_that_are_not_finite_are_told():
    with pytest.raises(UserError, match="received samples with NaN or infinity among their features"):
        fit_gaussian(torch.tensor([[1.0, 2.0], [3.0, torch.inf]]))


class Line(nn.Module):
    """A generator of vectors that are not shaped as their noise."""

    noise_shape = (3,)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, z):
        return self.layer(z)


def test_samples_of_a_users_network():
    """They are drawn as they are, and those of another shape are told before much time is spent on them."""
    generator = Generator(Line(), (3,), (2,), ("a", "b", "c"))
    samples = draw_samples(generator, spread_labels(600, range(3)))
    assert samples.shape == (600, 2) and samples.dtype == np.float32 and len(np.unique(samples, axis=0)) == 600
    check_evaluation(open_evaluator(EvaluationConfig(), blobs((2,))), generator)
    with pytest.raises(UserError, match=r"received samples float32 \[2\], expected float32 \[5, 3\]"):
        check_evaluation(open_evaluator(EvaluationConfig(), blobs((5, 3))), generator)


def test_generator_of_one_class_has_nothing_to_be_recognised_as():
    """Though the data that it is compared with have several."""
    evaluator = open_evaluator(EvaluationConfig(), blobs((2,)))
    for names in (("all",), ("a", "b", "c")):
        generator = Generator(Line(), (3,), (2,), names)
        numbers, kept = spread_labels(9, range(len(names))), []
        quality = evaluate_model(evaluator, generator, numbers, 1.0, 3, kept)
        assert ("recognised_share" in quality) == (len(names) > 1)
        np.testing.assert_allclose(np.concatenate(kept), draw_samples(generator, numbers, seed=3), 1e-5, 1e-6)


def test_samples_in_files(tmp_path, capsys, monkeypatch):
    """Those that are no images are written and judged as they are."""
    data = blobs((5, 3))
    write_samples(tmp_path / "x.npz", data.train.samples().numpy(), data.train.labels.numpy())
    samples, labels = read_samples(tmp_path / "x.npz")
    assert (samples == data.train.samples().numpy()).all() and (labels == data.train.labels.numpy()).all()
    with pytest.raises(UserError, match="arr_0 is float32 .*, expected uint8"):
        read_reference(tmp_path / "x.npz")
    monkeypatch.setattr(evaluate, "_config", lambda source: Config())
    monkeypatch.setattr(evaluate, "open_dataset", lambda config, seed: data)
    assert evaluate.main([str(tmp_path / "x.npz"), "--reference", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["frechet_ratio"] == 1 and report["recognised_share"] > 0.8
    write_samples(tmp_path / "x.npz", samples, labels + 70)  # labels that the data do not have
    assert evaluate.main([str(tmp_path / "x.npz"), "--reference", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "not measured: recognised_share (the data have none of the labels)" in said.err
    assert json.loads(said.out) == {name: value for name, value in report.items() if name != "recognised_share"}
    with pytest.raises(UserError, match="x.npy is a file, expected a run directory, hf://NAME or .npz: numpy.savez"):
        evaluate.main([str(tmp_path / "x.npy"), "--reference", str(tmp_path)])


def test_parts_of_ones_own_are_named_on_the_command_line(tmp_path, capsys, monkeypatch):
    """A run's files never name what is imported; what the command line names is imported, and handed on."""
    (tmp_path / "own_line.py").write_text("from test_evaluate import Line, blobs\n")
    monkeypatch.syspath_prepend(tmp_path)
    generator, opened = Generator(Line(), (3,), (2,), ("a", "b", "c"), step=7), []
    config = Config(data=DataConfig(name="absent:blobs", arguments={"classes": 3}))
    monkeypatch.setattr(evaluate, "_config", lambda source: config)
    monkeypatch.setattr(evaluate, "load_generator", lambda source, model: opened.append(model) or generator)
    monkeypatch.setattr(evaluate, "open_dataset", lambda config, seed: opened.append(config) or blobs((2,)))
    with pytest.raises(UserError, match="^the run's data are absent:blobs: name them with --data absent:blobs$"):
        evaluate.main([str(tmp_path)])
    command = [str(tmp_path), "--num", "50", "--data", "own_line:blobs", "--model", "own_line:Line"]
    assert evaluate.main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["step"] == 7 and report["frechet_ratio"] > 1 and "recognised_share" in report
    assert opened == [None, Line, DataConfig(name="own_line:blobs", arguments={"classes": 3})]
    with pytest.raises(UserError, match="--model is own_line:Curve, but own_line has no .*Curve; did you mean"):
        evaluate.main([*command[:-1], "own_line:Curve"])
    config.data.name = "digits"
    with pytest.raises(UserError, match="--data is own_line:blobs, the run's data are digits"):
        evaluate.main(command)
