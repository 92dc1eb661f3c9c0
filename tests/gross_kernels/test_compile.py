"""torch.compile, torch.export, autocast and the FLOP counter treat the operators as they treat
torch's own."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gross_kernels import GroSSConv2d, SeriesConv2d, expand, series_conv2d

SIZES = (1, 2, 4, 8)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    """Starts every test without compiled graphs, and leaves none behind."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function: Callable, **options: object) -> Callable:
    """Traced and differentiated as by inductor, but run by the same eager kernels: no compiler, the
    same bits."""
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


class Network(nn.Module):
    """Two decomposed layers with what stands between them in a network."""

    def __init__(self) -> None:
        super().__init__()
        self.first = GroSSConv2d(8, 16, 3, padding=1, group_sizes=SIZES)
        self.normalise = nn.BatchNorm2d(16)
        self.second = GroSSConv2d(16, 8, (3, 2), stride=2, padding=1, group_sizes=(2, 4, 8, 16))
        self.classify = nn.Linear(8, 5)

    def forward(self, input: Tensor) -> Tensor:
        return self.classify(self.second(F.relu(self.normalise(self.first(input)))).mean((2, 3)))

    def configure(self, index: int) -> None:
        """Set every layer to its ``index``-th group size."""
        for layer in (self.first, self.second):
            layer.group_size = layer.group_sizes[index]


def step(function: Callable, network: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Output and the gradients of all parameters of one forward and backward."""
    network.zero_grad()
    output = function(*inputs)
    output.square().sum().backward()
    return [output.detach(), *(p.grad for p in network.parameters())]


def assert_equal(results: list[Tensor], expected: list[Tensor], tolerance: float = 0) -> None:
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=tolerance, atol=tolerance)


def terms_of(*sizes: int) -> list[Tensor]:
    return [torch.randn(8, s, 3, 3, requires_grad=True) for s in sizes]


# torch.compile ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("active", [None, 2, torch.tensor(3)], ids=["all", "int", "tensor"])
def test_function(active: int | Tensor | None, gated: bool) -> None:
    """Catches a check or conversion of arguments that breaks the graph."""
    input, terms = torch.randn(2, 8, 6, 5, requires_grad=True), terms_of(*SIZES)
    gates = torch.randn(4, requires_grad=True) if gated else None

    def call(input: Tensor) -> Tensor:
        return series_conv2d(input, terms, active, stride=(2, 1), padding=1, gates=gates)

    leaves = [input, *terms, *([gates] if gated else [])]
    expected, result = call(input), compiled(call)(input)
    assert torch.equal(result, expected)
    grads = [torch.autograd.grad(output.square().sum(), leaves) for output in (result, expected)]
    assert_equal(*grads)


def test_function_does_not_recompile_for_another_active() -> None:
    """Catches an ``active`` tensor whose value is burnt into the graph."""
    input, terms = torch.randn(2, 8, 6, 5), terms_of(*SIZES)
    call = compiled(lambda active: series_conv2d(input, terms, active))
    assert torch.equal(call(torch.tensor(4)), series_conv2d(input, terms, 4))
    with torch.compiler.set_stance("fail_on_recompile"):
        for active in (1, 2, 3):
            assert torch.equal(call(torch.tensor(active)), series_conv2d(input, terms, active))


def test_function_with_other_ints() -> None:
    """Catches an int ``active`` that fails once torch makes it symbolic."""
    input, terms = torch.randn(2, 8, 6, 5), terms_of(*SIZES)
    call = compiled(lambda active: series_conv2d(input, terms, active))
    for active in (1, 2, 3, 4, 1):
        assert torch.equal(call(active), series_conv2d(input, terms, active))


def test_compiled_active_out_of_range() -> None:
    """Catches a read beyond the terms where the Python check cannot know the value."""
    input, terms = torch.randn(2, 8, 6, 5), terms_of(*SIZES)
    call = compiled(lambda active: series_conv2d(input, terms, active))
    for active in (0, 5, -1):
        with pytest.raises(RuntimeError, match=f"active: got {active}, accepted is 1 to 4"):
            call(torch.tensor(active))


@pytest.mark.parametrize(
    ("kind", "padding", "padding_mode"),
    [
        (GroSSConv2d, 1, "zeros"),
        (GroSSConv2d, "same", "zeros"),
        (GroSSConv2d, "same", "circular"),
        (GroSSConv2d, 2, "reflect"),
        (GroSSConv2d, 4, "reflect"),  # after the first pointwise
        (SeriesConv2d, 1, "zeros"),
    ],
)
def test_layer(kind: type[nn.Module], padding: int | str, padding_mode: str) -> None:
    """Catches a layer that breaks the graph, or recompiles or keeps the old size when
    ``group_size`` is set."""
    layer = kind(8, 8, (3, 2), padding=padding, padding_mode=padding_mode, group_sizes=SIZES)
    input, call = torch.randn(2, 8, 6, 5), compiled(layer)
    assert_equal(step(call, layer, input), step(layer, layer, input))
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in (1, 4, 2, 8):
            layer.group_size = size
            assert_equal(step(call, layer, input), step(layer, layer, input))


def test_layers_change_their_sizes_alone() -> None:
    """Catches ``active`` tensors that layers share: a network would recompile when only one layer
    changes."""
    network = Network()
    input, call = torch.randn(2, 8, 6, 5), compiled(network)
    call(input)
    with torch.compiler.set_stance("fail_on_recompile"):
        for first, second in ((1, 16), (8, 4), (4, 8)):
            network.first.group_size, network.second.group_size = first, second
            assert_equal([call(input)], [network(input)], 1e-6)


def test_network_by_inductor() -> None:
    """Catches strides, dtypes or aliasing that inductor's generated code around the operators gets
    wrong."""
    network = Network()
    call = torch.compile(network, fullgraph=True)
    input = torch.randn(3, 8, 6, 5).to(memory_format=torch.channels_last)
    step(call, network, input)
    with torch.compiler.set_stance("fail_on_recompile"):
        for index in range(4):
            network.configure(index)
            assert_equal(step(call, network, input), step(network, network, input), 1e-4)


def test_other_image_sizes_without_recompilation() -> None:
    """Catches a fake kernel that specialises batch or image sizes."""
    layer = GroSSConv2d(8, 8, 3, padding=1, group_sizes=SIZES)
    call = compiled(layer, dynamic=True)
    call(torch.randn(2, 8, 6, 5))
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in ((3, 8, 9, 4), (5, 8, 7, 12)):
            input = torch.randn(shape)
            assert torch.equal(call(input), layer(input))


@pytest.mark.parametrize("wrap", [lambda layer: layer, compiled], ids=["eager", "compiled"])
def test_two_forwards_before_one_backward(wrap: Callable) -> None:
    """Catches a backward that uses the size set last instead of the size of its own forward."""
    layer = GroSSConv2d(8, 8, 3, padding=1, group_sizes=SIZES)
    input, call = torch.randn(2, 8, 6, 5), wrap(layer)
    expected = [torch.zeros_like(p) for p in layer.parameters()]
    for size in (2, 8):
        layer.group_size = size
        expected = [
            total + grad
            for total, grad in zip(expected, step(layer, layer, input)[1:], strict=True)
        ]
    layer.zero_grad()
    loss = torch.zeros(())
    for size in (2, 8):
        layer.group_size = size
        loss = loss + call(input).square().sum()
    layer.group_size = 1
    loss.backward()
    assert_equal([p.grad for p in layer.parameters()], expected, 1e-4)


# Autocast ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda layer: layer, compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", [GroSSConv2d, SeriesConv2d])
def test_autocast(kind: type[nn.Module], wrap: Callable) -> None:
    """Catches anything but the input that autocast casts, such as terms that are rounded one by
    one: the bits are those of the same call with a cast input."""
    layer = kind(8, 8, 3, padding=1, group_sizes=SIZES)
    input, call = torch.randn(2, 8, 6, 5), wrap(layer)
    grad, parameters = torch.randn(2, 8, 6, 5, dtype=torch.bfloat16), list(layer.parameters())
    for size in (8, 2):
        layer.group_size = size
        expected = layer(input.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            result = call(input)
        assert result.dtype == torch.bfloat16
        assert torch.equal(result, expected)
        gradients = [torch.autograd.grad(output, parameters, grad) for output in (result, expected)]
        assert all(gradient.dtype == torch.float32 for gradient in gradients[0])
        assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("wrap", [lambda function: function, compiled], ids=["eager", "compiled"])
def test_autocast_rounds_the_sum_once(wrap: Callable) -> None:
    """Catches autocast that casts every term: here the terms cancel, and their rounding would
    not."""
    input, large, small = (
        torch.randn(2, 8, 6, 5),
        100 * torch.randn(8, 4, 3, 3),
        torch.randn(8, 8, 3, 3),
    )
    terms = [large, small - expand(large, 8, 8)]
    with torch.autocast("cpu", torch.bfloat16):
        result = wrap(lambda input: series_conv2d(input, terms))(input)
    torch.testing.assert_close(
        result, F.conv2d(input.bfloat16(), small.bfloat16()), rtol=0.02, atol=0.1
    )


def test_autocast_leaves_float64_alone() -> None:
    """Catches autocast that casts float64, which torch's own convolutions leave as it is."""
    layer = SeriesConv2d(8, 8, 3, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(1, 8, 4, 4, dtype=torch.float64)).dtype == torch.float64


# torch.export -----------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 3])
def test_export(index: int) -> None:
    """Catches a network that cannot be exported, or whose exported program runs at another size."""
    network = Network().eval()
    network.configure(index)
    input = torch.randn(2, 8, 6, 5)
    shapes = {"input": {0: torch.export.Dim("batch")}}
    program = torch.export.export(network, (input,), dynamic_shapes=shapes)
    for batch in (input, torch.randn(5, 8, 6, 5)):
        assert torch.equal(program.module()(batch), network(batch))


def test_export_for_any_size_of_maps() -> None:
    """Catches a program that holds for maps of some sizes alone, because larger ones are padded
    before the first pointwise and smaller ones after it."""
    network = nn.Sequential(GroSSConv2d(8, 8, 7, padding=3, padding_mode="reflect"))
    sizes = {2: torch.export.Dim("rows", min=4), 3: torch.export.Dim("columns", min=4)}
    exported = torch.export.export(network, (torch.randn(2, 8, 12, 14),), dynamic_shapes=(sizes,))
    for size in ((4, 4), (5, 9), (30, 40)):
        input = torch.randn(2, 8, *size)
        assert_equal([exported.module()(input)], [network(input)], 1e-5)


def test_export_survives_a_file(tmp_path) -> None:
    """Catches an exported program that cannot be saved: a constant or an operator that does not
    serialise."""
    network = Network().eval()
    input = torch.randn(2, 8, 6, 5)
    torch.export.save(torch.export.export(network, (input,)), tmp_path / "network.pt2")
    assert torch.equal(torch.export.load(tmp_path / "network.pt2").module()(input), network(input))


# FLOP counter -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_flop_counter(size: int) -> None:
    """Catches a count that ignores the active size: in backward each gradient costs a forward, and
    the first two convolutions are computed again."""
    layer = GroSSConv2d(8, 16, 3, stride=2, padding=1, bias=False, group_sizes=SIZES)
    layer.group_size = size
    with FlopCounterMode(display=False) as folded:
        layer.fold()(torch.randn(2, 8, 7, 7))
    with FlopCounterMode(display=False) as counter:
        output = layer(torch.randn(2, 8, 7, 7, requires_grad=True))
        forward = counter.get_total_flops()
        output.sum().backward()
    assert forward == folded.get_total_flops() == 2 * 2 * layer.macs(7)
    again = 2 * 2 * (7 * 7 * 8 * 8 + 4 * 4 * 8 * size * 9)
    assert counter.get_total_flops() == 3 * forward + again
