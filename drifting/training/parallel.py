"""One generator on several ranks: a replica on each (DDP), or a shard of every parameter (FSDP2)."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ..hub.networks import build
from ..models import DriftingDiT
from .distributed import Ranks


def distribute(model: nn.Module, averages: Iterable[nn.Module], ranks: Ranks, sharded: bool) -> nn.Module:
    """What training calls in place of ``model``, whose gradients are then means over the ranks.

    With ``sharded``, each rank keeps a shard of every parameter of ``model``, block by block, and of its ``averages``,
    which become so in place.
    """
    if ranks.group is None:
        return model
    if not sharded:
        return DistributedDataParallel(model, process_group=ranks.group)
    # of a view, which our images are where a patch is the whole image; nothing changes them in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = DeviceMesh.from_group(ranks.group, next(model.parameters()).device.type)
    for module in (model, *averages):
        for block in module.get_submodule("blocks").children():
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
    return model


@contextmanager
def averaging_gradients(model: nn.Module, averaging: bool) -> Iterator[None]:
    """Whether a backward inside takes the mean of the gradients over the ranks, or only adds to this rank's.

    ``model`` is what :func:`distribute` returned; forward and backward are both inside.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(averaging)
    adding_replica = isinstance(model, DistributedDataParallel) and not averaging
    with cast(DistributedDataParallel, model).no_sync() if adding_replica else nullcontext():
        yield


def unsharded(model: DriftingDiT) -> DriftingDiT:
    """``model``, or where it is in shards a copy with all weights on every rank; all ranks call this."""
    if not isinstance(model, FSDPModule):
        return model
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    with torch.no_grad():
        copy = build(DriftingDiT, model.config)
        copy.load_state_dict(weights, assign=True)
    assert isinstance(copy, DriftingDiT)
    return copy.requires_grad_(False).eval()
