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
        generate: images ``[l, G, C, H, W]`` of a slice of the L labels, the same ones each time.
        fixed: real images ``[L, P + U, C, H, W]``, the ``num_real`` = P of each label, then unconditional ones.
        weight: ``[L, U]``, of the unconditional images.
        labels_per_part: labels whose generator and extractor activations are held at once.
        share: factor of the gradient.
        backward_part: what a part's forward and backward are inside of, given whether it is the last.

    Returns:
        The generated images ``[L, G, C, H, W]``, the loss, and what it reports, all detached.
    """
    parts = [slice(at, at + labels_per_part) for at in range(0, len(fixed), labels_per_part)]
    images, gradients, loss, info = _loss_and_gradients(loss_fn, generate, fixed, num_real, weight, parts, share)
    for part in parts:
        with backward_part(part is parts[-1]):
            groups = loss_fn.groups(generate(part))
            rows = {name: gradient.unflatten(0, (len(fixed), -1))[part] for name, gradient in gradients.items()}
            torch.autograd.backward(list(groups.values()), [rows[name].flatten(0, 1) for name in groups])
    return images, loss, info


def _loss_and_gradients(
    loss_fn: DriftingLoss,
    generate: Callable[[slice], Tensor],
    fixed: Tensor,
    num_real: int,
    weight: Tensor,
    parts: list[slice],
    share: float,
) -> tuple[Tensor, FeatureMaps, Tensor, dict[str, Tensor]]:
    """Generated images, ``share`` of the loss's gradient by each of their feature maps, the loss and what it reports.

    Memory's peak is here: the features of all labels, each once, and the gradients.
    """
    images = []
    gen: FeatureMaps = {}
    pos: FeatureMaps = {}
    neg: FeatureMaps = {}
    L = len(fixed)
    with torch.no_grad():
        for part in parts:
            images.append(generate(part))
            _put(loss_fn.groups(images[-1]), gen, part, L)
            real, uncond = split_groups(loss_fn.groups(fixed[part]), num_real)
            _put(real, pos, part, L)
            _put(uncond, neg, part, L)
    leaves = [groups.requires_grad_() for groups in gen.values()]
    loss, info = loss_fn.of_groups(gen, pos, neg, weight)
    gradients = dict(zip(gen, torch.autograd.grad(loss * share, leaves), strict=True))
    return torch.cat(images), gradients, loss.detach(), info


def _put(groups: FeatureMaps, whole: FeatureMaps, part: slice, num_labels: int) -> None:
    """Copy the groups of some labels to their place among those of all labels, which is made where there is none."""
    for name, of_part in groups.items():
        locations = of_part.shape[0] // len(range(num_labels)[part])
        if name not in whole:
            whole[name] = of_part.new_empty(num_labels * locations, *of_part.shape[1:])
        start = part.start * locations
        whole[name][start : start + len(of_part)] = of_part
