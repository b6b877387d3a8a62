"""``python -m drifting`` lists the commands."""

import sys
from collections.abc import Sequence

from .cli import run_command
from .errors import UserError
from .utils.named import nearest

COMMANDS = {
    "train": "train a generator, or go on with a run",
    "pretrain": "train a masked autoencoder, in whose features samples are compared",
    "train_classifier": "train a classifier to judge generated images by",
    "sample": "draw samples from a trained generator",
    "evaluate": "measure how good samples are",
    "report": "write a page about one run or several: curves, samples, measures",
    "demo": "serve a page to play with a generator",
    "export": "write a generator as one file of ONNX or torch.export",
    "convert": "convert the official release's artifacts to our files, or back",
    "cache_latents": "encode images once, to train on their latents",
    "doctor": "list versions, devices and backends, and check each usable backend",
    "experiments.toy_2d_drifting": "learn distributions in the plane, and draw how",
    "experiments.couplings": "learn them and the digits with all couplings of the field, side by side",
    "experiments.policy": "learn paths past an obstacle, by pair",
}


def main(argv: Sequence[str] | None = None) -> int:
    for name in sys.argv[1:] if argv is None else argv:
        if name not in ("-h", "--help"):
            near = nearest(name, COMMANDS)
            raise UserError(f"there is no command {name!r}: did you mean `python -m drifting.{near}`?")
    print("commands, each with --help:")
    for command, purpose in COMMANDS.items():
        print(f"\n  python -m drifting.{command}\n      {purpose}")
    return 0


if __name__ == "__main__":
    run_command(main)
