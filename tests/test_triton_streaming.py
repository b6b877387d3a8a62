"""The streaming Triton kernels, interpreted: ``TRITON_INTERPRET=1 python -m pytest tests/test_triton_streaming.py``."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import DENSE_FACTOR, EVERY_KERNEL, FLOOR, INTERPRETED, loss_phases, points, rms, unaligned, weights
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_family import check as check_member
from torch import Tensor

from drift_ops import Field, reference
from drift_ops.points import gathered
from drift_ops.spec import LOGITS, AffinitySpec

tl = pytest.importorskip("triton").language
from triton.runtime.errors import InterpreterError  # noqa: E402

from drift_ops.triton import affinity, autotune, launch, loss  # noqa: E402
from drift_ops.triton.affinity import blocks  # noqa: E402
from drift_ops.triton.affinity.pairs import pairs_of  # noqa: E402
from drift_ops.triton.affinity.statistics import find_statistics  # noqa: E402

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED else "cuda"
F32 = torch.float32
NEIGHBOURS = [
    ("BLOCK_Q", 0.5), ("BLOCK_Q", 2), ("BLOCK_K", 2), ("BLOCK_K", 0.5),
    ("BLOCK_D", 0.5), ("BLOCK_D", 2), ("BLOCK_V", 2), ("BLOCK_V", 0.5),
]  # fmt: skip
LIMITS = launch.Limits(amd=False, shared_bytes=232448)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles, rectangles and chunks of dimensions even in small problems."""
    monkeypatch.setattr(blocks, "LARGEST_BLOCK", 16)
    monkeypatch.setattr(blocks, "PROGRAMS", 6)


def dense_sums(spec, first, q, k, v, w=None):
    """``affinity_sums`` from its definition: num and den. Two sides have ``first`` keys and the rest."""
    d = reference.distances(q, k)
    masked = torch.zeros(d.shape[1:], dtype=torch.bool)
    if spec.has_self:
        masked.fill_diagonal_(True)
    sides = [slice(0, first), slice(first, None)] if spec.sides == 2 else [slice(None)]
    num, den = [], []
    for width in spec.widths:
        L = -d / width if spec.logit == "laplace" else torch.exp(-d.square() / (2 * width**2)) / spec.temperature
        A = reference.affinity(L.masked_fill(masked, reference.MASKED))
        A = A.clamp(min=spec.floor**0.5).masked_fill(masked, 0.0)
        A = A if w is None else A * w.unsqueeze(1)
        num.append(torch.stack([A[..., side] @ v[:, side] for side in sides], 1))
        den.append(torch.stack([A[..., side].sum(-1) for side in sides], 1))
    return torch.stack(num), torch.stack(den)


Points = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # q, k, v (None: the keys), w (None: ones)


def dense(spec, first, given: Points, dtype: torch.dtype) -> list[Tensor]:
    """num, den and the gradients of what is given, under a fixed incoming gradient."""
    q, k, v, w = (None if t is None else t.to(dtype).requires_grad_() for t in given)
    outputs = dense_sums(spec, first, q, k, k if v is None else v, w)
    gradients = torch.autograd.grad(outputs, [t for t in (q, k, v, w) if t is not None], incoming(outputs))
    return [t.detach() for t in (*outputs, *gradients)]


def incoming(outputs) -> list[Tensor]:
    return [points(*t.shape, seed=n).to(t) for n, t in enumerate(outputs)]


def ours(spec, first, given: Points) -> list[Tensor]:
    """The same by the kernels, on float32 tensors that lie unaligned between NaNs."""
    q, k, v, w = (None if t is None else unaligned(t.to(F32)).to(DEVICE) for t in given)
    counts = [first, k.shape[1] - first] if spec.sides == 2 else [k.shape[1]]
    arguments = (spec, q, k.split(counts, 1), None if v is None else v.split(counts, 1), w)
    num, den, *kept = affinity.streamed_sums(*arguments)
    grads = [unaligned(t) for t in incoming((num, den))]
    grad_q, of_keys, of_values, grad_w = affinity.affinity_sums_backward(*arguments, *kept, *grads)
    gradients = grad_q, *(torch.cat(of, 1) for of in (of_keys, of_values) if of), *([] if w is None else [grad_w])
    return [t.cpu() for t in (num, den, *gradients)]


def check(spec, first, given: Points) -> None:
    q, k, v, w = (None if t is None else t.to(F32) for t in given)
    found = ours(spec, first, (q, k, v, w))
    given = (*centred(q, k, v), w)
    truth, same = (dense(spec, first, given, dtype) for dtype in (torch.float64, F32))
    names = ["num", "den", *(f"gradient of {n}" for n, t in zip("qkvw", given, strict=True) if t is not None)]
    largest = max(rms(t) for t in truth[2:])
    for name, value, exact, dense_value in zip(names, found, truth, same, strict=True):
        assert value.shape == exact.shape and value.isfinite().all(), name
        error, allowed = rms(value - exact), max(FLOOR[F32] * rms(exact), DENSE_FACTOR * rms(dense_value - exact))
        if name.startswith("gradient"):  # one that is zero but for roundings of terms as large as its siblings
            allowed = max(allowed, torch.finfo(F32).eps * largest)
        assert error <= allowed, f"{name}: RMS error {error:.3g} of RMS {rms(exact):.3g}, allowed {allowed:.3g}"


def centred(q: Tensor, k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The points as the kernels get them: centring rounds, which is not the kernels' doing."""
    q, k, values, _ = gathered(q, [k], None if v is None else [v])
    return q, k, None if v is None else values


def make(G: int, N: int, M: int, D: int, weighted: bool, shared: bool) -> Points:
    """``shared``: the first keys are the queries."""
    q, k, v = points(G, N, D, seed=1), points(G, M, D, shift=0.3, seed=2), points(G, M, D, seed=3)
    if shared:
        k[:, :N] = q
    return q, k, v, weights(G, M, seed=4) if weighted else None


form_A, form_B = partial(example, logit="gaussian"), partial(example, logit="laplace")


@settings(
    max_examples=20 if EVERY_KERNEL else 2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(
    G=st.sampled_from([1, 2]),
    N=st.integers(1, 24),
    more=st.integers(1, 20),
    D=st.sampled_from([1, 3, 17, 24]),
    logit=st.sampled_from(["laplace", "gaussian"]),
    widths=st.sampled_from([(1.0,), (0.5, 3.0)]),
    floor=st.sampled_from([0.0, 1e-6, 1e-2]),
    has_self=st.booleans(),
    two_sides=st.booleans(),
    weighted=st.booleans(),
)
@form_B(G=2, N=17, more=14, D=24, widths=(0.5, 3.0), floor=1e-6, has_self=True, two_sides=True, weighted=True)
@form_B(G=1, N=5, more=20, D=3, widths=(1.0,), floor=1e-2, has_self=False, two_sides=True, weighted=False)
@form_A(G=1, N=20, more=5, D=17, widths=(1.0,), floor=0.0, has_self=False, two_sides=False, weighted=False)
@form_A(G=2, N=3, more=1, D=1, widths=(0.5, 3.0), floor=0.0, has_self=False, two_sides=False, weighted=True)
def test_sums_and_gradients(G, N, more, D, logit, widths, floor, has_self, two_sides, weighted):
    spec = AffinitySpec(logit, widths, 0.7, floor, has_self, 1 + two_sides)
    check(spec, N + more // 2, make(G, N, N + more, D, weighted, has_self))


@pytest.mark.parametrize("logit", LOGITS)
def test_coincident_and_close_points(logit):
    """Where ‖q‖² + ‖k‖² − 2q·k and h q − h k would cancel."""
    q, k, v, _ = make(1, 20, 30, 24, False, False)
    k[:, 3:19] = q[:, 4:20]
    k[:, 20:30] = q[:, :10] + 1e-4 * points(1, 10, 24)
    check(AffinitySpec(logit, (1.0,), 0.5), 0, (q, k, v, None))


@pytest.mark.skipif(not INTERPRETED, reason="names an error of Triton's interpreter")
def test_unknown_logit():
    q, k, _, _ = make(1, 3, 5, 2, False, False)
    pairs = pairs_of(AffinitySpec("laplace", (1.0,)), q.to(F32), k.to(F32), None, 5)
    with pytest.raises(InterpreterError, match="unknown logit"):
        find_statistics(pairs._replace(LOGIT=tl.constexpr("linear")))


def test_outlier():
    q, k, v, _ = make(1, 18, 35, 20, False, False)
    k[:, 17] += 1e4
    q[:, 3] -= 1e4
    check(AffinitySpec("laplace", (2.0,), sides=2), 20, (q, k, v, None))


def test_all_dimensions_in_a_tile(monkeypatch):
    monkeypatch.setattr(blocks, "LARGEST_BLOCK", 32)
    check(AffinitySpec("laplace", (0.5, 2.0), has_self=True, sides=2), 40, make(1, 36, 60, 30, False, True))


def test_keys_that_are_the_values(monkeypatch):
    """Their tiles are not loaded again, where the blocks allow that."""
    q, k, _, w = make(1, 20, 35, 30, True, True)
    for largest in (16, 32):
        monkeypatch.setattr(blocks, "LARGEST_BLOCK", largest)
        check(AffinitySpec("laplace", (1.0,), has_self=True, sides=2), 25, (q, k, None, w))


@pytest.mark.parametrize("block, times", NEIGHBOURS if EVERY_KERNEL else NEIGHBOURS[::2])
def test_blocks_that_autotuning_may_choose(monkeypatch, block, times):
    def start(kernel, grid, *args, configuration, **options):
        other = configuration | {block: int(times * configuration.get(block, 0))}
        allowed = other in autotune.neighbours(configuration, grid, LIMITS)
        kernel[grid](*args, **options, **(other if allowed else configuration))

    monkeypatch.setattr(blocks, "LARGEST_BLOCK", 32)
    monkeypatch.setattr(autotune, "start", start)
    check(AffinitySpec("laplace", (1.0,), has_self=True, sides=2), 25, make(1, 20, 35, 30, False, True))


def clusters(apart: float) -> list[Tensor]:
    """q, k, v of two of them. Of the tiles of keys one holds both, one the second, and one the first."""
    q, k, v = (t.to(F32) for t in make(1, 24, 45, 20, False, False)[:3])
    q[:, 10:] += apart
    k[:, 10:32] += apart
    return [q, k, v]


@pytest.mark.parametrize("apart", [0.0, 300.0, 3000.0])
def test_logits_far_from_any_level(apart):
    """Logits of a tile, or all that a query has in a walk, leave the range of float32's exponentials."""
    spec, (q, k, v) = AffinitySpec("laplace", (0.1, 1.0)), clusters(apart)
    num, den, *_ = affinity.streamed_sums(spec, q.to(DEVICE), [k.to(DEVICE)], [v.to(DEVICE)], None)
    q, k, v = centred(q, k, v)
    truth, same = dense_sums(spec, 0, q.double(), k.double(), v.double()), dense_sums(spec, 0, q, k, v)
    for value, exact, dense_value in zip((num, den), truth, same, strict=True):
        assert rms(value.cpu() - exact) <= max(FLOOR[F32] * rms(exact), DENSE_FACTOR * rms(dense_value - exact))


@pytest.mark.skipif(not INTERPRETED, reason="looks into Triton's interpreter")
def test_nothing_is_read_before_a_barrier(monkeypatch):
    """What a program wrote another of its threads may not have seen."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    written: set[int] = set()
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def checked_load(self, pointers, mask, *rest):
        assert written.isdisjoint(pointers.data[mask.data].tolist())
        return load(self, pointers, mask, *rest)

    def noted_store(self, pointers, value, mask, *rest):
        written.update(pointers.data[mask.data].tolist())
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(Builder, "create_masked_load", checked_load)
    monkeypatch.setattr(Builder, "create_masked_store", noted_store)
    monkeypatch.setattr(Builder, "create_barrier", lambda self: written.clear())
    monkeypatch.setattr(Builder, "set_grid_idx", chained(Builder.set_grid_idx, written.clear))
    monkeypatch.setattr(blocks, "PROGRAMS", 1)
    ours(AffinitySpec("laplace", (0.1,)), 0, (*clusters(3000.0), torch.ones(1, 45)))


def chained(method: Callable[..., None], then: Callable[[], None]) -> Callable[..., None]:
    def both(*args: Any) -> None:
        method(*args)
        then()

    return both


def test_weights_of_all_sizes():
    """Every row is as near the truth as with equal weights, though all keys near some queries weigh next to nothing."""
    q, k, v, w = (t.to(F32) for t in make(1, 12, 28, 24, True, False))
    q[:, 4:] += 200
    k[:, 9:] += 200  # a tile of both clusters, and one of the second
    spec, far = AffinitySpec("laplace", (1.0,), sides=2), v.clone()
    some = torch.cat([torch.logspace(-10, 0, 9), torch.logspace(-10, -7, 19)]).unsqueeze(0)
    far[:, 5], some[:, 5] = 1e8, 0.0
    equal, unequal = (worst_rows(spec, 20, (q, k, *of)) for of in ((v, torch.ones_like(w)), (far, some)))
    for name, error in unequal.items():
        assert error <= max(4 * equal[name], 1e-6), f"{name}: {error:.3g}, with equal weights {equal[name]:.3g}"


def test_weights_of_either_sign():
    q, k, v, w = make(1, 14, 24, 24, True, True)
    check(AffinitySpec("laplace", (0.5,), floor=1e-6, has_self=True, sides=2), 18, (q, k, v, w - 0.7))


def worst_rows(spec, first, given: Points) -> dict[str, float]:
    """The largest relative error of a row of num, den and the gradients of q and v."""
    found = ours(spec, first, given)
    truth = dense(spec, first, (*centred(*given[:3]), given[3]), torch.float64)
    worst = {}
    for name, n in (("num", 0), ("den", 1), ("gradient of q", 2), ("gradient of v", 4)):
        value, exact = (t[n].unsqueeze(-1) if name == "den" else t[n] for t in (found, truth))
        errors = (value - exact).norm(dim=-1) / exact.norm(dim=-1)
        worst[name] = float(errors[exact.norm(dim=-1) > 0].max())
    return worst


@pytest.mark.parametrize("value", [float("nan"), 1e30])
@pytest.mark.parametrize("D", [2, 20])
def test_problems_are_scaled_apart(D, value):
    """What one problem holds must not change a bit of another's results."""
    spec = AffinitySpec("laplace", (1.0,))
    clean = make(2, 3, 5, D, True, False)
    alone = ours(spec, 0, clean)
    for n in range(3):
        spoilt = [t.clone() for t in clean[:3]]
        spoilt[n][1, -1, -1] = value
        for dirty, expected in zip(ours(spec, 0, (*spoilt, clean[3])), alone, strict=True):
            problems = 0 if dirty.shape[0] == 2 else 1  # gradients [G, …]; num and den [S, G, …]
            assert torch.equal(dirty.select(problems, 0), expected.select(problems, 0))


@pytest.mark.parametrize("D", [2, 20])
def test_nothing_unmasked(D):
    """One query whose only key is itself: all zero, and no NaN."""
    q = points(2, 1, D)
    found = ours(AffinitySpec("laplace", (1.0,), floor=1e-6, has_self=True), 0, (q, q, q, torch.ones(2, 1)))
    assert all((t == 0).all() for t in found)


def test_the_same_every_time():
    spec, tensors = AffinitySpec("laplace", (1.0,), has_self=True, sides=2), make(1, 17, 31, 20, True, True)
    for first, second in zip(ours(spec, 20, tensors), ours(spec, 20, tensors), strict=True):
        assert torch.equal(first, second)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 8000), cols=st.integers(1, 8000), problems=st.integers(1, 5000))
def test_rectangles_cover_the_plane(rows, cols, problems):
    found = blocks.cut_plane(rows, cols, problems)
    assert (found.rows - 1) * found.row_tiles < rows <= found.rows * found.row_tiles
    assert (found.cols - 1) * found.col_tiles < cols <= found.cols * found.col_tiles
    assert found.rows * found.cols <= max(1, blocks.PROGRAMS // problems)


@pytest.mark.parametrize(
    ("counts", "D", "floor", "dtype"),
    [((20, 9, 18), 3, 0.0, F32), ((18, 0, 17), 20, 1e-6, torch.bfloat16), ((5, 30, 18), 33, 1e-3, F32)],
)
def test_loss(monkeypatch, counts, D, floor, dtype):
    monkeypatch.setattr(loss, "plan_of", lambda spec, of_map: None)
    G, R_list = 2, (0.05, 0.2)
    clouds = [unaligned((points(G, n, D, seed=n) + 3).to(dtype)).to(DEVICE) for n in counts]
    w = [unaligned(weights(G, n, seed=n).float() + 0.1).to(DEVICE) for n in counts]
    results = []
    for backend, clouds_, w_ in (
        ("triton", clouds, w),
        ("reference", [t.double().cpu() for t in clouds], [t.double().cpu() for t in w]),
    ):
        incoming = torch.tensor([1.0, -0.5])
        scale, (moments,), (grad,) = loss_phases(backend, [clouds_], [w_], [incoming], R_list, floor)
        results.append((scale, moments, grad))
    assert results[0][0].dtype == torch.float64 and results[0][1].dtype == F32 and results[0][2].dtype == dtype
    for value, truth, within in zip(*results, (1e-6, 1e-4, max(2e-5, FLOOR[dtype])), strict=True):
        assert rms(value.cpu().double() - truth) <= within * rms(truth)


def test_loss_of_members_of_the_family(monkeypatch):
    """Composed of sums over pairs, where group kernels do not hold the groups."""
    monkeypatch.setattr(loss, "plan_of", lambda spec, of_map: None)
    for field in (Field("l2_sq", "row", "split", affinity_floor=1e-3), Field("l2", "sinkhorn", "joint", 2, "kernel")):
        options = {"scale": "group", "normalize": "group", "scale_self_pairs": False}
        check_member(field, "triton", (2, 18, 3, 21), 5, options, [0.2, 0.5], dtype=torch.float32)
