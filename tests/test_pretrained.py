"""Models of the official release: loading, parity, conversion both ways, and what is said of files that do not fit."""

import json
import pickle
import shutil
import sys
from types import SimpleNamespace

import huggingface_hub
import msgpack
import numpy as np
import pytest
import torch
from PIL import Image
from release_cases import GOLDEN, nchw, nhwc, option_cases, relative_error, write_case

from drifting import convert, sample
from drifting.errors import UserError
from drifting.generation import Generator
from drifting.hub import flax_msgpack, vae
from drifting.hub.flax_msgpack import read_arrays, write_arrays
from drifting.hub.release import release_arrays
from drifting.hub.sources import load_generator, load_mae
from drifting.models import MAE, DriftingDiT
from drifting.models.network_files import write_model

ARTIFACT = GOLDEN / "official_gen_latent"  # made by the release's code, in its format
SIZES = {"img_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 3, "style_vocab": 4}


@pytest.fixture
def artifact(tmp_path):
    """A copy of ``ARTIFACT`` to break."""
    return shutil.copytree(ARTIFACT, tmp_path / "artifact")


def assert_samples_match(model: DriftingDiT, expected: dict[str, torch.Tensor]) -> None:
    x, c, codes = nchw(expected["x"]), expected["c"].long(), expected["noise_labels"].long()
    with torch.no_grad():
        assert relative_error(nhwc(model(x, c, expected["cfg_scale"], codes)), expected["samples"]) < 2e-5
        assert relative_error(nhwc(model(x, c, 1.0, codes)), expected["samples_cfg1"]) < 2e-5


def network(loaded: Generator | MAE) -> torch.nn.Module:
    return loaded.model if isinstance(loaded, Generator) else loaded


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    for (name, a), (other, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b), name


# Parity


def test_artifact_of_the_release():
    model = load_generator(str(ARTIFACT)).model
    assert not model.training and all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    with np.load(ARTIFACT / "expected.npz") as archive:
        assert_samples_match(model, {key: torch.from_numpy(value) for key, value in archive.items()})


@pytest.mark.parametrize("case", option_cases("gen"))
def test_every_option_of_the_release(case, tmp_path):
    expected = write_case(case, tmp_path)
    assert_samples_match(load_generator(tmp_path).model, expected)


def test_cases_are_there():
    assert len(option_cases("gen")) == 10 and len(option_cases("mae")) == 3


# Conversion


def test_there_and_back_is_exact(tmp_path, capsys):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert convert.main([str(ARTIFACT), str(ours)]) == 0 and convert.main([str(ours), str(theirs)]) == 0
    assert "197,520 parameters" in capsys.readouterr().out
    assert {path.name for path in ours.iterdir()} == {"model.safetensors", "model.json"}
    original = load_generator(ARTIFACT).model
    assert_same_weights(load_generator(ours).model, original)
    assert_same_weights(load_generator(theirs).model, original)
    assert (theirs / "ema_params.msgpack").read_bytes() == (ARTIFACT / "ema_params.msgpack").read_bytes()
    assert json.loads((theirs / "metadata.json").read_text()) == json.loads((ARTIFACT / "metadata.json").read_text())


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_style_tokens": 0, "n_cls_tokens": 0}, {"use_rmsnorm": False, "use_swiglu": False, "cond_dim": 6}],
    ids=str,
)
def test_our_generator_to_the_release_and_back(changes, tmp_path):
    model = DriftingDiT(**{**SIZES, **changes})
    write_model(tmp_path, model, {"step": 3})
    convert.main([str(tmp_path), str(tmp_path / "release")])
    metadata = json.loads((tmp_path / "release" / "metadata.json").read_text())
    assert metadata["kind"] == "gen" and metadata["step"] == 3 and metadata["model_config"]["input_size"] == 4
    again = load_generator(tmp_path / "release").model
    assert_same_weights(again, model)
    z, y = torch.randn(2, 4, 4, 4), torch.tensor([0, 2])
    style = torch.randint(4, (2, model.num_style_tokens))
    assert torch.equal(again(z, y, 2.0, style), model(z, y, 2.0, style))


def test_our_mae_to_the_release_and_back(tmp_path):
    mae = MAE(3, 32, (1, 1, 1, 1), num_classes=4, patch_size=1, input_patch_size=2)
    write_model(tmp_path, mae, {"step": 3})
    assert_same_weights(load_mae(tmp_path), mae)
    convert.main([str(tmp_path), str(tmp_path / "release")])
    again = load_mae(tmp_path / "release")
    assert_same_weights(again, mae)
    assert again.config == mae.config


def test_an_mae_that_the_release_cannot_build(tmp_path):
    write_model(tmp_path, MAE(1, 8, (1, 1, 1, 1)), {"step": 0})
    with pytest.raises(UserError, match="multiples of 32 only"):
        convert.main([str(tmp_path), str(tmp_path / "release")])


def test_a_description_that_is_no_object(tmp_path):
    write_model(tmp_path, DriftingDiT(**SIZES), {"step": 0, "release": 5})
    with pytest.raises(UserError, match="release is 5, expected an object"):
        convert.main([str(tmp_path), str(tmp_path / "release")])


def test_convert_overwrites_nothing(tmp_path):
    convert.main([str(ARTIFACT), str(tmp_path)])
    with pytest.raises(UserError, match="has model.safetensors or model.json already"):
        convert.main([str(ARTIFACT), str(tmp_path)])


# Files


def test_params_ema_directory_and_a_tree_under_params(artifact, tmp_path):
    inner = tmp_path / "run" / "params_ema"
    shutil.copytree(artifact, inner)
    arrays = read_arrays(artifact / "ema_params.msgpack")
    write_arrays(inner / "ema_params.msgpack", {f"params/{name}": array for name, array in arrays.items()})
    assert_same_weights(load_generator(inner.parent).model, load_generator(ARTIFACT).model)


def test_all_that_does_not_fit_is_told_at_once(artifact):
    arrays = read_arrays(artifact / "ema_params.msgpack")
    del arrays["RMSNorm_0/weight"]
    del arrays["LightningDiT_0/pos_embed"]
    arrays["LightningDiT_0/blocks_2/RMSNorm_0/weight"] = torch.zeros(64)
    arrays["Embed_0/embedding"] = torch.zeros(10, 64)
    arrays["LightningDiT_0/cls_embed"] = torch.zeros(1, 4, 64, dtype=torch.int32)
    arrays["TimestepEmbedder_0/TorchLinear_0/Dense_0/bias"] = torch.full((64,), float("nan"))
    write_arrays(artifact / "ema_params.msgpack", arrays)
    with pytest.raises(UserError) as caught:
        load_generator(artifact)
    assert str(caught.value).partition("model_config: ")[2].split("; ") == [
        "Embed_0/embedding is torch.float32 [10, 64], expected torch.float32 [11, 64]",
        "LightningDiT_0/blocks_2/RMSNorm_0/weight is torch.float32 [64], expected nothing",
        "LightningDiT_0/cls_embed is torch.int32 [1, 4, 64], expected torch.float32 [1, 4, 64]",
        "LightningDiT_0/pos_embed is nothing, expected torch.float32 [1, 16, 64]",
        "RMSNorm_0/weight is nothing, expected torch.float32 [64]",
        "TimestepEmbedder_0/TorchLinear_0/Dense_0/bias has NaN or infinity",
    ]


def test_a_huge_model_config_asks_for_no_memory(artifact):
    metadata = json.loads((artifact / "metadata.json").read_text())
    metadata["model_config"]["num_classes"] = 10**12
    (artifact / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match=r"Embed_0/embedding is .* \[11, 64\], expected .* \[1000000000000, 64\]"):
        load_generator(artifact)


def test_every_parameter_comes_from_the_file():
    plain = DriftingDiT(**SIZES, use_rmsnorm=False, use_swiglu=False)
    for model in (DriftingDiT(**SIZES), plain, MAE(base_channels=8)):
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        with torch.no_grad():
            for view in release_arrays(model).values():
                view += 1
        assert all((parameter == 1).all() for parameter in model.parameters())


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"model_config": None}, "has no model_config"),
        ({"kind": "vae"}, "holds a network of kind vae, not a generator"),
        ({"model_config": {"cond_dim": 64, "use_moe": True, "depth": 2}}, "unexpected keyword argument 'use_moe'"),
        ({"model_config": {"depth": 2}}, "no cond_dim"),
        ({"model_config": {"cond_dim": 64, "hidden_size": 63}}, "not a multiple of num_heads"),
        ({"model_config": {"cond_dim": "wide"}}, "cannot be read"),
    ],
)
def test_metadata_that_says_too_little(change, expected, artifact):
    metadata = json.loads((artifact / "metadata.json").read_text()) | change
    (artifact / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match=expected):
        load_generator(artifact)


@pytest.mark.parametrize("case, load", [("gen_plain", load_generator), ("mae_odd", load_mae)])
def test_metadata_with_nothing_but_the_model_config(case, load, tmp_path):
    write_case(case, tmp_path)
    expected, metadata = load(tmp_path), json.loads((tmp_path / "metadata.json").read_text())
    (tmp_path / "metadata.json").write_text(json.dumps({"model_config": metadata["model_config"]}))
    assert_same_weights(network(load(tmp_path)), network(expected))


def test_missing_files(artifact, tmp_path):
    with pytest.raises(UserError, match="there is no run directory"):
        load_generator(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds a generator, not a masked autoencoder"):
        load_mae(artifact)
    (artifact / "metadata.json").unlink()
    with pytest.raises(UserError, match=r"metadata.json cannot be read, and only it tells what .*: No such file"):
        load_generator(artifact)
    write_case("mae_odd", tmp_path)
    with pytest.raises(UserError, match="holds a masked autoencoder, not a generator"):
        load_generator(tmp_path)


def array(shape, dtype="float32", content=b"\0" * 8, code=1) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, content)))


def nested(depth: int) -> bytes:
    return b"\x81\xa1a" * depth + msgpack.packb(1)


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "empty"),
        (pickle.dumps({"a": np.zeros(2)}), "no tree of arrays"),
        (msgpack.packb({"a": array([2])})[:-3], "no tree of arrays"),
        (msgpack.packb({"a": array([2])}) + b"x", "no tree of arrays"),
        (msgpack.packb({"a": array([3])}), r"shape '\[3\]' is invalid for input of size 2"),
        (msgpack.packb({"a": array([-1, -2])}), "no tree of arrays"),
        (msgpack.packb({"a": array([2**40, 0], content=b"x")}), "no tree of arrays"),
        (msgpack.packb({"a": array([1], "object")}), "dtype 'object', expected one of"),
        (msgpack.packb({"a": array([2], code=5)}), "extension type 5"),
        (msgpack.packb({"a": msgpack.ExtType(1, b"\xc1")}), "no tree of arrays"),
        (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(7))}), "no tree of arrays"),
        (msgpack.packb({"a": {"b": 3.5}}), "a/b is float"),
        (msgpack.packb([1, 2]), "all of it is list"),
        (msgpack.packb({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 2}}}), "no tree of arrays"),
        (nested(500), "is int, expected arrays"),
        (nested(100_000), "no tree of arrays"),
        (b"\xc6\xff\xff\xff\xff", "no tree of arrays"),  # 4 GiB of bytes announced
    ],
    ids=range(17),
)
def test_malformed_weights(content, expected, artifact):
    (artifact / "ema_params.msgpack").write_bytes(content)
    with pytest.raises(UserError, match=expected):
        load_generator(artifact)


def test_dtypes_and_shapes_survive(tmp_path):
    arrays = {
        "b/half": torch.randn(3, 2).bfloat16(),
        "b/int": torch.arange(4, dtype=torch.uint8),
        "a": torch.tensor(1.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "turned": torch.randn(3, 2).t(),
    }
    write_arrays(tmp_path / "x", arrays)
    read = read_arrays(tmp_path / "x")
    assert read.keys() == arrays.keys()
    assert all(torch.equal(read[name], a) and read[name].dtype == a.dtype for name, a in arrays.items())


def test_large_arrays_come_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(flax_msgpack, "CHUNK_BYTES", 64)
    arrays = {"a": torch.randn(5, 7), "b": torch.randn(16)}
    write_arrays(tmp_path / "x", arrays)
    tree = msgpack.unpackb((tmp_path / "x").read_bytes())
    assert tree["a"]["__msgpack_chunked_array__"] is True and tree["a"]["shape"] == {"0": 5, "1": 7}
    assert list(tree["a"]["chunks"]) == ["0", "1", "2"] and isinstance(tree["b"], msgpack.ExtType)
    read = read_arrays(tmp_path / "x")
    assert torch.equal(read["a"], arrays["a"]) and torch.equal(read["b"], arrays["b"])


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has one generator; ``hub.asked`` lists what was downloaded from it. ``hub.cut()`` cuts it off."""
    stored = SimpleNamespace(asked=[], cut=lambda: setattr(stored, "in_reach", False), in_reach=True)
    shutil.copytree(ARTIFACT, tmp_path / "snapshot" / "models" / "gen" / "jax" / "latent_tiny")

    def connect():
        if not stored.in_reach:
            raise ConnectionError("no route\nand more")

    def download(repo_id, *, allow_patterns, local_files_only=False):
        if local_files_only:
            if (repo_id, allow_patterns) not in stored.asked:
                raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")
            return str(tmp_path / "snapshot")
        connect()
        stored.asked.append((repo_id, allow_patterns))
        return str(tmp_path / "snapshot")

    def model_info(repo_id, *, timeout):
        assert repo_id == "Goodeat/drifting" and timeout == 10
        connect()
        files = ["README.md", "models/gen/jax/latent_tiny/ema_params.msgpack", "models/mae/jax/m/ema_params.msgpack"]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    return stored


def test_hub(hub, tmp_path):
    assert_same_weights(load_generator("hf://latent_tiny").model, load_generator(ARTIFACT).model)
    assert hub.asked == [("Goodeat/drifting", ["models/gen/jax/latent_tiny/*"])]
    assert convert.main(["hf://latent_tiny", str(tmp_path / "ours")]) == 0
    assert_same_weights(load_generator(tmp_path / "ours").model, load_generator(ARTIFACT).model)


def test_hub_has_no_such_model(hub):
    with pytest.raises(UserError, match="Goodeat/drifting has no model 'nope'; it has: latent_tiny$"):
        load_generator("hf://nope")
    with pytest.raises(UserError, match="has no model 'latent_tiny'; it has: m$"):
        load_mae("hf://latent_tiny")
    for name in ("", "../x", "a/b/c", "*"):
        with pytest.raises(UserError, match="expected hf://NAME"):
            load_generator(f"hf://{name}")
    assert not hub.asked


def test_hub_out_of_reach(hub, tmp_path, monkeypatch):
    load_generator("hf://latent_tiny")
    hub.cut()
    assert_same_weights(load_generator("hf://latent_tiny").model, load_generator(ARTIFACT).model)  # downloaded before
    assert convert.main(["hf://latent_tiny", str(tmp_path / "ours")]) == 0
    with pytest.raises(
        UserError, match="cannot download hf://nope from .*/mae/jax/nope here.*: ConnectionError: no route and more$"
    ):
        load_mae("hf://nope")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"hf://latent_tiny needs huggingface_hub.*pip install 'drifting\[imagenet\]'"):
        load_generator("hf://latent_tiny")


# Sampling


class FakeVAE(torch.nn.Module):
    """Stands for diffusers' AutoencoderKL: enlarges the first three channels."""

    dtype = torch.float32
    batches: list[int] = []

    @classmethod
    def from_pretrained(cls, name, torch_dtype):
        assert name == "stabilityai/sd-vae-ft-mse" and torch_dtype == torch.float32
        return cls()

    def decode(self, latents):
        self.batches.append(len(latents))
        return SimpleNamespace(sample=latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3))


@pytest.fixture
def no_vae_kept():
    vae.require_vae.cache_clear()
    yield
    vae.require_vae.cache_clear()


def test_sampling_latents(hub, tmp_path, monkeypatch, no_vae_kept):
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(AutoencoderKL=FakeVAE))
    monkeypatch.setattr(FakeVAE, "batches", [])
    arguments = ["hf://latent_tiny", "--num", "50", "--labels", "3,1"]
    assert sample.main([*arguments, "--out", str(tmp_path / "a.npz")]) == 0
    assert FakeVAE.batches == [16, 16, 16, 2]  # whatever the batches that are drawn
    with np.load(tmp_path / "a.npz") as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    assert images.shape == (50, 64, 64, 3) and labels.tolist() == [3] * 25 + [1] * 25
    model, first = load_generator(ARTIFACT), int(np.random.SeedSequence(0).generate_state(1)[0])
    sources = [torch.Generator().manual_seed((first + n) % 2**32) for n in range(50)]
    latents = torch.cat(
        [model.generate(1, torch.tensor([y]), generator=g) for y, g in zip(labels, sources, strict=True)]
    )
    expected = (latents[:, :3] / 0.18215 + 1) * 127.5
    assert np.abs(images[:, ::8, ::8] - nhwc(expected.clamp(0, 255)).numpy()).max() <= 0.51
    assert sample.main([*arguments, "--out", str(tmp_path / "a.png")]) == 0
    assert Image.open(tmp_path / "a.png").size == (8 * 68 + 4, 7 * 68 + 4)


def test_latents_are_decoded_in_float32(monkeypatch, no_vae_kept):
    """On a GPU too, whose VAE is loaded as that of the CPU, and within autocast; latents may be kept in 16 bits."""
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(AutoencoderKL=FakeVAE))
    assert isinstance(vae.require_vae(torch.device("cuda")), FakeVAE)  # which checks the type
    seen = []
    weight = torch.eye(4)[:, :3]
    monkeypatch.setattr(FakeVAE, "decode", lambda self, x: seen.append(x) or SimpleNamespace(sample=x.mT @ weight))
    with torch.autocast("cpu", torch.bfloat16):
        images = vae.decode_latents(torch.randn(2, 4, 3, dtype=torch.float16))
    assert images.dtype == seen[0].dtype == torch.float32


def test_no_vae(monkeypatch, no_vae_kept):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install 'drifting\[imagenet\]'"):
        vae.decode_latents(torch.zeros(1, 4, 2, 2))

    def offline(name, torch_dtype):
        raise OSError("cannot reach the hub\nsee the manual")

    monkeypatch.setattr(FakeVAE, "from_pretrained", offline)
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(AutoencoderKL=FakeVAE))
    with pytest.raises(UserError, match="cannot load the VAE .*: OSError: cannot reach the hub see the manual$"):
        vae.decode_latents(torch.zeros(1, 4, 2, 2))


def test_no_vae_is_told_before_latents_are_generated(tmp_path, monkeypatch, no_vae_kept):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr(DriftingDiT, "generate", lambda *args, **kwargs: pytest.fail("generated"))
    with pytest.raises(UserError, match=r"pip install 'drifting\[imagenet\]'"):
        sample.main([str(ARTIFACT), "--num", "1", "--out", str(tmp_path / "a.png")])


def test_sampling_pixels_of_the_release(tmp_path):
    expected = write_case("gen_pixel", tmp_path)
    assert sample.main([str(tmp_path), "--num", "2", "--labels", "4", "--out", str(tmp_path / "a.npz")]) == 0
    with np.load(tmp_path / "a.npz") as archive:
        assert archive["arr_0"].shape == (2, *expected["samples"].shape[1:])
