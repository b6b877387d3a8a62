"""``python -m drifting.sample SOURCE --num N --out FILE.npz|FILE.png`` draws samples, in one step each."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .cli import ArgumentParser, run_command
from .errors import UserError, explained, some_of
from .evaluation.archives import write_samples
from .evaluation.drawing import DEFAULT_SCALE, check_drawing, draw_samples, spread_labels
from .generation import ClassNames, Generator, Signature, label_numbers
from .hub.sources import load_generator
from .hub.vae import require_vae
from .utils.images import save_grid
from .utils.named import import_named


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m drifting.sample", description="Draw samples from a trained generator.")
    parser.add_argument("source", metavar="SOURCE", help="run directory, hf://NAME, or artifact of the release")
    parser.add_argument("--num", type=int, required=True, help="how many samples")
    parser.add_argument("--out", type=Path, required=True, help=".npz (arr_0 samples, arr_1 labels) or .png (a grid)")
    parser.add_argument("--labels", help="labels to spread the samples over, by name or number, such as 3,5")
    text = "of training by pair: conditions [C, …] to spread the samples over"
    parser.add_argument("--conditions", type=Path, metavar="FILE.npy", help=text)
    parser.add_argument("--cfg-scale", type=float, help=f"guidance scale, 1 or more (default: {DEFAULT_SCALE})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", metavar="MODULE:NAME", help="the class of a network of your own")
    arguments = parser.parse_args(argv)

    num, out = arguments.num, arguments.out
    if num < 1:
        raise UserError(f"--num is {num}, expected 1 or more")
    if out.suffix not in (".npz", ".png"):
        raise UserError(f"--out is {out}, expected a file that ends in .npz or .png")
    check_drawing(arguments.cfg_scale, arguments.seed)
    generator = load_generator(arguments.source, arguments.model and import_named(arguments.model, "--model"))
    if out.suffix == ".png" and not generator.makes_images:
        shape = list(generator.sample_shape)
        raise UserError(f"--out is {out}, but samples {shape} are no images: expected a file in .npz")
    if generator.condition_shape is None and arguments.conditions is None:
        numbers = spread_labels(num, parse_labels(arguments.labels, generator.class_names))
        labels = torch.tensor(label_numbers(generator.class_names))[numbers].numpy()
        told = f"labels {some_of([generator.class_names[number] for number in numbers.unique().tolist()])}"
    else:
        conditions = read_conditions(arguments.conditions, generator)
        numbers = conditions[spread_labels(num, range(len(conditions)))]
        labels, told = numbers.numpy(), f"{len(conditions)} conditions"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if generator.latent:
        require_vae(device)
    generator.model.to(device)
    samples = draw_samples(generator, numbers, arguments.cfg_scale, arguments.seed)
    if out.suffix == ".npz":
        write_samples(out, samples, labels, "arr_1" if generator.condition_shape is None else "conditions")
    else:
        save_grid(samples, math.ceil(math.sqrt(num)), out)
    print(f"wrote {num} samples of {told} to {out}")
    return 0


def read_conditions(path: Path | None, generator: Generator) -> torch.Tensor:
    """The conditions ``[C, *condition_shape]`` of a file, with which the network is tried; a generator that was trained
    by pair needs them, another has none."""
    shape = generator.condition_shape
    if path is None or shape is None:
        used = "by class: --labels has what it takes" if shape is None else f"by pair: --conditions must name {shape}"
        raise UserError(f"--conditions is {path}, the generator was trained {used}")
    with explained(f"--conditions: {path} cannot be read"):
        conditions = torch.from_numpy(np.load(path, allow_pickle=False))
    if conditions.shape[1:] != shape or not len(conditions):
        raise UserError(f"--conditions: {path} has the shape {list(conditions.shape)}, expected {['C', *shape]}")
    if not conditions.isfinite().all():
        raise UserError(f"--conditions: {path} has NaN or infinity, expected finite numbers")
    with explained(f"--conditions: {path} has {conditions.dtype}"):
        Signature.of(generator.model, generator.noise_shape).sample_shape(generator.model, conditions[[0, -1]])
    return conditions


def parse_labels(text: str | None, names: ClassNames) -> list[int]:
    """The class numbers that ``--labels`` asks for by name, or by class number where no class has that name."""
    if text is None:
        return list(range(len(names)))
    place = {str(number): number for number in range(len(names))} | {str(name): n for n, name in enumerate(names)}
    chosen, parts, most = [], text.split(","), max(name.count(",") for name in place) + 1
    while parts:  # A name may have commas: the longest that is one counts.
        ends = [end for end in range(1, most + 1) if ",".join(parts[:end]).strip() in place]
        if not ends:
            expected = f"0 to {len(names) - 1} or some of: {some_of(names)}"
            raise UserError(f"--labels names {parts[0].strip()!r}, expected {expected}")
        chosen.append(place[",".join(parts[: ends[-1]]).strip()])
        del parts[: ends[-1]]
    return list(dict.fromkeys(chosen))


if __name__ == "__main__":
    run_command(main)
