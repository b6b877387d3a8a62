"""Group kernels of the Triton backend against the reference; interpreted on CPU tensors where there is no GPU."""

import math

import pytest
import torch
from cases import EVERY_KERNEL, FLOOR, INTERPRETED, loss_phases, points, rms, unaligned, weights
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from test_family import check as check_member
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from drift_ops import Field, cpu, drift_loss  # noqa: E402
from drift_ops import triton as triton_backend  # noqa: E402
from drift_ops.spec import LOGITS, AffinitySpec, LossMap, LossSpec  # noqa: E402
from drift_ops.triton import affinity, autotune, group, launch  # noqa: E402
from drift_ops.triton.loss import batch, plan  # noqa: E402

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED else "cuda"
FEW = settings(
    max_examples=20 if EVERY_KERNEL else 3, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate)
)  # slow to shrink
NEIGHBOURS = [("BLOCK_D", 0.5), ("BLOCK_D", 2), ("BLOCK_SUM", 0.5), ("BLOCK_SUM", 2)]
R_LIST = (0.02, 0.05, 0.2)
LIMITS = launch.limits(torch.device(DEVICE))


def on_device(t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Contiguous, inside a buffer of NaN."""
    return unaligned(t.to(DEVICE, dtype))


def close(ours: Tensor, truth: Tensor, dense: Tensor, least: float = FLOOR[torch.float32]) -> None:
    """About as near the float64 truth as the dense float32 form."""
    assert ours.shape == truth.shape
    assert ours.isfinite().all()
    error = rms(ours.cpu().double() - truth)
    allowed = max(4 * rms(dense.double() - truth), least * rms(truth), 1e-30)
    assert error <= allowed, f"RMS error {error:.3g} of RMS {rms(truth):.3g}, allowed {allowed:.3g}"


# Form C


Case = tuple[list[Tensor], list[Tensor]]  # points and weights of gen, neg, pos


def phases(given: Case, incoming: Tensor, floor: float, backend: str, to, R_list=R_LIST) -> list[Tensor]:
    """Scale, moments and gradient of one map."""
    p, w = ([[to(t) for t in tensors]] for tensors in given)
    scale, (moments,), (grad,) = loss_phases(backend, p, w, [incoming], R_list, floor)
    return [scale, moments, grad]


def plan_of(p: list[Tensor], R_list: tuple[float, ...] = R_LIST) -> plan.Plan | None:
    gen, neg, pos = (t.float().unsqueeze(1) for t in p)
    return plan.plan_of(LossSpec(R_list, 0.0), LossMap((gen, neg, pos), (gen, neg, pos)))


def check_loss(
    p: list[Tensor], w: list[Tensor], floor: float, dtype: torch.dtype = torch.float32, rtol=0.0, R_list=R_LIST
) -> None:
    p = [t.to(dtype).double() for t in p]
    incoming = points(p[0].shape[0], seed=8).bfloat16()
    truth = phases((p, w), incoming, floor, "reference", torch.Tensor.double, R_list)
    dense = phases((p, w), incoming, floor, "reference", torch.Tensor.float, R_list)

    def to(t: Tensor) -> Tensor:
        return on_device(t, dtype if t.dim() == 3 else torch.float32)

    scale, moments, grad = phases((p, w), incoming, floor, "triton", to, R_list)
    assert grad.dtype == dtype
    least = max(rtol, FLOOR[torch.float32])
    close(scale, truth[0], dense[0], least)
    close(moments, truth[1], dense[1], least)
    close(grad, truth[2], dense[2].to(dtype), max(least, FLOOR[dtype]))


def loss_case(G: int, N: int, M: int, P: int, D: int, shift: float = 0.0) -> tuple[list[Tensor], list[Tensor]]:
    """Points and weights of gen, neg, pos."""
    offsets = (0.0, -0.5, 0.5)
    counts = (N, M, P)
    p = [points(G, c, D, shift=shift + o, seed=n) for n, (c, o) in enumerate(zip(counts, offsets, strict=True))]
    return p, [weights(G, c, seed=5 + n) + (0.1 if n == 0 else 0.0) for n, c in enumerate(counts)]


@FEW
@given(
    N=st.integers(1, 40),
    M=st.integers(0, 20),
    P=st.integers(1, 40),
    D=st.integers(1, 70),
    floor=st.sampled_from([0.0, 1e-6]),
)
@example(N=64, M=16, P=64, D=65, floor=0.0)
@example(N=16, M=0, P=16, D=4, floor=1e-6)
@example(N=16, M=3, P=10, D=200, floor=1e-6)  # distances are kept for phase 2
@example(N=16, M=3, P=10, D=520, floor=0.0)  # and for phase 3, where programs share a group
@example(N=1, M=1, P=1, D=1, floor=0.0)
@example(N=1, M=0, P=5, D=33, floor=1e-6)
def test_loss_over_ragged_shapes(N, M, P, D, floor):
    p, w = loss_case(2, N, M, P, D)
    assert plan_of(p) is not None
    check_loss(p, w, floor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_16_bit_points(dtype):
    check_loss(*loss_case(2, 20, 5, 17, 40), 1e-6, dtype)


def test_loss_far_from_the_origin():
    """1e3 away, where float32 keeps 4 digits of a difference of 1: no more is lost on the way."""
    p, w = loss_case(2, 20, 5, 17, 40, shift=1e3)
    check_loss([t.float().double() for t in p], w, 0.0)


@pytest.mark.parametrize("D", [5, 40])
def test_loss_of_coinciding_points(D):
    p, w = loss_case(2, 12, 6, 14, D)
    p[0][:, 3] = p[0][:, 4]
    p[2][:, :5] = p[0][:, :5] + 1e-3 * p[2][:, :5]
    p[1][:, 0] = p[0][:, 0]
    check_loss(p, w, 0.0)


@pytest.mark.parametrize("who", [0, 1, 2], ids=["gen", "neg", "pos"])
def test_loss_with_one_outlier(who):
    p, w = loss_case(2, 12, 6, 14, 40)
    p[who][:, 0] = 1e4
    check_loss(p, w, 1e-6, rtol=1e-5)


@pytest.mark.parametrize(("D", "far"), [(5, 1e8), (40, 1e8), (150, 1e7), (150, 1e8)])
def test_loss_with_a_far_target_of_no_weight(D, far):
    """It takes no digits from the others, whatever side it is on."""
    p, w = loss_case(3, 12, 6, 14, D)
    for side in range(3):
        p[side][side, 2] *= far
        w[side][side, 2] = 0.0
    check_loss(p, w, 1e-6, rtol=1e-5)


def test_loss_without_weight():
    """All weights of one side 0: no field, and nothing is NaN."""
    p, w = loss_case(2, 12, 6, 14, 20)
    w[2].zero_()
    check_loss(p, w, 0.0)


def strided(t: Tensor, T: int) -> Tensor:
    """``[L·T, n, …]`` as ``[L, T, n, …]`` that lies in memory as ``[L, n + 2, T, … + 3]``, the rest of which is NaN."""
    t = t.unflatten(0, (-1, T)).transpose(1, 2)
    buffer = t.new_full((t.shape[0], t.shape[1] + 2, T, *(size + 3 for size in t.shape[3:])), float("nan"))
    view = buffer[:, 1:-1, :, : t.shape[3]] if t.dim() == 4 else buffer[:, 1:-1]
    return view.copy_(t).transpose(1, 2)


@pytest.mark.parametrize("D", [7, 40, 160])
def test_loss_of_maps_with_strides(D):
    """As feature maps come, side by side with others and with weights that are all the same number: bit by bit what
    contiguous ones give, and the gradient lies as gen does."""
    spec, cases = LossSpec(R_LIST, 1e-6), [loss_case(G, 12, 3, 7, D) for G in (4, 2)]
    incoming = [points(len(p[0]), seed=8).float().to(DEVICE) for p, _ in cases]
    results = []
    for lay_out in (strided, lambda t, T: t.unflatten(0, (-1, T)).contiguous()):
        maps = []
        for p, w in cases:
            ones = w[1].new_ones(1, 1, 1).expand(len(p[0]) // 2, 2, 3).to(DEVICE, torch.float32)
            gen, neg, pos = (lay_out(t.to(DEVICE, torch.float32), 2) for t in p)
            of_gen, of_pos = (lay_out(t.to(DEVICE, torch.float32), 2) for t in (w[0], w[2]))
            maps.append(LossMap((gen, neg, pos), (of_gen, ones, of_pos)))
        means, kept = zip(*triton_backend.loss_scale(spec, maps), strict=True)
        scale = torch.cat([of_map[:, 0] / of_map[:, 1] for of_map in means])
        states, moments, _ = zip(*triton_backend.loss_moments(spec, maps, kept, scale, None), strict=True)
        factors = torch.stack([m.double().mean(0).diagonal() for m in moments]).rsqrt()
        grads = triton_backend.loss_gradient(spec, maps, states, scale, factors, incoming)
        assert all(
            grad.stride() == torch.empty_like(of_map.gen).stride() for grad, of_map in zip(grads, maps, strict=True)
        )
        results.append([scale, *moments, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_loss_is_the_same_every_time():
    given = loss_case(2, 20, 5, 17, 40)
    first, second = (phases(given, points(2, seed=8), 0.0, "triton", on_device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("maps", "D", "of_launch"), [(3, 20, (1, 2)), (5, 120, (1, 4, 16)), (2, 520, (1, 4))])
def test_loss_of_maps_that_share_launches(monkeypatch, maps, D, of_launch):
    """Bit by bit what each gives alone, whatever its number of groups and its neighbours in the list."""
    monkeypatch.setattr(batch, "MAPS_OF_LAUNCH", of_launch)
    cases = [loss_case(1 + n % 2, 15, 3, 7, D, shift=n) for n in range(maps)]
    cases.insert(1, loss_case(2, 12, 0, 5, D))  # of another shape
    incoming = [points(p[0].shape[0], seed=n).float() for n, (p, _) in enumerate(cases)]
    p, w = ([[on_device(t) for t in of_map] for of_map in tensors] for tensors in zip(*cases, strict=True))
    together = loss_phases("triton", p, w, incoming, R_LIST, 1e-6)
    for n in range(len(cases)):
        alone = loss_phases("triton", [p[n]], [w[n]], [incoming[n]], R_LIST, 1e-6)
        assert torch.equal(alone[0][0], together[0][n])
        assert torch.equal(alone[1][0], together[1][n]) and torch.equal(alone[2][0], together[2][n])


# With many dimensions, phase 1 keeps the products of all targets, and the moments come from those.


def kept_case(N, M, P, D, shift=0.0):
    p, w = loss_case(2, N, M, P, D, shift)
    assert plan_of(p).floats_kept
    return p, w


@pytest.mark.parametrize(
    "N, M, P, D, floor",
    [
        (16, 0, 16, 90, 0.0),
        (64, 16, 64, 256, 1e-6),
        (40, 7, 23, 301, 0.0),
        (11, 3, 1, 257, 1e-6),
        (1, 1, 1, 1760, 0.0),  # no fewer dimensions keep the products of so few points
        (13, 5, 30, 513, 1e-6),
        (13, 5, 30, 2081, 1e-6),  # phase 1 by several programs for a group
    ],
)
def test_loss_from_kept_products(N, M, P, D, floor):
    check_loss(*kept_case(N, M, P, D), floor)


def test_loss_kept_products_far_from_the_origin():
    p, w = kept_case(20, 5, 17, 240, shift=1e3)
    check_loss([t.float().double() for t in p], w, 0.0)


def test_loss_kept_products_of_coinciding_points():
    p, w = kept_case(12, 6, 14, 150)
    p[0][:, 3] = p[0][:, 4]
    p[2][:, :5] = p[0][:, :5] + 1e-3 * p[2][:, :5]
    p[1][:, 0] = p[0][:, 0]
    check_loss(p, w, 0.0)


@pytest.mark.parametrize("width", [0.3, 0.1, 0.01] if EVERY_KERNEL else [0.3, 0.01])
def test_loss_kept_products_of_two_clusters(width):
    """Forces much shorter than the targets, whose products cancel."""
    p, w = kept_case(12, 6, 14, 150)
    p = [width * t for t in p]
    for t in p:
        t[:, ::2] += points(1, 150, seed=77)
    check_loss(p, w, 1e-6)


@pytest.mark.parametrize(
    "who, which, coinciding", [(0, 0, False), (0, 0, True), (0, 3, False), (1, 0, False), (1, 3, True), (2, 0, True)]
)
def test_loss_kept_products_with_one_outlier(who, which, coinciding):
    p, w = kept_case(12, 6, 14, 150)
    p[who][:, which] = 1e4
    if coinciding:
        p[2][:, 5:8] = p[0][:, 5:8] * (1 + 1e-4)
        p[0][:, 9] = p[0][:, 8]
    check_loss(p, w, 1e-6, rtol=1e-5)


@pytest.mark.parametrize("D", [50, 150])
def test_loss_with_the_smallest_blocks(monkeypatch, D):
    """As where shared memory suffices for no others."""

    def start(kernel, grid, *args, configuration, **options):
        *_, smallest = launch.reduced(configuration)
        kernel[grid](*args, **options, **smallest)

    monkeypatch.setattr(autotune, "start", start)
    p, w = loss_case(2, 40, 6, 14, D)
    p[2][:, :5] = p[0][:, 30:35] * (1 + 1e-3)  # pairs so close that kept products do not serve
    check_loss(p, w, 1e-6)


@pytest.mark.parametrize(("shared_bytes", "R", "served"), [(8_000, 1, True), (8_000, 3, False), (232_448, 9, False)])
def test_loss_with_little_shared_memory_or_many_R(monkeypatch, shared_bytes, R, served):
    monkeypatch.setattr(launch, "limits", lambda device: launch.Limits(amd=False, shared_bytes=shared_bytes))
    p, w = loss_case(2, 12, 6, 14, 150)
    found = plan_of(p, R_LIST * (R // 3) or R_LIST[:1])
    assert (found is not None and not found.floats_kept) == served
    check_loss(p, w, 1e-6, R_list=R_LIST * (R // 3) or R_LIST[:1])


# The family of fields


MEMBERS = {  # with statistics of their own, and at how many dimensions: where the paths through the kernels part
    "paper": (Field(), {}, 40),
    "row": (Field(coupling="row", weights="kernel"), {"scale": "group", "scale_self_pairs": False}, 200),
    "split row": (Field("l2_sq", "row", "split", affinity_floor=1e-3), {"normalize": None}, 40),
    "two_sided": (Field("l2_sq", weights="kernel", mask_self=2.0), {"scale": 30.0, "normalize": "group"}, 520),
    "split two_sided": (Field(sides="split", include_self=False), {"scale": "group", "normalize": "group"}, 200),
    "sinkhorn": (Field(coupling="sinkhorn", weights="marginal"), {"normalize": "group_mean"}, 200),
    "split sinkhorn": (Field("l2_sq", "sinkhorn", "split", 5, "kernel", False), {"scale": "group"}, 520),
    "floored sinkhorn": (Field("l2", "sinkhorn", "split", 3, "marginal", affinity_floor=1e-3), {}, 5),
}


@pytest.mark.parametrize("member", MEMBERS)
def test_loss_of_members_of_the_family(member):
    field, options, of_member = MEMBERS[member]
    for D in (5, 40, 200, 520) if EVERY_KERNEL else (of_member,):
        check_member(field, "triton", (2, 16, 3, 10), D, options, [0.2, 0.5], dtype=torch.float32)


@pytest.mark.parametrize("sides", ["joint", "split"])
def test_loss_where_factors_of_sinkhorn_leave_the_range(sides):
    field = Field("l2", "sinkhorn", sides, 8, "kernel")
    check_member(field, "triton", (1, 9, 3, 8), 3, {"scale": 1.0}, [0.1], far=3.0, dtype=torch.float32)


@pytest.mark.parametrize("field", [Field(weights="kernel"), Field(coupling="row", sides="split", weights="kernel")])
def test_loss_of_samples_with_nothing_left(field):
    """A lone sample without itself, and in one of the groups only data that are left out: no field, nothing is NaN."""
    gen, pos = (points(2, n, 5, seed=n).float().to(DEVICE).requires_grad_(n == 1) for n in (1, 3))
    weight = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.5, 0.0]], device=DEVICE)
    loss, info = drift_loss(gen, pos, None, None, weight, R_list=R_LIST, field=field, scale=1.0, backend="triton")
    loss.sum().backward()
    assert not loss.any() and not gen.grad.any()
    assert not info["sum_neg"].any() and not info["sum_pos"][:, 0].any() and info["sum_pos"][:, 1].all()
    assert not info["log_row_sums"][:, 0].any() and info["log_mass"][:, 0].max() < -1e4


@pytest.mark.parametrize(("scale", "normalize"), [("group", "global"), ("global", "group"), ("group", "group")])
def test_loss_of_lists_with_statistics_of_groups(scale, normalize):
    """Maps of one shape in a launch and one of another between them: every group finds its own scale and λ."""
    cases = [loss_case(2, 12, 3, 7, 20), loss_case(1, 9, 0, 5, 20), loss_case(1, 12, 3, 7, 20, shift=1.0)]
    results = []
    for backend, dtype, device in (("triton", torch.float32, DEVICE), ("reference", torch.float64, "cpu")):
        gen, neg, pos = ([p[n].to(device, dtype, copy=True) for p, _ in cases] for n in range(3))
        for of_map in gen:
            of_map.requires_grad_()
        options = {"scale": scale, "normalize": normalize, "backend": backend}
        losses, _ = drift_loss(gen, pos, neg, R_list=R_LIST, **options)
        sum((n + 1) * loss.sum() for n, loss in enumerate(losses)).backward()
        results.append([t.detach().cpu().double() for t in (*losses, *[of_map.grad for of_map in gen])])
    for ours, truth in zip(*results, strict=True):
        assert rms(ours - truth) < 1e-5 * rms(truth)


# Forms A and B


def check_field(N: int, M: int, D: int, counts: list[int], spec: AffinitySpec, weighted: bool, **special) -> None:
    """``counts`` are those of the tensors of keys. ``close_pairs``: the last keys are near queries; ``same_values``:
    keys are the values; ``strided``: points are slices of something larger."""
    q, k, v = points(2, N, D, seed=1), points(2, M, D, seed=2), points(2, M, D, seed=3)
    if spec.has_self:
        k[:, :N] = q
    if special.get("close_pairs"):
        k[:, -N // 2 :] = q[:, : k[:, -N // 2 :].shape[1]] * (1 + 1e-3)
    w = weights(2, M, seed=4) if weighted else None

    def sums(backend, to) -> list[Tensor]:
        """num about the origin, den, and ``s^-½`` of softmaxes that sum to s, of rows and columns."""
        keys, values = (list(to(t).split(counts, 1)) for t in (k, v))
        num, den, *stats, centre = backend.affinity_sums(
            spec, to(q), keys, None if special.get("same_values") else values, None if w is None else to(w)
        )
        num = num.double() + centre.double()[:, None, None] * den.double().unsqueeze(-1)
        base = 2.0 if backend is affinity else math.e
        return [num, den, *(of[:, :, 1] * base ** (of[:, :, 0] * -0.5) for of in stats)]

    def where_they_lie(t: Tensor) -> Tensor:
        """Float32, and where points are ``strided``, rows apart and in a transposed order of problems."""
        if t.dim() < 3 or not special.get("strided"):
            return on_device(t)
        apart = on_device(torch.full((t.shape[1], 2, t.shape[0], t.shape[2]), torch.nan))
        apart[:, 1] = t.transpose(0, 1)
        return apart[:, 1].transpose(0, 1)

    truth, dense = (sums(cpu, lambda t, dtype=dtype: t.to(dtype)) for dtype in (torch.float64, torch.float32))
    for mine, exact, same_dtype in zip(sums(affinity, where_they_lie), truth, dense, strict=True):
        close(mine, exact, same_dtype)


@FEW
@given(
    N=st.integers(1, 40),
    others=st.integers(1, 40),
    D=st.integers(1, 70),
    joint=st.booleans(),
    weighted=st.booleans(),
    logit=st.sampled_from(LOGITS),
    floor=st.sampled_from([0.0, 1e-3]),
)
@example(N=64, others=64, D=33, joint=False, weighted=False, logit="gaussian", floor=0.0)
@example(N=1, others=1, D=1, joint=True, weighted=True, logit="laplace", floor=1e-3)
@example(N=32, others=32, D=40, joint=True, weighted=True, logit="laplace", floor=0.0)
def test_field_over_ragged_shapes(N, others, D, joint, weighted, logit, floor):
    """Form A: one side, no self pairs. Form B: both sides, key i < N is query i; there may be no further negatives."""
    spec = AffinitySpec("laplace" if joint else logit, (0.5, 1.0, 3.0), 0.7, floor, joint, 1 + joint)
    counts = [N, others // 2, others - others // 2] if joint else [others]
    check_field(N, sum(counts), D, counts, spec, weighted, same_values=weighted)


@pytest.mark.parametrize("D", [5, 40])
def test_field_of_close_pairs(D):
    spec = AffinitySpec("laplace", (0.5,), has_self=True, sides=2)
    check_field(12, 40, D, [12, 8, 20], spec, True, close_pairs=True)


@pytest.mark.parametrize("D", [5, 40])
@pytest.mark.parametrize("same_values", [False, True])
def test_field_of_points_where_they_lie(D, same_values):
    spec = AffinitySpec("laplace", (0.5,), has_self=True, sides=2)
    check_field(12, 33, D, [12, 0, 21], spec, True, strided=True, same_values=same_values)


def test_field_copies_nothing(monkeypatch):
    """Nothing is made but the results, whose kernel is not launched here."""
    made = []

    class Observer(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made.append(str(function))
            return function(*args, **kwargs or {})

    monkeypatch.setattr(autotune, "start", lambda *args, **options: None)
    x, pos = torch.empty(7, 2, 30).transpose(0, 1), torch.empty(5, 2, 40)[:, :, 5:35].transpose(0, 1)
    with Observer():
        affinity.affinity_sums(AffinitySpec("laplace", (1.0,), has_self=True, sides=2), x, [x, pos], None, None)
    assert set(made) == {"aten.new_empty.default"}


def test_field_with_everything_masked():
    """A lone query whose only negative is itself: that side is 0, whatever the floor."""
    q, pos = map(on_device, (points(2, 1, 5, seed=1), points(2, 3, 5, seed=2)))
    spec = AffinitySpec("laplace", (1.0,), floor=1e-3, has_self=True, sides=2)
    num, den, *_ = affinity.affinity_sums(spec, q, [q, pos], None, None)
    assert not num[:, :, 0].any()
    assert not den[:, :, 0].any()
    assert den[:, :, 1].all()


@pytest.mark.parametrize("block, times", NEIGHBOURS if EVERY_KERNEL else NEIGHBOURS[::3])
def test_blocks_that_autotuning_may_choose(monkeypatch, block, times):
    def start(kernel, grid, *args, configuration, **options):
        other = configuration | {block: int(times * configuration.get(block, 0))}
        allowed = other in autotune.neighbours(configuration, grid, LIMITS)
        kernel[grid](*args, **options, **(other if allowed else configuration))

    monkeypatch.setattr(autotune, "start", start)
    check_loss(*loss_case(2, 16, 3, 10, 50), 1e-6)  # moments from weighted sums
    check_loss(*loss_case(2, 16, 3, 10, 200), 1e-6)  # and from kept products
    check_field(16, 40, 70, [16, 12, 12], AffinitySpec("laplace", (1.0,), has_self=True, sides=2), True)


def test_fits():
    for counts, fits in {(64, 32, 64): True, (32, 0, 200): True, (65, 0, 16): False, (64, 0, 300): False}.items():
        assert (plan_of(loss_case(1, *counts, 1)[0]) is not None) == fits, counts
    gen, neg, pos = (torch.empty(1, 1, 64, 1) for _ in range(3))
    other_negatives = LossSpec(R_LIST, 0.0, include_self=False)
    assert plan.plan_of(other_negatives, LossMap((gen, neg, pos), (gen, neg, pos))) is not None
    assert group.fits_field(64, 32, 17)
    assert not group.fits_field(64, 32, 33)
    assert not group.fits_field(16, 65)
