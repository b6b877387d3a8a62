"""A network's weights in training: AdamW as the release has it, its schedule, and the averages of the weights."""

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..config import Config, PretrainConfig
from ..errors import UserError, reason, shown
from ..models import MAE, NETWORKS
from .distributed import Ranks, shard

GATHERED = states.StateDictOptions(full_state_dict=True, cpu_offload=True)  # The whole of it is on the host of rank 0.
WHOLE = states.StateDictOptions(full_state_dict=True)


def _average(decay: float, *weights: Any) -> None:
    get_ema_multi_avg_fn(decay)(*weights)  # What it returns cannot be pickled, and a trainer can.


@contextmanager
def compiling(compiled: bool) -> Iterator[None]:
    """Inside, networks are called, which may be ``compiled``: torch begins that then, and where it fails, UserError is
    raised."""
    if not compiled:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException  # It takes a second to import.

    try:
        yield
    except TorchDynamoException as error:
        cause = shown(reason(getattr(error, "inner_exception", error)))
        advice = "install a C++ compiler such as g++ and Python's headers, or set step.compile=false"
        raise UserError(f"step.compile is true, but torch cannot compile here ({cause}): {advice}") from error


class TrainedWeights:
    """The weights of a network, moved to ``device``, with their optimizer and an average for each decay.

    They are whole on each of the ``ranks`` (DDP), or with ``config.step.fsdp`` in shards (FSDP2). ``distributed`` is
    what a training step calls in place of ``model``. What else learns has an optimizer ``beside`` this one, without
    weight decay, clipping and average. ``step`` counts the steps taken, and the 0-d tensor
    ``skipped_steps`` those whose loss or gradient was not finite.
    """

    def __init__(self, model: nn.Module, config: Config | PretrainConfig, ranks: Ranks, device: torch.device) -> None:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(f"the network {type(model).__name__} has no parameters to train, expected at least one")
        self.model, self.config, self.steps = model.to(device), config.optimizer, config.train.steps
        decays, self.averages = config.optimizer.ema_decay, dict[float, AveragedModel]()
        for decay in decays if isinstance(decays, list) else [decays]:
            with torch.device("cpu"):  # It counts on the default device, and each step looks at that.
                average = AveragedModel(model, multi_avg_fn=partial(_average, decay))
            self.averages[decay] = average.requires_grad_(False)
        self.distributed, self.blank = model, None
        if config.step.fsdp and ranks.group is not None:
            # The gathered weights of an average that is in shards go into this copy.
            self.blank = copy.deepcopy(model).cpu().requires_grad_(False).eval()
            for module in (model, *(average.module for average in self.averages.values())):
                shard(module, ranks)
        elif ranks.group is not None:
            # A step need not use all parameters of a user's own network; it is no mistake if it does.
            warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
            is_ours = isinstance(model, (*NETWORKS.values(), MAE))
            self.distributed = DistributedDataParallel(
                model, process_group=ranks.group, find_unused_parameters=not is_ours, gradient_as_bucket_view=True
            )
        rate, decay = self.config.learning_rate, self.config.weight_decay
        self.optimizer = torch.optim.AdamW(model.parameters(), rate, (0.9, 0.95), weight_decay=decay, fused=True)
        self.optimizers = [self.optimizer]
        self.beside: nn.Parameter | None = None
        self.ranks, self.step = ranks, 0
        self.skipped_steps = torch.zeros((), dtype=torch.long, device=device)

    def learn_beside(self, parameter: nn.Parameter) -> None:
        """Have this parameter, which is whole on every rank, learn beside the network, at the same rate."""
        rate, self.beside = self.config.learning_rate, parameter
        self.optimizers.append(torch.optim.AdamW([parameter], rate, (0.9, 0.95), weight_decay=0.0, fused=True))

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def learning_rate(self, step: int) -> float:
        """The rate of step n = 0, 1, …: it rises linearly over the warm-up, then stays or falls along a half cosine."""
        factor = min(1.0, (step + 1) / max(self.config.warmup_steps, 1))
        if self.config.cosine_decay:
            factor *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        return self.config.learning_rate * factor

    def update(self, loss: Tensor) -> Tensor:
        """Take one step with the gradients that are there, average the weights, and return the gradient's norm, 0-d.

        Gradients are clipped after that. Where ``loss`` (0-d) or the gradient is not finite, weights and optimizer stay
        as they are. Nothing is read on the host.
        """
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        skipped = ~(loss + grad_norm).isfinite()
        if self.beside is not None and self.beside.grad is not None:
            self.beside.grad = self.ranks.sum(self.beside.grad) / self.ranks.size  # DDP knows nothing of it.
            skipped |= ~self.beside.grad.isfinite().all()
        for optimizer in self.optimizers:
            optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]  # torch.amp.GradScaler tells it so.
            optimizer.param_groups[0]["lr"] = self.learning_rate(self.step)
            optimizer.step()
        self.skipped_steps += skipped
        for average in self.averages.values():
            average.update_parameters(self.model)
        self.step += 1
        return grad_norm

    def average(self, decay: float) -> nn.Module:
        """The network with the averaged weights of that decay, all of them on each rank. All ranks call this."""
        average = self.averages[decay].module
        if self.blank is None:
            return average
        self.blank.load_state_dict(states.get_model_state_dict(average, options=WHOLE))
        return self.blank.to(self.skipped_steps.device)

    def state_dict(self) -> dict[str, Any]:
        """Weights, averages, optimizer and counts, whole and on the host, on rank 0. All ranks call this."""
        averages = {}
        for decay, average in self.averages.items():
            weights = states.get_model_state_dict(average.module, options=GATHERED)
            averages[str(decay)] = {"count": int(average.n_averaged), "weights": weights}
        moments: Any = {}
        if self.optimizer.state:  # There is none before the first step.
            moments = states.get_optimizer_state_dict(self.model, self.optimizer, options=GATHERED)
        return {
            "model": states.get_model_state_dict(self.model, options=GATHERED), "averages": averages,
            "optimizer": moments.get("state", {}), "skipped_steps": int(self.skipped_steps), "step": self.step,
            "beside": self.beside is not None and [self.beside.detach().cpu(), self.optimizers[1].state_dict()],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, which every rank has whole, with the rates and weight decay of this run."""
        for decay, average in self.averages.items():
            saved = state["averages"][str(decay)]
            states.set_model_state_dict(average.module, saved["weights"], options=WHOLE)
            average.n_averaged.fill_(saved["count"])
        states.set_model_state_dict(self.model, state["model"], options=WHOLE)
        if state["optimizer"]:
            own: Any = states.get_optimizer_state_dict(self.model, self.optimizer, options=WHOLE)
            own["state"] = state["optimizer"]
            states.set_optimizer_state_dict(self.model, self.optimizer, own, options=WHOLE)
        if self.beside is not None and state.get("beside"):  # The run may have begun without.
            self.beside.data.copy_(state["beside"][0])
            self.optimizers[1].load_state_dict(state["beside"][1])
        self.skipped_steps.fill_(state["skipped_steps"])
        self.step = state["step"]
