"""The CUDA kernels on a machine without a GPU: against the float64 reference, behind drift_ops/cuda.py.

csrc/cuda is compiled by a C++ compiler against tests/cuda_emulation, which runs every thread of a block as a fiber.
"""

import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import cases
import pybind11
import pytest
import torch
from cases import (
    check,
    compute_V_inputs,
    field_inputs,
    load_library,
    loss_inputs,
    points,
    relative_error,
    run,
    transposed,
    unaligned,
)
from pair_cases import CASES, Case, check_pairs
from torch.utils._python_dispatch import TorchDispatchMode

import drift_ops
from drift_ops import Field, cuda
from drift_ops.spec import AffinitySpec, LossMap, LossSpec, PairSpec

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("g++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """drift_ops._cuda for the CPU."""
    folder = tmp_path_factory.mktemp("emulated")
    includes = [ROOT / "tests/cuda_emulation", pybind11.get_include(), sysconfig.get_paths()["include"]]
    # fibers jump between stacks, which glibc's fortified longjmp takes for an error
    flags = ["-std=c++17", "-O1", "-fPIC", "-U_FORTIFY_SOURCE", *(f"-I{path}" for path in includes), "-x", "c++"]

    def compile_source(source: Path) -> str:
        target = str(folder / f"{source.name}.o")
        subprocess.run([COMPILER, *flags, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_source, [*ROOT.glob("csrc/cuda/*.cu"), ROOT / "csrc/cuda/module.cpp"]))
    library = folder / "_cuda.so"
    subprocess.run([COMPILER, "-shared", *objects, "-o", library], check=True)
    return load_library(library)


@pytest.fixture(autouse=True)
def cuda_backend(emulated, monkeypatch):
    """``backend="cuda"`` means the emulated kernels, on CPU tensors."""
    backends = import_module("drift_ops.backends")
    monkeypatch.setattr(cuda, "_cuda", emulated)
    monkeypatch.setattr(backends, "_why_not_for", lambda *_: None)
    monkeypatch.setitem(backends._WHY_NOT, "cuda", lambda: None)
    monkeypatch.setattr(cases, "device_of", lambda _: "cpu")


every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
FIELDS = {  # N, P, M, D, groups; on a device with many multiprocessors small problems are cut into parts
    "one of each": ((1, 1, 1, 1, ()), 1),
    "plane": ((150, 70, 140, 2, ()), 1),
    "plane in parts": ((150, 70, 140, 2, ()), 40),
    "groups": ((6, 5, 7, 19, (2, 3)), 1),
    "ragged": ((67, 35, 131, 37, (2,)), 1),
    "ragged in parts": ((67, 131, 35, 37, ()), 40),
}


@pytest.fixture(params=FIELDS.values(), ids=FIELDS)
def shape(request, monkeypatch):
    monkeypatch.setenv("DRIFT_EMULATED_MULTIPROCESSORS", str(request.param[1]))
    return request.param[0]


@every_dtype
def test_compute_V(shape, dtype):
    D = shape[3]
    options = {"sigmas": [0.3 * D**0.5, 2.0 * D**0.5], "temperature": 0.3, "normalize_drift": D > 1}
    check(drift_ops.compute_V_multiscale, compute_V_inputs(*shape), options, dtype, "cuda", unaligned)


@every_dtype
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", ""])
def test_drift_field(shape, dtype, weighted):
    options = {
        "temperature": [0.1 * shape[3] ** 0.5, shape[3] ** 0.5],
        "affinity_floor": 1e-6 if weighted else 0.0,
        "include_self": weighted,
    }
    check(drift_ops.drift_field, field_inputs(*shape, weighted=weighted), options, dtype, "cuda", unaligned)


@every_dtype
@pytest.mark.parametrize(
    ("N", "P", "M", "D", "G", "R_list"),
    [
        (1, 1, 0, 1, 2, (0.2,)),
        (6, 5, 7, 10, 3, (0.02, 0.05, 0.2)),
        (33, 64, 16, 70, 1, (0.02, 0.05, 0.2)),
        (64, 90, 30, 140, 1, (0.05, 0.2)),  # more targets than a tile of distances has columns
        (9, 6, 5, 50, 2, (0.05, 0.2)),  # distances are kept from the first phase to the second; below, to the third
        (17, 20, 9, 1500, 1, (0.02, 0.05, 0.2)),  # sums so long that what tensor cores cut off of each step would show
        (6, 5, 7, 20, 2, (0.02, 0.05, 0.1, 0.2)),
        (6, 5, 7, 20, 2, (0.02, 0.05, 0.1, 0.2, 0.4)),  # too many R for the group kernels
        (70, 35, 16, 36, 1, (0.05, 0.2)),  # too many samples for them
    ],
)
def test_drift_loss(N, P, M, D, G, R_list, dtype):
    for weighted, floor in ((True, 1e-6), (False, 0.0)):
        options = {"R_list": R_list, "affinity_floor": floor}
        check(drift_ops.drift_loss, loss_inputs(N, P, M, D, G, weighted), options, dtype, "cuda", unaligned)


@pytest.mark.parametrize(("D", "R_list"), [(700, (0.02, 0.05, 0.2)), (1501, (0.02, 0.05, 0.1, 0.2))])
def test_groups_shared_by_blocks(monkeypatch, D, R_list):
    """Few groups of many dimensions: where distances are kept, several blocks have a part of the dimensions each."""
    monkeypatch.setenv("DRIFT_EMULATED_MULTIPROCESSORS", "11")
    inputs = loss_inputs(17, 20, 9, D, 2, True)
    inputs["fixed_pos"][1, 3] = inputs["gen"][1, 5] + 1e-3  # too close for products, in all parts
    check(drift_ops.drift_loss, inputs, {"R_list": R_list}, torch.float32, "cuda")


def test_large_loss_in_parts(monkeypatch):
    monkeypatch.setenv("DRIFT_EMULATED_MULTIPROCESSORS", "40")
    check(drift_ops.drift_loss, loss_inputs(150, 90, 50, 5, 1, True), {}, torch.float32, "cuda")


@every_dtype
def test_little_shared_memory(monkeypatch, dtype):
    """99 KB a block, as on compute capabilities 8.6, 8.9 and 12.0: narrower tiles, or groups that are streamed."""
    monkeypatch.setenv("DRIFT_EMULATED_SHARED_BYTES", "101376")
    shape = (67, 40, 70, 19, ())
    check(drift_ops.compute_V, compute_V_inputs(*shape), {"sigma": 3.0}, dtype, "cuda")
    check(drift_ops.drift_field, field_inputs(*shape, weighted=True), {"temperature": [1.0, 4.0]}, dtype, "cuda")
    for R_list in ((0.05, 0.2), (0.02, 0.05, 0.2)):  # the last is streamed, as on no device with more
        check(drift_ops.drift_loss, loss_inputs(40, 64, 16, 30, 1, True), {"R_list": R_list}, dtype, "cuda")


@every_dtype
@pytest.mark.parametrize("name", CASES)
def test_pairs(monkeypatch, name, dtype):
    monkeypatch.setenv("DRIFT_EMULATED_MULTIPROCESSORS", "40" if name == "masked" else "1")
    if name == "least distance":  # narrower tiles
        monkeypatch.setenv("DRIFT_EMULATED_SHARED_BYTES", "101376")
    check_pairs(cuda, CASES[name], dtype, transposed if name == "squares" else unaligned)


@every_dtype
@pytest.mark.parametrize("counts", [(150, 0), (70, 131)], ids=str)
def test_pairs_of_several_tiles(monkeypatch, counts, dtype):
    monkeypatch.setenv("DRIFT_EMULATED_MULTIPROCESSORS", "1" if counts[1] else "40")
    keys = (counts[0], *([counts[1]] if counts[1] else []))
    spec = PairSpec("l2_sq", True, 2.0, len(keys), 1e-6)
    check_pairs(cuda, Case(spec, 1, counts[0], keys, 19, (8.0, 20.0), True, True), dtype, unaligned)


@every_dtype
@pytest.mark.parametrize("coupling", ["row", "two_sided", "sinkhorn"])
def test_family(coupling, dtype):
    field = Field("l2_sq", coupling, "split" if coupling == "row" else "joint", 2, "kernel", mask_self=0.5)
    tensors = field_inputs(5, 6, 4, 3, weighted=True) | {"temperature": torch.tensor([2.0, 5.0], dtype=torch.float64)}
    tensors |= {name: tensors[name] + 0.1 for name in ("weight_pos", "weight_neg")}
    check(drift_ops.drift_field, tensors, {"field": field}, dtype, "cuda")


def clusters(count: int, D: int, seed: int) -> torch.Tensor:
    """Points in four tight clusters: most distances are far below the norms."""
    return 5 * points(4, D, seed=9)[torch.arange(count) % 4] + 1e-3 * points(count, D, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_close_points(dtype):
    tensors = {name: clusters(n, 35, n) for name, n in (("x", 40), ("pos", 50), ("neg", 30))}
    check(drift_ops.drift_field, tensors, {"temperature": [0.01, 10.0]}, dtype, "cuda")
    names = ("gen", "fixed_pos", "fixed_neg")
    tensors = {name: t.unsqueeze(0) for name, t in zip(names, tensors.values(), strict=True)}
    # forces are weighted sums of points thousands of times farther apart than the forces are long
    check(drift_ops.drift_loss, tensors, {"affinity_floor": 0.0}, dtype, "cuda", rtol=1e-3)


def test_nothing_unmasked():
    result = run(drift_ops.drift_field, field_inputs(1, 3, 0, 20), {"temperature": 1.0}, "cuda")
    assert all((t == 0).all() for name, t in result.items() if name != "gradient of neg")


def test_tf32_where_allowed():
    """Products are as exact as float32's, and far less so where the user allows it."""
    tensors = {name: t.float() for name, t in field_inputs(30, 30, 30, 40).items()}
    options = {"temperature": 1.0, "affinity_floor": 0.0}
    truth = run(drift_ops.drift_field, {n: t.double() for n, t in tensors.items()}, options, "reference")["output"]
    errors = {}
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        try:
            errors[precision] = relative_error(run(drift_ops.drift_field, tensors, options, "cuda")["output"], truth)
        finally:
            torch.set_float32_matmul_precision("highest")
    assert errors["highest"] < 1e-5 < 1e-4 < errors["high"] < 3e-2


def test_more_widths_than_a_call_takes(emulated, monkeypatch):
    monkeypatch.setattr(emulated, "MAX_WIDTHS", 2)
    options = {"temperature": [0.5, 1.0, 2.0]}
    check(drift_ops.drift_field, field_inputs(3, 2, 2, 3, weighted=True), options, torch.float32, "cuda")


def test_unknown_logit():
    spec = AffinitySpec("laplace", (1.0,))
    object.__setattr__(spec, "logit", "student")
    with pytest.raises(ValueError, match="logit: got 'student'"):
        cuda.affinity_sums(spec, points(1, 2, 3), [points(1, 2, 3)], None, None)


def in_feature_map(t: torch.Tensor) -> torch.Tensor:
    """``[labels, locations, count, …]`` as a slice of the samples of a map ``[labels, samples, locations, …]``."""
    labels, locations, count = t.shape[:3]
    samples = t.new_full((labels, count + 3, locations, *t.shape[3:]), float("nan"))
    return samples[:, 1 : 1 + count].transpose(1, 2).copy_(t)


class Operations(TorchDispatchMode):
    """The operations that PyTorch executes, and the sizes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.seen.append((operation.overloadpacket.__name__, getattr(result, "numel", int)()))
        return result


@every_dtype
def test_layouts(dtype):
    def groups_within_points(t: torch.Tensor) -> torch.Tensor:
        return t.transpose(0, 1).contiguous().transpose(0, 1)

    shape, options = (6, 5, 7, 19, (3,)), {"temperature": [1.0, 4.0]}
    check(drift_ops.drift_field, field_inputs(*shape, weighted=True), options, dtype, "cuda", groups_within_points)
    inputs = {name: t.unflatten(0, (2, 3)) for name, t in loss_inputs(9, 8, 5, 20, 6, True).items()}
    check(drift_ops.drift_loss, inputs, {}, dtype, "cuda", in_feature_map)


@pytest.mark.parametrize("D", [20, 21])
def test_loss_without_copies(D):
    """Groups are read, and the gradient is written, where they lie in the feature map."""
    inputs = {name: t.unflatten(0, (2, 3)) for name, t in loss_inputs(9, 8, 5, D, 6).items()}
    points = [in_feature_map(inputs[name].float()) for name in ("gen", "fixed_neg", "fixed_pos")]
    one_map = LossMap(tuple(points), tuple(torch.ones(()).expand(p.shape[:3]) for p in points))
    spec, scale, factors = LossSpec((0.2,), 0.0), torch.ones(1).double(), torch.ones(1, 1).double()
    with Operations() as operations:
        ((_, kept),) = cuda.loss_scale(spec, [one_map])
        ((state, _, _),) = cuda.loss_moments(spec, [one_map], [kept], scale, None)
        (grad,) = cuda.loss_gradient(spec, [one_map], [state], scale, factors, [torch.ones(6)])
    assert grad.stride() == torch.empty_like(points[0]).stride() != grad.contiguous().stride()
    assert {name for name, size in operations.seen if size >= one_map.points[1].numel()} == {"empty_like"}
