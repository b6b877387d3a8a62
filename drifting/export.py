"""``python -m drifting.export RUN`` writes a generator as one file of ONNX or torch.export, which needs none of us."""

from collections.abc import Sequence
from pathlib import Path

import torch

from .cli import ArgumentParser, run_command
from .config import Config, read_config
from .errors import UserError
from .hub.exporting import BATCHES, OPSET, SUFFIXES, export
from .hub.run_directory import RunDirectory
from .hub.sources import load_generator
from .utils.named import import_named


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m drifting.export", description="Write a generator as one file for others.")
    parser.add_argument("source", metavar="RUN", help="run directory, hf://NAME, or artifact of the release")
    parser.add_argument("--format", choices=SUFFIXES, default="onnx", help="onnx (default), or torch for torch.export")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: model.onnx or model.pt2 in RUN")
    text = "that the network computes in (default: float32), between inputs and outputs in float32"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help=text)
    parser.add_argument("--model", metavar="MODULE:NAME", help="the class of a network of your own")
    arguments = parser.parse_args(argv)
    run, kind, dtype = RunDirectory(Path(arguments.source)), arguments.format, arguments.dtype
    out = arguments.out or run.path / f"model{SUFFIXES[kind]}"
    if out.suffix != SUFFIXES[kind]:
        raise UserError(f"--out is {out}, expected a file that ends in {SUFFIXES[kind]}, as --format {kind} writes")
    if arguments.out is None and not run.path.is_dir():
        raise UserError(f"there is no folder {run.path} to write to: name a run directory, or a file with --out")
    if kind == "onnx" and dtype == "bfloat16":
        raise UserError("--dtype is bfloat16, which onnxruntime cannot run on CPUs: leave it out, or --format torch")
    generator = load_generator(arguments.source, arguments.model and import_named(arguments.model, "--model"))
    known = run.config.is_file()  # Of the release's models, and what scripts save, it is not known.
    scales = read_config(str(run.config), (), Config).guidance.cfg_scale_range if known else None
    exported = export(generator, out, kind, getattr(torch, dtype), {"cfg_scale_range": scales})
    taken = ", ".join(f"{name} {_shape(shape)}" for name, shape in exported.facts["inputs"].items())
    made = f"{exported.facts['output']} {_shape(generator.sample_shape)}"
    if generator.latent:
        made += " (the VAE that decodes them is not in the file)"
    elif generator.pixel_range is not None:
        made += " in [-1, 1]"
    of_format, by = (f"ONNX, opset {OPSET}", "onnxruntime") if kind == "onnx" else ("torch.export", "torch")
    print(f"wrote {out}: {of_format}, {dtype}, {out.stat().st_size / 1e6:.1f} MB, from {taken} to {made}")
    beside = "" if dtype == "float32" else f" (PyTorch in {dtype}: {exported.torch_error:.1e})"
    told = f"largest difference from PyTorch in float32 {exported.error:.1e}{beside}, relative"
    told += f"; one sample {1e3 * exported.seconds:.2f} ms"
    print(f"run by {by} in batches of {', '.join(map(str, BATCHES))}: {told}")
    return 0


def _shape(of_sample: Sequence[int]) -> str:
    return f"[{', '.join(['B', *map(str, of_sample)])}]"


if __name__ == "__main__":
    run_command(main)
