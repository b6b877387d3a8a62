"""DriftingDiT: shapes, structure, conditioning, initialisation and one-step generation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drifting.models import DriftingDiT, DriftingDiTBase, DriftingDiTLarge, DriftingDiTSmall, DriftingDiTXL
from drifting.models.drifting_dit import SwiGLU, rotary_angles, rotate, sincos_positions

TINY = {
    "img_size": 8,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "num_style_tokens": 3,
    "style_vocab": 5,
    "n_cls_tokens": 2,
}


def tiny(**changes) -> DriftingDiT:
    """A small model with every parameter moved at random, so that zero initialisation switches no part off."""
    model = DriftingDiT(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(model: DriftingDiT, batch: int = 4):
    z = torch.randn(batch, model.in_chans, model.img_size, model.img_size)
    style = torch.randint(model.style_vocab, (batch, model.num_style_tokens)) if model.num_style_tokens else None
    return z, torch.randint(model.num_classes, (batch,)), style


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rope": False},
        {"use_qknorm": False},
        {"use_swiglu": False},
        {"use_rmsnorm": False},
        {"n_cls_tokens": 0},
        {"num_style_tokens": 0},
        {"cond_dim": 20},
        {"in_chans": 4, "out_chans": 3},
        {"img_size": 16, "patch_size": 8, "in_chans": 3},
        {"mlp_ratio": 2.5, "depth": 1},
    ],
    ids=str,
)
def test_output_shape_and_gradient_for_every_option(changes):
    model = tiny(**changes)
    z, y, style = inputs(model)
    out = model(z, y, 1.5, style)
    assert out.shape == (4, model.out_chans, model.img_size, model.img_size)
    out.square().mean().backward()
    without_gradient = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without_gradient


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 5),
    grid=st.integers(1, 5),
    patch_size=st.integers(1, 4),
    in_chans=st.integers(1, 4),
    heads=st.integers(1, 3),
    half_head=st.integers(1, 4),
)
def test_any_sizes(batch, grid, patch_size, in_chans, heads, half_head):
    model = tiny(
        img_size=grid * patch_size,
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=4 * heads * half_head,
        num_heads=heads,
        depth=1,
    )
    z, y, style = inputs(model, batch)
    assert model(z, y, style=style).shape == z.shape


@pytest.mark.parametrize(
    ("variant", "embed_dim", "depth", "parameters"),
    [
        (DriftingDiTSmall, 384, 6, 17_946_640),
        (DriftingDiTBase, 768, 12, 132_708_880),
        (DriftingDiTLarge, 1024, 24, 462_909_456),
        (DriftingDiTXL, 1152, 28, 678_929_872),
    ],
    ids=["Small", "Base", "Large", "XL"],
)
def test_variant_sizes(variant, embed_dim, depth, parameters):
    with torch.device("meta"):
        model = variant()
    assert (model.config["embed_dim"], len(model.blocks)) == (embed_dim, depth)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_default_is_base():
    with torch.device("meta"):
        assert DriftingDiT().config == DriftingDiTBase().config


def test_config_rebuilds_the_model():
    model = tiny(cond_dim=20, use_rope=False)
    twin = DriftingDiT(**model.config)
    twin.load_state_dict(model.state_dict())
    z, y, style = inputs(model)
    torch.testing.assert_close(twin(z, y, 1.0, style), model(z, y, 1.0, style))


def test_fresh_model_returns_zero():
    model = DriftingDiT(**TINY)
    z, y, style = inputs(model)
    assert not model(z, y, 2.0, style).any()


def test_fresh_blocks_pass_their_input_through():
    model = DriftingDiT(**TINY)
    x, cond = torch.randn(2, 5, 32), torch.randn(2, 1, 32)
    for block in model.blocks:
        assert torch.equal(block(x, cond, None), x)


@settings(max_examples=20, deadline=None)
@given(labels=st.integers(1, 3), each=st.integers(1, 3), styles=st.integers(0, 2), cls_tokens=st.integers(0, 2))
def test_labels_that_consecutive_samples_share_are_given_once(labels, each, styles, cls_tokens):
    model = tiny(num_style_tokens=styles, n_cls_tokens=cls_tokens)
    z, _, style = inputs(model, labels * each)
    y, scale = torch.randint(10, (labels,)), 1 + torch.rand(labels)
    expected = model(z, y.repeat_interleave(each), scale.repeat_interleave(each), style)
    torch.testing.assert_close(model(z, y, scale, style), expected)


def test_scale_as_number_and_as_tensor_agree():
    model = tiny()
    z, y, style = inputs(model)
    expected = model(z, y, 2.5, style)
    torch.testing.assert_close(model(z, y, torch.full((4,), 2.5), style), expected)
    torch.testing.assert_close(model(z, y, torch.tensor(2.5), style), expected)
    mixed = model(z, y, torch.tensor([1.0, 2.5, 2.5, 2.5]), style)
    torch.testing.assert_close(mixed[1:], expected[1:])
    assert not torch.allclose(mixed[0], expected[0])


def test_every_input_matters():
    model = tiny()
    z, y, style = inputs(model)
    base = model(z, y, 1.0, style)
    others = {
        "z": model(z + 1, y, 1.0, style),
        "y": model(z, (y + 1) % 10, 1.0, style),
        "cfg_scale": model(z, y, 3.0, style),
        "style": model(z, y, 1.0, (style + 1) % 5),
    }
    for name, out in others.items():
        assert (out - base).abs().amax((1, 2, 3)).min() > 1e-4, name


def test_samples_do_not_see_each_other():
    model = tiny()
    z, y, style = inputs(model)
    torch.testing.assert_close(model(z, y, 1.5, style)[2:3], model(z[2:3], y[2:3], 1.5, style[2:3]))


def test_style_is_one_code_from_each_codebook():
    model = tiny()
    z, y, style = inputs(model)
    assert torch.equal(model(z, y, 1.0, style), model(z, y, 1.0, style))
    swapped = style.flip(1)  # the codes of sample i in other codebooks: another condition
    assert not torch.equal(style, swapped)
    assert not torch.allclose(model(z, y, 1.0, style), model(z, y, 1.0, swapped))
    cond = model.condition(y, 1.0, style, 4)
    by_hand = sum(model.style_codebooks[k, style[:, k]] for k in range(3))
    without = model.condition(y, 1.0, style, 4) - by_hand
    torch.testing.assert_close(cond - without, by_hand)
    torch.testing.assert_close(without, model.class_embed(y) + 0.02 * model.cfg_embed(torch.ones(4)))


def test_style_is_drawn_when_not_given():
    model = tiny()
    z, y, _ = inputs(model)
    assert not torch.allclose(model(z, y), model(z, y))
    torch.manual_seed(1)
    first = model(z, y)
    torch.manual_seed(1)
    assert torch.equal(model(z, y), first)


def test_rotary_positions_are_relative():
    """⟨R_m q, R_n k⟩ depends on m − n alone, and R keeps lengths."""
    q, k = torch.randn(2, 1, 16, dtype=torch.float64)
    cos, sin = rotary_angles(12, 16, torch.device("cpu"))
    qs, ks = rotate(q.expand(12, 16), cos, sin), rotate(k.expand(12, 16), cos, sin)
    scores = qs @ ks.T
    for offset in range(-5, 6):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)
    torch.testing.assert_close(qs.norm(dim=-1), q.norm().expand(12), atol=1e-6, rtol=0)
    assert (scores.diagonal(1)[0] - scores.diagonal(2)[0]).abs() > 1e-3


def test_sincos_positions_tell_column_then_row():
    positions = sincos_positions(3, 16).view(3, 3, 16)  # [row, column, dim]
    column, row = positions.split(8, -1)
    assert torch.equal(column[0], column[2]) and torch.equal(row[:, 0], row[:, 2])
    expected = [math.sin(2), math.sin(2 / 10), math.sin(2 / 100), math.sin(2 / 1000)]
    torch.testing.assert_close(column[0, 2, :4], torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)
    assert positions.flatten(0, 1).unique(dim=0).shape[0] == 9


def test_patches_keep_their_place():
    """With attention and feed-forward closed, a patch of the image depends on the same patch of the noise alone."""
    model = tiny(patch_size=2)
    with torch.no_grad():
        for block in model.blocks:
            block.modulation.weight.zero_()
            block.modulation.bias.zero_()
    z, y, style = inputs(model, 1)
    other = z.clone()
    other[..., 2:4, 6:8] += 1
    changed = (model(z, y, 1.0, style) - model(other, y, 1.0, style)).abs() > 1e-6
    assert changed[..., 2:4, 6:8].all() and changed.sum() == 4


@pytest.mark.parametrize(("dim", "hidden"), [(768, 2048), (384, 1024), (64, 192), (128, 352)])
def test_swiglu_hidden_width_is_two_thirds_rounded_up_to_32(dim, hidden):
    assert SwiGLU(dim, 4.0).w1.weight.shape == (hidden, dim)


def test_generate_is_reproducible_and_restores_the_mode():
    model = tiny().train()
    y = torch.arange(6)
    first = model.generate(6, y, 1.5, generator=torch.Generator().manual_seed(3))
    again = model.generate(6, y, 1.5, generator=torch.Generator().manual_seed(3))
    other = model.generate(6, y, 1.5, generator=torch.Generator().manual_seed(4))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    assert first.shape == (6, 1, 8, 8) and not first.requires_grad
    assert model.training
    assert model.eval().generate(2).shape == (2, 1, 8, 8) and not model.training


def test_generate_leaves_the_global_generator_alone_when_given_one():
    model = tiny()
    before = torch.get_rng_state()
    model.generate(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_generate_moves_to_the_device_it_is_given():
    model = tiny().to("meta")
    assert model.generate(2, torch.tensor([0, 1]), device="meta").device.type == "meta"
    with pytest.raises(ValueError, match="device is 'cpu', where .* Cannot copy out of meta"):  # It was to be moved.
        model.generate(2, device="cpu")


def test_compiles_in_one_graph():
    model = tiny()
    z, y, style = inputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z, y, 1.5, style), model(z, y, 1.5, style))


def test_bfloat16():
    model = tiny()
    z, y, style = inputs(model)
    expected = model(z, y, 1.5, style)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(z, y, 1.5, style)
        compiled = torch.compile(model, fullgraph=True, backend="eager")(z, y, 1.5, style)
    torch.testing.assert_close(compiled, mixed)
    pure = model.bfloat16()(z.bfloat16(), y, 1.5, style)
    for out in (mixed, pure):
        assert (out.float() - expected).norm() < 0.05 * expected.norm()


def test_modulation_stays_float32_under_autocast():
    model = tiny()
    cond = torch.randn(4, TINY["embed_dim"])
    for module in (model.blocks[0].modulation, model.final.modulation):
        with torch.autocast("cpu", torch.bfloat16):
            mixed = module(cond)
        exact = torch.nn.functional.linear(torch.nn.functional.silu(cond), module.weight, module.bias)
        assert mixed.dtype == torch.float32 and torch.equal(mixed.squeeze(1), exact)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 30}, "embed_dim=30 is not a multiple of num_heads=4"),
        ({"embed_dim": 10, "num_heads": 5}, "embed_dim=10 is not a multiple of 4"),
        ({"embed_dim": 12, "num_heads": 4}, "RoPE needs an even width"),
        ({"img_size": 9}, "img_size=9 is not a multiple of patch_size=2"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"depth": -1}, "depth is -1"),
    ],
)
def test_impossible_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        DriftingDiT(**{**TINY, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z": torch.zeros(2, 3, 8, 8)}, r"z has shape \[2, 3, 8, 8\], expected \[B, 1, 8, 8\]"),
        ({"z": torch.zeros(2, 1, 8, 16)}, "z has shape"),
        ({"z": torch.zeros(8, 8)}, "z has shape"),
        ({"y": torch.tensor([0, 10])}, "y has values from 0 to 10, expected 0 … 9"),
        ({"y": torch.tensor([-1, 0])}, "y has values from -1"),
        ({"y": torch.tensor([1, 1, 1])}, r"expected an integer tensor of shape \[2\]"),
        ({"y": torch.tensor([1.0, 2.0])}, "y is torch.float32"),
        ({"style": torch.full((2, 3), 5)}, "style has values from 5 to 5"),
        ({"style": torch.zeros(2, 4, dtype=torch.long)}, r"expected an integer tensor of shape \[2, 3\]"),
        ({"cfg_scale": torch.ones(3)}, r"cfg_scale has shape \[3\]"),
    ],
)
def test_bad_inputs(changes, message):
    arguments = {"z": torch.zeros(2, 1, 8, 8), "y": torch.tensor([0, 1]), "cfg_scale": 1.0, "style": None, **changes}
    with pytest.raises(ValueError, match=message):
        DriftingDiT(**TINY)(**arguments)


def test_style_for_a_model_without_codebooks_is_ignored():
    model = tiny(num_style_tokens=0)
    z, y, _ = inputs(model)
    assert torch.equal(model(z, y, style=torch.ones(4, 1, dtype=torch.long)), model(z, y))
