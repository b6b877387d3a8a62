"""Folders of images as people have them, and other data whose classes are not what they seem."""

import json
import os
import shutil
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from checkpoint_cases import same_checkpoints
from PIL import Image, PngImagePlugin
from run_records import read_records
from test_data_sources import hub, hub_table, write_mnist
from test_resume import TINY

from drifting import evaluate, pretrain, sample
from drifting.config.reading import load_config, read_config
from drifting.config.schema import DataConfig, PretrainConfig
from drifting.data import Dataset, Draw, open_dataset, training_batches
from drifting.data.dataset import hold_out
from drifting.data.image_split import ImageError, ImageSplit, decode_image
from drifting.data.own import number_labels
from drifting.errors import UserError
from drifting.sample import parse_labels
from drifting.train import train
from drifting.training.distributed import Ranks
from drifting.training.trainer import DriftingTrainer

torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2  # Else five seconds are waited for a worker that is dead.


def fill(root: Path, count: int = 20, suffix: str = ".png", value: int | None = None) -> Path:
    """Write ``count`` images of 8 × 8 pixels, of one value each: its number, or ``value``."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("L", (8, 8), number if value is None else value).save(root / f"{number:03d}{suffix}")
    return root


def opened(path: Path, **keys) -> Dataset:
    return open_dataset(DataConfig("folder", path=str(path), image_size=8, **keys))


def files_of(split) -> list[str]:
    return [os.fsdecode(name) for name in split.images.names]


def labels_of(dataset: Dataset) -> dict[str, str]:
    """The name of the class of each file."""
    splits = (dataset.train, dataset.test)
    return {
        file: dataset.class_names[label]
        for split in splits
        for file, label in zip(files_of(split), split.labels.tolist(), strict=True)
    }


# ------------------------------------------------------------------------------------ classes without an image


def test_a_class_without_images_is_refused_by_name(tmp_path):
    for name, count in {"train/a": 3, "train/b": 3, "train/c": 0, "val/a": 2}.items():
        fill(tmp_path / name, count)
    with pytest.raises(UserError, match="train/c is a class without an image: fill it"):
        opened(tmp_path)
    (tmp_path / "train/c/x.HEIC").write_bytes(b"?"), (tmp_path / "train/c/notes").write_bytes(b"?")
    with pytest.raises(UserError, match="train/c is a class without an image, it holds 1 .heic, 1 without a suffix"):
        opened(tmp_path)
    fill(tmp_path / "train/c", 1)
    assert opened(tmp_path).class_names == ("a", "b", "c")  # of which the test images lack two


def test_the_first_frame_of_a_gif_is_read(tmp_path):
    fill(tmp_path / "a"), fill(tmp_path / "b", suffix=".GIF")
    frames = [Image.new("L", (8, 8), value) for value in (100, 200)]
    frames[0].save(tmp_path / "b" / "000.GIF", save_all=True, append_images=frames[1:])
    dataset = opened(tmp_path)
    assert len(dataset.train) + len(dataset.test) == 40
    place = files_of(dataset.train).index("b/000.GIF")
    assert dataset.train[place][0].unique().tolist() == pytest.approx([100 / 127.5 - 1])


def test_other_files_are_counted_by_suffix_in_one_line(tmp_path):
    fill(tmp_path / "a"), fill(tmp_path / "b")
    for name in ("a/x.txt", "a/y.TXT", "b/deep/z.heic", "outside.png", "b/Makefile"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (note,) = opened(tmp_path).notes
    assert note.startswith("passed over, as no images in the folder of a class: 2 .txt, ")
    assert all(text in note for text in ("1 .heic", "1 .png", "1 without a suffix"))


def test_a_class_is_never_held_out_whole():
    names = [str(number) for number in range(200)]
    held = hold_out(names, ["a"] * 200)[1]
    labels = ["rare" if number in held[:3] else "a" for number in range(200)]
    train, test = hold_out(names, labels)
    assert {*held} - {*test} == {*held[:3]} and sorted([*train, *test]) == list(range(200))


def test_names_without_images_are_left_out(tmp_path):
    """MNIST of two digits only, whose test images are of these or of all."""
    arrays = write_mnist(tmp_path, False)
    shown = {}
    for split in ("train", "t10k"):
        labels, images = (arrays[f"{split}-{kind}-ubyte"] for kind in ("labels-idx1", "images-idx3"))
        kept = np.isin(labels, [3, 7])
        if split == "t10k":
            with pytest.raises(UserError, match="samples have the class 0, 0, expected .*: take these away"):
                open_dataset(DataConfig("mnist", path=str(tmp_path)))
        for kind, array in (("labels-idx1", labels[kept]), ("images-idx3", images[kept])):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (tmp_path / f"{split}-{kind}-ubyte").write_bytes(header + array.tobytes())
        shown[split] = labels[kept]
    mnist = open_dataset(DataConfig("mnist", path=str(tmp_path)))
    assert mnist.class_names == ("3", "7")
    assert mnist.train.labels.tolist() == (shown["train"] == 7).astype(int).tolist()
    assert mnist.test.labels.tolist() == (shown["t10k"] == 7).astype(int).tolist()
    assert mnist.describe().splitlines() == [
        "mnist: 6 training and 4 test images of 2 classes: 3, 7",
        "left out, without training samples: 0, 1, 2, 4, 5, 6, 8, 9",
    ]


def test_names_of_hugging_face_without_rows_are_left_out(tmp_path):
    datasets = pytest.importorskip("datasets")
    kind = datasets.ClassLabel(names=["cat", "dog", "emu"])
    hub_table(40, label=(kind, [2, 0] * 20)).save_to_disk(tmp_path)
    dataset = open_dataset(hub(tmp_path))
    assert dataset.class_names == ("cat", "emu") and dataset.train.labels.unique().tolist() == [0, 1]


# ------------------------------------------------------------------------------------------- what is no class


@pytest.mark.parametrize("junk", [
    ".ipynb_checkpoints", "__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini", ".Trash-0", "System Volume Information",
])  # fmt: skip
def test_what_file_managers_leave_is_passed_over(tmp_path, junk):
    for name in ("train/a", "train/b", "val/a", "val/b"):
        fill(tmp_path / name, 3)
    for place in ("", "train", "train/a", "val", "val/b"):
        fill(tmp_path / place / junk / "a", 2), fill(tmp_path / place / junk, 2)
    (tmp_path / "train/a/._000.png").write_bytes(b"\0\5\26\7")
    dataset = opened(tmp_path)
    assert files_of(dataset.train) == [f"{name}/{number:03d}.png" for name in "ab" for number in range(3)]
    assert len(dataset.test) == 6 and not dataset.notes


# ----------------------------------------------------------------------------------------------- StyleGAN's labels


def tell(root: Path, labels) -> None:
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))


def test_labels_are_read_from_dataset_json(tmp_path):
    """They are those of files, in whatever folders these are; each tenth number is a class."""
    for name in ("00000", "00001", "."):
        fill(tmp_path / name)
    told = {f"{name}{number:03d}.png": 10 * (number % 3) for name in ("00000/", "00001/", "") for number in range(20)}
    tell(tmp_path, [[name.replace("/", "\\" if "1/" in name else "/"), label] for name, label in told.items()])
    dataset = opened(tmp_path)
    assert dataset.class_names == ("0", "10", "20")
    assert labels_of(dataset) == {name: str(label) for name, label in told.items()}


@pytest.mark.parametrize("inside", [True, False])
def test_dataset_json_of_splits(tmp_path, inside):
    fill(tmp_path / "train"), fill(tmp_path / "val/x")
    told = {"train": [[f"{number:03d}.png", number % 2] for number in range(20)]}
    told["val"] = [[f"x/{number:03d}.png", (number + 1) % 2] for number in range(20)]
    if inside:
        for split, labels in told.items():
            tell(tmp_path / split, labels)
    else:
        tell(tmp_path, [[f"{split}/{name}", label] for split in told for name, label in told[split]])
    dataset = opened(tmp_path)
    assert dataset.train.labels.tolist() == [0, 1] * 10 and dataset.test.labels.tolist() == [1, 0] * 10


def test_dataset_json_without_labels_is_one_class(tmp_path):
    fill(tmp_path / "00000"), fill(tmp_path / "00001")
    tell(tmp_path, None)
    assert opened(tmp_path).class_names == ("all",)
    (tmp_path / "dataset.json").write_text('{"info": "of something else"}')
    assert opened(tmp_path).class_names == ("00000", "00001")


@pytest.mark.parametrize("content, expected", [
    ('{"labels": [["a/000.png", 1]]}', "no label of 39 of the 40 images in .*, such as a/001.png: add them"),
    ('{"labels": [["a/000.png"]]}', "dataset.json cannot be read as the labels of images"),
    ('{"labels": ', "dataset.json cannot be read as the labels of images: it is no JSON"),
    (json.dumps({"labels": [[f"{a}/{n:03d}.png", [0, 1]] for a in "ab" for n in range(20)]}), "expected an integer"),
])  # fmt: skip
def test_labels_that_cannot_be_used_are_told(tmp_path, content, expected):
    fill(tmp_path / "a"), fill(tmp_path / "b")
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=expected):
        opened(tmp_path)


# ------------------------------------------------------------------------------------------------------ splits


@pytest.mark.parametrize("train_name, test_name", [
    ("train", "valid"), ("Train", "Val"), ("training", "testing"), ("TRAIN", "TEST"), ("train", "validation"),
    ("Training", "dev"),
])  # fmt: skip
def test_splits_are_known_by_their_names(tmp_path, train_name, test_name):
    for name, count in ((train_name, 5), (test_name, 3), ("other", 2)):
        fill(tmp_path / name / "a", count), fill(tmp_path / name / "b", count)
    dataset = opened(tmp_path)
    assert dataset.describe() == "folder: 10 training and 6 test images of 2 classes: a, b"


def test_a_missing_or_second_split_is_told(tmp_path):
    fill(tmp_path / "train/a"), fill(tmp_path / "train/b")
    with pytest.raises(UserError, match="has train, but a folder of test images is missing: call it val"):
        opened(tmp_path)
    fill(tmp_path / "Valid/a"), fill(tmp_path / "valid/a")
    with pytest.raises(UserError, match="has Valid and valid, expected one folder of test images"):
        opened(tmp_path)
    (tmp_path / "train").rename(tmp_path / "data"), shutil.rmtree(tmp_path / "Valid")
    with pytest.raises(UserError, match="has valid, but a folder of training images is missing: call it train"):
        opened(tmp_path)


@pytest.mark.parametrize("names", ["set1/a set1/b set2/a set2/b", "x/train/a x/val/a", "x/Training/a x/dev/b y/z"])
def test_splits_are_not_trained_as_classes(tmp_path, names):
    for name in names.split():
        fill(tmp_path / name)
    with pytest.raises(UserError, match="call them train and val if they are splits|set data.path to it"):
        opened(tmp_path)


@pytest.mark.parametrize("names", ["car plane train", "valid invalid", "dog/images cat/images", "a/x a/y b"])
def test_classes_may_be_called_as_splits_and_have_folders(tmp_path, names):
    for name in names.split():
        fill(tmp_path / name)
    assert opened(tmp_path).class_names == tuple(sorted({name.partition("/")[0] for name in names.split()}))


# ------------------------------------------------------------------------------------------------------- names


def test_numbers_are_in_their_order(tmp_path):
    for name in ("1", "2", "10", "-3", "0.5"):
        fill(tmp_path / name)
    assert opened(tmp_path).class_names == ("-3", "0.5", "1", "2", "10")
    fill(tmp_path / "none")
    assert opened(tmp_path).class_names == ("-3", "0.5", "1", "10", "2", "none")
    assert number_labels(["10", 7, "9", 70]) == (7, 70, "9", "10")


RUN = [
    *TINY, "data=folder", "data.image_size=8", "loss.feature_extractor=input", "step.labels_per_step=2",
    "train.batch_size=8", "train.save_every=100",
]  # fmt: skip
LARGE = [*RUN, "data.image_size=32", "model.patch_size=16"]  # Too large for an evaluation, which would read all images.


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of splits, with its classes 1, 2 and 10."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("1", "2", "10"):
            for file in fill(root / split / name).iterdir():
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    return root


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    train(load_config("digits", [*RUN, f"data.path={photos}"]), out)
    return out


def test_names_are_told_first_and_kept(photos, tmp_path, capfd):
    train(load_config("digits", [*RUN, f"data.path={photos}", "train.steps=1"]), tmp_path)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "folder: 60 training and 60 test images of 3 classes: 1, 2, 10"
    assert json.loads((tmp_path / "model.json").read_text())["class_names"] == ["1", "2", "10"]


def test_samples_are_drawn_by_name(finished, tmp_path, capsys):
    out = tmp_path / "x.npz"
    sample.main([str(finished), "--num", "4", "--labels", "10,1", "--out", str(out)])
    assert capsys.readouterr().out == f"wrote 4 samples of labels 1, 10 to {out}\n"
    assert sorted(np.load(out)["arr_1"].tolist()) == [1, 1, 10, 10]
    names = ("tench, Tinca tinca", "great white shark, white shark, man-eater", "hen")
    assert parse_labels("hen,tench, Tinca tinca ,0", names) == [2, 0]
    assert parse_labels("great white shark, white shark, man-eater", names) == [1]
    with pytest.raises(UserError, match="--labels names 'tench', expected 0 to 2 or some of: tench, Tinca"):
        parse_labels("tench,hen", names)


def renamed(photos: Path, root: Path) -> Path:
    shutil.copytree(photos, root)
    for split in ("train", "val"):
        (root / split / "2").rename(root / split / "3")
    return root


def test_a_run_does_not_go_on_with_other_classes(photos, finished, tmp_path):
    other = renamed(photos, tmp_path / "other")
    shutil.copytree(finished, tmp_path / "run")
    expected = r"trained on 3 classes \(1, 2, 10\), the data now have 3 \(1, 3, 10\): choose another --out"
    with pytest.raises(UserError, match=expected):
        train(load_config("digits", [*RUN, f"data.path={other}", "train.steps=8"]), tmp_path / "run")
    train(load_config("digits", [*RUN, f"data.path={photos}", "train.steps=8"]), tmp_path / "run")


def test_evaluation_refuses_other_classes(photos, finished, tmp_path, capsys):
    assert evaluate.main([str(finished), "--num", "20"]) == 0
    shutil.copytree(finished, tmp_path / "run")
    config = yaml.safe_load((finished / "config.yaml").read_text())
    config["data"]["path"] = str(renamed(photos, tmp_path / "other"))
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"trained on 3 classes \(1, 2, 10\), the data to compare with have 3"):
        evaluate.main([str(tmp_path / "run")])


def test_encoders_keep_names_too(photos, tmp_path):
    tiny = ["model.base_channels=8", "model.layers=[1,1,1,1]", "train.batch_size=8", "train.steps=1", "data=folder"]
    tiny += ["data.image_size=8", f"data.path={photos}"]
    pretrain.pretrain(read_config("mae_fashion_mnist", tiny, PretrainConfig), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "model.json").read_text())["class_names"] == ["1", "2", "10"]
    other = renamed(photos, tmp_path / "other")
    with pytest.raises(UserError, match=r"trained on 3 classes \(1, 2, 10\), the data now have 3"):
        changed = [*tiny, f"data.path={other}", "train.steps=2"]
        pretrain.pretrain(read_config("mae_fashion_mnist", changed, PretrainConfig), tmp_path / "run")


def test_splits_of_hugging_face_that_number_classes_differently_are_mapped(tmp_path):
    datasets = pytest.importorskip("datasets")
    kinds = [datasets.ClassLabel(names=names) for names in (["emu", "cat"], ["cat", "dog", "emu"])]
    splits = {"train": hub_table(4, label=(kinds[0], [0, 1, 1, 0])), "dev": hub_table(3, label=(kinds[1], [2, 0, 0]))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "a")
    dataset = open_dataset(hub(tmp_path / "a"))
    assert dataset.class_names == ("emu", "cat")
    assert dataset.train.labels.tolist() == [0, 1, 1, 0] and dataset.test.labels.tolist() == [0, 1, 1]
    splits["dev"] = hub_table(1, label=(kinds[1], [1]))
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "b")
    with pytest.raises(UserError, match="column 'label' holds 'dog' in the test data, which the training data lack"):
        open_dataset(hub(tmp_path / "b"))
    splits["dev"] = hub_table(1, name=(datasets.Value("string"), ["emu"]))
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "c")
    with pytest.raises(UserError, match="the split None has no column 'label', which holds the class"):
        open_dataset(hub(tmp_path / "c"))


# ---------------------------------------------------------------------------------------- pixels, and what is none


def saved(tmp_path: Path, image: Image.Image, name: str, **options) -> bytes:
    image.save(tmp_path / name, **options)
    return (tmp_path / name).read_bytes()


def transparent_images() -> dict[str, tuple[Image.Image, dict]]:
    """Images of red, whose left half is transparent."""
    rgba = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    rgba.paste((255, 0, 0, 0), (0, 0, 4, 8))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0] * 2)
    palette.paste(0, (0, 0, 4, 8))
    keyed = Image.new("RGB", (8, 8), (255, 0, 0))
    keyed.paste((254, 0, 0), (0, 0, 4, 8))
    return {
        "rgba.png": (rgba, {}), "rgba.webp": (rgba, {"lossless": True}), "rgba.tif": (rgba, {}),
        "palette.png": (palette, {"transparency": 0}), "palette.gif": (palette, {"transparency": 0}),
        "keyed.png": (keyed, {"transparency": (254, 0, 0)}),
    }  # fmt: skip


@pytest.mark.parametrize("name", transparent_images())
def test_transparent_pixels_show_the_background(tmp_path, name):
    image, options = transparent_images()[name]
    content = saved(tmp_path, image, name, **options)
    for background, shown in (("black", (0, 0, 0)), ("rgb(1, 2, 3)", (1, 2, 3))):
        decoded = decode_image(content, name, background)
        assert decoded.getpixel((0, 0)) == shown and decoded.getpixel((7, 7)) == (255, 0, 0)


def test_transparency_is_said_once(tmp_path):
    fill(tmp_path / "a"), fill(tmp_path / "b")
    assert not opened(tmp_path).notes
    Image.new("LA", (8, 8), (255, 0)).save(tmp_path / "b" / "004.png")
    dataset = opened(tmp_path, background="white")
    assert dataset.notes == ("there are images with transparency, which are put on white (data.background)",)
    assert (dataset.train[files_of(dataset.train).index("b/004.png")][0] == 1).all()
    with pytest.raises(UserError, match="data.background is 'whit', expected str, a colour such as white or rgb"):
        load_config("digits", ["data.background=whit"])
    with pytest.raises(UserError, match="data.background is white, which data.name=digits has no use for"):
        open_dataset(DataConfig("digits", background="white"))


def chunks_of(png: bytes) -> list[bytes]:
    found, at = [], 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        found.append(png[at:end])
        at = end
    return found


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + kind + content + checksum


def test_metadata_of_any_size_and_content_is_passed_over(tmp_path):
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    info = PngImagePlugin.PngInfo()
    info.add_text("notes", "x" * 70_000_000, zip=True)
    profile = zlib.compress(bytes(2_000_000)) + bytes(2_000_000)
    contents = [saved(tmp_path, pixels, "a.png", pnginfo=info), saved(tmp_path, pixels, "b.png", icc_profile=profile)]
    first, *rest = chunks_of(saved(tmp_path, pixels, "c.png"))
    for kind, odd in {b"iCCP": b"name\0\7?", b"pHYs": b"?", b"eXIf": b"?" * 9, b"zTXt": b"a\0\0?"}.items():
        contents.append(b"\x89PNG\r\n\x1a\n" + first + chunk(kind, odd) + b"".join(rest))
    for content in contents:
        assert (np.asarray(decode_image(content, "odd.png")) == np.asarray(pixels)).all()


def test_a_bad_checksum_is_told_as_that(tmp_path):
    content = saved(tmp_path, Image.new("L", (8, 8)), "a.png", dpi=(72, 72))
    for kind, what in ((b"pHYs", "the ancillary chunk pHYs"), (b"IHDR", "the chunk IHDR")):
        at = content.index(kind) + 4
        damaged = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        with pytest.raises(ImageError, match=rf"odd.png cannot be decoded \(ValueError: the checksum of {what} is"):
            decode_image(damaged, "odd.png")
    for end in range(9, len(content)):  # cut anywhere, it is refused or whole
        try:
            assert np.asarray(decode_image(content[:end], "odd.png")).shape == (8, 8, 3)
        except ImageError:
            continue


# ------------------------------------------------------------------------------------------- readers that fail


def cut(path: Path) -> bytes:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return whole


@pytest.fixture
def broken_photos(photos, tmp_path):
    """A copy of the photos in which an image is cut that is read in the fourth batch and not before."""
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    split = opened(root).train
    draws = np.random.default_rng([0, 0]).permutation(len(split)).tolist()
    path = root / "train" / files_of(split)[draws[8 * 3 + 5]]
    return root, path, cut(path)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_is_saved_before_a_broken_image_ends_it(broken_photos, photos, tmp_path, workers):
    root, path, whole = broken_photos
    config = load_config("digits", [*LARGE, f"data.path={root}", f"data.workers={workers}"])
    expected = rf"^{path} cannot be decoded .*; the run ends at step 3, saved in {tmp_path}/run/checkpoints: the same"
    with pytest.raises(UserError, match=expected) as caught:
        train(config, tmp_path / "run")
    assert "\n" not in str(caught.value) and (tmp_path / "run" / "model.safetensors").is_file()
    path.write_bytes(whole)
    train(config, tmp_path / "run")
    train(load_config("digits", [*LARGE, f"data.path={photos}"]), tmp_path / "whole")
    assert read_records(tmp_path / "run") == read_records(tmp_path / "whole")
    assert same_checkpoints(*(tmp_path / name / "checkpoints" / "step_00000006.pt" for name in ("run", "whole")))


def test_a_broken_image_in_the_first_batch_leaves_nothing(photos, tmp_path):
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    for path in root.glob("train/*/*"):
        cut(path)
    with pytest.raises(UserError, match="data.skip_broken=true$"):
        train(load_config("digits", [*LARGE, f"data.path={root}"]), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_broken_images_are_replaced_and_counted(broken_photos, tmp_path, capfd):
    root, path, _ = broken_photos
    settings = [*LARGE, f"data.path={root}"]
    with pytest.raises(UserError):
        train(load_config("digits", settings), tmp_path / "run")
    train(load_config("digits", [*settings, "data.skip_broken=true", "data.workers=2"]), tmp_path / "run")
    assert [record.get("broken_images") for record in read_records(tmp_path / "run")] == [None] * 3 + [1] * 3
    told = f"another image of its class takes the place of one: {path} cannot be decoded"
    assert capfd.readouterr().err.count(told) == 1


def test_another_image_of_the_class_takes_the_place(tmp_path):
    fill(tmp_path / "a", value=10), fill(tmp_path / "b", value=20)
    for name in ("a/003.png", "a/004.png", "b/019.png"):
        cut(tmp_path / name)
    dataset = opened(tmp_path, skip_broken=True)
    for split in (dataset.train, dataset.test):
        for draw in (None, 0, 1):
            for index in range(len(split)):
                value, label = split[index if draw is None else Draw(draw, index)]
                assert ((value + 1) * 127.5).round().unique().tolist() == [10 * (label + 1)]
    assert len(dataset.train.broken) + len(dataset.test.broken) == 3
    for path in (tmp_path / "b").iterdir():
        path.write_bytes(b"")
    split = opened(tmp_path, skip_broken=True).train
    with pytest.raises(UserError, match="none of the images of class 1 can be read, see above"):
        split[len(split) - 1]


def test_any_error_of_a_reader_ends_in_one_line_when_its_batch_is_due():
    class Failing(ImageSplit):
        def sample(self, index, draw):
            if index == 7:
                raise ZeroDivisionError("of the user's\nown data")
            return super().sample(index, draw)

    split = Failing(np.zeros((20, 8, 8), np.uint8), np.zeros(20), 8)
    for workers in (0, 2):
        batches = training_batches(split, 1, seed=0, workers=workers)
        for _ in range(np.random.default_rng([0, 0]).permutation(20).tolist().index(7)):
            next(batches)
        with pytest.raises(UserError, match="^the data cannot be read: .*own data$"):
            next(batches)


def test_a_process_that_dies_in_the_middle_of_a_step_ends_the_run_after_it(tmp_path, monkeypatch):
    whole = DriftingTrainer.train_step

    def killing(self, *arguments):
        for child in torch.multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
            child.join()
        return whole(self, *arguments)

    monkeypatch.setattr(DriftingTrainer, "train_step", killing)
    with pytest.raises(UserError, match=r"a process that reads data died .*; the run ends at step [12], saved in"):
        train(load_config("digits", [*TINY, "data.workers=1", "train.save_every=100"]), tmp_path)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def train_as_rank(rank: int, settings: list[str], out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=2)
    ranks = Ranks(rank, 2, dist.group.WORLD, dist.group.WORLD)
    with pytest.raises(UserError if rank == 0 else SystemExit) as caught:
        train(load_config("digits", settings), Path(out), ranks)
    Path(f"{out}.{rank}").write_text(str(caught.value))
    dist.destroy_process_group()


def test_all_ranks_are_saved_before_an_image_of_one_ends_them(broken_photos, tmp_path):
    """The second rank reads the image, in its half of the batch, and the first tells of it."""
    root, path, _ = broken_photos
    torch.multiprocessing.spawn(train_as_rank, ([*LARGE, f"data.path={root}"], str(tmp_path / "run")), nprocs=2)
    assert (tmp_path / "run.0").read_text().startswith(f"{path} cannot be decoded")
    assert (tmp_path / "run.1").read_text() == "2"  # It ends without a word.
    assert [file.name for file in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000003.pt"]


def test_a_picture_that_cannot_be_made_does_not_end_a_run(photos, tmp_path, capfd):
    """The real images beside the generated ones are read from the training images."""
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    first = root / "train" / "1" / "000.png"
    assert 0 not in np.random.default_rng([0, 0]).permutation(60)[:8]  # The first batch does without it.
    cut(first)
    train(load_config("digits", [*LARGE, f"data.path={root}", "train.steps=1"]), tmp_path / "run")
    assert f"no picture at step 1: {first} cannot be decoded" in capfd.readouterr().err
