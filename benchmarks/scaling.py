"""What a training step sends between GPUs, predicted: ``python -m benchmarks.scaling CONFIG [--ranks 8 64 512]``.

Nothing is measured. Bytes and collectives follow from the configuration, and a test counts them with up to 16 processes
(``tests/test_scaling.py``); times follow from the rates below, which are assumptions. The links' and the arithmetic's
are peaks of data sheets, so that communication takes longer than predicted.
"""

import argparse
import dataclasses
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from drifting.config import Config, PretrainConfig, read_config
from drifting.data.latents import LatentSplit
from drifting.models import MAE, DriftingDiT

from .training_step import MAES, SAMPLES

NODE = 8  # GPUs
NVLINK = 450e9  # bytes/s a GPU and direction: NVIDIA H100 data sheet, 900 GB/s both ways
NETWORK = 50e9  # bytes/s a GPU and direction between nodes: DGX H100 user guide, a ConnectX-7 of 400 Gb/s for each GPU
START = 20e-6  # s of a collective of NCCL, however small: an assumption
HOP = 30e-6  # s of a message between hosts over TCP, of which gloo's rings have ranks - 1: an assumption
ARITHMETIC = 0.4 * 989e12  # flop/s: 40 % (an assumption) of the H100 data sheet's dense bfloat16 rate
SIZES = (8, 64, 512)
BUCKETS = [2**20, 25 * 2**20]  # bytes of DDP's first bucket and of the others, torch's defaults


@dataclass(frozen=True)
class Collective:
    """``count`` collectives of a step, in which each rank puts ``values``, of ``itemsize`` bytes each."""

    what: str
    kind: str  # all_gather, all_reduce, reduce_scatter
    values: int
    itemsize: int
    count: int = 1
    on_host: bool = False  # They go through gloo, not NCCL.

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends in them, as rings do."""
        share = {"all_gather": ranks - 1, "all_reduce": 2 * (ranks - 1) / ranks, "reduce_scatter": (ranks - 1) / ranks}
        return self.count * self.values * self.itemsize * share[self.kind]

    def seconds(self, ranks: int) -> float:
        """The least time they take, one after another, by the rates assumed."""
        if self.on_host:
            return self.count * (ranks - 1) * HOP
        return self.count * START + self.sent(ranks) / (NVLINK if ranks <= NODE else NETWORK)


def collectives(
    config: Config, model: nn.Module, maps: int, sample_shape: Sequence[int], stored: torch.dtype, ranks: int
) -> list[Collective]:
    """Those of a step of the trainer by class with the paper's field, and of the loop around it. Images travel as they
    are ``stored``."""
    images, R = config.train.batch_size // ranks, len(config.loss.temperatures)
    size = torch.get_default_dtype().itemsize
    found = [
        Collective("labels of images", "all_gather", images, 8, on_host=True),
        Collective("images", "all_gather", images * math.prod(sample_shape), stored.itemsize),
        Collective("statistics, scale", "all_reduce", 3 * maps, 8),
        Collective("statistics, λ", "all_reduce", (R + 1) * maps, 8),
        Collective("metrics", "all_reduce", 3 + (R + 1) * maps, size),
        Collective("signals", "all_gather", 1, 8, on_host=True),  # the size of what comes next
        Collective("signals", "all_gather", len(pickle.dumps(0)), 1, on_host=True),
    ]
    return found + (_of_shards if config.step.fsdp else _of_replicas)(config, model, ranks)


def _of_replicas(config: Config, model: nn.Module, ranks: int) -> list[Collective]:
    """Gradients in DDP's buckets, which are filled from the last parameter to the first."""
    parameters = list(model.parameters())[::-1]
    buckets, _ = dist._compute_bucket_assignment_by_size(parameters, BUCKETS)
    values = [sum(parameters[n].numel() for n in bucket) for bucket in buckets]
    return [Collective("gradients", "all_reduce", of_bucket, 4) for of_bucket in values]


def _of_shards(config: Config, model: nn.Module, ranks: int) -> list[Collective]:
    """FSDP2 gathers the weights of a block for its forward and for its backward, those of no block once for both. A
    step in parts has further forwards without a backward. A rank's share of a weight is some of its rows, as many on
    each, so that weights of fewer rows than there are ranks travel with padding."""
    parts = parts_of(config, ranks)
    blocks = list(getattr(model, "blocks", nn.ModuleList()).children())
    in_blocks = {p for block in blocks for p in block.parameters()}
    groups = [(list(block.parameters()), 2 if parts == 1 else 3 * parts) for block in blocks]
    groups += [([p for p in model.parameters() if p not in in_blocks], parts)]
    found = [Collective("norms of the gradient", "all_reduce", len(list(model.parameters())), 4)]
    for weights, gathers in groups:
        share = sum(math.ceil(len(p) / ranks) * p[0].numel() for p in weights)
        found += [Collective("weights", "all_gather", share, 4, gathers)]
        found += [Collective("gradients", "reduce_scatter", share * ranks, 4)]
    return found


def parts_of(config: Config, ranks: int) -> int:
    """In how many parts a rank takes its labels."""
    labels = config.step.labels_per_step // ranks
    return math.ceil(labels / min(labels, config.step.labels_at_once or labels))


def build(config: Config) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    """Generator and encoder of a configuration of latents, without memory, and the shape of a sample."""
    channels, size, classes = SAMPLES[config.data.name]
    encoder = read_config(MAES[str(config.loss.mae)], (), PretrainConfig)
    with torch.device("meta"):
        model = DriftingDiT(img_size=size, in_chans=channels, num_classes=classes, **config.model.keywords())
        mae = MAE(channels, num_classes=classes, **vars(encoder.model))
        return model, mae.feature_extractor().to("meta"), (channels, size, size)


def flops(config: Config, model: nn.Module, encoder: nn.Module, sample_shape: Sequence[int], parts: int) -> float:
    """Floating-point operations of both networks in a step. A backward is twice a forward of the generator, and once
    one of the frozen encoder; a step in parts has one more forward of both."""
    step, samples = config.step, torch.empty(1, *sample_shape, device="meta")
    with FlopCounterMode(display=False) as of_generator:
        model(samples, torch.zeros(1, dtype=torch.long, device="meta"))
    with FlopCounterMode(display=False) as of_encoder:
        encoder(samples)
    generator, extractor, more = of_generator.get_total_flops(), of_encoder.get_total_flops(), int(parts > 1)
    generated = step.gen_per_label * ((3 + more) * generator + (2 + more) * extractor)
    return float(step.labels_per_step * (generated + (step.pos_per_label + step.uncond_per_label) * extractor))


def predict(config: Config, ranks: int) -> dict[str, str]:
    """What a step on so many GPUs takes: words for each row of the table.

    Where there are more ranks than labels a step has, as many labels as ranks are taken.
    """
    step = dataclasses.replace(config.step, labels_per_step=max(config.step.labels_per_step, ranks))
    config = dataclasses.replace(config, step=step)
    model, encoder, sample_shape = build(config)
    maps = len(encoder(torch.empty(2, *sample_shape, device="meta")))
    arithmetic = flops(config, model, encoder, sample_shape, parts_of(config, ranks)) / ranks / ARITHMETIC
    rows = {"labels a step": str(step.labels_per_step), "arithmetic of the networks": f"{arithmetic * 1e3:.0f} ms"}
    of_rows: dict[str, list[Collective]] = {}
    for its in collectives(config, model, maps, sample_shape, LatentSplit.dtype, ranks):
        of_rows.setdefault("between hosts" if its.on_host else its.what, []).append(its)
    for what, parts in of_rows.items():
        sent, seconds = sum(its.sent(ranks) for its in parts), sum(its.seconds(ranks) for its in parts)
        rows[what] = f"{sum(its.count for its in parts)}: {_short(sent / 1e6)} MB, {_short(seconds * 1e3)} ms"
    return rows


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def table(name: str, config: Config, sizes: Sequence[int]) -> str:
    """The predictions in Markdown; of collectives their number, what a rank sends, and their time."""
    columns = [predict(config, ranks) for ranks in sizes]
    shards = ", in shards" if config.step.fsdp else ""
    lines = [
        f"| `{name}`{shards}, predicted | {' | '.join(f'{ranks} GPUs' for ranks in sizes)} |",
        "|---" * (1 + len(sizes)) + "|",
    ]
    return "\n".join(lines + [f"| {row} | {' | '.join(column[row] for column in columns)} |" for row in columns[0]])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="a configuration of latents, such as ablation")
    parser.add_argument("--ranks", type=int, nargs="+", default=SIZES, help="GPUs (default: 8 64 512)")
    parser.add_argument("--fsdp", action="store_true", help="weights, averages and optimizer are in shards")
    arguments = parser.parse_args(argv)
    config = read_config(arguments.config, [f"step.fsdp={arguments.fsdp}"], Config)
    print(table(arguments.config, config, arguments.ranks))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
