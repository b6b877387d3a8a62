"""The commands as a person runs them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drifting import evaluate, pretrain, sample, train_classifier
from drifting import train as training
from drifting.__main__ import COMMANDS
from drifting.__main__ import main as list_commands
from drifting.cli import parse_training_command, run_command
from drifting.config import Config, PretrainConfig
from drifting.config.keys import keys_of
from drifting.errors import UserError

SMALL = [
    "model=drifting_dit",
    "model.patch_size=4", "model.embed_dim=16", "model.depth=1", "model.num_heads=2", "step.gen_per_label=8",
    "train.log_every=2", "train.save_every=1000", "train.eval_every=0",
]  # fmt: skip


def run(*arguments: object, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env=environ(),
    )


def environ() -> dict[str, str]:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return os.environ | {"PYTHONPATH": root}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    result = run("drifting.train", "--out", out, "train.steps=4", "optimizer.warmup_steps=0", *SMALL)
    assert result.returncode == 0, result.stderr
    assert "Fréchet distance to the test images" in result.stdout
    return out


def test_train_leaves_a_complete_run_directory(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "model.safetensors", "model.json", "checkpoints", "samples"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert [path.name for path in (trained / "samples").iterdir()] == ["step_00000004.png"]
    description = json.loads((trained / "model.json").read_text())
    assert len(description["class_names"]) == 10
    assert description["pixel_range"] == [-1, 1] and description["step"] == 4


def test_sample_then_evaluate(trained, tmp_path):
    result = run("drifting.sample", trained, "--num", 24, "--out", "some/digits.npz", "--labels", "3,5", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / "some" / "digits.npz") as archive:
        assert archive["arr_0"].shape == (24, 8, 8, 1) and archive["arr_0"].dtype == np.uint8
        assert archive["arr_1"].tolist() == [3] * 12 + [5] * 12
    result = run("drifting.evaluate", tmp_path / "some" / "digits.npz", "--reference", trained)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["num_samples"] == 24  # stdout is JSON and nothing else


def test_evaluate_agrees_with_training(trained, capsys):
    assert evaluate.main([str(trained)]) == 0
    report = json.loads(capsys.readouterr().out)
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert report["num_samples"] == 1300 and report["step"] == 4
    for measure in ("frechet_distance", "frechet_ratio", "recognised_share", "nearest_ratio"):
        assert report[measure] == pytest.approx(last[measure], rel=1e-6)


def test_samples_depend_on_seed_alone(trained, tmp_path, capsys):
    archives = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = tmp_path / f"{name}.npz"
        assert sample.main([str(trained), "--num", "6", "--out", str(path), "--seed", str(seed)]) == 0
        archives.append(np.load(path)["arr_0"])
    assert (archives[0] == archives[1]).all() and (archives[0] != archives[2]).any()


def test_sample_png(trained, tmp_path):
    assert sample.main([str(trained), "--num", "9", "--out", str(tmp_path / "x.png"), "--cfg-scale", "1.5"]) == 0
    assert Image.open(tmp_path / "x.png").size[0] > 100


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, number):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "drifting.train", "--out", str(out), *SMALL, "train.log_every=1"]
    process = subprocess.Popen(
        [*command, "train.steps=100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ()
    )
    deadline = time.monotonic() + 60
    metrics = out / "metrics.jsonl"
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.1)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in stderr
    reached = int(stderr.split("interrupted at step ")[1].split(",")[0])
    assert (out / "checkpoints" / f"step_{reached:08d}.pt").is_file() and (out / "model.safetensors").is_file()
    assert training.main(["--out", str(out), *SMALL, "train.log_every=1", f"train.steps={reached + 2}"]) == 0
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, reached + 3))


def test_the_commands_are_listed(capsys):
    assert list_commands([]) == 0
    lines = capsys.readouterr().out.splitlines()
    root = Path(evaluate.__file__).parent
    modules = {path.stem: path for path in root.glob("*.py") if path.stem != "__main__"}
    modules |= {f"experiments.{path.stem}": path for path in root.glob("experiments/*.py")}
    assert set(COMMANDS) == {name for name, path in modules.items() if "__name__ == " in path.read_text()}
    for command in COMMANDS:
        after = lines[lines.index(f"  python -m drifting.{command}") + 1]
        assert after.startswith(6 * " ") and "``" not in after


def test_the_list_of_commands_does_not_wait_for_torch():
    code = "import sys; from drifting.__main__ import main; main([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environ(), stdout=subprocess.DEVNULL).returncode == 0


def test_an_unknown_command_names_the_nearest():
    result = run("drifting", "smaple")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "error: there is no command 'smaple': did you mean `python -m drifting.sample`?\n"


@pytest.mark.parametrize(("command", "schema"), [(training, Config), (pretrain, PretrainConfig)])
def test_help_lists_every_key(command, schema, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and max(map(len, text.splitlines())) <= 100
    assert all(f"\n  {key}=" in text for key in keys_of(schema)) and "--change key=value" in text


def test_arguments_of_a_training():
    def parse(*argv):
        return parse_training_command(argv, "train", "Train.", Config, "digits")

    config, out, asked = parse(
        "seed=3", "--change", "optimizer.learning_rate=1e-3", "train.steps=9", "--change", "step.bf16=true"
    )
    assert (config.seed, config.train.steps, config.step.bf16) == (3, 9, True)
    assert config.optimizer.learning_rate == 1e-3
    assert (out, asked) == (Path("runs/digits"), ["optimizer.learning_rate", "step.bf16"])
    assert parse("--config", "cifar10")[1] == Path("runs/cifar10") and parse()[2] == []
    for change, expected in (("seed=1", "seed: it cannot change within a run"), ("sead=1", "did you mean 'seed'")):
        with pytest.raises(UserError, match=expected):
            parse("--change", change)


def test_mistake_is_one_line_and_status_2(tmp_path):
    result = run("drifting.train", "--out", tmp_path / "run", "train.stepz=3")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "error: unknown key 'train.stepz': did you mean 'train.steps'?\n"


@pytest.mark.parametrize(
    "command, arguments, expected",
    [
        (training, ["--config", "nope"], "there is no configuration 'nope'"),
        (training, ["--nope"], "unrecognized arguments: --nope"),
        (training, ["--out", "{file}"], "file/samples: Not a directory"),
        (training, ["--out", "{empty}", "data=mnist", "data.path={nowhere}"], "not in .*nowhere: set data.path to"),
        (training, ["evaluation.features={nowhere}", "--out", "run"], "there are no features .*nowhere: exp"),
        (training, ["evaluation.reference={nowhere}", "--out", "run"], "there is no file"),
        (training, ["evaluation.cfg_scales=[1.0,0.5]", "--out", "run"], "expected .*, 1 or more; or a list"),
        (pretrain, ["--config", "digits"], "there is no configuration 'digits': .* one of: mae_256"),
        (pretrain, ["loss.lambda_cls=x"], "loss.lambda_cls is 'x', expected float"),
        (train_classifier, ["--data", "nope"], "argument --data: invalid choice"),
        (sample, ["{nowhere}", "--num", "1", "--out", "a.png"], "there is no run directory"),
        (sample, ["{empty}", "--num", "1", "--out", "a.png"], "holds no model.json"),
        (sample, ["{broken}", "--num", "1", "--out", "a.png"], "model.safetensors cannot be loaded"),
        (sample, ["{run}", "--num", "0", "--out", "a.png"], "--num is 0, expected 1 or more"),
        (sample, ["{run}", "--num", "x", "--out", "a.png"], "argument --num: invalid int value"),
        (sample, ["{run}", "--num", "1", "--out", "a.jpg"], "ends in .npz or .png"),
        (sample, ["{run}", "--num", "1", "--out", "{file}/a.png"], "cannot write"),
        (sample, ["{run}", "--num", "1", "--out", "a.png", "--labels", "3,10"], "--labels names '10', expected 0 to 9"),
        (sample, ["{run}", "--num", "1", "--out", "a.png", "--labels", "three"], "--labels names 'three', expected"),
        (sample, ["{run}", "--num", "1", "--out", "a.png", "--cfg-scale", "0.5"], "expected 1 or more"),
        (sample, ["{run}", "--num", "1", "--out", "a.png", "--seed", "-1"], "--seed is -1"),
        (evaluate, ["{nowhere}"], "there is no run directory"),
        (evaluate, ["{nowhere}.npz", "--reference", "{run}"], "there is no file"),
        (evaluate, ["{odd}", "--reference", "{run}"], "expected uint8"),
        (evaluate, ["{odd}", "--reference", "{run}", "--num", "3"], "--num, --cfg-scale and --save-npz are for gen"),
        (evaluate, ["{run}", "--num", "1"], "--num is 1, expected 2 or more"),
        (evaluate, ["{run}", "--cfg-scale", "1", "0.5"], "--cfg-scale is 0.5, expected 1 or more"),
        (evaluate, ["{run}", "--save-npz", "a.png"], "expected a file that ends in .npz"),
        (evaluate, ["{run}", "--features", "{empty}"], "there are no features"),
        (evaluate, ["{run}", "--reference", "{empty}"], "must name a run directory"),
        (evaluate, ["{run}", "--reference", "{nowhere}.npz"], "there is no file"),
    ],
)  # fmt: skip
def test_bad_arguments(command, arguments, expected, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    np.savez(tmp_path / "odd.npz", np.zeros((2, 8, 8)), np.zeros(2))
    (tmp_path / "broken").mkdir()
    for name in ("model.json", "model.safetensors"):
        (tmp_path / "broken" / name).write_text('{"kind": "gen"}')
    places = {name: tmp_path / name for name in ("empty", "file", "nowhere", "broken")}
    places |= {"run": trained, "odd": tmp_path / "odd.npz"}
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: command.main([argument.format(**places) for argument in arguments]))
    captured = capsys.readouterr()
    assert caught.value.code == 2 and captured.out == ""
    *before, error = captured.err.splitlines()  # What the data are is said before what goes wrong with them.
    assert all(line.startswith("digits: ") for line in before) and len(before) <= 1
    assert error.startswith("error: ") and re.search(expected, error)


def test_output_that_nobody_reads_ends_the_command_silently():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        for options in ([], ["--help"]):
            command = [sys.executable, "-m", "drifting", *options]
            ended = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True)
            assert (ended.returncode, ended.stderr) == (141, "")
