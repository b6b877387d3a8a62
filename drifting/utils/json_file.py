"""JSON objects from files that may hold anything."""

import json
from pathlib import Path
from typing import Any, NoReturn

MOST_BYTES = 2**28  # of a file; the index of ImageNet's latents has about 10 MB


def read_object(path: Path) -> dict[str, Any]:
    """The object in the file ``path``.

    Raises:
        ValueError: it is too large, no JSON, or another value than an object; NaN and Infinity are no JSON.
        OSError: it cannot be read.
    """
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it has {path.stat().st_size} bytes, expected at most {MOST_BYTES}")
    if not path.is_file():
        raise ValueError("it is no regular file")
    try:
        content = json.loads(path.read_bytes(), parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, expected an object")
    return content


def is_count(value: Any, least: int = 0) -> bool:
    """Whether a value of JSON is an integer of at least ``least``, true and false not among them."""
    return type(value) is int and value >= least


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant}, which is no number of JSON")
