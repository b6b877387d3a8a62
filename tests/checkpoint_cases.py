"""States to save, and what the tests of checkpoints look at."""

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from drifting.training.checkpoint_index import INDEX, flat
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def make_tensor(dtype: torch.dtype, shape: list[int], seed: int) -> Tensor:
    """Of any bits, NaN of all kinds among them."""
    size = torch.empty(0, dtype=dtype).element_size()
    bits = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return bits[..., 0] > 127 if dtype == torch.bool else bits.view(dtype).reshape(shape)


tensors = st.builds(
    make_tensor, st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 2**31)
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(scalars, lambda of: st.lists(of, max_size=3), max_leaves=4)
states = st.recursive(
    st.dictionaries(st.text(max_size=4), tensors | values, max_size=4),
    lambda of: st.dictionaries(st.text(max_size=4), of | tensors | values, max_size=4),
    max_leaves=6,
).map(lambda state: state | {"step": 7})


def small_state(step: int) -> dict[str, Any]:
    """Some of everything, other for each step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"weight": torch.randn(5, 3, generator=generator), "a/b": torch.tensor(step)},
        "optimizer": {"lr": 0.1 * step, "betas": (0.9, 0.95), "best": float("inf"), "name": f"step {step}"},
        "queue": torch.randint(0, 256, (40,), dtype=torch.uint8, generator=generator),
        "step": step,
    }


def blank(state: dict[str, Any]) -> dict[str, Any]:
    """What a fresh trainer has in place of ``state``: other tensors of the same kind, and other values."""
    fresh = {}
    for key, value in state.items():
        if isinstance(value, dict):
            fresh[key] = blank(value)
        elif isinstance(value, Tensor):
            fresh[key] = torch.zeros_like(value)
        else:
            fresh[key] = None if value is None else type(value)()
    return fresh


def bits(state: dict[str, Any]) -> dict[str, Any]:
    """The leaves of ``state``, such that equal ones are the same to the last bit."""
    return {
        name: (leaf.dtype, list(leaf.shape), leaf.detach().reshape(-1).contiguous().view(torch.uint8).tolist())
        if isinstance(leaf, Tensor) else repr(leaf)
        for name, leaf in flat(state).items()
    }  # fmt: skip


def content_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / INDEX).read_text())["content"]


def with_checksums(checkpoint: Path, content: dict[str, Any]) -> dict[str, Any]:
    """``content``, but the files described as they are."""
    data = {name: (checkpoint / name).read_bytes() for name in content["files"]}
    files = {name: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for name, d in data.items()}
    return content | {"files": files}


def forge(checkpoint: Path, content: dict[str, Any]) -> None:
    """Write ``content`` into ``checkpoint.json`` with its checksum."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    (checkpoint / INDEX).write_text(json.dumps({"sha256": digest, "content": content}))


def same_checkpoints(one: Path, other: Path) -> bool:
    """Whether two checkpoints of one process hold the same, to the last bit."""
    described = [{key: content_of(path)[key] for key in ("tensors", "values")} for path in (one, other)]
    data = [(path / "__0_0.distcp").read_bytes() for path in (one, other)]
    return described[0] == described[1] and data[0] == data[1]


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, as PyTorch's own converter reads them."""
    with TemporaryDirectory() as folder:
        dcp_to_torch_save(checkpoint, f"{folder}/x.pt")
        return torch.load(f"{folder}/x.pt", weights_only=True)
