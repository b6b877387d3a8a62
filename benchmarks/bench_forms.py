"""``pytest benchmarks/ --benchmark-only``: a group for each form and shape, a row for each contender."""

import pytest

from .cases import CASES, Case
from .measure import peak_extra_memory


@pytest.mark.parametrize("contender", ["eager", "compile", "ours"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench(benchmark, medians, case: Case, contender: str):
    benchmark.group = case.name
    call = case.contenders()[contender]
    call()  # compiles
    benchmark.extra_info["peak_extra_bytes"] = peak_extra_memory(call)
    benchmark.extra_info["algorithmic_bytes"] = case.bytes
    benchmark.extra_info["flops"] = case.flops
    benchmark(call)
    medians[case, contender] = benchmark.stats.stats.median
    benchmark.extra_info["times_faster_than_eager"] = medians[case, "eager"] / medians[case, contender]
