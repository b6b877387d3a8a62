"""Sample queues against a deque a class, and the order in which data are read."""

from collections import Counter, deque
from itertools import islice

import numpy as np
import pytest
import torch
from checkpoint_cases import bits
from hypothesis import given, settings
from hypothesis import strategies as st

from drifting.data import SampleQueue, sample_queue
from drifting.data.dataset import endless_shuffle

CLASSES = 3

batches = st.lists(st.lists(st.integers(0, CLASSES - 1), max_size=12), min_size=1, max_size=5)


def filled(queue_size: int, label_batches: list[list[int]], unconditional_size: int = 7) -> tuple[SampleQueue, list]:
    """A queue whose samples are numbered in the order they were added, and the deques it should equal."""
    queue = SampleQueue(queue_size, CLASSES, (1, 2, 2), unconditional_queue_size=unconditional_size)
    expected = [deque(maxlen=queue_size) for _ in range(CLASSES)] + [deque(maxlen=unconditional_size)]
    number = 0
    for labels in label_batches:
        values = torch.arange(number, number + len(labels)).float()
        queue.add(values.view(-1, 1, 1, 1).expand(-1, 1, 2, 2), torch.tensor(labels, dtype=torch.long))
        for label in labels:
            expected[label].append(number)
            expected[-1].append(number)
            number += 1
    return queue, expected


def numbers(samples: torch.Tensor) -> list[int]:
    assert (samples == samples[..., :1, :1]).all()  # whole samples, not mixtures
    return samples[..., 0, 0, 0].long().tolist()


@settings(deadline=None)
@given(batches, st.integers(1, 6), st.integers(1, 15))
def test_holds_the_newest_and_draws_without_replacement(label_batches, queue_size, num):
    queue, expected = filled(queue_size, label_batches)
    assert queue.available_labels.tolist() == [label for label in range(CLASSES) if expected[label]]
    assert len(queue) == sum(map(len, expected[:-1]))
    for label in queue.available_labels.tolist():
        drawn = Counter(numbers(queue.sample(torch.tensor([label]), num).squeeze(0)))
        held = expected[label]
        least, rest = divmod(num, len(held))
        assert set(drawn) <= set(held)
        assert sorted(drawn[n] for n in held) == [least] * (len(held) - rest) + [least + 1] * rest
    if expected[-1]:
        everything = queue.sample_unconditional(len(expected[-1]))
        assert sorted(numbers(everything)) == sorted(expected[-1])


def test_each_label_draws_from_its_own_class():
    queue, expected = filled(4, [[0, 1, 2, 1], [2, 2, 0, 1]])
    labels = torch.tensor([2, 0, 2, 1])
    samples = queue.sample(labels, 2)
    assert samples.shape == (4, 2, 1, 2, 2)
    for label, row in zip(labels.tolist(), samples, strict=True):
        assert set(numbers(row)) <= set(expected[label])


def test_every_sample_is_as_likely():
    queue, _ = filled(8, [[0] * 8])
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(numbers(queue.sample(torch.zeros(4000, dtype=torch.long), 2, generator).flatten(0, 1)))
    assert all(abs(count - 1000) < 150 for count in drawn.values())  # 5 standard deviations


def test_generator_decides_the_draw():
    queue, _ = filled(6, [[0, 1, 0, 0, 1, 0]])
    labels = torch.tensor([0, 1, 0])
    first, again, other = (queue.sample(labels, 3, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_state_dict_restores_contents_and_order():
    queue, _ = filled(3, [[0, 1, 0, 0, 0], [2, 1]])
    restored = SampleQueue(3, CLASSES, (1, 2, 2), unconditional_queue_size=7)
    restored.load_state_dict(queue.state_dict())
    more, labels = torch.full((2, 1, 2, 2), 99.0), torch.tensor([0, 2])
    for q in (queue, restored):  # the next write must go to the same slots
        q.add(more, labels)
    assert torch.equal(queue.by_class.samples, restored.by_class.samples)
    assert torch.equal(queue.unconditional.samples, restored.unconditional.samples)
    assert torch.equal(queue.by_class.count, restored.by_class.count)
    with pytest.raises(ValueError, match=r"saved queue holds \[3, 3, 1, 2, 2\], this one \[3, 4, 1, 2, 2\]"):
        SampleQueue(4, CLASSES, (1, 2, 2)).load_state_dict(queue.state_dict())


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=9), num=st.integers(0, 60),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 12)), batch=st.integers(1, 10), seed=st.integers(0, 5),
)  # fmt: skip
def test_a_queue_goes_on_from_the_draws_that_are_still_in_it(labels, num, sizes, batch, seed):
    """Those alone are added to the second one, whose slots are the same, whatever the classes and epochs."""
    labels = torch.tensor(labels)
    whole, refilled = (SampleQueue(sizes[0], CLASSES, (2,), "cpu", sizes[1], torch.uint8) for _ in range(2))

    def add(queue, draws):
        for at in range(0, len(draws), batch):
            part = torch.tensor(draws[at : at + batch])
            queue.add(part.to(torch.uint8), labels[part[:, 1]])

    history = list(islice(endless_shuffle(len(labels), seed), num))
    add(whole, history)
    draws = refilled.skip(labels, seed, num)
    add(refilled, draws)
    assert bits(refilled.state_dict()) == bits(whole.state_dict())
    held = {tuple(sample) for ring in (whole.by_class, whole.unconditional) for sample in samples_of(ring)}
    assert draws == [draw for draw in history if draw in held]


def samples_of(ring) -> list[list[int]]:
    return [sample for row, count in zip(ring.samples, ring.count, strict=True) for sample in row[:count].tolist()]


def test_what_a_queue_skips_costs_little(monkeypatch):
    """It looks at the epochs that are still in it, not at all that there have been."""
    epochs = []
    monkeypatch.setattr(sample_queue, "shuffled", lambda size, seed, epoch: epochs.append(epoch) or np.arange(size))
    draws = SampleQueue(8, CLASSES, (1,), unconditional_queue_size=30).skip(torch.arange(12) % CLASSES, 0, 12_000)
    assert set(epochs) == {1000, 999, 998, 997} and len(draws) == 30


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4, 5)], ids=str)
def test_samples_of_any_shape(shape):
    queue = SampleQueue(4, 2, shape, unconditional_queue_size=6)
    samples = torch.randn(7, *shape)
    queue.add(samples, torch.tensor([0, 1, 0, 0, 1, 0, 0]))
    drawn = queue.sample(torch.tensor([1, 0]), 4)
    assert drawn.shape == (2, 4, *shape) and queue.sample_unconditional(3).shape == (3, *shape)
    for row, held in zip(drawn.flatten(2) if shape else drawn[..., None], ([1, 4], [2, 3, 5, 6]), strict=True):
        assert all(any(torch.equal(x, samples[i].flatten()) for i in held) for x in row)


def test_a_part_of_the_labels_is_drawn_as_in_the_whole():
    """Ranks draw for all labels and take their own."""
    queue, _ = filled(6, [[0, 1, 2, 0, 1, 0]])
    labels = torch.tensor([0, 1, 2, 0])

    def draw(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        return queue.sample(labels, 3, generator, part), queue.sample_unconditional(4, generator, part)

    whole, half = draw(slice(None)), draw(slice(2, 4))
    assert all(torch.equal(w[2:4], h) for w, h in zip(whole, half, strict=True))


def test_errors_name_what_is_wrong():
    queue, _ = filled(3, [[0, 0]])
    with pytest.raises(ValueError, match="no samples of class 2"):
        queue.sample(torch.tensor([0, 2]), 1)
    with pytest.raises(ValueError, match="label 3 is out of range, expected 0 to 2"):
        queue.add(torch.zeros(1, 1, 2, 2), torch.tensor([3]))
    with pytest.raises(ValueError, match=r"samples have shape \[1, 2, 2\]"):
        queue.add(torch.zeros(1, 2, 2), torch.tensor([0]))
    with pytest.raises(
        ValueError, match="samples are torch.float32, the queue holds torch.uint8: add them as they are"
    ):
        SampleQueue(3, CLASSES, (1,), dtype=torch.uint8).add(torch.ones(1, 1), torch.tensor([0]))
    with pytest.raises(ValueError, match="the queue is empty"):
        SampleQueue(3, CLASSES, (1,)).sample_unconditional(1)
    with pytest.raises(ValueError, match="queue_size is 0"):
        SampleQueue(0)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 5), st.integers(0, 30))
def test_endless_shuffle(size, seed, start):
    order = list(islice(endless_shuffle(size, seed), 5 * size + start))
    for epoch in range(5):
        assert sorted(order[epoch * size : (epoch + 1) * size]) == [(epoch, sample) for sample in range(size)]
    assert list(islice(endless_shuffle(size, seed, start), 5 * size)) == order[start:]


def test_endless_shuffle_differs_between_epochs_and_seeds():
    first, second = ([draw.sample for draw in islice(endless_shuffle(50, seed), 100)] for seed in (0, 1))
    assert first[:50] != first[50:] and first[:50] != second[:50]
