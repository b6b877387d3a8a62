"""``python -m drifting``: list the commands, with the first sentence of what each says of itself."""

import ast
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from .cli import run_command
from .errors import UserError
from .utils.named import nearest

COMMANDS = (
    "train", "pretrain", "train_classifier", "sample", "evaluate", "convert", "cache_latents", "doctor",
    "experiments.toy_2d_drifting",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] not in ("-h", "--help"):
        near = nearest(arguments[0], COMMANDS)
        raise UserError(f"there is no command {arguments[0]!r}: did you mean `python -m drifting.{near}`?")
    print("commands, each with --help:")
    for command in COMMANDS:
        print(f"\n  python -m drifting.{command}")
        print(textwrap.fill(purpose(command), 100, initial_indent=6 * " ", subsequent_indent=6 * " "))
    return 0


def purpose(command: str) -> str:
    """The first sentence of the docstring of the command's module, without the form of the command before it.

    The module is read, not imported: that would take as long as importing torch.
    """
    file = Path(__file__).parent / f"{command.replace('.', '/')}.py"
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    sentence = re.split(r"\n\n|(?<=\.)\s", re.sub(r"^``[^`]*``: ", "", docstring))[0]
    return " ".join((sentence[:1].upper() + sentence[1:]).split())


if __name__ == "__main__":
    run_command(main)
