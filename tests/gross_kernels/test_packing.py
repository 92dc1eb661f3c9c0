"""Packed weights: the same bits as without, dropped and refused when they are no longer the
layer's."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from whole_layer import (
    SIZES,
    Layer,
    calls_of,
    made,
    ones,
    plain,
)

import gross_kernels
from gross_kernels import GroSSConv2d

ops = torch.ops.gross


# Packed layers ------------------------------------------------------------------------------------


def is_packed(layer: GroSSConv2d) -> bool:
    """Whether a call runs on packed weights, and the layer says the same."""
    packed = calls_of(layer, torch.randn(1, 20, 6, 5, dtype=layer.grouped[0].dtype)).packed == 1
    assert packed == layer.explain().startswith("fused, packed: ")
    return packed


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_pack_changes_no_bit(size: int, dtype: torch.dtype) -> None:
    """Catches packed weights of another size, dtype or without the bias, and a pack that is not
    used at all."""
    layer = made(dtype=dtype)
    layer.group_size = size
    input = torch.randn(2, 20, 9, 7, dtype=dtype)
    expected = layer(input)
    assert layer.pack() is layer
    assert is_packed(layer)
    assert torch.equal(layer(input), expected)
    assert torch.equal(layer(input[0]), expected[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_pack_for_another_dtype(dtype: torch.dtype) -> None:
    """Catches weights packed for one dtype that are used for another: the same bits as without,
    either way."""
    layer, input = made(), torch.randn(2, 20, 6, 5)
    expected = layer(input.to(dtype)), layer(input)
    layer.pack(dtype)
    assert calls_of(layer, input.to(dtype)).packed == 1
    assert calls_of(layer, input).packed == 0
    assert torch.equal(layer(input.to(dtype)), expected[0])
    assert torch.equal(layer(input), expected[1])
    layer.pack()
    assert calls_of(layer, input.to(dtype)).packed == 0
    assert torch.equal(layer(input.to(dtype)), expected[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64])
def test_pack_for_a_dtype_that_no_input_has(dtype: torch.dtype) -> None:
    """Catches weights that are packed for inputs that the layer refuses."""
    with pytest.raises(TypeError, match=f"dtype: got {dtype}"):
        made().pack(dtype)


@torch.no_grad()
def test_gates_are_not_packed() -> None:
    """Catches packed weights, summed without gates, that answer a call with gates."""
    layer, input, gates = made(), torch.randn(2, 20, 6, 5), torch.tensor([1.0, 2.0, 0.0, -1.0])
    expected = layer(input, gates)
    layer.pack()
    assert calls_of(layer, input, gates).packed == 0
    assert torch.equal(layer(input, gates), expected)


DROPS: dict[str, Callable[[GroSSConv2d], object]] = {
    "train": lambda layer: layer.train().eval(),
    "load_state_dict": lambda layer: layer.load_state_dict(made().state_dict()),
    "load_state_dict_assign": lambda layer: layer.load_state_dict(made().state_dict(), assign=True),
    "loaded_by_its_network": lambda layer: nn.Sequential(layer).load_state_dict(
        nn.Sequential(made()).state_dict()
    ),
    "group_size": lambda layer: setattr(layer, "group_size", 2),
    "there_and_back": lambda layer: [setattr(layer, "group_size", size) for size in (2, 8)],
    "double": lambda layer: layer.double(),
    "to_dtype": lambda layer: layer.to(torch.bfloat16),
    "network_to_dtype": lambda layer: nn.Sequential(layer).to(torch.float64),
    "to_format": lambda layer: layer.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("change", DROPS.values(), ids=DROPS)
@torch.no_grad()
def test_what_drops_packed_weights(change: Callable[[GroSSConv2d], object]) -> None:
    """Catches packed weights that outlive what they were made from."""
    layer = made().pack()
    change(layer)
    assert not is_packed(layer)
    input = torch.randn(2, 20, 6, 5, dtype=layer.grouped[0].dtype)
    tolerance = (
        {"rtol": 0.05, "atol": 0.05}
        if input.dtype == torch.bfloat16
        else {"rtol": 1e-4, "atol": 1e-5}
    )
    torch.testing.assert_close(layer(input), layer.fold()(input), **tolerance)


KEEPS: dict[str, Callable[[GroSSConv2d], object]] = {
    "eval": lambda layer: layer.eval(),
    "same_size": lambda layer: setattr(layer, "group_size", layer.group_size),
    "state_dict": lambda layer: layer.state_dict(),
    "frozen": lambda layer: layer.requires_grad_(False),
    "backward": torch.enable_grad()(lambda layer: layer(torch.randn(1, 20, 4, 4)).sum().backward()),
    "zero_grad": lambda layer: layer.zero_grad(),
    "fold": lambda layer: layer.fold(2),
}


@pytest.mark.parametrize("use", KEEPS.values(), ids=KEEPS)
def test_what_keeps_packed_weights(use: Callable[[GroSSConv2d], object]) -> None:
    """Catches packed weights that are lost, and with them the speed, to what changes nothing."""
    layer = made().pack()
    use(layer)
    assert is_packed(layer)


@torch.no_grad()
def test_packed_weights_are_not_state() -> None:
    """Catches a state_dict, buffers or parameters that grow by packing, or that cannot be saved."""
    layer, input = made(), torch.randn(2, 20, 6, 5)
    before = [
        [name for name, _ in found] for found in (layer.named_parameters(), layer.named_buffers())
    ]
    names = list(layer.state_dict())
    expected = layer.pack()(input)
    assert list(layer.state_dict()) == names
    assert [
        [name for name, _ in found] for found in (layer.named_parameters(), layer.named_buffers())
    ] == before
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = made().pack()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(input), expected)


def saved(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), saved]
)
@torch.no_grad()
def test_copies_of_packed_layers(copied: Callable[[nn.Module], nn.Module]) -> None:
    """Catches a copy that takes its own parameters for changed ones, or answers with the original's
    weights."""
    layer, input = made().pack(), torch.randn(2, 20, 6, 5)
    expected = layer(input)
    other = copied(layer)
    assert torch.equal(other(input), expected)
    other.train().eval()
    other.bias.add_(1)
    assert (other(input) >= expected).all()
    assert (other(input) > expected).any()
    assert torch.equal(layer(input), expected)


@torch.enable_grad()
def optimiser_step(layer: GroSSConv2d) -> None:
    layer(torch.randn(1, 20, 4, 4)).sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()


STALE: dict[str, Callable[[GroSSConv2d], object]] = {
    "first": lambda layer: layer.pointwise_in[1].mul_(2),
    "grouped": lambda layer: layer.grouped[0].zero_(),
    "last": lambda layer: layer.pointwise_out[3].copy_(layer.pointwise_out[0]),
    "bias": lambda layer: layer.bias.add_(1),
    "reset": lambda layer: layer.reset_parameters(),
    "another_parameter": lambda layer: setattr(layer, "bias", made().bias),
    "no_bias": lambda layer: setattr(layer, "bias", None),
    "optimiser": optimiser_step,
}


@pytest.mark.parametrize("change", STALE.values(), ids=STALE)
def test_stale_packed_weights(change: Callable[[GroSSConv2d], object]) -> None:
    """Catches an answer from weights that the layer no longer has; packing again, or train(),
    helps."""
    layer, input = made().pack(), torch.randn(2, 20, 6, 5)
    with torch.no_grad():
        change(layer)
        with pytest.raises(
            RuntimeError,
            match=r"pack: a parameter has changed .* call pack\(\) again, or train\(\)",
        ):
            layer(input)
    expected = copy.deepcopy(layer).train()(input)
    assert torch.equal(layer(input), expected)
    with torch.no_grad():
        assert torch.equal(layer.pack()(input), expected)
        assert torch.equal(layer.train().eval()(input), expected)


def test_pack_in_training_mode() -> None:
    """Catches weights that are packed just before they are trained."""
    with pytest.raises(
        RuntimeError,
        match=r"pack: got a layer in training mode, accepted is .* call eval\(\) first",
    ):
        made().train().pack()
    network = nn.Sequential(made(), nn.Sequential(made().train()))
    with pytest.raises(RuntimeError, match="pack: got a layer in training mode"):
        gross_kernels.pack(network)


@torch.no_grad()
def test_pack_a_network() -> None:
    """Catches a network of which a nested or shared layer is left out, or whose other modules
    packing touches."""
    shared = GroSSConv2d(18, 18, 3, padding=1, group_sizes=(2, 18))
    network = nn.Sequential(made(), nn.ReLU(), nn.Sequential(shared, shared, nn.Conv2d(18, 4, 1)))
    input = torch.randn(2, 20, 6, 5)
    expected = network.eval()(input)
    assert gross_kernels.pack(network) is network
    assert calls_of(network, input).packed == 3
    assert torch.equal(network(input), expected)
    gross_kernels.pack(network, torch.bfloat16)
    assert calls_of(network.to(torch.float32), input).packed == 0
    assert calls_of(gross_kernels.pack(network.bfloat16()), input.bfloat16()).packed == 3


def test_packed_weights_and_gradients() -> None:
    """Catches a packed layer through which no gradient, or another one, flows in evaluation
    mode."""
    layer, input = made(), torch.randn(2, 20, 6, 5, requires_grad=True)
    leaves = [input, *layer.parameters()]
    expected = torch.autograd.grad(layer(input).square().sum(), leaves)
    layer.pack()
    assert all(map(torch.equal, torch.autograd.grad(layer(input).square().sum(), leaves), expected))


def test_inference_mode() -> None:
    """Catches a layer that fails with inference tensors: as input, as packed weights or as
    parameters."""
    input = torch.randn(2, 20, 6, 5)
    layer = made()
    expected = layer(input)
    with torch.inference_mode():
        assert torch.equal(layer(input.clone()), expected)
        layer.pack()
        assert torch.equal(layer(input.clone()), expected)
        own = made()
        own.load_state_dict(layer.state_dict())
        assert torch.equal(own(input), expected)
    with torch.no_grad():
        assert torch.equal(layer(input), expected)
    output = layer(input.requires_grad_())
    assert torch.equal(output, expected)
    output.sum().backward()


# Refused ------------------------------------------------------------------------------------------

PACKED = Layer(plain(8, 12, sizes=(2, 4), size=(6, 5)), 5, 7)


def numbers(**changes: int) -> tuple[int, ...]:
    """The shape of ``PACKED``, some numbers replaced."""
    shape = {"width_in": 8, "width_out": 12, "group_size": 4, "out_channels": 7}
    for name, number in {"kernel": 3, "stride": 1, "padding": 1, "dilation": 1}.items():
        shape |= {f"{name}h": number, f"{name}w": number}
    assert changes.keys() <= shape.keys()
    return tuple((shape | changes).values())


MADE = "packed: .*accepted is what bottleneck_pack made"
REFUSED_PACKED: dict[str, tuple[dict[str, object], str]] = {
    "dtype": ({"packed": Tensor.double}, MADE),
    "size": ({"packed": lambda t: t[:-1]}, MADE),
    "stride": ({"packed": lambda t: t.repeat(2)[::2]}, MADE),
    "dimensions": ({"packed": lambda t: t[None]}, MADE),
    "input_channels": ({"input": ones(2, 6, 6, 5)}, MADE),
    "input_dtype": ({"input": ones(2, 5, 6, 5, dtype=torch.float64)}, MADE),
    "input_integers": ({"input": ones(2, 5, 6, 5, dtype=torch.int64)}, "input: accepted dtypes"),
    "input_dimensions": ({"input": ones(5, 6, 5)}, "input: accepted is"),
    "no_channels": ({"input": ones(2, 0, 6, 5)}, "input: accepted is"),
    "too_small": (
        {"input": ones(2, 5, 1, 1), "shape": numbers(paddingh=0)},
        "kernel_size: the dilated kernel",
    ),
    "few_numbers": ({"shape": numbers()[:-1]}, "shape: got 11 numbers, accepted are 12"),
    "width": ({"shape": numbers(width_in=24)}, MADE),
    "outputs": ({"shape": numbers(out_channels=40)}, MADE),
    "kernel": ({"shape": numbers(kernelw=0)}, r"shape\[5\]: got 0, accepted is at least 1"),
    "group_size": ({"shape": numbers(group_size=0)}, r"shape\[2\]: got 0, accepted is at least 1"),
    "nesting": (
        {"shape": numbers(group_size=3)},
        "shape: group size 3 does not nest in 8 → 12 channels",
    ),
    "nesting_outputs": (
        {"shape": numbers(group_size=1)},
        "shape: group size 1 does not nest in 8 → 12 channels",
    ),
    "step": ({"shape": numbers(strideh=0)}, "stride, padding, dilation: "),
    "negative": ({"shape": numbers(paddingw=-1)}, "stride, padding, dilation: "),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED_PACKED.values(), ids=REFUSED_PACKED)
def test_refused_packed(changes: dict[str, object], message: str) -> None:
    """Catches packed weights that are read as another dtype, beyond their end or without their
    stride, and an error that does not name the argument."""
    input, weights, shape, relu = PACKED.packed(PACKED.arguments(torch.float32))
    assert shape == numbers()
    ops.bottleneck_packed(input, weights, shape, relu)
    change = changes.get("packed", lambda t: t)
    with pytest.raises(RuntimeError, match=message):
        ops.bottleneck_packed(
            changes.get("input", input), change(weights), changes.get("shape", shape), relu
        )


# Autocast and compilation -------------------------------------------------------------------------


@pytest.fixture
def _nothing_compiled() -> Iterator[None]:
    """Starts without compiled graphs, and leaves none behind."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize(
    "packed", [None, torch.float32, torch.bfloat16], ids=["unpacked", "packed", "packed_16_bit"]
)
def test_autocast(packed: torch.dtype | None) -> None:
    """Catches weights that autocast rounds one by one, and packed ones that it reads as another
    dtype's."""
    layer, input = made(), torch.randn(2, 20, 6, 5)
    expected = layer(input.bfloat16())
    if packed is not None:
        layer.pack(packed)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(input)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)


@pytest.mark.usefixtures("_nothing_compiled")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_in_evaluation_mode(packed: bool, mode: Callable) -> None:
    """Catches a graph that breaks at packed weights, or that keeps them when they are dropped or
    made anew."""
    layer, input = made(), torch.randn(2, 20, 6, 5)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def agree() -> None:
        with mode():
            assert torch.equal(call(input), layer(input))

    if packed:
        layer.pack()
    agree()
    layer.group_size = 2
    agree()
    if packed:
        layer.pack()
        agree()
    with torch.no_grad():
        layer.bias.add_(1)
    if packed:
        layer.pack()
    agree()
    layer.train().eval()
    agree()


@pytest.mark.usefixtures("_nothing_compiled")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "change", [lambda bias: bias.add_(1), lambda bias: bias.data.add_(1)], ids=["itself", "data"]
)
def test_compiled_calls_do_without(change: Callable, mode: Callable) -> None:
    """Catches a compiled graph that answers from packed weights after a parameter has changed,
    which it could not see."""
    layer, input = made().pack(), torch.randn(2, 20, 6, 5)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with mode():
        before = call(input)
        assert torch.equal(before, layer(input))
    with torch.no_grad():
        change(layer.bias)
        expected = copy.deepcopy(layer)(input)
    with mode():
        assert torch.equal(call(input), expected)
    assert not torch.equal(before, expected)
