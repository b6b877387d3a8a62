"""AdamW as the release has it, its schedule and the averages of the weights, of parameters whole or in shards."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

BETAS = (0.9, 0.95)


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """Of all parameters, fused."""
    return torch.optim.AdamW(model.parameters(), learning_rate, BETAS, weight_decay=weight_decay, fused=True)


def average_of(model: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of its weights, which no gradient reaches."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).requires_grad_(False)


def warmup_then_cosine(
    optimizer: torch.optim.Optimizer, warmup_steps: int, decay_steps: int | None
) -> torch.optim.lr_scheduler.LambdaLR:
    """Factor of the learning rate at step n = 0, 1, …: min(1, (n + 1)/warmup_steps), times a half cosine to 0."""

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / max(warmup_steps, 1))
        if decay_steps is None:
            return warmup
        return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, step / decay_steps)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def clip_and_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler, loss: Tensor, max_grad_norm: float
) -> tuple[Tensor, Tensor]:
    """One step of the schedule and, if ``loss`` (0-d) and gradient are finite, of a fused optimizer.

    Returns:
        The norm of the gradient before clipping, and whether weights and optimizer were left as they are; 0-d. Nothing
        is read on the host.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    skip = ~(loss + grad_norm).isfinite()
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]  # as torch.amp.GradScaler tells it
    optimizer.step()
    scheduler.step()
    return grad_norm, skip


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by names of parameters, in shards where these are; zeros before the first step."""
    fresh = not optimizer.state
    state = cast(dict[str, Any], get_optimizer_state_dict(model, optimizer)["state"])
    if fresh:  # it was made by a step that changed nothing but was counted
        for of_parameter in optimizer.state.values():
            of_parameter["step"].zero_()
    return state


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Continue from :func:`optimizer_state` of an optimizer with the same settings."""
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups})


def load_schedule(scheduler: LRScheduler, state: dict[str, Any]) -> None:
    """Continue from the scheduler's ``state_dict``, its optimizer at the rates that it had."""
    scheduler.load_state_dict(state)
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
