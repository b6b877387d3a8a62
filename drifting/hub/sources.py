"""Load trained models: runs of our own, networks of the Hugging Face hub (``hf://USER/NAME``), and what the release has
there (``hf://NAME``) or wrote to a folder."""

import math
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError, explained, require, shown
from ..generation import Generator
from ..models import MAE, MODELS, NETWORKS, DriftingDiT
from ..models.network_files import KINDS, OWN, Described, Model, read_model
from ..models.pretrained import download
from ..utils.files import is_count
from .release import WEIGHTS, read_artifact
from .vae import LATENT_CHANNELS

HUB, REPOSITORY = "hf://", "Goodeat/drifting"
GENERATORS = (*(kind for kind, its in KINDS.items() if its in NETWORKS.values()), OWN)
TYPES: dict[str, Any] = {  # A description has values of these types.
    "model": dict, "name": str, "data": str, "latent": bool, "noise_shape": list, "sample_shape": list,
    "class_names": list, "pixel_range": (list, type(None)), "cfg_scale": (int, float),
    "condition_shape": (list, type(None)),
}  # fmt: skip


def load_generator(source: str | Path, model: Model = None) -> Generator:
    """Load the generator of ``source``, in evaluation mode; networks of ours are on the CPU. A user's own network needs
    ``model``: an ``nn.Module``, which gets the weights, or what builds it of its arguments."""
    return as_generator(source, *open_model(source, GENERATORS, model))


def load_mae(source: str | Path) -> MAE:
    """Load the masked autoencoder of ``source``, to the CPU in evaluation mode, as :func:`load_generator` does."""
    mae, _ = open_model(source, ["mae"])
    assert isinstance(mae, MAE)
    return mae


def open_model(source: str | Path, kinds: Collection[str] = tuple(MODELS), model: Model = None) -> Described:
    """Load the network of ``source``, which is of one of ``kinds``, and its ``metadata.json`` or ``model.json``."""
    of_release = [kind for kind in kinds if kind in MODELS]
    folder, is_artifact = locate(source, of_release)
    if not is_artifact:
        return read_model(folder, model, kinds)
    if model is not None:
        raise UserError(f"{source} is a model of the release: leave out --model (or model=...)")
    return read_artifact(folder, of_release)


def as_generator(source: str | Path, network: nn.Module, description: dict[str, Any]) -> Generator:
    """Join the network of ``source`` and its ``description``, where the release and earlier runs say less."""
    facts: dict[str, Any] = {"pixel_range": None, "cfg_scale": 1.0, "condition_shape": None}
    ours: Any = network if type(network) in NETWORKS.values() else None
    if ours is not None:  # A network that was saved by itself has no facts.
        is_image = len(ours.sample_shape) == 3
        facts |= {"class_names": [str(number) for number in range(ours.num_classes)], "data": "", "latent": False}
        facts |= {"pixel_range": [-1.0, 1.0] if is_image else None}
    if type(network) is DriftingDiT:
        data = description.get("data", "imagenet")  # The release trained on it, and earlier runs named their data.
        is_latent = data == "latents" or (data == "imagenet" and network.out_chans == LATENT_CHANNELS)
        facts |= {"data": data, "latent": is_latent}
    facts |= description
    if ours is not None:  # It tells for itself what its file may have wrong.
        name = next(name for name, its in NETWORKS.items() if type(ours) is its)
        shapes = {"noise_shape": list(ours.noise_shape), "sample_shape": list(ours.sample_shape)}
        facts |= {"name": name, "model": ours.config} | shapes
    for key in TYPES:
        if not _is_right(key, facts.get(key)):
            raise UserError(f"{source}: its {key} is {shown(facts.get(key))}, which no training of ours writes")
    if ours is not None and len(facts["class_names"]) > ours.num_classes:
        raise UserError(f"{source} has {len(facts['class_names'])} class_names, its network {ours.num_classes}")
    facts = {key: tuple(facts[key]) if isinstance(facts[key], list) else facts[key] for key in (*TYPES, "step")}
    facts["cfg_scale"] = float(facts["cfg_scale"])  # torch takes no integers from 2⁶³ on.
    return Generator(network, arguments=facts.pop("model"), **facts)


def _is_right(key: str, value: Any) -> bool:
    if not isinstance(value, TYPES[key]):
        return False
    if key == "class_names":
        return len(value) > 0 and all(type(name) in (int, str) for name in value)
    if key == "pixel_range" and value is not None:
        are_numbers = len(value) == 2 and all(type(number) in (int, float) for number in value)
        return are_numbers and -(2**16) <= value[0] < value[1] <= 2**16
    if key == "cfg_scale":
        return type(value) is not bool and 1 <= value <= torch.finfo(torch.float32).max
    if key.endswith("_shape") and value is not None:
        return len(value) <= 32 and all(is_count(size, 1) for size in value) and math.prod(value) <= 2**31
    return True


def locate(source: str | Path, kinds: Sequence[str] = tuple(MODELS)) -> tuple[Path, bool]:
    """Find the folder of ``source``, and tell whether an artifact is there; a model of the hub is downloaded."""
    if isinstance(source, str) and source.startswith(HUB):
        name = source.removeprefix(HUB)
        source = download(name) if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) else _download(name, kinds)
    artifacts = [folder for folder in (Path(source), Path(source) / "params_ema") if (folder / WEIGHTS).is_file()]
    return (artifacts or [Path(source)])[0], bool(artifacts)


def _download(name: str, kinds: Sequence[str]) -> Path:
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"{HUB}{name}: expected {HUB}NAME, such as {HUB}latent_L_sota, or {HUB}USER/NAME")
    hub = require("huggingface_hub", f"{HUB}{name}", "imagenet")
    folders = [f"models/{kind}/jax/{name}" for kind in kinds]
    advice = f"copy its folder {' or '.join(folders)} here and name that, or try again"
    with explained(f"cannot download {HUB}{name} from huggingface.co/{REPOSITORY}: {advice}"):
        try:  # snapshot_download asks the same, but would wait for an answer for ever.
            files = [file.rfilename for file in hub.model_info(REPOSITORY, timeout=10).siblings or ()]
            for folder in folders:
                if f"{folder}/{WEIGHTS}" in files:
                    return Path(hub.snapshot_download(REPOSITORY, allow_patterns=[f"{folder}/*"])) / folder
        except Exception:  # Being offline, without access or with a broken cache have no base class in common.
            for folder in folders:
                with suppress(Exception):  # It may have been downloaded before.
                    cache = hub.snapshot_download(REPOSITORY, allow_patterns=[f"{folder}/*"], local_files_only=True)
                    if (Path(cache) / folder / WEIGHTS).is_file():
                        return Path(cache) / folder
            raise
    stored = re.compile(rf"models/(?:{'|'.join(kinds)})/jax/([^/]+)/{WEIGHTS}")
    names = ", ".join(sorted(set(stored.findall("\n".join(files))))) or "none"
    raise UserError(f"{REPOSITORY} has no model {name!r}; it has: {names}")
