"""Two ranks, each with half the groups, against one rank with all of them. Gloo, two processes for all tests."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import device_of, loss_inputs
from processes import meeting, results_of
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import drift_ops
from drift_ops import Field

GROUPS = 4


def maps_of(ranks: int, rank: int) -> dict[str, list[torch.Tensor]]:
    """Two feature maps; a rank has its share of the groups, and a rank beyond the last none."""
    maps = [loss_inputs(6, 5, 3, 10, GROUPS, weighted=True), loss_inputs(9, 4, 2, 33, GROUPS, weighted=True)]
    share = slice(rank * GROUPS // ranks, (rank + 1) * GROUPS // ranks)
    return {name: [tensors[name][share].float().contiguous() for tensors in maps] for name in maps[0]}


OPTIONS = {
    "release": {},
    "coupled": {"field": Field(coupling="sinkhorn", weights="kernel", iterations=4), "normalize": "group_mean"},
    "of groups": {"field": Field(sides="split"), "scale": "group", "normalize": "group"},
}


def loss_of_maps(ranks, rank, process_group, backend, options=OPTIONS["release"]):
    maps = maps_of(ranks, rank)
    for gen in maps["gen"]:
        gen.requires_grad_()
    losses, infos = drift_ops.drift_loss(**maps, process_group=process_group, backend=backend, **options)
    gradients = torch.autograd.grad(sum(loss.sum() for loss in losses), maps["gen"])
    return [loss.detach() for loss in losses], infos, gradients


def training_step(ranks, rank, process_group, backend, wrap=lambda module: module):
    """Gradient of a generator's parameters under the mean loss over this rank's groups."""
    torch.manual_seed(0)
    layer = wrap(torch.nn.Linear(10, 10))
    maps = {name: of_maps[0] for name, of_maps in maps_of(ranks, rank).items()}
    loss, _ = drift_ops.drift_loss(**(maps | {"gen": layer(maps["gen"])}), process_group=process_group, backend=backend)
    field = drift_ops.drift_field(layer(maps["gen"]), maps["fixed_pos"], temperature=1.0, backend=backend)
    (loss.mean() + field.square().mean()).backward()
    return [parameter.grad for parameter in layer.parameters()]


def worker(rank: int, directory: Path, backends: list[str]) -> dict[str, tuple]:
    results = {}
    with meeting(rank, 2, directory):
        for backend in backends:
            with profile(activities=[ProfilerActivity.CPU]) as trace:
                loss_of_maps(2, rank, dist.group.WORLD, backend)
            collectives = sum(event.name.startswith("gloo:") for event in trace.events())
            of_family = {name: loss_of_maps(2, rank, dist.group.WORLD, backend, OPTIONS[name]) for name in OPTIONS}
            step = training_step(2, rank, dist.group.WORLD, backend, DistributedDataParallel)
            results[backend] = (of_family, collectives, step, loss_of_maps(1, rank, dist.group.WORLD, backend))
    return results


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """Results of both ranks, by backend: ``[(loss, collectives, training step, loss of one rank) of each rank]``."""
    backends = [n for n, status in drift_ops.backends().items() if status.usable and device_of(n) == "cpu"]
    ranks = results_of(worker, 2, tmp_path_factory.mktemp("ranks"), backends)
    return {backend: [results[backend] for results in ranks] for backend in backends}


@pytest.fixture
def cpu_backend(backend):
    if device_of(backend) != "cpu":
        pytest.skip("gloo is tested on the CPU")
    return backend


@pytest.mark.parametrize("name", OPTIONS)
def test_loss_over_ranks(two_ranks, cpu_backend, name):
    losses, infos, gradients = loss_of_maps(1, 0, None, cpu_backend, OPTIONS[name])
    ranks = [of_family[name] for of_family, *_ in two_ranks[cpu_backend]]
    for k in range(2):
        torch.testing.assert_close(torch.cat([rank[0][k] for rank in ranks]), losses[k])
        torch.testing.assert_close(torch.cat([rank[2][k] for rank in ranks]), gradients[k])
        for key, expected in infos[k].items():
            found = [rank_infos[k][key] for _, rank_infos, _ in ranks]
            if expected.dim():  # of groups, which a rank has its share of
                found = [torch.cat(found, min(1, expected.dim() - 1))]
            for value in found:
                torch.testing.assert_close(value.detach(), expected.detach())


def test_a_rank_without_groups(two_ranks, cpu_backend):
    """It has the statistics of the others, empty losses and gradients, and keeps nobody waiting."""
    expected = loss_of_maps(1, 0, None, cpu_backend)
    (*_, first), (*_, (losses, infos, gradients)) = two_ranks[cpu_backend]
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(infos, expected[1])
    assert [loss.shape for loss in losses] == [(0,), (0,)]
    assert [grad.shape for grad in gradients] == [(0, *grad.shape[1:]) for grad in expected[2]]


def test_all_maps_cost_two_collectives(two_ranks, cpu_backend):
    for _, collectives, *_ in two_ranks[cpu_backend]:
        assert 1 <= collectives <= 2


def test_distributed_data_parallel(two_ranks, cpu_backend):
    expected = training_step(1, 0, None, cpu_backend)
    for _, _, step, _ in two_ranks[cpu_backend]:
        torch.testing.assert_close(step, expected)
