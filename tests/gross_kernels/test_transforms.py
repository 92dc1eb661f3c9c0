"""Transforms that nn.Conv2d takes: forward mode, torch.func, vmap, the older vmap of
torch.autograd, torch.fx; and the layer's merged kernel. Everything is compared with the same layer
written in PyTorch's own operators."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.autograd.functional import hessian as autograd_hessian
from torch.autograd.functional import jacobian
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils._pytree import tree_leaves
from whole_layer import Calls

from gross_kernels import GroSSConv2d, SeriesConv2d, series_conv2d, use_backend, use_fused
from gross_kernels.series import Series, sum_terms

Parameters = dict[str, Tensor]
Function = Callable[[Parameters, Tensor], Tensor]
SIZES = (1, 2, 4)


class Own(nn.Module):
    """A layer of this package, and the same by PyTorch's own operators."""

    def __init__(self, kind: type[nn.Module], relu: bool = False, size: int = 2) -> None:
        super().__init__()
        options = {"relu": relu} if kind is GroSSConv2d else {}
        self.layer = kind(4, 4, 3, padding=1, group_sizes=SIZES, dtype=torch.float64, **options)
        self.layer.group_size = size
        self.parameters_ = {name: p.detach() for name, p in self.layer.named_parameters()}

    def ours(self, parameters: Parameters, input: Tensor) -> Tensor:
        return functional_call(self.layer, parameters, (input,))

    def torchs(self, parameters: Parameters, input: Tensor) -> Tensor:
        count = SIZES.index(self.layer.group_size) + 1

        def terms(name: str) -> list[Tensor]:
            return [parameters[f"{name}.{i}"] for i in range(count)]

        whole = isinstance(self.layer, GroSSConv2d)
        weight = sum_terms(Series(terms("grouped" if whole else "terms"), count), 4)
        groups = 4 // weight.shape[1]
        if not whole:
            return F.conv2d(input, weight, None, 1, 1, 1, groups)
        inner = F.conv2d(input, sum(terms("pointwise_in")))
        middle = F.conv2d(inner, weight, None, 1, 1, 1, groups)
        output = F.conv2d(middle, sum(terms("pointwise_out")), parameters["bias"])
        return output.relu() if self.layer.relu else output


def loss(call: Function, parameters: Parameters, input: Tensor) -> Tensor:
    return call(parameters, input).sin().sum()


def forward_mode(call: Function, parameters: Parameters, input: Tensor) -> Tensor:
    with forward_ad.dual_level():
        output = call(parameters, forward_ad.make_dual(input, input.cos()))
        return forward_ad.unpack_dual(output).tangent


def forward_mode_of_a_gradient(
    call: Function, parameters: Parameters, input: Tensor
) -> list[Tensor]:
    """The graph is older than the level."""
    input = input.clone().requires_grad_()
    output = call(parameters, input)
    with forward_ad.dual_level():
        slope = forward_ad.make_dual(torch.ones_like(output), output.detach())
        return list(forward_ad.unpack_dual(torch.autograd.grad(output, input, slope)[0]))


def batched_gradients(call: Function, parameters: Parameters, input: Tensor) -> list[Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    input = input.clone().requires_grad_()
    output = call(leaves, input)
    slopes = torch.stack([torch.ones_like(output), output.detach(), output.detach().exp()])
    wanted = [input, *leaves.values()]
    found = torch.autograd.grad(
        output, wanted, slopes, is_grads_batched=True, materialize_grads=True
    )
    # Of what is not used at all, the zeros are not batched.
    return [g.expand(3, *leaf.shape) for g, leaf in zip(found, wanted, strict=True)]


def stacked(parameters: Parameters) -> Parameters:
    return {
        name: torch.stack([value, 2 * value, value.cos()]) for name, value in parameters.items()
    }


TRANSFORMS: dict[str, Callable[[Function, Parameters, Tensor], object]] = {
    "jvp": lambda c, p, x: jvp(partial(c, p), (x,), (x.cos(),)),
    "jvp of parameters": lambda c, p, x: jvp(
        lambda p: c(p, x), (p,), ({n: v.cos() for n, v in p.items()},)
    ),
    "jvp without gradients": torch.no_grad()(lambda c, p, x: jvp(partial(c, p), (x,), (x.cos(),))),
    "jacfwd": lambda c, p, x: jacfwd(partial(c, p))(x[:1]),
    "jacrev": lambda c, p, x: jacrev(partial(c, p))(x[:1]),
    "vjp": lambda c, p, x: vjp(c, p, x)[1](x.cos()),
    "grad": lambda c, p, x: grad(partial(loss, c))(p, x),
    "grad of grad": lambda c, p, x: grad(lambda x: grad(partial(loss, c, p))(x).sin().sum())(x),
    "hessian": lambda c, p, x: hessian(partial(loss, c, p))(x[:1]),
    "vmap": lambda c, p, x: vmap(partial(c, p))(torch.stack([x, 2 * x, x.cos()])),
    "vmap of a later dimension": lambda c, p, x: vmap(partial(c, p), 2, 1)(torch.stack([x, -x], 2)),
    "vmap over images": lambda c, p, x: vmap(partial(c, p))(x),
    "vmap of vmap": lambda c, p, x: vmap(vmap(partial(c, p)))(torch.stack([x, 2 * x]).unsqueeze(1)),
    "vmap without gradients": torch.no_grad()(lambda c, p, x: vmap(partial(c, p))(x[:, None])),
    "gradients of each image": lambda c, p, x: vmap(grad(partial(loss, c)), (None, 0))(p, x),
    "ensemble": lambda c, p, x: vmap(c, (0, None))(stacked(p), x),
    "ensemble of inputs": lambda c, p, x: vmap(c)(stacked(p), torch.stack([x, -x, x.cos()])),
    "gradients of an ensemble": lambda c, p, x: vmap(grad(partial(loss, c)), (0, None))(
        stacked(p), x
    ),
    "jacobian": lambda c, p, x: jacobian(partial(c, p), x[:1], vectorize=True),
    "jacobian, forward mode": lambda c, p, x: jacobian(
        partial(c, p), x[:1], vectorize=True, strategy="forward-mode"
    ),
    "hessian, vectorised": lambda c, p, x: autograd_hessian(
        partial(loss, c, p), x[:1], vectorize=True
    ),
    "hessian, forward mode": lambda c, p, x: autograd_hessian(
        partial(loss, c, p), x[:1], vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "forward mode": forward_mode,
    "forward mode without gradients": torch.no_grad()(forward_mode),
    "forward mode of a gradient": forward_mode_of_a_gradient,
    "batched gradients": batched_gradients,
}
every_kind = pytest.mark.parametrize(
    "own",
    [Own(GroSSConv2d), Own(GroSSConv2d, relu=True), Own(SeriesConv2d), Own(SeriesConv2d, size=4)],
    ids=["whole", "whole with relu", "series", "series, all"],
)


@every_kind
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "parts"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform(name: str, fused: bool, own: Own) -> None:
    """Catches a transform that fails, or is silently wrong, as a tangent of zeros is."""
    input = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    transform, parameters = TRANSFORMS[name], own.parameters_
    expected = tree_leaves(transform(own.torchs, parameters, input))
    with use_fused(fused):
        results = tree_leaves(transform(own.ours, parameters, input))
    assert any(value.any() for value in expected)
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-9, atol=1e-9)


@every_kind
def test_forward_mode_of_trainable_parameters(own: Own) -> None:
    """Catches a layer whose own parameters, which require gradients, forbid forward mode."""
    input = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    tangent = forward_mode(lambda _, input: own.layer(input), {}, input)
    torch.testing.assert_close(tangent, forward_mode(own.torchs, own.parameters_, input))
    assert tangent.any()


def test_forward_mode_of_gates_and_packed_weights() -> None:
    """Catches gates without a tangent, and packed weights that answer where a tangent is wanted."""
    layer = GroSSConv2d(4, 4, 3, group_sizes=SIZES, dtype=torch.float64).eval()
    input, gates = torch.randn(1, 4, 5, 5, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    tangent = jvp(lambda gates: layer(input, gates), (gates,), (torch.ones_like(gates),))[1]
    step = 1e-6
    numeric = (layer(input, gates + step) - layer(input, gates - step)) / (2 * step)
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-7)
    expected = jvp(layer, (input,), (input.cos(),))[1]
    layer.pack()
    with torch.no_grad():
        assert torch.equal(jvp(layer, (input,), (input.cos(),))[1], expected)
    assert expected.any()


def test_packed_layer_under_vmap() -> None:
    """Catches a packed layer that vmap cannot take."""
    layer = GroSSConv2d(4, 4, 3, group_sizes=SIZES).eval()
    input = torch.randn(3, 2, 4, 5, 5)
    with torch.no_grad():
        expected = layer(input.flatten(0, 1)).unflatten(0, (3, 2))
        layer.pack()
        with Calls() as calls:
            assert torch.equal(vmap(layer)(input), expected)
    assert calls.packed == 1


def test_ensemble_of_modules() -> None:
    """Catches stack_module_state's modules that cannot run, each with its own weights."""
    layers = [GroSSConv2d(4, 4, 3, group_sizes=SIZES) for _ in range(3)]
    parameters, buffers = stack_module_state(layers)
    base, input = copy.deepcopy(layers[0]).to("meta"), torch.randn(2, 4, 5, 5)

    def call(parameters: Parameters, buffers: Parameters, input: Tensor) -> Tensor:
        return functional_call(base, (parameters, buffers), (input,))

    output = vmap(call, (0, 0, None))(parameters, buffers, input)
    expected = torch.stack([layer(input) for layer in layers])
    torch.testing.assert_close(output, expected)


def test_batched_input_folds_into_the_batch() -> None:
    """Catches a call of the kernel for each element where one call does."""
    layer, input = GroSSConv2d(4, 4, 3, group_sizes=SIZES), torch.randn(5, 2, 4, 6, 6)
    terms = [torch.randn(4, s, 3, 3) for s in SIZES]
    with torch.no_grad(), Calls() as calls:
        vmap(layer)(input)
        vmap(lambda input: series_conv2d(input, terms))(input)
    assert calls.names.count("gross::bottleneck") == 1
    assert calls.names.count("gross::series_conv2d") == 1


def test_forced_reference_under_transforms() -> None:
    """Catches a forced backend that transforms pass by."""
    own = Own(GroSSConv2d)
    input = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    with use_backend("reference"):
        result = vmap(grad(partial(loss, own.ours)), (None, 0))(own.parameters_, input)
    expected = vmap(grad(partial(loss, own.torchs)), (None, 0))(own.parameters_, input)
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value)


def test_gradcheck_in_forward_mode() -> None:
    """Catches a tangent, or a forward mode of the backward pass, that numerical derivatives
    contradict; gates among them."""
    terms = [torch.randn(4, s, 2, 2, dtype=torch.float64, requires_grad=True) for s in (1, 2)]
    input = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    gates = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def call(input: Tensor, gates: Tensor, *terms: Tensor) -> Tensor:
        return series_conv2d(input, terms, gates=gates)

    arguments = (input, gates, *terms)
    assert torch.autograd.gradcheck(call, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, arguments, check_fwd_over_rev=True)


# torch.fx ---------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = GroSSConv2d(4, 4, 3, padding=1, group_sizes=SIZES)
        self.second = nn.ModuleList([SeriesConv2d(4, 4, 3, padding=1, group_sizes=SIZES)])

    def forward(self, input: Tensor, gates: Tensor | None = None) -> Tensor:
        return input + self.second[0](self.first(input).relu(), gates)


class NoLeaves(fx.Tracer):
    """Traces into everything."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return False


@pytest.mark.parametrize("tracer", [fx.Tracer, NoLeaves])
def test_symbolic_trace(tracer: type[fx.Tracer]) -> None:
    """Catches layers that cannot be traced, or not as one call, with a size burnt in."""
    network, input = Residual(), torch.randn(2, 4, 5, 5)
    traced = fx.GraphModule(network, tracer().trace(network))
    calls = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == ["first", "second.0"]
    for size in SIZES:
        for layer in (network.first, network.second[0]):
            layer.group_size = size
        assert torch.equal(traced(input), network(input))
        gates = torch.rand(3)
        assert torch.equal(traced(input, gates), network(input, gates))


def test_feature_extractor() -> None:
    """Catches torchvision's feature extraction, which fails for a layer that is no leaf."""
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    network, input = Residual(), torch.randn(2, 4, 5, 5)
    found = extraction.create_feature_extractor(network, ["first", "second.0"])(input)
    assert torch.equal(found["first"], network.first(input))


def test_layer_that_is_itself_traced() -> None:
    """Catches an error that does not say what to trace instead."""
    layer = GroSSConv2d(4, 4, 3)
    with pytest.raises(TypeError, match=r"input: got Proxy .*accepted is .*Sequential"):
        fx.symbolic_trace(layer)
    traced, input = fx.symbolic_trace(nn.Sequential(layer)), torch.randn(1, 4, 5, 5)
    assert torch.equal(traced(input), layer(input))


# The merged kernel ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("width", [8, (8, 12), (16, 8)])
def test_weight(width: int | tuple[int, int], size: int) -> None:
    """Catches a kernel that is not the layer's: no value, gradient, dtype or shape of its own."""
    layer = GroSSConv2d(
        6, 10, (3, 2), (2, 1), (1, 2), group_sizes=(2, 4, 8), width=width, dtype=torch.float64
    )
    layer.group_size = size
    input = torch.randn(2, 6, 7, 6, dtype=torch.float64, requires_grad=True)
    weight = layer.weight
    assert weight.shape == (10, 6, 3, 2)
    assert weight.dtype == torch.float64
    dense, whole = F.conv2d(input, weight, layer.bias, (2, 1), (1, 2)), layer(input)
    torch.testing.assert_close(dense, whole)
    leaves = [input, *layer.parameters()]
    grads = [
        torch.autograd.grad(output.sin().sum(), leaves, materialize_grads=True)
        for output in (dense, whole)
    ]
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected)


def test_weight_is_read_only() -> None:
    """Catches a weight that is set beside the terms, and so ignored; and one in state_dict."""
    layer = GroSSConv2d(4, 4, 3)
    for value in (torch.zeros(4, 4, 3, 3), nn.Parameter(torch.zeros(4, 4, 3, 3)), None):
        with pytest.raises(AttributeError, match=r"weight: got .* accepted is .*from_bottlenecks"):
            layer.weight = value
    assert "weight" not in layer.state_dict()
    assert "weight" not in dict(layer.named_parameters())
    assert layer.weight.any()


def test_fusion_with_batch_norm() -> None:
    """Catches weight, bias and geometry that torch's own fusion does not find."""
    layer = GroSSConv2d(4, 6, 3, padding=1, dtype=torch.float64).eval()
    norm = nn.BatchNorm2d(6, dtype=torch.float64).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    weight, bias = torch.nn.utils.fusion.fuse_conv_bn_weights(
        layer.weight,
        layer.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    input = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(F.conv2d(input, weight, bias, 1, 1), norm(layer(input)))
