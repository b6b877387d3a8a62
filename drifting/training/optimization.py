"""A network's weights in training: AdamW as the release has it, its schedule, and the averages of the weights."""

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..config.schema import AdamWConfig
from .distributed import Ranks, replicate, shard

BETAS = (0.9, 0.95)
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)  # The whole of it is on the host of rank 0.
WHOLE = StateDictOptions(full_state_dict=True)


class TrainedWeights:
    """The weights of a network, their optimizer and their averages, whole on each rank or in shards.

    Args:
        model: the network, which is moved to ``device``.
        config: the learning rate with its schedule, the weight decay and the clipping of gradients.
        decays: of the averages, as many as there are decays.
        steps: the length of the run, over which ``config.cosine_decay`` lowers the rate to 0.
        ranks: the processes that train together.
        device: where the weights are.
        sharded: whether each rank keeps a shard of weights, averages and optimizer (FSDP2) in place of the whole (DDP).

    ``distributed`` is what a training step calls in place of ``model``. ``step`` counts the steps taken, and the 0-d
    tensor ``skipped_steps`` those whose loss or gradient was not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        config: AdamWConfig,
        decays: Sequence[float],
        steps: int,
        ranks: Ranks,
        device: torch.device,
        sharded: bool = False,
    ) -> None:
        self.model, self.config, self.steps = model.to(device), config, steps
        average = {decay: get_ema_multi_avg_fn(decay) for decay in decays}
        self.averages = {
            decay: AveragedModel(model, multi_avg_fn=function).requires_grad_(False)
            for decay, function in average.items()
        }
        self.blank: nn.Module | None = None  # It takes the gathered weights of an average that is in shards.
        if sharded and ranks.group is not None:
            self.blank = copy.deepcopy(model).cpu().requires_grad_(False).eval()
            for module in (model, *(average.module for average in self.averages.values())):
                shard(module, ranks)
        self.distributed = model if self.blank is not None else replicate(model, ranks)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), config.learning_rate, BETAS, weight_decay=config.weight_decay, fused=True
        )
        self.step = 0
        self.skipped_steps = torch.zeros((), dtype=torch.long, device=device)

    def learning_rate(self, step: int) -> float:
        """The rate of step n = 0, 1, …: it rises linearly over the warm-up, then stays or falls along a half cosine."""
        factor = min(1.0, (step + 1) / max(self.config.warmup_steps, 1))
        if self.config.cosine_decay:
            factor *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        return self.config.learning_rate * factor

    def update(self, loss: Tensor) -> Tensor:
        """Take one step with the gradients that are there, and average the weights.

        Where ``loss`` (0-d) or the gradient is not finite, weights and optimizer stay as they are. Nothing is read on
        the host.

        Returns:
            The norm of the gradient before clipping, 0-d.
        """
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        skipped = ~(loss + grad_norm).isfinite()
        self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]  # torch.amp.GradScaler tells it so.
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.optimizer.step()
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
        with torch.no_grad():
            self.blank.load_state_dict(get_model_state_dict(average, options=WHOLE))
        return self.blank.to(self.skipped_steps.device)

    def state_dict(self) -> dict[str, Any]:
        """Weights, averages, optimizer and counts, whole and on the host, on rank 0. All ranks call this."""
        return {
            "model": get_model_state_dict(self.model, options=GATHERED),
            "averages": {
                str(decay): {
                    "count": int(average.n_averaged),
                    "weights": get_model_state_dict(average.module, options=GATHERED),
                }
                for decay, average in self.averages.items()
            },
            "optimizer": self._optimizer_state(),
            "skipped_steps": int(self.skipped_steps),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, of which every rank has the whole.

        Rates and weight decay are those of this object's own configuration.
        """
        for decay, average in self.averages.items():
            saved = state["averages"][str(decay)]
            set_model_state_dict(average.module, saved["weights"], options=WHOLE)
            average.n_averaged.fill_(saved["count"])
        set_model_state_dict(self.model, state["model"], options=WHOLE)
        if state["optimizer"]:
            groups = get_optimizer_state_dict(self.model, self.optimizer, options=WHOLE)["param_groups"]
            saved_optimizer: dict[str, Any] = {"state": state["optimizer"], "param_groups": groups}
            set_optimizer_state_dict(self.model, self.optimizer, saved_optimizer, options=WHOLE)
        self.skipped_steps.fill_(state["skipped_steps"])
        self.step = state["step"]

    def _optimizer_state(self) -> dict[str, Any]:
        """The moments by the names of the parameters, which there are none of before the first step."""
        if not self.optimizer.state:
            return {}
        state = get_optimizer_state_dict(self.model, self.optimizer, options=GATHERED)
        return cast(dict[str, Any], state.get("state", {}))
