"""Load trained models from wherever they are: the Hugging Face hub, artifacts of the release, or our own runs.

A source is ``hf://NAME`` (``hf://latent_L_sota``), a directory with the release's ``ema_params.msgpack`` and
``metadata.json`` or with a ``params_ema`` directory that has them, or a run directory of our own.
"""

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import UserError, reason, require
from ..generation import Generator
from ..models import MAE, MODELS, DriftingDiT
from ..utils.files import is_count
from .networks import GENERATORS, shown
from .release import WEIGHTS, read_artifact
from .run_directory import Model, read_any
from .vae import LATENT_CHANNELS

REPOSITORY = "Goodeat/drifting"
HUB = "hf://"
FACTS = ("model", "name", "data", "latent", "noise_shape", "sample_shape", "class_names", "pixel_range")
HUB_SECONDS = 10  # The hub has this long to answer.
RELEASE_DATA, RELEASE_PIXEL_RANGE = "imagenet", (-1.0, 1.0)
MOST_PIXEL = 2**16  # The values that stand for black and white are at most so large.
MOST_DIMENSIONS, MOST_NUMBERS = 32, 2**31  # These bound the shapes of noise and samples.


def load_generator(source: str | Path, model: Model = None) -> Generator:
    """Load the generator of ``source``, in evaluation mode; networks of ours are on the CPU.

    Args:
        source: ``hf://NAME``, an artifact of the release, or a run directory.
        model: the network, if it is the user's own: an ``nn.Module``, which gets the trained weights, or a class or
            function that builds it from the arguments of its training.

    Raises:
        UserError: nothing is there, or no generator; files that are damaged or do not fit the network; or a network
            of the user's own without ``model``.
    """
    return as_generator(source, *open_model(source, GENERATORS, model))


def load_mae(source: str | Path) -> MAE:
    """Load the masked autoencoder of ``source``, to the CPU in evaluation mode, as :func:`load_generator` does."""
    mae, _ = open_model(source, ["mae"])
    assert isinstance(mae, MAE)
    return mae


def open_model(
    source: str | Path, kinds: Sequence[str] = tuple(MODELS), model: Model = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Load the network of ``source``, which is of one of ``kinds``, and its ``metadata.json`` or ``model.json``."""
    folder = locate(source, kinds)
    if not is_artifact(folder):
        return read_any(folder, model, kinds)
    if model is not None:
        raise UserError(f"{source} is a model of the release: leave out --model (or model=...)")
    return read_artifact(folder, kinds)


def as_generator(source: str | Path, network: nn.Module, description: dict[str, Any]) -> Generator:
    """Join the network of ``source`` and its ``description``; the release and earlier versions of ours say less there.

    It raises :class:`UserError` where something in the description is not as it should be.
    """
    facts = dict(description)
    if isinstance(network, DriftingDiT):
        data = facts.setdefault("data", RELEASE_DATA)
        is_release_latent = data == RELEASE_DATA and network.out_chans == LATENT_CHANNELS
        facts.setdefault("latent", is_release_latent or data == "latents")
        facts.setdefault("pixel_range", RELEASE_PIXEL_RANGE)
        facts.setdefault("class_names", [str(number) for number in range(network.num_classes)])
        sample_shape = [network.out_chans, network.img_size, network.img_size]
        facts |= {"noise_shape": list(network.noise_shape), "sample_shape": sample_shape}
        facts |= {"name": "drifting_dit", "model": network.config}
    for key in FACTS:
        if not _is_right(key, facts.get(key)):
            raise UserError(f"{source}: its {key} is {shown(facts.get(key))}, which no training of ours writes")
    if isinstance(network, DriftingDiT) and len(facts["class_names"]) > network.num_classes:
        raise UserError(f"{source} has {len(facts['class_names'])} class_names, its network {network.num_classes}")
    known: dict[str, Any] = {key: tuple(facts[key]) for key in ("noise_shape", "sample_shape", "class_names")}
    known |= {key: facts[key] for key in ("name", "data", "latent", "step")}
    pixel_range = facts.get("pixel_range") and tuple(facts["pixel_range"])
    return Generator(network, pixel_range=pixel_range, arguments=facts["model"], **known)


def _is_right(key: str, value: Any) -> bool:
    """Tell whether ``value`` may be what a description says of ``key``."""
    items = value if isinstance(value, (list, tuple)) else ()
    if key in ("noise_shape", "sample_shape"):
        sizes = isinstance(value, list) and len(items) <= MOST_DIMENSIONS and all(is_count(size, 1) for size in items)
        return sizes and math.prod(items) <= MOST_NUMBERS
    if key == "class_names":
        return bool(items) and all(type(name) in (int, str) for name in items)
    if key == "pixel_range":
        numbers = len(items) == 2 and all(type(number) in (int, float) for number in items)
        return value is None or (numbers and -MOST_PIXEL <= items[0] < items[1] <= MOST_PIXEL)
    return isinstance(value, {"model": dict, "latent": bool}.get(key, str))


def locate(source: str | Path, kinds: Sequence[str] = tuple(MODELS)) -> Path:
    """Find the folder of ``source``, which is downloaded where it names a model of the hub of one of ``kinds``."""
    if isinstance(source, str) and source.startswith(HUB):
        return _download(source.removeprefix(HUB), [kind for kind in kinds if kind in MODELS])
    folder = Path(source)
    return next((place for place in (folder, folder / "params_ema") if is_artifact(place)), folder)


def is_artifact(folder: Path) -> bool:
    """Tell whether ``folder`` has weights in the release's format; run directories of our own have not."""
    return (folder / WEIGHTS).is_file()


def _download(name: str, kinds: Sequence[str]) -> Path:
    """Bring a model to the cache of the hub, if it is not there, and return its folder."""
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"{HUB}{name}: expected {HUB}NAME, such as {HUB}latent_L_sota")
    hub = require("huggingface_hub", f"{HUB}{name}", "imagenet")
    folders = [f"models/{kind}/jax/{name}" for kind in kinds]
    try:  # snapshot_download asks the same, but would wait for an answer for ever.
        files = [file.rfilename for file in hub.model_info(REPOSITORY, timeout=HUB_SECONDS).siblings or ()]
        for folder in folders:
            if f"{folder}/{WEIGHTS}" in files:
                return Path(hub.snapshot_download(REPOSITORY, allow_patterns=[f"{folder}/*"])) / folder
    except Exception as error:  # Being offline, without access or with a broken cache have no base class in common.
        for folder in folders:
            with suppress(Exception):  # It may have been downloaded before.
                cache = hub.snapshot_download(REPOSITORY, allow_patterns=[f"{folder}/*"], local_files_only=True)
                if is_artifact(Path(cache) / folder):
                    return Path(cache) / folder
        raise UserError(
            f"cannot download {HUB}{name} from huggingface.co/{REPOSITORY} ({reason(error)}): where that is out of "
            f"reach, copy its folder {' or '.join(folders)} here, and name that"
        ) from error
    matches = (re.fullmatch(rf"models/(?:{'|'.join(kinds)})/jax/([^/]+)/{WEIGHTS}", file) for file in files)
    names = ", ".join(sorted({match[1] for match in matches if match})) or "none"
    raise UserError(f"{REPOSITORY} has no model {name!r}; it has: {names}")
