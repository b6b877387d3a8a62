"""Networks that are shared: in folders and on a hub, with a card of their run; and what is said of others."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from local_hub import local_hub

from drifting import load_generator, load_mae, sample
from drifting.config import load_config
from drifting.errors import UserError
from drifting.models import MAE, ConvDecoder, DriftingDiT, ResidualMLP
from drifting.models.network_files import read_model
from drifting.train import train

huggingface_hub = pytest.importorskip("huggingface_hub")

SMALL = {"num_classes": 3, "noise_dim": 5, "width": 16, "depth": 1, "cond_dim": 8}
NETWORKS = {
    "dit": lambda: DriftingDiT(img_size=4, in_chans=3, num_classes=3, embed_dim=8, depth=1, num_heads=2, style_vocab=4),
    "conv": lambda: ConvDecoder((1, 8, 8), channels=(8, 4), **SMALL),
    "mlp": lambda: ResidualMLP((7,), **SMALL),
    "mae": lambda: MAE(1, 8, (1, 1, 1, 1)),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run of a small generator of digits."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    small = ["model=residual_mlp", "model.width=16", "model.depth=1", "step.gen_per_label=4"]
    train(load_config("digits", ["train.steps=2", "evaluation.num_samples=20", *small]), out)
    return out


def assert_same_weights(first, second):
    for (name, a), (other, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b), name


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_that_no_run_has(kind, tmp_path):
    network = NETWORKS[kind]()
    assert isinstance(network, huggingface_hub.PyTorchModelHubMixin)
    network.save_pretrained(tmp_path)
    again = type(network).from_pretrained(tmp_path)
    assert not again.training and again.config == network.config
    assert_same_weights(again, network)
    assert "No licence was chosen" in (tmp_path / "README.md").read_text(encoding="utf-8")
    if kind == "mae":
        assert_same_weights(load_mae(tmp_path), network)
        return
    suffix = "npz" if kind == "mlp" else "png"
    assert sample.main([str(tmp_path), "--num", "4", "--labels", "2", "--out", str(tmp_path / f"x.{suffix}")]) == 0


class Halved(ResidualMLP):
    """A user's own, which computes something else."""

    def forward(self, z, y, cfg_scale=1.0):
        return super().forward(z, y, cfg_scale) / 2


def test_a_class_derived_from_ours(tmp_path):
    network = Halved((7,), **SMALL)
    network.save_pretrained(tmp_path)
    again = Halved.from_pretrained(tmp_path)
    assert type(again) is Halved and again.config == network.config
    assert_same_weights(again, network)
    with pytest.raises(UserError, match="holds a network of your own"):
        ResidualMLP.from_pretrained(tmp_path)


def test_a_run_is_shared_with_its_card(run, tmp_path):
    network = ResidualMLP.from_pretrained(run)
    network.save_pretrained(tmp_path / "shared", model_card_kwargs={"license": "mit"})
    files = {path.name for path in (tmp_path / "shared").iterdir()}
    assert files == {"README.md", "config.json", "config.yaml", "model.json", "model.safetensors", "samples.png"}
    card = (tmp_path / "shared" / "README.md").read_text(encoding="utf-8")
    assert huggingface_hub.ModelCard(card).data.license == "mit" and "No licence" not in card
    for part in ("# ResidualMLP of digits", "(samples.png)", "| frechet_distance |", "gen_per_label: 4", "for 2 steps"):
        assert part in card
    told = [json.loads((folder / "model.json").read_text()) for folder in (run, tmp_path / "shared")]
    assert told[0] == told[1] and told[0]["quality"]["frechet_distance"] > 0

    # What was shared is shared again with all of that.
    ResidualMLP.from_pretrained(tmp_path / "shared").save_pretrained(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == files
    first, second = (load_generator(folder) for folder in (run, tmp_path / "again"))
    noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    drawn = [each.generate(4, [1, 2, 3, 9], 1.5, generator=n) for each, n in zip((first, second), noise, strict=True)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    "facts",
    [{"quality": 3}, {"quality": {"fid": "low", "recall": 0.5, "sfid": None}}, {"class_names": 7},
     {"class_names": {"a": 1, "b": 2}}, {"data": ["digits"], "step": None}],
    ids=str,
)  # fmt: skip
def test_a_card_of_odd_facts(facts, tmp_path):
    """What somebody wrote into a file by hand does not keep its network from being shared."""
    network = ResidualMLP((7,), **SMALL)
    network.facts = facts
    network.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "# ResidualMLP" in card and "low" not in card
    assert ("| recall | 0.5 |" in card) == ("recall" in str(facts))


def test_a_saved_folder_is_trained_on_as_it_is(run):
    """Saving into the run that a network comes from leaves all of it as it was, and adds the card."""

    def files():
        found = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        return {path: json.loads(text) if path.name == "model.json" else text for path, text in found.items()}

    before = files()
    ResidualMLP.from_pretrained(run).save_pretrained(run)
    after = files()
    assert before == {path: content for path, content in after.items() if path in before}
    assert {path.name for path in after.keys() - before.keys()} == {"README.md", "config.json", "samples.png"}


SCRIPT = """
import sys
from drifting import evaluate, load_generator, sample
from drifting.models import ResidualMLP

run, out = sys.argv[1:]
network, licence = ResidualMLP.from_pretrained(run), {"license": "mit"}
address = network.push_to_hub("me/digits", token="hf_token", model_card_kwargs=licence)
assert "/me/digits/commit/" in address, address
assert sample.main(["hf://me/digits", "--num", "4", "--out", out + "/online.npz"]) == 0
assert ResidualMLP.from_pretrained("me/digits").facts["data"] == "digits"
load_generator("hf://me/digits").model.push_to_hub("me/again", token="hf_token")
"""
OFFLINE = """
import sys
from drifting import sample
from drifting.cli import run_command

run_command(lambda: sample.main([sys.argv[1], "--num", "4", "--out", sys.argv[2] + "/offline.npz"]))
"""


def test_a_hub(run, tmp_path):
    def python(script, *arguments, hub):
        surroundings = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", script, *map(str, arguments), str(tmp_path)]
        return subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=300)

    with local_hub() as hub:
        result = python(SCRIPT, run, hub=hub.address)
        assert result.returncode == 0, result.stderr
        pushed, again = hub.repositories["me/digits"], hub.repositories["me/again"]
        card = pushed["README.md"].decode()
        assert "license: mit" in card and 'ResidualMLP.from_pretrained("me/digits")' in card
        assert pushed["model.safetensors"] == again["model.safetensors"] == (run / "model.safetensors").read_bytes()
        told = [json.loads(files["model.json"]) for files in (pushed, again)]
        assert told[0] == told[1] == json.loads((run / "model.json").read_bytes())
        assert pushed.keys() == again.keys() >= {"config.yaml", "samples.png"}
        absent = python(OFFLINE, "hf://me/absent", hub=hub.address)
        assert absent.returncode == 2 and absent.stderr.startswith("error: there is no folder me/absent")
        assert len(absent.stderr.splitlines()) == 1
    cached = python(OFFLINE, "hf://me/digits", hub=hub.address)  # Nobody answers there any more.
    assert cached.returncode == 0, cached.stderr
    assert (tmp_path / "offline.npz").read_bytes() == (tmp_path / "online.npz").read_bytes()


def test_what_is_no_network_of_the_class(run, tmp_path):
    with pytest.raises(UserError, match="holds a generator, not a masked autoencoder"):
        MAE.from_pretrained(run)
    with pytest.raises(UserError, match="there is no folder no name, and the hub"):
        ResidualMLP.from_pretrained("no name")
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(UserError, match="holds no model.safetensors"):
        ResidualMLP.from_pretrained(tmp_path)
    shutil.copy(run / "model.safetensors", tmp_path)
    for text, message in (
        ("{}", "model.json has no kind, expected the kind of a network, such as"),
        ('{"kind": "residual_mlp"}', "there is no ResidualMLP of the arguments None: expected an object"),
        ('{"quality": NaN}', "it is no JSON: it has NaN, which is no number there"),
    ):
        (tmp_path / "model.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_model(tmp_path)


def test_without_huggingface_hub(run):
    """Folders are read all the same; sharing says what is missing."""
    script = f"""
import sys
sys.modules["huggingface_hub"] = None
from drifting.models import ResidualMLP
network = ResidualMLP.from_pretrained({str(run)!r})
for share in (network.save_pretrained, network.push_to_hub):
    try:
        share("me/digits")
    except ValueError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.count("pip install 'drifting[hub]'") == 2, result
