"""Samples from any trained network, one forward pass each.

A network is any ``nn.Module`` that is called as ``net(z)``, ``net(z, y)`` or ``net(z, y, cfg_scale)``: with Gaussian
noise, labels and guidance scales. Noise and samples may have any shapes, which need not be alike.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

LABEL_NAMES = ("y", "label", "labels", "condition")  # An optional argument is given only where it is called so …
SCALE_NAMES = ("cfg_scale", "scale", "guidance", "alpha")  # … or so.
MOST_NAMED = 10  # This many labels are named in a message.

ClassNames = tuple[int | str, ...]
Labels = Tensor | Sequence[int] | Sequence[str]


@dataclass(frozen=True)
class Signature:
    """How a network is called; :meth:`of` reads it, once.

    Args:
        noise_shape: the shape of the noise of one sample.
        conditions: how many of label and guidance scale the network takes after the noise.
    """

    noise_shape: tuple[int, ...]
    conditions: int

    @classmethod
    def of(cls, model: nn.Module, noise_shape: Sequence[int] | None = None) -> "Signature":
        """The signature of ``model``, whose attribute ``noise_shape`` is used where none is given.

        Raises:
            ValueError: neither says the shape of the noise, or the network cannot be called with one to three tensors.
        """
        shape = getattr(model, "noise_shape", None) if noise_shape is None else noise_shape
        name = type(model).__name__
        if shape is None:
            raise ValueError(
                f"the network {name} does not say what noise it takes: give it an attribute noise_shape, "
                "or pass noise_shape=(64,) for vectors of 64 numbers"
            )
        return cls(tuple(shape), _count_conditions(model))

    def call(self, model: nn.Module, z: Tensor, y: Tensor, cfg_scale: Tensor, extra: dict[str, Tensor]) -> Tensor:
        """The samples of ``model`` for noise ``z [B, *noise_shape]``, labels ``y [B]`` and scales ``cfg_scale [B]``,
        of which it is given those that it takes, and what else it draws."""
        return model(z, *(y, cfg_scale)[: self.conditions], **extra)


def _count_conditions(model: nn.Module) -> int:
    """How many of label and guidance scale ``model.forward`` takes after the noise."""
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(model.forward).parameters.values())
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return 2
    taken = [parameter for parameter in parameters if parameter.kind in places]
    needed = sum(parameter.default is inspect.Parameter.empty for parameter in taken)
    if not taken or needed > 3:
        names = ", ".join(parameter.name for parameter in parameters)
        raise ValueError(
            f"the network {type(model).__name__} takes ({names}), expected (z), (z, y) or (z, y, cfg_scale)"
        )
    conditions = 0
    for parameter, names_of_optional in zip(taken[1:], (LABEL_NAMES, SCALE_NAMES), strict=False):
        if parameter.default is not inspect.Parameter.empty and parameter.name not in names_of_optional:
            break
        conditions += 1
    return conditions


def sample_shape_of(model: nn.Module, signature: Signature) -> tuple[int, ...]:
    """The shape of one sample: what the network makes of a noise of zeros.

    Raises:
        ValueError: the network cannot be called so, or does not return a tensor of one sample for each noise.
    """
    num, generator = 2, torch.Generator().manual_seed(0)
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    z = torch.zeros(num, *signature.noise_shape, device=weight.device, dtype=weight.dtype)
    y = torch.zeros(num, dtype=torch.int64, device=weight.device)
    extra = draw_extra(model, num, generator, generator.device)
    shown = ", ".join((f"z {list(z.shape)}", "y", "cfg_scale")[: 1 + signature.conditions])
    try:
        with torch.no_grad(), evaluating(model):
            samples = signature.call(
                model, z, y, weight.new_ones(num), {name: value.to(z.device) for name, value in extra.items()}
            )
    except Exception as error:  # A user's network may raise anything.
        text = " ".join(str(error).split())
        raise ValueError(
            f"the network {type(model).__name__} fails when called with {shown}: {type(error).__name__}: {text}"
        ) from error
    if not isinstance(samples, Tensor) or samples.shape[:1] != (num,):
        got = f"shape {list(samples.shape)}" if isinstance(samples, Tensor) else type(samples).__name__
        raise ValueError(
            f"the network {type(model).__name__}, called with {shown}, returns {got}, expected a tensor [{num}, …]"
        )
    return tuple(samples.shape[1:])


def draw_extra(
    model: nn.Module, num: int, generator: torch.Generator | None, device: torch.device
) -> dict[str, Tensor]:
    """What a network needs beside Gaussian noise for ``num`` samples: keyword arguments from its own method
    ``draw_extra(num, generator, device)``, such as style codes. None of the usual networks has that method."""
    draw = getattr(model, "draw_extra", None)
    return {} if draw is None else draw(num, generator, device)


@torch.no_grad()
def generate(
    model: nn.Module,
    batch_size: int,
    y: Tensor | None = None,
    cfg_scale: float | Tensor = 1.0,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
    noise_shape: Sequence[int] | None = None,
) -> Tensor:
    """Draw noise and generate samples in one forward pass, in evaluation mode.

    Args:
        model: the network.
        batch_size: number of samples B.
        y: integer labels ``[B]``; drawn uniformly from the network's ``num_classes`` if None.
        cfg_scale: guidance scale, a number or a tensor ``[B]``.
        device: where to generate; the network is moved there first. By default, where it is.
        generator: source of all randomness. Everything is drawn on its device, then moved, so that one CPU seed gives
            the same samples on every device.
        noise_shape: shape of the noise of one sample, where the network has no attribute of that name.

    Returns:
        Samples ``[B, *sample_shape]`` on ``device``.

    Raises:
        ValueError: the network does not say its noise shape, or takes labels and neither these nor their number are
            known; or ``y`` or ``cfg_scale`` has another shape.
    """
    if device is not None:
        model.to(device)
    signature = Signature.of(model, noise_shape)
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    source = weight.device if generator is None else generator.device
    z = torch.randn(batch_size, *signature.noise_shape, generator=generator, device=source).to(weight)
    extra = draw_extra(model, batch_size, generator, torch.device(source))
    if y is None:
        y = _draw_labels(model, signature, batch_size, generator, torch.device(source))
    scale = torch.as_tensor(cfg_scale, dtype=torch.float32, device=weight.device)
    for name, value, shapes in (("y", y, [(batch_size,)]), ("cfg_scale", scale, [(), (batch_size,)])):
        if value.shape not in shapes:
            raise ValueError(f"{name} has shape {list(value.shape)}, expected [{batch_size}], one for each sample")
    with evaluating(model):
        return signature.call(
            model, z, y.to(weight.device), scale.expand(batch_size),
            {name: value.to(weight.device) for name, value in extra.items()},
        )  # fmt: skip


def _draw_labels(
    model: nn.Module, signature: Signature, num: int, generator: torch.Generator | None, source: torch.device
) -> Tensor:
    num_classes = getattr(model, "num_classes", None if signature.conditions else 1)
    if num_classes is None:
        raise ValueError(f"the network {type(model).__name__} takes labels and has no num_classes: give it labels y")
    return torch.randint(num_classes, (num,), generator=generator, device=source)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` and each of its parts is in evaluation mode; afterwards each is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass(frozen=True)
class Generator:
    """A trained network and what is known of its samples.

    Args:
        model: the network, in evaluation mode.
        noise_shape: the shape of the noise of one sample.
        sample_shape: the shape of one sample.
        class_names: the names of the labels 0, 1, …; integers where those are what labels were called in training.
        pixel_range: the values of samples, or of the images that latents decode to, that are black and white; None
            where samples are no images. Images are clamped to it.
        latent: whether samples are latents of the Stable Diffusion VAE.
        data: the name of the data set.
        step: how many steps the network was trained for.
        name: what builds the network: a name of ours, or ``module:Name``.
        arguments: what it was built with, as far as is known; values of JSON.
    """

    model: nn.Module
    noise_shape: tuple[int, ...]
    sample_shape: tuple[int, ...]
    class_names: ClassNames = (0,)
    pixel_range: tuple[float, float] | None = None
    latent: bool = False
    data: str = ""
    step: int = 0
    name: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def makes_images(self) -> bool:
        """Whether samples are images or decode to them, and not any other tensors."""
        return self.pixel_range is not None

    def generate(
        self,
        batch_size: int,
        y: Labels | None = None,
        cfg_scale: float | Tensor = 1.0,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples ``[batch_size, *sample_shape]`` in one forward pass, see :func:`generate`.

        Labels ``y [batch_size]`` are given as they are called in training, and drawn uniformly if None. Images are
        clamped to their range.
        """
        if y is None:
            source = None if generator is None else generator.device
            number = torch.randint(len(self.class_names), (batch_size,), generator=generator, device=source)
        else:
            number = class_numbers(y, self.class_names)
        samples = generate(self.model, batch_size, number, cfg_scale, device, generator, self.noise_shape)
        return samples if self.latent or self.pixel_range is None else samples.clamp(*self.pixel_range)


def class_numbers(labels: Labels, names: ClassNames) -> Tensor:
    """Labels as they are called as numbers from 0 on, int64 ``[B]``: places in ``names``.

    Integers are looked up where names are integers, and are numbers already where these are text.

    Raises:
        ValueError: a label that is none of them.
    """
    values: list[Any] = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    are_numbers = all(type(value) is int for value in values) and all(isinstance(name, str) for name in names)
    called: Sequence[Any] = range(len(names)) if are_numbers else names
    place = {name: number for number, name in enumerate(called)}
    unknown = next((value for value in values if value not in place), None)
    if unknown is not None:
        shown = ", ".join(map(str, called[:MOST_NAMED])) + (", …" if len(called) > MOST_NAMED else "")
        raise ValueError(f"there is no label {unknown!r}, expected one of: {shown}")
    device = labels.device if isinstance(labels, Tensor) else None
    return torch.tensor([place[value] for value in values], dtype=torch.int64, device=device)
