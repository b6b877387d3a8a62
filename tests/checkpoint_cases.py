"""States to save, and what the tests of checkpoints look at."""

from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def make_tensor(dtype: torch.dtype, shape: list[int], seed: int) -> Tensor:
    """A tensor of any bits, NaN of all kinds among them."""
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
    """A state with some of everything, which is another for each step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"weight": torch.randn(5, 3, generator=generator), "a/b": torch.tensor(step)},
        "optimizer": {"lr": 0.1 * step, "betas": (0.9, 0.95), "best": float("inf"), "name": f"step {step}"},
        "queue": torch.randint(0, 256, (40,), dtype=torch.uint8, generator=generator),
        "step": step,
    }


def bits(state: Any) -> Any:
    """``state`` in a form in which equal ones are the same to the last bit."""
    if isinstance(state, dict):
        return {key: bits(value) for key, value in state.items()}
    if isinstance(state, Tensor):
        return state.dtype, list(state.shape), state.reshape(-1).contiguous().view(torch.uint8).tolist()
    return repr(state)


def read(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds, as torch alone reads it."""
    return torch.load(checkpoint, weights_only=True)


def same_checkpoints(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same, to the last bit."""
    return bits(read(one)) == bits(read(other))
