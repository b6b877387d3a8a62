"""Labels and guidance scales as networks take them: checked, and once for all consecutive samples that share them."""

import torch
from torch import Tensor


def check_conditions(
    y: Tensor, cfg_scale: float | Tensor, batch_size: int, num_classes: int, device: torch.device
) -> Tensor:
    """The guidance scales, float32 ``[L]``, of the labels ``y [L]``, each of ``batch_size`` / L consecutive samples.

    ``cfg_scale`` is a number, or a tensor ``[]`` or ``[L]``. A wrong shape or dtype raises ValueError, and on the CPU a
    label from outside 0 … num_classes - 1 does.
    """
    # Networks ask for y.shape[0] rather than len(y), which torch.export would take for a constant.
    labels = y.shape[0] if y.ndim == 1 and y.shape[0] and batch_size % y.shape[0] == 0 else batch_size
    check_indices("y", y, (labels,), num_classes)
    # A tensor of one number is filled on the device, which copies nothing from the host.
    scale = cfg_scale if isinstance(cfg_scale, Tensor) else torch.full((), float(cfg_scale), device=device)
    if scale.shape not in ((), (labels,)):
        raise ValueError(f"cfg_scale has shape {list(scale.shape)}, expected a number or [{labels}], as the labels")
    return scale.to(device, torch.float32).expand(labels)


def check_indices(name: str, index: Tensor, shape: tuple[int, ...], size: int) -> None:
    """Raise ValueError unless ``index`` has integers 0 … size - 1 and ``shape``; only the CPU looks at the values."""
    if index.shape != shape or index.dtype not in (torch.int64, torch.int32):
        expected = f"an integer tensor of shape {list(shape)}"
        raise ValueError(f"{name} is {index.dtype} {list(index.shape)}, expected {expected}")
    if index.device.type == "cpu" and not torch.compiler.is_compiling() and index.numel():
        low, high = index.min().item(), index.max().item()
        if low < 0 or high >= size:
            raise ValueError(f"{name} has values from {low} to {high}, expected 0 … {size - 1}")
