"""Launches a kernel under its fixed configuration or, where ``DRIFT_OPS_AUTOTUNE=1`` asks for it, under the fastest.

A launcher names one configuration. With autotuning, the first launch on arguments of other kinds or sizes (a size
counts up to the next power of two) times it and its neighbours on the device, by :func:`triton.autotune`, which keeps
the times in Triton's cache on disk, by Triton 3.3 in memory only. What kernels hand on to each other is laid out by
blocks that stay as they are: results differ by roundings, and are the same every time once the choice is made.
"""

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import KernelInterface

from . import launch
from .launch import INNER_BLOCKS, LEAST_BLOCK, Configuration

LEAST, MOST = {"num_warps": 4, "num_stages": 1}, {"num_warps": 8, "num_stages": 4}
MOST_BLOCK = 256

_chosen: dict[tuple[Any, ...], Configuration] = {}
_one_at_a_time = threading.Lock()  # backward passes run in threads of their own


@functools.cache
def wanted() -> bool:
    """Whether the user asks for autotuning. Triton's interpreter has nothing to time."""
    setting = os.environ.get("DRIFT_OPS_AUTOTUNE") or "0"
    if setting not in ("0", "1"):
        raise ValueError(f"DRIFT_OPS_AUTOTUNE: got {setting!r}, expected 0 or 1")
    return setting == "1" and not launch.interpreted()


def start(
    kernel: Any,
    grid: tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]],
    *args: Any,
    configuration: Configuration,
    **options: Any,
) -> None:
    """``kernel[grid](*args, **options)`` under ``configuration``, or what autotuning has found.

    Where the grid is a function of the blocks, all of them may be tuned, else INNER_BLOCKS. Trials run the kernel many
    times: it must not add to what it finds in its results. While a CUDA graph is captured nothing can be timed; what
    was not tuned before then runs under ``configuration``.
    """
    if wanted():
        configuration = _fastest(kernel, grid, args, configuration, options)
    launch.run(kernel, grid, args, configuration, options)


def _fastest(
    kernel: Any, grid: Any, args: tuple[Any, ...], fixed: Configuration, options: dict[str, Any]
) -> Configuration:
    device = torch.cuda.current_device()
    given, constants = dict(zip(kernel.arg_names, args, strict=False)) | options, launch.constants(kernel)
    kinds = (*fixed.values(), *[value if name in constants else _kind(value) for name, value in given.items()])
    key = (kernel.fn, device, kinds)
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return fixed
        with _one_at_a_time:
            limits = launch.limits(torch.device("cuda", device))
            tuner = _tuner(kernel, neighbours(fixed, grid, limits), limits)
            tuner[grid](*args, key=(torch.cuda.get_device_name(device), kinds), **options)
            best = tuner.best_config
            _chosen[key] = best.kwargs | {"num_warps": best.num_warps, "num_stages": best.num_stages}
    return _chosen[key]


def neighbours(configuration: Configuration, grid: Any, limits: launch.Limits) -> list[Configuration]:
    """``configuration``, and those one step from it: half or twice a block or the warps, a stage fewer or more.

    On GPUs with tensor memory tiles keep their shape, since not every one's products compile.
    """
    found, all_blocks = [configuration], callable(grid) and not limits.tensor_memory
    for name, value in configuration.items():
        steps: tuple[int, ...] = ()
        if name == "num_stages":
            steps = (value - 1, value + 1)
        elif name == "num_warps" or name in INNER_BLOCKS or (all_blocks and name.startswith("BLOCK")):
            steps = (value // 2, 2 * value)
        least, most = LEAST.get(name, LEAST_BLOCK), MOST.get(name, MOST_BLOCK)
        found += [configuration | {name: step} for step in steps if least <= step <= most]
    return found


def _tuner(kernel: Any, configurations: list[Configuration], limits: launch.Limits) -> Any:
    configs = []
    for configuration in configurations:
        blocks = {name: size for name, size in configuration.items() if not name.startswith("num_")}
        configs.append(triton.Config(blocks, configuration["num_warps"], configuration["num_stages"]))
    prune = {"early_config_prune": functools.partial(_those_that_run, kernel, limits)}
    tuner = triton.autotune(configs, ["key"], prune_configs_by=prune)(_Tunable(kernel, tuple(configurations[0])))
    tuner.cache_results = True  # which triton.autotune takes as an argument from 3.4 on
    return tuner


class _Tunable(KernelInterface):
    """A kernel launched as ours are, with one more argument, for the tuner alone: what a choice is made for."""

    def __init__(self, kernel: Any, tuned: tuple[str, ...]) -> None:
        self.fn, self.arg_names, self.tuned = kernel, [*kernel.arg_names, "key"], tuned

    def run(self, *args: Any, grid: Any, key: tuple[Any, ...], warmup: bool, **options: Any) -> None:
        configuration = {name: options.pop(name) for name in self.tuned}
        launch.run(self.fn, grid, args, configuration, options)


def _kind(argument: Any) -> Any:
    """What the speed of a kernel depends on in an argument: dtype, size or option, not the value of a scalar or of
    a list's entries."""
    if isinstance(argument, Tensor):
        return str(argument.dtype)
    if hasattr(argument, "_fields"):
        return tuple(map(_kind, argument))
    if isinstance(argument, tuple):
        return tuple(["a number" if type(n) is int else _kind(n) for n in argument])
    if isinstance(argument, tl.constexpr):
        return f"always {argument.value}"
    if isinstance(argument, float):
        return "float"
    if isinstance(argument, int) and not isinstance(argument, bool):
        return triton.next_power_of_2(argument)
    return argument


def _those_that_run(
    kernel: Any, limits: launch.Limits, configs: list[Any], args: dict[str, Any], **options: Any
) -> list[Any]:
    """The first of the configurations, and of the others those that compile and fit on the device."""
    found, given = configs[:1], {name: value for name, value in (args | options).items() if name in kernel.arg_names}
    for config in configs[1:]:
        try:
            compiled = launch.compile_for(kernel, given, config.all_kwargs())
        except Exception:  # whatever stops the compiler stops this trial only
            continue
        if launch.runs(compiled, limits):
            found.append(config)
    return found
