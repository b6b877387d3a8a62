"""What only a GPU can show, for every usable GPU backend: right results at the sizes of a training step and in every
way that PyTorch runs work on a GPU, and memory that stays within its bounds."""

import pytest
import torch
from cases import DTYPES, check, compute_V_inputs, field_inputs, loss_inputs, relative_error, run

import drift_ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

COUNTS = {"N": 64, "P": 64, "M": 16}  # of the paper's ablation

# Forms in every regime: groups as in training, of few and of many features; ragged ones; one large problem.
FORMS = {
    "compute_V groups": (drift_ops.compute_V, compute_V_inputs(**COUNTS, D=256, groups=(5,)), {"sigma": 16.0}),
    "compute_V large": (drift_ops.compute_V, compute_V_inputs(1300, 1100, 900, 40), {"sigma": 6.0}),
    "drift_field groups": (
        drift_ops.drift_field, field_inputs(**COUNTS, D=256, groups=(5,)), {"temperature": (1.0, 5.0)}
    ),
    "drift_field large": (
        drift_ops.drift_field, field_inputs(1300, 1100, 900, 40, weighted=True), {"temperature": (0.5, 2.0)}
    ),
    "drift_loss few groups": (drift_ops.drift_loss, loss_inputs(**COUNTS, D=4096, G=3), {}),
    "drift_loss many groups": (drift_ops.drift_loss, loss_inputs(**COUNTS, D=64, G=700), {}),
    "drift_loss ragged": (drift_ops.drift_loss, loss_inputs(50, 70, 3, 250, G=5, weighted=True), {}),
    "drift_loss large": (drift_ops.drift_loss, loss_inputs(1300, 1100, 300, 40, G=2), {}),
}  # fmt: skip
every_form = pytest.mark.parametrize("name", FORMS)


@pytest.fixture(params=["triton", "cuda"])
def gpu_backend(request):
    status = drift_ops.backends()[request.param]
    if not status.usable:
        pytest.skip(f"backend {request.param!r}: {status.reason}")
    return request.param


def on_gpu(tensors, dtype=torch.float32, device="cuda"):
    return {name: t.to(device, dtype) for name, t in tensors.items()}


def output_and_gradients(function, tensors, options, backend):
    """Tensors by name, by calls that do not look at a value: they can be captured in a graph."""
    result = function(**tensors, **options, backend=backend)
    output, info = result if isinstance(result, tuple) else (result, {})
    leaves = {name: t for name, t in tensors.items() if t.requires_grad}
    gradients = torch.autograd.grad(output.square().sum(), list(leaves.values()), allow_unused=True)
    found = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return {"output": output.detach(), **info, **found}


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert value.isfinite().all(), name
        assert torch.equal(value, expected[name]), name


@every_form
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_reference(gpu_backend, name, dtype):
    function, tensors, options = FORMS[name]
    check(function, tensors, options, dtype, gpu_backend)


@every_form
def test_tf32_where_the_user_allows_it(gpu_backend, name):
    """Three digits are left, of ten bits and of sums in float32."""
    function, tensors, options = FORMS[name]
    truth = run(function, on_gpu(tensors, torch.float64, "cpu"), options, "reference")
    torch.set_float32_matmul_precision("high")
    try:
        ours = run(function, on_gpu(tensors), options, gpu_backend)
    finally:
        torch.set_float32_matmul_precision("highest")
    for key, value in ours.items():
        assert relative_error(value.cpu(), truth[key]) < 1e-2, key


@every_form
def test_same_bits_every_time(gpu_backend, name):
    function, tensors, options = FORMS[name]
    first = run(function, on_gpu(tensors), options, gpu_backend)
    for _ in range(5):
        assert_same(run(function, on_gpu(tensors), options, gpu_backend), first)


@every_form
def test_cuda_graph(gpu_backend, name):
    """Forward and backward, captured once, compute on what the inputs hold when they are replayed."""
    function, tensors, options = FORMS[name]
    leaves = {name: t.requires_grad_() for name, t in on_gpu(tensors).items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles
            output_and_gradients(function, leaves, options, gpu_backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = output_and_gradients(function, leaves, options, gpu_backend)
    for factor in (1.0, 0.75):
        with torch.no_grad():
            for key, t in on_gpu(tensors).items():
                leaves[key].copy_(t if key.startswith("weight") else t * factor)
        graph.replay()
        assert_same(captured, output_and_gradients(function, leaves, options, gpu_backend))


@every_form
def test_stream_of_the_caller(gpu_backend, name):
    """The inputs get their values late, on another stream: work on the default one would not wait for them."""
    function, tensors, options = FORMS[name]
    values = on_gpu(tensors)
    expected = run(function, values, options, gpu_backend)
    late = {key: torch.full_like(t, float("nan")) for key, t in values.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # cycles
        for key, t in values.items():
            late[key].copy_(t)
        leaves = {key: t.requires_grad_() for key, t in late.items()}
        ours = output_and_gradients(function, leaves, options, gpu_backend)
    torch.cuda.synchronize()
    assert ours["output"].isfinite().all()
    assert torch.equal(ours["output"], expected["output"])
    assert all(value.isfinite().all() for value in ours.values())


@every_form
def test_compiled_with_cuda_graphs(gpu_backend, name):
    """Inductor adds up in another order than eager PyTorch, so it is the truth that the results are held against."""
    torch._dynamo.reset()
    function, tensors, options = FORMS[name]
    compiled = torch.compile(
        lambda **leaves: function(**leaves, **options, backend=gpu_backend), fullgraph=True, mode="reduce-overhead"
    )

    def step(backend, **leaves):
        if backend == "reference":
            return function(**leaves, **options, backend=backend)
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(**leaves)

    for factor in (1.0, 1.0, 0.75, 0.75):  # records, then replays
        moved = {key: t if key.startswith("weight") else t * factor for key, t in tensors.items()}
        check(step, moved, {}, torch.float32, gpu_backend)


@every_form
def test_no_call_waits_for_the_gpu(gpu_backend, name):
    function, tensors, options = FORMS[name]
    leaves = {key: t.requires_grad_() for key, t in on_gpu(tensors).items()}
    output_and_gradients(function, leaves, options, gpu_backend)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output_and_gradients(function, leaves, options, gpu_backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
@every_form
def test_second_gpu(gpu_backend, name):
    """Tensors that are not on the current device are computed where they are."""
    function, tensors, options = FORMS[name]
    first = run(function, on_gpu(tensors), options, gpu_backend)
    second = run(function, on_gpu(tensors, device="cuda:1"), options, gpu_backend)
    assert all(value.device == torch.device("cuda:1") for value in second.values())
    assert torch.cuda.current_device() == 0
    for key, value in second.items():
        torch.testing.assert_close(value.cpu(), first[key].cpu())


# Memory, in bytes that torch allocates. Tensors are filled as they are made, and small ones come in blocks of 512 bytes
# and more: bounds are not exact to the last megabyte.


def peak_above(call) -> int:
    """By how much memory peaks during the second of two calls."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def require_memory(size: float) -> None:
    if torch.cuda.mem_get_info()[0] < size:
        pytest.skip(f"less than {size / 1e9:.0f} GB are free")


STREAMED = {
    "compute_V": lambda x, pos, backend: drift_ops.compute_V(x, pos, x, backend=backend),
    "drift_field": lambda x, pos, backend: drift_ops.drift_field(x, pos, temperature=1.6, backend=backend),
}


@pytest.mark.parametrize("form", STREAMED)
def test_memory_of_a_large_problem(gpu_backend, form):
    """N = P = 131,072, D = 256, forward: a gigabyte beyond the inputs, where one dense matrix would take 69 or 137."""
    require_memory(4e9)
    x, pos = (torch.randn(131072, 256, device="cuda") for _ in range(2))
    with torch.no_grad():
        assert peak_above(lambda: STREAMED[form](x, pos, gpu_backend)) < 1e9


@pytest.mark.parametrize("form", STREAMED)
def test_memory_of_a_large_backward(gpu_backend, form):
    """Some times the points (here 8 MB a set), where a dense matrix takes 4 GB."""
    require_memory(2e9)
    leaves = [torch.randn(32768, 64, device="cuda", requires_grad=True) for _ in range(2)]

    def forward_and_backward():
        return torch.autograd.grad(STREAMED[form](*leaves, gpu_backend).square().sum(), leaves)

    assert peak_above(forward_and_backward) < 30 * leaves[0].nbytes


@pytest.mark.parametrize("D", [256, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_the_loss(gpu_backend, dtype, D):
    """Forward and backward: at most a tenth more than the inputs and the gradient. ``cuda`` works on float32 copies of
    16-bit inputs, and its gradient is one before it is rounded."""
    require_memory(4e9)
    shapes = [(512, count, D) for count in COUNTS.values()]
    gen, pos, neg = (torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes)
    gen.requires_grad_()
    inputs = gen.nbytes + pos.nbytes + neg.nbytes

    def forward_and_backward():
        loss, _ = drift_ops.drift_loss(gen, pos, neg, backend=gpu_backend)
        return torch.autograd.grad(loss, gen, torch.ones_like(loss))

    converted = 4 * (gen.numel() + pos.numel() + neg.numel() + gen.numel())
    allowed = inputs + converted if gpu_backend == "cuda" and dtype != torch.float32 else inputs + gen.nbytes
    assert inputs + peak_above(forward_and_backward) < 1.1 * allowed
