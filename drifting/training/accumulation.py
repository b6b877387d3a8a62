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


def backward_in_parts(
    loss_fn: DriftingLoss,
    generate: Callable[[slice], Tensor],
    fixed: Tensor,
    num_real: int,
    weight: Tensor,
    labels_per_part: int,
    share: float,
    backward_part: Callable[[bool], AbstractContextManager[None]],
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Add the gradient of the loss to the generator's parameters, as ``(loss * share).backward()`` would.

    Args:
        loss_fn: the loss.
        generate: makes the samples ``[l, G, *sample_shape]`` of a slice of the L labels, the same ones each time.
        fixed: real samples ``[L, P + U, *sample_shape]``, the ``num_real`` = P of each label before unconditional ones.
        num_real: the number P.
        weight: the weights ``[L, U]`` of the unconditional samples.
        labels_per_part: labels whose generator and extractor activations are held at once.
        share: factor of the gradient.
        backward_part: surrounds a part's forward and backward; it is told whether the part is the last.

    Returns:
        The generated samples ``[L, G, *sample_shape]``, the loss, and what it reports, all detached.
    """
    L = len(fixed)
    parts = [slice(at, at + labels_per_part) for at in range(0, L, labels_per_part)]
    samples: list[Tensor] = []
    gen: FeatureMaps = {}
    pos: FeatureMaps = {}
    neg: FeatureMaps = {}
    with torch.no_grad():
        for part in parts:
            samples.append(generate(part))
            real, uncond = split_groups(loss_fn.groups(fixed[part]), num_real)
            for whole, groups in ((gen, loss_fn.groups(samples[-1])), (pos, real), (neg, uncond)):
                _put(groups, whole, part, L)
    # Memory's peak is here: the features of all labels, each once, and the gradients.
    leaves = [groups.requires_grad_() for groups in gen.values()]
    loss, info = loss_fn.of_groups(gen, pos, neg, weight)
    gradients = dict(zip(gen, torch.autograd.grad(loss * share, leaves), strict=True))
    for part in parts:
        with backward_part(part is parts[-1]):
            groups = loss_fn.groups(generate(part))
            rows = {name: gradient.unflatten(0, (L, -1))[part] for name, gradient in gradients.items()}
            torch.autograd.backward(list(groups.values()), [rows[name].flatten(0, 1) for name in groups])
    return torch.cat(samples), loss.detach(), info


def _put(groups: FeatureMaps, whole: FeatureMaps, part: slice, num_labels: int) -> None:
    """Copy the groups of some labels to their place among those of all labels, which is made where there is none."""
    for name, of_part in groups.items():
        locations = of_part.shape[0] // len(range(num_labels)[part])
        if name not in whole:
            whole[name] = of_part.new_empty(num_labels * locations, *of_part.shape[1:])
        start = part.start * locations
        whole[name][start : start + len(of_part)] = of_part
