"""What of a configuration may change while its run is in progress, and the record of what the user changed.

A run that is resumed has the configuration that ``config.yaml`` in its directory holds, but for keys that are free. The
user changes others by ``--change key=value``. ``changes.json`` there records each such change with its step, and the
changes stay in force when the original command is given again.
"""

import copy
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, reason
from ..utils.files import atomic_write
from ..utils.json_file import read_object
from .keys import resume_of
from .reading import AnyConfig, check_values, set_value, values_of
from .schema import Config, PretrainConfig

Change = dict[str, Any]  # ``key``, the values ``old`` and ``new``, and in a record the ``step`` it was made at
UNSET = "unset"


def check_asked(keys: Collection[str], schema: type) -> None:
    """Raise :class:`UserError` if one of the keys of ``--change`` cannot change within a run."""
    for key in keys:
        if resume_of(schema, key) == "never":
            raise UserError(f"--change {key}: it cannot change within a run, choose another --out for a new one")


def changes_made(old: Config | PretrainConfig, new: Config | PretrainConfig) -> list[Change]:
    """``key``, ``old`` and ``new`` of each value that differs and is not free to do so when a run is resumed."""
    before, after = values_of(old), values_of(new)
    renamed = {key.partition(".")[0] for key in before if key.endswith(".name") and before[key] != after[key]}
    changes = []
    for key in before | after:
        values = {"old": before.get(key, UNSET), "new": after.get(key, UNSET)}
        hidden = key.partition(".")[0] in renamed and not key.endswith(".name")  # Another part has other keys.
        if values["old"] != values["new"] and not hidden and resume_of(type(new), key) != "free":
            changes.append({"key": key} | values)
    return changes


def changed_keys(old: Config | PretrainConfig, new: Config | PretrainConfig, asked: Collection[str] = ()) -> list[str]:
    """``key: old, now new`` for each value that differs and must not when a run is resumed.

    Args:
        asked: keys that the user changes by ``--change``.
    """
    made = [change for change in changes_made(old, new) if change["key"] not in asked]
    return [f"{change['key']}: {change['old']}, now {change['new']}" for change in made]


def apply_changes(config: AnyConfig, recorded: Sequence[Change], asked: Collection[str] = ()) -> AnyConfig:
    """``config`` as the recorded changes leave it, one after the other: a value that is a change's old becomes its new.

    Args:
        asked: keys that the user changes by ``--change`` now, which keep their value.

    Raises:
        UserError: a recorded value is ill-typed or out of its range.
    """
    result = copy.deepcopy(config)
    for change in recorded:
        key = str(change["key"])
        if key not in asked and values_of(result).get(key, UNSET) == change["old"]:
            set_value(result, key, change["new"], "a recorded change: ")
    check_values(result)
    return result


def recorded_changes(path: Path) -> list[Change]:
    """The changes in the file ``path``, in the order they were made; none if there is no such file.

    Raises:
        UserError: it cannot be read or holds anything else.
    """
    if not path.exists():
        return []
    try:
        return [{name: change[name] for name in ("step", "key", "old", "new")} for change in read_object(path)["changes"]]
    except Exception as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error


def record_changes(path: Path, changes: Sequence[Change]) -> None:
    """Add changes, each with ``step``, ``key``, ``old`` and ``new``, to those in the file ``path``."""
    content = {"changes": recorded_changes(path) + list(changes)}
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")
