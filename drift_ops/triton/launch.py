"""What a launch needs to know: the device, its limits, the precision of float32 products."""

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """What the choice of blocks, warps and stages depends on."""

    amd: bool
    shared_bytes: int  # of a program: 166,912 on sm_80, 232,448 on sm_90 and sm_100, 65,536 on gfx942, 101,376 on sm_89
    tensor_memory: bool = False  # where products are summed up, on sm_100


@functools.cache
def limits(device: torch.device) -> Limits:
    if device.type != "cuda":  # interpreted, or compiled ahead of time: as on an H100
        return Limits(amd=False, shared_bytes=232448)
    properties = torch.cuda.get_device_properties(device)
    amd = torch.version.hip is not None
    shared_bytes = getattr(properties, "shared_memory_per_block" if amd else "shared_memory_per_block_optin")
    return Limits(amd, shared_bytes, tensor_memory=not amd and properties.major == 10)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device and its current stream: make that the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def product_precision(amd: bool) -> str:
    """``input_precision`` of ``tl.dot`` for float32, as ``torch.set_float32_matmul_precision`` asks for."""
    if amd:
        return "ieee"
    return "tf32x3" if splits_products() else "tf32"


def splits_products() -> bool:
    """Whether products take two parts of each float32 number, as ``torch.set_float32_matmul_precision`` asks."""
    return torch.get_float32_matmul_precision() == "highest"


def padded_block(count: int, least: int = 16) -> int:
    """The block that holds ``count`` entries: Triton's are powers of two, and a matrix product's at least 16."""
    return max(least, 1 << (int(count) - 1).bit_length())
