"""What every backend for GPUs has to do and only a GPU can show: the same bits again, streams,
graphs, compilation."""

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from accuracy import Target, assert_accurate
from case import Case
from larger import DEVICE, DRY, IMAGES, LARGER, TYPICAL, WIDTHS
from torch import Tensor

from gross_kernels import GroSSConv2d, series_conv2d, use_backend
from gross_kernels.dispatch import BACKENDS
from gross_kernels.geometry import Geometry
from gross_kernels.series import Series

GATED = LARGER["64@56, groups of 64"]


@pytest.fixture(params=["cuda", "triton"], autouse=True)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend under test, forced for the public functions too."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def backend(name: str) -> ModuleType:
    return BACKENDS[name]


@pytest.fixture
def target(name: str) -> Target:
    return Target(name, DEVICE, torch.bfloat16, torch.float32)


def cases(name: str) -> list[Case]:
    """All of them, or those in the one memory format that the CUDA kernels serve."""
    served = [case for case in LARGER.values() if case.channels_last or name == "triton"]
    return served[-1:] if DRY else served


def test_same_bits_in_repeated_runs(name: str, target: Target) -> None:
    """Catches races and a reduction whose order is left to chance."""
    for case in cases(name):
        arguments = target.arguments(case)
        expected = target.run(case, *arguments)
        for _ in range(1 if DRY else 5):
            assert all(map(torch.equal, target.run(case, *arguments), expected))


def test_memory_is_poisoned(name: str, target: Target) -> None:
    """Catches elements of results and scratch that are never written."""
    for case in cases(name):
        arguments = target.arguments(case)
        torch.use_deterministic_algorithms(True)
        try:
            results = target.run(case, *arguments)
        finally:
            torch.use_deterministic_algorithms(False)
        assert_accurate(results, case, arguments)


def function(case: Case) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The public function of a case, and its leaves."""
    input, terms, gates, _ = case.tensors(torch.bfloat16, torch.float32, DEVICE)
    leaves = [t.requires_grad_() for t in (input, *terms, *([] if gates is None else [gates]))]
    stride, padding, dilation = case.geometry

    def call(input: Tensor, *rest: Tensor, active: int | Tensor = case.active) -> Tensor:
        terms, gates = (rest[:-1], rest[-1]) if case.gated else (rest, None)
        return series_conv2d(
            input, terms, active, stride=stride, padding=padding, dilation=dilation, gates=gates
        )

    return call, leaves


def test_autograd_and_memory_format() -> None:
    """Catches gradients that autograd refuses, and formats other than the input's."""
    call, leaves = function(GATED)
    output = call(*leaves)
    assert output.is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(output)
    results = torch.autograd.grad(output, leaves, grad)
    with use_backend("reference"):
        expected = torch.autograd.grad(call(*leaves), leaves, grad)
    for result, value in zip(results, expected, strict=True):
        assert result.dtype == value.dtype
        torch.testing.assert_close(
            result.float(), value.float(), rtol=0, atol=0.02 * value.abs().max().item()
        )


def test_graph_capture() -> None:
    """Catches synchronisation or allocation outside the graph's pool, and a graph that notices
    another ``active``."""
    call, leaves = function(TYPICAL)
    count = torch.tensor(2)

    def step() -> tuple[Tensor, ...]:
        output = call(*leaves, active=count)
        return output, *torch.autograd.grad(output.square().sum(), leaves, materialize_grads=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(2):
        torch.manual_seed(seed)
        with torch.no_grad():
            leaves[0].normal_()
        expected = [value.clone() for value in step()]
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, captured, expected))
    count = torch.tensor(3)
    before = captured[0].clone()
    graph.replay()
    assert torch.equal(captured[0], before)
    assert not torch.equal(step()[0], before)


def test_other_streams(backend: ModuleType) -> None:
    """Catches a launch on the default stream: it would not wait for what the current stream still
    computes."""
    input, terms, _, _ = TYPICAL.tensors(torch.bfloat16, torch.float32, DEVICE)
    expected = backend.forward(input, Series(terms, 3), TYPICAL.geometry)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(input)
        torch.cuda._sleep(100_000_000)
        late.copy_(input)
        result = backend.forward(late, Series(terms, 3), TYPICAL.geometry)
    stream.synchronize()
    assert torch.equal(result, expected)


@pytest.mark.skipif(
    torch.cuda.device_count() < 2 and not DRY, reason="requires a GPU, and a second one"
)
def test_other_devices(backend: ModuleType) -> None:
    """Catches a launch on the current device instead of the tensors', and a plan of one device used
    on another."""
    for device in ("cpu",) if DRY else ("cuda:1", "cuda:0", "cuda:1"):
        input, terms, gates, _ = TYPICAL.tensors(torch.bfloat16, torch.float32, device)
        output = backend.forward(input, Series(terms, 3, gates), TYPICAL.geometry)
        assert output.device == input.device
        with use_backend("reference"):
            expected = series_conv2d(input, terms, 3, padding=1)
        torch.testing.assert_close(output, expected, rtol=0.02, atol=0.1)


def test_compile() -> None:
    """Catches a broken graph, a recompilation for another ``active``, and an ``active`` out of
    range that is used."""
    layer = GroSSConv2d(
        *WIDTHS, 3, padding=1, group_sizes=(1, 4, 16), device=DEVICE, dtype=torch.bfloat16
    )
    layer.to(memory_format=torch.channels_last)
    input = torch.randn(*IMAGES, device=DEVICE, dtype=torch.bfloat16).to(
        memory_format=torch.channels_last
    )
    # Inductor would compile for a minute, and nothing of ours.
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(input).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in (1, 4, 16):
            layer.group_size = size
            torch.testing.assert_close(compiled(input), layer(input), rtol=0.05, atol=0.05)
    terms = [torch.randn(WIDTHS[0], s, 3, 3, device=DEVICE, dtype=torch.bfloat16) for s in (1, 4)]
    call = torch.compile(
        lambda active: series_conv2d(input, terms, active, padding=1),
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(RuntimeError, match="active: got 3, accepted is 1 to 2"):
        call(torch.tensor(3))


def test_autocast() -> None:
    """Catches terms that autocast rounds one by one, and gradients of another dtype than the
    parameters'."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    layer = GroSSConv2d(*WIDTHS, 3, padding=1, group_sizes=(1, 4, 16), device=DEVICE)
    input = torch.randn(*IMAGES, device=DEVICE).to(memory_format=torch.channels_last)
    with use_backend("reference"):
        expected = layer(input)
    with torch.autocast(DEVICE, torch.bfloat16):
        output = layer(input)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(
        output.float(), expected, rtol=0, atol=0.03 * expected.abs().max().item()
    )
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_sum() -> None:
    """Catches a sum of pointwise weights that is not the reference's, or counts inactive terms."""
    terms = list(torch.randn(16, 300, 70, 1, 1, device=DEVICE))
    gates = torch.randn(16, device=DEVICE)
    for active in (1, 7, 16):
        result = torch.ops.gross.series_sum(terms, torch.tensor(active), gates)
        exact = sum(
            gate.double() * term.double() for gate, term in zip(gates[:active], terms, strict=False)
        )
        torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("channels_last", [True, False])
def test_more_elements_than_an_int_counts(
    name: str, backend: ModuleType, channels_last: bool
) -> None:
    """Catches offsets of 32 bits: the last of 2³¹ + 2²⁰ elements, in input and output."""
    if name == "cuda" and not channels_last:
        pytest.skip("the CUDA kernels serve channels-last memory alone")
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("requires a GPU with 24 GB free")
    side = 4 if DRY else 256
    batch = (2**8 if DRY else 2**31) // (16 * side * side) + 1
    format = torch.channels_last if channels_last else torch.contiguous_format
    input = torch.empty(
        batch, 16, side, side, device=DEVICE, dtype=torch.bfloat16, memory_format=format
    )
    input.normal_()
    terms = [torch.randn(16, s, 3, 3, device=DEVICE) for s in (1, 4)]
    output = backend.forward(input, Series(terms, 2), Geometry(padding=(1, 1)))
    for part in (slice(0, 1), slice(batch // 2, batch // 2 + 1), slice(batch - 1, batch)):
        with use_backend("reference"):
            expected = series_conv2d(input[part], terms, 2, padding=1)
        torch.testing.assert_close(output[part], expected, rtol=0.02, atol=0.05)
