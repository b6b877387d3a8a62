"""What is timed against each other computes the same thing, and what needs a GPU to run for real runs on a CPU too."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


@pytest.fixture
def command(monkeypatch):
    """A function that runs ``python -m benchmarks.NAME`` with these arguments, in this process; returns its status."""

    def run(name: str, *arguments: str) -> object:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        try:
            return importlib.import_module(f"benchmarks.{name}").main()
        except SystemExit as end:
            return end.code

    return run


@pytest.mark.parametrize("shape", [{"N": 40, "P": 30, "D": 5}, {"N": 64, "P": 64, "D": 130}])
@pytest.mark.parametrize("form", ["compute_V", "drift_field", "drift_loss", "step"])
def test_dense_equals_ours(form, shape):
    from benchmarks.cases import Case, Step

    if form == "step":
        case = Step("drift_loss", **shape, M=4, G=2, maps=((1, 40), (3, 7)))
    else:
        case = Case(form, **shape, G=3 if form == "drift_loss" else 1, backward=form == "compute_V")
    contenders = case.contenders("cpu")
    for dense, ours in zip(contenders["eager"](), contenders["ours"](), strict=True):
        assert (dense - ours).norm() < 1e-4 * dense.norm()


MACHINE = {
    "device": "Some GPU 80GB",
    "memory_bytes": 80 * 10**9,
    "driver": "1.2",
    "torch": "2.0",
    "triton": "3.0",
    "commit": "0123456789abcdef",
    "date": "2000-01-01T00:00:00+00:00",
    "keops": False,
    "ceilings": {"copy": 3e12, "ieee": 5e13, "tf32": 4e14, "bf16": 8e14},
}


# The GPU benchmark


def test_plan_is_of_the_ablation():
    from benchmarks.cases import Step
    from benchmarks.gpu import ABLATION_MAPS, COUNTS, IN_MEMORY, plan

    trials = plan(MACHINE, ours=("triton", "cuda"))
    (step,) = {trial.case for trial in trials if isinstance(trial.case, Step)}
    assert len(step.maps) == 86 and sum(locations for locations, _ in step.maps) == 6734
    assert set(ABLATION_MAPS) <= set(step.maps)
    assert 1 < step.G < 64  # at 64 labels the inputs alone take 91 GB
    assert all(trial.case.bytes < IN_MEMORY * MACHINE["memory_bytes"] for trial in trials)
    maps = [trial.case for trial in trials[: len(ABLATION_MAPS)]]
    assert [(case.G, case.D) for case in maps] == [(64 * locations, D) for locations, D in ABLATION_MAPS]
    assert all((case.N, case.M, case.P) == (COUNTS["N"], COUNTS["M"], COUNTS["P"]) for case in maps)
    timed = [(trial.case, trial.precision, name) for trial in trials for name in trial.contenders]
    assert not {key for key in timed if timed.count(key) > 1 and key[2] not in ("triton", "cuda")}


def test_quick_plan_is_the_main_cases_of_the_plan():
    """The same cases, and ours, beside eager, before what may take all of the time to compile."""
    from benchmarks.gpu import plan, quick_plan

    ours = ("triton", "cuda")
    trials = quick_plan(MACHINE, ours)
    assert {trial.case for trial in trials} == {trial.case for trial in plan(MACHINE, ours)[:8]}
    compiled = [trial.contenders == ("compile",) for trial in trials]
    assert compiled == sorted(compiled) and sum(compiled) == 6


def test_dense_contenders_get_the_problems_that_fit():
    from benchmarks.cases import Case
    from benchmarks.trial import affordable_G

    case = Case("drift_loss", G=65536, N=64, M=16, P=64, D=256)
    assert affordable_G(case, 10**15) == case.G
    assert affordable_G(case, 80 * 10**9) in (8192, 16384, 32768)
    assert affordable_G(case, 0) == 1


def test_floor_is_the_longer_of_bytes_and_products():
    from benchmarks.cases import Case
    from benchmarks.roofline import floor_seconds

    ceilings = MACHINE["ceilings"]
    small = Case("drift_loss", G=10, N=64, M=16, P=64, D=256)  # (64 + 16 + 64 + 64) × 256 × 4 bytes a problem
    assert floor_seconds(small, ceilings, "high") == pytest.approx(10 * 208 * 1024 / 3e12)
    large = Case("drift_field", N=131072, P=131072, D=256)  # 2 × N × 2N × D × 2 flop
    assert floor_seconds(large, ceilings, "high") == pytest.approx(8 * 131072**2 * 256 / 8e14)
    assert floor_seconds(large, ceilings, "highest") == pytest.approx(8 * 131072**2 * 256 / (8e14 / 3))


def test_dry_run(tmp_path, command, capsys):
    """The command from end to end, of the trials that compile nothing."""
    assert command("gpu", "--dry-run", "--only", "with backward", "--out", str(tmp_path)) == 0
    results = json.loads((tmp_path / "dry-run.json").read_text())
    timed = {(row["case"].split()[0], row["contender"]) for row in results["rows"]}
    assert timed == {("compute_V", "eager"), ("compute_V", "ours"), ("drift_field", "ours")}
    for row in results["rows"]:
        assert row["milliseconds"] > 0 and row["floor_milliseconds"] > 0 and row["runs"] >= 3
        assert row["contender"] == "eager" or row["error_to_eager"] is None or row["error_to_eager"] < 1e-4
    assert results["skipped"] == [] and results["machine"]["ceilings"].keys() == {"copy", "ieee", "tf32", "bf16"}
    assert "| `compute_V with backward G=1" in capsys.readouterr().out


def test_a_failing_contender_costs_the_others_nothing(tmp_path):
    from benchmarks.cases import Case
    from benchmarks.gpu import OUT_OF_TIME, Bench
    from benchmarks.trial import Settings, Trial

    bench = Bench(Settings("cpu", 0.01, str(tmp_path / "log")), deadline=time.monotonic() + 300)
    try:
        trial = Trial(Case("drift_loss", N=4, P=4, D=3, G=4), "highest", ("eager", "cuda", "ours"))
        rows = {row["contender"]: row for row in bench.run(trial)}
        assert "'cuda'" in rows["cuda"]["failure"] and rows["eager"]["milliseconds"] > 0
        assert rows["ours"]["error_to_eager"] < 1e-4

        bench.worker.process.kill()  # as a kernel might
        bench.worker.process.join()
        rows = bench.run(trial)
        assert len(rows) == 3 and all("died" in row["failure"] for row in rows)
        assert any("milliseconds" in row for row in bench.run(trial)), "a new process takes over"

        bench.deadline = time.monotonic()
        assert all(row["failure"] == OUT_OF_TIME for row in bench.run(trial))
    finally:
        bench.stop()


def test_complaints():
    """Of our failures, and of results far from eager's; not of others, nor of what there was no time for."""
    from benchmarks.gpu import OUT_OF_TIME, complaints

    row = {"case": "one", "precision": "highest", "contender": "triton"}
    fine = [row | {"error_to_eager": 1e-5}, row | {"error_to_eager": None}, row | {"failure": OUT_OF_TIME}]
    fine += [row | {"contender": "compile", "failure": "out of memory"}]
    fine += [row | {"precision": "high", "error_to_eager": 0.1}]
    assert complaints(fine, ("triton", "cuda")) == []
    assert complaints([], ("triton",)) == ["nothing was measured, for want of time"]
    assert len(complaints([row | {"failure": "the process died"}], ("triton",))) == 1
    assert len(complaints([row | {"error_to_eager": 0.1}], ("triton",))) == 1


# The comparison on a CPU


def test_a_core_is_busy_meanwhile(monkeypatch, command, capsys):
    """The cases with a target for that are timed against it, and the other process ends with them."""
    from benchmarks import compare

    processes, popen = [], subprocess.Popen

    def medians(*_, **__):
        assert processes[0].poll() is None
        return {"eager": (14.0, 1), "compile": (8.0, 1), "ours": (2.0, 1)}

    monkeypatch.setattr(compare.subprocess, "Popen", lambda command: processes.append(popen(command)) or processes[0])
    monkeypatch.setattr(compare, "interleaved_medians", medians)
    monkeypatch.setattr(compare.Case, "contenders", lambda *_: {})
    command("compare", "--busy", "--threads", str(torch.get_num_threads()))
    assert processes[0].poll() is not None
    printed = capsys.readouterr().out.splitlines()
    assert "another process" in printed[1] and len(printed) == 5
    assert all("[4096, 0, 4096]" in line and "7.00 (>= 6.0)" in line for line in printed[3:])


# A training step


def test_phases_of_a_training_step(monkeypatch):
    """Each network's part of the backward counts as its own, and the operator's as the operator's."""
    from benchmarks import training_step
    from drift_ops import cpu
    from drifting.config.schema import Config
    from drifting.utils.stopwatch import Stopwatch

    phases, seen = training_step.PHASES, {"gradient": [], "extractor": [], "generator": []}
    entered: list[str] = []
    gradient, enter = cpu.gradient_at_once, Stopwatch.enter

    def recorded(*arguments):
        seen["gradient"].append(entered[-1])
        return gradient(*arguments)

    def recorded_enter(stopwatch, phase):
        entered.append(phase)
        enter(stopwatch, phase)

    def build(config, device):
        trainer = build_trainer(config, device)
        convolution = trainer.loss_fn.feature_extractor.encoder.stages[0][0].conv1
        convolution.register_full_backward_hook(lambda *_: seen["extractor"].append(entered[-1]))
        trainer.model.trunk.blocks[0].register_full_backward_hook(lambda *_: seen["generator"].append(entered[-1]))
        return trainer

    build_trainer = training_step.build_trainer
    monkeypatch.setattr(cpu, "gradient_at_once", recorded)
    monkeypatch.setattr(Stopwatch, "enter", recorded_enter)
    monkeypatch.setattr(training_step, "build_trainer", build)
    config = training_step.read_config("digits", (), Config)
    config.loss.feature_extractor, config.step.labels_per_step, config.step.gen_per_label = ["latent"], 2, 4
    for config.step.labels_at_once in (None, 1):
        entered.clear()
        result = training_step.profile(config, "cpu", seconds=0)
        assert result["steps"] == 1 and result["maps"] > 30 and set(entered) == {*phases, "data"}
        assert set(seen["gradient"]) == {"operator"} and set(seen["extractor"]) == {"encoder"}
        assert set(seen["generator"]) == {"generator"}
        assert 0 < result["operator_share"] < 1
        assert sum(result["milliseconds"].values()) == pytest.approx(result["step_milliseconds"])


def test_training_step_of_a_configuration(tmp_path, command, capsys):
    options = ["digits", "--seconds", "0", "--labels", "2", "--labels-at-once", "1", "--out", str(tmp_path)]
    assert command("training_step", *options) == 0
    (file,) = tmp_path.glob("*.training-step.json")
    result = json.loads(file.read_text())
    assert result["step"]["labels_per_step"] == 2 and result["step_milliseconds"] > 0 and result["maps"] == 1
    output = capsys.readouterr().out
    assert "| operator | " in output and "| generator | " in output


# Sampling


def test_sampling(monkeypatch, command, capsys, tmp_path):
    """All contenders draw, and one that errs is told instead of timed. Nothing is compiled here."""
    pytest.importorskip("onnxscript")
    from benchmarks import sampling

    monkeypatch.setattr(sampling, "BATCHES", (1, 3))
    monkeypatch.setattr(torch, "compile", lambda network: network)
    options = ["--only", "digits", "--seconds", "0", "--threads", str(torch.get_num_threads())]
    assert command("sampling", *options, "--json", str(tmp_path / "a.json")) is None
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["batch"] for row in rows] == [1, 3]
    assert all(set(row["images_per_second"]) == set(sampling.CONTENDERS) for row in rows)
    assert "| `digits` | 3 | " in (printed := capsys.readouterr().out) and "one digit by generate: " in printed
    monkeypatch.setattr(sampling, "exported", lambda generator: lambda drawn, labels, scale: torch.ones(1, 1, 8, 8))
    assert command("sampling", *options).startswith("onnxruntime in batches of 1 errs by ")


# Its report


def results():
    row = {"precision": "highest", "G": 8, "scaled_G": None, "floor_milliseconds": 1.0, "input_bytes": 90}
    row |= {"output_bytes": 10, "peak_extra_bytes": 15, "error_to_eager": None, "flops": 1, "runs": 3}
    rows = [
        row | {"case": "one", "contender": "eager", "milliseconds": 10.0, "scaled_G": 4},
        row | {"case": "one", "contender": "compile", "milliseconds": 8.0},
        row | {"case": "one", "contender": "triton", "milliseconds": 2.0},
        {"case": "one", "precision": "highest", "contender": "cuda", "failure": "out of memory"},
        {"case": "two", "precision": "high", "contender": "triton", "failure": "the process died"},
    ]
    return {"machine": MACHINE, "rows": rows, "skipped": [["three", "high", "triton", "cuda"]]}


def test_report(tmp_path):
    from benchmarks.report import BEGIN, END, gpu_section, plot, replace_section

    text = gpu_section({"some-gpu": results()})
    ours = "10.00 | 4.00 | 50% | 1.05"  # eager is of half of the problems
    assert f"| `one` | highest | 20 (G=4) | 8 | 2 | memory | {ours} |" in text
    assert "`two`, high, triton: the process died" in text and "for want of time: `three` at high" in text
    assert "Some GPU 80GB" in text and "0123456789ab" in text and "never" not in text
    assert "have never been run on a GPU" in gpu_section({})
    page = replace_section(f"before\n{BEGIN}\nold\n{END}\nafter\n", text)
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "old" not in page
    assert replace_section(page, text) == page
    plot(results(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_page_says_what_the_results_say(command):
    assert command("report", "--check") == 0


# make gpu-check


def test_small_calls(command):
    """What runs under compute-sanitizer."""
    assert command("small_calls", "cpu") == 0


def test_failing_stages(monkeypatch, tmp_path, capsys):
    """One that fails, one that takes too long and one that has a bug are told, and the others have their turn."""
    from benchmarks import gpu_check

    def command(*statements):
        return [sys.executable, "-c", "\n".join(("import os, subprocess, sys, time", *statements))]

    def hang(stage):
        stage.deadline = time.monotonic() + 2
        stage.run(*command("subprocess.run(['sleep', '600'])"))

    stages = {
        "build": lambda stage: None,
        "fine": lambda stage: stage.run(*command("print('well done')")),
        "failing": lambda stage: stage.run(*command("print('oh no', file=sys.stderr)", "sys.exit(3)")),
        "hanging": hang,
        "wrong": lambda stage: 1 / 0,
        "after": lambda stage: stage.run(*command("print(os.environ['X'])"), environment={"X": "still here"}),
    }
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    monkeypatch.setattr(gpu_check, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results")
    start = time.monotonic()
    assert gpu_check.run_stages(["build", *list(stages)[1:]]) == 1
    assert time.monotonic() - start < 500, "the sleeping process held it up"
    output = capsys.readouterr().out
    for text in ("well done", "oh no", "exit status 3", "not done after 2 s", "ZeroDivisionError", "still here"):
        assert text in output
    kept = (tmp_path / "logs" / "failing.log").read_text()
    assert "\noh no\n[failing] FAILED: " in kept and kept in output
    assert gpu_check.run_stages(["build", "fine"]) == 0
    monkeypatch.setattr(gpu_check, "OPTIONAL", ("failing",))
    assert gpu_check.run_stages(["build", "failing"]) == 0


def test_a_missing_tool_is_a_failure(monkeypatch, tmp_path):
    from benchmarks import gpu_check

    monkeypatch.setattr(gpu_check, "LOGS", tmp_path)
    stage = gpu_check.Stage("sanitize")
    assert stage.tool("sh") and stage.failures == []
    assert stage.tool("no-such-tool") is None and stage.failures == ["no-such-tool is not installed"]


def test_quick_stage(monkeypatch, tmp_path):
    """Its commands name modules, tests and keys that there are; together they have less than eight minutes."""
    from benchmarks import gpu_check
    from drifting.cli import parse_training_command
    from drifting.config import Config

    commands = {}

    def run(stage, *command, seconds=float("inf"), environment=None):
        commands[command[2]] = command
        if command[2] == "drifting.train":
            config, out, _ = parse_training_command(command[3:], "train", "", Config, "digits")
            assert config.train.steps == 100 and config.step.bf16 and config.step.compile
            out.mkdir()
            (out / "metrics.jsonl").write_text('{"step": 100, "timing": {"step": 0.01, "operator": 0.002}}\n')
        return True

    monkeypatch.setattr(gpu_check, "LOGS", tmp_path)
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_check.Stage, "run", run)
    monkeypatch.setattr(gpu_check.Stage, "device", "some-gpu")
    stage = gpu_check.Stage("quick")
    assert 0 < stage.seconds_left < 480
    gpu_check.quick(stage)
    assert list(commands) == ["pytest", "drifting.train", "benchmarks.gpu"]
    name, path = commands["pytest"][-2:]
    assert f"def {name}(" in (ROOT / path).read_text()
    assert "100 steps; the last ones took, in ms: step 10.0" in (tmp_path / "some-gpu.quick.txt").read_text()


def test_usable_backends_are_no_failure(monkeypatch):
    from benchmarks.gpu_check import _SHOW_BACKENDS

    monkeypatch.setattr(sys, "argv", ["-c", "cpu"])
    with pytest.raises(SystemExit) as end:
        exec(_SHOW_BACKENDS, {})
    assert end.value.code == 0
