"""One, two and four ranks measure the same, and share the work: gloo, four processes for all tests."""

import contextlib
import io
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import groups_with, meeting, results_of

from drifting import evaluate
from drifting import train as training
from drifting.config.schema import EvaluationConfig
from drifting.data import load_digits
from drifting.errors import UserError
from drifting.evaluation.drawing import draw_samples, spread_labels
from drifting.evaluation.evaluator import evaluate_model, open_evaluator
from drifting.generation import Generator
from drifting.models import Classifier, DriftingDiT
from drifting.models.network_files import write_model
from drifting.training import Ranks

NUM = 330  # It is no multiple of the ranks, nor of a batch.
RUN = [
    "model=residual_mlp", "model.width=16", "model.depth=1", "step.gen_per_label=4", "step.pos_per_label=4",
    "step.labels_per_step=4", "train.steps=2", "evaluation.num_samples=100", "evaluation.cfg_scales=[1.0,2.0]",
]  # fmt: skip


def untrained() -> Generator:
    torch.manual_seed(0)
    model = DriftingDiT(
        img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=16, depth=1, num_heads=2, num_style_tokens=2,
        style_vocab=4,
    )  # fmt: skip
    torch.nn.init.normal_(model.final.proj.weight, std=0.3)
    return Generator(model, model.noise_shape, (1, 8, 8), tuple("0123456789"), (-1.0, 1.0))


def measured(ranks: Ranks, source: str | None, reference: list[str]):
    """Measures, this rank's samples, and how many it made, and looked at before: real ones, and generated ones."""
    seen = {"generated": 0, "looked at": 0}

    def count(name):
        return lambda module, inputs, output: seen.update({name: seen[name] + len(inputs[0])})

    with pytest.MonkeyPatch.context() as patch:
        forward = Classifier.features
        patch.setattr(Classifier, "features", lambda self, x: count("looked at")(self, (x,), None) or forward(self, x))
        torch.set_num_threads(1)
        evaluator = open_evaluator(EvaluationConfig(source, reference), load_digits(), ranks)
        of_real = seen["looked at"]
        generator, kept = untrained(), []
        generator.model.register_forward_hook(count("generated"))
        quality = evaluate_model(evaluator, generator, spread_labels(NUM, range(10)), 1.5, 7, kept)
    return quality, np.concatenate(kept), (seen["generated"], of_real, seen["looked at"] - of_real)


def kinds(directory: Path) -> dict[str, tuple[str | None, list[str]]]:
    network, images = f"{directory}/classifier", f"{directory}/images.npz"
    return {"values": (None, []), "features": (network, []), "files": (network, [images])}


def failing(ranks: Ranks) -> str:
    """How a rank ends where the samples of the last are wrong."""
    evaluator = open_evaluator(EvaluationConfig(), load_digits(), ranks)
    batch = np.zeros((2, 8, 8, 3 if ranks.rank == ranks.size - 1 else 1), np.uint8)
    try:
        evaluator.measure([batch], None)
    except (UserError, SystemExit) as error:
        return repr(error)
    return "no error"


def worker(rank: int, directory: Path, ports: list[int]) -> dict:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4"}  # as torchrun sets them
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0])}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        training.main(["--out", f"{directory}/run", *RUN])
        said.truncate(said.seek(0))
        os.environ["MASTER_PORT"] = str(ports[1])  # The store of the first may not have ended yet.
        evaluate.main([f"{directory}/run", "--cfg", "1", "2", "--save-npz", f"{directory}/best.npz"])
    results = {"said": said.getvalue()}
    with meeting(rank, 4, directory):
        for size, ranks in groups_with(rank, (2, 4)).items():
            results |= {(kind, size): measured(ranks, *of) for kind, of in kinds(directory).items()}
            results["failing", size] = failing(ranks)
    return results


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    """The directory of the runs, and results of every rank."""
    directory = tmp_path_factory.mktemp("ranks")
    (directory / "classifier").mkdir()
    torch.manual_seed(0)
    write_model(directory / "classifier", Classifier(1, 10, (8, 16)), {"data": "digits"})
    np.savez(directory / "images.npz", draw_samples(untrained(), spread_labels(70, range(10)), seed=1))
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = [server.getsockname()[1] for server in (one, other)]
    return directory, results_of(worker, 4, directory, ports)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["values", "features", "files"])
def test_ranks_measure_the_same(of_ranks, kind, size):
    """Every rank has the measures of one process; together they have its samples, to the last bit."""
    directory, results = of_ranks
    quality, samples, alone = measured(Ranks(), *kinds(directory)[kind])
    assert {"frechet_distance", "precision", "recall"} < quality.keys() and quality["frechet_distance"] > 0
    of_size = [results[rank][kind, size] for rank in range(size)]
    for of_rank, *_ in of_size:
        assert of_rank == pytest.approx(quality, rel=1e-9)
    assert (np.concatenate([samples for _, samples, _ in of_size]) == samples).all()
    for count, counts in zip(alone, zip(*(counts for *_, counts in of_size), strict=True), strict=True):
        assert sum(counts) == count and max(counts) <= count / size * 1.15  # all but a batch alike
    assert alone[0] == NUM and (kind == "values") == (alone[2] == 0)


@pytest.mark.parametrize("size", [2, 4])
def test_an_error_of_one_rank_ends_all(of_ranks, size):
    """Rank 0 alone says it."""
    first, *others = [results["failing", size] for results in of_ranks[1][:size]]
    assert "UserError('received samples uint8 [8, 8, 3], expected uint8 [8, 8, 1], as the real ones')" == first
    assert others == ["SystemExit(2)"] * (size - 1)


def test_commands_share_the_evaluation(of_ranks, capsys, tmp_path):
    """Four ranks train and evaluate; the command alone measures the same of their run."""
    directory, results = of_ranks
    report = json.loads(results[0]["said"])
    assert not any(of_rank["said"] for of_rank in results[1:])
    torch.set_num_threads(1)
    capsys.readouterr()
    command = [str(directory / "run"), "--cfg", "1", "2", "--save-npz", str(tmp_path / "best.npz")]
    assert evaluate.main(command) == 0
    alone = json.loads(capsys.readouterr().out)
    assert report.pop("source") == alone.pop("source")
    for got, expected in zip([*report.pop("sweep"), report], [*alone.pop("sweep"), alone], strict=True):
        assert got == pytest.approx(expected, rel=1e-9)
    last = json.loads((directory / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    for measure in ("frechet_distance", "precision", "recall", "cfg_scale"):
        assert last[measure] == pytest.approx(alone[measure], rel=1e-6)
    saved = [np.load(path / "best.npz") for path in (directory, tmp_path)]
    assert all((saved[0][name] == saved[1][name]).all() for name in ("arr_0", "arr_1"))
