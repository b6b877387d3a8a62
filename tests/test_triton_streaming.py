"""The streaming Triton kernels, interpreted: ``TRITON_INTERPRET=1 python -m pytest tests/test_triton_streaming.py``."""

from functools import partial

import pytest
import torch
from cases import DENSE_FACTOR, EVERY_KERNEL, FLOOR, INTERPRETED, loss_phases, points, rms, unaligned, weights
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from drift_ops import reference

pytest.importorskip("triton")
from drift_ops.triton import autotune, group, launch, streaming, streaming_backward, streaming_tiles  # noqa: E402

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
    monkeypatch.setattr(streaming_tiles, "LARGEST_BLOCK", 16)
    monkeypatch.setattr(streaming_tiles, "PROGRAMS", 6)


def dense_sums(q, k, v, w, kernel, widths, temperature, split, has_self, floor):
    """``affinity_sums`` from its definition: num and den."""
    d = reference.distances(q, k)
    masked = torch.zeros(d.shape[1:], dtype=torch.bool)
    if has_self:
        masked.fill_diagonal_(True)
    sides = [slice(0, split), slice(split, None)] if split else [slice(None)]
    num, den = [], []
    for width in widths:
        logits = -d / width if kernel == "laplace" else torch.exp(-d.square() / (2 * width**2)) / temperature
        A = reference.affinity(logits.masked_fill(masked, reference.MASKED), floor).masked_fill(masked, 0.0)
        A = A if w is None else A * w.unsqueeze(1)
        num.append(torch.stack([A[..., side] @ v[:, side] for side in sides], 1))
        den.append(torch.stack([A[..., side].sum(-1) for side in sides], 1))
    return torch.stack(num), torch.stack(den)


def dense(tensors: list[Tensor], options: tuple, dtype: torch.dtype) -> list[Tensor]:
    """num, den and the gradients of the tensors under a fixed incoming gradient."""
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    q, k, v, *w = leaves
    outputs = dense_sums(q, k, v, w[0] if w else None, *options)
    gradients = torch.autograd.grad(outputs, leaves, incoming(outputs))
    return [t.detach() for t in (*outputs, *gradients)]


def incoming(outputs) -> list[Tensor]:
    return [points(*t.shape, seed=n).to(t) for n, t in enumerate(outputs)]


def ours(tensors: list[Tensor], options: tuple) -> list[Tensor]:
    """The same by the kernels, on float32 tensors that lie unaligned between NaNs."""
    q, k, v, *w = (unaligned(t.to(F32)).to(DEVICE) for t in tensors)
    w = w[0] if w else None
    num, den, *stats = streaming.affinity_sums(q, k, v, w, *options)
    grads = [unaligned(t) for t in incoming((num, den))]
    *gradients, grad_w = streaming_backward.affinity_sums_backward(q, k, v, w, *stats, *grads, *options)
    return [t.cpu() for t in (num, den, *gradients, *([] if w is None else [grad_w]))]


def check(tensors: list[Tensor], options: tuple) -> None:
    tensors = [t.to(F32) for t in tensors]
    found, truth, same = ours(tensors, options), dense(tensors, options, torch.float64), dense(tensors, options, F32)
    names = ["num", "den", *(f"gradient of {n}" for n in "qkvw"[: len(tensors)])]
    largest = max(rms(t) for t in truth[2:])
    for name, value, exact, dense_value in zip(names, found, truth, same, strict=True):
        assert value.shape == exact.shape and value.isfinite().all(), name
        error, allowed = rms(value - exact), max(FLOOR[F32] * rms(exact), DENSE_FACTOR * rms(dense_value - exact))
        if name.startswith("gradient"):  # one that is zero but for roundings of terms as large as its siblings
            allowed = max(allowed, torch.finfo(F32).eps * largest)
        assert error <= allowed, f"{name}: RMS error {error:.3g} of RMS {rms(exact):.3g}, allowed {allowed:.3g}"


def make(G: int, N: int, M: int, D: int, weighted: bool, shared: bool) -> list[Tensor]:
    """q, k, v and perhaps w; ``shared``: the first keys are the queries."""
    q, k, v = points(G, N, D, seed=1), points(G, M, D, shift=0.3, seed=2), points(G, M, D, seed=3)
    if shared:
        k[:, :N] = q
    return [q, k, v, *([weights(G, M, seed=4)] if weighted else [])]


form_A, form_B = partial(example, kernel="gaussian"), partial(example, kernel="laplace")


@settings(
    max_examples=20 if EVERY_KERNEL else 2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(
    G=st.sampled_from([1, 2]),
    N=st.integers(1, 24),
    more=st.integers(1, 20),
    D=st.sampled_from([1, 3, 17, 24]),
    kernel=st.sampled_from(["laplace", "gaussian"]),
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
def test_sums_and_gradients(G, N, more, D, kernel, widths, floor, has_self, two_sides, weighted):
    split = N + more // 2 if two_sides else 0
    tensors = make(G, N, N + more, D, weighted, has_self)
    check(tensors, (kernel, widths, 0.7, split, has_self, floor))


@pytest.mark.parametrize("kernel", ["laplace", "gaussian"])
def test_coincident_and_close_points(kernel):
    """Where ‖q‖² + ‖k‖² − 2q·k and h q − h k would cancel."""
    q, k, v = make(1, 20, 30, 24, False, False)
    k[:, 3:19] = q[:, 4:20]
    k[:, 20:30] = q[:, :10] + 1e-4 * points(1, 10, 24)
    check([q, k, v], (kernel, (1.0,), 0.5, 0, False, 0.0))


def test_outlier():
    q, k, v = make(1, 18, 35, 20, False, False)
    k[:, 17] += 1e4
    q[:, 3] -= 1e4
    check([q, k, v], ("laplace", (2.0,), 1.0, 20, False, 0.0))


def test_all_dimensions_in_a_tile(monkeypatch):
    monkeypatch.setattr(streaming_tiles, "LARGEST_BLOCK", 32)
    check(make(1, 36, 60, 30, False, True), ("laplace", (0.5, 2.0), 1.0, 40, True, 0.0))
    q, k, *_ = make(1, 36, 60, 30, False, True)
    check([q, k, k], ("laplace", (1.0,), 1.0, 0, True, 0.0))


@pytest.mark.parametrize("block, times", NEIGHBOURS if EVERY_KERNEL else NEIGHBOURS[::2])
def test_blocks_that_autotuning_may_choose(monkeypatch, block, times):
    def start(kernel, grid, *args, configuration, **options):
        other = configuration | {block: int(times * configuration.get(block, 0))}
        allowed = other in autotune.neighbours(configuration, grid, LIMITS)
        kernel[grid](*args, **options, **(other if allowed else configuration))

    monkeypatch.setattr(streaming_tiles, "LARGEST_BLOCK", 32)
    monkeypatch.setattr(autotune, "start", start)
    q, k, v = make(1, 20, 35, 30, False, True)
    options = ("laplace", (1.0,), 1.0, 25, True, 0.0)
    check([q, k, v], options)
    q, k = (t.to(DEVICE, F32) for t in (q, k))
    of_keys, of_copy = (streaming.affinity_sums(q, k, values, None, *options)[0] for values in (k, k.clone()))
    torch.testing.assert_close(of_keys, of_copy)  # whose tiles are not loaded again, if the blocks allow that


@pytest.mark.parametrize("apart", [0.0, 300.0, 3000.0])
def test_logits_far_from_any_level(apart):
    """Two clusters: logits of a tile, or all that a query has in a walk, leave the range of float32's exponentials."""
    q, k, v = (t.to(F32) for t in make(1, 24, 45, 20, False, False))
    q[:, 10:] += apart
    k[:, 10:32] += apart  # a tile of both clusters, one of this cluster, and one of the other
    options = ("laplace", (0.1, 1.0), 1.0, 0, False, 0.0)
    found = streaming.affinity_sums(*(t.to(DEVICE) for t in (q, k, v)), None, *options)[:2]
    truth = dense_sums(q.double(), k.double(), v.double(), None, *options)
    same = dense_sums(q, k, v, None, *options)
    for value, exact, dense_value in zip(found, truth, same, strict=True):
        assert rms(value.cpu() - exact) <= max(FLOOR[F32] * rms(exact), DENSE_FACTOR * rms(dense_value - exact))


@pytest.mark.parametrize("value", [float("nan"), 1e30])
@pytest.mark.parametrize("D", [2, 20])
def test_problems_are_scaled_apart(D, value):
    """What one problem holds must not change a bit of another's results."""
    options = ("laplace", (1.0,), 1.0, 0, False, 0.0)
    clean = make(2, 3, 5, D, True, False)
    alone = ours(clean, options)
    for n in range(3):
        spoilt = [t.clone() for t in clean]
        spoilt[n][1, -1, -1] = value
        for dirty, expected in zip(ours(spoilt, options), alone, strict=True):
            problems = 0 if dirty.shape[0] == 2 else 1  # gradients [G, …]; num and den [S, G, …]
            assert torch.equal(dirty.select(problems, 0), expected.select(problems, 0))


@pytest.mark.parametrize("D", [2, 20])
def test_nothing_unmasked(D):
    """One query whose only key is itself: all zero, and no NaN."""
    q = points(2, 1, D)
    for t in ours([q, q, q, torch.ones(2, 1)], ("laplace", (1.0,), 1.0, 0, True, 1e-6)):
        assert (t == 0).all()


def test_the_same_every_time():
    tensors, options = make(1, 17, 31, 20, True, True), ("laplace", (1.0,), 1.0, 20, True, 0.0)
    for first, second in zip(ours(tensors, options), ours(tensors, options), strict=True):
        assert torch.equal(first, second)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 8000), cols=st.integers(1, 8000), problems=st.integers(1, 5000))
def test_rectangles_cover_the_plane(rows, cols, problems):
    parts = streaming_tiles.cut(rows, cols, problems)
    assert (parts.row_parts - 1) * parts.row_tiles < rows <= parts.row_parts * parts.row_tiles
    assert (parts.col_parts - 1) * parts.col_tiles < cols <= parts.col_parts * parts.col_tiles
    assert parts.row_parts * parts.col_parts <= max(1, streaming_tiles.PROGRAMS // problems)


@pytest.mark.parametrize(
    ("counts", "D", "floor", "dtype"),
    [((20, 9, 18), 3, 0.0, F32), ((18, 0, 17), 20, 1e-6, torch.bfloat16), ((5, 30, 18), 33, 1e-3, F32)],
)
def test_loss(monkeypatch, counts, D, floor, dtype):
    monkeypatch.setattr(group, "fits_loss", lambda limits, *counts: False)
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
