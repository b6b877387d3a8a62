"""DriftingDiT: the one-step generator of appendix A.2, layer by layer that of the release's ``models/generator.py``."""

import math
from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..generation import generate
from .conditions import check_conditions, check_indices
from .pretrained import Pretrained

NORM_EPS = 1e-6
MOST = {"depth": 512, "num_style_tokens": 4096, "n_cls_tokens": 4096}  # These arguments go from 0 to so many.


class DriftingDiT(Pretrained, kind="gen"):
    """Transformer ``G(z, y, α, style)`` from noise, label, CFG scale and style codes to an image.

    Noise patches get sin-cos positions and ``n_cls_tokens`` class tokens in front; every block is modulated
    (adaLN-zero) by one condition vector, the sum of class embedding, style codes and CFG-scale embedding.

    Args:
        embed_dim: width of a token, a multiple of 4 and of ``num_heads``; with RoPE the width of a head must be even.
        num_style_tokens: style codes of a sample, one from each codebook of ``style_vocab`` entries; 0 for none.
        cond_dim, out_chans: width of the condition vector and channels of the image; None is ``embed_dim, in_chans``.
        use_qknorm, use_swiglu, use_rope, use_rmsnorm: the release's switches. Without them queries and keys have no
            norm, the feed-forward has GELU, positions are not rotary, and norms are LayerNorm.

    ``DriftingDiT(**model.config)`` builds the same network. With ``activation_checkpointing`` set, training keeps only
    what passes from block to block and computes the rest twice.
    """

    activation_checkpointing, conditions_once = False, True

    def __init__(
        self, img_size: int = 32, patch_size: int = 2, in_chans: int = 4, num_classes: int = 1000,
        embed_dim: int = 768, depth: int = 12, num_heads: int = 12, mlp_ratio: float = 4.0,
        num_style_tokens: int = 32, style_vocab: int = 64, n_cls_tokens: int = 16,
        cond_dim: int | None = None, out_chans: int | None = None,
        use_qknorm: bool = True, use_swiglu: bool = True, use_rope: bool = True, use_rmsnorm: bool = True,
    ) -> None:  # fmt: skip
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.config = config
        _check_sizes(config)
        self.img_size, self.patch_size, self.grid = img_size, patch_size, img_size // patch_size
        self.in_chans, self.noise_shape = in_chans, (in_chans, img_size, img_size)
        self.out_chans = in_chans if out_chans is None else out_chans
        self.sample_shape = (self.out_chans, img_size, img_size)
        self.num_classes, self.num_style_tokens, self.style_vocab = num_classes, num_style_tokens, style_vocab
        self.n_cls_tokens, self.use_rope, self.head_dim = n_cls_tokens, use_rope, embed_dim // num_heads
        cond_dim = embed_dim if cond_dim is None else cond_dim
        self.class_embed = nn.Embedding(num_classes, cond_dim)
        if num_style_tokens:
            self.style_codebooks = nn.Parameter(torch.empty(num_style_tokens, style_vocab, cond_dim))
        self.cfg_embed = ScaleEmbedding(cond_dim)
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid**2, embed_dim))
        if n_cls_tokens:
            self.cls_proj = nn.Linear(cond_dim, embed_dim)
            self.cls_embed = nn.Parameter(torch.empty(1, n_cls_tokens, embed_dim))
        self.blocks = nn.ModuleList(Block(cond_dim, config) for _ in range(depth))
        self.final = FinalLayer(embed_dim, cond_dim, patch_size**2 * self.out_chans, use_rmsnorm)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the release: Xavier, tables N(0, 0.02²), modulations and output 0 (a fresh model returns 0)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # A convolution of patches is a linear map of each.
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for layer in (*self.blocks, self.final):
            nn.init.zeros_(layer.modulation.weight)
        nn.init.zeros_(self.final.proj.weight)
        tables = [self.cfg_embed.fc1.weight, self.cfg_embed.fc2.weight, self.class_embed.weight]
        tables += [getattr(self, name) for name in ("style_codebooks", "cls_embed") if hasattr(self, name)]
        for table in tables:
            nn.init.normal_(table, std=0.02)
        with torch.no_grad():
            self.pos_embed.copy_(sincos_positions(self.grid, self.pos_embed.shape[-1]))

    def forward(self, z: Tensor, y: Tensor, cfg_scale: float | Tensor = 1.0, style: Tensor | None = None) -> Tensor:
        """Images ``[B, out_chans, img_size, img_size]`` of Gaussian noise ``z [B, in_chans, img_size, img_size]``.

        Labels ``y [B]`` are integers, guidance scales 1 or more, one for all or ``[B]``. Where as many consecutive
        samples share each label and scale, ``[L]`` of them do, and are embedded once. Integer style codes
        ``[B, num_style_tokens]`` are drawn where they are None; a model without codebooks ignores them. A wrong shape
        or dtype raises ValueError. So do values out of range on the CPU; elsewhere looking would stall the queue.
        """
        B, size = z.shape[0], self.img_size
        if z.shape[1:] != self.noise_shape:
            expected = f"[B, {self.in_chans}, {size}, {size}]: noise of the size of this model"
            raise ValueError(f"z has shape {list(z.shape)}, expected {expected}")
        cond = self.condition(y, cfg_scale, style, batch_size=B)  # [L, cond_dim], with style codes [B, cond_dim]
        x = self.patch_embed(z).flatten(2).transpose(1, 2) + self.pos_embed  # [B, grid², embed_dim]
        x = x.unflatten(0, (cond.shape[0], B // max(1, cond.shape[0])))  # [L, B/L, grid², embed_dim]
        cond = cond[:, None, None]
        if self.n_cls_tokens:
            in_context = self.cls_proj(cond) + self.cls_embed  # [L, 1, n_cls_tokens, embed_dim]
            x = torch.cat([in_context.expand(-1, x.shape[1], -1, -1), x], 2)
        rope = rotary_angles(x.shape[2], self.head_dim, x.device) if self.use_rope else None
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cond, rope, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cond, rope)
        x = self.final(x[:, :, self.n_cls_tokens :], cond)  # [L, B/L, grid², patch² · out_chans]
        x = x.view(B, self.grid, self.grid, self.patch_size, self.patch_size, self.out_chans)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, self.out_chans, size, size)

    def condition(self, y: Tensor, cfg_scale: float | Tensor, style: Tensor | None, batch_size: int) -> Tensor:
        """Condition vectors ``[L, cond_dim]``: class embedding + sum of style codes + 0.02 · CFG-scale embedding.

        Style codes are each sample's own, which makes it ``[B, cond_dim]``.
        """
        scale = check_conditions(y, cfg_scale, batch_size, self.num_classes, self.class_embed.weight.device)
        cond, guidance = self.class_embed(y), 0.02 * self.cfg_embed(scale)
        if self.num_style_tokens:
            if style is None:
                style = torch.randint(self.style_vocab, (batch_size, self.num_style_tokens), device=y.device)
            check_indices("style", style, (batch_size, self.num_style_tokens), self.style_vocab)
            # As one embedding of all codebooks: unlike indexing's, its gradient adds up in a fixed order.
            row = style + self.style_vocab * torch.arange(self.num_style_tokens, device=style.device)
            of_style = F.embedding(row, self.style_codebooks.flatten(0, 1)).sum(1)
            each = batch_size // max(1, y.shape[0])
            cond, guidance = (of_labels.repeat_interleave(each, 0) for of_labels in (cond, guidance))
            cond = cond + of_style
        return cond + guidance

    def draw_extra(self, num: int, generator: torch.Generator | None, device: torch.device) -> dict[str, Tensor]:
        """Random style codes ``[num, num_style_tokens]``, if the model has codebooks."""
        if not self.num_style_tokens:
            return {}
        size = (num, self.num_style_tokens)
        return {"style": torch.randint(self.style_vocab, size, generator=generator, device=device)}

    def generate(
        self, batch_size: int, y: Tensor | None = None, cfg_scale: float | Tensor = 1.0,
        device: torch.device | str | None = None, generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Images ``[B, out_chans, img_size, img_size]`` of drawn noise and style: :func:`drifting.generate`."""
        return generate(self, batch_size, y, cfg_scale, device, generator)


DriftingDiTSmall = partial(DriftingDiT, embed_dim=384, depth=6, num_heads=6)
DriftingDiTBase = partial(DriftingDiT, embed_dim=768, depth=12, num_heads=12)
DriftingDiTLarge = partial(DriftingDiT, embed_dim=1024, depth=24, num_heads=16)
DriftingDiTXL = partial(DriftingDiT, embed_dim=1152, depth=28, num_heads=16)


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` with the weight in the input's dtype, without which autocast runs it unfused."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Block(nn.Module):
    """Transformer block modulated by the condition: attention and feed-forward, each behind a gate that starts at 0."""

    def __init__(self, cond_dim: int, config: dict[str, Any]) -> None:
        super().__init__()
        dim, mlp_ratio, use_rmsnorm = config["embed_dim"], config["mlp_ratio"], config["use_rmsnorm"]
        self.norm1 = _norm(dim, use_rmsnorm)
        self.attn = Attention(dim, config["num_heads"], config["use_qknorm"], use_rmsnorm)
        self.norm2 = _norm(dim, use_rmsnorm)
        self.mlp = SwiGLU(dim, mlp_ratio) if config["use_swiglu"] else _gelu_mlp(dim, int(dim * mlp_ratio))
        self.modulation = Modulation(cond_dim, 6 * dim)

    def forward(self, x: Tensor, cond: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond).chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rope)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    """Modulated norm, then the projection of each token to its patch of the image."""

    def __init__(self, dim: int, cond_dim: int, out_dim: int, use_rmsnorm: bool) -> None:
        super().__init__()
        self.norm, self.modulation = _norm(dim, use_rmsnorm), Modulation(cond_dim, 2 * dim)
        self.proj = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift, scale = self.modulation(cond).chunk(2, -1)
        return self.proj(self.norm(x) * (1 + scale) + shift)


class Modulation(nn.Linear):
    """Shifts, scales and gates ``[L, 1, 1, ·]`` of adaLN; autocast must not round what would err on all tokens."""

    def forward(self, cond: Tensor) -> Tensor:
        device = "cpu" if cond.is_meta else cond.device.type  # There is no autocast on the meta device.
        with torch.autocast(device, enabled=False):
            return super().forward(F.silu(cond.to(self.weight.dtype)))


class Attention(nn.Module):
    """Multi-head self-attention over tokens ``[…, N, dim]``, with norms on queries and keys and rotary positions."""

    def __init__(self, dim: int, num_heads: int, use_qknorm: bool, use_rmsnorm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = _norm(dim // num_heads, use_rmsnorm, affine=True) if use_qknorm else nn.Identity()
        self.k_norm = _norm(dim // num_heads, use_rmsnorm, affine=True) if use_qknorm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        N, dim = x.shape[-2:]
        qkv = self.qkv(x).view(-1, N, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, head_dim]
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class SwiGLU(nn.Module):
    """Gated feed-forward ``W₂(silu(W₁x) ⊙ W₃x)``; two thirds of the usual hidden width keep its parameter count."""

    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = math.ceil(int(2 / 3 * int(dim * mlp_ratio)) / 32) * 32
        self.w1, self.w3, self.w2 = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class ScaleEmbedding(nn.Module):
    """A scalar per sample ``[B]`` to ``[B, dim]``: 256 sinusoids, a two-layer MLP, RMSNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.norm = nn.Linear(256, dim), nn.Linear(dim, dim), RMSNorm(dim, NORM_EPS)

    def forward(self, scale: Tensor) -> Tensor:
        angles = scale[:, None] * _frequencies(128, scale.device)
        waves = torch.cat([angles.cos(), angles.sin()], -1).to(self.fc1.weight.dtype)
        return self.norm(self.fc2(F.silu(self.fc1(waves))))


def rotary_angles(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[length, head_dim]`` of the rotary positions; dimension i is paired with i + head_dim/2."""
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, _frequencies(head_dim // 2, device)).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of ``x [..., N, head_dim]`` by the angles of :func:`rotary_angles`."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def sincos_positions(grid: int, dim: int) -> Tensor:
    """2-D positions ``[grid², dim]``, row-major: the first half of the channels tells the column, the rest the row."""
    index = torch.arange(grid, dtype=torch.float64)
    angles = torch.outer(index, _frequencies(dim // 4, index.device, index.dtype))
    axis = torch.cat([angles.sin(), angles.cos()], -1)  # [grid, dim/2]
    return torch.cat([axis.expand(grid, grid, -1), axis[:, None].expand(grid, grid, -1)], -1).flatten(0, 1)


def _frequencies(count: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """``10000^(-i/count)`` for i = 0 … count − 1."""
    return torch.exp(torch.arange(count, dtype=dtype, device=device) * (-math.log(10000) / count))


def _norm(dim: int, use_rmsnorm: bool, affine: bool = False) -> nn.Module:
    """RMSNorm always has a weight; LayerNorm has none where the modulation does its work."""
    return RMSNorm(dim, NORM_EPS) if use_rmsnorm else nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=affine)


def _gelu_mlp(dim: int, hidden: int) -> nn.Module:
    return nn.Sequential(OrderedDict(w1=nn.Linear(dim, hidden), gelu=nn.GELU(), w2=nn.Linear(hidden, dim)))


def _check_sizes(config: dict[str, Any]) -> None:
    for name, value in config.items():
        least, most = (0, MOST[name]) if name in MOST else (1, math.inf)
        holds, expected = type(value) is int and least <= value <= most, f"a whole number from {least} to {most}"
        if name.startswith("use_"):
            holds, expected = isinstance(value, bool), "True or False"
        elif name == "mlp_ratio":
            holds, expected = type(value) in (int, float) and 0 < value < math.inf, "a positive number"
        if not holds and not (value is None and name in ("cond_dim", "out_chans")):
            raise ValueError(f"{name} is {value!r}, expected {expected}")
    dim, width = config["embed_dim"], config["embed_dim"] // config["num_heads"]
    for whole, part in (("img_size", "patch_size"), ("embed_dim", "num_heads")):
        if config[whole] % config[part]:
            raise ValueError(f"{whole}={config[whole]} is not a multiple of {part}={config[part]}")
    if dim % 4:
        raise ValueError(f"embed_dim={dim} is not a multiple of 4, which 2-D sin-cos positions need")
    if config["use_rope"] and width % 2:
        raise ValueError(f"a head is embed_dim/num_heads = {width} wide; RoPE needs an even width")
