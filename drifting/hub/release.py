"""Read and write artifacts of the official release (lambertae/drifting): ``ema_params.msgpack``, ``metadata.json``. Its
arrays are views of our parameters: flax has matrices ``[in, out]``, ours are ``[out, in]``, and so on."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, explained, shown
from ..models import MAE, MODELS, DriftingDiT
from ..models.network_files import build, misfits, read_description
from ..utils.files import write_object
from .flax_msgpack import read_arrays, write_arrays

WEIGHTS, METADATA = "ema_params.msgpack", "metadata.json"
# These are the release's names of our arguments where they differ, and the values that model_config may leave out.
THEIR_NAMES = {
    "style_vocab": "noise_classes", "num_style_tokens": "noise_coords", "img_size": "input_size",
    "in_chans": "in_channels", "embed_dim": "hidden_size", "out_chans": "out_channels",
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "gen": {
        "cond_dim": None, "num_classes": 1001, "style_vocab": 0, "num_style_tokens": 1, "img_size": 32, "in_chans": 3,
        "n_cls_tokens": 0, "patch_size": 2, "embed_dim": 1152, "depth": 28, "num_heads": 16, "mlp_ratio": 4.0,
        "out_chans": 3, "use_qknorm": False, "use_swiglu": False, "use_rope": False, "use_rmsnorm": False,
    },
    "mae": {
        "num_classes": 1000, "in_chans": 3, "base_channels": 64, "patch_size": 4, "dropout_prob": 0.0,
        "layers": (2, 2, 2, 2), "input_patch_size": 1,
    },
}  # fmt: skip
# These keys say how the release computes, not what.
EXECUTION = {"gen": {"use_bf16": False, "attn_fp32": True, "use_remat": False}, "mae": {"use_bf16": False}}
PATCH_KERNEL = "LightningDiT_0/TorchLinear_0/Dense_0/kernel"  # It is a matrix there, and filters of a convolution here.

# Each pattern turns a part of the name of our parameter into the release's, where flax has numbered the modules.
GENERATOR_PATHS = {
    "^(pos_embed|cls_embed)": r"LightningDiT_0/\1", r"class_embed\.weight": "Embed_0/embedding",
    r"cfg_embed\.norm": "RMSNorm_0", r"cfg_embed\.fc1": "TimestepEmbedder_0/TorchLinear_0",
    r"cfg_embed\.fc2": "TimestepEmbedder_0/TorchLinear_1", "patch_embed": "LightningDiT_0/TorchLinear_0",
    "cls_proj": "LightningDiT_0/TorchLinear_1", r"final\.norm": "LightningDiT_0/FinalLayer_0/RMSNorm_0",
    r"final\.modulation": "LightningDiT_0/FinalLayer_0/TorchLinear_0",
    r"final\.proj": "LightningDiT_0/FinalLayer_0/TorchLinear_1",
    r"blocks\.(\d+)": r"LightningDiT_0/blocks_\1", "norm1": "RMSNorm_0", "norm2": "RMSNorm_1",
    "modulation": "TorchLinear_0", r"attn\.qkv": "Attention_0/TorchLinear_0",
    r"attn\.proj": "Attention_0/TorchLinear_1", r"attn\.": "Attention_0/",
}  # fmt: skip
SWIGLU_PATHS = {rf"mlp\.{ours}": f"SwiGLUFFN_0/TorchLinear_{index}" for index, ours in enumerate(("w1", "w3", "w2"))}
GELU_PATHS = {rf"mlp\.{ours}": f"StandardMLP_0/TorchLinear_{index}" for index, ours in enumerate(("w1", "w2"))}
MAE_PATHS: dict[str, Any] = {
    r"stage_norms\.(\d)": lambda match: f"layer{int(match[1]) + 1}_norm", r"(up\d\d)\.norm": r"\1/concat_norm_fn",
    r"stages\.(\d)\.(\d+)": r"stages_\1/layers_\2", r"shortcut\.0": "proj_conv", r"shortcut\.1": "proj_gn",
}  # fmt: skip


def read_artifact(folder: Path, kinds: Sequence[str] = tuple(MODELS)) -> tuple[DriftingDiT | MAE, dict[str, Any]]:
    """Read the model in ``folder``, to the CPU in float32 and evaluation mode, and its metadata."""
    metadata = read_description(folder / METADATA, kinds)
    with explained(f"the artifact in {folder} cannot be read"):
        model: Any = build(MODELS[metadata["kind"]], our_config(metadata["kind"], metadata.get("model_config")))
        arrays = read_arrays(folder / WEIGHTS)
    arrays = {name.removeprefix("params/"): a.float() if a.is_floating_point() else a for name, a in arrays.items()}
    if problems := misfits(arrays, stored_arrays(model), arrays):
        raise UserError(f"the weights in {folder} do not fit its model_config: {problems}")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, view in release_arrays(model).items():
            view.copy_(arrays.pop(name).view(view.shape))
    return model.eval(), metadata


def write_artifact(folder: Path, model: DriftingDiT | MAE, metadata: Any) -> None:
    """Write ``model`` so that the release loads it; ``metadata`` is completed where it lacks something."""
    if not isinstance(metadata, dict):
        raise UserError(f"in model.json, release is {shown(metadata)}, expected an object")
    kind, config = "mae", dict(model.config)
    if isinstance(model, DriftingDiT):
        kind = "gen"
        config |= {"cond_dim": model.class_embed.embedding_dim, "out_chans": model.out_chans}
        if not model.num_style_tokens:  # This is how the release says that there are no style codes.
            config |= {"style_vocab": 0, "num_style_tokens": 1}
    elif config["base_channels"] % 32:
        width = config["base_channels"]
        raise UserError(f"base_channels is {width}: the release builds decoders of multiples of 32 only")
    model_config = {THEIR_NAMES.get(ours, ours): config[ours] for ours in DEFAULTS[kind]} | EXECUTION[kind]
    write_arrays(folder / WEIGHTS, stored_arrays(model))
    facts = {"path": f"params_ema/{WEIGHTS}", "model_config": model_config} | metadata
    write_object(folder / METADATA, facts | {"format": "flax.msgpack", "kind": kind, "backend": "jax"})


def our_config(kind: str, model_config: Any) -> dict[str, Any]:
    """Turn the release's ``model_config`` into arguments of :class:`DriftingDiT` or :class:`MAE`."""
    if not isinstance(model_config, dict):
        raise UserError(f"{METADATA} has no model_config")
    our_names = {theirs: ours for ours, theirs in THEIR_NAMES.items()}
    config = dict(DEFAULTS[kind])  # The network refuses keys that neither it nor the release has.
    config |= {str(our_names.get(key, key)): value for key, value in model_config.items() if key not in EXECUTION[kind]}
    if kind == "gen" and config["cond_dim"] is None:
        raise UserError("model_config has no cond_dim")
    if kind == "gen" and not config["style_vocab"]:
        config |= {"style_vocab": 1, "num_style_tokens": 0}
    return config


def release_arrays(model: DriftingDiT | MAE) -> dict[str, Tensor]:
    """Return the release's arrays by path, each a view of a parameter; that of ``PATCH_KERNEL`` has four dimensions."""
    paths, vector_name = MAE_PATHS, "scale"
    arrays: dict[str, Tensor] = {}
    if isinstance(model, DriftingDiT):
        paths, vector_name = GENERATOR_PATHS | (SWIGLU_PATHS if model.config["use_swiglu"] else GELU_PATHS), "weight"
        paths |= {r"(TorchLinear_\d)": r"\1/Dense_0"}  # The release's TorchLinear wraps a Dense.
        paths |= {} if model.config["use_rmsnorm"] else {r"(q_norm|k_norm)\.weight": r"\1/scale"}
        arrays |= {f"noise_embeds_{n}/embedding": model.style_codebooks[n] for n in range(model.num_style_tokens)}
    for name, parameter in model.named_parameters():
        if name == "style_codebooks":
            continue
        for ours, theirs in paths.items():
            name = re.sub(ours, theirs, name)
        path, _, leaf = name.replace(".", "/").rpartition("/")
        if leaf == "weight" and parameter.ndim > 1:
            arrays[f"{path}/kernel"] = parameter.permute(*range(2, parameter.ndim), 1, 0)
        else:
            arrays[f"{path}/{vector_name if leaf == 'weight' else leaf}"] = parameter
    return arrays


def stored_arrays(model: DriftingDiT | MAE) -> dict[str, Tensor]:
    """Return the release's arrays in the shapes that they have in its files."""
    arrays = {name: view.detach() for name, view in release_arrays(model).items()}
    if PATCH_KERNEL in arrays:
        arrays[PATCH_KERNEL] = arrays[PATCH_KERNEL].flatten(0, 2)
    return arrays
