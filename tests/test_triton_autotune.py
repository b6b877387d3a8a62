"""How the Triton kernels are launched, without a GPU: what is compiled, and by autotuning tried, chosen and kept.

Each run is a process of its own in which nothing is compiled, launched or timed: stand-ins say what would be.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

FIXED = {"BLOCK_D": 32, "num_warps": 4, "num_stages": 3}  # of the scale kernel of form C on an H100
FASTEST = {"BLOCK_D": 64, "num_warps": 4, "num_stages": 3}  # says the stand-in for a timer


def observe() -> dict[str, list[tuple[str, dict[str, int]]]]:
    """What happens, launch by launch, to the scale kernel: compiled, timed, or launched for good."""
    import triton
    from test_triton_compile import TARGETS, Driver
    from triton.runtime.jit import JITFunction

    from drift_ops import triton as triton_backend
    from drift_ops.spec import LossMap, LossSpec
    from drift_ops.triton import launch

    events: list[tuple[str, dict[str, int]]] = []
    timed: list[dict[str, int]] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        assert warmup and not args
        used = {name: options[name] for name in FIXED}
        if used["BLOCK_D"] == 16:
            raise RuntimeError("the compiler fails on this one")
        events.append(("compiled", used))
        shared, ptx = 70_000 * used["num_stages"], "trap;" if used["num_warps"] == 8 else ""
        return SimpleNamespace(metadata=SimpleNamespace(shared=shared), asm={"ptx": ptx}, used=used)

    launch.execute = lambda compiled, grid, arguments: events.append(("launched", compiled.used))

    def benchmark(call: Any, quantiles: Any) -> list[float]:
        call()
        _, used = events.pop()
        events.append(("timed", used))
        timed.append(used)
        return [1.0 if used == FASTEST else 2.0] * 3

    driver = Driver(TARGETS["sm_90"][0])
    driver.get_benchmarker = lambda: benchmark  # type: ignore[attr-defined]
    triton.runtime.driver.set_active(driver)
    limits = launch.Limits(amd=False, shared_bytes=TARGETS["sm_90"][1])
    launch.limits = lambda device: limits  # type: ignore[assignment]
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_name = lambda device=None: "a GPU"
    JITFunction.run = run

    def call(D: int, dtype: torch.dtype = torch.float32, capturing: bool = False) -> list[tuple[str, dict[str, int]]]:
        torch.cuda.is_current_stream_capturing = lambda: capturing
        events.clear()
        weights = tuple(torch.empty(4, 1, count, device="meta") for count in (64, 16, 64))
        points = tuple(w.new_empty(*w.shape, D, dtype=dtype) for w in weights)
        triton_backend.loss_scale(LossSpec((0.1,), 0.0), [LossMap(points, weights)])
        return list(events)

    def views(offsets: range, D: int) -> list[tuple[str, dict[str, int]]]:
        """Maps of a flat buffer: points and weights each where the last ones end, L and T unlike every time."""
        events.clear()
        for offset in offsets:
            tensors, end, L, T = [], offset, 1 + offset % 3, 1 + offset % 4
            for shape in [(L, T, n, D) for n in (16, 8, 12)] + [(L, T, n) for n in (16, 8, 12)]:
                tensors.append(torch.zeros(20_000)[end : end + math.prod(shape)].view(shape))
                end += math.prod(shape)
            given = LossMap(tuple(tensors[:3]), tuple(tensors[3:]))
            triton_backend.loss_scale(LossSpec((0.1,), 0.0), [given])
        return list(events)

    if not os.environ.get("DRIFT_OPS_AUTOTUNE"):
        found = {"fixed": call(256), "D = 20": views(range(12), 20), "D = 32": views(range(12), 32)}
        limits = launch.Limits(amd=False, shared_bytes=205_000)
        return found | {"too large": call(512)}
    return {
        "captured first": call(256, capturing=True),
        "first": call(256),
        "second": call(256),
        "captured": call(256, capturing=True),
        "as large": call(240),
        "larger": call(1024),
        "bfloat16": call(256, torch.bfloat16),
    }


def observed(cache: Path, setting: str | None) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "DRIFT_OPS_AUTOTUNE"}
    environment |= {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {} if setting is None else {"DRIFT_OPS_AUTOTUNE": setting}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return {name: [tuple(event) for event in events] for name, events in json.loads(done.stdout).items()}


def used_for(what: str, events: list[tuple[str, dict[str, int]]]) -> list[dict[str, int]]:
    return [used for event, used in events if event == what]


def test_fixed_configuration_unless_asked(tmp_path):
    """In two variants at most, whatever the alignments and strides of its arguments."""
    found = observed(tmp_path, None)
    assert found["fixed"] == [("compiled", FIXED), ("launched", FIXED)]
    for name, variants in {"D = 20": 1, "D = 32": 2}.items():
        assert len(used_for("launched", found[name])) == 12
        assert len(used_for("compiled", found[name])) == variants, name


def test_smaller_configuration_where_memory_does_not_suffice(tmp_path):
    smaller = FIXED | {"num_stages": 1}
    events = [("compiled", FIXED), ("compiled", smaller), ("launched", smaller)]
    assert observed(tmp_path, None)["too large"] == events


@pytest.mark.parametrize("setting", [None, "", "0", "1", "yes"])
def test_settings(monkeypatch, setting):
    from drift_ops.triton.autotune import wanted

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("DRIFT_OPS_AUTOTUNE", raising=False)
    if setting is not None:
        monkeypatch.setenv("DRIFT_OPS_AUTOTUNE", setting)
    if setting == "yes":
        with pytest.raises(ValueError, match="DRIFT_OPS_AUTOTUNE: got 'yes', expected 0 or 1"):
            wanted.__wrapped__()
    else:
        assert wanted.__wrapped__() == (setting == "1")


def test_chooses_the_fastest_that_runs_and_keeps_it(tmp_path):
    found = observed(tmp_path, "1")
    assert not used_for("timed", found["captured first"]), "nothing can be timed while a graph is captured"
    for name in ("first", "larger", "bfloat16"):  # of each kind or size of arguments
        # Left out: BLOCK_D=16, on which the compiler fails, four stages, for which shared memory does not suffice, and
        # eight warps, which would be a trap.
        assert used_for("timed", found[name]) == [FIXED, FASTEST, FIXED | {"num_stages": 2}], name
        assert found[name][-1] == ("launched", FASTEST), name
    for name in ("second", "captured", "as large"):
        assert found[name] == [("launched", FASTEST)], name

    later = observed(tmp_path, "1")
    assert later["captured first"][-1] == ("launched", FIXED)
    for name in ("first", "larger", "bfloat16", "second", "captured"):
        assert not used_for("timed", later[name]), f"{name}: not read from the disk"
        assert later[name][-1] == ("launched", FASTEST), name


def test_neighbours():
    from drift_ops.triton.autotune import neighbours
    from drift_ops.triton.launch import Limits

    h100, b200 = Limits(amd=False, shared_bytes=232448), Limits(amd=False, shared_bytes=232448, tensor_memory=True)
    fixed = {"BLOCK_Q": 64, "BLOCK_K": 256, "BLOCK_D": 16, "num_warps": 8, "num_stages": 1}
    inner = [fixed, fixed | {"BLOCK_D": 32}, fixed | {"num_warps": 4}, fixed | {"num_stages": 2}]
    tiles = [fixed | {"BLOCK_Q": 32}, fixed | {"BLOCK_Q": 128}, fixed | {"BLOCK_K": 128}]
    assert neighbours(fixed, (4,), h100) == inner
    assert neighbours(fixed, lambda blocks: (blocks["BLOCK_Q"],), h100) == [fixed, *tiles, *inner[1:]]
    assert neighbours(fixed, lambda blocks: (blocks["BLOCK_Q"],), b200) == inner


if __name__ == "__main__":
    print(json.dumps(observe()))
