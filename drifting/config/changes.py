"""What of a configuration may change while its run is in progress, and the record of what the user changed.

A run that is resumed has the configuration in its directory, but for keys that are free. The user changes others by
``--change key=value``. ``changes.json`` in the directory records each change with the step at which it was made, and
the changes stay in force when the original command is given again.
"""

import copy
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, reason
from ..utils.files import atomic_write, read_object
from .keys import resume_of
from .reading import AnyConfig, check_values, set_value, values_of
from .schema import Config, PretrainConfig

Change = dict[str, Any]  # ``key``, its values ``old`` and ``new``, and once recorded the ``step``
UNSET = "unset"  # the value of an argument that a user's own network does not get


def check_asked(keys: Collection[str], schema: type) -> None:
    """Raise :class:`UserError` if one of the keys of ``--change`` cannot change within a run."""
    for key in keys:
        if resume_of(schema, key) == "never":
            raise UserError(f"--change {key}: it cannot change within a run, start a new run in another --out")


def changes_made(old: Config | PretrainConfig, new: Config | PretrainConfig) -> list[Change]:
    """``key``, ``old`` and ``new`` of each value that differs and is not free to do so when a run is resumed."""
    before, after = values_of(old), values_of(new)
    differing = [key for key in before | after if before.get(key, UNSET) != after.get(key, UNSET)]
    return [
        {"key": key, "old": before.get(key, UNSET), "new": after.get(key, UNSET)}
        for key in differing
        if resume_of(type(new), key) != "free"
    ]


def changed_keys(old: Config | PretrainConfig, new: Config | PretrainConfig, asked: Collection[str] = ()) -> list[str]:
    """``key: old, now new`` for each of :func:`changes_made` but those that the user ``asked`` for by ``--change``."""
    made = [change for change in changes_made(old, new) if change["key"] not in asked]
    return [f"{change['key']}: {change['old']}, now {change['new']}" for change in made]


def apply_changes(config: AnyConfig, recorded: Sequence[Change], asked: Collection[str] = ()) -> AnyConfig:
    """``config`` after the recorded changes: one after the other, each replaces its old value where that is there.

    The keys in ``asked``, which the user changes by ``--change`` now, keep their values.

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
    """The changes in the file ``path``, in the order in which they were made; none if there is no such file.

    Raises:
        UserError: the file cannot be read or holds anything else.
    """
    names = ("step", "key", "old", "new")
    try:
        return [{name: change[name] for name in names} for change in read_object(path)["changes"]]
    except FileNotFoundError:
        return []
    except Exception as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error


def record_changes(path: Path, changes: Sequence[Change]) -> None:
    """Add changes, each with ``step``, ``key``, ``old`` and ``new``, to those in the file ``path``."""
    content = {"changes": recorded_changes(path) + list(changes)}
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")
