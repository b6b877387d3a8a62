"""One big step in the memory of a small one: the loss of all labels, its gradient a few labels at a time.

The loss has statistics over all groups, so the sum of the parts' losses is another loss. As in GradCache (Gao et al.,
arXiv 2101.06983), the features of every part are computed first, without what their gradients would need; then the
loss of all of them and its gradient by them, at once; then each part again, with its share of that gradient.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..models import DriftingLoss
from ..models.drifting_loss import split_groups
from ..models.feature_extractor import FeatureMaps
from .groups import Groups


def backward_in_parts(
    loss_fn: DriftingLoss,
    generate: Callable[[slice], Tensor],
    groups: Groups,
    labels_per_part: int,
    share: float,
    backward_part: Callable[[bool], AbstractContextManager[None]],
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Add the gradient of the loss to the generator's parameters, as ``(loss * share).backward()`` would.

    Args:
        generate: makes the samples ``[l, G, *sample_shape]`` of a slice of the L labels, the same ones each time.
        groups: the real samples of the L labels.
        labels_per_part: this many labels' activations of generator and extractor are held at once.
        backward_part: surrounds a part's forward and backward; it is told whether the part is the last.

    Returns:
        The generated samples ``[L, G, *sample_shape]``, the loss, and what it reports, all detached.
    """
    L, P = groups.pos.shape[:2]
    fixed = groups.pos if groups.uncond is None else torch.cat([groups.pos, groups.uncond], 1)  # [L, P + U, …]
    weight = fixed.new_ones(L) if groups.weight is None else groups.weight
    parts = [slice(at, at + labels_per_part) for at in range(0, L, labels_per_part)]
    with torch.no_grad():
        samples = [generate(part) for part in parts]
        gen = _joined([loss_fn.groups(of_part) for of_part in samples])
        pos, neg = split_groups(_joined([loss_fn.groups(fixed[part]) for part in parts]), P)
    # Memory's peak is here: the features of all labels, each once, and the gradients.
    leaves = [groups_of_map.requires_grad_() for groups_of_map in gen.values()]
    loss, info = loss_fn.of_groups(gen, pos, neg, weight.unsqueeze(1).expand(-1, fixed.shape[1] - P))
    gradients = dict(zip(gen, torch.autograd.grad(loss * share, leaves), strict=True))
    for part in parts:
        with backward_part(part is parts[-1]):
            maps = loss_fn.groups(generate(part))
            rows = [gradients[name].unflatten(0, (L, -1))[part].flatten(0, 1) for name in maps]
            torch.autograd.backward(list(maps.values()), rows)
    return torch.cat(samples), loss.detach(), info


def _joined(parts: list[FeatureMaps]) -> FeatureMaps:
    """The maps of all labels; those of the parts are freed map by map."""
    return {name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0])}
