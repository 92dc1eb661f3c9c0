"""When a layer runs in one pass and when by parts, what it says of it, and what it keeps."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from whole_layer import (
    SIZES,
    calls_of,
    made,
)

from gross_kernels import GroSSConv2d, dispatch, use_backend, use_fused

ops = torch.ops.gross


# By parts -----------------------------------------------------------------------------------------

WHOLE = ["gross::bottleneck"]
PARTS = {"gross::series_sum", "gross::series_conv2d", "aten::convolution"}


def assert_parts(layer: GroSSConv2d, input: Tensor) -> None:
    names = calls_of(layer, input).names
    assert "gross::bottleneck" not in names
    assert set(names) >= PARTS
    assert names.count("aten::convolution") == 2


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_parts_compute_the_same(size: int, gated: bool) -> None:
    """Catches use_fused that changes nothing, or a way that computes another layer: values and
    gradients."""
    layer, input = made(dtype=torch.float64), torch.randn(2, 20, 6, 5, dtype=torch.float64)
    layer.group_size = size
    gates = [torch.rand(4, dtype=torch.float64, requires_grad=True)] * gated

    def step() -> list[Tensor]:
        output = layer(input, *gates)
        leaves = [*layer.parameters(), *gates]
        return [output, *torch.autograd.grad(output.square().sum(), leaves, materialize_grads=True)]

    assert [
        name for name in calls_of(layer, input).names if name.startswith(("gross", "aten::conv"))
    ] == WHOLE
    results = step()
    with use_fused(False):
        assert_parts(layer, input)
        expected = step()
        with use_fused(True):
            assert "gross::bottleneck" in calls_of(layer, input).names
    assert "gross::bottleneck" in calls_of(layer, input).names
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-9, atol=1e-9)


def test_use_fused_ends_with_an_exception() -> None:
    """Catches layers that stay in parts after the context."""
    with pytest.raises(KeyError), use_fused(False):
        raise KeyError
    assert "gross::bottleneck" in calls_of(made(), torch.randn(1, 20, 4, 4)).names


def test_explain() -> None:
    """Catches an explanation that says another way than the one taken, or no reason."""
    layer, input = made().pack(), torch.randn(1, 20, 4, 4)
    way, _, reason = layer.explain().partition(": ")
    assert (way, "CPU" in reason) == ("fused, packed", True)
    way, _, reason = layer.explain("meta").partition(": ")
    assert (way, "meta" in reason) == ("parts", True)
    with use_fused(False):
        way, _, reason = layer.explain().partition(": ")
        assert (way, "use_fused" in reason) == ("parts", True)
        assert_parts(layer, input)
        assert layer.pack().explain().startswith("parts: ")
    with use_backend("cpu"):
        assert layer.explain().startswith("fused: ")
        assert "gross::bottleneck" in calls_of(layer, input).names
    with use_backend("reference"):
        way, _, reason = layer.explain().partition(": ")
        assert (way, "reference" in reason) == ("parts", True)
        names = calls_of(layer, input).names
        assert not any(name.startswith("gross::") for name in names)


@pytest.mark.parametrize(
    ("value", "way"), [("0", "parts"), ("1", "fused"), ("", "fused"), (None, "fused")]
)
def test_variable(value: str | None, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a GROSS_KERNELS_FUSED that is not read when the package is imported."""
    assert dispatch_with(value, monkeypatch).choose_layer("cpu").name == way


@pytest.mark.parametrize("value", ["2", "no", " "])
def test_variable_with_another_value(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a typing error that is ignored."""
    with pytest.raises(
        ValueError, match=f"GROSS_KERNELS_FUSED: got '{value}', accepted are 0 and 1"
    ):
        dispatch_with(value, monkeypatch)


def dispatch_with(value: str | None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A second copy of the module that reads the variable, as imported with it."""
    monkeypatch.delenv("GROSS_KERNELS_FUSED", raising=False)
    if value is not None:
        monkeypatch.setenv("GROSS_KERNELS_FUSED", value)
    spec = importlib.util.spec_from_file_location("gross_kernels.dispatch_again", dispatch.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


# Memory -------------------------------------------------------------------------------------------


def saved_bytes(layer: nn.Module, input: Tensor) -> float:
    """Memory of the activations that a forward pass keeps for the backward pass, in units of the
    input's."""
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(input)
    assert output.requires_grad
    return sum(kept.values()) / input.untyped_storage().nbytes()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("channels", "limit"), [(64, 1), (128, 2), (256, 2)])
def test_memory_of_training(channels: int, limit: int, relu: bool) -> None:
    """Catches inner tensors that are kept although computing them again is cheaper, against three
    that the parts keep. A ReLU keeps its output, as nn.ReLU does."""
    layer = GroSSConv2d(channels, channels, 3, padding=1, group_sizes=(4, 32), relu=relu)
    # A map that is large beside the weights: the parts keep the summed ones, too.
    input = torch.randn(4, channels, 16, 16, requires_grad=True).to(
        memory_format=torch.channels_last
    )
    assert saved_bytes(layer, input) == limit + relu
    with use_fused(False):
        assert saved_bytes(layer, input) >= 3 + relu
