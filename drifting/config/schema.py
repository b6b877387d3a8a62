"""What can be configured: a dataclass for each section, with the paper's values."""

from dataclasses import dataclass, field
from typing import Any

DATA_NAMES = ("digits", "mnist", "fashion_mnist", "cifar10", "folder", "huggingface", "latents")


@dataclass
class DataConfig:
    """The section ``data`` of a configuration.

    Args:
        name: kind of data set, one of ``DATASETS``.
        path: folder, or for ``huggingface`` a folder or a name on the hub; None looks in the usual places.
        image_size: height and width that images are brought to; None keeps theirs where they all have one size.
        flip: mirror every other training image, at random.
        crop: train on random resized crops instead of centre crops.
        workers: processes that read and decode; 0 reads in the training process.
        subset: configuration of a Hugging Face data set that has several.
        label_column: column of a Hugging Face data set to take as label, where there are several.
    """

    name: str = "digits"
    path: str | None = None
    image_size: int | None = None
    flip: bool = False
    crop: bool = False
    workers: int = 0
    subset: str | None = None
    label_column: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)



@dataclass
class ModelConfig:
    """Arguments of :class:`drifting.models.DriftingDiT`; image size, channels and classes come from the data.

    ``arguments`` are those of a network of the user's own, ``module:Name``; they are keys of the section too.
    """

    name: str = "drifting_dit"
    patch_size: int = 2
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    num_style_tokens: int = 32
    style_vocab: int = 64
    n_cls_tokens: int = 16
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class LossConfig:
    """Arguments of :class:`drifting.models.DriftingLoss`.

    ``feature_extractor`` is one name or a list of several, whose feature maps are taken together. ``mae`` says where
    the one of that name comes from: a source of :func:`drifting.pretrained.load_mae`.
    """

    feature_extractor: list[str] = field(default_factory=lambda: ["latent"])
    mae: str | None = None
    temperatures: list[float] = field(default_factory=lambda: [0.02, 0.05, 0.2])
    affinity_floor: float = 0.0


@dataclass
class StepConfig:
    """What one training step draws and how it is computed, see :func:`drifting.training.create_trainer`.

    With ``clamp``, generated pixels are clamped to the range of real ones.
    """

    labels_per_step: int = 64
    gen_per_label: int = 64
    pos_per_label: int = 64
    uncond_per_label: int = 16
    queue_size: int = 128
    unconditional_queue_size: int = 1000
    queue_device: str | None = None
    clamp: bool = True
    labels_at_once: int | None = None
    bf16: bool = False
    compile: bool = False
    activation_checkpointing: bool = False
    fsdp: bool = False


@dataclass
class GuidanceConfig:
    """Distribution of the guidance scale in training, see :func:`drifting.training.guidance.sample_cfg_scale`."""

    cfg_scale_range: list[float] = field(default_factory=lambda: [1.0, 4.0])
    cfg_exponent: float = 3.0
    uncond_prob: float = 0.0


@dataclass
class AdamWConfig:
    """AdamW and its schedule."""

    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    warmup_steps: int = 5000
    cosine_decay: bool = False
    max_grad_norm: float = 2.0


@dataclass
class OptimizerConfig(AdamWConfig):
    """AdamW and the averages of the weights, one for each decay, see :func:`drifting.training.create_trainer`."""

    ema_decay: list[float] = field(default_factory=lambda: [0.999])


@dataclass
class MAEOptimizerConfig(AdamWConfig):
    """AdamW and the average of the weights, see :class:`drifting.training.MAETrainer`."""

    ema_decay: float = 0.9995


@dataclass
class TrainConfig:
    """Length of the run and what happens when. ``eval_every=0`` evaluates at the end only.

    A loss or gradient that is not finite changes nothing, and more than ``max_skipped_steps`` of them end the run.
    ``wandb`` names a project of Weights & Biases to log to.
    """

    steps: int = 30000
    batch_size: int = 64
    log_every: int = 50
    save_every: int = 2000
    eval_every: int = 0
    max_skipped_steps: int = 0
    wandb: str | None = None


@dataclass
class EvaluationConfig:
    """How generated images are judged, see :mod:`drifting.evaluation`.

    ``features`` says where they are compared (:func:`drifting.evaluation_features.open_features`; None: in pixels) and
    ``reference`` names ``.npz`` files of statistics or images to compare with; without, it is the data set. There are
    ``num_samples`` images (None: the evaluator's) of each of ``cfg_scales``, of which the best counts.
    """

    features: str | None = None
    reference: list[str] = field(default_factory=list)
    num_samples: int | None = None
    cfg_scales: list[float] = field(default_factory=lambda: [1.0])


@dataclass
class Config:
    """A run of :mod:`drifting.train`."""

    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    step: StepConfig = field(default_factory=StepConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass
class MAEConfig:
    """Arguments of :class:`drifting.models.MAE`; channels and classes come from the data."""

    base_channels: int = 256
    layers: list[int] = field(default_factory=lambda: [3, 4, 6, 3])
    patch_size: int = 2
    input_patch_size: int = 1
    dropout_prob: float = 0.0


@dataclass
class MAELossConfig:
    """What is hidden and what weighs how much, see :class:`drifting.training.MAETrainer`."""

    mask_ratio_range: list[float] = field(default_factory=lambda: [0.5, 0.5])
    lambda_cls: float = 0.0
    finetune_steps: int = 0
    finetune_warmup_steps: int = 1000
    finetune_lambda_cls: float = 0.1


@dataclass
class MAEStepConfig:
    """What one training step of :class:`drifting.training.MAETrainer` sees of the images and how it is computed."""

    latents: bool = False
    images_at_once: int | None = None
    bf16: bool = False


@dataclass
class PretrainConfig:
    """A run of :mod:`drifting.pretrain`."""

    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: MAEConfig = field(default_factory=MAEConfig)
    loss: MAELossConfig = field(default_factory=MAELossConfig)
    step: MAEStepConfig = field(default_factory=MAEStepConfig)
    optimizer: MAEOptimizerConfig = field(default_factory=MAEOptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
