"""What a launch needs to know, the device, its limits, the precision of float32 products; and the launch itself.

A compiled kernel serves all arguments of the same kinds. Triton asks each tensor for its alignment and each number for
its factors; ours are compiled for tensors that are all aligned to ALIGNMENT bytes or for any, and for any number in a
tuple without names, which is a list. Whether a kernel finds the shared and the tensor memory that it needs is seen when
it is compiled: where it does not, it is compiled with smaller blocks.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Configuration = dict[str, int]  # blocks, num_warps, num_stages
Grid = tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]]

ALIGNMENT = 16
INNER_BLOCKS = ("BLOCK_D", "BLOCK_SUM")  # of loops within a program: no grid depends on them
REDUCIBLE = ("ROWS", *INNER_BLOCKS)  # in this order, where memory does not suffice
LEAST_BLOCK = 16
MOST_INT32 = 2**31 - 1

_variants: dict[tuple[Any, ...], tuple[Any, Configuration]] = {}


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


def run(kernel: Any, grid: Grid, args: tuple[Any, ...], configuration: Configuration, options: dict[str, Any]) -> None:
    """``kernel[grid](*args, **options, **configuration)``, of whose variants at most two differ by alignment."""
    if interpreted():
        kernel[grid](*args, **options, **configuration)
        return
    given = dict(zip(kernel.arg_names, args, strict=False)) | options
    compiled, blocks = variant(kernel, given, configuration)
    given |= blocks
    sizes = grid(given) if callable(grid) else grid
    execute(compiled, (*sizes, 1, 1)[:3], [given[name] for name in kernel.arg_names])


def execute(compiled: Any, grid: tuple[int, ...], arguments: list[Any]) -> None:
    compiled[grid](*arguments)


@functools.cache
def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def variant(kernel: Any, given: dict[str, Any], configuration: Configuration) -> tuple[Any, Configuration]:
    """The compiled kernel for arguments such as those ``given``, and the configuration that it runs under."""
    aligned = given.get("ALIGNED", True) and all(t.data_ptr() % ALIGNMENT == 0 for t in _tensors(given.values()))
    if "ALIGNED" in given:
        given["ALIGNED"] = aligned
    device, constant = triton.runtime.driver.active.get_current_device(), constants(kernel)
    kinds = [value if name in constant else _kind(value) for name, value in given.items()]
    key = (kernel.fn, device, aligned, *configuration.items(), *kinds)
    if key not in _variants:
        for smaller in reduced(configuration):
            compiled = compile_for(kernel, given, smaller, aligned)
            if runs(compiled, limits(torch.device("cuda", device))):
                break
        _variants[key] = compiled, smaller
    return _variants[key]


def compile_for(kernel: Any, given: dict[str, Any], configuration: Configuration, aligned: bool = True) -> Any:
    constant = constants(kernel)
    stand_ins = {name: value if name in constant else _stand_in(value, aligned) for name, value in given.items()}
    return kernel.run(**stand_ins, **configuration, grid=(1,), warmup=True)


@functools.cache
def constants(kernel: Any) -> frozenset[str]:
    """The parameters of whose every value there is a variant."""
    return frozenset(parameter.name for parameter in kernel.params if parameter.is_constexpr)


def runs(compiled: Any, limits: Limits) -> bool:
    """Whether a compiled kernel finds the shared memory and the tensor memory it needs; without the latter, Triton
    compiles it to a trap."""
    return compiled.metadata.shared <= limits.shared_bytes and "trap;" not in compiled.asm.get("ptx", "")


def reduced(configuration: Configuration) -> Iterator[Configuration]:
    """``configuration``, and what takes less and less shared memory."""
    yield configuration
    configuration = configuration | {"num_stages": 1}
    yield configuration
    for name in REDUCIBLE:
        while configuration.get(name, 0) > LEAST_BLOCK:
            configuration = configuration | {name: configuration[name] // 2}
            yield configuration


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


def _kind(argument: Any) -> Any:
    """What a kernel is compiled for in an argument."""
    if isinstance(argument, Tensor):
        return argument.dtype
    if hasattr(argument, "_fields"):
        return tuple(map(_kind, argument))
    if isinstance(argument, tuple):
        return tuple([n > MOST_INT32 if type(n) is int else _kind(n) for n in argument])
    if isinstance(argument, float):
        return float
    if isinstance(argument, tl.constexpr):
        return tl.constexpr, argument.value
    if isinstance(argument, int):
        return argument == 1, argument % ALIGNMENT == 0, argument > MOST_INT32
    return argument


class _Pointer:
    """Stands in for a tensor when a kernel is compiled."""

    def __init__(self, dtype: torch.dtype, aligned: bool) -> None:
        self.dtype, self.address = dtype, 0 if aligned else dtype.itemsize

    def data_ptr(self) -> int:
        return self.address


def _stand_in(argument: Any, aligned: bool) -> Any:
    """Of the same kind, and with nothing else that a compiler could make use of."""
    if isinstance(argument, Tensor):
        return _Pointer(argument.dtype, aligned)
    if hasattr(argument, "_fields"):
        return type(argument)(*[_stand_in(member, aligned) for member in argument])
    if isinstance(argument, tuple):
        return tuple([_any_like(n) if type(n) is int else _stand_in(n, aligned) for n in argument])
    return argument


def _any_like(n: int) -> int:
    return MOST_INT32 + 2 if n > MOST_INT32 else 3  # odd, and more than 1
