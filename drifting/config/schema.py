"""What can be configured: a dataclass for each section and a line for each key, whose defaults are the paper's."""

from dataclasses import dataclass, field, fields
from math import inf
from typing import Any

from .keys import key, section

DATA_NAMES = ("digits", "mnist", "fashion_mnist", "cifar10", "folder", "huggingface", "latents")
DRIFTING_DIT = "drifting_dit"
EXTRACTORS = ("latent", "input", "pixels", "resnet18", "convnext_v2", "mae")


@dataclass
class DataConfig:
    """The samples that a run learns from; ``arguments`` are those of a data set of the user's own, ``module:Name``."""

    name: str = key("digits", "The kind of data set.", one_of=DATA_NAMES, own=True, resume="never")
    path: str | None = key(
        None, "The folder of the data, or their name on the hub; null looks in the usual places.", resume="free"
    )
    image_size: int | None = key(
        None, "Images are brought to this height and width; null keeps theirs.", least=1, resume="never"
    )
    flip: bool = key(False, "Every other training image, chosen at random, is mirrored.")
    crop: bool = key(False, "Training sees random resized crops instead of centre crops.")
    workers: int = key(
        0, "As many processes read and decode; 0 does so in the training process.", least=0, resume="free"
    )
    subset: str | None = key(None, "The configuration of a Hugging Face data set that has several.", resume="never")
    label_column: str | None = key(None, "The column of a Hugging Face data set that holds labels.", resume="never")
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class ModelConfig:
    """The generator: :class:`drifting.models.DriftingDiT`, or a network of the user's own, ``module:Name``.

    The sizes of the samples and the number of classes come from the data.
    """

    name: str = key(DRIFTING_DIT, "The network.", one_of=(DRIFTING_DIT,), own=True)
    patch_size: int = key(2, "A token stands for a square of this many pixels or latents a side.", least=1)
    embed_dim: int = key(768, "The width of a token, a multiple of 4 and of 2 * num_heads.", least=1)
    depth: int = key(12, "The number of transformer blocks.", least=1)
    num_heads: int = key(12, "The number of attention heads.", least=1)
    mlp_ratio: float = key(4.0, "The feed-forward layers are this many times as wide as a token.", positive=True)
    num_style_tokens: int = key(32, "The number of random style codes that a sample gets beside its noise.", least=0)
    style_vocab: int = key(64, "The number of codes that each style code is drawn from.", least=1)
    n_cls_tokens: int = key(16, "The number of tokens that tell the blocks of class and guidance scale.", least=0)
    arguments: dict[str, Any] = field(default_factory=dict)

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of the network: the section without its name."""
        if self.name != DRIFTING_DIT:
            return dict(self.arguments)
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name not in ("name", "arguments")}


@dataclass
class LossConfig:
    """The drifting loss, see :class:`drifting.models.DriftingLoss`."""

    feature_extractor: list[str] = key(
        ["latent"], "What samples are compared in; input, once called pixels, is the sample.",
        one_of=EXTRACTORS, own=True,
    )  # fmt: skip
    mae: str | None = key(None, "The run directory, file or hf:// name of the extractor called mae.")
    temperatures: list[float] = key(
        [0.02, 0.05, 0.2], "The drifting field is summed over these temperatures, R of the release.", positive=True
    )
    affinity_floor: float = key(0.0, "No squared affinity is less than this; the release has 1e-6.", least=0)


@dataclass
class StepConfig:
    """What one training step draws and how it is computed, see :func:`drifting.training.create_trainer`."""

    labels_per_step: int = key(64, "The number of classes that a step draws.", least=1)
    gen_per_label: int = key(64, "The number of samples that are generated for each of them.", least=1)
    pos_per_label: int = key(64, "The number of real samples that attract those.", least=1)
    uncond_per_label: int = key(16, "The number of real samples of any class that repel those.", least=1)
    queue_size: int = key(128, "The number of real samples that are kept of each class.", least=1, resume="never")
    unconditional_queue_size: int = key(
        1000, "The number of real samples that are kept of all classes together.", least=1, resume="never"
    )
    queue_device: str | None = key(
        None, "Where they are kept; null keeps them beside the model.", one_of=("cpu", "cuda"), resume="free"
    )
    clamp: bool = key(True, "Generated pixels are clamped to the range of real ones.")
    labels_at_once: int | None = key(
        None, "A step holds the activations of this many labels at once; null holds all.", least=1, resume="free"
    )
    bf16: bool = key(False, "The networks compute in bfloat16; weights, distances and loss stay float32.")
    compile: bool = key(False, "torch.compile makes the steps faster and the first ones slow.", resume="free")
    activation_checkpointing: bool = key(
        False, "The generator computes its activations a second time instead of keeping them.", resume="free"
    )
    fsdp: bool = key(False, "Weights, averages and optimizer are spread over the ranks.", resume="free")


@dataclass
class GuidanceConfig:
    """The guidance scales in training, see :func:`drifting.training.guidance.sample_cfg_scale`."""

    cfg_scale_range: list[float] = key(
        [1.0, 4.0], "Training draws guidance scales from this range.",
        rule=("[least, greatest] with 1 <= least <= greatest", lambda v: len(v) == 2 and 1 <= v[0] <= v[1] < inf),
    )  # fmt: skip
    cfg_exponent: float = key(3.0, "Their density falls with this power of the scale; 0 is uniform.", least=0)
    uncond_prob: float = key(0.0, "This share of the labels has no guidance: their scale is 1.", least=0, most=1)


@dataclass
class AdamWConfig:
    """AdamW and its schedule."""

    learning_rate: float = key(2e-4, "The learning rate after the warm-up.", positive=True)
    weight_decay: float = key(0.01, "The decoupled weight decay.", least=0)
    warmup_steps: int = key(5000, "The learning rate rises from 0 over this many steps.", least=0)
    cosine_decay: bool = key(False, "The learning rate then falls along a cosine to 0 at the end.")
    max_grad_norm: float = key(2.0, "Gradients are clipped to this norm.", positive=True)


@dataclass
class OptimizerConfig(AdamWConfig):
    """AdamW and the averages of the weights, one for each decay; evaluation chooses the best of several."""

    ema_decay: list[float] = key(
        [0.999], "The decay of the averaged weights; several make as many averages.", least=0, most=1, resume="never"
    )


@dataclass
class MAEOptimizerConfig(AdamWConfig):
    """AdamW and the average of the weights, see :class:`drifting.training.MAETrainer`."""

    ema_decay: float = key(0.9995, "The decay of the averaged weights.", least=0, most=1, resume="never")


@dataclass
class TrainConfig:
    """The length of a run, and what happens when."""

    steps: int = key(30000, "Training ends after this many steps.", least=1, resume="free")
    batch_size: int = key(64, "Each step reads this many training samples.", least=1)
    log_every: int = key(50, "Metrics are logged every so many steps.", least=1, resume="free")
    save_every: int = key(2000, "A checkpoint is written every so many steps.", least=1, resume="free")
    eval_every: int = key(0, "The model is evaluated every so many steps; 0 is at the end only.", least=0, resume="free")
    max_skipped_steps: int = key(
        0, "The run goes on while no more steps than this were skipped for a loss or gradient that is not finite.",
        least=0, resume="free",
    )  # fmt: skip
    wandb: str | None = key(None, "The Weights & Biases project that metrics go to as well.", resume="free")


@dataclass
class EvaluationConfig:
    """How samples are judged, see :mod:`drifting.evaluation`."""

    features: str | None = key(None, "The network that images are compared in; null compares the samples themselves.")
    reference: list[str] = key([], "The .npz files of statistics or images to compare with, instead of the data.")
    num_samples: int | None = key(None, "The number of samples; null is what the evaluator is meant for.", least=2)
    cfg_scales: list[float] = key([1.0], "The guidance scales to try, of which the best counts.", least=1)


@dataclass
class Config:
    """A run of :mod:`drifting.train`."""

    seed: int = key(0, "All randomness of a run follows from this number.", least=0, resume="never")
    data: DataConfig = section(
        DataConfig, "the training data. data=NAME is short for data.name=NAME. "
        "If that is module:Name of your own, all other keys but data.workers are its arguments.",
    )  # fmt: skip
    model: ModelConfig = section(
        ModelConfig, "the generator. model=NAME is short for model.name=NAME. "
        "If that is module:Name of your own, all other keys are its arguments.", resume="never",
    )  # fmt: skip
    loss: LossConfig = section(LossConfig, "the drifting loss.")
    step: StepConfig = section(StepConfig, "what a training step draws and how it is computed.")
    guidance: GuidanceConfig = section(GuidanceConfig, "the guidance scales to train for.")
    optimizer: OptimizerConfig = section(OptimizerConfig, "AdamW, its schedule and the averages of the weights.")
    train: TrainConfig = section(TrainConfig, "the length of the run, and what happens when.")
    evaluation: EvaluationConfig = section(EvaluationConfig, "how the samples are judged.", resume="free")


@dataclass
class MAEConfig:
    """Arguments of :class:`drifting.models.MAE`; channels and classes come from the data."""

    base_channels: int = key(256, "The number of channels of the first stage; each further one doubles it.", least=1)
    layers: list[int] = key(
        [3, 4, 6, 3], "The number of residual blocks of each stage.",
        rule=("four numbers of 1 or more", lambda v: len(v) == 4 and min(v) >= 1),
    )  # fmt: skip
    patch_size: int = key(2, "Squares of this many positions a side are hidden whole.", least=1)
    input_patch_size: int = key(1, "Images are cut into patches of this size before the first stage.", least=1)
    dropout_prob: float = key(0.0, "The share of values that dropout sets to 0.", least=0, most=1)


@dataclass
class MAELossConfig:
    """What is hidden and what weighs how much, see :class:`drifting.training.MAETrainer`."""

    mask_ratio_range: list[float] = key(
        [0.5, 0.5], "An image hides a share of its squares from this range.",
        rule=("[least, greatest] with 0 < least <= greatest <= 1", lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1),
    )  # fmt: skip
    lambda_cls: float = key(0.0, "The weight of the classification error, until the last steps.", least=0, most=1)
    finetune_steps: int = key(0, "The number of last steps, in which that weight rises from 0.", least=0)
    finetune_warmup_steps: int = key(1000, "The number of steps that the rise takes.", least=0)
    finetune_lambda_cls: float = key(0.1, "The weight of the classification error after it.", least=0, most=1)


@dataclass
class MAEStepConfig:
    """What one training step of :class:`drifting.training.MAETrainer` sees and how it is computed."""

    latents: bool = key(False, "The Stable Diffusion VAE encodes the images in every step.", resume="never")
    images_at_once: int | None = key(
        None, "A step holds the activations of this many images at once; null holds all.", least=1, resume="free"
    )
    bf16: bool = key(False, "The network computes in bfloat16; its weights and the losses stay float32.")


@dataclass
class PretrainConfig:
    """A run of :mod:`drifting.pretrain`."""

    seed: int = key(0, "All randomness of a run follows from this number.", least=0, resume="never")
    data: DataConfig = section(
        DataConfig, "the training data. data=NAME is short for data.name=NAME. "
        "If that is module:Name of your own, all other keys but data.workers are its arguments.",
    )  # fmt: skip
    model: MAEConfig = section(MAEConfig, "the masked autoencoder.", resume="never")
    loss: MAELossConfig = section(MAELossConfig, "what is hidden, and what weighs how much.")
    step: MAEStepConfig = section(MAEStepConfig, "what a training step sees and how it is computed.")
    optimizer: MAEOptimizerConfig = section(MAEOptimizerConfig, "AdamW, its schedule and the average of the weights.")
    train: TrainConfig = section(TrainConfig, "the length of the run, and what happens when.")
