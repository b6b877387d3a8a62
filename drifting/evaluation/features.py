"""What samples are compared by: the features of FID's Inception, DINOv2, or a network of ours, or their own values."""

import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import Dataset
from ..errors import UserError, reason, require
from ..hub.run_directory import RunDirectory
from ..models import MAE, Classifier
from ..models.feature_extractor import ImageNetNormalization
from ..models.network_files import read_model
from ..training.distributed import Ranks
from ..utils.progress import progress
from .archives import Samples

INCEPTION, DINOV2 = "inception", "dinov2"
PIXEL_SCALE = 16 / 255  # Images that are compared as they are have values of 0 … 16, as the digits are published.
FRECHET_DISTANCE = "frechet_distance"  # It has names of its own in Inception's and DINOv2's features only.

SPATIAL_CHANNELS = 7  # At 17 × 17 locations these are 2023 values, nearly as many as there are features.
DINOV2_MODEL = "facebook/dinov2-large"  # ViT-L/14, as Stein et al. (arXiv 2306.04675) recommend.
DOWNLOAD_SECONDS = 30  # A download is given up when no bytes came for so long.
BATCH, BATCH_VALUES = 50, 2**23  # So many samples are in a batch, unless they have more values than this …
LEAST_BATCHES = 32  # … or there would be fewer batches, which many ranks could not share evenly.


class Features(NamedTuple):
    """What is compared of N samples; all but ``points`` is None where the network does not have it."""

    points: Tensor  # [N, D]
    logits: Tensor | None = None  # [N, K], for Inception's score
    spatial: Tensor | None = None  # [N, 2023], Inception's before it pools
    classes: Tensor | None = None  # [N], what a classifier of the data takes the samples for
    digests: Tensor | None = None  # [N], int64, alike for equal samples

    def to(self, device: torch.device | str) -> "Features":
        return Features._make(None if field is None else field.to(device) for field in self)


@dataclass(frozen=True)
class ImageFeatures:
    """A network and how it is used."""

    name: str
    dim: int  # An image has this many features.
    network: Callable[[Tensor], Features]  # It gives those of uint8 images [B, C, H, W] on the device.
    device: torch.device
    distance: str = FRECHET_DISTANCE  # The Fréchet distance in these features is called so.
    num_classes: int | None = None  # A classifier of the data tells this many classes apart.

    @torch.no_grad()
    def __call__(self, images: Samples) -> Features:
        """Features, float32, of images ``[N, H, W, C]`` from 0 to 255, uint8 or float32 that is rounded."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).round().clamp(0, 255)
        with torch.backends.cudnn.flags(allow_tf32=False):
            return self.network(pixels.to(self.device, torch.uint8))


class Values:
    """Small samples as points, without a network: images on a scale of 0 … 16, others as they are."""

    name, distance, device, num_classes = "values", FRECHET_DISTANCE, torch.device("cpu"), None

    def __init__(self, dataset: Dataset) -> None:
        self.scale, self.dim = 1.0 if dataset.pixel_range is None else PIXEL_SCALE, prod(dataset.sample_shape)

    def __call__(self, samples: Samples) -> Features:
        return Features(torch.from_numpy(samples.reshape(len(samples), -1).astype(np.float64) * self.scale))


def concatenate(parts: Sequence[Features]) -> Features:
    return Features._make(None if field[0] is None else torch.cat(field) for field in zip(*parts, strict=True))


def batches(num: int, shape: Sequence[int], title: str, ranks: Ranks | None) -> Iterable[slice]:
    """This rank's batches of ``num`` samples of that shape, with a progress bar of that title on rank 0.

    Their bounds are the same at any number of ranks: what a network computes of a sample depends on the size of its
    batch by a rounding, which the pixels of an image enlarge. None shares them with no rank, in as few as can be.
    """
    most = BATCH if ranks is None else min(BATCH, num // LEAST_BATCHES)
    size = max(1, min(most, BATCH_VALUES // max(1, prod(shape))))
    parts = [slice(at, min(num, at + size)) for at in range(0, num, size)]
    here = parts if ranks is None else parts[ranks.share(len(parts))]
    return progress(here, title, "batch") if ranks is None or ranks.main else here


def see(
    look: Callable[[Samples], Features], samples: Iterable[Samples], device: torch.device, ranks: Ranks
) -> Features | None:
    """Features on ``device`` of all ranks' batches of samples, one after another, on rank 0; None on the others.

    Batches are taken one at a time, so that no more of them need be held.
    """
    seen = ranks.together(lambda: [look(batch) for batch in samples])
    if ranks.size > 1:
        parts = ranks.to_main([concatenate(seen).to("cpu")] if seen else [])
        seen = [of_rank.to(device) for part in parts for of_rank in part]
    return concatenate(seen) if ranks.main else None


def open_features(source: str) -> ImageFeatures:
    """The network that ``source`` names: inception, dinov2, Inception's weights, or a directory of a network."""
    device, path = torch.device("cuda" if torch.cuda.is_available() else "cpu"), Path(source)
    if source == INCEPTION or path.suffix == ".pth":
        return _load_inception(None if source == INCEPTION else path, device)
    if source == DINOV2 or (path / "config.json").is_file():
        return _load_dinov2(DINOV2_MODEL if source == DINOV2 else source, device)
    if not RunDirectory(path).description.is_file():
        expected = "a .pth file of Inception's weights, or a directory of `python -m drifting.train_classifier` or "
        raise UserError(f"there are no features {source}: expected inception, dinov2, {expected}`drifting.pretrain`")
    return _load_own(path, device)


def _load_own(path: Path, device: torch.device) -> ImageFeatures:
    """The features that the last layer of a classifier, or of an autoencoder's own classifier, sees."""
    model = read_model(path, kinds=("classifier", "mae"))[0].to(device)
    assert isinstance(model, (Classifier, MAE))
    channels = model.config["in_chans"]

    def network(images: Tensor) -> Features:
        if images.shape[1] != channels:
            raise UserError(f"received images of {images.shape[1]} channels, the features are of {channels}")
        x = images / 127.5 - 1
        if isinstance(model, MAE):
            return Features(model.encoder(model.encoder.patchify(x))["layer4"].mean((2, 3)))
        points = model.features(x)
        return Features(points, classes=model.fc(points).argmax(1))

    name, num_classes = ("mae", None) if isinstance(model, MAE) else ("classifier", model.config["num_classes"])
    return ImageFeatures(name, model.fc.in_features, network, device, num_classes=num_classes)


def _load_inception(weights: Path | None, device: torch.device) -> ImageFeatures:
    """torch-fidelity's port of the Inception that FID is defined by, its TensorFlow resizing included.

    Spatial features are as in ADM's ``evaluations/evaluator.py``: the first channels of ``mixed_6/conv`` by location.
    """
    fidelity = require("torch_fidelity", "Inception", "fid")
    patience = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(DOWNLOAD_SECONDS)  # Without it torch.hub waits for ever.
        if weights is not None:  # torch-fidelity would run what a pickle says: this raises first.
            torch.load(weights, map_location="cpu", weights_only=True)
        network_class, outputs = fidelity.FeatureExtractorInceptionV3, ["2048", "logits_unbiased"]
        extractor = network_class("inception-v3-compat", outputs, weights and str(weights), verbose=False).to(device)
    except Exception as error:  # Downloads and weights of something else raise errors of many classes.
        raise UserError(
            f"cannot load Inception's weights from {weights or 'the web'} ({reason(error)}): where they cannot be "
            "downloaded, name the file weights-inception-2015-12-05-6726825d.pth of torch-fidelity's release 0.2.0 as "
            f"features; if one in {torch.hub.get_dir()}/checkpoints was cut short, delete it"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
    branches: list[Tensor] = []
    extractor.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: branches.append(output))

    def network(images: Tensor) -> Features:
        points, logits = extractor(images.expand(-1, 3, -1, -1))
        spatial = branches.pop()[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1)  # [B, 17, 17, 7]
        return Features(points, logits, spatial.flatten(1))

    return ImageFeatures(INCEPTION, 2048, network, device, "fid")


def _load_dinov2(source: str, device: torch.device) -> ImageFeatures:
    """DINOv2's class token of images resized and normalised as in EDM2's ``calculate_metrics.py``."""
    library = require("transformers.models.dinov2.modeling_dinov2", "DINOv2", "dinov2")
    try:
        model, info = library.Dinov2Model.from_pretrained(source, output_loading_info=True)
    except Exception as error:  # The hub, its cache and broken files raise errors of many classes.
        advice = f"name a directory that `hf download {DINOV2_MODEL} --local-dir DIR` filled elsewhere"
        failure = f"cannot load DINOv2 {source} ({reason(error)})"
        raise UserError(f"{failure}: where the hub is out of reach, {advice}") from error
    odd = {*info["missing_keys"], *info["unexpected_keys"]} - {"classifier.weight", "classifier.bias"}
    if odd:  # transformers would leave these random, or out.
        raise UserError(f"{source} holds no DINOv2 in the format of transformers: {min(odd)} is missing or left over")
    model = model.float().to(device).eval()
    normalization = ImageNetNormalization().to(device)

    def network(images: Tensor) -> Features:
        x = F.interpolate(images.expand(-1, 3, -1, -1) / 127.5 - 1, (224, 224), mode="bicubic", antialias=True)
        return Features(model(normalization(x)).pooler_output)

    return ImageFeatures(DINOV2, model.config.hidden_size, network, device, "fd_dinov2")
