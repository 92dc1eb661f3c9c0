"""The ways to run a layer: the dense convolution that it amounts to, by value; which way is chosen,
and what is said of it."""

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from whole_layer import (
    SIZES,
    SMALL,
    TYPICAL,
    Arguments,
    Calls,
    Layer,
    Named,
    assert_accurate,
    calls_of,
    every_dtype,
    every_one,
    float32_and_bfloat16,
    made,
)

from gross_kernels import (
    GroSSConv2d,
    bottleneck,
    dispatch,
    expand,
    layer_times,
    use_fused,
    use_layer,
)
from gross_kernels.bottleneck import Weights
from gross_kernels.geometry import Geometry
from gross_kernels.layer_times import LayerCall
from gross_kernels.program import Step, Steps, define


@pytest.fixture
def merged() -> Iterator[None]:
    """Layers run as dense convolutions."""
    with use_layer("merged"):
        yield


# Values -------------------------------------------------------------------------------------------


def output_of(layer: Layer, given: Arguments) -> Tensor:
    case = layer.middle
    weights = Weights(*given.series, given.bias, torch.tensor(case.active), given.gates)
    return bottleneck.merged(given.input, weights, case.geometry, layer.relu)


def run(layer: Layer, given: Arguments) -> Named:
    """Output and gradients, as ``Layer.run`` returns them."""
    given = given.map(lambda tensor: tensor.detach().requires_grad_())
    output = output_of(layer, given)
    return {"output": output.detach(), **given.grads(output, given.grad)}


@every_one
@float32_and_bfloat16
def test_values(layer: Layer, dtype: torch.dtype) -> None:
    """Catches a wrong output or gradient, weights that are merged in 16 bits, and gates or terms
    that are left out. One rounding of the kernel takes the place of two of the inner tensors."""
    layer = replace(layer, keep_inner=False)
    given = layer.arguments(dtype, torch.float32)
    assert_accurate(run(layer, given), layer, given)


@every_dtype
def test_values_by_dtype(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Catches terms or gates that are taken for float32, and sums of theirs in 16 bits."""
    given = TYPICAL.arguments(*dtypes)
    assert_accurate(run(TYPICAL, given), TYPICAL, given)


@pytest.mark.parametrize("layer", SMALL.values(), ids=SMALL)
def test_derivatives(layer: Layer) -> None:
    """Catches gradients of first and second order that are none of the output's."""
    given = layer.arguments(torch.float64)
    leaves = [leaf.requires_grad_() for leaf in given.leaves().values()]
    counts = [len(terms) for terms in given.series]

    def call(*leaves: Tensor) -> Tensor:
        rest = iter(leaves)
        input = next(rest)
        bias = next(rest) if layer.bias else None
        gates = next(rest) if layer.middle.gated else None
        series = tuple([next(rest) for _ in range(count)] for count in counts)
        return output_of(layer, replace(given, input=input, series=series, bias=bias, gates=gates))

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


OPTIONS = {
    "strided": {"stride": 2, "padding": (0, 2)},
    "dilated": {"dilation": (2, 1), "padding": "same"},
    "circular": {"padding_mode": "circular"},
    "padded after": {"padding": 4, "padding_mode": "reflect"},
    "one by two": {"kernel_size": (1, 2), "padding": 0, "bias": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_layers(size: int, options: dict) -> None:
    """Catches a way that computes another layer, of any geometry: values, layout and gradients."""
    given = {"kernel_size": 3, "padding": 1, "group_sizes": SIZES, "width": (16, 32)} | options
    layer = GroSSConv2d(20, 18, dtype=torch.float64, **given)
    layer.group_size = size
    input = torch.randn(2, 20, 6, 5, dtype=torch.float64).to(memory_format=torch.channels_last)

    def step() -> list[Tensor]:
        output = layer(input)
        return [output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))]

    with use_layer("parts"):
        expected = step()
    with use_layer("merged"):
        results = step()
        names = calls_of(layer, input).names
    assert results[0].stride() == expected[0].stride()
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-10, atol=1e-10)
    convolutions = 2 if given.get("padding") == 4 else 1
    assert names.count("aten::convolution") == convolutions


def test_weight_of_a_layer() -> None:
    """Catches a second formula: what a layer says of its kernel and what the way uses."""
    layer = made(dtype=torch.float64)
    assert torch.equal(layer.weight, bottleneck.merged_kernel(layer._weights(None)))


@pytest.mark.usefixtures("merged")
def test_compile_once_for_every_size() -> None:
    """Catches a graph break, and a kernel whose group size is burnt into the graph."""
    layer, input = made(), torch.randn(2, 20, 6, 5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input), layer(input))
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in SIZES:
            layer.group_size = size
            torch.testing.assert_close(compiled(input), layer(input))


@pytest.mark.usefixtures("merged")
def test_autocast_merges_in_float32() -> None:
    """Catches products of the weights in 16 bits: the kernel is rounded once."""
    layer, input = made(relu=False), torch.randn(2, 20, 6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(input)
        kernel = layer.weight
    assert output.dtype == torch.bfloat16
    assert kernel.dtype == torch.float32
    assert torch.equal(kernel, layer.weight)
    expected = F.conv2d(input.bfloat16(), kernel.bfloat16(), layer.bias.bfloat16(), padding=1)
    assert torch.equal(output, expected)


@pytest.mark.usefixtures("merged")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    """Catches a call that is computed again at the size that was set last."""
    layer, input = made(), torch.randn(2, 20, 6, 5, requires_grad=True)
    layer.group_size = 2
    expected = torch.autograd.grad(layer(input).sum(), input)
    output = checkpoint(layer, input, use_reentrant=reentrant).sum()
    layer.group_size = 8
    output.backward()
    torch.testing.assert_close(input.grad, *expected)


@pytest.mark.usefixtures("merged")
def test_memory_of_training() -> None:
    """Catches inner tensors that are kept for the backward pass: the input alone is, as by a dense
    convolution."""
    layer = GroSSConv2d(64, 64, 3, padding=1, group_sizes=(4, 32))
    input, kept = torch.randn(4, 64, 24, 24, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        layer(input)
    assert sum(count for count in kept if count > 64 * 64 * 9) == input.numel()


# The choice ---------------------------------------------------------------------------------------

HALF = LayerCall(200704, 200704, 64, 64, 64, 64, 4, 9, 2, "16", False)


def test_times_by_hand() -> None:
    """Catches a wrong number in the closed form: 64 channels, where memory is the limit of all but
    the dense convolution, and 256."""
    bytes_of_two_tensors = 200704 * 128 * 2
    parts = 5 * 2 + bytes_of_two_tensors / 4.3e6 * (1 + 1 / 0.9 + 1)
    merging = 5 * 2 + 2 * 9 * 64 * 64 * (4 + 64) / 67e6
    merged = merging + 2 + 2 * 200704 * 64 * 64 * 9 / 780e6
    pair = 5 * 2 + bytes_of_two_tensors / 4.3e6 * (1 + 1 / 0.8)
    assert layer_times.times(HALF) == pytest.approx(
        {"parts": parts, "merged": merged, "grouped_pointwise": pair}
    )
    trained = layer_times.times(HALF._replace(training=True))
    assert trained == pytest.approx({"parts": 3 * parts, "merged": 3 * merged})
    wide = HALF._replace(in_channels=512, width_in=512, width_out=512, out_channels=512)
    product = 2 + 2 * 200704 * 512 * 512 / 780e6
    middle = 2 + 200704 * 1024 * 2 / 4.3e6 / 0.9
    assert layer_times.times(wide)["parts"] == pytest.approx(4 + 2 * product + middle)
    # Two blocks of outputs make the grouped product twice.
    operations = 2 * 200704 * 512 * (2 * 9 * 16 / 0.8 + 512)
    assert layer_times.times(wide)["grouped_pointwise"] == pytest.approx(
        6 + product + 2 + operations / 780e6
    )
    assert "grouped_pointwise" not in layer_times.times(wide._replace(group_size=128))
    assert "grouped_pointwise" not in layer_times.times(wide._replace(precision="ieee"))


@pytest.mark.parametrize(
    ("training", "channels", "size", "way"),
    [
        (True, 64, 4, "merged"),
        (True, 64, 32, "merged"),
        (True, 256, 4, "parts"),
        (True, 512, 16, "parts"),
        (False, 64, 4, "merged"),
        (False, 128, 4, "grouped_pointwise"),
        (False, 256, 16, "grouped_pointwise"),
        (False, 256, 128, "parts"),
    ],
)
def test_choice_on_a_gpu(training: bool, channels: int, size: int, way: str) -> None:
    """Catches three convolutions where one is faster, and one where three are; and a sentence that
    names another way than the fastest of the times that it says."""
    layer = GroSSConv2d(channels, channels, 3, padding=1, device="meta")
    layer.group_size = size
    with torch.set_grad_enabled(training):
        said = layer.explain("cuda", images=64, input_size=56, dtype=torch.bfloat16)
    assert said.startswith(f"{way}: the fastest as predicted")
    words = said.replace(",", "").split()
    times = {words[i - 2]: int(words[i - 1]) for i, word in enumerate(words) if word == "µs"}
    pair = {"grouped_pointwise"} if not training and size <= 64 else set()
    assert set(times) == {"parts", "merged"} | pair
    assert min(times, key=lambda name: times[name]) == way


def test_small_maps_do_without_merging() -> None:
    """Catches a choice that does not count the work on the weights."""
    layer = GroSSConv2d(64, 64, 3, padding=1, device="meta")
    with torch.no_grad():
        large = layer.explain("cuda", dtype=torch.bfloat16)
        small = layer.explain("cuda", 7, images=1, dtype=torch.bfloat16)
    assert large.startswith("merged")
    assert small.startswith("grouped_pointwise")


@pytest.mark.parametrize(
    ("channels", "operator"),
    [(64, "aten::convolution"), (128, "gross::grouped_pointwise"), (256, "gross::series_conv2d")],
)
def test_layers_on_a_gpu(channels: int, operator: str) -> None:
    """Catches a layer that does not go the way that is said, on tensors without memory: merged at
    64 channels, in two kernels at 128, and in training by parts at 256."""
    with FakeTensorMode():
        layer = GroSSConv2d(
            channels, channels, 3, padding=1, device="cuda", dtype=torch.bfloat16, group_sizes=(4,)
        )
        input = torch.empty(64, channels, 56, 56, device="cuda", dtype=torch.bfloat16)
        with torch.set_grad_enabled(channels == 256), Calls() as calls:
            layer(input)
    convolutions = calls.names.count("aten::convolution")
    assert operator in calls.names
    assert convolutions == (2 if channels == 256 else 1)


def test_programs_on_a_gpu() -> None:
    """Catches a layer of a deployed network that runs as three convolutions, a bias, a sum and an
    activation."""
    step = Step(
        "layer", 0, residual=1, activation="relu", in_channels=8, width=(16, 16), group_size=4,
        out_channels=12, kernel_size=(3, 3), padding=(1, 1), weights=0, bias=3,
    )  # fmt: skip
    shapes = (16, 8, 1, 1), (16, 4, 3, 3), (12, 16, 1, 1), (12,), (2, 8, 5, 6), (2, 12, 5, 6)
    with FakeTensorMode():
        *weights, input, residual = (torch.empty(shape, device="cuda") for shape in shapes)
        with Calls() as calls:
            (result,) = define([input, residual], weights, Steps((step,), 2, (2,)))
        assert result.shape == residual.shape
        kinds = ("aten::conv", "aten::add", "aten::relu", "gross::")
        computed = [name for name in calls.names if name.startswith(kinds)]
        assert computed == ["aten::convolution", "gross::grouped_pointwise"]
        weights[0].requires_grad_()
        (result,) = define([input, residual], weights, Steps((step,), 2, (2,)))
        assert result.requires_grad


def test_layers_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a layer that goes its own way, or describes another call than the one that is made:
    both sizes, the dtype under autocast, and whether a backward pass may follow."""
    asked = []

    def choose(device: str, call: LayerCall) -> dispatch.Choice:
        asked.append((device, call))
        return dispatch.Choice("merged", "")

    monkeypatch.setattr(dispatch, "choose_layer", choose)
    layer, device = made(stride=2), torch.device("cuda", 0)
    input = SimpleNamespace(shape=(3, 20, 9, 5), dtype=torch.float32, device=device)
    geometry = Geometry((2, 2), (1, 1), (1, 1))
    described = LayerCall(
        135, 45, 20, 16, 32, 18, 8, 9, 4, layer_times.multiplied(input.dtype), True
    )
    layer._way(input, geometry)
    with torch.no_grad():
        layer._way(input, geometry)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    assert layer._way(input, geometry) == "merged"
    assert asked == [
        ("cuda", described),
        ("cuda", described._replace(training=False)),
        ("cuda", described._replace(itemsize=2, precision="16")),
    ]


def test_nobody_asks_beyond_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches arithmetic at every call on the CPU, where one way is always the fastest."""
    monkeypatch.setattr(layer_times, "times", None)
    assert made().explain().startswith("fused: ")
    assert made().explain("meta").startswith("parts: ")


@pytest.mark.parametrize("way", dispatch.WAYS)
def test_forced(way: str) -> None:
    """Catches a forced way that is not taken, or not said."""
    layer, input = made(), torch.randn(1, 20, 4, 4)
    with use_layer(way):
        for device in ("cpu", "cuda"):
            name, _, reason = layer.explain(device).partition(": ")
            assert (name, "use_layer" in reason) == (way, True)
        assert "gross::bottleneck" not in calls_of(layer, input).names
        with use_fused(True):
            assert layer.explain().startswith("fused: ")
    assert "gross::bottleneck" in calls_of(layer, input).names


@pytest.mark.parametrize(
    ("fused", "way", "expected"),
    [
        ("", "", "fused"),
        ("1", "merged", "merged"),
        ("0", "", "parts"),
        ("0", "merged", "merged"),
        ("", "parts", "parts"),
    ],
)
def test_variables(fused: str, way: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a variable that is not read when the package is imported."""
    monkeypatch.setenv("GROSS_KERNELS_FUSED", fused)
    monkeypatch.setenv("GROSS_KERNELS_LAYER", way)
    assert imported_again(monkeypatch).choose_layer("cpu").name == expected


def test_variable_with_another_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a typing error that is ignored."""
    monkeypatch.setenv("GROSS_KERNELS_LAYER", "dense")
    with pytest.raises(ValueError, match="GROSS_KERNELS_LAYER: got 'dense', accepted are 'parts'"):
        imported_again(monkeypatch)


def imported_again(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A second copy of the module that reads the variables."""
    spec = importlib.util.spec_from_file_location("gross_kernels.dispatch_again", dispatch.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("channels", "way"), [(64, "merged"), (256, "parts")])
def test_one_graph_on_a_gpu(channels: int, way: str) -> None:
    """Catches a choice that breaks a graph, or is burnt into one graph for each group size or
    number of images; on tensors without memory."""
    graphs = []

    def note(graph: fx.GraphModule, _: object) -> fx.GraphModule:
        graphs.append([node.target for node in graph.graph.nodes])
        return graph

    with FakeTensorMode():
        layer = GroSSConv2d(
            channels, channels, 3, padding=1, device="cuda", dtype=torch.bfloat16, group_sizes=SIZES
        )
        call = torch.compile(layer, backend=note, fullgraph=True, dynamic=True)
        for images, size in ((8, 4), (16, 1), (24, 8)):
            layer.group_size = size
            input = torch.empty(images, channels, 56, 56, device="cuda", dtype=torch.bfloat16)
            assert call(input).shape == input.shape
    (graph,) = graphs
    assert graph.count(torch.conv2d) == (1 if way == "merged" else 2)


# gross::grouped_pointwise -------------------------------------------------------------------------


def arguments_of_pair() -> tuple:
    """For the operator: 2 images, 12 inner channels in groups of 3 and 6, 7 outputs."""
    given = (
        torch.randn(2, 12, 6, 5).to(memory_format=torch.channels_last),
        [torch.randn(12, 3, 3, 2), torch.randn(12, 6, 3, 2)],
        [torch.randn(7, 12, 1, 1), torch.randn(7, 12, 1, 1)],
        torch.tensor(2),
        torch.rand(2),
    )
    epilogue = (torch.randn(7), torch.randn(2, 7, 3, 4), "prelu", torch.rand(1), True)
    return *given, [2, 1], [1, 0], [1, 1], *epilogue


def test_operator_keeps_its_contract() -> None:
    """Catches a shape, layout or dtype that another device would not return, and arguments that are
    written to."""
    torch.library.opcheck(
        torch.ops.gross.grouped_pointwise.default,
        arguments_of_pair(),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_operator_by_hand() -> None:
    """Catches terms, gates or an epilogue that the definition leaves out."""
    input, (r1, r2), (q1, q2), _, gates, *geometry, bias, residual, _, slopes, _ = given = (
        arguments_of_pair()
    )
    grouped = gates[0] * expand(r1, 6, 12) + gates[1] * r2
    middle = F.conv2d(input, grouped, None, *geometry, groups=2)
    last = F.conv2d(middle, gates[0] * q1 + gates[1] * q2, bias)
    expected = F.prelu(last, slopes) + residual
    torch.testing.assert_close(torch.ops.gross.grouped_pointwise(*given), expected)
    alone = torch.ops.gross.grouped_pointwise(*given[:3], torch.tensor(1), *given[4:])
    middle = F.conv2d(input, gates[0] * r1, None, *geometry, groups=4)
    expected = F.prelu(F.conv2d(middle, gates[0] * q1, bias), slopes) + residual
    torch.testing.assert_close(alone, expected)


def test_operator_elsewhere() -> None:
    """Catches autocast that leaves the input wide, images that vmap mixes up, and operations that
    are not counted."""
    given = [*arguments_of_pair()]
    given[9] = None
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.ops.gross.grouped_pointwise(*given).dtype == torch.bfloat16
    images = torch.randn(3, 2, 12, 6, 5)
    mapped = torch.vmap(lambda image: torch.ops.gross.grouped_pointwise(image, *given[1:]))(images)
    for image, result in zip(images, mapped, strict=True):
        torch.testing.assert_close(torch.ops.gross.grouped_pointwise(image, *given[1:]), result)
    with FlopCounterMode(display=False) as counter:
        torch.ops.gross.grouped_pointwise(*given)
    assert counter.get_total_flops() == 2 * 2 * 12 * (12 * 6 * 6 + 7 * 12)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (8, torch.ones(6), r"bias: got \(6,\), accepted is \(7,\)"),
        (9, torch.ones(2, 7, 3, 5), r"residual: got \(2, 7, 3, 5\) of torch.float32, accepted is"),
        (9, torch.ones(2, 7, 3, 4).double(), "residual: got .* of torch.float64, accepted is"),
        (10, "gelu", "activation: got 'gelu', accepted are 'none', 'relu'"),
        (11, torch.ones(2), r"slopes: got \(2,\), accepted are \(1,\) and \(7,\)"),
        (11, None, "slopes: got None, accepted are"),
    ],
)
def test_operator_refuses(position: int, value: object, message: str) -> None:
    """Catches an epilogue that the kernel would read beyond its end, or leave out."""
    given = [*arguments_of_pair()]
    given[position] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.gross.grouped_pointwise(*given)
