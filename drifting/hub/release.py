"""The official release's artifacts (lambertae/drifting): ``ema_params.msgpack`` beside ``metadata.json``.

Both kinds of model, both ways: ``model_config`` to and from our constructors' arguments, and the release's arrays as
views of our parameters (flax has matrices ``[in, out]``, ours are ``[out, in]``, and so on).
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models import MAE, MODELS, DriftingDiT
from ..models.build import build_on_meta
from ..models.drifting_dit import RMSNorm
from ..utils.files import atomic_write
from ..utils.json_file import is_count, read_object
from .flax_msgpack import read_arrays, write_arrays

WEIGHTS, METADATA = "ema_params.msgpack", "metadata.json"

# The release's name of each argument, ours, and the value where model_config leaves it out.
GENERATOR_CONFIG = (
    ("cond_dim", "cond_dim", None),
    ("num_classes", "num_classes", 1001),
    ("noise_classes", "style_vocab", 0),
    ("noise_coords", "num_style_tokens", 1),
    ("input_size", "img_size", 32),
    ("in_channels", "in_chans", 3),
    ("n_cls_tokens", "n_cls_tokens", 0),
    ("patch_size", "patch_size", 2),
    ("hidden_size", "embed_dim", 1152),
    ("depth", "depth", 28),
    ("num_heads", "num_heads", 16),
    ("mlp_ratio", "mlp_ratio", 4.0),
    ("out_channels", "out_chans", 3),
    ("use_qknorm", "use_qknorm", False),
    ("use_swiglu", "use_swiglu", False),
    ("use_rope", "use_rope", False),
    ("use_rmsnorm", "use_rmsnorm", False),
)
MAE_CONFIG = (
    ("num_classes", "num_classes", 1000),
    ("in_channels", "in_chans", 3),
    ("base_channels", "base_channels", 64),
    ("patch_size", "patch_size", 4),
    ("dropout_prob", "dropout_prob", 0.0),
    ("layers", "layers", (2, 2, 2, 2)),
    ("input_patch_size", "input_patch_size", 1),
)
EXECUTION = {"use_bf16": False, "attn_fp32": True, "use_remat": False}  # how the release computes, not what
MAE_EXECUTION = {"use_bf16": False}

PATCH_KERNEL = "LightningDiT_0/TorchLinear_0/Dense_0/kernel"  # a matrix in the file, a convolution's filters here


def read_artifact(folder: Path) -> tuple[DriftingDiT | MAE, dict[str, Any]]:
    """The model in ``folder``, on the CPU in float32 and evaluation mode, and its metadata.

    Raises:
        UserError: a file is missing or malformed, or the arrays are not those of ``model_config``; the message lists
            all that are missing, left over, of another shape or not finite.
    """
    metadata = _read_metadata(folder / METADATA)
    try:
        model = build_on_meta(MODELS[metadata["kind"]], our_config(metadata["kind"], metadata["model_config"]))
        arrays = read_arrays(folder / WEIGHTS)
    except (ValueError, OSError) as error:
        raise UserError(f"the artifact in {folder} cannot be read: {error}") from error
    if arrays and all(name.startswith("params/") for name in arrays):
        arrays = {name.removeprefix("params/"): array for name, array in arrays.items()}
    _check_arrays(folder, arrays, {name: stored_shape(name, view) for name, view in release_arrays(model).items()})
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, view in release_arrays(model).items():
            view.copy_(arrays.pop(name).view(view.shape))
    return model.eval(), metadata


def write_artifact(folder: Path, model: DriftingDiT | MAE, metadata: dict[str, Any]) -> None:
    """Write ``model`` so that the release loads it; ``metadata`` is completed where it lacks something.

    Raises:
        UserError: the release cannot build this model.
    """
    kind = "gen" if isinstance(model, DriftingDiT) else "mae"
    if isinstance(model, MAE) and model.config["base_channels"] % 32:
        raise UserError(
            f"base_channels is {model.config['base_channels']}: the release builds decoders of multiples of 32 only"
        )
    fixed = {"format": "flax.msgpack", "kind": kind, "backend": "jax"}
    default = {"path": f"params_ema/{WEIGHTS}", "model_config": release_config(model)}
    arrays = {name: view.detach().reshape(stored_shape(name, view)) for name, view in release_arrays(model).items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_arrays(folder / WEIGHTS, arrays)
    with atomic_write(folder / METADATA) as part:
        part.write_text(json.dumps(fixed | default | metadata | fixed, indent=2) + "\n")


def our_config(kind: str, model_config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of :class:`DriftingDiT` or :class:`MAE` from the release's ``model_config``.

    Raises:
        ValueError: a key that the release does not have, or ``cond_dim`` missing, which has no default.
    """
    table, execution = (GENERATOR_CONFIG, EXECUTION) if kind == "gen" else (MAE_CONFIG, MAE_EXECUTION)
    unknown = sorted(model_config.keys() - {theirs for theirs, _, _ in table} - execution.keys())
    if unknown:
        raise ValueError(f"model_config has unknown keys: {', '.join(unknown)}")
    config = {ours: model_config.get(theirs, default) for theirs, ours, default in table}
    if kind == "gen":
        if config["cond_dim"] is None:
            raise ValueError("model_config has no cond_dim")
        if not config["style_vocab"]:  # the release's way to say: no style codes
            config |= {"style_vocab": 1, "num_style_tokens": 0}
    return config


def release_config(model: DriftingDiT | MAE) -> dict[str, Any]:
    """The release's ``model_config`` of ``model``."""
    if isinstance(model, MAE):
        return {theirs: model.config[ours] for theirs, ours, _ in MAE_CONFIG} | MAE_EXECUTION
    config = model.config | {"cond_dim": model.class_embed.embedding_dim, "out_chans": model.out_chans}
    if not model.num_style_tokens:
        config |= {"style_vocab": 0, "num_style_tokens": 1}
    return {theirs: config[ours] for theirs, ours, _ in GENERATOR_CONFIG} | EXECUTION


def release_arrays(model: DriftingDiT | MAE) -> dict[str, Tensor]:
    """The release's arrays by path, each a view of a parameter of ``model`` (``PATCH_KERNEL`` with its rows apart)."""
    if isinstance(model, MAE):
        return {name: view for path, module in _mae_modules(model) for name, view in _module_arrays(path, module)}
    arrays = {name: view for path, module in _generator_modules(model) for name, view in _module_arrays(path, module)}
    arrays["LightningDiT_0/pos_embed"] = model.pos_embed
    if model.n_cls_tokens:
        arrays["LightningDiT_0/cls_embed"] = model.cls_embed
    for index in range(model.num_style_tokens):
        arrays[f"noise_embeds_{index}/embedding"] = model.style_codebooks[index]
    return arrays


def _generator_modules(model: DriftingDiT) -> Iterator[tuple[str, nn.Module]]:
    """The modules with weights by the release's paths; flax numbers them in the order of their construction."""
    yield "Embed_0", model.class_embed
    yield "TimestepEmbedder_0/TorchLinear_0", model.cfg_embed.fc1
    yield "TimestepEmbedder_0/TorchLinear_1", model.cfg_embed.fc2
    yield "RMSNorm_0", model.cfg_embed.norm
    yield "LightningDiT_0/TorchLinear_0", model.patch_embed
    if model.n_cls_tokens:
        yield "LightningDiT_0/TorchLinear_1", model.cls_proj
    block: Any  # torch types the children of a module as Module | Tensor
    for index, block in enumerate(model.blocks):
        path = f"LightningDiT_0/blocks_{index}"
        yield f"{path}/RMSNorm_0", block.norm1
        yield f"{path}/RMSNorm_1", block.norm2
        yield f"{path}/TorchLinear_0", block.modulation
        yield f"{path}/Attention_0/TorchLinear_0", block.attn.qkv
        yield f"{path}/Attention_0/TorchLinear_1", block.attn.proj
        yield f"{path}/Attention_0/q_norm", block.attn.q_norm
        yield f"{path}/Attention_0/k_norm", block.attn.k_norm
        if model.config["use_swiglu"]:
            yield f"{path}/SwiGLUFFN_0/TorchLinear_0", block.mlp.w1
            yield f"{path}/SwiGLUFFN_0/TorchLinear_1", block.mlp.w3
            yield f"{path}/SwiGLUFFN_0/TorchLinear_2", block.mlp.w2
        else:
            yield f"{path}/StandardMLP_0/TorchLinear_0", block.mlp.w1
            yield f"{path}/StandardMLP_0/TorchLinear_1", block.mlp.w2
    yield "LightningDiT_0/FinalLayer_0/RMSNorm_0", model.final.norm
    yield "LightningDiT_0/FinalLayer_0/TorchLinear_0", model.final.modulation
    yield "LightningDiT_0/FinalLayer_0/TorchLinear_1", model.final.proj


def _mae_modules(model: MAE) -> Iterator[tuple[str, nn.Module]]:
    block: Any
    stage: Any
    yield "encoder/conv1", model.encoder.conv1
    yield "encoder/gn1", model.encoder.gn1
    for index, (stage, norm) in enumerate(zip(model.encoder.stages, model.encoder.stage_norms, strict=True)):
        yield f"encoder/layer{index + 1}_norm", norm
        for number, block in enumerate(stage.children()):
            path = f"encoder/stages_{index}/layers_{number}"
            for name in ("conv1", "gn1", "conv2", "gn2"):
                yield f"{path}/{name}", getattr(block, name)
            for name, module in zip(("proj_conv", "proj_gn"), block.shortcut.children(), strict=False):
                yield f"{path}/{name}", module
    yield "decoder/bridge/conv", model.decoder.bridge.conv
    yield "decoder/bridge/gn", model.decoder.bridge.gn
    for name in ("up43", "up32", "up21", "up10"):
        block = getattr(model.decoder, name)
        yield f"decoder/{name}/concat_norm_fn", block.norm
        for part in ("proj", "refine"):
            yield f"decoder/{name}/{part}/conv", getattr(block, part).conv
            yield f"decoder/{name}/{part}/gn", getattr(block, part).gn
    yield "decoder/head", model.decoder.head
    yield "fc", model.fc


def _module_arrays(path: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Arrays of one module at ``path``, as views of its parameters in flax's layout."""
    if "TorchLinear" in path:  # the release's wrapper of a Dense
        path += "/Dense_0"
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        yield f"{path}/kernel", module.weight.t() if module.weight.ndim == 2 else module.weight.permute(2, 3, 1, 0)
        if module.bias is not None:
            yield f"{path}/bias", module.bias
    elif isinstance(module, nn.Embedding):
        yield f"{path}/embedding", module.weight
    elif isinstance(module, RMSNorm):
        yield f"{path}/weight", module.weight
    elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and module.weight is not None:
        yield f"{path}/scale", module.weight
        yield f"{path}/bias", module.bias


def stored_shape(name: str, view: Tensor) -> tuple[int, ...]:
    return (math.prod(view.shape[:3]), view.shape[3]) if name == PATCH_KERNEL else tuple(view.shape)


def _check_arrays(folder: Path, arrays: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    problems = [f"missing: {name} {list(shapes[name])}" for name in sorted(shapes.keys() - arrays.keys())]
    problems += [f"left over: {name} {list(arrays[name].shape)}" for name in sorted(arrays.keys() - shapes.keys())]
    for name in sorted(shapes.keys() & arrays.keys()):
        array = arrays[name]
        if array.shape != shapes[name]:
            problems.append(f"shape: {name} is {list(array.shape)}, expected {list(shapes[name])}")
        elif not array.is_floating_point():
            problems.append(f"dtype: {name} is {array.dtype}, expected floating point")
        elif not array.float().isfinite().all():
            problems.append(f"value: {name} has NaN or infinity")
    if problems:
        raise UserError("\n  ".join([f"the weights in {folder} do not fit its model_config:", *problems]))


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        metadata = read_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read, and only it tells which model the weights are of: {error}") from error
    if not isinstance(metadata.get("model_config"), dict):
        raise UserError(f"{path} has no model_config, and only that tells which model the weights are of")
    kind = "gen" if "cond_dim" in metadata["model_config"] else "mae"  # a generator's one argument without a default
    metadata = {"kind": kind, "step": 0} | metadata  # the release reads model_config only
    if metadata["kind"] not in list(MODELS):
        raise UserError(f"{path}: kind is {metadata['kind']!r}, expected one of: {', '.join(MODELS)}")
    if not is_count(metadata["step"]):
        raise UserError(f"{path}: step is {metadata['step']!r}, expected a number of steps")
    return metadata
