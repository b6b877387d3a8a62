"""Data sets read from files: that they arrive whole, and what is said where they are damaged or malicious."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from drifting.config.schema import DataConfig
from drifting.data import open_dataset
from drifting.data.cifar10 import read_batch
from drifting.data.idx import FASHION_MNIST, read_idx
from drifting.data.image_split import ImageError
from drifting.errors import UserError

RNG = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape).astype(np.uint8)


def normalised(images: np.ndarray) -> torch.Tensor:
    """uint8 ``[N, H, W, C]`` as the samples that they should become."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)


# --------------------------------------------------------------------------------------------------------- IDX


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder: Path, compressed: bool) -> dict[str, np.ndarray]:
    arrays = {}
    for split, count in (("train", 30), ("t10k", 20)):
        arrays[f"{split}-images-idx3-ubyte"] = pixels(count, 6, 6)
        arrays[f"{split}-labels-idx1-ubyte"] = (np.arange(count) % 10).astype(np.uint8)
    for name, array in arrays.items():
        data = idx_bytes(array)
        (folder / (name + ".gz" * compressed)).write_bytes(gzip.compress(data) if compressed else data)
    return arrays


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files(tmp_path, compressed):
    arrays = write_mnist(tmp_path, compressed)
    mnist = open_dataset(DataConfig("mnist", path=str(tmp_path)))
    assert (mnist.sample_shape, mnist.num_classes, mnist.pixel_range) == ((1, 6, 6), 10, (-1, 1))
    for split, name in ((mnist.train, "train"), (mnist.test, "t10k")):
        torch.testing.assert_close(split.samples(), normalised(arrays[f"{name}-images-idx3-ubyte"][..., None]))
        assert split.labels.tolist() == arrays[f"{name}-labels-idx1-ubyte"].tolist()


def test_fashion_mnist_of_debian():
    """Where its package is installed, with nothing but the name."""
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("the package dataset-fashion-mnist is not installed")
    fashion = open_dataset(DataConfig("fashion_mnist", path=str(folder)))
    assert str(folder) in FASHION_MNIST.folders
    assert fashion.sample_shape == (1, 28, 28) and len(fashion.train) == 60_000 and len(fashion.test) == 10_000
    assert fashion.train.labels.bincount().tolist() == [6000] * 10
    assert fashion.class_names[fashion.train[0][1]] == "ankle boot"
    assert fashion.train.images.mean() / 255 == pytest.approx(0.2860, abs=1e-4)  # the published mean


@pytest.mark.parametrize(
    "data, expected",
    [
        (b"", "does not begin"), (b"text", "does not begin"), (bytes([0, 0, 13, 1]) + bytes(8), "does not begin"),
        (idx_bytes(np.zeros((4, 5), np.uint8))[:-1], "speaks of 20 values, it holds 19"),
        (idx_bytes(np.zeros((4, 5), np.uint8)) + b"x", "speaks of 20 values, it holds 21"),
        (bytes([0, 0, 8, 3]) + b"\xff" * 12, "speaks of 79228162458924105385300197375 values, it holds 0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_idx_files(tmp_path, data, expected, compressed):
    path = tmp_path / ("file.gz" if compressed else "file")
    path.write_bytes(gzip.compress(data) if compressed else data)
    with pytest.raises(UserError, match=f"file.* cannot be read as an IDX file: .*{expected}"):
        read_idx(path)


def test_damaged_compression(tmp_path):
    path = tmp_path / "file.gz"
    whole = gzip.compress(idx_bytes(pixels(50, 5)))
    for data in (whole[:-12], whole[:30] + b"\xff" * 20 + whole[50:], b"text"):
        path.write_bytes(data)
        with pytest.raises(UserError, match="cannot be read as an IDX file"):
            read_idx(path)


def test_images_and_labels_must_agree(tmp_path):
    write_mnist(tmp_path, False)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx_bytes(np.zeros(29, np.uint8)))
    with pytest.raises(UserError, match=r"holds \[30, 6, 6\] values and .*labels-idx1-ubyte \[29\]"):
        open_dataset(DataConfig("mnist", path=str(tmp_path)))
    labels.write_bytes(idx_bytes(np.full(30, 10, np.uint8)))
    with pytest.raises(UserError, match="holds the label 10, expected labels from 0 to 9"):
        open_dataset(DataConfig("mnist", path=str(tmp_path)))
    labels.unlink()
    with pytest.raises(UserError, match="train-labels-idx1-ubyte.*are not in"):
        open_dataset(DataConfig("mnist", path=str(tmp_path)))


# ---------------------------------------------------------------------------------------------------- CIFAR-10


class Python2Pickler(pickle._Pickler):
    """Writes bytes and text alike as Python 2's strings, as the published files have them."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        data = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string


def write_batch(path: Path, images: np.ndarray, labels: list[int], published: bool = True) -> None:
    """``published``: as Python 2 and an old numpy wrote it; otherwise as this Python does."""
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    batch = {b"batch_label": b"a batch", b"labels": labels, b"data": rows, b"filenames": [b"a.png"] * len(labels)}
    with path.open("wb") as file:
        if published:
            Python2Pickler(file, protocol=2).dump(batch)
        else:
            pickle.dump(batch, file, protocol=2)
    if published:
        path.write_bytes(path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


@pytest.mark.parametrize("published", [True, False])
def test_cifar10(tmp_path, published):
    images = {}
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        images[name] = pixels(10, 32, 32, 3)
        write_batch(tmp_path / name, images[name], [0, 9, 3, 2, 1, 4, 5, 6, 7, 8], published)
    cifar10 = open_dataset(DataConfig("cifar10", path=str(tmp_path)))
    assert cifar10.sample_shape == (3, 32, 32) and cifar10.class_names[9] == "truck"
    *train, test = images.values()
    torch.testing.assert_close(cifar10.train.samples(), normalised(np.concatenate(train)))
    torch.testing.assert_close(cifar10.test.samples(), normalised(test))
    assert cifar10.train.labels.tolist() == [0, 9, 3, 2, 1, 4, 5, 6, 7, 8] * 5


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "content, expected",
    [
        (lambda folder: Call(Path.touch, folder / "ran"), " and 0 labels"),
        (lambda folder: {b"data": Call(eval, f"open({str(folder / 'ran')!r}, 'w')")}, " and 0 labels"),
        (lambda folder: {b"data": np.empty((1, 3072), object), b"labels": [0]}, "and 1 labels, expected 3072 bytes of"),
        (lambda folder: {b"data": Call(np.ndarray, (2**50,)), b"labels": [0]}, "no batch of CIFAR-10"),
        (lambda folder: {b"data": np.zeros((2, 3072), np.float64), b"labels": [0, 1]}, "it has 49152 bytes of pixels"),
        (lambda folder: {b"data": np.zeros((2, 3071), np.uint8), b"labels": [0, 1]}, "it has 6142 bytes .* 2 labels"),
        (lambda folder: {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "it has 6144 bytes .* 1 labels"),
        (lambda folder: {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]}, "from 0 to 10, expected 0 to 9"),
        (lambda folder: {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, -1]}, "from -1 to 0, expected 0 to 9"),
        (lambda folder: {b"labels": [0, 1]}, "bytes of pixels and 2 labels"),
        (lambda folder: [1, 2], "it has 0 bytes of pixels and 0 labels"),
    ],
)  # fmt: skip
def test_pickles_cannot_do_anything_else(tmp_path, content, expected):
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(content(tmp_path), protocol=2))
    with pytest.raises(UserError, match=f"data_batch_1 .*{expected}"):
        read_batch(path)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "ran").exists()


def test_truncated_and_huge_batches(tmp_path):
    path = tmp_path / "data_batch_1"
    write_batch(path, pixels(4, 32, 32, 3), [0, 1, 2, 3])
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="is no batch of CIFAR-10"):
        read_batch(path)
    with path.open("wb") as file:
        file.truncate(2**30)  # a hole: takes no space
    with pytest.raises(UserError, match="has 1073741824 bytes, expected at most"):
        read_batch(path)


# ----------------------------------------------------------------------------------------------------- folders


def write_images(root: Path, counts: dict[str, int]) -> None:
    """PNG files of 10 × 8 pixels, of one colour each: their class's place in red and their number in green."""
    for place, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (10, 8), (place, number, 0)).save(root / name / f"{number:03d}.png")


def colours(split) -> list[list[int]]:
    return ((split.samples()[:, :, 0, 0] + 1) * 127.5).round().int().tolist()


def folder(path: Path) -> DataConfig:
    return DataConfig("folder", path=str(path), image_size=8)


def test_folder_with_splits(tmp_path):
    write_images(tmp_path / "train", {"cat": 3, "dog": 2})
    write_images(tmp_path / "val", {"cat": 1, "dog": 2})
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".cache").mkdir()
    dataset = open_dataset(folder(tmp_path))
    assert dataset.class_names == ("cat", "dog") and dataset.sample_shape == (3, 8, 8)
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1] and dataset.test.labels.tolist() == [0, 1, 1]
    assert colours(dataset.train) == [[0, 0, 0], [0, 1, 0], [0, 2, 0], [1, 0, 0], [1, 1, 0]]
    assert colours(dataset.test) == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]


def test_folder_without_splits_holds_out_some_for_good(tmp_path):
    write_images(tmp_path, {"cat": 100, "dog": 100})
    before = open_dataset(folder(tmp_path))
    assert 8 <= len(before.test) <= 35 and len(before.train) + len(before.test) == 200
    write_images(tmp_path, {"emu": 50})
    after = open_dataset(folder(tmp_path))
    held = [split.images.names[split.labels.numpy() < 2].tolist() for split in (before.test, after.test)]
    assert held[0] == held[1]
    assert not set(after.train.images.names.tolist()) & set(after.test.images.names.tolist())


def test_folder_names_broken_images_and_classes_out_of_place(tmp_path):
    write_images(tmp_path / "train", {"cat": 2})
    write_images(tmp_path / "test", {"cat": 2})
    broken = tmp_path / "train" / "cat" / "001.png"
    broken.write_bytes(broken.read_bytes()[:50])
    dataset = open_dataset(folder(tmp_path))
    with pytest.raises(UserError, match=rf"{broken} cannot be decoded \(\w+: .*\): repair or delete it, or set"):
        dataset.train[1]
    broken.unlink()
    with pytest.raises(UserError, match=f"^{broken} cannot be read: No such file or directory$"):
        dataset.train[1]
    (tmp_path / "test" / "dog").mkdir()
    with pytest.raises(UserError, match="dog is a class that the training images do not have"):
        open_dataset(folder(tmp_path))


@pytest.mark.parametrize("names, expected", [
    ([], "there are too few images in .*: expected a sub-directory for each class"),
    (["train"], "train is a class without an image: fill it or take it away"),
    (["a.png"], "a.png is a class without an image"),
    (["train/cat"], "has train, but a folder of test images is missing: call it val"),
    (["train/cat", "test/cat"], "train/cat is a class without an image"),
    (["train", "Val"], "there are too few images in .*train: expected a sub-directory for each class"),
])  # fmt: skip
def test_folder_without_images(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match=expected):
        open_dataset(folder(tmp_path))


# ------------------------------------------------------------------------------------------------ Hugging Face


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"datasets, which is not installed: pip install 'drifting\[huggingface\]'"):
        open_dataset(DataConfig("huggingface", path="x", image_size=8))


def hub_table(count: int, **columns):
    """Images of one colour each, their number in green."""
    datasets = pytest.importorskip("datasets")
    images = [Image.new("RGB", (10, 8), (0, number, 0)) for number in range(count)]
    features = datasets.Features(
        {"picture": datasets.Image()} | {name: feature for name, (feature, _) in columns.items()}
    )
    return datasets.Dataset.from_dict(
        {"picture": images} | {name: values for name, (_, values) in columns.items()}, features=features
    )


def hub(path: Path, **keys) -> DataConfig:
    return DataConfig("huggingface", path=str(path), image_size=8, **keys)


def test_huggingface_from_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    kind = datasets.ClassLabel(names=["cat", "dog"])
    splits = {"train": hub_table(4, kind=(kind, [0, 1, 1, 0])), "validation": hub_table(2, kind=(kind, [1, 0]))}
    splits["test"] = hub_table(3, kind=(kind, [-1, -1, -1]))  # labels kept secret, as ImageNet's are
    datasets.DatasetDict(splits).save_to_disk(tmp_path)
    dataset = open_dataset(hub(tmp_path))
    assert dataset.class_names == ("cat", "dog") and dataset.sample_shape == (3, 8, 8)
    assert dataset.train.labels.tolist() == [0, 1, 1, 0] and dataset.test.labels.tolist() == [1, 0]
    assert colours(dataset.train) == [[0, number, 0] for number in range(4)]


def test_huggingface_without_a_test_split_and_with_names_as_labels(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = ["emu" if number % 3 else "cat" for number in range(60)]
    hub_table(60, label=(datasets.Value("string"), names)).save_to_disk(tmp_path)
    dataset = open_dataset(hub(tmp_path))
    assert dataset.class_names == ("cat", "emu") and len(dataset.train) + len(dataset.test) == 60
    for split in (dataset.train, dataset.test):
        assert split.labels.tolist() == [int(green % 3 > 0) for _, green, _ in colours(split)]


def test_huggingface_without_images_or_labels_in_some_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    kinds = {"text": datasets.Value("string"), "number": datasets.Value("float64"), "kind": datasets.ClassLabel(2)}
    values = {"text": ["a", None] * 15, "number": [0.5] * 30, "kind": [0, None] * 15}
    table = hub_table(30, **{name: (kind, values[name]) for name, kind in kinds.items()})
    table.save_to_disk(tmp_path / "a")
    for column, expected in (("text", "holds None"), ("number", "holds 0.5"), ("kind", "rows without a known class")):
        with pytest.raises(UserError, match=f"column '{column}' .*{expected}"):
            open_dataset(hub(tmp_path / "a", label_column=column))
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.Value("int64")})
    missing = datasets.Dataset.from_dict({"picture": [None] * 30, "label": [1] * 30}, features=features)
    missing.save_to_disk(tmp_path / "b")
    with pytest.raises(ImageError, match=r"image 3 of .* is missing"):
        open_dataset(hub(tmp_path / "b")).train[3]


def test_huggingface_asks_for_the_label(tmp_path):
    datasets = pytest.importorskip("datasets")
    kind = datasets.ClassLabel(names=["a", "b"])
    table = hub_table(30, fine=(kind, [0, 1] * 15), coarse=(kind, [0] * 30))
    table.save_to_disk(tmp_path)
    with pytest.raises(UserError, match="set data.label_column to the column that holds the class, one of: fine, coar"):
        open_dataset(hub(tmp_path))
    with pytest.raises(UserError, match="data.label_column is fin, expected one of: picture, fine, coarse"):
        open_dataset(hub(tmp_path, label_column="fin"))
    assert open_dataset(hub(tmp_path, label_column="fine")).train.labels.sum() > 0
    with pytest.raises(UserError, match="data.path is .*nothing, which datasets cannot load"):
        open_dataset(hub(tmp_path / "nothing"))
