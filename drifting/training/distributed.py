"""The processes that train together: those that torchrun started, or one alone."""

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ..errors import explained

T = TypeVar("T")

PATIENCE = timedelta(days=1)  # The other ranks wait this long while rank 0 compares and writes.


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; by default it is alone, and nothing is communicated.

    All ranks call a method that communicates, together. ``group`` exchanges tensors, ``host`` what the host decides.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    host: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This rank's part of ``count`` items; parts are in the order of ranks and differ by one item at most."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def gather(self, part: Tensor) -> Tensor:
        """The parts of all ranks, of one shape, one after another."""
        if self.size == 1:
            return part
        whole = part.new_empty(self.size * part.shape[0], *part.shape[1:])
        dist.all_gather(list(whole.chunk(self.size)), part.contiguous(), group=self.group)
        return whole

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over the ranks."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values, group=self.group)
        return values

    def zeros(self, *shape: int, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros. In the host's memory, the ranks of a host share one tensor, and each writes the same to it."""
        dtype = dtype or torch.get_default_dtype()
        if self.size == 1 or torch.device(device).type != "cpu" or not hasattr(os, "memfd_create"):
            return torch.zeros(shape, device=device, dtype=dtype)
        mapped: list[Tensor] = []
        with explained("the processes of a host cannot share memory"):
            # Processes with the same two have the same numbers for processes.
            host = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8"), os.readlink("/proc/self/ns/pid")
            memory = os.memfd_create("drifting")  # It has no name, and goes with the last process that has it.
            found = self.on_all(lambda: (host, f"/proc/{os.getpid()}/fd/{memory}"))
            path = next(path for other, path in found if other == host)
            self.on_all(lambda: mapped.append(torch.from_file(path, True, math.prod(shape), dtype=dtype, device="cpu")))
            os.close(memory)
        return mapped[0].view(shape)

    def on_all(self, action: Callable[[], T]) -> list[T]:
        """What ``action`` returns on each rank, exchanged between hosts; an error of one is raised on all."""
        if self.size == 1:
            return [action()]
        outcome: T | Exception
        try:
            outcome = action()
        except Exception as error:
            outcome = error
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, outcome, group=self.host)
        for of_rank in (outcome, *outcomes):
            if isinstance(of_rank, Exception):
                raise of_rank
        return outcomes

    def on_main(self, action: Callable[[], T]) -> T | None:
        """What ``action`` returns on rank 0, the only one to call it; None on the others, which wait for its end."""
        return self.together(lambda: action() if self.main else None)

    def together(self, action: Callable[[], T]) -> T:
        """What ``action`` returns on this rank; where it fails on one, all end, and rank 0 tells why."""
        result: list[T] = []
        with self.agreed():
            self.on_all(lambda: result.append(action()))
        return result[0]

    def to_main(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on rank 0, which alone takes them; none on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.gather_object(value, values if self.main else None, group=self.host, group_dst=0)
        return values if self.main else []

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Inside, all ranks raise the same errors. Rank 0 alone tells them; the others end without a word."""
        try:
            yield
        except Exception as error:
            if self.main:
                raise
            raise SystemExit(getattr(error, "status", 1)) from None


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Meet the processes that torchrun started, each with its own GPU or all on the CPU, and part from them at last."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Ranks()
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        host = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, host)
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, ranks: Ranks) -> None:
    """Let each rank keep a shard of every parameter (FSDP2), in place; ``blocks``, if any, are gathered one by one."""
    number = next((name for name, parameter in model.named_parameters() if not parameter.ndim), None)
    if number is not None:
        raise ValueError(f"step.fsdp is true, but the parameter {number} is a number, which has no shards: make it [1]")
    # Our images are views where a patch is the whole image, and nothing changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    assert ranks.group is not None
    for parameter in model.parameters():  # FSDP2 takes no weights that lie in memory otherwise, as in channels_last.
        parameter.data = parameter.data.contiguous()
    mesh = DeviceMesh.from_group(ranks.group, next(model.parameters()).device.type)
    for block in getattr(model, "blocks", nn.ModuleList()).children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextmanager
def averaging_gradients(model: nn.Module, averaging: bool) -> Iterator[None]:
    """Whether forward and backward of ``model`` inside average gradients over the ranks, or only add to this rank's."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(averaging)
    with nullcontext() if averaging or not isinstance(model, DistributedDataParallel) else model.no_sync():
        yield
