"""A user's own data sets, by name: every kind of sample and label, and what is said of those that cannot be used."""

import random
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset as MapStyle
from torch.utils.data import IterableDataset, TensorDataset, random_split

from drifting.config.schema import DataConfig
from drifting.data import Dataset, load_digits, open_dataset, training_batches
from drifting.errors import UserError


@pytest.fixture
def own(monkeypatch) -> Callable[..., Dataset]:
    """Opens what a function gives, by its name in a module of the user's."""

    def open_own(function: Callable[..., Any] | Any, **keys: Any) -> Dataset:
        module = types.ModuleType("own_data_of_a_test")
        module.make = function if callable(function) else lambda: function
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return open_dataset(DataConfig(f"{module.__name__}:make", **keys))

    return open_own


class Items(MapStyle):
    """A data set of those items, with attributes."""

    def __init__(self, items, **attributes):
        self.items = items
        vars(self).update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(2)


def points(count: int, *shape: int) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))


# -------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("shape", [(), (2,), (7, 3), (4, 9, 9), (2, 3, 4, 5)], ids=str)
def test_samples_of_any_shape(own, shape):
    train, test = points(40, *shape), points(10, *shape)
    dataset = own((TensorDataset(train, torch.arange(40) % 2), TensorDataset(test, torch.arange(10) % 2)))
    assert (dataset.sample_shape, dataset.pixel_range, dataset.latent) == (shape, None, False)
    assert torch.equal(dataset.train.samples(), train) and torch.equal(dataset.test.samples([3, 1]), test[[3, 1]])
    assert dataset.train.labels.tolist() == [0, 1] * 20 and dataset.class_names == ("0", "1")
    samples, labels = next(training_batches(dataset.train, 8, seed=0))
    assert samples.shape == (8, *shape) and samples.dtype == torch.float32 and labels.dtype == torch.int64


@pytest.mark.parametrize(
    "convert",
    [lambda x: x, lambda x: x.numpy()[::-1][::-1], lambda x: x.double(), lambda x: x.half(), lambda x: x.int(),
     lambda x: x.numpy().astype(np.uint8), lambda x: x.clone().requires_grad_(), lambda x: x.bfloat16()],
)  # fmt: skip
def test_samples_become_float32(own, convert):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    dataset = own((Items([convert(row) for row in x]), Items([(convert(row),) for row in x])))
    for split in (dataset.train, dataset.test):
        assert torch.equal(split.samples(), x) and split[0][0].dtype == torch.float32
        assert not split[0][0].requires_grad


def test_bytes_and_half_precision_are_stored_as_they_come(own):
    x = torch.arange(6).view(3, 2)
    for dtype in (torch.uint8, torch.float16, torch.float32, torch.float64, torch.int32):
        split = own((Items(list(x.to(dtype))), Items(list(x)))).train
        assert split.stored(1)[0].dtype == split.dtype == (torch.float32 if dtype.itemsize > 2 else dtype)
    with pytest.raises(UserError, match="sample 1 .* has the type torch.float32, the first one torch.uint8: bring all"):
        own((Items([x[0].byte(), x[1].float()]), Items(list(x))))


@pytest.mark.parametrize("number", [3, 0.5, True, np.float64(0.25), torch.tensor(2)])
def test_numbers_are_samples(own, number):
    dataset = own((Items([number] * 3), Items([(number, 1)] * 0 + [number])))
    assert dataset.sample_shape == () and dataset.train[1][0].item() == float(number)


@pytest.mark.parametrize(
    "low, high, channels, expected",
    [(0, 1, 1, (0, 1)), (-1, 1, 3, (-1, 1)), (0, 2, 1, None), (-1, 1, 2, None), (0.2, 0.7, 3, (0, 1))],
)
def test_images_are_told_by_shape_and_range(own, low, high, channels, expected):
    images = torch.rand(30, channels, 8, 12) * (high - low) + low
    images[1].fill_(low), images[2].fill_(high)
    dataset = own((TensorDataset(images), TensorDataset(images)))
    assert dataset.pixel_range == expected and dataset.sample_shape == (channels, 8, 12)


@pytest.mark.parametrize("said, expected", [(None, None), ([0, 255], (0.0, 255.0)), ((0, 1), (0.0, 1.0))])
def test_a_data_set_may_say_its_pixel_range(own, said, expected):
    items = list(torch.rand(40, 1, 4, 4))
    for made in (Items(items, pixel_range=said), (Items(items, pixel_range=said), Items(items))):
        assert own(made).pixel_range == expected


# --------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "values, names, told",
    [
        ([42, 3, 7], ("3", "7", "42"), "labels 3, 7, 42 are classes 0"),
        (["dog", "cat"], ("cat", "dog"), "labels cat, dog are classes 0"),
        ([10, -9, 2], ("-9", "2", "10"), "labels -9, 2, 10 are classes 0"),
        ([1, 0, 2], ("0", "1", "2"), ""),
        ([np.int64(5), np.int64(4)], ("4", "5"), "labels 4, 5"),
        ([torch.tensor(5), torch.tensor(4)], ("4", "5"), "labels 4, 5"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("known", [False, True], ids=["read", "targets"])
def test_labels_are_mapped_once_and_told(own, capsys, values, names, told, known):
    labels = values * 10
    items = [(torch.zeros(2), label) for label in labels]
    dataset = own((Items(items, **({"targets": labels} if known else {})), Items(items[:5])))
    assert dataset.class_names == names and dataset.num_classes == len(names)
    assert [names[number] for number in dataset.train.labels] == [f"{label}" for label in labels]
    assert torch.equal(dataset.test.labels, dataset.train.labels[:5])
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == bool(told)


def test_labels_of_tensor_data_sets_and_parts_of_them(own):
    """They are not read one by one, which would take a second for a million of them."""

    class Unread(TensorDataset):
        def __getitem__(self, index):
            self.reads = getattr(self, "reads", 0) + 1
            return super().__getitem__(index)

    whole = Unread(points(50_000, 1), torch.arange(50_000) % 3 + 5)
    for made in (whole, tuple(random_split(whole, [40_000, 10_000]))):
        dataset = own(made)
        assert whole.reads < 3000 and dataset.class_names == ("5", "6", "7")
        for split in (dataset.train, dataset.test):
            assert all(float(whole.tensors[0].eq(x).float().argmax() % 3) == y for x, y in (split[i] for i in (0, 99)))


def test_without_labels_there_is_one_class(own, capsys):
    for made in ((TensorDataset(points(9, 2)), Items(list(points(3, 2)))), Items([(x,) for x in points(100, 2)])):
        dataset = own(made)
        assert dataset.class_names == ("all",) and not dataset.train.labels.any() and not dataset.test.labels.any()
    assert not capsys.readouterr().err


# -------------------------------------------------------------------------------------------- what gives the data


def test_one_data_set_holds_out_some_for_good(own):
    samples = torch.arange(300.0)
    dataset = own(TensorDataset(samples[:, None], torch.arange(300) % 2))
    longer = own(TensorDataset(torch.arange(400.0)[:, None], torch.arange(400) % 2))
    train, test = (split.samples().flatten() for split in (dataset.train, dataset.test))
    assert torch.equal(torch.cat([train, test]).sort().values, samples) and 15 <= len(test) <= 50
    assert set(test.tolist()) < set(longer.test.samples().flatten().tolist())
    assert torch.equal(dataset.test.labels, (test % 2).long())


def test_arguments(own):
    class Noise(MapStyle):
        """With a label for each of some kinds, of some length."""

        def __init__(self, kinds, length=4, flip=False, path=None):
            self.kinds, self.length, self.flip, self.path = kinds, length, flip, path

        def __len__(self):
            return 60

        def __getitem__(self, index):
            return torch.zeros(self.length + self.flip), index % self.kinds

    dataset = own(Noise, arguments={"kinds": 3, "length": 6}, flip=True, path="x")
    assert dataset.num_classes == 3 and dataset.sample_shape == (7,)
    assert dataset.train.items.dataset.path == "x"
    with pytest.raises(UserError, match="unknown key data.kind: Noise has no argument kind; did you mean kinds"):
        own(Noise, arguments={"kind": 3})
    with pytest.raises(UserError, match="data.crop.*Noise has no argument crop"):
        own(Noise, arguments={"kinds": 3}, crop=True)
    with pytest.raises(UserError, match="TypeError: .*missing 1 required positional argument: 'kinds'"):
        own(Noise)


def test_what_it_draws_at_random_follows_from_the_seed(own):
    def noise():
        return Items([torch.rand(2) + np.random.rand() + random.random() for _ in range(50)])

    one, same = (own(noise).train.samples() for _ in range(2))
    assert torch.equal(one, same)


def test_our_own_kind_of_data_set_is_taken_as_it_is(own):
    digits = load_digits()
    assert own(lambda: digits) is digits


# ------------------------------------------------------------------------------------------------- wrong things


def labelled(*labels: Any) -> Items:
    return Items([(torch.zeros(2), label) for label in labels])


X = torch.zeros(2)
WRONG = {
    "nothing": (None, "gives a NoneType, expected a map-style data set or a pair of them"),
    "three": ((labelled(0), labelled(0), labelled(0)), "sample 0 of the training data cannot be used: it is a Items"),
    "endless": (Endless(), "gives a Endless"),
    "raises": (lambda: 1 / 0, "data.name is .*: ZeroDivisionError: division by zero"),
    "empty": ((Items([]), Items([])), "the training data are empty"),
    "no test": ((labelled(0, 1), Items([])), "the test data are empty"),
    "few": (labelled(0), "1 samples are too few to test with some: give a pair"),
    "shapes": ((Items([X, torch.zeros(3)]), Items([X])), r"sample 1 .* has the shape \[3\], the first one \[2\]"),
    "other shape": ((Items([X]), Items([torch.zeros(3)])), r"samples have the shape \[2\], test samples \[3\]"),
    "text": ((Items(["a"]), Items(["b"])), "sample 0 of the training data cannot be used: it is a str, expected a "),
    "objects": ((Items([np.array([None])]), Items([X])), "sample 0 of the training data cannot be used: TypeError"),
    "complex": ((Items([X + 1j]), Items([X])), "it has complex numbers, expected real ones"),
    "label lacking": ((labelled(1, 2), labelled(1, 3)), "it has the label 3 in the test data, which"),
    "no test labels": ((labelled(1), Items([X])), "it has 0 labels of 1 test samples, expected one of each"),
    "test labels only": ((Items([X]), labelled(1)), "it has the label 1 in the test data, which"),
    "float": ((labelled(0.5), labelled(0.5)), "it has the label 0.5, expected an integer or text"),
    "vectors": ((TensorDataset(points(2, 2), points(2, 2)), labelled(1)), r"it has the label \[.*, expected an int"),
    "some labels": ((labelled(1, None, 2), labelled(1)), "it has 2 labels of 3 training samples, expected one of each"),
    "range": (Items([X] * 50, pixel_range=(0, 1)), r"pixel_range is \(0, 1\), expected \(black, white\)"),
    "broken": ((Items({5: X}), Items([X])), "sample 0 of the training data cannot be used: KeyError: 0"),
}  # fmt: skip


@pytest.mark.parametrize("made, expected", WRONG.values(), ids=WRONG.keys())
def test_mistakes_are_told_in_one_line(own, made, expected):
    with pytest.raises(UserError, match=expected) as caught:
        own(made if callable(made) else lambda: made)
    assert "\n" not in str(caught.value)


def test_a_sample_that_fails_in_training_is_told_in_one_line(own):
    class Failing(Items):
        def __getitem__(self, index):
            if index == 1111:
                raise RuntimeError("no\nsuch file")
            return super().__getitem__(index)

    dataset = own((Failing(list(points(1500, 2))), Items([X])))
    with pytest.raises(UserError, match="sample 1111 of the training data cannot be used: RuntimeError: no such file"):
        next(training_batches(dataset.train, 1500, seed=0, workers=1))


def test_unknown_names_are_told_with_the_nearest(monkeypatch):
    with pytest.raises(UserError, match="data.name is cifar, expected one of: digits, .*did you mean cifar10"):
        open_dataset(DataConfig("cifar"))
    with pytest.raises(UserError, match="data.name is no_such_module:data, but the module no_such_module cannot be"):
        open_dataset(DataConfig("no_such_module:data"))
