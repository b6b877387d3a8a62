"""Cached latents: what is written, after whatever interruptions, and what training reads of it."""

import json
import pickle
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from drifting import cache_latents as caching
from drifting import sample
from drifting import train as training
from drifting.config.schema import DataConfig
from drifting.data import Draw, open_dataset, training_batches
from drifting.data.latents import INDEX
from drifting.errors import UserError
from drifting.evaluation import drawing
from drifting.hub import vae
from drifting.training import run_evaluation
from drifting.utils import files
from drifting.utils.files import LOCK

SIZE, COUNTS = 16, {"cat": 9, "dog": 8}
ROUNDING = 2e-3  # of float16


def fake_encode(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """RGB and its mean at half the resolution; the standard deviation is 0.5 in the last channel and 0 elsewhere."""
    colours = F.avg_pool2d(images, 2)
    mean = torch.cat([colours, colours.mean(1, keepdim=True)], 1)
    std = torch.zeros_like(mean)
    std[:, 3] = 0.5
    return mean, std


@pytest.fixture
def source(tmp_path) -> Path:
    """Images of noise, 17 for training and 17 for testing."""
    root, rng = tmp_path / "images", np.random.default_rng(0)
    for split in ("train", "val"):
        for name, count in COUNTS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def images_of(source: Path):
    return open_dataset(DataConfig("folder", path=str(source), image_size=SIZE))


def cache(source: Path, destination: Path, encode=fake_encode, **settings) -> dict:
    settings = {"batch_size": 2, "shard_size": 5} | settings
    return caching.cache_latents(images_of(source), destination, origin={"vae": "fake"}, encode=encode, **settings)


def latents_of(destination: Path, flip: bool = False):
    return open_dataset(DataConfig("latents", path=str(destination), flip=flip), seed=1)


def contents(destination: Path) -> dict[str, bytes]:
    written = (path for path in destination.rglob("*") if path.is_file() and path.name != LOCK)
    return {str(path.relative_to(destination)): path.read_bytes() for path in written}


def spoil(source: Path, *names: str) -> list[str]:
    """Cut off the files of those names; their paths."""
    for name in names:
        path = source / name
        path.write_bytes(path.read_bytes()[:100])
    return [str(source / name) for name in names]


# ----------------------------------------------------------------------------------------------- what is written


def test_latents_are_those_of_the_images(source, tmp_path):
    index = cache(source, tmp_path / "out")
    images, latents = images_of(source), latents_of(tmp_path / "out")
    assert latents.latent and latents.sample_shape == (4, 8, 8) and latents.class_names == ("cat", "dog")
    assert index == json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["shape"] == [4, 8, 8] and index["class_names"] == ["cat", "dog"] and index["complete"]
    assert index["dtype"] == "float16" and index["scaling_factor"] == vae.LATENT_SCALE
    assert [shard["count"] for shard in index["splits"]["train"]["shards"]] == [5, 5, 5, 2]
    for ours, theirs in ((latents.train, images.train), (latents.test, images.test)):
        assert torch.equal(ours.labels, theirs.labels)
        mean, _ = fake_encode(theirs.samples())
        torch.testing.assert_close(ours.samples()[:, :3], mean[:, :3], atol=ROUNDING, rtol=ROUNDING)


def test_the_last_channel_is_a_draw_of_the_posterior(source, tmp_path):
    """With other noise for every image, the same for its mirror image, whatever the batches."""
    for name, batch_size in (("a", 2), ("b", 5)):
        cache(source, tmp_path / name, batch_size=batch_size)
    train, again = (latents_of(tmp_path / name).train for name in "ab")
    torch.testing.assert_close(train.samples(), again.samples(), atol=ROUNDING, rtol=ROUNDING)
    stored = torch.from_numpy(np.load(tmp_path / "a" / "train" / "00000.npy").astype(np.float32))  # [5, 2, 4, 8, 8]
    images = images_of(source).train.samples(range(5))
    noise = torch.stack([stored[:, v, 3] - fake_encode(x)[0][:, 3] for v, x in enumerate((images, images.flip(3)))])
    torch.testing.assert_close(noise[0], noise[1], atol=2 * ROUNDING, rtol=0)
    assert noise[0].std() == pytest.approx(0.5, abs=0.08) and noise[0].mean() == pytest.approx(0, abs=0.1)
    assert (noise[0, 0] - noise[0, 1]).abs().max() > 0.1


def test_flip_draws_the_latent_of_the_mirror_image(source, tmp_path):
    cache(source, tmp_path / "out")
    train = latents_of(tmp_path / "out", flip=True).train
    mirrored = fake_encode(images_of(source).train.samples([7]).flip(3))[0][0]
    drawn = [train[Draw(epoch, 7)][0] for epoch in range(200)]
    flipped = sum(bool((latent - mirrored)[:3].abs().max() < ROUNDING) for latent in drawn)
    assert flipped == sum(not torch.equal(latent, train[7][0]) for latent in drawn)
    assert abs(flipped - 100) < 36  # 5 standard deviations
    plain = latents_of(tmp_path / "out").train
    assert all(torch.equal(plain[Draw(epoch, 7)][0], plain[7][0]) for epoch in range(20))


def test_grey_images_are_encoded_as_rgb(tmp_path):
    digits = open_dataset(DataConfig("digits", image_size=16))
    caching.cache_latents(digits, tmp_path, origin={}, encode=fake_encode, batch_size=500)
    latents = latents_of(tmp_path)
    assert len(latents.train) == 1297 and len(latents.test) == 500 and latents.num_classes == 10
    sample = latents.test[3][0]
    assert torch.equal(sample[0], sample[1])


def test_reading_is_memory_mapped(source, tmp_path):
    cache(source, tmp_path / "out")
    train = latents_of(tmp_path / "out").train
    first = train[0][0]
    assert isinstance(train.shards[0], np.memmap)
    copy = pickle.loads(pickle.dumps(train))  # as a worker that is not forked receives it
    assert not copy.shards and torch.equal(copy[0][0], first)
    batches = [next(training_batches(train, 6, seed=0, workers=workers))[0] for workers in (0, 1)]
    assert torch.equal(*batches)
    stored, _ = next(training_batches(train, 6, seed=0, stored=True))
    assert stored.dtype == train.dtype == torch.float16 and torch.equal(stored.float(), batches[0])


# ------------------------------------------------------------------------------------- interruptions and faults


class Killed(BaseException):
    """As a kill would, ends everything at once."""


def test_goes_on_after_a_kill(source, tmp_path):
    cache(source, tmp_path / "whole")
    encoded = []

    def counting(images):
        encoded.append(len(images) // 2)
        return fake_encode(images)

    def failing(images):
        if sum(encoded) >= 8:
            raise Killed
        return counting(images)

    out = tmp_path / "out"
    with pytest.raises(Killed):
        cache(source, out, failing)
    assert [p.name for p in (out / "train").glob("*.npy")] == ["00000.npy"]  # the second shard was under way
    (out / "train" / ".00001.npy.part").write_bytes(b"cut off while it was written")
    with pytest.raises(UserError, match="does not hold all latents yet: run the same"):
        latents_of(out)
    encoded.clear()
    cache(source, out, counting)
    assert sum(encoded) == 34 - 5
    assert contents(out) == contents(tmp_path / "whole")
    encoded.clear()
    cache(source, out, counting)
    assert not encoded  # nothing left to do


FIRST = """
import sys
from drifting import cache_latents
cache_latents.encode_images = lambda images: print("encoding", flush=True) or sys.stdin.read()
cache_latents.main(sys.argv[1:])
"""


def test_two_processes_on_one_folder(source, tmp_path, monkeypatch, fake_vae):
    """The second refuses in one line and changes nothing; where the first is killed, it goes on."""
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    out = tmp_path / "out"
    options = [str(source), str(out), "--image-size", str(SIZE), "--workers", "0"]
    command = [sys.executable, "-c", FIRST, *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        try:
            assert first.stdout.readline() == b"encoding\n"
            before = contents(out)
            message = (
                rf"{out} is being written by another process \(process {first.pid} on .*\): wait for it, or choose"
            )
            with pytest.raises(UserError, match=message):
                caching.main(options)
            assert contents(out) == before
        finally:
            first.kill()
    assert caching.main(options) == 0 and len(latents_of(out).train) == 17


def test_broken_images_are_reported_skipped_and_counted(source, tmp_path, capsys):
    names = ["train/cat/3.png", "val/cat/0.png", *(f"train/dog/{number}.png" for number in range(1, 6))]
    broken = spoil(source, *names)  # of train, one in the first shard and all of the third
    index = cache(source, tmp_path / "out", workers=1)
    splits = index["splits"]
    assert len(splits["train"]["skipped"]) == 6 and len(splits["test"]["skipped"]) == 1
    told = capsys.readouterr().err
    for path in broken:
        assert any(f"{path} cannot be decoded" in reason for name in splits for reason in splits[name]["skipped"])
        assert f"skipped: {path}" in told
    assert [shard["count"] for shard in splits["train"]["shards"]] == [4, 5, 2]
    images, latents = images_of(source), latents_of(tmp_path / "out")
    good = [i for i in range(17) if i not in (3, 10, 11, 12, 13, 14)]
    assert latents.train.labels.tolist() == images.train.labels[good].tolist()
    expected = fake_encode(images.train.samples(good))[0]
    torch.testing.assert_close(latents.train.samples()[:, :3], expected[:, :3], atol=ROUNDING, rtol=ROUNDING)


def test_files_that_cannot_be_read_are_no_broken_images(source, tmp_path):
    """They may come back: nothing is skipped."""
    dataset = images_of(source)
    (source / "train" / "dog" / "2.png").unlink()
    with pytest.raises(UserError, match="2.png cannot be read: No such file"):
        caching.cache_latents(dataset, tmp_path / "out", origin={}, encode=fake_encode)


def test_other_settings_are_refused(source, tmp_path):
    cache(source, tmp_path / "out")
    with pytest.raises(UserError, match=r"made otherwise \(shard_size: 5, now 6\): choose another DST"):
        cache(source, tmp_path / "out", shard_size=6)
    next((source / "train" / "cat").iterdir()).unlink()
    with pytest.raises(UserError, match="images: .*'train': 17.*, now .*'train': 16"):
        cache(source, tmp_path / "out")


def test_destinations_that_cannot_be_read_or_written(source, tmp_path):
    cache(source, tmp_path / "out")
    (tmp_path / "out" / "train" / "00002.npy").unlink()
    with pytest.raises(UserError, match="00002.npy is missing"):
        latents_of(tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    (tmp_path / "out" / INDEX).write_text(json.dumps({key: index[key] for key in index if key != "splits"}))
    with pytest.raises(UserError, match="index.json is damaged.*: KeyError: 'splits'"):
        cache(source, tmp_path / "out")
    (tmp_path / "out" / INDEX).unlink()
    with pytest.raises(UserError, match="has files but no index.json: choose another DST, or empty it"):
        cache(source, tmp_path / "out")
    (tmp_path / "out" / INDEX).write_text('{"complete":')
    with pytest.raises(UserError, match="index.json cannot be read"):
        latents_of(tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write latents"):
        cache(source, tmp_path / "file")
    spoil(source, *(f"val/{name}/{number}.png" for name, count in COUNTS.items() for number in range(count)))
    with pytest.raises(UserError, match="not one test image can be decoded"):
        cache(source, tmp_path / "other")


# ------------------------------------------------------------------------------------------------- the commands


@pytest.fixture
def fake_vae(monkeypatch):
    def decode(latents):
        return F.interpolate(latents[:, :3], scale_factor=2).clamp(-1, 1)

    monkeypatch.setattr(caching, "encode_images", fake_encode)
    for module in (run_evaluation, drawing):
        monkeypatch.setattr(module, "decode_latents", decode)
    monkeypatch.setattr(sample, "require_vae", lambda device: None)


TINY = [
    "data.name=latents", "data.flip=true", "model=drifting_dit", "model.patch_size=4", "model.embed_dim=16",
    "model.depth=1", "model.num_heads=2", "step.labels_per_step=2", "step.gen_per_label=4", "step.pos_per_label=4",
    "train.batch_size=8", "train.steps=2", "train.log_every=1", "train.save_every=2",
]  # fmt: skip


def test_cache_then_train_then_sample(source, tmp_path, fake_vae, capsys):
    spoil(source, "train/cat/3.png")
    out, run = str(tmp_path / "latents"), tmp_path / "run"
    assert caching.main([str(source), out, "--image-size", str(SIZE), "--workers", "0"]) == 0
    told = capsys.readouterr().out
    assert "holds the latents of 16 train and 17 test images" in told and "skipped 1 images" in told
    assert training.main(["--out", str(run), f"data.path={out}", *TINY]) == 0
    *_, told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluation")]
    assert re.search("evaluation is left out: nothing will be measured of latents.*evaluation.reference=FILE.npz", told)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2] and (run / "samples" / "step_00000002.png").is_file()
    assert sample.main([str(run), "--num", "3", "--out", str(tmp_path / "x.npz")]) == 0
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (3, SIZE, SIZE, 3)


def test_training_does_without_the_vae(source, tmp_path, monkeypatch, capsys):
    cache(source, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert training.main(["--out", str(tmp_path / "run"), f"data.path={tmp_path / 'out'}", *TINY]) == 0
    told = capsys.readouterr().err
    assert re.search(r"no picture at step 2: .*diffusers, which is not installed.*drifting\[imagenet\]", told)
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["{source}", "{out}", "--batch-size", "0"], "0, expected 1 or more"),
        (["{source}", "{out}", "--workers", "-1"], "--workers is -1"),
        (["{source}/nowhere", "{out}"], "where there is no folder"),
        (["{source}", "{out}", "--data", "digits"], "invalid choice"),
        (["{source}", "{out}", "--data", "cifar10"], "data_batch_1 to 5 and test_batch are not in"),
        (["{source}", "{out}", "--image-size", "16", "--workers", "0"], r"pip install 'drifting\[imagenet\]'"),
    ],
)  # fmt: skip
def test_mistakes(source, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    places = {"source": source, "out": tmp_path / "out"}
    with pytest.raises(UserError, match=expected):
        caching.main([argument.format(**places) for argument in arguments])


def test_a_broken_diffusers_is_told_in_one_line(monkeypatch):
    """Its import raises RuntimeError where, say, torchvision was built for another torch."""

    class Diffusers:
        @property
        def AutoencoderKL(self):
            raise RuntimeError("Failed to import diffusers.models:\noperator torchvision::nms does not exist")

    vae.require_vae.cache_clear()
    monkeypatch.setitem(sys.modules, "diffusers", Diffusers())
    with pytest.raises(UserError, match="VAE .*torchvision::nms does not exist") as caught:
        vae.encode_images(torch.zeros(1, 3, 8, 8))
    assert "\n" not in str(caught.value)


def test_the_vae_is_applied_as_published(monkeypatch):
    """Both moments are scaled; the images are not."""

    class Posterior:
        mean, std = torch.full((2, 4, 2, 2), 10.0), torch.full((2, 4, 2, 2), 0.1)

    class FakeVae:
        dtype = torch.float32

        def encode(self, images):
            assert images.min() == -1 and images.max() == 1
            return type("Output", (), {"latent_dist": Posterior()})

    monkeypatch.setattr(vae, "require_vae", lambda device: FakeVae())
    mean, std = vae.encode_images(torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16))
    assert mean.unique().item() == pytest.approx(1.8215) and std.unique().item() == pytest.approx(0.018215)
    assert list(islice(mean.shape, 2)) == [2, 4]
