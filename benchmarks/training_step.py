"""Where the time of a training step goes: ``python -m benchmarks.training_step CONFIG [--labels-at-once N]``.

Steps of the trainer itself on random images, with random weights in the feature extractor, at the sizes of one of our
configurations. Prints a table and writes ``benchmarks/results/DEVICE.training-step.json``.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drifting.config import Config, PretrainConfig, read_config
from drifting.models import MAE, NETWORKS, ConvNeXtFeatureExtractor, DriftingDiT
from drifting.training import DriftingTrainer
from drifting.utils.named import facts_taken

from .machine import ROOT, describe_machine, slug
from .measure import default_device

RESULTS = ROOT / "benchmarks" / "results"
PHASES = ("communication", "generator", "encoder", "operator", "optimizer", "other")  # forward and backward
SAMPLES = {  # channels, size and classes of the data sets that configurations name
    "latents": (4, 32, 1000), "folder": (3, 256, 1000), "digits": (1, 8, 10), "fashion_mnist": (1, 28, 10),
    "cifar10": (3, 32, 10),
}  # fmt: skip
MAES = {  # sources of loss.mae and the configurations that they were trained with
    "hf://mae_latent_256": "mae_256", "hf://mae_latent_640": "mae_640", "hf://mae_pixel_640": "mae_pixel",
    "runs/mae_fashion_mnist": "mae_fashion_mnist", "runs/mae_cifar10": "mae_cifar10",
}  # fmt: skip


def random_convnext() -> nn.Module:
    """Of the size of the one that the release takes, "base"."""
    from transformers import ConvNextV2Config, ConvNextV2Model

    config = ConvNextV2Config(depths=[3, 3, 27, 3], hidden_sizes=[128, 256, 512, 1024])
    return ConvNeXtFeatureExtractor(ConvNextV2Model(config))


def build_trainer(config: Config, device: str) -> DriftingTrainer:
    """As ``drifting.train`` does, with random weights in the feature extractor.

    So are those of the transformer's last layer, which starts as 0, so that samples differ from each other.
    """
    channels, size, classes = SAMPLES[config.data.name]
    torch.manual_seed(config.seed)
    network, sample_shape = NETWORKS[config.model.name], [channels, size, size]
    facts = {"img_size": size, "in_chans": channels, "num_classes": classes, "sample_shape": sample_shape}
    model = network(**facts_taken(network, facts), **config.model.keywords())
    if isinstance(model, DriftingDiT):
        nn.init.normal_(model.final.proj.weight, std=config.model.embed_dim**-0.5)
    extractors: list[str | nn.Module] = []
    for name in config.loss.feature_extractor:
        if name == "mae":
            mae = read_config(MAES[str(config.loss.mae)], (), PretrainConfig)
            extractors.append(MAE(channels, num_classes=classes, **vars(mae.model)).feature_extractor())
        else:
            extractors.append(random_convnext() if name == "convnext_v2" else name)
    return DriftingTrainer(model, config, extractors, device=device)


def profile(config: Config, device: str, seconds: float) -> dict[str, Any]:
    """Medians of the phases over as many steps as the time allows, at least one, after one that warms up."""
    trainer = build_trainer(config, device)
    stopwatch = trainer.stopwatch
    step, (channels, size, classes) = config.step, SAMPLES[config.data.name]
    labels = torch.arange(min(classes, step.labels_per_step)).repeat(step.queue_size)
    images = torch.randn(len(labels), channels, size, size, device=device)

    def take_step(num: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        stopwatch.take()
        metrics = trainer.train_step(images[:num], labels[:num])
        seconds = stopwatch.take()
        return {phase: 1e3 * seconds.get(phase, 0.0) for phase in PHASES}, metrics

    _, metrics = take_step(len(labels))  # The first step fills the queue.
    images, labels = images[: config.train.batch_size].clone(), labels[: config.train.batch_size]
    if not all(metrics[name].isfinite() for name in ("loss", "grad_norm")):
        raise RuntimeError(f"a step has loss {metrics['loss'].item()} and gradient {metrics['grad_norm'].item()}")
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    steps: list[dict[str, float]] = []
    end = time.monotonic() + seconds
    while not steps or time.monotonic() < end:
        steps.append(take_step(config.train.batch_size)[0])
    totals = [sum(of_step.values()) for of_step in steps]
    return {
        "maps": sum(name.endswith("/scale") for name in metrics),
        "steps": len(steps),
        "step_milliseconds": statistics.median(totals),
        "milliseconds": {phase: statistics.median(of_step[phase] for of_step in steps) for phase in PHASES},
        "operator_share": statistics.median(s["operator"] / total for s, total in zip(steps, totals, strict=True)),
        "peak_bytes": None if device == "cpu" else torch.cuda.max_memory_allocated(device),
    }


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    total, step = sum(result["milliseconds"].values()), result["step"]
    lines = [f"| a step of `{result['config']}` on {result['machine']['device']} | ms | share |", "|---|---|---|"]
    lines += [f"| {phase} | {ms:.1f} | {ms / total:.1%} |" for phase, ms in result["milliseconds"].items()]
    counts = ", ".join(f"{key} {step[key]}" for key in ("labels_per_step", "labels_at_once", "bf16", "compile"))
    memory = "" if result["peak_bytes"] is None else f", peak memory {result['peak_bytes'] / 1e9:.1f} GB"
    summary = f"{result['step_milliseconds']:.1f} ms a step, median of {result['steps']}, {result['maps']} feature maps"
    return "\n".join([*lines, "", f"{summary}; {counts}{memory}"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="a configuration of drifting.train")
    parser.add_argument("--seconds", type=float, default=20, help="how long to go on after the first step (default 20)")
    parser.add_argument("--labels", type=int, help="labels a step, for less memory (default: the configuration's)")
    parser.add_argument("--labels-at-once", type=int, help="as step.labels_at_once (default: the configuration's)")
    parser.add_argument("--activation-checkpointing", action="store_true", help="as the step's key, for less memory")
    parser.add_argument("--compile", action="store_true", help="compile as the configuration says; takes minutes")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default benchmarks/results")
    arguments = parser.parse_args(argv)

    config = read_config(arguments.config, (), Config)
    step = dataclasses.replace(config.step, compile=arguments.compile and config.step.compile)
    step.activation_checkpointing |= arguments.activation_checkpointing
    if arguments.labels is not None:
        step.labels_per_step = arguments.labels
    if arguments.labels_at_once is not None:
        step.labels_at_once = arguments.labels_at_once
    device = default_device()
    result = {
        "machine": describe_machine(device),
        "config": arguments.config,
        "step": dataclasses.asdict(step),
        **profile(dataclasses.replace(config, step=step), device, arguments.seconds),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"{slug(result['machine']['device'])}.training-step.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{table(result)}\nwritten to {file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
