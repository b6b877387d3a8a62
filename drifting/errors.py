"""What goes wrong for a reason that the user can do something about, and its words: one line, no traceback."""

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import packages_distributions
from types import ModuleType, TracebackType
from typing import Any

TRAINING = (  # These libraries the extra ``train`` installs, and what it builds on.
    "torch", "numpy", "yaml", "tqdm", "safetensors", "sklearn", "PIL", "matplotlib", "tensorboard", "msgpack",
    "filelock",
)  # fmt: skip
SHOWN, MOST_SHOWN, NAME_SHOWN = 200, 600, 60  # This many characters of a value, an error, a name are in a message.
COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # Libraries colour some of their errors for terminals.


class UserError(ValueError):
    """Something about the command, its files or its configuration is wrong; the message says what to do."""

    status = 2  # A command exits with it.


class LibraryError(UserError, ImportError):
    """A library is missing or broken."""


class Interrupted(Exception):
    """A signal ended the command, which saved its work; the message says how to go on."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.status = 128 + signal  # Shells report signals so.


def reason(error: BaseException) -> str:
    """Put what the system or a library said into one line, with the kind of the error where it is not the system's."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}".removesuffix(": ")


def shown(value: Any, most: int = SHOWN) -> str:
    """Word a value in one line of bounded length, without control characters."""
    text = COLOUR.sub("", value if isinstance(value, str) else repr(value))
    text = "".join(filter(str.isprintable, text))
    return text if len(text) <= most else f"{text[:most]}…"


def some_of(values: Sequence[Any]) -> str:
    """Word the first ten of many values in a list."""
    return ", ".join([shown(str(value), NAME_SHOWN) for value in values[:10]]) + (", …" if len(values) > 10 else "")


def cause_of(error: BaseException) -> BaseException:
    """The error from which, one after another, libraries raised ``error``."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Raise any error inside as a :class:`UserError` that begins with ``what`` and goes on with its reason."""
    try:
        yield
    except Exception as error:  # Libraries raise errors of many classes, in particular for damaged files.
        raise UserError(f"{what}: {shown(reason(error), MOST_SHOWN)}") from error


def require(library: str, purpose: str, extra: str = "") -> ModuleType:
    """Import a library, which this package, or an ``extra`` of it, installs; ``purpose`` begins the message."""
    package = library.partition(".")[0]
    try:
        module = importlib.import_module(library)
        if hasattr(module, "__path__") and getattr(module, "__file__", None) is None:
            raise ModuleNotFoundError(f"{list(module.__path__)} are mere folders")  # Python takes these for packages.
        return module
    except Exception as error:  # A broken library, or one of those it imports, raises errors of any class.
        need, spec = f"{purpose} needs {package}, which is", importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            requirement = f"'drifting[{extra}]'" if extra else package
            raise LibraryError(f"{need} not installed: pip install {requirement}") from error
        why = shown(reason(cause_of(error)), MOST_SHOWN)
        advice = f"pip install --force-reinstall {packages_distributions().get(package, [package])[0]}"
        if "torch" in f"{library} {why}":
            advice = "see that torch and torchvision are of one release and one build, for the CPU or for the same CUDA"
        raise LibraryError(f"{need} there but cannot be imported ({why}): {advice}") from error


@contextmanager
def libraries() -> Iterator[None]:
    """Raise an error inside as a :class:`LibraryError` where a library that training needs is missing or broken."""
    try:
        yield
    except Exception:
        for library in TRAINING:
            require(library, "drifting", "train")
        raise


def tell_failed_import(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End a command, as its ``sys.excepthook``, in one line where a library that it imports is missing or broken, or
    Ctrl-C came before all were imported."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    try:
        with libraries():
            raise error
    except UserError as told:
        print(f"error: {told}", file=sys.stderr)
        sys.exit(told.status)
    except BaseException:
        sys.__excepthook__(kind, error, trace)
