"""``python -m drifting.train_classifier [--data NAME] [--out DIR]`` trains a classifier to judge generated images by.

``drifting.train`` takes it as ``evaluation.features=DIR``, and ``drifting.evaluate`` as ``--features DIR``.
"""

import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

from .cli import ArgumentParser, run_command
from .config.schema import DataConfig
from .data import DATASETS, Dataset, Split, open_dataset, training_batches
from .errors import UserError
from .hub.run_directory import RunDirectory
from .models import Classifier
from .models.network_files import write_model
from .utils.memory import keep_freed_memory

BATCH, TEST_BATCH = 100, 500
LEARNING_RATE, WEIGHT_DECAY = 1e-2, 1e-2  # The rate is highest a third of the way; then it falls to 0.


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m drifting.train_classifier", description="Train a small image classifier.")
    parser.add_argument("--data", choices=DATASETS, default="fashion_mnist", help="data set (default: fashion_mnist)")
    parser.add_argument("--path", help="where the data set is, as data.path of a configuration")
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory to write (default: runs/classifier_DATA)")
    parser.add_argument("--epochs", type=int, default=6, help="passes over the training images (default: 6)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    run = RunDirectory(arguments.out or Path("runs") / f"classifier_{arguments.data}")
    if arguments.epochs < 1:
        raise UserError(f"--epochs is {arguments.epochs}, expected 1 or more")
    dataset = open_dataset(DataConfig(arguments.data, arguments.path))
    print(dataset.describe(), file=sys.stderr)
    if dataset.latent or dataset.pixel_range is None:
        raise UserError("a classifier judges images, which these data are not: choose other --data")
    if run.config.exists():
        raise UserError(f"{run.path} holds a run of another kind: choose another --out")
    run.path.mkdir(parents=True, exist_ok=True)  # What cannot be written to is told before minutes of training.
    keep_freed_memory()
    with run.lock():
        classifier = train_classifier(dataset, arguments.epochs, arguments.seed)
        accuracy = measure_accuracy(classifier, dataset.test)
        description = {"data": dataset.name, "class_names": list(dataset.class_names), "test_accuracy": accuracy}
        write_model(run.path, classifier, description)
    print(f"recognises {accuracy:.2%} of the {len(dataset.test)} test images; wrote {run.path}")
    return 0


def train_classifier(dataset: Dataset, epochs: int, seed: int) -> Classifier:
    """A classifier trained on the training images: AdamW with one cycle of the learning rate."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    classifier = Classifier(dataset.sample_shape[0], dataset.num_classes).to(device)
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = max(3, epochs * len(dataset.train) // BATCH)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    batches = islice(training_batches(dataset.train, BATCH, seed), steps)
    for images, labels in tqdm(batches, total=steps, unit="step", desc="classifier"):
        loss = F.cross_entropy(classifier(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


@torch.no_grad()
def measure_accuracy(classifier: Classifier, split: Split) -> float:
    """Share of the images of ``split`` whose label the classifier finds."""
    device = next(classifier.parameters()).device
    parts = (split.samples(indices.tolist()) for indices in torch.arange(len(split)).split(TEST_BATCH))
    predicted = torch.cat([classifier(part.to(device)).argmax(1).cpu() for part in parts])
    return int((predicted == split.labels).sum()) / len(split)


if __name__ == "__main__":
    run_command(main)
