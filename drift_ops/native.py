"""How tensors reach the compiled modules: by address, to the function of their dtype."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def of_dtype(owner: object, name: str, dtype: torch.dtype) -> Callable[..., Any]:
    """``owner.name_float32`` or ``owner.name_float64``."""
    return getattr(owner, f"{name}_{str(dtype).removeprefix('torch.')}")


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()
