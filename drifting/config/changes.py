"""What of a configuration may change while its run is in progress, and the record of it, ``changes.json``."""

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..errors import UserError, explained
from ..utils.files import read_object, write_object
from ..utils.named import is_own
from .reading import AnyConfig, read_config, save_config, set_value, values_of

Values = dict[str, Any]  # A configuration, with dotted keys.
RECORD = "changes.json"
NEVER = (
    "seed", "model", "data.name", "data.image_size", "data.subset", "data.label_column", "step.queue_size",
    "step.unconditional_queue_size", "step.latents", "step.groups", "optimizer.ema_decay",
)  # fmt: skip
FREE = (
    "train", "evaluation", "data.path", "data.workers", "data.skip_broken", "step.queue_device", "step.queue_features",
    "step.labels_at_once", "step.images_at_once", "step.compile", "step.activation_checkpointing", "step.fsdp",
)  # fmt: skip
RESUME = dict.fromkeys(NEVER, "never") | dict.fromkeys(FREE, "free") | {"train.batch_size": "asked"}


def resume_of(key: str) -> str:
    """Tell how a key may change within a run: it is "free", must be "asked" for by ``--change``, or "never" may."""
    return RESUME.get(key) or RESUME.get(key.partition(".")[0], "asked")


def differences(before: Values, after: Values) -> list[tuple[str, Any, Any]]:
    """The key, old and new value of each difference that is not free when a run is resumed."""
    pairs = [(key, before.get(key, "unset"), after.get(key, "unset")) for key in before | after]
    return [(key, old, new) for key, old, new in pairs if old != new and resume_of(key) != "free"]


def config_in_force(path: Path, config: AnyConfig, asked: Collection[str] = ()) -> AnyConfig:
    """Take over what the run of the file ``path`` has recorded; differences in keys not ``asked`` for are refused."""
    replaced = [(change["key"], change["old"]) for change in recorded(path)]
    result, others = copy.deepcopy(config), []
    for key, old, new in differences(_values_in_force(path, config), values_of(config)):
        if (key, new) in replaced and key not in asked and resume_of(key) == "asked":
            if any(is_own(str(name)) for name in (old if isinstance(old, list) else [old])):
                why = "which only a command line or a configuration file of yours may name"
                raise UserError(f"{path.parent} has changed {key} to {old}, {why}: give that --change again")
            set_value(result, key, old, "a recorded change: ")
        elif key not in asked:
            others.append(f"{key}: {old}, now {new}")
    if others:
        advice = "choose another --out, give the values it was started with, or say --change key=value for each"
        raise UserError(f"{path.parent} holds a run with another configuration ({'; '.join(others)}): {advice}")
    return result


def keep_config(path: Path, config: AnyConfig, step: int) -> None:
    """Record what has changed at this step, then write the configuration to the file ``path``."""
    made = differences(_values_in_force(path, config), values_of(config))
    changes = recorded(path) + [{"step": step, "key": key, "old": old, "new": new} for key, old, new in made]
    if made:
        write_object(path.with_name(RECORD), {"changes": changes})
    save_config(config, path)


def recorded(path: Path) -> list[dict[str, Any]]:
    """Read the changes of the run whose configuration is ``path``: ``step``, ``key``, ``old`` and ``new`` of each."""
    record = path.with_name(RECORD)
    if not record.exists():
        return []
    with explained(f"{record} cannot be read"):
        changes = read_object(record)["changes"]
        return [{name: change[name] for name in ("step", "key", "old", "new")} for change in changes]


def _values_in_force(path: Path, config: AnyConfig) -> Values:
    """The values of the run so far, or of ``config`` in a new run. The record counts: a kill can follow its writing."""
    kept = read_config(str(path), (), type(config)) if path.exists() else config
    return values_of(kept) | {str(change["key"]): change["new"] for change in recorded(path)}
