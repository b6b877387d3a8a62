"""The drifting loss: a generator's training signal, computed on feature maps by :mod:`drift_ops`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import drift_ops
from drift_ops.reference import unit_drift

from ..errors import reason
from ..utils.stopwatch import Stopwatch
from . import feature_extractor as extractors
from .feature_extractor import load_convnext
from .fields import FIELDS, Drift, arguments_of
from .resnet_encoder import FeatureMaps

Extractor = str | nn.Module | Callable[[Tensor], Any]
LossAndInfo = tuple[Tensor, dict[str, Tensor]]
LEAST_WEIGHT = 1e-6  # Every column of Sinkhorn's plan must get something.


class DriftingLoss(nn.Module):
    """Loss whose gradient moves generated samples along the drifting field of their label group.

    Samples may have any shape; only the extractors made for images want images.

    Args:
        feature_extractor: 'input' (the sample itself; 'pixels' is its old name), 'pyramid' (small images at several
            sizes and in parts), 'latent', 'resnet18', 'convnext_v2', a module or function from samples ``[B, *shape]``
            to a tensor ``[B, D]`` or ``[B, T, D]`` or a dict of such maps, or several of these in a list. A module is
            frozen here.
        temperatures: bandwidths of the kernel, each > 0: R of the paper's field, sigma of the Gaussian one.
        normalize_features, normalize_drift: both are part of the paper's field, only the Gaussian one goes without.
        field: 'paper' is the release's :func:`drift_ops.drift_loss`, 'gaussian' :func:`drift_ops.compute_V_multiscale`;
            or another name in :data:`FIELDS`, or arguments of ``drift_loss`` as there.
        affinity_floor: lower bound of the paper field's squared affinities; the release has 1e-6, 0 is the definition.
        in_chans: channels of the images, for the extractors built here; None where samples are no images.
        bf16: run the extractor under bfloat16 autocast and keep its maps in bfloat16; the field stays float32.
        process_group: ranks with labels of their own, whose losses are averaged and whose statistics are shared.

    Forward and backward enter two phases of the ``stopwatch``: "encoder", the extractor's, and "operator".
    """

    softmax_temperature = 1.0  # This is T of the Gaussian field.

    def __init__(
        self, feature_extractor: Extractor | Sequence[Extractor] = "latent",
        temperatures: Sequence[float] = (0.02, 0.05, 0.2), normalize_features: bool = True,
        normalize_drift: bool = True, field: str | Drift = "paper", affinity_floor: float = 0.0,
        in_chans: int | None = 4, backend: str | None = None, bf16: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if isinstance(field, str) and field not in FIELDS:
            raise ValueError(f"field is {field!r}, expected one of: {', '.join(FIELDS)}")
        self.drift = FIELDS[field] if isinstance(field, str) else field
        if field == "paper" and self.drift is not None:
            self.drift = {"field": replace(self.drift["field"], affinity_floor=affinity_floor)}
        if self.drift is not None and not (normalize_features and normalize_drift):
            raise ValueError("normalize_features and normalize_drift must be True, only field='gaussian' goes without")
        self.feature_extractor = build_extractor(feature_extractor, in_chans).requires_grad_(False).eval()
        self.temperatures = tuple(float(t) for t in temperatures)
        self.log_R: nn.Parameter | None = None  # [maps, R]: the logarithms of temperatures that learn
        self.normalize_features, self.normalize_drift = normalize_features, normalize_drift
        self.backend, self.bf16, self.process_group = backend, bf16, process_group
        self.stopwatch = Stopwatch("cpu")

    def train(self, mode: bool = True) -> "DriftingLoss":
        super().train(mode)
        self.feature_extractor.eval()
        return self

    def forward(
        self, x_gen: Tensor, x_real: Tensor, x_uncond: Tensor | None = None, weight_uncond: Tensor | None = None
    ) -> Tensor:
        """The loss of :meth:`loss_and_info`; samples ``[n, D]`` or ``[n, C, H, W]`` are of one label."""
        if x_gen.ndim in (2, 4) and x_real.ndim == x_gen.ndim:
            x_gen, x_real = x_gen.unsqueeze(0), x_real.unsqueeze(0)
            x_uncond = x_uncond if x_uncond is None else x_uncond.unsqueeze(0)
        return self.loss_and_info(x_gen, x_real, x_uncond, weight_uncond)[0]

    def loss_and_info(
        self, x_gen: Tensor, x_real: Tensor, x_uncond: Tensor | None = None, weight_uncond: Tensor | None = None
    ) -> LossAndInfo:
        """Sum over feature maps (eq. 14 of the paper) of the mean loss over the map's groups, one a label and location.

        Generated samples ``[L, G, *shape]`` of L labels get a gradient, real ones ``[L, P, *shape]`` attract them. Real
        samples ``[L, U, *shape]`` of any label repel like generated ones (section 3.5 of the paper), each with weight
        ≥ 0 ``[L]`` relative to one of these, 1 if None. A field that does not count the generated samples themselves
        among the negatives needs a second batch of them there. Shapes that do not fit each other raise ValueError.

        Beside the loss come 0-d tensors to log. For the paper's field, whose loss itself is constant by construction,
        ``{map}/scale`` is the mean distance, and ``{map}/lambda_{R}`` the RMS of the raw drift at R in units of
        scale/√D, which falls as the distributions approach. For the Gaussian one ``{map}/drift`` is that RMS itself.
        Where temperatures learn, their loss is added, and ``{map}/temperature_{R}`` is what has become of R.
        """
        if self.drift is None and x_uncond is not None:
            raise ValueError("field='gaussian' has no unconditional negatives: leave x_uncond out or use field='paper'")
        weight = _checked_weight(x_gen, x_real, x_uncond, weight_uncond)
        with torch.no_grad():
            real = self.groups(x_real if x_uncond is None else torch.cat([x_real, x_uncond], 1))
        return self.of_groups(self.groups(x_gen), *split_groups(real, x_real.shape[1]), weight)

    def learn_temperatures(self, maps: Sequence[str], device: torch.device) -> nn.Parameter:
        """From now on the temperatures of each of these maps learn, as in Kyutai's one-positive loss: a parameter."""
        if self.drift is None:
            raise ValueError("loss.learn_temperature is true, but the temperatures of field='gaussian' do not learn")
        log_R = torch.tensor([[math.log(R) for R in self.temperatures]] * len(maps), device=device, dtype=torch.float32)
        self.maps, self.log_R = tuple(maps), nn.Parameter(log_R)
        return self.log_R

    def learnt(self) -> dict[str, dict[str, list[float]]]:
        """What the ``temperatures`` of each map have become, where they learn."""
        learnt = () if self.log_R is None else self.log_R.exp().tolist()
        return {"temperatures": dict(zip(self.maps, learnt, strict=True))} if learnt else {}

    def check_extractor(self, sample_shape: Sequence[int], device: torch.device) -> FeatureMaps:
        """The maps ``[1, T, 2, D]`` of two samples of that shape; an extractor that returns none raises ValueError."""
        samples = torch.zeros(1, 2, *sample_shape, device=device, dtype=torch.float32, requires_grad=True)
        try:
            return self.groups(samples * 1)  # An extractor may change samples in place, but not a leaf.
        except Exception as error:  # A user's extractor may raise anything.
            name = extractors.extractor_name(self.feature_extractor)
            tried = f"the feature extractor {name}, tried on samples {[2, *sample_shape]}, fails"
            raise ValueError(f"{tried}: {reason(error)}") from error

    def groups(self, samples: Tensor) -> FeatureMaps:
        """Maps of samples ``[L, n, *shape]`` as L·T groups ``[L, T, n, D]``, views of what the extractor returns."""
        L, n = samples.shape[:2]
        self.stopwatch.enter("encoder")
        with torch.autocast(samples.device.type, torch.bfloat16, enabled=self.bf16):
            maps = extractors.named_maps(self.feature_extractor(samples.flatten(0, 1)), L * n, self.feature_extractor)
        if torch.is_grad_enabled() and samples.requires_grad and not any(of.requires_grad for of in maps.values()):
            raise ValueError("no feature map has a gradient: the feature extractor must not work under torch.no_grad()")
        groups = {}
        for name, feature in maps.items():
            feature = feature.bfloat16() if self.bf16 else feature  # Autocast leaves some operations in float32.
            groups[name] = feature.unflatten(0, (L, n)).transpose(1, 2)
            self.stopwatch.enter_at_gradient(groups[name], "encoder")
        return groups

    def of_groups(
        self, gen: FeatureMaps, pos: FeatureMaps, neg: FeatureMaps, weight: Tensor, second: FeatureMaps | None = None
    ) -> LossAndInfo:
        """:meth:`loss_and_info` of the :meth:`groups` of all samples, of which the unconditional ones have ``weight
        [L]``. A ``second`` batch of generated samples repels like the first, with weight 1."""
        self.stopwatch.enter("operator")
        if self.drift is None:
            return self._gaussian(gen, pos)
        weight = weight.unsqueeze(1).expand(-1, next(iter(neg.values())).shape[2])  # [L, U]
        if self.drift["field"].weights == "marginal":
            weight = weight.clamp(min=LEAST_WEIGHT)
        if second is not None:
            neg = {name: torch.cat([second[name], groups], 2) for name, groups in neg.items()}
            weight = torch.cat([weight.new_ones(len(weight), next(iter(second.values())).shape[2]), weight], 1)
        weights = [weight.unsqueeze(1).expand(groups.shape[:3]) for groups in neg.values()]  # Locations share one row.
        options = arguments_of(self.drift) | {"process_group": self.process_group, "backend": self.backend}
        sides = [list(maps.values()) for maps in (gen, pos, neg)]
        if self.log_R is None:
            x, y, z = sides
            losses, infos = drift_ops.drift_loss(x, y, z, weight_neg=weights, R_list=self.temperatures, **options)
            return torch.stack([of_map.mean() for of_map in losses]).sum(), self._info(gen, infos, self.temperatures)
        terms, infos, learnt = [], [], self.log_R.exp()
        for x, y, z, w, R in zip(*sides, weights, learnt.unbind(), strict=True):  # The operator takes one R a call.
            losses, info = drift_ops.drift_loss(x, y, z, weight_neg=w, R_list=R, **options)
            terms += [losses.mean(), -info["log_mass"].amax(-1).mean()]
            infos.append(info)
        info = self._info(gen, infos, range(len(self.temperatures)))
        names = [f"{name}/temperature_{R}" for name in gen for R in self.temperatures]
        return torch.stack(terms).sum(), info | dict(zip(names, learnt.detach().flatten(), strict=True))

    def _info(self, maps: FeatureMaps, infos: Sequence[dict[str, Tensor]], names: Sequence[float]) -> dict[str, Tensor]:
        """The scale of every map, and λ of its temperatures by their ``names``: means where each group has its own."""
        scales = [s.mean() if s.ndim else s for s in (of_map["scale"] for of_map in infos)]
        squares = [of_map[f"loss_{name}"] for of_map in infos for name in names]
        lambdas = torch.stack([s.sqrt().mean().square() if s.ndim else s for s in squares]).sqrt()
        places = [f"{name}/scale" for name in maps] + [f"{name}/lambda_{R}" for name in maps for R in self.temperatures]
        return dict(zip(places, [*scales, *lambdas], strict=True))

    def _gaussian(self, gen: FeatureMaps, pos: FeatureMaps) -> LossAndInfo:
        losses, info = [], {}
        for name, x in gen.items():
            with torch.no_grad():
                raw = drift_ops.compute_V_multiscale(
                    x, pos[name], x, self.temperatures, self.softmax_temperature,
                    normalize_features=self.normalize_features, normalize_drift=False, backend=self.backend,
                )  # fmt: skip
                target = x + (unit_drift(raw) if self.normalize_drift else raw)
                info[f"{name}/drift"] = raw.square().mean().sqrt()
            losses.append((x - target).square().mean())
        return torch.stack(losses).sum(), info


class SimpleDriftingLoss(DriftingLoss):
    """The Gaussian field on raw vectors or pixels, for toy problems: see :func:`drift_ops.compute_V`."""

    def __init__(
        self, sigma: float = 1.0, temperature: float = 1.0,
        normalize_features: bool = True, normalize_drift: bool = True,
    ) -> None:  # fmt: skip
        super().__init__("input", (sigma,), normalize_features, normalize_drift, field="gaussian")
        self.softmax_temperature = temperature


def split_groups(groups: FeatureMaps, num: int) -> tuple[FeatureMaps, FeatureMaps]:
    """The first ``num`` samples of every group, and the others."""
    return {name: g[:, :, :num] for name, g in groups.items()}, {name: g[:, :, num:] for name, g in groups.items()}


def build_extractor(extractor: Extractor | Sequence[Extractor], in_chans: int | None) -> nn.Module:
    """The module that :class:`DriftingLoss` uses for that argument; what it cannot be raises ValueError."""
    if isinstance(extractor, nn.Module):
        return extractor
    if isinstance(extractor, (list, tuple)):
        named = []
        for part in extractor:
            module = build_extractor(part, in_chans)
            named.append((part if isinstance(part, str) else extractors.extractor_name(module), module))
        return extractors.FeatureStack(named) if len(named) > 1 else named[0][1]
    if callable(extractor):
        return extractors.FunctionExtractor(extractor)
    if extractor in ("input", "pixels"):
        return extractors.InputFeatureExtractor(str(extractor))
    of_images: dict[Any, Callable[[int], nn.Module]] = {
        "latent": extractors.LatentFeatureExtractor, "pyramid": lambda in_chans: extractors.PyramidExtractor(),
        "resnet18": extractors.FeatureExtractor, "convnext_v2": load_convnext,
    }  # fmt: skip
    if extractor not in of_images:
        expected = f"'input', {', '.join(map(repr, of_images))}, a module or function of your own, or a list of these"
        raise ValueError(f"feature_extractor is {extractor!r}, expected {expected}")
    if in_chans is None:
        raise ValueError(f"feature_extractor {extractor!r} is for images [C, H, W]: use 'input' or one of your own")
    return of_images[extractor](in_chans).float()  # Samples are of this type, whatever torch's default is.


def _checked_weight(x_gen: Tensor, x_real: Tensor, x_uncond: Tensor | None, weight: Tensor | None) -> Tensor:
    named = {"x_gen": x_gen, "x_real": x_real} | ({} if x_uncond is None else {"x_uncond": x_uncond})
    for name, x in named.items():
        if x.ndim < 2 or (len(x), x.shape[2:]) != (len(x_gen), x_gen.shape[2:]):
            received = f"{name} has shape {list(x.shape)} and x_gen {list(x_gen.shape)}"
            raise ValueError(f"{received}, expected [labels, count, …]: labels and sample shapes must agree")
    L = x_gen.shape[0]
    if weight is None:
        return x_gen.new_ones(L)
    if x_uncond is None:
        raise ValueError("weight_uncond was given without x_uncond")
    if weight.shape != (L,):
        raise ValueError(f"weight_uncond has shape {list(weight.shape)}, expected [{L}], one weight a label")
    return weight.to(x_gen)
