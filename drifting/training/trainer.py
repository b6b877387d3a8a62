"""The training step of Algorithm 1 of the paper (arXiv 2602.04770), and the trainer around it."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from drift_ops import Field

from ..config import Config
from ..config.reading import flattened, set_value
from ..data import Split
from ..data.own import label_of, number_labels, sample_of
from ..errors import shown
from ..generation import ClassNames, Generator, Labels, Signature, move, plain_labels, unwrapped
from ..hub.run_directory import RunDirectory, save_generator
from ..models import FIELDS, NETWORKS, DriftingLoss
from ..models.drifting_loss import Extractor, split_groups
from ..models.fields import Drift
from ..models.resnet_encoder import FeatureMaps
from ..utils.progress import progress
from ..utils.stopwatch import Stopwatch
from .distributed import Ranks, averaging_gradients
from .groups import ClassGroups, Groups, PairGroups
from .optimization import TrainedWeights, compiling
from .real_features import MapLayout, keep_features

SECTIONS = ("loss", "step", "guidance", "optimizer")  # Their keys are arguments of create_trainer.
# These defaults of scripts differ from the paper's, whose runs are longer and larger.
SCRIPTS = {"gen_per_label": 32, "pos_per_label": 32, "warmup_steps": 1000, "ema_decay": 0.99}
PAIRS = {"temperatures": (0.05, 0.2, 0.5)}  # A pair has no other real sample nearby, and needs to see further.


class DriftingTrainer:
    """Trains a network by drifting, one step of several groups at a time.

    A step takes the labels of ``config.step.labels_per_step`` groups, generates samples of each, and pulls them towards
    real samples of that label and away from each other and, where the label's guidance scale α is above 1, from real
    samples of any label. :func:`create_trainer` explains the arguments; ``facts`` are further ones of ``Generator``.
    With a ``split``, groups by class take batches of its samples as stored, those of ``training_batches``. There is no
    queue in :meth:`state_dict` then, as ``groups.refill`` reads it anew.

    ``step`` counts the steps taken; ``best_decay`` says which average :meth:`generate` uses, and ``best_cfg_scale`` its
    guidance scale by default: whoever evaluates them may set both. ``stopwatch`` knows how long the phases of the steps
    took; those of generator, encoder and operator have the exchange of statistics and gradients in them.

    All randomness of step n follows from (seed, n), so that a resumed run repeats an uninterrupted one. A step seeds
    torch's global generators, from which dropout draws. A step whose loss or gradient is not finite changes nothing.
    """

    def __init__(
        self, model: nn.Module, config: Config, feature_extractor: Extractor | Sequence[Extractor], *,
        device: torch.device | str | None = None, noise_shape: Sequence[int] | None = None,
        class_names: ClassNames | None = None, ranks: Ranks | None = None, split: Split | None = None,
        **facts: Any,
    ) -> None:  # fmt: skip
        self.config, self.ranks = config, ranks or Ranks()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model, self.signature, self.facts = move(model, self.device), Signature.of(model, noise_shape), facts
        self.stopwatch, self.images_per_step = Stopwatch(self.device), 0  # So many are generated on all ranks.
        self.feature_extractor, self.field = feature_extractor, drift_of(config)
        if hasattr(model, "activation_checkpointing"):
            model.activation_checkpointing = config.step.activation_checkpointing  # type: ignore[assignment]
        elif config.step.activation_checkpointing:
            raise ValueError(
                f"step.activation_checkpointing is true, but {type(model).__name__} has no attribute of that name: "
                "set it to false; a network of your own that can do it looks at such an attribute and calls "
                "torch.utils.checkpoint itself"
            )
        self.weights = TrainedWeights(model, config, self.ranks, self.device)
        self.groups: ClassGroups | PairGroups
        if config.step.groups == "pairs":
            self.groups = PairGroups(config, self.ranks, self.device, self._meet)
            if config.step.queue_features or not self.signature.conditions:
                expected = "a network that takes (z, condition), and step.queue_features=false, as there is no queue"
                raise ValueError(f"step.groups is pairs, expected {expected}")
        else:
            self._meet(torch.tensor([0, len(class_names or (0,)) - 1], device="cpu"))
            self.groups = ClassGroups(
                config, self.sample_shape, self.ranks, self.device, class_names,
                labelled=self.signature.conditions > 0, num_classes=getattr(model, "num_classes", None), split=split,
                num_uncond=0 if self.loss_fn.drift is None else config.step.uncond_per_label,
            )  # fmt: skip
            if config.step.queue_features:
                self.groups.keep_features = partial(keep_features, self.loss_fn, self.layout, self.device)
        if config.step.compile:
            self.weights.distributed.compile()
        self.best_decay, self.best_cfg_scale = config.optimizer.ema_decay[0], 1.0

    def _meet(self, conditions: Tensor) -> tuple[int, ...]:
        """Find out, with two labels or conditions, what network and extractor make; give the shape of a sample."""
        config = self.config
        self.sample_shape = self.signature.sample_shape(self.model, conditions)
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # The trial has gathered weights, into which no checkpoint could be loaded.
        self.loss_fn = DriftingLoss(
            self.feature_extractor, config.loss.temperatures, field=self.field,
            in_chans=self.sample_shape[0] if len(self.sample_shape) == 3 else None, bf16=config.step.bf16,
            process_group=self.ranks.group,
        ).to(self.device)  # fmt: skip
        maps = self.loss_fn.check_extractor(self.sample_shape, self.device)
        self.layout = MapLayout(maps)
        if config.loss.learn_temperature:
            self.weights.learn_beside(self.loss_fn.learn_temperatures(list(maps), self.device))
        if config.step.compile:
            self.loss_fn.feature_extractor.compile()
        self.loss_fn.stopwatch = self.stopwatch
        return self.sample_shape

    @property
    def step(self) -> int:
        return self.weights.step

    @property
    def ema_model(self) -> nn.Module:
        """The network with the averaged weights of ``best_decay``. All ranks ask for it together."""
        return self.weights.average(self.best_decay)

    def train_step(self, x: Any, y: Labels | None = None, use_cfg_training: bool = True) -> dict[str, Tensor]:
        """Take in a batch of real samples, then take one step of Algorithm 1.

        Args:
            x: real samples ``[B, *sample_shape]``, as many on each rank, of any floating-point type: a tensor, an array
                or nested lists. Bytes, or NaN on the host, raise UserError.
            y: their labels ``[B]``, integers or text; None puts all samples into one class. By pair: their conditions
                ``[B, …]``, of any shape.
            use_cfg_training: whether to draw guidance scales α; otherwise every α is 1.

        Returns:
            0-d tensors, left on the device and the same on all ranks: ``loss``, ``grad_norm`` (before clipping),
            ``sample_spread`` (standard deviation of the generated samples of a label over that of the real ones, and
            by pair the mean square distance of generated samples over that to their positive; 0 is collapse, 1 is
            right), ``skipped_steps``, and what the loss reports of each feature map.
        """
        self.stopwatch.enter("communication")
        self.groups.add(x, y)
        self.stopwatch.enter("other")
        groups = self.groups.draw(self.step, use_cfg_training)  # labels c, scales α, y⁺ ~ p(·|c), y⁻ ~ p(·|∅)
        self.model.train()
        self.weights.zero_grad()
        with compiling(self.config.step.compile):
            gen, loss, info = self._backward(groups)  # x = f(ε, c, α), eq. (1), and the gradient of the loss, eq. (14)
        self.stopwatch.enter("communication")
        with torch.no_grad():
            terms = torch.stack([loss, *groups.spreads(gen), *info.values()]) * (len(gen) / groups.size)
            loss, spread, spread_of_real, *means = self.ranks.sum(terms)
        self.stopwatch.enter("optimizer")
        metrics = {"loss": loss, "grad_norm": self.weights.update(loss), "sample_spread": spread / spread_of_real}
        self.stopwatch.enter("data")
        self.images_per_step = groups.size * groups.num_gen
        return metrics | {"skipped_steps": self.weights.skipped_steps.clone()} | dict(zip(info, means, strict=True))

    def _backward(self, groups: Groups) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Add up the gradient of this rank's groups; give their samples ``[l, G, *sample_shape]``, loss and report.

        With ``labels_at_once`` there are activations of one part at a time, as in GradCache (Gao et al., arXiv
        2101.06983). The loss has statistics over all groups, so the sum of the parts' losses is another loss. The
        features of every part are computed first, without what their gradients would need; then the loss of all of them
        and its gradient by them, at once; then each part again, with its share of that gradient.
        """
        (num, P), loss_fn = groups.pos.shape[:2], self.loss_fn
        size = self.config.step.labels_at_once or num
        parts = [slice(at, at + size) for at in range(0, num, size)]
        whole = len(parts) == 1
        first, *second = [partial(self._generate, inputs, groups, n) for n, inputs in enumerate(self._draw(groups))]
        with torch.no_grad():
            others = [_joined([loss_fn.groups(generate(part)) for part in parts]) for generate in second]
            real = groups.maps or split_groups(_joined([loss_fn.groups(part) for part in groups.real.split(size)]), P)
        with torch.set_grad_enabled(whole):
            samples = [first(part) for part in parts]
            gen = _joined([loss_fn.groups(of_part) for of_part in samples])
        # In parts, memory's peak is here: the features of all labels, each once, and the gradients.
        leaves = [] if whole else [of_map.requires_grad_() for of_map in gen.values()]
        weight = groups.pos.new_ones(num) if groups.weight is None else groups.weight
        loss, info = loss_fn.of_groups(gen, *real, weight, *others)
        del real, others
        # The ranks average their gradients: this makes it the gradient of a mean over all groups.
        (loss * (num * self.ranks.size / groups.size)).backward()
        loss = loss.detach()  # Its graph would hold the features.
        if whole:
            return samples[0], loss, info
        gradients: dict[str, Any] = {name: leaf.grad for name, leaf in zip(gen, leaves, strict=True)}
        del gen, leaves
        for part in parts:
            with averaging_gradients(self.weights.distributed, part is parts[-1]):
                maps = loss_fn.groups(first(part))
                torch.autograd.backward(list(maps.values()), [gradients[name][part] for name in maps])
        return torch.cat(samples), loss, info

    def _draw(self, groups: Groups) -> list[dict[str, Tensor]]:
        """ε of the samples ``[l, G, …]``, and what else the network draws; a second time where it takes a second batch
        of samples to repel the first."""
        noise, drift = torch.Generator(self.device), self.loss_fn.drift
        batches = 1 if drift is None or drift["field"].include_self else 2
        drawn: list[list[dict[str, Tensor]]] = [[] for _ in range(batches)]
        for seed in groups.seeds:
            noise.manual_seed(seed)
            for of_batch in drawn:
                of_batch.append(self.signature.draw(self.model, groups.num_gen, noise, self.device))
        return [{name: torch.stack([group[name] for group in of_batch]) for name in of_batch[0]} for of_batch in drawn]

    def _generate(self, inputs: dict[str, Tensor], groups: Groups, batch: int, part: slice) -> Tensor:
        """The samples ``[l, G, *sample_shape]`` of a part of the groups, in the first or in the second batch."""
        self.stopwatch.enter("generator")
        step = self.config.step
        torch.manual_seed(groups.seeds[part][0] + batch)  # A part that is generated twice drops out the same values.
        drawn = {name: values[part].flatten(0, 1) for name, values in inputs.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=step.bf16):
            condition, cfg_scale = groups.condition[part], groups.cfg_scale[part]
            samples = self.signature.call(self.weights.distributed, drawn, condition, cfg_scale).float()
        if torch.is_grad_enabled() and not samples.requires_grad:
            name = type(self.model).__name__
            raise ValueError(f"the samples of the network {name} have no gradient: its forward must not detach them")
        self.stopwatch.enter_at_gradient(samples, "generator")
        if step.clamp and self.facts.get("pixel_range") is not None and not self.facts.get("latent"):
            samples = samples.clamp(*self.facts["pixel_range"])
        return samples.unflatten(0, (-1, groups.num_gen))

    def train_epoch(self, dataloader: Iterable[Any], use_cfg_training: bool = True) -> dict[str, float]:
        """Take one step for each batch of ``dataloader``: ``x``, ``(x,)`` or ``(x, y)``; by pair ``(x, condition)``.

        It returns the averages ``avg_loss``, which is constant by construction (each λ is normalised), ``grad_norm``
        and ``sample_spread``, which is to be watched, and ``num_steps``.
        """
        self.groups.learn_labels(dataloader)
        sums, num_steps = torch.zeros(3, device=self.device), 0
        for batch in progress(dataloader, "train_epoch", "step"):
            metrics = self.train_step(sample_of(batch), label_of(batch), use_cfg_training)
            sums += torch.stack([metrics[name] for name in ("loss", "grad_norm", "sample_spread")])
            num_steps += 1
        if not num_steps:
            raise ValueError("the dataloader yielded no batch, expected batches x or (x, y)")
        loss, grad_norm, spread = (sums / num_steps).tolist()
        return {"avg_loss": loss, "num_steps": num_steps, "grad_norm": grad_norm, "sample_spread": spread}

    def generate(
        self, batch_size: int, labels: Labels | None = None, cfg_scale: float | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Samples ``[batch_size, *sample_shape]`` of the averaged network, see :meth:`drifting.Generator.generate`.
        Where the trainer's groups are pairs, ``labels`` are conditions."""
        return self.generator().generate(batch_size, labels, cfg_scale, generator=generator)

    def generator(self, model: nn.Module | None = None) -> Generator:
        """The averaged network, or another average of it, with what is known of its samples."""
        model = unwrapped(self.ema_model if model is None else model)
        names = self.groups.class_names or tuple(range(getattr(model, "num_classes", 1)))
        facts, noise_shape = self.facts | {"cfg_scale": self.best_cfg_scale}, self.signature.noise_shape
        facts |= {"condition_shape": self.groups.condition_shape}
        for name, network in NETWORKS.items():
            if type(model) is network:
                facts |= {"name": name, "arguments": model.config}
            elif isinstance(model, network):  # It is the user's own, and whoever built it may have said how.
                facts = {"arguments": model.config} | facts
        return Generator(model, noise_shape, self.sample_shape, names, step=self.step, **facts)

    def save(self, folder: Path | str, quality: dict[str, Any] | None = None) -> None:
        """Write what :func:`drifting.load_generator` reads, with ``quality`` if it was measured. All ranks call this,
        and rank 0 writes."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        more: Any = self.loss_fn.learnt() | {"device": f"{self.ranks.size} x {name}" if self.ranks.size > 1 else name}
        self.ranks.on_main(partial(save_generator, RunDirectory(Path(folder)), self.generator(), quality, **more))

    def state_dict(self) -> dict[str, Any]:
        """All that shapes the rest of the run, whole and on the host of rank 0. All ranks call this."""
        best = {"best_decay": self.best_decay, "best_cfg_scale": self.best_cfg_scale}
        return self.weights.state_dict() | {"groups": self.groups.state_dict()} | best

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict` of a trainer that was created with the same arguments."""
        self.groups.load_state_dict(state["groups"])
        self.weights.load_state_dict(state)
        self.best_decay = state["best_decay"]
        self.best_cfg_scale = state.get("best_cfg_scale", 1.0)  # Earlier checkpoints do not say it.


def _joined(parts: list[FeatureMaps]) -> FeatureMaps:
    """The maps of all labels; those of several parts are freed map by map."""
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0])}


def drift_of(config: Config) -> Drift | str:
    """The field that the section ``loss`` describes: a named one and what changes it, or the name of a form apart."""
    loss, keys = config.loss, {key: value for key, value in vars(config.loss.field).items() if value is not None}
    name = keys.pop("name", "one_positive" if config.step.groups == "pairs" else "paper")
    beside = {key: getattr(loss, key) for key in ("scale", "scale_self_pairs", "normalize")}
    beside = {key: None if value == "none" else value for key, value in beside.items() if value is not None}
    drift = FIELDS[name]
    if drift is None:
        if keys or beside:
            raise ValueError(f"loss.field is {name}, which has none of the keys {', '.join(keys | beside)}: unset them")
        return name
    floor = {"affinity_floor": loss.affinity_floor} if name == "paper" else {}
    try:
        return drift | {"field": replace(drift["field"], **(floor | keys))} | beside
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss.field.{error}") from error


def create_trainer(
    model: nn.Module, feature_extractor: Extractor | Sequence[Extractor] = "latent", learning_rate: float = 1e-4,
    device: torch.device | str | None = None, queue_size: int = 128, cfg_scale_range: Sequence[float] = (1.0, 7.5),
    uncond_prob: float = 0.1, *, noise_shape: Sequence[int] | None = None,
    class_names: Sequence[int | str] | None = None, pixel_range: tuple[float, float] | None = None,
    decay_steps: int | None = None, labels_per_step: int | None = None, seed: int = 0, ranks: Ranks | None = None,
    **settings: Any,
) -> DriftingTrainer:  # fmt: skip
    """A trainer with its loss, queue, AdamW and schedule, for use in a script.

    Args:
        model: the network; moved to ``device``.
        feature_extractor: where samples are compared: ``'input'`` (the samples themselves), ``'pyramid'``,
            ``'latent'``, ``'resnet18'``, a module or function from samples ``[B, *sample_shape]`` to ``[B, D]``,
            ``[B, T, D]`` or a dict of such maps, or a list of these.
        device: by default CUDA if there is one, else the CPU.
        noise_shape: shape of one sample's noise, where ``model`` has no attribute of that name.
        class_names: the labels, in the order of the class numbers that ``model`` is given; by default they are learnt
            from the data.
        pixel_range: least and greatest value of an image. Real pixels pile up at both ends; clamping generated ones
            before the loss lets them do so too. None does not clamp.
        decay_steps: the learning rate falls along a cosine to 0 at this step; None lets it stay.
        labels_per_step: groups of a step, by default 4, or of a network that takes no labels one a rank.
        seed: of all randomness in training. The network's initial weights are the caller's.
        ranks: processes that share the labels of each step, from :func:`join_ranks`; arguments and initial weights are
            the same on each. The step is the same at any number of them, up to rounding.
        settings: any other key of the sections ``loss``, ``step``, ``guidance`` and ``optimizer`` of a configuration,
            such as ``bf16`` or ``groups="pairs"``; ``field`` is a name, a dict or a :class:`drift_ops.Field`. ``python
            -m drifting.train --help`` explains them and the arguments named as they are. By default they are the
            paper's, but 32 generated and 32 positive samples a label, 1000 steps of warm-up, and averages with a decay
            of 0.99, which suit short runs; and of pairs temperatures of 0.05, 0.2 and 0.5.

    A value out of its range raises ValueError, an unknown argument TypeError.
    """
    if labels_per_step is None:
        labels_per_step = 4 if Signature.of(model, noise_shape).conditions else (ranks or Ranks()).size
    settings = SCRIPTS | (PAIRS if settings.get("groups") == "pairs" else {}) | settings | {
        "learning_rate": learning_rate, "queue_size": queue_size, "cfg_scale_range": cfg_scale_range,
        "uncond_prob": uncond_prob, "cosine_decay": decay_steps is not None, "labels_per_step": labels_per_step,
    }  # fmt: skip
    config = Config()
    set_value(config, "seed", int(seed))
    set_value(config, "train.steps", int(decay_steps or config.train.steps))
    for name, value in settings.items():
        section = next((part for part in SECTIONS if hasattr(getattr(config, part), name)), None)
        if section is None:
            raise TypeError(f"create_trainer() got an unexpected keyword argument {name!r}")
        value = asdict(value) if isinstance(value, Field) else value.tolist() if hasattr(value, "tolist") else value
        for key, of_key in flattened({f"{section}.{name}": value}).items():
            set_value(config, key, of_key)
    names = None if class_names is None else tuple(plain_labels(class_names))
    if names is not None and len(number_labels(names, "class_names has")) != len(names):
        raise ValueError(f"class_names is {shown(class_names)}, expected different labels, one or more")
    return DriftingTrainer(
        model, config, feature_extractor, device=device, noise_shape=noise_shape, pixel_range=pixel_range, ranks=ranks,
        class_names=names,
    )  # fmt: skip
