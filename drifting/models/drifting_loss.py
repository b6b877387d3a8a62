"""The drifting loss: a generator's training signal, computed on feature maps by :mod:`drift_ops`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import drift_ops
from drift_ops.reference import unit_drift

from ..utils.stopwatch import Stopwatch
from .convnext import load_convnext
from .feature_extractor import (
    FeatureExtractor,
    FeatureMaps,
    FeatureStack,
    FunctionExtractor,
    InputFeatureExtractor,
    LatentFeatureExtractor,
    extractor_name,
    named_maps,
)

FIELDS = ("paper", "gaussian")
Extractor = str | nn.Module | Callable[[Tensor], Any]


class DriftingLoss(nn.Module):
    """Loss whose gradient moves generated samples along the drifting field of their label group.

    Samples may have any shape; only the extractors made for images want images.

    Args:
        feature_extractor: 'input' (the sample itself; 'pixels' is its old name), 'latent', 'resnet18', 'convnext_v2',
            a module or function from samples ``[B, *shape]`` to a tensor ``[B, D]`` or ``[B, T, D]`` or a dict of such
            maps, or several of these in a list. A module is frozen here.
        temperatures: bandwidths of the kernel, each > 0: R of the paper's field, sigma of the Gaussian one.
        normalize_features, normalize_drift: part of the method for ``field='paper'``, where both must be True; optional
            for ``field='gaussian'``.
        field: 'paper', the training loss of the official release, :func:`drift_ops.drift_loss`; or 'gaussian', the
            separate-sides Gaussian field :func:`drift_ops.compute_V_multiscale`, which draws every sample to the mean
            of its group on feature maps of many dimensions.
        affinity_floor: lower bound of the paper field's squared affinities; the release has 1e-6, 0 is the definition.
        in_chans: channels of the images, for the extractors built here; None where samples are no images.
        backend: of :mod:`drift_ops`; None picks the best available.
        bf16: run the extractor under bfloat16 autocast and keep its maps in bfloat16; the field stays float32.
        process_group: of ranks that have labels each; the statistics of the paper's field are over all of them, and
            the mean of their losses, weighted by labels, is the loss.

    Raises:
        ValueError: an unknown name, or a flag that the field does not have.

    With a ``stopwatch``, forward and backward enter the phases "encoder", the extractor's, and "operator".
    """

    softmax_temperature = 1.0  # This is T of the Gaussian field.
    stopwatch: Stopwatch | None = None

    def __init__(
        self,
        feature_extractor: Extractor | Sequence[Extractor] = "latent",
        temperatures: Sequence[float] = (0.02, 0.05, 0.2),
        normalize_features: bool = True,
        normalize_drift: bool = True,
        field: str = "paper",
        affinity_floor: float = 0.0,
        in_chans: int | None = 4,
        backend: str | None = None,
        bf16: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if field not in FIELDS:
            raise ValueError(f"field is {field!r}, expected one of {FIELDS}")
        if field == "paper" and not (normalize_features and normalize_drift):
            raise ValueError(
                "normalize_features and normalize_drift are part of the paper's method: leave both True, "
                "or use field='gaussian', where they are optional"
            )
        self.feature_extractor = build_extractor(feature_extractor, in_chans).requires_grad_(False).eval()
        self.temperatures = tuple(float(t) for t in temperatures)
        self.normalize_features, self.normalize_drift = normalize_features, normalize_drift
        self.field, self.affinity_floor, self.backend, self.bf16 = field, affinity_floor, backend, bf16
        self.process_group = process_group

    def train(self, mode: bool = True) -> "DriftingLoss":
        super().train(mode)
        self.feature_extractor.eval()
        return self

    def forward(
        self, x_gen: Tensor, x_real: Tensor, x_uncond: Tensor | None = None, weight_uncond: Tensor | None = None
    ) -> Tensor:
        """The loss, a 0-d tensor, of samples of one label or of several labels: :meth:`loss_and_info`.

        Args:
            x_gen: generated vectors ``[G, D]`` or images ``[G, C, H, W]`` of one label, or samples ``[L, G, *shape]``
                of L labels.
            x_real: real ones of the same labels, ``[P, D]``, ``[P, C, H, W]`` or ``[L, P, *shape]``.
            x_uncond, weight_uncond: see :meth:`loss_and_info`.
        """
        if x_gen.ndim in (2, 4) and x_real.ndim == x_gen.ndim:
            x_gen, x_real = x_gen.unsqueeze(0), x_real.unsqueeze(0)
            x_uncond = x_uncond if x_uncond is None else x_uncond.unsqueeze(0)
        return self.loss_and_info(x_gen, x_real, x_uncond, weight_uncond)[0]

    def loss_and_info(
        self, x_gen: Tensor, x_real: Tensor, x_uncond: Tensor | None = None, weight_uncond: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over feature maps (eq. 14 of the paper) of the mean loss over the map's groups, one a label and location.

        Args:
            x_gen: generated samples ``[L, G, *shape]`` of L labels.
            x_real: real samples ``[L, P, *shape]`` of the same labels.
            x_uncond: real samples ``[L, U, *shape]`` of any label, repelling like generated ones (classifier-free
                guidance, section 3.5 of the paper).
            weight_uncond: weight ≥ 0 of each unconditional sample relative to a generated one, ``[L]``; 1 if None.

        Returns:
            The loss, whose gradient reaches ``x_gen`` only, and 0-d tensors to log. For the paper's field
            ``{map}/scale``, the mean distance, and ``{map}/lambda_{R}``, the RMS of the raw drift at R in units of
            scale/√D: the loss itself is constant by construction, these fall as the distributions approach. For the
            Gaussian field ``{map}/drift``, the RMS of the raw drift.

        Raises:
            ValueError: shapes that do not fit each other, or unconditional samples with ``field='gaussian'``.
        """
        if self.field == "gaussian" and x_uncond is not None:
            raise ValueError("field='gaussian' has no unconditional negatives: leave x_uncond out or use field='paper'")
        _check_shapes(x_gen, x_real, x_uncond)
        weight = _check_weight(weight_uncond, x_gen, x_uncond)
        fixed = x_real if x_uncond is None else torch.cat([x_real, x_uncond], 1)
        with torch.no_grad():
            fixed_groups = self.groups(fixed)
        gen = self.groups(x_gen)
        if x_gen.requires_grad and not any(groups.requires_grad for groups in gen.values()):
            raise ValueError("no feature map has a gradient: the feature extractor must not work under torch.no_grad()")
        return self.of_groups(gen, *split_groups(fixed_groups, x_real.shape[1]), weight)

    def of_groups(
        self, gen: FeatureMaps, pos: FeatureMaps, neg: FeatureMaps, weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of :meth:`loss_and_info` from the :meth:`groups` of its samples.

        Args:
            gen, pos, neg: of the generated, the real, and the unconditional samples.
            weight: ``[L, U]``, of the unconditional samples.
        """
        if self.stopwatch is not None:
            self.stopwatch.enter("operator")
        return self._gaussian(gen, pos) if self.field == "gaussian" else self._paper(gen, pos, neg, weight)

    def groups(self, samples: Tensor) -> FeatureMaps:
        """Maps of samples ``[L, n, *shape]`` as groups ``[L·T, n, D]``, from one forward pass of the extractor."""
        L, n = samples.shape[:2]
        if self.stopwatch is not None:
            self.stopwatch.enter("encoder")
        with torch.autocast(samples.device.type, torch.bfloat16, enabled=self.bf16):
            maps = named_maps(self.feature_extractor(samples.flatten(0, 1)), L * n, self.feature_extractor)
        groups = {}
        for name, feature in maps.items():
            feature = feature.bfloat16() if self.bf16 else feature  # Autocast leaves some operations in float32.
            groups[name] = feature.unflatten(0, (L, n)).transpose(1, 2).flatten(0, 1)
            if self.stopwatch is not None:
                self.stopwatch.enter_at_gradient(groups[name], "encoder")
        return groups

    def _paper(
        self, gen: FeatureMaps, pos: FeatureMaps, neg: FeatureMaps, weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        L = weight.shape[0]
        weights = [weight.repeat_interleave(g.shape[0] // L, dim=0) for g in neg.values()]  # one row a location
        losses, infos = drift_ops.drift_loss(
            list(gen.values()), list(pos.values()), list(neg.values()), weight_neg=weights,
            R_list=self.temperatures, affinity_floor=self.affinity_floor, process_group=self.process_group,
            backend=self.backend,
        )  # fmt: skip
        loss = torch.stack([group_losses.mean() for group_losses in losses]).sum()
        names = [f"{name}/lambda_{R}" for name in gen for R in self.temperatures]
        squares = [info[f"loss_{R}"] for info in infos for R in self.temperatures]
        info = {f"{name}/scale": info["scale"] for name, info in zip(gen, infos, strict=True)}
        return loss, info | dict(zip(names, torch.stack(squares).sqrt().unbind(), strict=True))

    def _gaussian(self, gen: FeatureMaps, pos: FeatureMaps) -> tuple[Tensor, dict[str, Tensor]]:
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
    """The Gaussian field on raw vectors or pixels, without features: for toy problems.

    Args:
        sigma: bandwidth of the kernel, > 0.
        temperature: of the two softmaxes, > 0.
        normalize_features, normalize_drift: as in :func:`drift_ops.compute_V`.

    Called with generated ``[G, D]`` and real ``[P, D]`` points, or with images as :class:`DriftingLoss`.
    """

    def __init__(
        self,
        sigma: float = 1.0,
        temperature: float = 1.0,
        normalize_features: bool = True,
        normalize_drift: bool = True,
    ) -> None:
        super().__init__("input", (sigma,), normalize_features, normalize_drift, field="gaussian")
        self.softmax_temperature = temperature


def split_groups(groups: FeatureMaps, num: int) -> tuple[FeatureMaps, FeatureMaps]:
    """The first ``num`` samples of every group, and the others."""
    return {name: g[:, :num] for name, g in groups.items()}, {name: g[:, num:] for name, g in groups.items()}


def build_extractor(extractor: Extractor | Sequence[Extractor], in_chans: int | None) -> nn.Module:
    """The module that :class:`DriftingLoss` uses for that argument.

    Raises:
        ValueError: an unknown name, or one of an extractor of images where samples are none.
    """
    if isinstance(extractor, nn.Module):
        return extractor
    if isinstance(extractor, (list, tuple)):
        modules = [build_extractor(part, in_chans) for part in extractor]
        named = [
            (part if isinstance(part, str) else extractor_name(module), module)
            for part, module in zip(extractor, modules, strict=True)
        ]
        return FeatureStack(named) if len(named) > 1 else named[0][1]
    if callable(extractor):
        return FunctionExtractor(extractor)
    if extractor in ("input", "pixels"):
        return InputFeatureExtractor(str(extractor))
    of_images: dict[str, Callable[[int], nn.Module]] = {
        "latent": LatentFeatureExtractor, "resnet18": FeatureExtractor, "convnext_v2": load_convnext,
    }  # fmt: skip
    if extractor not in of_images:
        raise ValueError(
            f"feature_extractor is {extractor!r}, expected 'input', {', '.join(map(repr, of_images))}, "
            "a module or function of your own, or a list of these"
        )
    if in_chans is None:
        raise ValueError(f"feature_extractor {extractor!r} is for images [C, H, W]: use 'input' or one of your own")
    return of_images[str(extractor)](in_chans)


def _check_shapes(x_gen: Tensor, x_real: Tensor, x_uncond: Tensor | None) -> None:
    named = {"x_gen": x_gen, "x_real": x_real} | ({} if x_uncond is None else {"x_uncond": x_uncond})
    for name, x in named.items():
        if x.ndim < 2:
            raise ValueError(f"{name} has shape {list(x.shape)}, expected [labels, count, …]")
        if x.shape[0] != x_gen.shape[0] or x.shape[2:] != x_gen.shape[2:]:
            raise ValueError(
                f"{name} has shape {list(x.shape)} but x_gen {list(x_gen.shape)} (as [labels, count, …]): "
                "labels and sample shapes must agree"
            )


def _check_weight(weight: Tensor | None, x_gen: Tensor, x_uncond: Tensor | None) -> Tensor:
    """Weights ``[L, U]`` of the unconditional negatives."""
    L, U = x_gen.shape[0], 0 if x_uncond is None else x_uncond.shape[1]
    if weight is None:
        return x_gen.new_ones(L, U)
    if x_uncond is None:
        raise ValueError("weight_uncond was given without x_uncond")
    if weight.shape != (L,):
        raise ValueError(f"weight_uncond has shape {list(weight.shape)}, expected [{L}], one weight a label")
    return weight.to(x_gen).unsqueeze(1).expand(L, U)
