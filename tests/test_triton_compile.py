"""Every Triton kernel compiles for every GPU we mean to serve, within its budget of registers and shared memory.

No GPU is needed: the launchers run on tensors without memory, and what they would launch is compiled. The budget is
``triton_budgets.json``; ``python tests/test_triton_compile.py --write`` records it anew.

``make test`` compiles every kernel once for USUAL_TARGETS, by USUAL_CASES. ``make test-kernels`` sets
DRIFT_EVERY_KERNEL=1, and compiles every case at every precision for every target, and what autotuning may choose.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import EVERY_KERNEL

pytest.importorskip("triton")
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

BUDGETS = Path(__file__).with_name("triton_budgets.json")
TARGETS = {  # and the shared memory of a program
    "sm_80": (GPUTarget("cuda", 80, 32), 166912),
    "sm_86": (GPUTarget("cuda", 86, 32), 101376),
    "sm_89": (GPUTarget("cuda", 89, 32), 101376),
    "sm_90": (GPUTarget("cuda", 90, 32), 232448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232448),
    "sm_120": (GPUTarget("cuda", 120, 32), 101376),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65536),
}
WIDTHS = (0.5, 2.0)
R_LIST = (0.02, 0.05, 0.2)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def field(spec: Any, q: torch.Tensor, keys: list[torch.Tensor], values: Any, w: torch.Tensor | None) -> None:
    from drift_ops import triton

    num, den, *kept = triton.affinity_sums(spec, q, keys, values, w)
    assert num.shape == (len(spec.widths), q.shape[0], spec.sides, *q.shape[1:])
    triton.affinity_sums_backward(spec, q, keys, values, w, *kept, num, den)


def streaming_field(N: int, M: int, D: int, widths: tuple[float, ...] = WIDTHS) -> None:
    from drift_ops.spec import AffinitySpec

    keys, values = ([empty(1, N, D), empty(1, M - N, D)] for _ in range(2))
    field(AffinitySpec("laplace", widths, has_self=True, sides=2), empty(1, N, D), keys, values, empty(1, M))


def streaming_gaussian(N: int, M: int, D: int) -> None:
    from drift_ops.spec import AffinitySpec

    field(AffinitySpec("gaussian", WIDTHS), empty(1, N, D), [empty(1, M, D)], None, None)


def loss(
    counts: tuple[int, int, int],
    D: int,
    dtype: torch.dtype = torch.float32,
    maps: int = 1,
    R_list: Any = R_LIST,
    **member: Any,
) -> None:
    from drift_ops import triton
    from drift_ops.spec import LossMap, LossSpec

    spec, T = LossSpec(R_list, 0.0, **member), 4
    points = tuple(empty(1, n, T, D, dtype=dtype).transpose(1, 2) for n in counts)
    given = [LossMap(points, tuple(empty(1, 1, n).expand(1, T, n) for n in counts))] * maps
    scale, factors = empty(maps, dtype=torch.float64), empty(maps, len(R_list), dtype=torch.float64)
    kept = [kept for _, kept in triton.loss_scale(spec, given)]
    states = [state for state, _, _ in triton.loss_moments(spec, given, kept, scale, None)]
    triton.loss_gradient(spec, given, states, scale, factors, [empty(T)] * maps)


def family(coupling: str, sides: str, weights: str, D: int, negatives: int = 16, **member: Any) -> None:
    """A member of the family of fields as drift_loss has it, without self pairs."""
    kinds = {"coupling": coupling, "sides": sides, "weights": weights, "details": True, "scale_self_pairs": False}
    loss((64, negatives, 64), D, self_distance=float("inf"), **kinds, **member)


def group_field(N: int, M: int, D: int) -> None:
    from drift_ops import triton
    from drift_ops.spec import AffinitySpec

    q, keys = empty(4, N, D), [empty(4, N, D), empty(4, M - N, D)]
    triton.affinity_sums(AffinitySpec("laplace", WIDTHS, has_self=True, sides=2), q, keys, None, empty(4, M))


def pairs(N: int, M: int, D: int, cost: str, self_cost: float) -> None:
    from drift_ops import triton
    from drift_ops.spec import PairGradients, PairProblem, PairSpec, PairWeights

    spec, S = PairSpec(cost, True, self_cost, 2, 1e-6), len(WIDTHS)
    problem = PairProblem(spec, empty(1, N, D), [empty(1, N, D), empty(1, M - N, D)], empty(S), empty(1))
    alpha, beta, grad_num, grad_den = empty(S, 1, N), empty(S, 1, M), empty(S, 1, 2, N, D), empty(S, 1, 2, N)
    weights = PairWeights(alpha, beta, empty(1, M), empty(1, D))
    triton.log_sums(problem, beta, True)
    triton.log_sums(problem, alpha, False)
    triton.weighted_sums(problem, weights)
    triton.pair_gradients(problem, weights, PairGradients(grad_num, grad_den))
    of_columns = problem._replace(spec=replace(spec, sides=1, floor=0.0))  # as the log-sum-exps of columns want it
    triton.pair_gradients(of_columns, PairWeights(alpha, beta), PairGradients(columns=beta))


# What the launchers are called with, by name: the regimes, few dimensions and many. Kernels that only depend on shapes
# through their blocks are compiled once.
CASES: dict[str, Callable[[], None]] = {
    "streaming D=256": lambda: streaming_field(4096, 8192, 256),
    "streaming loss D=256": lambda: loss((2048, 512, 2048), 256),
    "group loss D=256": lambda: loss((64, 16, 64), 256),
    "group loss D=1024, 10 maps": lambda: loss((64, 16, 64), 1024, maps=10),
    "group field D=256": lambda: group_field(32, 64, 256),
    "pairs D=256": lambda: pairs(4096, 8192, 256, "l2_sq", 2.0),
}
EXACT_CASES: dict[str, Callable[[], None]] = {  # with products rounded as "highest" only
    "streaming D=2": lambda: streaming_field(4096, 8192, 2),
    "streaming small D=256": lambda: streaming_field(64, 144, 256),
    "streaming D=256, 8 widths": lambda: streaming_field(4096, 8192, 256, (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)),
    "streaming gaussian D=256": lambda: streaming_gaussian(4096, 8192, 256),
    "group loss D=2": lambda: loss((64, 16, 64), 2),
    "group loss bfloat16": lambda: loss((64, 16, 64), 256, torch.bfloat16),
    "group loss D=64": lambda: loss((64, 16, 64), 64),
    "group loss largest": lambda: loss((64, 32, 64), 256),
    "group loss tiny": lambda: loss((16, 0, 16), 32),
    "group loss D=2048": lambda: loss((64, 16, 64), 2048),
    "group field D=2": lambda: group_field(32, 64, 2),
    "pairs D=2": lambda: pairs(4096, 8192, 2, "l2", float("inf")),
    "group row D=256": lambda: family("row", "joint", "affinity", 256),
    "group split two_sided D=256": lambda: family("two_sided", "split", "kernel", 256, cost="l2_sq"),
    "group sinkhorn D=256": lambda: family("sinkhorn", "joint", "marginal", 256),
    "group split sinkhorn D=64": lambda: family("sinkhorn", "split", "kernel", 64, cost="l2_sq"),
    "group split sinkhorn, 64 other negatives": lambda: family(
        "sinkhorn", "split", "kernel", 512, 64, cost="l2_sq", include_self=False
    ),
}


SMALL = {"sm_86", "sm_89", "sm_120"}  # of whose shared memory kernels may take all, but no more
SMALL_CASES: dict[str, Callable[[], None]] = {  # that would take more, but for other paths
    "group loss D=256": CASES["group loss D=256"],
    "group loss, six R": lambda: loss((64, 16, 64), 64, R_list=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5)),
    "group loss, 256 positives": lambda: loss((32, 0, 256), 4096),
    "group loss, 512 positives": lambda: loss((16, 0, 512), 64, R_list=(0.1,)),
}
USUAL_TARGETS = ("sm_80", "sm_90")
USUAL_CASES = (  # at "highest": every kernel with products, and those that take differences at few dimensions
    "streaming D=256",
    "streaming loss D=256",
    "group loss D=256",
    "group loss D=2048",
    "group field D=256",
    "streaming D=2",
    "group loss D=2",
    "group split sinkhorn D=64",
    "pairs D=256",
    "pairs D=2",
)
USUAL_NAMES = tuple(f"{case}, highest, " for case in USUAL_CASES)  # what their kernels' names begin with
NEIGHBOURS_OF = ("streaming D=256", "group loss D=256")  # cases whose configurations' neighbours compile, too
ONE_OF = 8  # neighbours is compiled for each target: all would take minutes


class Driver:
    """Stands in for the driver of a GPU, as far as compiling goes."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_all(name: str) -> dict[str, dict[str, int]]:
    """Resources of every kernel on one target; runs in a process of its own. Raises what the compiler raises."""
    from triton.runtime.jit import JITFunction

    from drift_ops.triton import launch

    target, shared_bytes = TARGETS[name]
    amd = target.backend == "hip"
    triton.runtime.driver.set_active(Driver(target))
    limits = launch.Limits(amd, shared_bytes, tensor_memory=name == "sm_100")
    launch.limits = lambda device: limits  # type: ignore[assignment]
    launched: list[tuple[str, Any]] = []
    found: dict[str, dict[str, int]] = {}
    measured: dict[str, dict[str, int]] = {}
    original = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        if not warmup:
            launched.append((self.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    launch.execute = lambda kernel, grid, arguments: launched.append((kernel.src.fn.__name__, kernel))
    for precision, case, call in small_calls() if name in SMALL else calls(amd):
        torch.set_float32_matmul_precision(precision)
        launched.clear()
        call()
        for n, (kernel_name, kernel) in enumerate(launched):
            if kernel.hash not in measured:
                measured[kernel.hash] = resources(kernel, amd)
            found[f"{case}, {precision}, {n} {kernel_name}"] = measured[kernel.hash]
    if EVERY_KERNEL and name not in SMALL:
        compile_neighbours(list(TARGETS).index(name), limits)
    return found


def calls(amd: bool) -> list[tuple[str, str, Callable[[], None]]]:
    """Precision, name and call of each case to compile."""
    exact = [("highest", case, call) for case, call in (CASES | EXACT_CASES).items()]
    if not EVERY_KERNEL:
        return [call for call in exact if call[1] in USUAL_CASES]
    return exact if amd else exact + [("high", case, call) for case, call in CASES.items()]


def small_calls() -> list[tuple[str, str, Callable[[], None]]]:
    small = [("highest", case, call) for case, call in SMALL_CASES.items()]
    return calls(amd=False) + small if EVERY_KERNEL else small[:1]


def compile_neighbours(turn: int, limits: Any) -> None:
    """At "highest"; every target has others."""
    from drift_ops.triton import autotune

    counter = itertools.count(turn)

    def start(kernel: Any, grid: Any, *args: Any, configuration: dict[str, int], **options: Any) -> None:
        for neighbour in autotune.neighbours(configuration, grid, limits)[1:]:
            if next(counter) % ONE_OF == 0:
                kernel[grid](*args, **options, **neighbour)

    torch.set_float32_matmul_precision("highest")
    autotune.start = start
    for case in NEIGHBOURS_OF:
        CASES[case]()


def resources(kernel: Any, amd: bool) -> dict[str, int]:
    if amd:
        text = kernel.asm["amdgcn"]
        keys = ("vgpr_count", "vgpr_spill_count")
        registers, spills = (int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in keys)
    else:
        if "trap;" in kernel.asm["ptx"]:  # what Triton makes of a kernel that needs more tensor memory than there is
            return {"registers": 0, "spills": 0, "shared": 0}
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(kernel.asm["cubin"])
            cubin.flush()
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
        registers, spills = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    return {"registers": registers, "spills": spills, "shared": kernel.metadata.shared}


def compile_elsewhere(name: str) -> dict[str, dict[str, int]]:
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def test_usual_cases_launch_every_kernel():
    def kernels(names: list[str]) -> set[tuple[str, str]]:
        """Regime and kernel of names such as "streaming D=2, highest, 0 statistics_kernel"."""
        return {(name.split()[0], name.split()[-1]) for name in names}

    for target in USUAL_TARGETS:
        every_name = list(json.loads(BUDGETS.read_text())[target])
        assert kernels(every_name) == kernels([name for name in every_name if name.startswith(USUAL_NAMES)])


@pytest.mark.parametrize("target", sorted(SMALL) if EVERY_KERNEL else ["sm_86"])
def test_fits_where_shared_memory_is_small(target):
    for name, used in compile_elsewhere(target).items():
        assert used["shared"] <= TARGETS[target][1] and used["registers"] > 0, name


@pytest.mark.parametrize("target", sorted(set(TARGETS) - SMALL) if EVERY_KERNEL else USUAL_TARGETS)
def test_within_budget(target):
    budgets, found = json.loads(BUDGETS.read_text()), compile_elsewhere(target)
    budget = budgets[target]
    if not EVERY_KERNEL:
        budget = {name: allowed for name, allowed in budget.items() if name.startswith(USUAL_NAMES)}
    assert found.keys() == budget.keys(), f"other kernels than in {BUDGETS.name}: see the docstring above"
    problems = []
    for name, used in found.items():
        allowed = dict(budget[name])
        if triton.__version__ != budgets["triton"]:  # another compiler may use somewhat more
            allowed |= {"registers": 512 if target == "gfx942" else 255, "shared": TARGETS[target][1]}
        allowed["shared"] = min(allowed["shared"], TARGETS[target][1])
        if any(used[what] > allowed[what] for what in used):
            problems.append(f"{name}: {used}, allowed {allowed}")
        if used["registers"] == 0:
            problems.append(f"{name}: compiled to a trap")
    assert not problems, "\n".join(problems)


def write_budgets() -> None:
    """Writes one kernel a line."""
    targets = []
    names = [name for name in TARGETS if name not in SMALL]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        found = dict(zip(names, pool.map(compile_elsewhere, names), strict=True))
    for target, kernels in found.items():
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(used)}" for name, used in kernels.items())
        targets.append(f'  "{target}": {{\n{lines}\n  }}')
    BUDGETS.write_text(f'{{\n  "triton": "{triton.__version__}",\n' + ",\n".join(targets) + "\n}\n")


if __name__ == "__main__":
    if sys.argv[1] == "--write":
        os.environ["DRIFT_EVERY_KERNEL"] = "1"  # for the processes that compile
        write_budgets()
    else:
        print(json.dumps(compile_all(sys.argv[1])))
