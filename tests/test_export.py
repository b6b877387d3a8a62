"""Exported files compute what the generator does, for every kind of network, and say so only where it is true."""

import json
import sys

import pytest
import torch
from torch import nn

from drifting import export as command
from drifting.config import load_config, save_config
from drifting.errors import UserError
from drifting.generation import Generator, Signature
from drifting.hub import RunDirectory, save_generator
from drifting.hub.exporting import export
from drifting.models import ConvDecoder, DriftingDiT, ResidualMLP

PLAIN = dict.fromkeys(["use_rope", "use_qknorm", "use_swiglu", "use_rmsnorm"], False)


class Noise(nn.Module):
    """It takes noise alone, and makes vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, z):
        return self.layer(z).sin()


class Labelled(Noise):
    """It knows no guidance scale, and looks at none of its labels."""

    def forward(self, z, y):
        return self.layer(z)


class Conditioned(Noise):
    def forward(self, z, condition, cfg_scale):
        return self.layer(z) * cfg_scale.unsqueeze(1) + condition.flatten(1)[:, :2]


class OfOneBatch(Noise):
    def forward(self, z):
        return self.layer(z).reshape(len(z), 2)


class Branching(Noise):
    def forward(self, z):
        return super().forward(z if z.mean() > 0 else -z)


class Eigen(Noise):
    def forward(self, z):
        return super().forward(z * torch.linalg.eigvalsh(z.T @ z).sum())


class Random(Noise):
    def forward(self, z):
        return self.layer(z) + torch.randn_like(z[:, :2])


def dit(**options) -> DriftingDiT:
    model = DriftingDiT(8, 2, 3, 10, embed_dim=16, depth=2, num_heads=2, **options)
    for weight in model.parameters():
        if not weight.any():  # A fresh one returns 0.
            nn.init.normal_(weight, std=0.2)
    return model


NETWORKS = {
    "rope and styles": lambda: dit(num_style_tokens=4, style_vocab=8),
    "plain transformer": lambda: dit(num_style_tokens=0, n_cls_tokens=0, **PLAIN),
    "convolutions": lambda: ConvDecoder([1, 6, 7], 10, 8, (16, 8), 16, 1, 8),
    "mlp": lambda: ResidualMLP([1, 8, 8], 10, 8, 16, 1, 8),
    "noise": Noise, "labelled": Labelled, "conditioned": Conditioned,
}  # fmt: skip


def generator_of(kind: str, pixel_range: tuple[float, float] | None = (0.0, 2.0)) -> Generator:
    torch.manual_seed(0)
    model = NETWORKS[kind]().eval()
    if kind in ("noise", "labelled", "conditioned"):
        facts = {"class_names": ("all",)} | ({"condition_shape": (2, 2)} if kind == "conditioned" else {})
        return Generator(model, (3,), (2,), name="module:Name", **facts)
    return Generator(model, model.noise_shape, model.sample_shape, tuple("abcdefghij"), pixel_range, cfg_scale=1.5)


def inputs_of(generator: Generator, num: int) -> dict[str, torch.Tensor]:
    drawn = Signature.of(generator.model, generator.noise_shape).draw(generator.model, num, seeded(), "cpu")
    y = {"labels": 9 - torch.arange(num), "conditions": torch.arange(4.0 * num).view(num, 2, 2)}
    return {"noise": drawn.pop("z"), **y, "cfg_scale": torch.linspace(1, 4, num), **drawn}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def run(path, inputs: dict[str, torch.Tensor]) -> tuple[dict, torch.Tensor]:
    """What is told in the file, and what it makes of those of the inputs that it has; as programs without us do it."""
    if path.suffix == ".pt2":
        told = {"drifting.json": ""}
        program = torch.export.load(path, extra_files=told)
        facts = json.loads(told["drifting.json"])
        return facts, program.module()(*(inputs[name] for name in facts["inputs"]))
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    facts = json.loads(session.get_modelmeta().custom_metadata_map["drifting"])
    assert [value.name for value in session.get_inputs()] == list(facts["inputs"])
    assert all(value.shape == ["batch", *facts["inputs"][value.name]] for value in session.get_inputs())
    (samples,) = session.run([facts["output"]], {name: inputs[name].numpy() for name in facts["inputs"]})
    return facts, torch.from_numpy(samples)


@pytest.mark.parametrize("form", ["onnx", "torch"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_file_draws_what_the_generator_does(kind, form, tmp_path):
    if form == "onnx":
        pytest.importorskip("onnxscript")
    generator, path = generator_of(kind), tmp_path / f"model{'.onnx' if form == 'onnx' else '.pt2'}"
    exported = export(generator, path, form, torch.float32, {"more": 1})
    assert exported.error < 1e-5 and exported.torch_error == 0 and exported.seconds > 0
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    for num in (1, 4):
        inputs = inputs_of(generator, num)
        facts, samples = run(path, inputs)
        y = inputs["labels" if generator.condition_shape is None else "conditions"]
        y = y * 0 if generator.class_names == ("all",) and generator.condition_shape is None else y
        expected = generator.generate(num, y, inputs["cfg_scale"], generator=seeded())
        expected = expected if generator.pixel_range is None else expected - 1  # from [0, 2]
        assert samples.dtype == torch.float32 and samples.shape == expected.shape
        assert (samples - expected).norm() < 1e-5 * expected.norm()
    assert facts == json.loads(json.dumps(exported.facts)) and facts["more"] == 1
    assert facts["output"] == ("images" if generator.makes_images else "samples")
    assert facts["class_names"] == list(generator.class_names) and facts["cfg_scale"] == generator.cfg_scale
    assert ("style" in facts["inputs"]) == (facts.get("style_vocab") == 8) == (kind == "rope and styles")
    conditions = [name for name in ("labels", "conditions", "cfg_scale") if name in facts["inputs"]]
    assert conditions == {"noise": [], "labelled": ["labels"], "conditioned": ["conditions", "cfg_scale"]}.get(
        kind, ["labels", "cfg_scale"]
    )


@pytest.mark.parametrize("kind", ["rope and styles", "convolutions", "mlp"])
def test_bfloat16(kind, tmp_path):
    """Its error is PyTorch's own in bfloat16; inputs and outputs are float32."""
    generator = generator_of(kind, None)
    exported = export(generator, tmp_path / "model.pt2", "torch", torch.bfloat16, {})
    assert 1e-4 < exported.torch_error < 5e-2 and exported.error == pytest.approx(exported.torch_error, rel=0.2)
    assert next(generator.model.parameters()).dtype == torch.float32
    assert run(tmp_path / "model.pt2", inputs_of(generator, 2))[1].dtype == torch.float32


def test_latents_stay_latents(tmp_path):
    torch.manual_seed(0)
    model = ResidualMLP([4, 4, 4], 2, 8, 16, 1, 8).eval()
    generator = Generator(model, (8,), (4, 4, 4), ("a", "b"), (0.0, 1.0), latent=True, name="residual_mlp")
    save_generator(RunDirectory(tmp_path), generator)
    generator = Generator(model, (8,), (4, 4, 4), ("a", "b"), (0.0, 1.0), latent=True)
    export(generator, tmp_path / "model.pt2", "torch", torch.float32, {})
    facts, latents = run(tmp_path / "model.pt2", inputs_of(generator, 2) | {"labels": torch.tensor([1, 0])})
    assert facts["output"] == "latents" and latents.abs().max() > 1


@pytest.fixture
def saved(tmp_path):
    """A run directory as training leaves it, and one of the user's own network."""
    generator = generator_of("mlp")
    save_generator(RunDirectory(tmp_path / "run"), generator)
    save_config(load_config("digits", ["guidance.cfg_scale_range=[1.0,2.5]"]), tmp_path / "run" / "config.yaml")
    for name, network in (("own", Noise), ("one", OfOneBatch), ("random", Random)):
        save_generator(RunDirectory(tmp_path / name), Generator(network(), (3,), (2,)))
    return tmp_path


def test_command(saved, capsys):
    assert command.main([str(saved / "run"), "--format", "torch"]) == 0
    written, compared = capsys.readouterr().out.splitlines()
    assert written.startswith(f"wrote {saved / 'run' / 'model.pt2'}: torch.export, float32, ")
    assert written.endswith("from noise [B, 8], labels [B], cfg_scale [B] to images [B, 1, 8, 8] in [-1, 1]")
    assert compared.startswith("run by torch in batches of 1, 2, 5: largest difference from PyTorch in float32 ")
    facts, _ = run(saved / "run" / "model.pt2", inputs_of(generator_of("mlp"), 1))
    assert facts["cfg_scale_range"] == [1.0, 2.5]


def test_command_with_a_network_of_ones_own(saved, capsys):
    out = saved / "new" / "own.pt2"
    arguments = [str(saved / "own"), "--format", "torch", "--out", str(out), "--dtype", "bfloat16"]
    assert command.main([*arguments, "--model", f"{__name__}:Noise"]) == 0
    assert "from noise [B, 3] to samples [B, 2]\n" in capsys.readouterr().out and out.is_file()
    assert run(out, inputs_of(generator_of("noise"), 1))[0]["cfg_scale_range"] is None


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["{}/nowhere"], "there is no folder .*nowhere to write to: name a run directory, or a file with --out"),
        (["{}/nowhere", "--out", "{}/a.onnx"], "there is no run directory .*nowhere"),
        (["{}/run", "--out", "{}/a.pt2"], r"--out is .*a.pt2, expected a file that ends in .onnx, as --format onnx"),
        (["{}/run", "--dtype", "bfloat16"], "--dtype is bfloat16, which onnxruntime cannot run on CPUs: leave it out"),
        (["{}/run", "--format", "tflite"], "argument --format: invalid choice: 'tflite'"),
        (["{}/own"], "holds a network of your own"),
        (["{}/damaged"], "model.safetensors cannot be loaded"),
        (["{}/one", "--model", f"{__name__}:OfOneBatch"], r"OfOneBatch cannot be exported .*z.shape\[0\] .* for len"),
        (
            ["{}/random", "--format", "torch", "--model", f"{__name__}:Random"],
            "what was exported of Random is not to be used: its samples differ from PyTorch's by .*, expected at "
            "most .*; PyTorch's differ from call to call: what is random must come from the network's draw_extra",
        ),
        (["{}/one", "--model", f"{__name__}:Branching"], "^Branching cannot be exported for any batch size: Guard"),
        (["{}/one", "--model", f"{__name__}:Eigen"], "^Eigen cannot be written as --format onnx: .*linalg"),
        (["{}/run", "--out", "/proc/model.onnx"], "^cannot write /proc/model.onnx: "),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(arguments, expected, saved):
    save_generator(RunDirectory(saved / "damaged"), generator_of("mlp"))
    (saved / "damaged" / "model.safetensors").write_bytes(b"\xff" * 100)
    before = set(saved.rglob("*"))
    with pytest.raises(UserError, match=expected) as raised:
        command.main([argument.format(saved) for argument in arguments])
    assert "\n" not in str(raised.value) and set(saved.rglob("*")) == before


def test_a_failure_leaves_the_file_of_before(saved, monkeypatch):
    """Here what was written cannot be read again."""
    path = saved / "model.pt2"
    path.write_bytes(b"of before")
    monkeypatch.setattr(torch.export, "load", lambda file: torch.load(file, map_location=object()))
    with pytest.raises(UserError, match="what was exported of ResidualMLP is not to be used: "):
        export(generator_of("mlp"), path, "torch", torch.float32, {})
    assert path.read_bytes() == b"of before"


def test_what_is_missing_or_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr("drifting.hub.exporting.MOST_BYTES", 1000)
    arguments = generator_of("mlp"), tmp_path / "model.onnx", "onnx", torch.float32, {}
    with pytest.raises(UserError, match="ResidualMLP has [0-9.k]+B of weights, a file of ONNX holds 2GB: try"):
        export(*arguments)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match="--format onnx needs onnx, which is"):
        export(*arguments)
    assert not list(tmp_path.iterdir())
