"""Models of the official release with weights that need no file.

``golden/official_options/*.npz`` were made with the release's code: of each ``model_config`` the weights are
:func:`hashed_weights` of the release's own names and shapes, so that only inputs and outputs are stored.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from drifting.hub.flax_msgpack import write_arrays
from drifting.hub.release import METADATA, WEIGHTS, our_config, stored_arrays
from drifting.models import MODELS

GOLDEN = Path(__file__).parent / "golden"


def option_cases(kind: str) -> list[str]:
    return sorted(path.stem for path in (GOLDEN / "official_options").glob(f"{kind}_*.npz"))


def write_case(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """Write the artifact of the case ``name`` to ``folder``; returns what the release was given and what it gave."""
    with np.load(GOLDEN / "official_options" / f"{name}.npz") as archive:
        expected = dict(archive)
    metadata = json.loads(str(expected.pop("metadata")))
    with torch.device("meta"):
        model = MODELS[metadata["kind"]](**our_config(metadata["kind"], metadata["model_config"]))
    shapes = {path: tuple(array.shape) for path, array in stored_arrays(model).items()}
    write_arrays(folder / WEIGHTS, {path: torch.from_numpy(hashed_weights(path, s)) for path, s in shapes.items()})
    (folder / METADATA).write_text(json.dumps(metadata), encoding="utf-8")
    return {key: torch.from_numpy(value) for key, value in expected.items()}


def hashed_weights(path: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Uniform numbers from hashed counters: kernels of variance 1/fan-in, norms about 1, the rest in [-½, ½)."""
    x = np.arange(math.prod(shape), dtype=np.uint32) * np.uint32(2654435761) + np.uint32(zlib.crc32(path.encode()))
    x = (x ^ (x >> np.uint32(16))) * np.uint32(73244475)
    x = (x ^ (x >> np.uint32(16))) >> np.uint32(8)
    uniform = (x.astype(np.float32) / np.float32(2**24) - np.float32(0.5)).reshape(shape)
    leaf = path.rsplit("/", 1)[-1]
    if leaf in ("scale", "weight"):
        return 1 + uniform
    if leaf == "kernel":
        return uniform * np.float32(math.sqrt(12 / math.prod(shape[:-1])))
    return uniform


def nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


def nchw(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2)


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    assert ours.shape == expected.shape
    return ((ours - expected).norm() / expected.norm()).item()
