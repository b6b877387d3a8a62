"""Networks in whose features images are compared: FID's Inception, DINOv2, or a classifier or encoder of our own."""

import importlib.util
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..errors import UserError
from ..hub.run_directory import RunDirectory, read_any
from ..models import MAE, Classifier
from ..models.feature_extractor import IMAGENET_MEAN, IMAGENET_STD
from ..utils.images import Pixels

INCEPTION, DINOV2 = "inception", "dinov2"
INCEPTION_DIM = 2048
SPATIAL_CHANNELS, SPATIAL_DIM = 7, 2023  # 17 × 17 locations of 7 channels: nearly as many values as features
DINOV2_MODEL = "facebook/dinov2-large"  # ViT-L/14, as Stein et al. (arXiv 2306.04675) recommend
DINOV2_SIZE = 224
BATCH, OWN_BATCH = 50, 500  # images that large and small networks are given at once
DOWNLOAD_SECONDS = 30  # to wait for the next bytes


class Features(NamedTuple):
    """What a network makes of images.

    ``points [N, D]`` are the features that are compared; ``logits [N, K]`` are those of networks that classify, and
    ``spatial [N, 2023]`` those of Inception, before it pools. Where a network has none, they are None.
    """

    points: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


Network = Callable[[Tensor], Features]


@dataclass(frozen=True)
class ImageFeatures:
    """A network with what is to be known of it.

    Args:
        name: of the network.
        distance: what the Fréchet distance in its features is called.
        dim: number of features.
        network: from uint8 images ``[B, C, H, W]`` on ``device`` to their features.
        device: where it computes.
        batch: images it is given at once.
        classifier: whether its classes are those of the images.
    """

    name: str
    distance: str
    dim: int
    network: Network
    device: torch.device
    batch: int = BATCH
    classifier: Classifier | None = None

    @torch.no_grad()
    def __call__(self, images: Pixels) -> Features:
        """Features of images ``[N, H, W, C]``, float32."""
        batches = torch.from_numpy(images).split(self.batch)
        bar = tqdm(batches, desc=self.name, unit="batch", delay=1, leave=False, disable=None)
        with torch.backends.cudnn.flags(allow_tf32=False):
            return concatenate([self.network(batch.permute(0, 3, 1, 2).to(self.device)) for batch in bar])


def concatenate(parts: Sequence[Features]) -> Features:
    """The features of all parts' images."""
    logits = [part.logits for part in parts if part.logits is not None]
    spatial = [part.spatial for part in parts if part.spatial is not None]
    points = torch.cat([part.points for part in parts])
    return Features(points, torch.cat(logits) if logits else None, torch.cat(spatial) if spatial else None)


def open_features(source: str) -> ImageFeatures:
    """The network that ``source`` names.

    ``inception`` is downloaded once by torch-fidelity, ``dinov2`` by transformers. A file that ends in ``.pth`` holds
    Inception's weights, a directory a classifier of :mod:`drifting.train_classifier`, a masked autoencoder of
    :mod:`drifting.pretrain`, or a DINOv2 in the format of transformers.

    Raises:
        UserError: there is no such network, its library is not installed, or it cannot be loaded.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = Path(source)
    if source == INCEPTION or path.suffix == ".pth":
        network = _load_inception(None if source == INCEPTION else path, device)
        return ImageFeatures(INCEPTION, "fid", INCEPTION_DIM, network, device)
    if source == DINOV2 or (path / "config.json").is_file():
        model = _load_dinov2(DINOV2_MODEL if source == DINOV2 else source, device)
        return ImageFeatures(DINOV2, "fd_dinov2", model.config.hidden_size, _class_token(model), device)
    if not RunDirectory(path).description.is_file():
        raise UserError(
            f"there are no features {source}: expected {INCEPTION}, {DINOV2}, a .pth file of Inception's weights, or a "
            "directory of `python -m drifting.train_classifier` or `drifting.pretrain`"
        )
    own, _ = read_any(path)
    if isinstance(own, Classifier):
        name, network, classifier = "classifier", _classify(own.to(device)), own
    elif isinstance(own, MAE):
        name, network, classifier = "mae", _encode(own.to(device)), None
    else:
        raise UserError(f"{source} holds a generator, not a classifier or masked autoencoder")
    return ImageFeatures(name, "frechet_distance", own.fc.in_features, network, device, OWN_BATCH, classifier)


def _classify(classifier: Classifier) -> Network:
    def network(images: Tensor) -> Features:
        points = classifier.features(_own_input(images, classifier))
        return Features(points, classifier.fc(points))

    return network


def _encode(mae: MAE) -> Network:
    """The mean of the encoder's last stage, of which the autoencoder's own classifier takes account."""

    def network(images: Tensor) -> Features:
        visible = mae.encoder.patchify(_own_input(images, mae))
        return Features(mae.encoder(visible)["layer4"].mean((2, 3)))

    return network


def _own_input(images: Tensor, model: Classifier | MAE) -> Tensor:
    if images.shape[1] != model.config["in_chans"]:
        raise UserError(
            f"received images of {images.shape[1]} channels, the features are of {model.config['in_chans']}"
        )
    return images / 127.5 - 1


def _load_inception(weights: Path | None, device: torch.device) -> Network:
    """torch-fidelity's port of the Inception that FID is defined by, its TensorFlow resizing included.

    The spatial features are those of ADM's ``evaluations/evaluator.py``, after Nash et al. (arXiv 2103.03841): the
    first channels of ``mixed_6/conv``, which is ``Mixed_6d.branch1x1`` here, location by location.
    """
    try:
        from torch_fidelity import FeatureExtractorInceptionV3
    except Exception as error:  # a torchvision that does not fit torch raises RuntimeError
        raise UserError(f"Inception features need {_missing('torch_fidelity', 'fid', error)}") from error
    if weights is not None:
        _check_weights(weights)
    patience = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(DOWNLOAD_SECONDS)  # torch.hub would wait for ever
        extractor = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], None if weights is None else str(weights), verbose=False
        ).to(device)
    except Exception as error:  # offline, no access, weights of something else: they have no base class in common
        raise UserError(
            f"cannot load Inception's weights ({_reason(error)}): where they cannot be downloaded, name the file "
            "weights-inception-2015-12-05-6726825d.pth of torch-fidelity's release 0.2.0 as features; if one in "
            f"{torch.hub.get_dir()}/checkpoints was cut short, delete it"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)

    branches: list[Tensor] = []
    extractor.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: branches.append(output))

    def network(images: Tensor) -> Features:
        points, logits = extractor(_in_colour(images))
        spatial = branches.pop()[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1)  # [B, 17, 17, 7]
        return Features(points, logits, spatial.flatten(1))

    return network


def _check_weights(path: Path) -> None:
    """Raise :class:`UserError` unless ``path`` holds tensors and nothing that unpickling could run."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many classes
        raise UserError(f"{path} cannot be read as weights: {_reason(error)}") from error


def _load_dinov2(model: str, device: torch.device) -> Any:
    try:
        from transformers import Dinov2Model
    except Exception as error:  # of what it imports in turn
        raise UserError(f"DINOv2 features need {_missing('transformers', 'dinov2', error)}") from error
    try:
        dinov2, info = Dinov2Model.from_pretrained(model, output_loading_info=True)
    except Exception as error:  # offline, no access, a broken cache: they have no base class in common
        raise UserError(
            f"cannot load DINOv2 {model} ({_reason(error)}): where the hub is out of reach, name a directory that "
            f"`hf download {DINOV2_MODEL} --local-dir DIR` filled elsewhere"
        ) from error
    odd = {*info["missing_keys"], *info["unexpected_keys"]} - {"classifier.weight", "classifier.bias"}
    if odd:  # transformers would leave them random, or out
        raise UserError(f"{model} holds no DINOv2 in the format of transformers: {min(odd)} is missing or left over")
    return dinov2.float().to(device).eval()


def _class_token(dinov2: Any) -> Network:
    """DINOv2's class token of images resized and normalised as in EDM2's ``calculate_metrics.py``."""
    mean, std = (torch.tensor(values, device=dinov2.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def network(images: Tensor) -> Features:
        size = (DINOV2_SIZE, DINOV2_SIZE)
        x = F.interpolate(_in_colour(images).float(), size, mode="bicubic", antialias=True)
        return Features(dinov2((x / 255 - mean) / std).pooler_output)

    return network


def _in_colour(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def _missing(library: str, extra: str, error: Exception) -> str:
    """The library, and why it could not be imported."""
    if importlib.util.find_spec(library) is None:
        return f"{library}: `pip install 'drifting[{extra}]'`"
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return (
        f"{library}, which is there but cannot be imported ({_reason(cause)}): see that torch and torchvision are of "
        "one release and one build, for the CPU or for the same CUDA"
    )


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
