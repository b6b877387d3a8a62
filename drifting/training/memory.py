"""What the steps of a run need of memory on each rank, told before the first."""

import math
import sys
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from ..generation import evaluating
from ..utils.memory import format_bytes, free_memory
from .groups import PairGroups
from .trainer import DriftingTrainer

MOST_TOLD = 5  # So many of the things that memory is needed for are named.


def tell_memory(trainer: DriftingTrainer) -> None:
    """Say in one line on stderr what a step will need, most of it for what, and what to do where there is less. All
    ranks call this."""
    needs = memory_needed(trainer)
    there = free_memory(trainer.device) + sum(needs[name] for name in ("parameters", "averages", "feature extractor"))
    total = needs.pop("in all")
    most = sorted(needs.items(), key=lambda of_name: -of_name[1])[:MOST_TOLD]
    words = ", ".join(f"{name} {format_bytes(size)}" for name, size in most)
    line = f"a step needs about {format_bytes(total)} of the {format_bytes(there)} that a process has: {words}, …"
    if total > there:
        line += " (lower step.labels_at_once, set step.activation_checkpointing or step.fsdp, or take more processes)"
    if trainer.ranks.main:
        print(line, file=sys.stderr)


def memory_needed(trainer: DriftingTrainer) -> dict[str, int]:
    """Bytes on this rank by what they are for, and ``in all`` those at the peak of a step. All ranks call this.

    Feature maps, and what the operator keeps beside them, are of all the rank's labels. A step in parts
    (``step.labels_at_once``) lets go of them before the gradient of the first part, so that they are never there beside
    the ``activations``: what the gradient of a part needs, or else of the whole, of which maps of generated samples
    are part. With ``torch.compile`` a step keeps less than is counted here.
    """
    step, model, encoder = trainer.config.step, trainer.model, trainer.loss_fn.feature_extractor
    weights, learning = _bytes(model.parameters()), _bytes(p for p in model.parameters() if p.requires_grad)
    size, G, P, M = _counts(trainer)
    labels = math.ceil(size / trainer.ranks.size)
    at_once = min(labels, step.labels_at_once or labels)
    of_sample = sum(trainer.layout.sizes) * trainer.layout.dtype.itemsize
    generated, maps = labels * G * of_sample, labels * (G + P + M) * of_sample
    operator, (two, four) = labels * _kept_by_operator(trainer, G, P, M), (_kept(trainer, num) for num in (2, 4))
    activations = two + (four - two) * (at_once * G - 2) // 2
    lasting = {
        "parameters": weights, "gradients": learning, "optimizer": 2 * learning,
        "averages": len(trainer.weights.averages) * (weights + _bytes(model.buffers())),
        "feature extractor": _bytes([*encoder.parameters(), *encoder.buffers()]), "queue": _queue(trainer),
    }  # fmt: skip
    passing = {"feature maps": maps, "their gradients": generated, "operator": operator, "activations": activations}
    beside = 0 if at_once < labels else activations - generated
    peak = generated + max(maps + operator + beside, activations)
    return lasting | passing | {"in all": sum(lasting.values()) + peak}


def _counts(trainer: DriftingTrainer) -> tuple[int, int, int, int]:
    """How many groups a step has on all ranks; how many generated samples, positives and negatives one has at most."""
    step, drift = trainer.config.step, trainer.loss_fn.drift
    G = step.gen_per_pair if step.groups == "pairs" else step.gen_per_label
    second = 0 if drift is None or drift["field"].include_self else G  # Another batch of generated samples repels.
    if step.groups == "pairs":
        return trainer.config.train.batch_size, G, 1, second
    uncond = step.uncond_per_label if trainer.config.guidance.cfg_scale_range[1] > 1 else 0
    return step.labels_per_step, G, step.pos_per_label, second + uncond


def _queue(trainer: DriftingTrainer) -> int:
    """Bytes of the queue of real samples and of their features, where it is on the trainer's device."""
    step = trainer.config.step
    if step.groups == "pairs" or step.queue_device not in (None, trainer.device.type):
        return 0
    slots = len(trainer.groups.class_names or (0,)) * step.queue_size + step.unconditional_queue_size
    features = sum(trainer.layout.sizes) * trainer.layout.dtype.itemsize if step.queue_features else 0
    return slots * (math.prod(trainer.sample_shape) * trainer.groups.dtype.itemsize + features)


def _kept_by_operator(trainer: DriftingTrainer, G: int, P: int, M: int) -> int:
    """Bytes that the operator keeps of one group for its gradient, beside the maps; it is tried on maps of zeros."""
    layout, zeros = trainer.layout, partial(torch.zeros, device=trainer.device)
    gen, pos, neg = (
        {name: zeros(1, num, T, D, dtype=layout.dtype).transpose(1, 2) for name, (T, D) in layout.places.items()}
        for num in (G, P, M)
    )
    kept = _Kept()
    with saved_tensors_hooks(kept.note, kept.note):
        leaves = {name: of_map.requires_grad_() for name, of_map in gen.items()}
        trainer.loss_fn.of_groups(leaves, pos, neg, zeros(1))
    return kept.beside([*gen.values(), *pos.values(), *neg.values()])


def _kept(trainer: DriftingTrainer, num: int) -> int:
    """Bytes that network and extractor keep of ``num`` samples of a group for their gradient, beside the weights; maps
    are among them."""
    model, signature, loss_fn, device = trainer.model, trainer.signature, trainer.loss_fn, trainer.device
    groups, kept = trainer.groups, _Kept()
    condition = torch.zeros(1, dtype=torch.long)
    if isinstance(groups, PairGroups) and groups.example is not None:
        condition = groups.example[:1]
    drawn = signature.draw(model, num, torch.Generator(device).manual_seed(0), device)
    with evaluating(model), torch.compiler.set_stance("force_eager"), saved_tensors_hooks(kept.note, kept.note):
        with torch.autocast(device.type, torch.bfloat16, enabled=trainer.config.step.bf16):
            samples = signature.call(model, drawn, condition, torch.ones(1)).float()
        for of_map in loss_fn.groups(samples.unsqueeze(0)).values():
            kept.note(of_map)
    return kept.beside([*model.parameters(), *loss_fn.parameters()])


class _Kept(dict[int, tuple[int, Tensor]]):
    """The storages of tensors that autograd keeps for a backward, by where they are, with their sizes in bytes."""

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self[storage.data_ptr()] = storage.nbytes(), tensor  # As long as it is here, no other gets its place.
        return tensor

    def beside(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of all but the storages of these."""
        others = {_local(tensor).untyped_storage().data_ptr() for tensor in tensors}
        return sum(size for place, (size, _) in self.items() if place not in others)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """What this rank has of them."""
    return sum(_local(t).nbytes for t in tensors)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
