"""What can be configured: a dataclass for each section and a line for each key, whose defaults are the paper's."""

from dataclasses import dataclass, field
from math import inf
from typing import Any

from PIL import ImageColor

from ..utils.named import is_own
from .keys import FROM_0, FROM_1, FROM_2, POSITIVE, SHARE, each, key, one_of

DATA_NAMES = ("digits", "mnist", "fashion_mnist", "cifar10", "folder", "huggingface", "latents")
DRIFTING_DIT = "drifting_dit"
SMALL_NETWORKS = ("conv_decoder", "residual_mlp")
EXTRACTORS = each(one_of("latent", "input", "pixels", "pyramid", "resnet18", "convnext_v2", "mae", own=True))
FIELDS = ("paper", "release", "sinkhorn_split", "one_positive", "wflow", "gaussian")
SCALE_RANGE = "[least, greatest] with 1 <= least <= greatest", lambda v: len(v) == 2 and 1 <= v[0] <= v[1] < inf
NETWORK = one_of(DRIFTING_DIT, *SMALL_NETWORKS, own=True)
SHARE_RANGE = "[least, greatest] with 0 < least <= greatest <= 1", lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1
FOUR = "four numbers of 1 or more", lambda v: len(v) == 4 and min(v) >= 1
COLOUR = "a colour such as white or rgb(30, 60, 90)", lambda v: len(ImageColor.getrgb(v)) == 3
SEED = "All randomness of a run follows from this number."
DATA = "The training data. If name is module:Name of your own, all other keys but workers are its arguments."
MODEL = (
    f"The generator. These are keys of {DRIFTING_DIT}. Of {', '.join(SMALL_NETWORKS)} and of module:Name of your own, "
    "all keys but the name are arguments."
)
LOSS = "The drifting loss. loss.field=NAME names a field (docs/fields.md), whose values stand where keys are null."
TRAIN = "The length of the run, and what happens when."


def takes_arguments(section: str, name: str) -> bool:
    """Tell whether the keys of a section are arguments of the part called ``name``, instead of keys in this file."""
    return is_own(name) or (section == "model" and name in SMALL_NETWORKS)


@dataclass
class DataConfig:
    name: str = key("digits", "The data set; data=NAME sets it too.", one_of(*DATA_NAMES, own=True))
    path: str | None = key(None, "This folder, or this name on the hub, has the data; null looks in the usual places.")
    image_size: int | None = key(None, "Images get this height and width; null keeps theirs.", FROM_1)
    flip: bool = key(False, "Every other training image, chosen at random, is mirrored.")
    crop: bool = key(False, "Training sees random resized crops instead of centre crops.")
    background: str = key("black", "Transparent parts of image files show this colour.", COLOUR)
    skip_broken: bool = key(False, "Another image of the class stands for a file that cannot be read.")
    workers: int = key(0, "This many processes read; 0 reads in the training process.", FROM_0)
    subset: str | None = key(None, "Hugging Face data sets are read in this configuration.")
    label_column: str | None = key(None, "This column of Hugging Face data holds the labels.")
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class ModelConfig:
    name: str = key(DRIFTING_DIT, "This network is trained; model=NAME is the same.", NETWORK)
    patch_size: int = key(2, "A token stands for a square with this side.", FROM_1)
    embed_dim: int = key(768, "A token has this many values, a multiple of 4 and of 2 * num_heads.", FROM_1)
    depth: int = key(12, "The network has this many transformer blocks.", FROM_1)
    num_heads: int = key(12, "Each block has this many attention heads.", FROM_1)
    mlp_ratio: float = key(4.0, "Feed-forward layers are this many times as wide as a token.", POSITIVE)
    num_style_tokens: int = key(32, "Each sample has this many random style codes beside its noise.", FROM_0)
    style_vocab: int = key(64, "Each style code is one of this many.", FROM_1)
    n_cls_tokens: int = key(16, "This many tokens carry class and guidance scale.", FROM_0)
    arguments: dict[str, Any] = field(default_factory=dict)

    def keywords(self) -> dict[str, Any]:
        """The arguments of the network: all values of the section but its name."""
        ours = {name: value for name, value in vars(self).items() if name not in ("name", "arguments")}
        return dict(self.arguments) if takes_arguments("model", self.name) else ours


@dataclass
class FieldConfig:
    """The keys of :class:`drift_ops.Field`, which checks them, and the name of the field that they change."""

    name: str | None = key(
        None, "The field is this one; null is paper, and one_positive with step.groups=pairs.", one_of(*FIELDS)
    )
    cost: str | None = key(None, "The cost of a pair is its distance (l2) or the square of it (l2_sq).")
    coupling: str | None = key(None, "Samples and targets are coupled by row, two_sided or sinkhorn.")
    sides: str | None = key(None, "Data and negatives are coupled together (joint) or each apart (split).")
    iterations: int | None = key(None, "Sinkhorn scales rows and columns this many times.")
    weights: str | None = key(None, "Weights multiply the affinity or the kernel, or are sums of columns (marginal).")
    include_self: bool | None = key(None, "Samples repel each other; false: a second batch of samples repels them.")
    mask_self: float | bool | None = key(None, "A sample does not repel itself; a number adds that to the cost.")
    affinity_floor: float | None = key(None, "A squared affinity is at least this.")


@dataclass
class LossConfig:
    feature_extractor: list[str] = key(
        ["latent"], "Samples are compared in these features; input, once pixels, is the sample itself.", EXTRACTORS
    )
    mae: str | None = key(None, "The extractor mae is the encoder of this run directory or hf://NAME.")
    temperatures: list[float] = key([0.02, 0.05, 0.2], "The field is summed over these temperatures.", each(POSITIVE))
    affinity_floor: float = key(0.0, "A squared affinity of the paper's field is at least this.", SHARE)
    field: FieldConfig = key(FieldConfig, "What samples drift along.")
    scale: str | None = key(
        None, "Costs are divided by their mean: global, or of each group.", one_of("global", "group")
    )
    scale_self_pairs: bool | None = key(None, "That mean counts the pairs of a sample with itself.")
    normalize: str | None = key(
        None, "Forces are divided by their RMS: over all groups, of each group, the mean of these, or none.",
        one_of("global", "group", "group_mean", "none"),
    )  # fmt: skip
    learn_temperature: bool = key(False, "The temperatures of each feature map learn, from where they begin.")


@dataclass
class StepConfig:
    groups: str = key("classes", "A group is a class, or a pair (sample, condition).", one_of("classes", "pairs"))
    gen_per_pair: int = key(16, "This many samples are generated for each pair.", FROM_2)
    labels_per_step: int = key(64, "A step draws this many labels.", FROM_1)
    gen_per_label: int = key(64, "This many samples are generated for each label, and repel each other.", FROM_2)
    pos_per_label: int = key(64, "This many real samples of the label attract them.", FROM_1)
    uncond_per_label: int = key(16, "This many real samples of any label repel them as much as guidance asks.", FROM_0)
    queue_size: int = key(128, "This many real samples of each label are kept to draw from.", FROM_1)
    unconditional_queue_size: int = key(1000, "This many of all labels together are kept.", FROM_1)
    queue_device: str | None = key(None, "Real samples are kept there; null: beside the model.", one_of("cpu", "cuda"))
    queue_features: bool = key(False, "The queue keeps features of real samples too: each is encoded once.")
    clamp: bool = key(True, "Generated pixels are clamped to the range of real ones.")
    labels_at_once: int | None = key(None, "Memory holds this many labels, or pairs, at once; null: all.", FROM_1)
    bf16: bool = key(False, "The networks compute in bfloat16; weights, distances and loss stay float32.")
    compile: bool = key(False, "torch.compile makes steps faster, and delays the first ones.")
    activation_checkpointing: bool = key(False, "Activations are computed twice instead of kept.")
    fsdp: bool = key(False, "Weights, averages and optimizer are spread over the ranks.")


@dataclass
class GuidanceConfig:
    cfg_scale_range: list[float] = key([1.0, 4.0], "Guidance scales are drawn from this range.", SCALE_RANGE)
    cfg_exponent: float = key(3.0, "Their density falls with this power of the scale; 0 is uniform.", FROM_0)
    uncond_prob: float = key(0.0, "This share of the labels is trained at scale 1 instead.", SHARE)


@dataclass
class AdamWConfig:
    learning_rate: float = key(2e-4, "After the warm-up, training has this learning rate.", POSITIVE)
    weight_decay: float = key(0.01, "Weights decay at this rate, apart from the gradient.", FROM_0)
    warmup_steps: int = key(5000, "The learning rate rises from 0 over this many steps.", FROM_0)
    cosine_decay: bool = key(False, "The learning rate then falls along a cosine to 0 at the end.")
    max_grad_norm: float = key(2.0, "Gradients are clipped to this norm.", POSITIVE)


@dataclass
class OptimizerConfig(AdamWConfig):
    ema_decay: list[float] = key([0.999], "Averages of the weights have these decays.", each(SHARE))


@dataclass
class MAEOptimizerConfig(AdamWConfig):
    ema_decay: float = key(0.9995, "The average of the weights has this decay.", SHARE)


@dataclass
class TrainConfig:
    steps: int = key(30000, "Training ends after this many steps.", FROM_1)
    batch_size: int = key(64, "Each step reads this many training samples.", FROM_1)
    log_every: int = key(50, "Metrics are logged whenever this many steps have passed.", FROM_1)
    save_every: int = key(2000, "A checkpoint is written whenever this many steps have passed.", FROM_1)
    eval_every: int = key(0, "Evaluation comes whenever this many steps have passed; 0 is at the end only.", FROM_0)
    max_skipped_steps: int = key(0, "The run ends once more steps than this had no finite loss and gradient.", FROM_0)
    wandb: str | None = key(None, "Metrics go to this project of Weights & Biases too.")


@dataclass
class EvaluationConfig:
    features: str | None = key(None, "Images are compared in this network's features; null compares them as they are.")
    reference: list[str] = key([], "Samples are compared with these .npz files instead of the data.")
    num_samples: int | None = key(None, "This many are generated; null is what the measures are meant for.", FROM_2)
    cfg_scales: list[float] = key([1.0], "They are generated at these guidance scales; the best counts.", each(FROM_1))


@dataclass
class Config:
    """A run of :mod:`drifting.train`."""

    seed: int = key(0, SEED, FROM_0)
    data: DataConfig = key(DataConfig, DATA)
    model: ModelConfig = key(ModelConfig, MODEL)
    loss: LossConfig = key(LossConfig, LOSS)
    step: StepConfig = key(StepConfig, "What a training step draws and how it is computed.")
    guidance: GuidanceConfig = key(GuidanceConfig, "The guidance scales to train for.")
    optimizer: OptimizerConfig = key(OptimizerConfig, "AdamW, its schedule, and the averages of the weights.")
    train: TrainConfig = key(TrainConfig, TRAIN)
    evaluation: EvaluationConfig = key(EvaluationConfig, "How samples are judged.")


@dataclass
class MAEConfig:
    base_channels: int = key(256, "The first stage has this many channels.", FROM_1)
    layers: list[int] = key([3, 4, 6, 3], "The stages have these numbers of residual blocks.", FOUR)
    patch_size: int = key(2, "Squares with this side are hidden or visible as a whole.", FROM_1)
    input_patch_size: int = key(1, "Squares with this side are the first stage's pixels.", FROM_1)
    dropout_prob: float = key(0.0, "Dropout sets this share of the values to 0.", SHARE)


@dataclass
class MAELossConfig:
    mask_ratio_range: list[float] = key(
        [0.5, 0.5], "An image hides a share of its squares that is drawn from this range.", SHARE_RANGE
    )
    lambda_cls: float = key(0.0, "The classification error has this weight.", SHARE)
    finetune_steps: int = key(0, "In this many steps at the end its weight rises from 0 to another.", FROM_0)
    finetune_warmup_steps: int = key(1000, "The rise takes this many steps.", FROM_0)
    finetune_lambda_cls: float = key(0.1, "It ends at this weight.", SHARE)


@dataclass
class MAEStepConfig:
    latents: bool = key(False, "The Stable Diffusion VAE encodes the images first.")
    images_at_once: int | None = key(None, "Memory holds this many images at once; null: all.", FROM_1)
    bf16: bool = key(False, "The network computes in bfloat16; its weights and the losses stay float32.")
    compile: bool = key(False, "torch.compile makes steps faster, and delays the first ones.")
    fsdp: bool = key(False, "Weights, average and optimizer are spread over the ranks.")


@dataclass
class PretrainConfig:
    """A run of :mod:`drifting.pretrain`."""

    seed: int = key(0, SEED, FROM_0)
    data: DataConfig = key(DataConfig, DATA)
    model: MAEConfig = key(MAEConfig, "The masked autoencoder.")
    loss: MAELossConfig = key(MAELossConfig, "What is hidden, and what weighs how much.")
    step: MAEStepConfig = key(MAEStepConfig, "What a training step sees and how it is computed.")
    optimizer: MAEOptimizerConfig = key(MAEOptimizerConfig, "AdamW, its schedule, and the average of the weights.")
    train: TrainConfig = key(TrainConfig, TRAIN)
