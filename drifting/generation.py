"""Samples from any trained network, one forward pass each.

A network is any ``nn.Module`` that is called as ``net(z)``, ``net(z, y)`` or ``net(z, y, cfg_scale)``: with Gaussian
noise, labels and guidance scales. Noise and samples may have any shapes, which need not be alike.
"""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import reason, shown, some_of

# An optional argument is given only where it is called so …
LABEL_NAMES = ("y", "label", "labels", "condition", "class_label", "class_labels", "classes", "cond")
SCALE_NAMES = ("cfg_scale", "scale", "guidance", "alpha", "guidance_scale", "cfg")  # … or so.

ClassNames = tuple[int | str, ...]
Labels = Tensor | Sequence[int] | Sequence[str]


@dataclass(frozen=True)
class Signature:
    """How a network is called: the shape of one sample's noise, and how many of label and guidance scale it takes.

    A network with an attribute ``conditions_once``, which is true, takes them once for all consecutive samples that
    share them, ``[L]``; others take them for each sample, ``[B]``.
    """

    noise_shape: tuple[int, ...]
    conditions: int
    conditions_once: bool = False

    @classmethod
    def of(cls, model: nn.Module, noise_shape: Sequence[int] | int | None = None) -> "Signature":
        """Read the signature of ``model``, whose attribute ``noise_shape`` is used where none is given.

        It raises ValueError where both are missing, or the network does not take one to three tensors.
        """
        if not isinstance(model, nn.Module):
            raise ValueError(f"the network is {shown(model)}, expected an instance of torch.nn.Module")
        model = unwrapped(model)
        name, shape = type(model).__name__, getattr(model, "noise_shape", None) if noise_shape is None else noise_shape
        if shape is None:
            raise ValueError(
                f"the network {name} does not say what noise it takes: give it an attribute noise_shape, "
                "or pass noise_shape=(64,) for vectors of 64 numbers"
            )
        signature = inspect.signature(model.forward)
        taken = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if not taken or sum(p.default is p.empty for p in taken) > 3:
            expected = "(z), (z, y) or (z, y, cfg_scale)"
            if hasattr(model, "draw_extra"):
                expected += ", and what its draw_extra returns after *"
            raise ValueError(f"the network {name} takes {shown(str(signature))}, expected {expected}")
        conditions = 0
        for parameter, optional_names in zip(taken[1:], (LABEL_NAMES, SCALE_NAMES), strict=False):
            if parameter.default is not parameter.empty and parameter.name not in optional_names:
                break
            conditions += 1
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"noise_shape is {shape!r}, expected sizes of 1 or more such as (64,) or (3, 32, 32)")
        return cls(sizes, conditions, bool(getattr(model, "conditions_once", False)))

    def draw(self, model: nn.Module, num: int, generator: torch.Generator | None, device: Any) -> dict[str, Tensor]:
        """All that is random in ``num`` samples: noise ``z [num, *noise_shape]``, and by name whatever else, such as
        style codes, ``model`` draws in a method ``draw_extra(num, generator, device)``, which few networks have."""
        drawn = {"z": torch.randn(num, *self.noise_shape, generator=generator, device=device, dtype=torch.float32)}
        draw_extra: Any = getattr(model, "draw_extra", None)
        return drawn if draw_extra is None else drawn | draw_extra(num, generator, device)

    def call(self, model: nn.Module, drawn: dict[str, Tensor], y: Tensor, cfg_scale: Tensor) -> Tensor:
        """Samples ``[B, …]`` of what was drawn, all moved to where ``model`` is.

        Labels ``[L]`` or other conditions ``[L, …]``, and guidance scales, are each those of B/L consecutive samples.
        """
        device, dtype = _weight_of(model).device, _weight_of(model).dtype
        moved = {name: v.to(device, dtype if v.is_floating_point() else v.dtype) for name, v in drawn.items()}
        repeats = 1 if self.conditions_once else moved["z"].shape[0] // max(1, y.shape[0])
        y = y.to(device, dtype if y.is_floating_point() else y.dtype)
        conditions = [each.to(device) for each in (y, cfg_scale)[: self.conditions]]
        if repeats != 1:
            conditions = [each.repeat_interleave(repeats, 0) for each in conditions]
        return model(moved.pop("z"), *conditions, **moved)

    def sample_shape(self, model: nn.Module, y: Tensor) -> tuple[int, ...]:
        """The shape of one sample, which trial samples show, of two labels ``y [2]`` or other conditions ``[2, …]``.

        There is one of each, or two where the network takes labels once for all samples that share them. A network that
        cannot make them raises ValueError.
        """
        num = 4 if self.conditions_once else 2
        drawn = self.draw(model, num, torch.Generator().manual_seed(0), "cpu")
        taken = ", ".join(("z", "y", "cfg_scale")[: 1 + self.conditions])
        called = f"{type(unwrapped(model)).__name__} ({taken}) with z {list(drawn['z'].shape)}"
        if self.conditions and (y.ndim > 1 or y.any()):
            called += f" and y {y.tolist()}" if y.ndim == 1 else f" and conditions {list(y.shape)}"
        called += " (its conditions_once is true, so that each label is of two samples)" if self.conditions_once else ""
        try:
            with torch.no_grad(), evaluating(model):
                samples = self.call(model, drawn, y, torch.ones(2, device="cpu"))
        except Exception as error:  # A user's network may raise anything.
            raise ValueError(f"the network {called} fails: {reason(error)}") from error
        if not isinstance(samples, Tensor) or samples.shape[:1] != (num,):
            got = list(samples.shape) if isinstance(samples, Tensor) else type(samples).__name__
            raise ValueError(f"the network {called} returns {got}, expected a tensor [{num}, …]")
        if not samples.is_floating_point():
            raise ValueError(f"the network {called} returns {samples.dtype}, expected floating-point numbers")
        return tuple(samples.shape[1:])


def _weight_of(model: nn.Module) -> Tensor:
    """A tensor of the dtype and on the device that ``model`` computes with."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0, device="cpu"))


def unwrapped(model: nn.Module) -> nn.Module:
    """The network that ``torch.compile`` has wrapped, or ``model`` itself."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def move(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Move ``model`` to ``device``; it raises ValueError where that cannot be had."""
    try:
        return model.to(device)
    except (AssertionError, RuntimeError) as error:  # Without CUDA, torch raises the first.
        raise ValueError(f"device is {str(device)!r}, where the network cannot be moved: {reason(error)}") from error


@torch.no_grad()
def generate(
    model: nn.Module, batch_size: int, y: Tensor | Sequence[int] | None = None, cfg_scale: float | Tensor = 1.0,
    device: torch.device | str | None = None, generator: torch.Generator | None = None,
    noise_shape: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """Draw noise and generate samples ``[B, *sample_shape]`` in one forward pass, in evaluation mode.

    Args:
        model: the network.
        batch_size: the number of samples B.
        y: integer labels ``[B]``; None draws them uniformly from the network's ``num_classes``. Or what other
            conditions it takes, ``[B, …]``.
        cfg_scale: the guidance scale, a number or a tensor ``[B]``.
        device: the network is moved there first; by default it stays where it is.
        generator: all is drawn on its device, then moved, so that one CPU seed gives the same samples on every device.
        noise_shape: the shape of one sample's noise, where the network has no attribute of that name.

    It raises ValueError where the noise shape is unknown, or labels that the network takes, or a shape is another.
    """
    if device is not None:
        move(model, device)
    signature = Signature.of(model, noise_shape)
    source = _weight_of(model).device if generator is None else generator.device
    drawn = signature.draw(model, batch_size, generator, source)
    if y is None:
        num_classes = getattr(model, "num_classes", None if signature.conditions else 1)
        if num_classes is None:
            raise ValueError(f"the network {type(model).__name__} takes labels and has no num_classes: give labels y")
        y = torch.randint(num_classes, (batch_size,), generator=generator, device=source)
    y, scale = as_tensor(y), as_tensor(cfg_scale).float()
    for name, shape, shapes in (("y", y.shape[:1], [(batch_size,)]), ("cfg_scale", scale.shape, [(), (batch_size,)])):
        if shape not in shapes:
            raise ValueError(f"{name} has shape {list(shape)}, expected [{batch_size}], one for each sample")
    with evaluating(model):
        return signature.call(model, drawn, y, scale.expand(batch_size))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is in evaluation mode; afterwards each of its parts is in its mode of before."""
    in_training = [module for module in model.modules() if module.training]
    if in_training:  # Telling all parts of a small network takes a tenth of the time that a sample does.
        model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


@dataclass(frozen=True)
class Generator:
    """A trained network, in evaluation mode, and what is known of its samples."""

    model: nn.Module
    noise_shape: tuple[int, ...]  # This is the shape of one sample's noise …
    sample_shape: tuple[int, ...]  # … and this of one sample.
    class_names: ClassNames = (0,)  # Labels 0, 1, … are called so; integers are what they were called in training.
    pixel_range: tuple[float, float] | None = None  # Images have these values of black and white, and none beyond.
    latent: bool = False  # Samples are latents of the Stable Diffusion VAE, which decode to images of that range.
    data: str = ""  # The data set has this name.
    step: int = 0  # The network was trained for this many steps.
    cfg_scale: float = 1.0  # Samples have this guidance scale by default: the one that evaluated best, if any was.
    name: str = ""  # This name of ours, or module:Name, builds the network …
    arguments: Mapping[str, Any] = field(default_factory=dict)  # … with these arguments, which are values of JSON.
    condition_shape: tuple[int, ...] | None = None  # It takes conditions of this shape in place of labels, if any.

    @property
    def makes_images(self) -> bool:
        """Whether samples are images [1 or 3, H, W], or decode to them."""
        is_image = len(self.sample_shape) == 3 and self.sample_shape[0] in (1, 3)
        return self.pixel_range is not None and (self.latent or is_image)

    def generate(
        self, batch_size: int, y: Labels | None = None, cfg_scale: float | Tensor | None = None,
        device: torch.device | str | None = None, generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Samples ``[batch_size, *sample_shape]`` in one forward pass, see :func:`generate`.

        Labels ``y [batch_size]`` are called as in training; None draws them uniformly. Where training was by pair, they
        are conditions ``[batch_size, *condition_shape]``. None for ``cfg_scale`` is the generator's own.
        """
        source = None if generator is None else generator.device
        if self.condition_shape is not None:
            numbers, expected = as_tensor([] if y is None else y), (batch_size, *self.condition_shape)
            if numbers.shape != expected:
                raise ValueError(f"conditions are {list(numbers.shape)}, expected {list(expected)}, one a sample")
        elif y is None:
            numbers = torch.randint(len(self.class_names), (batch_size,), generator=generator, device=source or "cpu")
        else:
            numbers = class_numbers(y, self.class_names)
        scale = self.cfg_scale if cfg_scale is None else cfg_scale
        samples = generate(self.model, batch_size, numbers, scale, device, generator, self.noise_shape)
        return samples if self.latent or self.pixel_range is None else samples.clamp(*self.pixel_range)


def class_numbers(labels: Labels, names: ClassNames) -> Tensor:
    """Class numbers, int64 ``[B]``, of labels as they are called: their places in ``names``.

    Integers are class numbers already where names are text of other than integers. An unknown label raises ValueError.
    """
    values = plain_labels(labels)
    are_numbers = all(type(value) is int for value in values) and all(isinstance(name, str) for name in names)
    called: Sequence[Any] = label_numbers(names) if are_numbers else names
    place = {name: number for number, name in enumerate(called)}
    for value in values:
        if type(value) not in (int, str) or value not in place:  # True and 1.0 are equal to 1.
            raise ValueError(f"there is no label {value!r}, expected one of: {some_of(called)}")
    return torch.tensor([place[value] for value in values], dtype=torch.int64, device="cpu")


def plain_labels(labels: Any) -> list[Any]:
    """List the labels of a tensor, an array, another sequence or a single one in Python's own types; None has none."""
    if hasattr(labels, "tolist"):  # Tensors and arrays have it.
        labels = labels.tolist()
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        return [] if labels is None else [labels]
    return [label.tolist() if hasattr(label, "tolist") else label for label in labels]


def as_tensor(values: Any) -> Tensor:
    """A tensor as it is, or one of other values, on the host whatever torch's default device."""
    return values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")


def same_classes(names: ClassNames, others: ClassNames) -> bool:
    """Whether classes are called alike; numbers from 0 on, and the one class of samples without labels, say nothing."""
    texts = [tuple(map(str, of)) for of in (names, others)]
    return texts[0] in (texts[1], ("all",), tuple(map(str, range(len(others)))))


def label_numbers(names: ClassNames) -> tuple[int, ...]:
    """What files of samples call the classes: their names where these are different integers, else their numbers."""
    numbers = {int(name) for name in map(str, names) if re.fullmatch(r"-?[0-9]{1,9}", name)}
    return tuple(map(int, names)) if len(numbers) == len(names) else tuple(range(len(names)))
