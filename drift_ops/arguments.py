"""Checks of what users pass. Every message names the argument, what was received and what is expected."""

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

# Of widths and temperatures. Their squares and inverses are float32 numbers, so that no distance of 0 over one is NaN.
LEAST, MOST = 1e-12, 1e12

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensor(name: str, value: object) -> Tensor:
    """``value`` as a floating-point tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: got {type(value).__name__}, expected a torch.Tensor (torch.as_tensor converts arrays)"
        )
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{name}: got dtype {value.dtype}, expected a floating one: float64, float32, bfloat16 or float16"
        )
    if value.is_nested or value.layout != torch.strided:
        raise TypeError(f"{name}: got a nested or {value.layout} tensor, expected a dense one (to_dense() makes it)")
    return value


def check_points(
    name: str,
    value: object,
    like: Tensor | None = None,
    like_name: str = "",
    *,
    least_rank: int = 2,
    empty: bool = False,
    no_groups: bool = False,
) -> Tensor:
    """``value`` as points ``[..., count, D]`` that go with the points ``like``: same groups, D, dtype and device.

    With ``empty`` there may be no points, with ``no_groups`` no groups.
    """
    points = check_tensor(name, value)
    shape = points.shape
    if len(shape) < least_rank:
        layout = "[..., count, D]" if least_rank == 2 else "[G, count, D]"
        raise ValueError(f"{name}: got shape {tuple(shape)}, expected at least {least_rank} dimensions {layout}")
    *groups, count, D = shape
    if D == 0 or (count == 0 and not empty) or (0 in groups and not no_groups):
        raise ValueError(f"{name}: got shape {tuple(shape)}, expected at least one point of at least one dimension")
    if like is None:
        return points
    if shape[:-2] != like.shape[:-2] or D != like.shape[-1]:
        expected = [*map(str, like.shape[:-2]), "count", str(like.shape[-1])]
        raise ValueError(
            f"{name}: got shape {tuple(shape)}, expected [{', '.join(expected)}] to go with "
            f"{like_name} {tuple(like.shape)}"
        )
    check_same("dtype", name, points.dtype, like_name, like.dtype)
    check_same("device", name, points.device, like_name, like.device)
    return points


def check_weights(name: str, value: object, points: Tensor, points_name: str) -> Tensor | None:
    """``value`` as one weight a point, or None."""
    if value is None:
        return None
    weights = check_tensor(name, value)
    if weights.shape != points.shape[:-1]:
        expected = tuple(points.shape[:-1])
        raise ValueError(
            f"{name}: got shape {tuple(weights.shape)}, expected {expected}, one weight for each of {points_name}"
        )
    check_same("device", name, weights.device, points_name, points.device)
    return weights


def check_same(what: str, name: str, got: object, like_name: str, expected: object) -> None:
    """``got`` equals ``expected``, which is what the argument ``like_name`` has."""
    if got != expected:
        raise ValueError(f"{name}: got {what} {got}, expected {expected}, the {what} of {like_name}")


def check_positive(name: str, value: object) -> float:
    """``value`` as a float of at least ``LEAST`` and at most ``MOST``."""
    if type(value) is float and LEAST <= value <= MOST:
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected a positive float")
    number = _as_float(value)
    if not LEAST <= number <= MOST:
        raise ValueError(f"{name}: got {number}, expected a number above 0, from {LEAST} to {MOST}")
    return number


def check_flag(name: str, value: object) -> bool:
    """``value`` as True or False, for which nothing else is taken."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected True or False")
    return value


def check_positives(name: str, values: object) -> tuple[float, ...]:
    """``values`` as a non-empty sequence of such floats."""
    if isinstance(values, (str, bytes, bytearray)) or not isinstance(values, (tuple, list, Sequence)):
        raise TypeError(
            f"{name}: got {values!r} ({type(values).__name__}), expected a list or tuple of positive floats"
        )
    if len(values) == 0:
        raise ValueError(f"{name}: got an empty sequence, expected at least one positive float")
    if all([type(value) is float and LEAST <= value <= MOST for value in values]):
        return tuple(values)  # Most are, and the smallest calls take 50 µs.
    return tuple(check_positive(f"{name}[{i}]", value) for i, value in enumerate(values))


def check_widths(name: str, values: object, like: Tensor) -> tuple[tuple[float, ...], Tensor | None]:
    """Widths as floats and None; those of a tensor ``[n]``, or 0-d, as so many times 1.0 and the tensor ``[n]``.

    The tensor, in float64 and where ``like`` is, may learn; its values are looked at where that costs nothing.
    """
    if not isinstance(values, Tensor):
        return check_positives(name, values), None
    check_tensor(name, values)
    if values.dim() > 1 or values.numel() == 0:
        raise ValueError(f"{name}: got shape {tuple(values.shape)}, expected [n], one positive number for each")
    if known_here(values) and not bool(((values >= LEAST) & (values <= MOST)).all()):
        raise ValueError(f"{name}: got {values.tolist()}, expected numbers above 0, from {LEAST} to {MOST}")
    return (1.0,) * values.numel(), values.to(like.device, torch.float64).reshape(-1)


def known_here(values: Tensor) -> bool:
    """Whether the values can be looked at without waiting for a device, and are no tracer's."""
    return (
        values.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(values) in (Tensor, torch.nn.Parameter)
        and not torch._C._are_functorch_transforms_active()
    )


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """``value`` as one of the words of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")
    return value


def check_count(name: str, value: object) -> int:
    """``value`` as an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected an int of at least 1")
    if value < 1:
        raise ValueError(f"{name}: got {value}, expected at least 1")
    return value


def check_amount(name: str, value: object) -> float:
    """``value`` as a finite float of at least 0, where True and False are taken too."""
    if not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected True, False or a number from 0")
    if not 0 <= _as_float(value) < math.inf:
        raise ValueError(f"{name}: got {value}, expected True, False or a finite number from 0")
    return float(value)


def check_floor(value: object) -> float:
    """``affinity_floor`` as a float in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"affinity_floor: got {value!r} ({type(value).__name__}), expected a float in [0, 1)")
    number = _as_float(value)
    if not 0 <= number < 1:
        raise ValueError(f"affinity_floor: got {number}, expected a number in [0, 1)")
    return number


def _as_float(value: Real) -> float:
    """``value`` as a float, infinity where there is none that large."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
