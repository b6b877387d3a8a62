"""What every data set has in common: order, augmentation, workers, and which keys apply."""

import os
import signal
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from drifting.config.schema import DataConfig
from drifting.data import Draw, Split, load_digits, open_dataset, training_batches
from drifting.data.image_split import ImageError, ImageSplit, centre_crop, decode_image, random_crop
from drifting.errors import UserError

ROOMY = 28

torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2  # Else five seconds are waited for a worker that is dead.


def images(count: int = 12, shape: tuple[int, ...] = (9, 9), **transform) -> ImageSplit:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, *shape)).astype(np.uint8)
    return ImageSplit(pixels, np.arange(count) % 3, **({"size": 9} | transform))


# ------------------------------------------------------------------------------------------------------ values


def test_pixels_are_normalised_on_their_own_scale():
    pixels = np.array([[[0, 4], [8, 16]]], np.uint8)
    (sixteen,) = ImageSplit(pixels, np.zeros(1), 2, white=16).samples()
    assert sixteen.tolist() == [[[-1, -0.5], [0, 1]]] and sixteen.dtype == torch.float32
    (byte,) = ImageSplit(np.array([[[0, 255]] * 2], np.uint8), np.zeros(1), 2).samples()
    assert byte.tolist() == [[[-1, 1], [-1, 1]]]


@pytest.mark.parametrize("white", [16, 255])
def test_samples_are_stored_as_bytes(white):
    pixels = np.arange(white + 1, dtype=np.uint8).reshape(-1, 1, 1)
    split = ImageSplit(pixels, np.zeros(len(pixels)), 1, white=white)
    sample, label = split.stored(7)
    assert sample.dtype == split.dtype == torch.uint8 and sample.tolist() == [[[7]]] and label == 0
    expected = pixels.astype(np.float32) / np.float32(white / 2) - 1
    assert np.array_equal(split.samples().numpy(), expected[:, None])
    assert torch.equal(split[7][0], split.samples([7])[0])


def test_colours_become_channels():
    split = images(shape=(9, 9, 3))
    sample, label = split[4]
    assert sample.shape == (3, 9, 9) and label == 1
    expected = split.images[4].transpose(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(sample.double(), torch.from_numpy(expected), rtol=1e-6, atol=1e-6)


def test_a_data_set_is_map_style():
    digits = load_digits()
    (batch, labels), *_ = DataLoader(digits.test, batch_size=7)
    assert torch.equal(batch, digits.test.samples(range(7))) and torch.equal(labels, digits.test.labels[:7])
    assert labels.dtype == torch.int64 and len(digits.test) == 500


# ------------------------------------------------------------------------------------------------ augmentation


def test_flip_mirrors_half_of_the_draws():
    split = images(flip=True, seed=3)
    plain = split[5][0]
    drawn = [split[Draw(epoch, 5)][0] for epoch in range(400)]
    mirrored = [torch.equal(image, plain.flip(2)) for image in drawn]
    assert all(m or torch.equal(image, plain) for m, image in zip(mirrored, drawn, strict=True))
    assert abs(sum(mirrored) - 200) < 50  # 5 standard deviations


def test_draws_depend_on_seed_epoch_and_index_alone():
    settings = dict(shape=(20, 20), flip=True, crop=True)
    first, again, other = images(**settings, seed=1), images(**settings, seed=1), images(**settings, seed=2)
    first[Draw(0, 0)]  # what was drawn before must not matter
    np.random.seed(5), torch.manual_seed(5)
    assert torch.equal(first[Draw(2, 7)][0], again[Draw(2, 7)][0])
    assert not torch.equal(first[Draw(2, 7)][0], first[Draw(3, 7)][0])
    assert not torch.equal(first[Draw(2, 7)][0], other[Draw(2, 7)][0])
    assert torch.equal(first[7][0], other[7][0])  # without a draw, nothing is random


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 99))
def test_random_crops_lie_inside_and_have_area_and_aspect(width, height, seed):
    left, top, right, bottom = random_crop(width, height, np.random.default_rng(seed))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    if ROOMY <= min(width, height) and max(width, height) < 2 * min(width, height):
        w, h = right - left, bottom - top
        assert 0.17 < w * h / (width * height) <= 1
        assert 0.7 < w / h < 1.43


def test_random_crops_cover_area_and_aspect_evenly():
    boxes = [random_crop(1000, 1000, np.random.default_rng(seed)) for seed in range(2000)]
    width, height = np.array([(r - x, b - y) for x, y, r, b in boxes]).T
    assert np.log(width / height).mean() == pytest.approx(0, abs=0.03)
    assert (width * height / 1e6).min() < 0.21 and 0.5 < (width * height / 1e6).mean() < 0.62
    assert np.mean([(x + r) / 2 for x, _, r, _ in boxes]) == pytest.approx(500, abs=20)


def test_a_crop_is_resized_from_its_box():
    """A ramp from left to right stays one, between the box's edges."""
    ramp = np.tile(np.linspace(0, 250, 64).astype(np.uint8), (64, 1))[None]
    split = ImageSplit(ramp, np.zeros(1), 16, crop=True)
    left, _, right, _ = random_crop(64, 64, np.random.default_rng([0, 4, 0]))
    row = (split[Draw(4, 0)][0][0, 8] + 1) * 127.5
    assert (row.diff() > 0).all()
    assert row[0] == pytest.approx(left * 250 / 63, abs=12) and row[-1] == pytest.approx(right * 250 / 63, abs=12)


@pytest.mark.parametrize("size", [(64, 64), (200, 70), (65, 131), (20, 30), (1, 5)])
def test_centre_crop(size):
    """A horizontal ramp keeps its middle and loses as much on either side."""
    width, height = size
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1)))
    cropped = centre_crop(ramp, 32)
    assert cropped.size == (32, 32)
    row = np.asarray(cropped)[16].astype(float)
    side = min(size)
    spread = 255 * (side - 1) / max(width - 1, 1)
    if width > 1:
        assert row[15:17].mean() == pytest.approx(127.5, abs=6)
        assert row[-1] - row[0] == pytest.approx(spread, rel=0.15, abs=6)


def test_decoding_names_what_is_broken(tmp_path):
    Image.new("L", (4, 4), 7).save(tmp_path / "grey.png")
    data = (tmp_path / "grey.png").read_bytes()
    assert decode_image(data, "grey.png").getpixel((0, 0)) == (7, 7, 7)
    for broken in (b"", b"text", data[:40]):
        with pytest.raises(ImageError, match="grey.png cannot be decoded"):
            decode_image(broken, "grey.png")


def test_grey_values_of_more_bits_keep_their_range(tmp_path):
    """Pillow alone makes white of all that is above 255."""
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    for name in ("ramp.png", "ramp.tif"):
        Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / name)
        image = np.asarray(decode_image((tmp_path / name).read_bytes(), name))
        assert image.dtype == np.uint8 and (image == (ramp // 256)[..., None]).all()
    for values in (np.float32, np.int32):
        Image.fromarray(ramp.astype(values)).save(tmp_path / "ramp.tif")
        with pytest.raises(ImageError, match="ramp.tif cannot be decoded .*32 bits"):
            decode_image((tmp_path / "ramp.tif").read_bytes(), "ramp.tif")


# ----------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_batches_are_those_of_an_uninterrupted_run(workers):
    split = images(flip=True, crop=True, shape=(16, 16), seed=7)
    whole = list(islice(training_batches(split, 5, seed=1), 9))
    resumed = list(islice(training_batches(split, 5, seed=1, start=4 * 5, workers=workers), 5))
    for (expected, labels), (batch, again) in zip(whole[4:], resumed, strict=True):
        assert torch.equal(expected, batch) and torch.equal(labels, again)
    for (expected, _), (stored, _) in zip(whole, training_batches(split, 5, 1, 0, workers, stored=True), strict=False):
        assert stored.dtype == torch.uint8 and torch.equal(split.values(stored), expected)


class Faulty(Split):
    """Fails in the way it is told to, from the sixth sample on."""

    def __init__(self, fail):
        super().__init__(torch.zeros(50, dtype=torch.int64))
        self.fail = fail

    def sample(self, index, draw):
        return self.fail()


def give_up():
    raise ImageError("there.jpg cannot be decoded")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_told_in_one_line(workers):
    with pytest.raises(UserError) as caught:
        next(training_batches(Faulty(give_up), 5, seed=0, workers=workers))
    assert str(caught.value) == "there.jpg cannot be decoded"


def test_a_dead_worker_is_reported():
    with pytest.raises(UserError, match="a process that reads data died .*worker.*(killed|exited)"):
        next(training_batches(Faulty(lambda: os.kill(os.getpid(), signal.SIGKILL)), 5, seed=0, workers=1))


# -------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    "config, expected",
    [
        (DataConfig("digits", path="x"), "data.path is x, which data.name=digits has no use for"),
        (DataConfig("mnist", label_column="x"), "data.label_column is x"),
        (DataConfig("latents", path="x", crop=True), "data.crop is True, which data.name=latents has no use for"),
        (DataConfig("folder", path="nowhere", image_size=8), "data.path is nowhere, where there is no folder"),
        (DataConfig("folder", path="."), "data.image_size is not set"),
        (DataConfig("latents", path="nowhere"), "holds no index.json of `python -m drifting.cache_latents`"),
        (DataConfig("mnist", path="nowhere"), "not in nowhere: set data.path to the folder"),
        (DataConfig("fashion_mnist", path="nowhere"), "install the Debian package dataset-fashion-mnist, or"),
        (DataConfig("cifar10", path="nowhere"), "data_batch_1 to 5 and test_batch are not in nowhere: unpack"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(config, expected):
    with pytest.raises(UserError, match=expected):
        open_dataset(config)


def test_digits_at_another_size():
    digits = open_dataset(DataConfig("digits", image_size=16, flip=True))
    assert digits.sample_shape == (1, 16, 16) == tuple(digits.train[0][0].shape)
    means = [float(data.train.samples(range(50)).mean()) for data in (digits, load_digits())]
    assert means[0] == pytest.approx(means[1], abs=0.05)
