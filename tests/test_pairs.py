"""The sums over pairs of the CPU backend against their dense definition, and the family that is composed of them."""

import math

import pytest
import torch
from cases import DTYPES, check, every_other, field_inputs, padded, points, relative_error, transposed, unaligned
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pair_cases import CASES, Case, check_pairs, converted, inputs, results

import drift_ops
from drift_ops import Field, reference
from drift_ops.ops import rows
from drift_ops.spec import PairGradients, PairProblem, PairSpec, PairWeights

cpu = pytest.importorskip("drift_ops.cpu")
if cpu.load_error:
    pytest.skip(cpu.load_error, allow_module_level=True)

F64, F32 = torch.float64, torch.float32
COUPLINGS = [("row", "kernel"), ("row", "affinity"), ("two_sided", "kernel"), ("two_sided", "affinity")]
COUPLINGS += [("sinkhorn", "kernel"), ("sinkhorn", "marginal")]
COUNTS = st.sampled_from([1, 2, 5, 17, 64, 65, 130, 300])
DIMS = st.sampled_from([1, 2, 3, 8, 9, 16, 33, 100])
MULTIPLY_ADDS = 1e6  # of all distances; above it an example is dropped, to keep the dense truth quick
# Gradients that nearly cancel keep the roundings of each of the sums they are composed of, unlike in the dense form.
SLACK = {"rtol": 1e-5, "atol": 1e-6}

property_test = settings(
    max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)  # fmt: skip

# More pairs than one thread is given, in several tiles both ways, of which the last ones are not full.
LARGE = Case(PairSpec("l2", True, math.inf, 2, 1e-8), 2, 700, (700, 150, 201), 19, (2.0, 8.0), True, True)
MANY = Case(PairSpec("l2_sq", True, 1.0), 60, 40, (40, 30), 24, (30.0,), True)


@st.composite
def drawn_cases(draw) -> Case:
    cost, D, N, has_self = draw(st.sampled_from(["l2", "l2_sq"])), draw(DIMS), draw(COUNTS), draw(st.booleans())
    keys = ([N] if has_self else []) + draw(st.lists(COUNTS, min_size=0 if has_self else 1, max_size=3))
    self_cost, floor = draw(st.sampled_from([math.inf, 0.0, 2.0])), draw(st.sampled_from([0.0, 1e-4]))
    spec = PairSpec(cost, has_self, self_cost, draw(st.integers(1, 2)), floor, draw(st.sampled_from([0.0, 0.5])))
    scale = D**0.5 if cost == "l2" else float(D)
    widths = tuple(scale * width for width in draw(st.sampled_from([(0.5,), (0.2, 1.0, 4.0)])))
    G, units, weighted = draw(st.sampled_from([1, 2, 5])), draw(st.booleans()), draw(st.booleans())
    assume(G * N * sum(keys) * D < MULTIPLY_ADDS)
    return Case(spec, G, N, tuple(keys), D, widths, units, weighted)


def readable(layout):
    """Points in a ``layout`` as the ops pass them on, with a last dimension that is contiguous."""
    return lambda t: rows(layout(t)) if t.dim() > 2 else layout(t)


@property_test
@given(case=drawn_cases(), dtype=st.sampled_from([F64, F32]), layout=st.sampled_from([torch.clone, padded, unaligned]))
def test_pairs(case, dtype, layout):
    check_pairs(cpu, case, dtype, readable(layout))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("instruction_set", ["avx512", "avx2", "portable"])
def test_instruction_sets(instruction_set, name, dtype):
    if instruction_set not in cpu._cpu.supported():
        pytest.skip(f"this machine has no {instruction_set}")
    best = cpu._cpu.chosen()
    cpu._cpu.choose(instruction_set)
    try:
        check_pairs(cpu, CASES[name], dtype, readable(transposed))
    finally:
        cpu._cpu.choose(best)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_large(dtype):
    check_pairs(cpu, LARGE, dtype, torch.clone)


@pytest.mark.parametrize("case", [LARGE, MANY], ids=["large", "many"])
def test_the_same_whatever_the_number_of_threads(case):
    given, usual, found = converted(inputs(case), torch.Tensor.float), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(results(cpu, case.spec, given, torch.clone))
    finally:
        torch.set_num_threads(usual)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


@pytest.mark.parametrize("count", [0, 4])
def test_nothing_is_left(count):
    """Arrays without keys, and keys that all have a potential of ∞."""
    q, keys, ones = points(1, 3, 2), [points(1, count, 2), points(1, 0, 2)], torch.ones(1, dtype=F64)
    alpha, beta = torch.zeros(1, 1, 3, dtype=F64), torch.full((1, 1, count), math.inf, dtype=F64)
    problem = PairProblem(PairSpec("l2", sides=2, floor=1e-2), q, keys, ones, None)
    assert (cpu.log_sums(problem, beta, True) == -math.inf).all()
    assert (cpu.log_sums(problem, alpha + math.inf, False) == -math.inf).all()
    weights = PairWeights(alpha, beta, centre=q[:, 0])
    assert not any(t.any() for t in cpu.weighted_sums(problem, weights))
    incoming = PairGradients(points(1, 1, 2, 3, 2), points(1, 1, 2, 3), beta.nan_to_num(posinf=1.0))
    of_q, of_keys, *others = cpu.pair_gradients(problem, weights, incoming)
    assert not any(t.any() for t in (of_q, *of_keys, *others))


def test_logits_far_apart():
    """Sums of exponentials of which each alone is 0 or infinite in float32."""
    q, far, near = points(1, 40, 9).float(), points(1, 70, 9).float() + 50, points(1, 30, 9).float()
    potential = torch.linspace(-3e3, 3e3, 100).view(1, 1, -1)
    sums = {"rows": (None, True), "columns": (None, False)}
    sums |= {"shifted rows": (potential, True), "shifted columns": (potential[..., :40], False)}
    for cost, width in (("l2", 0.01), ("l2_sq", 0.1)):
        problem = PairProblem(PairSpec(cost), q, [far, near], torch.tensor([width]), None)
        exact = PairProblem(problem.spec, q.double(), [far.double(), near.double()], problem.width.double(), None)
        for name, (by, by_row) in sums.items():
            truth = reference.log_sums(exact, None if by is None else by.double(), by_row)
            assert relative_error(cpu.log_sums(problem, by, by_row), truth) < 1e-6, name


# The family


@st.composite
def fields(draw) -> Field:
    coupling, weights = draw(st.sampled_from(COUPLINGS))
    cost, sides = draw(st.sampled_from(["l2", "l2_sq"])), draw(st.sampled_from(["joint", "split"]))
    include_self, mask_self = draw(st.booleans()), draw(st.sampled_from([True, False, 2.0]))
    return Field(cost, coupling, sides, 3, weights, include_self, mask_self, draw(st.sampled_from([0.0, 1e-6])))


def family_inputs(N: int, P: int, M: int, D: int, groups: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Tensors of ``drift_field``, none of the weights 0."""
    tensors = field_inputs(N, P, M, D, groups, weighted=True)
    return tensors | {name: t + 0.1 for name, t in tensors.items() if name.startswith("weight")}


def temperatures(field: Field, D: int, *widths: float) -> list[float]:
    return [width * (D**0.5 if field.cost == "l2" else D) for width in widths]


@property_test
@given(
    field=fields(), N=COUNTS, P=COUNTS, M=COUNTS, D=DIMS, groups=st.sampled_from([(), (3,)]),
    dtype=st.sampled_from(DTYPES), layout=st.sampled_from([transposed, every_other, padded, unaligned]),
)  # fmt: skip
def test_drift_field(field, N, P, M, D, groups, dtype, layout):
    assume(math.prod(groups) * N * (N + P + M) * D < MULTIPLY_ADDS)
    options = {"field": field, "temperature": temperatures(field, D, 0.3, 1.0)}
    slack = {"atol": 1e-12} if dtype == F64 else SLACK
    check(drift_ops.drift_field, family_inputs(N, P, M, D, groups), options, dtype, "cpu", layout, **slack)


@pytest.mark.parametrize("coupling", ["row", "two_sided", "sinkhorn"])
@pytest.mark.parametrize("cost", ["l2", "l2_sq"])
def test_far_from_the_origin(coupling, cost):
    """Points 1e4 away from the origin are as far from each other as before, and no digit is lost."""
    field = Field(cost, coupling, iterations=3, weights="kernel")
    tensors = family_inputs(20, 30, 10, 12, (2,))
    tensors |= {name: tensors[name] + 1e4 for name in ("x", "pos", "neg")}
    options = {"field": field, "temperature": temperatures(field, 12, 0.3, 1.0)}
    check(drift_ops.drift_field, tensors, options, F32, "cpu", **SLACK, dense_factor=0)


@pytest.mark.parametrize(("coupling", "weights"), COUPLINGS)
@pytest.mark.parametrize("sides", ["joint", "split"])
@pytest.mark.parametrize("cost", ["l2", "l2_sq"])
def test_derivatives(coupling, weights, sides, cost):
    field = Field(cost, coupling, sides, 2, weights)
    temperature = torch.tensor(temperatures(field, 2, 0.6), dtype=F64)
    given = {name: t.requires_grad_() for name, t in (family_inputs(3, 4, 2, 2) | {"temperature": temperature}).items()}

    def of_tensors(*tensors):
        return drift_ops.drift_field(**dict(zip(given, tensors, strict=True)), field=field, backend="cpu")

    assert torch.autograd.gradcheck(of_tensors, tuple(given.values()), atol=1e-7, rtol=1e-4)
