"""Images a second of one-step generators on the CPU: ``python -m benchmarks.sampling [--only NAME] [--json FILE]``.

``network`` is the forward pass alone, ``generate`` what scripts call, and ``sample`` what the command does for as many
images, bytes included. ``compile`` is ``generate`` of the network under ``torch.compile``, and ``onnxruntime`` the
exported file, with noise that torch draws. They take turns in one process, after compiled and exported networks were
held against the eager one. ``floor`` is how many images the network's matrix products allow at the rate of a large one.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from drifting.config import Config, read_config
from drifting.evaluation.drawing import draw_samples
from drifting.generation import Generator, Signature, generate
from drifting.hub.exporting import export
from drifting.models import NETWORKS, DriftingDiT

from .measure import Call, interleaved_medians, wall_seconds

BATCHES = (1, 16, 256)
MOST_ERROR = 1e-4  # relative, of a compiled or exported network
MOST_MILLISECONDS = 2.0  # of one digit
CONTENDERS = ("network", "generate", "compile", "onnxruntime", "sample")


def network_of(config: str, sample_shape: list[int]) -> nn.Module:
    """The network that a configuration of ours trains, with random weights."""
    model = read_config(config, (), Config).model
    return NETWORKS[model.name](sample_shape=sample_shape, num_classes=10, **model.arguments)


def drifting_dit() -> nn.Module:
    model = DriftingDiT(8, 2, 1, 10, embed_dim=128, depth=4, num_heads=4, num_style_tokens=4)
    for weight in model.parameters():
        if not weight.any():  # It would return 0 without looking at its input.
            nn.init.normal_(weight, std=0.02)
    return model


CASES: dict[str, Callable[[], nn.Module]] = {
    "digits": lambda: network_of("digits", [1, 8, 8]),
    "fashion_mnist": lambda: network_of("fashion_mnist", [1, 28, 28]),
    "drifting_dit": drifting_dit,
}


def as_generator(network: nn.Module) -> Generator:
    signature = Signature.of(network)
    shape = signature.sample_shape(network, torch.zeros(2, dtype=torch.int64))
    return Generator(network.eval(), signature.noise_shape, shape, tuple(range(10)), (-1.0, 1.0))


def exported(generator: Generator) -> Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]:
    """The generator as onnxruntime runs it, with as many threads as torch has."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(generator, path, "onnx", torch.float32, {})
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(drawn: dict[str, Tensor], labels: Tensor, scale: Tensor) -> Tensor:
        named = {"noise": drawn["z"], "labels": labels, "cfg_scale": scale} | drawn
        given = {value.name: named[value.name].numpy() for value in session.get_inputs()}
        return torch.from_numpy(session.run(None, given)[0])

    return run


@torch.no_grad()
def contenders(generator: Generator, batch: int, run: Callable[..., Tensor]) -> tuple[dict[str, Call], float]:
    """The calls, which are warm and agree, and the seconds that the first one of the compiled network took."""
    network, signature = generator.model, Signature.of(generator.model)
    labels, scale = torch.arange(batch) % 10, torch.full((batch,), 1.5)
    drawn = signature.draw(network, batch, None, "cpu")
    torch.compiler.reset()
    compiled = torch.compile(network)
    start = time.perf_counter()
    results = {"compile": signature.call(compiled, drawn, labels, scale).clamp(-1, 1)}
    compile_seconds = time.perf_counter() - start
    results["onnxruntime"] = run(drawn, labels, scale)
    expected = signature.call(network, drawn, labels, scale).clamp(-1, 1)
    for name, result in results.items():
        error = ((result - expected).norm() / expected.norm()).item()
        if not error <= MOST_ERROR:
            raise SystemExit(f"{name} in batches of {batch} errs by {error:.1e}")
    calls: dict[str, Call] = {
        "network": torch.no_grad()(lambda: signature.call(network, drawn, labels, scale)),
        "generate": lambda: generate(network, batch, labels, 1.5),
        "compile": lambda: generate(compiled, batch, labels, 1.5),
        "onnxruntime": lambda: run(signature.draw(network, batch, None, "cpu"), labels, scale),
        "sample": lambda: draw_samples(generator, labels, 1.5),
    }
    for call in calls.values():
        call()
    return calls, compile_seconds


def measure(name: str, seconds: float) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    generator, square, rows = as_generator(CASES[name]()), torch.randn(1024, 1024), []
    run = exported(generator)
    with FlopCounterMode(display=False) as counter:
        generate(generator.model, 16)
    # It has turns of its own: a scheduler that shares cores makes whatever follows so long a call wait.
    matmul, _ = interleaved_medians({"": lambda: square @ square}, seconds / 5, wall_seconds, 5, 100)[""]
    floor = 16 / counter.get_total_flops() * 2 * 1024**3 / matmul
    for batch in BATCHES:
        calls, compile_seconds = contenders(generator, batch, run)
        timed = interleaved_medians(calls, seconds, wall_seconds, min_rounds=5, max_rounds=2000)
        medians = {contender: timed[contender][0] for contender in CONTENDERS}
        images = {contender: batch / median for contender, median in medians.items()}
        facts = {"case": name, "batch": batch, "runs": timed["network"][1], "compile_seconds": compile_seconds}
        rows.append(facts | {"floor": floor, "images_per_second": images})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with TEXT in their name")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing for each case and batch (default 10)")
    parser.add_argument("--threads", type=int, default=2, help="of torch and onnxruntime (default 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, {args.threads} threads; images a second",
        flush=True,
    )
    print("| case | batch | floor | " + " | ".join(CONTENDERS) + " | compile takes s |", flush=True)
    print("|---|---|---|" + "---|" * len(CONTENDERS) + "---|")
    rows = []
    for name in [name for name in CASES if args.only in name]:
        for row in measure(name, args.seconds):
            rates = [f"{row['images_per_second'][contender]:,.0f}" for contender in CONTENDERS]
            cells = [f"`{name}`", str(row["batch"]), f"{row['floor']:,.0f}", *rates, f"{row['compile_seconds']:.1f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
            rows.append(row)
            if name == "digits" and row["batch"] == 1:
                latency = 1e3 / row["images_per_second"]["generate"]
    if "digits" in {row["case"] for row in rows}:
        print(f"one digit by generate: {latency:.2f} ms (<= {MOST_MILLISECONDS})")
    if args.json:
        Path(args.json).write_text(json.dumps({"threads": args.threads, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
