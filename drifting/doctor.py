"""``python -m drifting.doctor`` lists versions, devices and backends, and checks each usable backend. It compares
outputs and gradients of the operator's forms, on small problems, with the dense reference in float64."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import drift_ops
from drift_ops import cpu

from .cli import ArgumentParser, run_command

SECONDS = 10.0  # The check of a backend begins nothing new after half of them.
TOLERANCE = 1e-3  # A kernel that computes anything else is off by far more, as relative RMS error in float32.
PACKAGES = (
    "drifting", "torch", "triton", "numpy", "pyyaml", "safetensors", "msgpack", "pillow", "scikit-learn", "matplotlib",
    "tensorboard", "torchvision", "huggingface_hub", "diffusers", "torch-fidelity", "transformers", "datasets", "wandb",
)  # fmt: skip

X, POS, NEG = (4, 24, 12), (4, 20, 12), (4, 9, 12)
LARGE = "drift_field of 600 points"  # The kernels that stream serve it, and Triton's interpreter takes minutes.
FORMS: dict[str, Any] = {  # These are function, shapes of tensors and options.
    "compute_V": (drift_ops.compute_V, {"x": (24, 12), "x_data": (20, 12), "x_gen": (9, 12)}, {"sigma": 3.0}),
    "drift_field": (drift_ops.drift_field, {"x": X, "pos": POS, "neg": NEG}, {"temperature": (0.5, 2.0)}),
    "drift_loss": (drift_ops.drift_loss, {"gen": X, "fixed_pos": POS, "fixed_neg": NEG}, {"affinity_floor": 0.0}),
    LARGE: (drift_ops.drift_field, {"x": (600, 40), "pos": (500, 40)}, {"temperature": 2.0}),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    ArgumentParser("python -m drifting.doctor", description="What this machine has, and if it works.").parse_args(argv)
    verdicts = []
    for name, value in _facts():
        print(f"  {name:<18}{value}" if value else name)
    for name, status in drift_ops.backends().items():
        verdicts.append(_check(name) if status.usable else f"not usable: {status.reason}")
        print(f"  {name:<18}{verdicts[-1]}")
    failed = any(verdict.startswith("usable, FAILED") for verdict in verdicts)
    print("FAILED: a usable backend is wrong" if failed else "all checks passed")
    return int(failed)


def _facts() -> Iterator[tuple[str, str]]:  # Headings have no value.
    yield "versions", ""
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
    yield "devices", ""
    kernels = "no instruction set: they are not built" if cpu.load_error or cpu._cpu is None else cpu._cpu.chosen()
    yield "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, kernels for {kernels}"
    yield "cuda", f"of torch: {torch.version.cuda or torch.version.hip or 'none, this torch is for CPUs'}"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{device.name}, {device.major}.{device.minor}, {device.total_memory / 2**30:.0f} GiB"
    yield "backends", ""


def _check(name: str) -> str:
    """Say whether a usable backend agrees with the reference, and for which forms there was no time."""
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    started, problems, unchecked = time.perf_counter(), [], []
    for label in FORMS:
        if time.perf_counter() - started > SECONDS / 2 or (interpreted and label == LARGE):
            unchecked.append(label)
            continue
        try:
            expected = _run(label, "reference", "cpu", torch.float64)
            on_gpu = name in ("triton", "cuda") or (name == "reference" and torch.cuda.is_available())
            got = _run(label, name, "cuda" if on_gpu and not interpreted else "cpu", torch.float32)
            for what, value in got.items():
                off = float((value.cpu().double() - expected[what]).norm() / expected[what].norm())
                problems += [] if off <= TOLERANCE else [f"{label}: {what} is off by {off:.1e}"]
        except Exception as error:  # Drivers and compilers raise errors of any class.
            problems.append(f"{label}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    verdict = f"FAILED: {'; '.join(problems)}" if problems else "agrees with the reference"
    verdict += f", no time for {', '.join(unchecked)}: run it again" if unchecked else ""
    return f"usable, {verdict} ({time.perf_counter() - started:.1f} s)"


def _run(label: str, backend: str, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    function, shapes, options = FORMS[label]
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    leaves = {name: value.to(device, dtype).requires_grad_() for name, value in values.items()}
    result = function(**leaves, **options, backend=backend)
    output = result[0] if isinstance(result, tuple) else result
    incoming = torch.randn(output.shape, generator=generator).to(device, dtype)
    gradients = torch.autograd.grad(output, list(leaves.values()), incoming, allow_unused=True)
    named = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return {"output": output.detach()} | named


if __name__ == "__main__":
    run_command(main)
