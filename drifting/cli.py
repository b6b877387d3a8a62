"""What the commands share: a user's mistake ends in one line and exit status 2; trainings take the same options."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NoReturn

from .config import AnyConfig, check_asked, read_config
from .config.keys import key_help
from .config.reading import read_overrides
from .errors import Interrupted, UserError, reason

INTERRUPTED = 130  # The exit status after Ctrl-C.


class ArgumentParser(argparse.ArgumentParser):
    """Raises :class:`UserError` instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


@dataclass(frozen=True)
class TrainingCommand(Generic[AnyConfig]):
    """What the command line of a training asks for; ``changes`` are the keys of ``config`` that ``--change`` set."""

    config: AnyConfig
    out: Path
    changes: tuple[str, ...]


def parse_training_command(
    argv: Sequence[str] | None, command: str, purpose: str, schema: type[AnyConfig], default: str
) -> TrainingCommand[AnyConfig]:
    """Read the command line of ``python -m drifting.COMMAND``, where ``default`` names its usual configuration.

    Raises:
        UserError: it has a mistake, or changes a key that cannot change within a run.
    """
    parser = ArgumentParser(
        prog=f"python -m drifting.{command}",
        description=f"{purpose} The same command again goes on where the last one stopped.",
        epilog=key_help(schema),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100),
    )
    parser.add_argument("--config", default=default, metavar="NAME|FILE", help=f"configuration (default: {default})")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run directory (default: runs/NAME)")
    change_help = "change a value of a run in progress, which records it"
    parser.add_argument("--change", action="append", default=[], metavar="key=value", help=change_help)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over the configuration's")
    arguments = parser.parse_intermixed_args(argv)
    config = read_config(arguments.config, arguments.overrides + arguments.change, schema)
    changes = tuple(read_overrides(arguments.change))
    check_asked(changes, schema)
    return TrainingCommand(config, arguments.out or Path("runs") / Path(arguments.config).stem, changes)


def run_command(command: Callable[[], int]) -> NoReturn:
    """Exit with the status that ``command`` returns.

    A mistake of the user's, a signal, and whatever the system refuses end in one line on stderr and a status of their
    own: nobody below puts a full disk or a missing permission into words again.
    """
    try:
        status = command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = error.status
    except OSError as error:
        print(f"error: {error.filename or 'the system'}: {reason(error)}", file=sys.stderr)
        status = UserError.status
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        status = interrupted.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED
    sys.exit(status)
