"""``pytest benchmarks/ --benchmark-only``: a group for each form and shape, a row for each contender.

On the GPU where there is one, else on the CPU; the groups are the same.
"""

import pytest

from .cases import CASES, Case, our_contenders
from .measure import default_device, peak_extra_memory, synchronised

DEVICE = default_device()


@pytest.mark.parametrize("contender", ["eager", "compile", *our_contenders(DEVICE)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench(benchmark, medians, case: Case, contender: str):
    benchmark.group = case.name
    call = synchronised(case.call(contender, case.inputs(DEVICE)), DEVICE)
    call()  # compiles
    benchmark.extra_info["peak_extra_bytes"] = peak_extra_memory(call, DEVICE)
    benchmark.extra_info["algorithmic_bytes"] = case.bytes
    benchmark.extra_info["flops"] = case.flops
    benchmark(call)
    medians[case, contender] = benchmark.stats.stats.median
    benchmark.extra_info["times_faster_than_eager"] = medians[case, "eager"] / medians[case, contender]
