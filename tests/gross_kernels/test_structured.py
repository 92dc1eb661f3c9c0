"""Structured layers against dense ones with the composite kernel."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from gross_kernels import StructuredConv2d, StructuredConv3d, StructuredLinear, use_backend
from gross_kernels.composite import Operations

CONVOLUTIONS = {2: (StructuredConv2d, F.conv2d), 3: (StructuredConv3d, F.conv3d)}


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A structured convolution and an input of it, in float64."""
    axes = draw(st.sampled_from([2, 2, 3]))
    numbers = lambda most, least=1: tuple(  # noqa: E731
        draw(st.lists(st.integers(least, most), min_size=axes, max_size=axes))
    )
    groups = draw(st.integers(1, 3))
    channels = draw(st.integers(1, 7))
    kernel = numbers(4 if axes == 3 else 5)
    structure = (draw(st.integers(1, channels)), tuple(draw(st.integers(1, k)) for k in kernel))
    dilation = numbers(2)
    padding = draw(st.one_of(st.just("valid"), st.just("same"), st.just(numbers(3, 0))))
    mode = draw(st.sampled_from(["zeros", "zeros", "circular", "reflect", "replicate"]))
    stride = (1,) * axes if padding == "same" else numbers(3)
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [max(4, each) + draw(st.integers(0, 3)) for each in extent]
    layer = CONVOLUTIONS[axes][0](
        groups * channels,
        groups * draw(st.integers(1, 3)),
        kernel,
        stride,
        padding,
        dilation,
        groups,
        draw(st.booleans()),
        mode,
        dtype=torch.float64,
        structure=structure,
    )
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    input = torch.randn(*batch, groups * channels, *size, dtype=torch.float64)
    if batch and draw(st.booleans()):
        input = input.transpose(1, -1).contiguous().transpose(1, -1)
    return layer, input


def dense(layer: nn.Module, input: Tensor) -> Tensor:
    """The layer as torch's own module with the composite kernel, differentiable."""
    kind = nn.Conv2d if isinstance(layer, StructuredConv2d) else nn.Conv3d
    conv = kind(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
        layer.dilation, layer.groups, layer.bias is not None, layer.padding_mode,
        dtype=torch.float64,
    )  # fmt: skip
    parameters = {"weight": layer.dense_weight()}
    if layer.bias is not None:
        parameters["bias"] = layer.bias
    return torch.func.functional_call(conv, parameters, (input,))


@settings(deadline=None, max_examples=150)
@given(layers())
def test_convolutions_equal_the_dense_ones(case):
    """Catches stride, padding or dilation on the wrong half of the layer, in images and volumes,
    and gradients that do not reach a weight."""
    layer, input = case
    torch.manual_seed(0)
    output, expected = layer(input), dense(layer, input)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(layer.to_dense()(input), expected)
    slope = torch.randn_like(expected)
    leaf = input.clone().requires_grad_()
    parameters = [leaf, *layer.parameters()]
    got = torch.autograd.grad(layer(leaf), parameters, slope)
    torch.testing.assert_close(got, torch.autograd.grad(dense(layer, leaf), parameters, slope))


@settings(deadline=None, max_examples=60)
@given(layers())
def test_structured_weights_are_converted_without_loss(case):
    """Catches a projection that is none: a dense layer whose kernel is structured has residual 0,
    and the same weights and outputs."""
    layer, input = case
    axes = len(layer.kernel_size)
    conv = (nn.Conv2d if axes == 2 else nn.Conv3d)(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
        layer.dilation, layer.groups, layer.bias is not None, layer.padding_mode,
        dtype=torch.float64,
    ).eval()  # fmt: skip
    with torch.no_grad():
        conv.weight.copy_(layer.dense_weight())
        if layer.bias is not None:
            conv.bias.copy_(layer.bias)
    structure = (layer.structure[0], layer.structure[1:])
    made = type(layer).from_dense(conv, structure)
    assert made.residual < 1e-14
    assert not made.training
    torch.testing.assert_close(made.weight, layer.weight)
    torch.testing.assert_close(made(input), conv(input))


@pytest.mark.parametrize(("features", "structure"), [(7, 3), (7, 7), (7, 1), (40, 33)])
def test_linear_layers_equal_the_dense_ones(features, structure):
    """Catches rows that run into one another, and shapes that are lost."""
    layer = StructuredLinear(features, 5, dtype=torch.float64, structure=structure)
    for shape in ((features,), (4, features), (2, 3, features), (0, features)):
        input = torch.randn(shape, dtype=torch.float64)
        expected = F.linear(input, layer.dense_weight(), layer.bias)
        torch.testing.assert_close(layer(input), expected)
        torch.testing.assert_close(layer.to_dense()(input), expected)
    assert torch.autograd.gradcheck(layer, torch.randn(2, features).double().requires_grad_())
    linear = nn.Linear(features, 5, dtype=torch.float64)
    linear.weight.data = layer.dense_weight().detach()
    torch.testing.assert_close(StructuredLinear.from_dense(linear, structure).weight, layer.weight)


@pytest.mark.parametrize("axes", [2, 3])
def test_gradients_of_first_and_second_order(axes):
    """Catches a backward pass that is not the forward pass's."""
    kind, _ = CONVOLUTIONS[axes]
    layer = kind(3, 2, 3, 1, 1, structure=(2, 2), dtype=torch.float64)
    input = torch.randn(1, 3, *[4] * axes, dtype=torch.float64, requires_grad=True)

    def call(input, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (input,))

    arguments = (input, *[p.detach().requires_grad_() for p in (layer.weight, layer.bias)])
    assert torch.autograd.gradcheck(call, arguments)
    assert torch.autograd.gradgradcheck(call, arguments)


def test_the_residual_is_reported():
    """Catches a residual of something else than W − Aα."""
    conv = nn.Conv2d(6, 4, 3, dtype=torch.float64)
    layer = StructuredConv2d.from_dense(conv, (4, 2))
    far = (conv.weight - layer.dense_weight()).norm() / conv.weight.norm()
    assert layer.residual == pytest.approx(far.item(), abs=1e-12)
    assert StructuredConv2d(6, 4, 3, structure=(4, 2)).residual is None


def test_fresh_layers_are_as_large_as_dense_ones():
    """Catches a draw whose outputs vanish, which no deep network would train from."""
    torch.manual_seed(0)
    for structure in ((64, 2), (32, 2), (8, 1)):
        weight = StructuredConv2d(64, 64, 3, structure=structure).dense_weight()
        ratio = weight.norm() / nn.Conv2d(64, 64, 3).weight.norm()
        assert ratio.item() == pytest.approx(1, rel=0.02)


def test_operations_are_counted():
    """Catches a count that is not what is done: multiplications of the small convolution alone,
    additions of both halves."""
    layer = StructuredConv2d(64, 32, 3, padding=1, bias=False, structure=(64, 2))
    small, large = layer.operations((10, 12))
    assert large == Operations(32 * 576 * 120, 32 * 575 * 120)
    assert small.multiplications == 32 * 256 * 120
    # Two columns: 10 × 13 sums of a channel; two rows: 11 × 13.
    assert small.additions == 32 * 255 * 120 + 64 * (10 * 13 + 11 * 13)
    layer = StructuredConv2d(64, 32, 3, 2, 1, bias=True, structure=(33, 1))
    small, large = layer.operations(8)
    assert small == Operations(32 * 33 * 16, 32 * 33 * 16 + 33 * (64 * 5 + 8 * 4 * 2 + 16 * 2))
    assert large == Operations(32 * 576 * 16, 32 * 576 * 16)
    assert StructuredLinear(8, 3, structure=5).operations() == (
        Operations(15, 15 + 5 * 2), Operations(24, 24)
    )  # fmt: skip


def test_drop_in():
    """Catches what nn.Conv2d can and the layer cannot: moving, casting, saving, printing, copies,
    autocast, memory formats, frozen weights."""
    layer = StructuredConv2d(8, 6, 3, 1, "same", bias=False, structure=(None, 2))
    assert "structure=(8, 2, 2)" in repr(layer)
    assert set(layer.state_dict()) == {"weight"}
    input = torch.randn(2, 8, 7, 7)
    twin = copy.deepcopy(layer)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    twin.load_state_dict(torch.load(buffer))
    assert torch.equal(twin(input), layer(input))
    last = layer(input.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, layer(input), rtol=1e-4, atol=1e-5)
    half = copy.deepcopy(layer).bfloat16()(input.bfloat16())
    torch.testing.assert_close(half.float(), layer(input), rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(input).dtype == torch.bfloat16
    with use_backend("reference"):
        torch.testing.assert_close(layer(input), last, rtol=1e-4, atol=1e-5)
    on_meta = StructuredConv2d(8, 6, 3, structure=(4, 2), device="meta")
    assert on_meta(torch.empty(2, 8, 7, 7, device="meta")).shape == (2, 6, 5, 5)


def test_compiled_and_exported():
    """Catches a layer that breaks a graph, or is compiled for one size of image."""
    torch.compiler.reset()
    network = nn.Sequential(
        StructuredConv2d(4, 6, 3, 2, 1, structure=(3, 2)), nn.ReLU(), nn.Flatten(2),
        StructuredLinear(9, 4, structure=6),
    )  # fmt: skip
    images = torch.randn(2, 4, 6, 5)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        some = torch.randn(batch, 4, 6, 5)
        torch.testing.assert_close(compiled(some), network(some))
        for parameter, value in zip(
            network.parameters(),
            torch.autograd.grad(compiled(some).sum(), list(network.parameters())),
            strict=True,
        ):
            (expected,) = torch.autograd.grad(network(some).sum(), parameter)
            torch.testing.assert_close(value, expected)
    exported = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    more = torch.randn(5, 4, 6, 5)
    torch.testing.assert_close(exported.module()(more), network(more))
    volume = StructuredConv3d(2, 3, 3, structure=(2, 2))
    cubes = torch.randn(2, 2, 4, 5, 6)
    compiled = torch.compile(volume, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(cubes), volume(cubes))
    traced = fx.symbolic_trace(network)
    assert [n.op for n in traced.graph.nodes].count("call_module") == 4
    torch.testing.assert_close(traced(images), network(images))
    torch.compiler.reset()


@pytest.mark.parametrize("kernels", [True, False])
def test_folded_layers_compute_the_same(kernels):
    """Catches a small convolution with another geometry, or weights that are shared."""
    layer = StructuredConv2d(6, 4, (3, 5), (2, 1), (1, 2), 1, 2, structure=(2, (2, 1)))
    folded = layer.fold(kernels)
    images = torch.randn(2, 6, 9, 8)
    torch.testing.assert_close(folded(images), layer(images))
    assert [type(module).__name__ for module in folded] == ["SumPool2d", "Conv2d"]
    assert folded[1].weight.data_ptr() != layer.weight.data_ptr()
    assert [n.op for n in fx.symbolic_trace(folded).graph.nodes].count("call_module") == 2
    with pytest.raises(ValueError, match="fold: got padding"):
        StructuredConv2d(2, 2, 2, padding="same", structure=(2, 1)).fold()


BAD = [
    ({"structure": (9, 2)}, ValueError, r"structure: got \(9, 2\), .* c of 1 to 8 .* n of 1 to 3"),
    ({"structure": (0, 2)}, ValueError, "structure: got"),
    ({"structure": (8, 4)}, ValueError, "n of 1 to 3"),
    ({"structure": (8, (2, 4))}, ValueError, "n of 1 to 3"),
    ({"structure": (8, (2, 2, 2))}, ValueError, "structure: got"),
    ({"structure": (8, None)}, TypeError, "structure: got"),
    ({"structure": (4.5, 2)}, TypeError, "structure: got"),
    ({"structure": 8}, TypeError, r"structure: got 8, accepted is \(c, n\)"),
    ({"structure": (5, 2), "groups": 2}, ValueError, "c of 1 to 4"),
    ({"groups": 3}, ValueError, "groups: got 3, .* divide in_channels, 8"),
    ({"groups": 0}, ValueError, "groups: got 0"),
    ({"kernel_size": (3, 3, 3)}, ValueError, "kernel_size: got .* a pair of ints"),
    ({"kernel_size": (5, 3), "structure": (8, 6)}, ValueError, "n of 1 to 5×3"),
    ({"padding": "some"}, ValueError, "padding: got 'some'"),
    ({"padding_mode": "mirror"}, ValueError, "padding_mode: got 'mirror'"),
    ({"bias": 1}, TypeError, "bias: got 1"),
    ({"in_channels": 0}, ValueError, "in_channels: got 0"),
    ({"dtype": torch.int8}, TypeError, "dtype: got torch.int8"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD)
def test_bad_arguments_are_named(changed, error, message):
    """Catches a layer that is made of what does not fit, and an error that does not say what
    does."""
    usual = {"in_channels": 8, "out_channels": 4, "kernel_size": 3, "structure": (8, 2)}
    with pytest.raises(error, match=message):
        StructuredConv2d(**{**usual, **changed})


@pytest.mark.parametrize(
    ("structure", "message"),
    [(9, "an int of 1 to 8"), (0, "an int of 1 to 8"), ((4, 1), "an int"), (None, "an int")],
)
def test_bad_reduced_widths_are_named(structure, message):
    """Catches a width that no linear layer has."""
    with pytest.raises((TypeError, ValueError), match=rf"structure: got .*, accepted is {message}"):
        StructuredLinear(8, 4, structure=structure)


def test_bad_inputs_are_named():
    """Catches an error from deep inside."""
    layer = StructuredConv2d(4, 2, 3, structure=(4, 2))
    for input, error, message in [
        ([1], TypeError, "input: got list"),
        (torch.zeros(1, 3, 8, 8), ValueError, "input: got shape"),
        (torch.zeros(8, 8), ValueError, "input: got shape"),
        (torch.zeros(1, 4, 8, 8).double(), TypeError, "input: got torch.float64"),
        (torch.zeros(1, 4, 8, 8, device="meta"), ValueError, "input: got device meta"),
        (torch.zeros(1, 4, 2, 8), ValueError, "kernel_size: got 3"),
    ]:
        with pytest.raises(error, match=message):
            layer(input)
    with pytest.raises(ValueError, match="input: got shape"):
        StructuredLinear(4, 2, structure=2)(torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"module: got Linear, accepted is a torch.nn.Conv2d"):
        StructuredConv2d.from_dense(nn.Linear(2, 2), (1, 1))
    with pytest.raises(TypeError, match=r"module: got Conv2d, accepted is a torch.nn.Linear"):
        StructuredLinear.from_dense(nn.Conv2d(2, 2, 1), 1)
