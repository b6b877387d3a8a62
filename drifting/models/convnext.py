"""ConvNeXt V2 (arXiv 2301.00808) of transformers as a feature extractor, as in the release's ``models/convnext.py``."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError, reason, require
from .feature_extractor import FrozenModule, ImageNetNormalization
from .resnet_encoder import FeatureMaps, multiscale_maps

CONVNEXT = "facebook/convnextv2-base-22k-224"  # The hub has it, trained on ImageNet-22k and then on ImageNet-1k.


class ConvNeXtFeatureExtractor(FrozenModule):
    """Maps of a ConvNeXt V2, a ``ConvNextV2Model`` of transformers, whose images are resized to 224 × 224.

    ``global`` is the input, flattened. Of the four stages, ``stage_1`` … ``stage_3`` ``[B, H·W, C]`` are by location
    and ``stage_0_mean``, ``stage_0_std`` … ``stage_3_std`` ``[B, 1, C]`` over them, after each location was normalised
    over channels. ``global_mean`` ``[B, 1, C]`` is the input of the network's classifier; ``global_std`` is
    ``stage_3_std``. The release calls stages ``convenxt_…`` (sic) and keeps them in float32 beside bfloat16.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network
        self.normalization = ImageNetNormalization()
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> FeatureMaps:
        """Maps of RGB images ``x [B, 3, H, W]`` in [-1, 1]."""
        maps = {"global": x.flatten(1).unsqueeze(1)}
        x = F.interpolate(self.normalization(x), (224, 224), mode="bilinear", antialias=True)
        x = self.network.embeddings(x)
        for index, stage in enumerate(self.network.encoder.stages):
            x = stage(x)
            maps |= multiscale_maps(f"stage_{index}", _normalized(x), (), ())
        del maps["stage_0"]  # The release leaves out its 56 × 56 locations.
        norm = self.network.layernorm
        pooled = F.layer_norm(x.mean((2, 3)), norm.normalized_shape, norm.weight, norm.bias, 1e-6)  # Not its own 1e-12.
        return maps | {"global_mean": pooled.unsqueeze(1), "global_std": maps["stage_3_std"]}


def load_convnext(in_chans: int = 3, source: str = CONVNEXT) -> ConvNeXtFeatureExtractor:
    """The extractor with the weights of ``source``, a name on the hub or a directory in the format of transformers."""
    if in_chans != 3:
        raise UserError(f"convnext_v2 takes images of 3 channels, the data have {in_chans}")
    transformers = require("transformers", "the features convnext_v2", "convnext")
    try:
        network = transformers.ConvNextV2ForImageClassification
        classifier, info = network.from_pretrained(source, output_loading_info=True)
    except Exception as error:  # Being offline, without access or of a broken file have no base class in common.
        advice = f"bring the cache of a machine that ran `hf download {CONVNEXT}`, and set HF_HOME to it"
        received = f"cannot load ConvNeXt V2 {source} ({reason(error)})"
        raise UserError(f"{received}: where the hub is out of reach, {advice}") from error
    missing = [key for key in info["missing_keys"] if not key.startswith("classifier.")]
    if missing:
        raise UserError(f"{source} holds no ConvNeXt V2 in the format of transformers, it lacks {missing[0]}")
    return ConvNeXtFeatureExtractor(classifier.convnextv2.float())


def _normalized(x: Tensor) -> Tensor:
    """The features of each location less their mean, over their standard deviation; in float32 inside."""
    std, mean = torch.std_mean(x.float(), 1, correction=0, keepdim=True)
    return ((x - mean) / (std + 1e-3)).to(x.dtype)
