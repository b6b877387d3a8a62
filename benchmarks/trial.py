"""One trial: some contenders on one case, timed in turns. A process of its own runs trials (:func:`serve`), because a
kernel that fails can spoil its whole process, and one that hangs can only be killed."""

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from .cases import DENSE, Case
from .machine import describe_machine, memory_bytes
from .measure import event_seconds, interleaved_medians, peak_extra_memory, wall_seconds
from .roofline import Ceilings, floor_seconds, matmul_precision, measure_ceilings

DENSE_SHARE = 0.4  # of the memory that inputs and outputs leave: how much a dense contender may take
RECOMPILE_LIMIT = 64  # of torch.compile: the maps of a step have some 17 shapes
MIN_RUNS, MAX_RUNS = 3, 100

Row = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """``contenders`` on ``case`` under ``torch.set_float32_matmul_precision(precision)``."""

    case: Case
    precision: str
    contenders: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """``device``; seconds of timing for each trial; the file that takes what compilers print."""

    device: str
    seconds: float
    log: str


def serve(connection: Connection, settings: Settings, ceilings: Ceilings | None) -> None:
    """Describes the machine, with its ceilings (measured unless given), then runs the trials that it receives.

    Sends ``("machine", description)`` first. For each trial ``("started", contender)`` before each warm-up,
    ``("failed", contender, reason)`` where it fails, ``("timing",)`` once all are warm, ``("rows", rows, goes_on)`` at
    the end: unless it ``goes_on``, or once it receives None, this process ends.
    """
    log = os.open(settings.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT  # type: ignore[attr-defined]
    machine = describe_machine(settings.device)
    if ceilings is None:
        sizes = {"megabytes": 1, "size": 64} if settings.device == "cpu" else {}
        ceilings = measure_ceilings(settings.device, **sizes)
        free_memory(settings.device)
    connection.send(("machine", machine | {"ceilings": ceilings}))
    goes_on = True
    while goes_on:
        trial = connection.recv()
        if trial is None:
            return
        torch.manual_seed(0)
        with matmul_precision(trial.precision):
            rows = run_trial(trial, ceilings, settings, connection.send)
        torch._dynamo.reset()
        free_memory(settings.device)
        goes_on = settings.device == "cpu" or torch.cuda.memory_reserved() < 0.1 * memory_bytes(settings.device)
        connection.send(("rows", rows, goes_on))


def run_trial(trial: Trial, ceilings: Ceilings, settings: Settings, report: Callable[[tuple], None]) -> list[Row]:
    """A row for each contender that did not fail."""
    case, device = trial.case, settings.device
    maps = case.inputs(device)
    dense_G = affordable_G(case, memory_bytes(device))
    calls, rows = {}, {}
    expected: Sequence[Tensor] | None = None  # of the dense form, on its part of the problems
    for name in trial.contenders:
        report(("started", name))
        failure = None
        try:
            G = dense_G if name in DENSE else case.G
            if name == "max-autotune":  # a CUDA graph keeps its inputs and all it computes
                G = affordable_G(case, memory_bytes(device) // 2)
            call = case.call(name, case.part(maps, G))
            outputs = call()  # compiles
            check_finite(outputs)
            if name == "eager":
                expected = outputs
            elif expected is not None and G != dense_G:
                outputs = case.call(name, case.part(maps, dense_G))()
            error = None if expected is None else relative_error(outputs, expected)
            del outputs
            rows[name] = describe_row(trial, name, G, ceilings) | {"error_to_eager": error}
            # A CUDA graph's memory is not allocated in the call.
            peak = peak_extra_memory(call, device)
            rows[name]["peak_extra_bytes"] = None if name == "max-autotune" else peak
            calls[name] = call
        except Exception as problem:
            failure = describe_failure(problem)
        if failure:
            report(("failed", name, failure))
            free_memory(device)  # raises where the failure spoilt the process
    del expected
    report(("timing",))
    seconds_of = wall_seconds if device == "cpu" else event_seconds(device)
    medians = interleaved_medians(calls, settings.seconds, seconds_of, MIN_RUNS, MAX_RUNS)
    return [rows[name] | {"milliseconds": 1e3 * seconds, "runs": runs} for name, (seconds, runs) in medians.items()]


def affordable_G(case: Case, memory: int) -> int:
    """How many of the problems (labels of a step) the dense form has memory for: all, or half of them, or a quarter…"""
    G = case.G
    while G > 1 and replace(case, G=G).dense_bytes > DENSE_SHARE * (memory - case.bytes):
        G //= 2
    return G


def describe_row(trial: Trial, contender: str, G: int, ceilings: Ceilings) -> Row:
    timed = replace(trial.case, G=G)
    return {
        "case": trial.case.name,
        "precision": trial.precision,
        "contender": contender,
        "G": trial.case.G,
        "scaled_G": G if trial.case.G != G else None,
        "floor_milliseconds": 1e3 * floor_seconds(timed, ceilings, trial.precision),
        "flops": timed.flops,
        "input_bytes": timed.input_bytes,
        "output_bytes": timed.output_bytes,
    }


def describe_failure(problem: Exception) -> str:
    if isinstance(problem, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"


def check_finite(outputs: Sequence[Tensor]) -> None:
    if not torch.stack([t.isfinite().all() for t in outputs]).all():
        raise FloatingPointError("an output is not finite")


def relative_error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """``‖outputs − expected‖ / ‖expected‖`` over all of them."""
    errors = torch.stack([(a - b).norm() for a, b in zip(outputs, expected, strict=True)])
    return (errors.norm() / torch.stack([b.norm() for b in expected]).norm()).item()


def free_memory(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
