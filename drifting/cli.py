"""What the commands share: mistakes of the person at the keyboard are told in one line, with exit status 2."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from .errors import Interrupted, UserError

INTERRUPTED = 130  # The exit status after Ctrl-C.


class ArgumentParser(argparse.ArgumentParser):
    """Raises :class:`UserError` instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def run_command(command: Callable[[], int]) -> NoReturn:
    """Exit with the status that ``command`` returns, or with one line on stderr and the status of a
    :class:`UserError` or :class:`Interrupted`.

    Ctrl-C where nothing is under way that needs saving ends with one line as well.
    """
    try:
        status = command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = error.status
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        status = interrupted.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED
    sys.exit(status)
