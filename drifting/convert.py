"""``python -m drifting.convert SRC DST`` converts the official release's artifacts to run directories, or back."""

from collections.abc import Sequence
from pathlib import Path

from .cli import ArgumentParser, run_command
from .errors import UserError
from .hub.release import METADATA, WEIGHTS, write_artifact
from .hub.run_directory import RunDirectory, save_generator
from .hub.sources import as_generator, locate, open_model
from .models import MAE, DriftingDiT
from .models.network_files import KINDS, write_model


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser("python -m drifting.convert", description="Convert models of the release to ours, or back.")
    parser.add_argument("source", metavar="SRC", help="hf://NAME, directory with ema_params.msgpack, or run directory")
    parser.add_argument("destination", metavar="DST", type=Path, help="directory to write the other format to")
    arguments = parser.parse_args(argv)
    destination, run = arguments.destination, RunDirectory(arguments.destination)
    folder, to_ours = locate(arguments.source)
    written = [run.weights, run.description] if to_ours else [destination / WEIGHTS, destination / METADATA]
    if any(file.exists() for file in written):
        raise UserError(f"{destination} has {' or '.join(file.name for file in written)} already: name another DST")
    model, description = open_model(folder, KINDS)
    if not isinstance(model, (DriftingDiT, MAE)):
        raise UserError(f"{folder} holds a {type(model).__name__}, expected a DriftingDiT or MAE, as the release has")
    if to_ours and isinstance(model, DriftingDiT):
        save_generator(run, as_generator(folder, model, description), release=description)
    elif to_ours:
        write_model(run.path, model, {"step": description["step"], "release": description})
    else:
        write_artifact(destination, model, description.get("release", {"step": description["step"]}))
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"wrote {' and '.join(file.name for file in written)} to {destination}: {count:,} parameters")
    return 0


if __name__ == "__main__":
    run_command(main)
