"""Trained models from wherever they are: the official release on the Hugging Face hub, its artifacts, or our own runs.

A source is ``hf://NAME`` (``hf://latent_L_sota``), a directory with the release's ``ema_params.msgpack`` and
``metadata.json`` or with a ``params_ema`` directory that has them, or a run directory of our own.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import UserError
from ..generation import Generator
from ..models import MAE, MODELS, DriftingDiT
from .release import WEIGHTS, read_artifact
from .run_directory import read_model
from .vae import LATENT_CHANNELS

REPOSITORY = "Goodeat/drifting"
HUB = "hf://"
HUB_SECONDS = 10  # to wait for its answer
RELEASE_DATA, RELEASE_PIXEL_RANGE = "imagenet", (-1.0, 1.0)
MOST_PIXEL = 2**16  # of the values that stand for black and white


def load_generator(source: str | Path) -> Generator:
    """The generator of ``source``, on the CPU in float32 and evaluation mode.

    Raises:
        UserError: nothing there, or not a generator; weights that do not fit, all of them in one message.
    """
    return open_generator(source)


def load_mae(source: str | Path) -> MAE:
    """The masked autoencoder of ``source``; as :func:`load_generator` otherwise."""
    model, _ = open_model(locate(source, ["mae"]))
    if not isinstance(model, MAE):
        raise UserError(f"{source} is a generator, not a masked autoencoder")
    return model


def open_generator(source: str | Path) -> Generator:
    """The generator of ``source`` with what sampling needs to know; as :func:`load_generator` otherwise."""
    model, description = open_model(locate(source, ["gen"]))
    if not isinstance(model, DriftingDiT):
        raise UserError(f"{source} is a masked autoencoder, not a generator")
    data, pixel_range = description.get("data", RELEASE_DATA), description.get("pixel_range", RELEASE_PIXEL_RANGE)
    if not isinstance(data, str) or not _is_range(pixel_range):
        raise UserError(f"{source}: its data is {data!r} and its pixel_range {pixel_range!r}, expected a name and "
                        "two numbers, black and white")  # fmt: skip
    low, high = pixel_range
    sample_shape = (model.out_chans, model.img_size, model.img_size)
    names = description.get("class_names") or map(str, range(model.num_classes))
    latent = description.get("latent", model.out_chans == LATENT_CHANNELS)
    return Generator(
        model, model.noise_shape, sample_shape, tuple(names), (low, high), latent, data, description["step"],
        "drifting_dit", model.config,
    )  # fmt: skip


def _is_range(value: Any) -> bool:
    """Whether ``value`` is two numbers, the first below the second."""
    numbers = isinstance(value, (list, tuple)) and len(value) == 2 and all(type(v) in (int, float) for v in value)
    return numbers and -MOST_PIXEL <= value[0] < value[1] <= MOST_PIXEL


def open_model(folder: Path) -> tuple[DriftingDiT | MAE, dict[str, Any]]:
    """The model in ``folder``, an artifact or a run directory, with its ``metadata.json`` or ``model.json``."""
    return read_artifact(folder) if is_artifact(folder) else read_model(folder)


def locate(source: str | Path, kinds: Sequence[str] = tuple(MODELS)) -> Path:
    """The directory with the files of ``source``, downloaded where it names a model of the hub of one of ``kinds``."""
    if isinstance(source, str) and source.startswith(HUB):
        return _download(source.removeprefix(HUB), kinds)
    folder = Path(source)
    return next((place for place in (folder, folder / "params_ema") if is_artifact(place)), folder)


def is_artifact(folder: Path) -> bool:
    """Whether ``folder`` has weights in the release's format; run directories of our own have not."""
    return (folder / WEIGHTS).is_file()


def _download(name: str, kinds: Sequence[str]) -> Path:
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"{HUB}{name}: expected {HUB}NAME, such as {HUB}latent_L_sota")
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"{HUB}{name} needs huggingface_hub: `pip install huggingface_hub`") from error
    folders = [f"models/{kind}/jax/{name}" for kind in kinds]
    try:  # snapshot_download asks the same, but would wait for an answer for ever
        files = [file.rfilename for file in huggingface_hub.model_info(REPOSITORY, timeout=HUB_SECONDS).siblings or ()]
        found = next((folder for folder in folders if f"{folder}/{WEIGHTS}" in files), None)
        if found is not None:
            return _fetch(huggingface_hub, found)
    except Exception as error:  # offline, no access, a broken cache: they have no base class in common
        for folder in folders:  # which may have been downloaded before
            with suppress(Exception):
                if is_artifact(cached := _fetch(huggingface_hub, folder, local_files_only=True)):
                    return cached
        raise UserError(
            f"cannot download {HUB}{name} from huggingface.co/{REPOSITORY} ({_reason(error)}): where that is out of "
            f"reach, copy its folder {' or '.join(folders)} here, and name that"
        ) from error
    raise UserError(f"{REPOSITORY} has no model {name!r}; it has: {_names(files, kinds)}")


def _fetch(huggingface_hub: ModuleType, folder: str, **options: Any) -> Path:
    """The copy of a folder of the repository in the cache of the hub, where it is brought if need be."""
    return Path(huggingface_hub.snapshot_download(REPOSITORY, allow_patterns=[f"{folder}/*"], **options)) / folder


def _names(files: Sequence[str], kinds: Sequence[str]) -> str:
    """The models among the files of the repository, for an error message."""
    found = (re.fullmatch(rf"models/(?:{'|'.join(kinds)})/jax/([^/]+)/{WEIGHTS}", file) for file in files)
    return ", ".join(sorted({match[1] for match in found if match})) or "none"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
