"""Processes that meet over gloo as the ranks of a run do, forked from one that has imported what all of them need."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from drifting.training.distributed import Ranks

IMPORTED = ["torch._dynamo", "torch.profiler", "drifting.train", "drifting.pretrain", "drifting.evaluate"]


def results_of(worker: Callable[..., Any], num: int, directory: Path, *arguments: Any) -> list[Any]:
    """What ``worker(rank, directory, *arguments)`` returns in each of ``num`` processes."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    start_processes(_run, (worker, directory, arguments), num, start_method="forkserver")
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(num)]


def _run(rank: int, worker: Callable[..., Any], directory: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.save(worker(rank, directory, *arguments), directory / f"{rank}.pt")


@contextmanager
def meeting(rank: int, num: int, directory: Path) -> Iterator[None]:
    """Inside, ``num`` processes are a group, which none of them leaves before all have come to the end."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=num)
    yield
    dist.barrier()
    dist.destroy_process_group()


def groups_with(rank: int, sizes: Sequence[int]) -> dict[int, Ranks]:
    """By size, those groups of the first so many processes that this one belongs to."""
    groups = {size: dist.new_group(range(size), timeout=timedelta(minutes=10)) for size in sizes}
    return {size: Ranks(rank, size, group, group) for size, group in groups.items() if rank < size}
