"""Write a generator as one graph that other programs run, of ONNX or of torch.export, once a run of it agrees."""

import copy
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MOST_SHOWN, UserError, cause_of, explained, reason, require, shown
from ..generation import Generator, Signature
from ..utils.files import atomic_write
from ..utils.memory import format_bytes

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
OPSET = 18  # Of the operators of ONNX, browsers and phones have had these for years.
BATCHES = (1, 2, 5)  # Batches of these sizes are compared; that which is traced has another.
MOST_BYTES = 2**31  # A file of ONNX, which is one protocol buffer, holds fewer.
TOLERANCE, MOST_ERROR = 1e-5, 0.1  # Relative, in float32; in bfloat16 twice what PyTorch itself errs by is added.
TIMED = 20  # The time of one sample is the median of so many.

Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Exported:
    """What stands in a file beside its graph, and what running it showed: relative errors and seconds a sample."""

    facts: dict[str, Any]
    error: float  # The file's samples differ so much from PyTorch's in float32 …
    torch_error: float  # … and PyTorch's in the file's dtype so much.
    seconds: float


class Graph(nn.Module):
    """A generator as a function of tensors ``[B, …]``, which are called ``names``.

    These are ``noise``; ``labels`` or ``conditions``, and ``cfg_scale``, if the network takes them, one for each
    sample; and by their own names what else it draws. Samples ``[B, *sample_shape]`` are float32, those of pixels in
    [-1, 1], whatever the generator has for black and white; others are as the generator makes them.
    """

    def __init__(self, generator: Generator, dtype: torch.dtype) -> None:
        super().__init__()
        self.signature = Signature.of(generator.model, generator.noise_shape)
        self.network = copy.deepcopy(generator.model).to("cpu", dtype).eval()
        self.condition_shape, self.num_classes = generator.condition_shape, len(generator.class_names)
        self.pixel_range = None if generator.latent else generator.pixel_range
        self.output = "latents" if generator.latent else "images" if generator.makes_images else "samples"
        conditions = ["labels" if self.condition_shape is None else "conditions", "cfg_scale"]
        _, *extra = self.signature.draw(self.network, 1, None, "cpu")
        self.names = ["noise", *conditions[: self.signature.conditions], *extra]

    def forward(self, *inputs: Tensor) -> Tensor:
        (noise, *rest), taken = inputs, self.signature.conditions
        y, scale = [*rest[:taken], noise, noise][:2]  # What the network does not take may be anything.
        drawn = {"z": noise} | dict(zip(self.names[1 + taken :], rest[taken:], strict=True))
        samples = self.signature.call(self.network, drawn, y, scale).float()
        if self.pixel_range is None:
            return samples
        low, high = self.pixel_range
        return samples.clamp(low, high) * (2 / (high - low)) - (high + low) / (high - low)

    def draw(self, num: int, seed: int) -> tuple[Tensor, ...]:
        """Random inputs for ``num`` samples, all of which differ with the seed."""
        source = torch.Generator().manual_seed(seed)
        z, *extra = self.signature.draw(self.network, num, source, "cpu").values()
        if self.condition_shape is None:
            y = torch.randint(self.num_classes, (num,), generator=source)
        else:
            y = torch.randn(num, *self.condition_shape, generator=source)
        return z, *(y, 1 + torch.rand(num, generator=source))[: self.signature.conditions], *extra


def export(generator: Generator, path: Path, kind: str, dtype: torch.dtype, more: dict[str, Any]) -> Exported:
    """Write ``path``, of a ``kind`` in :data:`SUFFIXES`, with facts about it and ``more`` of them as JSON inside.

    It raises UserError, and leaves ``path`` as it was, where the network cannot be exported, or the file cannot be run,
    or makes other samples than the network.
    """
    for library in ("onnx", "onnxscript", "onnxruntime") if kind == "onnx" else ():
        require(library, "--format onnx", "export")
    truth, name = Graph(generator, torch.float32), type(generator.model).__name__
    graph = truth if dtype == torch.float32 else Graph(generator, dtype)
    size = sum(weight.nbytes for weight in graph.state_dict().values())
    if kind == "onnx" and size >= MOST_BYTES:
        raise UserError(f"{name} has {format_bytes(size)} of weights, a file of ONNX holds 2GB: try --format torch")
    facts = _facts(generator, graph) | more
    write, load = (_write_onnx, _load_onnx) if kind == "onnx" else (_write_torch, _load_torch)
    batch = tuple({0: torch.export.Dim("batch")} for _ in graph.names)
    with atomic_write(path) as part, _quietly(), torch.no_grad():
        part.touch()  # What cannot be written to is told before the work.
        with _caused(f"{name} cannot be exported for any batch size"):
            program = torch.export.export(graph, graph.draw(3, 0), dynamic_shapes={"inputs": batch}, strict=False)
        with _caused(f"{name} cannot be written as --format {kind}"):
            write(program, graph, part, json.dumps(facts))
        with explained(f"what was exported of {name} is not to be used"):
            return Exported(facts, *_compare(load(part), graph, truth))


def _facts(generator: Generator, graph: Graph) -> dict[str, Any]:
    inputs = {name: list(tensor.shape[1:]) for name, tensor in zip(graph.names, graph.draw(1, 0), strict=True)}
    facts = ("sample_shape", "pixel_range", "class_names", "cfg_scale", "name", "data", "step")
    vocab = {"style_vocab": getattr(generator.model, "style_vocab", None)} if "style" in inputs else {}
    return {"inputs": inputs, "output": graph.output} | {key: getattr(generator, key) for key in facts} | vocab


def _write_onnx(program: Any, graph: Graph, path: Path, facts: str) -> None:
    names: dict[str, Any] = {"input_names": graph.names, "output_names": [graph.output]}
    names["dynamic_shapes"] = tuple({0: "batch"} for _ in graph.names)
    written: Any = torch.onnx.export(program, (), dynamo=True, opset_version=OPSET, verbose=False, **names)
    written.model.metadata_props["drifting"] = facts
    written.save(path, external_data=False)


def _load_onnx(path: Path) -> Run:
    runtime = require("onnxruntime", "--format onnx", "export")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return run


def _write_torch(program: Any, graph: Graph, path: Path, facts: str) -> None:
    with open(path, "wb") as file:
        torch.export.save(program, file, extra_files={"drifting.json": facts})


def _load_torch(path: Path) -> Run:
    with open(path, "rb") as file:
        return torch.export.load(file).module()


def _compare(run: Run, graph: Graph, truth: Graph) -> tuple[float, float, float]:
    """The errors and the time of :class:`Exported`, with other noise and labels than were traced."""
    errors, inputs, times = [], graph.draw(1, 0), []
    for size in BATCHES:
        given = graph.draw(size, seed=size)
        expected = truth(*given)
        differences = torch.stack([of(*given) - expected for of in (run, graph)]).flatten(1).norm(dim=1)
        errors.append(differences / expected.norm().clamp(min=1e-12))
    error, torch_error = torch.stack(errors).amax(0).tolist()  # NaN stays NaN.
    torch_error = 0.0 if graph is truth else torch_error  # Nor may it differ from itself, by what it draws in forward.
    allowed = min(TOLERANCE + 2 * torch_error, MOST_ERROR)
    if not error <= allowed:
        differs = f"its samples differ from PyTorch's by {error:.1e}, expected at most {allowed:.1e}"
        if not torch.equal(truth(*given), expected):
            differs += "; PyTorch's differ from call to call: what is random must come from the network's draw_extra"
        raise UserError(differs)
    for _ in range(TIMED):
        start = time.perf_counter()
        run(*inputs)
        times.append(time.perf_counter() - start)
    return error, torch_error, median(times)


@contextmanager
def _caused(what: str) -> Iterator[None]:
    """Raise an exporter's error as a UserError that begins with ``what`` and ends with its cause, which is wrapped in
    reports for the exporter's makers."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        hint = " (in its forward, z.shape[0] must be for len(z))" if "specialized" in str(error) else ""
        raise UserError(f"{what}{hint}: {shown(reason(cause_of(error)), MOST_SHOWN)}") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Exporters tell of their own code's deprecations, which users can do nothing about."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
