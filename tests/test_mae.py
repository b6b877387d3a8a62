"""Masked autoencoder: parity with the release, its losses, masks and feature maps."""

import pytest
import torch
from release_cases import nchw, option_cases, relative_error, write_case

from drifting.hub.sources import load_mae
from drifting.models import MAE, DriftingLoss


def tiny(**changes) -> MAE:
    sizes = {"in_chans": 4, "base_channels": 8, "layers": (1, 1, 2, 1), "num_classes": 5}
    return MAE(**{**sizes, **changes})


def inputs(mae: MAE, batch: int = 3, side: int = 8):
    x = torch.randn(batch, mae.encoder.in_chans, side, side)
    return x, torch.randint(5, (batch,)), mae.random_mask(x)


@pytest.mark.parametrize("case", option_cases("mae"))
@torch.no_grad()
def test_matches_the_release(case, tmp_path):
    expected = write_case(case, tmp_path)
    mae = load_mae(tmp_path)
    x = nchw(expected["x"])
    maps = mae.encoder.features(x)
    activations = {key.removeprefix("act/"): value for key, value in expected.items() if key.startswith("act/")}
    assert maps.keys() == activations.keys()
    for name, activation in activations.items():
        assert relative_error(maps[name], activation) < 1e-4, name
    losses = mae(x, expected["labels"].long(), nchw(expected["mask"]), lambda_cls=0.1)
    assert losses.keys() == {"loss", "recon_loss", "cls_loss"}
    assert relative_error(losses["loss"], expected["loss_lambda0_1"]) < 1e-4
    assert relative_error(losses["recon_loss"], expected["recon_loss"]) < 1e-4
    assert relative_error(losses["cls_loss"], expected["cls_loss"]) < 1e-4


def test_patches_become_pixels_channel_last():
    mae = tiny(in_chans=3, input_patch_size=2)
    x = torch.randn(2, 3, 8, 8)
    patches = mae.encoder.patchify(x)
    assert patches.shape == (2, 12, 4, 4)
    patch = x[1, :, 2:4, 6:8]  # second row of patches, last column
    torch.testing.assert_close(patches[1, :, 1, 3], patch.permute(1, 2, 0).flatten())


def test_reconstruction_is_that_of_the_loss():
    mae = tiny(in_chans=3, input_patch_size=2).eval()
    x, labels, mask = inputs(mae, side=16)
    assert torch.equal(mae.encoder.unpatchify(mae.encoder.patchify(x)), x)
    squares = (mae.encoder.patchify(mae.reconstruct(x, mask)) - mae.encoder.patchify(x)).square() * mask
    expected = squares.sum((1, 2, 3)) / mask.sum((1, 2, 3))
    torch.testing.assert_close(mae(x, labels, mask)["recon_loss"], expected)


def test_hidden_squares_are_seen_by_the_target_alone():
    mae = tiny().eval()
    x, labels, mask = inputs(mae)
    other = torch.where(mask.bool(), torch.randn_like(x), x)
    first, second = mae(x, labels, mask), mae(other, labels, mask)
    assert torch.equal(first["cls_loss"], second["cls_loss"])
    assert not torch.isclose(first["recon_loss"], second["recon_loss"]).any()
    visible = torch.where(mask.bool(), x, x + 1)
    assert not torch.isclose(mae(visible, labels, mask)["cls_loss"], first["cls_loss"]).any()


def test_losses_by_hand():
    mae = tiny().eval()
    x, labels, mask = inputs(mae)
    activations = mae.encoder(x * (1 - mask))
    squares = (mae.decoder(activations) - x).square().sum(1, keepdim=True)
    recon = torch.stack([s[m.bool()].mean() for s, m in zip(squares, mask, strict=True)])
    cls = -mae.fc(activations["layer4"].mean((2, 3))).log_softmax(1)[torch.arange(3), labels]
    for share in (0.0, 0.3, torch.tensor(1.0)):
        losses = mae(x, labels, mask, share)
        torch.testing.assert_close(losses["recon_loss"], recon)
        torch.testing.assert_close(losses["cls_loss"], cls)
        torch.testing.assert_close(losses["loss"], share * cls + (1 - share) * recon)
    assert not mae(x, labels, torch.zeros_like(mask))["recon_loss"].any()  # nothing hidden, nothing to tell


def test_random_masks():
    mae = tiny(patch_size=4, input_patch_size=2)
    x = torch.zeros(200, 4, 64, 32)
    mask = mae.random_mask(x, 0.2, 0.6, torch.Generator().manual_seed(0))
    assert mask.shape == (200, 1, 32, 16) and set(mask.unique().tolist()) == {0.0, 1.0}
    squares = mask.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
    assert torch.equal(squares.amin(4), squares.amax(4))
    share = mask.mean((1, 2, 3))
    assert abs(share.mean() - 0.4) < 0.03
    assert share.std() > 0.12  # 0.085 if every image had the same ratio
    assert torch.equal(mask, mae.random_mask(x, 0.2, 0.6, torch.Generator().manual_seed(0)))
    assert not mae.random_mask(x, 0, 0).any() and mae.random_mask(x, 1, 1).all()


def test_every_second_block_has_maps():
    mae = tiny(layers=(2, 1, 1, 3)).eval()
    x = torch.randn(2, 4, 16, 16)
    maps = mae.encoder.features(x)
    assert {name for name in maps if "blk" in name and name.count("_") == 1} == {"layer1_blk2", "layer4_blk2"}


def test_feature_extractor_shares_the_weights_and_is_frozen():
    mae = tiny(in_chans=3, input_patch_size=2)
    extractor = mae.feature_extractor()
    x = torch.randn(2, 3, 16, 16)
    maps, expected = extractor(x), mae.eval().encoder.features(x)
    assert maps.keys() == expected.keys() | {"global"}
    assert all(torch.equal(maps[name], expected[name]) for name in expected)
    assert extractor.encoder.conv1.weight.data_ptr() == mae.encoder.conv1.weight.data_ptr()
    assert not any(p.requires_grad for p in extractor.parameters()) and all(p.requires_grad for p in mae.parameters())
    gen = torch.randn(6, 3, 16, 16, requires_grad=True)
    DriftingLoss(extractor)(gen, torch.randn(6, 3, 16, 16)).backward()
    assert gen.grad.any() and mae.encoder.conv1.weight.grad is None


def test_every_parameter_learns_and_the_loss_falls():
    mae = tiny(layers=(1, 1, 1, 1))
    x, labels, mask = inputs(mae, batch=8)
    optimizer = torch.optim.Adam(mae.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        loss = mae(x, labels, mask, 0.5)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad.any() for p in mae.parameters())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_any_integer_dtype(dtype):
    mae = tiny().eval()
    x, labels, mask = inputs(mae)
    assert torch.equal(mae(x, labels.to(dtype), mask.bool())["cls_loss"], mae(x, labels, mask)["cls_loss"])


def test_dropout_in_training_only():
    mae = tiny(dropout_prob=0.5)
    x, labels, mask = inputs(mae)
    assert not torch.equal(mae(x, labels, mask)["loss"], mae(x, labels, mask)["loss"])
    mae.eval()
    assert torch.equal(mae(x, labels, mask)["loss"], mae(x, labels, mask)["loss"])


def test_initialisation():
    mae = tiny(base_channels=32)
    for module in (mae.encoder.stages[3][0].conv1, mae.decoder.bridge.conv, mae.fc):
        fan_in = module.weight[0].numel()
        assert module.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.1)
    assert not mae.fc.bias.any() and not mae.decoder.head.bias.any()


def test_config_builds_the_same_network():
    mae = tiny(in_chans=3, input_patch_size=2, patch_size=4, dropout_prob=0.1)
    again = MAE(**mae.config)
    again.load_state_dict(mae.state_dict())
    assert again.config == mae.config


def test_autocast_losses_are_float32():
    mae = tiny()
    x, labels, mask = inputs(mae, side=16)
    with torch.autocast("cpu", torch.bfloat16):
        losses = mae(x, labels, mask, 0.1)
    assert all(loss.dtype == torch.float32 and loss.isfinite().all() for loss in losses.values())
    torch.testing.assert_close(losses["loss"], mae(x, labels, mask, 0.1)["loss"], rtol=0.1, atol=0.1)


def test_wrong_inputs():
    mae = tiny(input_patch_size=2)
    x, labels, mask = inputs(mae, side=16)
    with pytest.raises(ValueError, match=r"mask has shape \[3, 1, 16, 16\], expected \[3, 1, 8, 8\]"):
        mae(x, labels, torch.zeros(3, 1, 16, 16))
    with pytest.raises(ValueError, match="multiples of input_patch_size=2"):
        mae.encoder.features(torch.zeros(1, 4, 15, 16))
    with pytest.raises(ValueError, match=r"expected \[B, 4, H, W\]"):
        mae.encoder.features(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="multiples of 4, a masked square"):
        mae.random_mask(torch.zeros(1, 4, 18, 16))
