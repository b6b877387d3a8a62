"""One big step in the memory of a small one: the loss of all labels, its gradient a few labels at a time.

The loss has statistics over all groups, so the sum of the parts' losses is another loss. As in GradCache (Gao et al.,
arXiv 2101.06983), the features of every part are computed first, without what their gradients would need; then the
loss of all of them and its gradient by them, at once; then each part again, with its share of that gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..models import DriftingLoss
from ..models.feature_extractor import FeatureMaps


def backward_in_parts(
    loss_fn: DriftingLoss,
    generate: Callable[[slice], Tensor],
    fixed: Tensor,
    num_real: int,
    weight: Tensor,
    labels_per_part: int,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Add the gradient of the loss to the generator's parameters, as ``loss.backward()`` in one step would.

    Args:
        loss_fn: the loss.
        generate: images ``[l, G, C, H, W]`` of a slice of the L labels, the same ones each time.
        fixed: real images ``[L, P + U, C, H, W]``, the ``num_real`` = P of each label, then unconditional ones.
        weight: ``[L, U]``, of the unconditional images.
        labels_per_part: labels whose generator and extractor activations are held at once.

    Returns:
        The generated images ``[L, G, C, H, W]``, the loss, and what it reports, all detached.
    """
    parts = [slice(at, at + labels_per_part) for at in range(0, len(fixed), labels_per_part)]
    with torch.no_grad():
        images = [generate(part) for part in parts]
        gen = _joined([loss_fn.groups(image) for image in images])
        real = _joined([loss_fn.groups(fixed[part]) for part in parts])
    leaves = {name: groups.requires_grad_() for name, groups in gen.items()}
    loss, info = loss_fn.of_groups(leaves, real, num_real, weight)
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    L = len(fixed)
    for part in parts:
        groups = loss_fn.groups(generate(part))
        rows = {name: gradient.unflatten(0, (L, -1))[part].flatten(0, 1) for name, gradient in gradients.items()}
        torch.autograd.backward(list(groups.values()), [rows[name] for name in groups])
    return torch.cat(images), loss.detach(), info


def _joined(parts: list[FeatureMaps]) -> FeatureMaps:
    """The groups of all parts, label after label."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
