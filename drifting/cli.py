"""What the commands share: a user's mistake ends in one line and exit status 2; trainings take the same options."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .errors import SHOWN, Interrupted, UserError, reason

if TYPE_CHECKING:
    from .config import AnyConfig


class ArgumentParser(argparse.ArgumentParser):
    """Raises :class:`UserError` instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def parse_training_command(
    argv: Sequence[str] | None, command: str, purpose: str, schema: "type[AnyConfig]", default: str
) -> "tuple[AnyConfig, Path, list[str]]":
    """The configuration, the run directory, and the keys that ``--change`` sets, of ``python -m drifting.COMMAND``."""
    from .config import read_config  # Commands that have no configuration run without its libraries.
    from .config.changes import resume_of
    from .config.keys import key_help
    from .config.reading import read_overrides

    parser = ArgumentParser(
        prog=f"python -m drifting.{command}", epilog=key_help(schema),
        description=f"{purpose} The same command again goes on where the last one stopped.",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100),
    )  # fmt: skip
    parser.add_argument("--config", default=default, metavar="NAME|FILE", help=f"configuration (default: {default})")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run directory (default: runs/NAME)")
    change_help = "change a value of a run in progress, which records it"
    parser.add_argument("--change", action="append", default=[], metavar="key=value", help=change_help)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over the configuration's")
    arguments = parser.parse_intermixed_args(argv)
    config = read_config(arguments.config, arguments.overrides + arguments.change, schema)
    asked = list(read_overrides(arguments.change))
    for key in asked:
        if resume_of(key) == "never":
            raise UserError(f"--change {key}: it cannot change within a run, start a new run in another --out")
    return config, arguments.out or Path("runs") / Path(arguments.config).stem, asked


def run_command(command: Callable[[], int]) -> NoReturn:
    """Exit with the status that ``command`` returns.

    A mistake of the user's, a signal, and whatever the system refuses end in one line on stderr and a status of their
    own; output that nobody reads any more ends the command silently, as it ends other programs.
    """
    _open_streams()
    words = ""
    try:
        try:
            sys.exit(command())
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        status = 141  # Shells report SIGPIPE so.
    except UserError as error:
        status, words = error.status, f"error: {error}"
    except UnicodeEncodeError as error:
        name, advice = ascii(error.object)[:SHOWN], "choose another name, or set LC_ALL=C.UTF-8"
        status, words = UserError.status, f"error: {name} cannot be written in {error.encoding}: {advice}"
    except OSError as error:
        status, words = UserError.status, f"error: {error.filename or 'the system'}: {reason(error)}"
    except Interrupted as interrupted:
        status, words = interrupted.status, str(interrupted)
    except KeyboardInterrupt:
        status, words = 130, "interrupted"
    with suppress(OSError):  # Nobody may read that either.
        print(words, end="\n" if words else "", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would fail to write the rest at exit.
    sys.exit(status)


def _open_streams() -> None:
    """Have both streams take any text: a missing one leads nowhere, and what an encoding lacks becomes escapes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # The command was started with it closed, or without a console.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
