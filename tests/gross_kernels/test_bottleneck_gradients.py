"""The layer in one pass, differentiated once and twice, and as torch.library checks it."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from whole_layer import (
    SMALL,
    TYPICAL,
    Arguments,
    Layer,
    backward,
    every_inner,
    every_small,
    float32_and_bfloat16,
)

ops = torch.ops.gross


# Gradients ----------------------------------------------------------------------------------------


def function(layer: Layer, arguments: Arguments) -> Callable[..., Tensor]:
    """The operator's output as a function of ``arguments.leaves()``."""
    count = len(layer.middle.group_sizes)

    def call(input: Tensor, *rest: Tensor) -> Tensor:
        tensors = list(rest)
        bias = tensors.pop(0) if layer.bias else None
        gates = tensors.pop(0) if layer.middle.gated else None
        series = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        return layer.call(Arguments(input, series, bias, gates, arguments.grad))[0]

    return call


def away_from_the_kink(layer: Layer) -> Arguments:
    """Arguments in float64 whose outputs no numerical derivative moves across zero; some on either
    side of it."""
    arguments = layer.arguments(torch.float64).map(Tensor.requires_grad_)
    if layer.relu:
        output, _ = replace(layer, relu=False).call(arguments)
        assert output.abs().min() > 1e-3
        assert 0 < (output > 0).sum() < output.numel()
    return arguments


@every_inner
@every_small
def test_first_and_second_derivatives(layer: Layer, keep_inner: bool) -> None:
    """Catches a gradient that is not the derivative of the output, or a second one that is not the
    gradient's."""
    arguments = away_from_the_kink(layer)
    call, leaves = (
        function(replace(layer, keep_inner=keep_inner), arguments),
        tuple(arguments.leaves().values()),
    )
    assert torch.autograd.gradcheck(call, leaves)
    # The gradients of inactive terms are zeros without a graph, and gradcheck's fast mode (torch
    # 2.14) pairs all outputs with vectors for those alone that have one.
    for terms in arguments.series:
        for term in terms[layer.middle.active :]:
            term.requires_grad_(False)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@every_small
def test_gradients_with_a_graph(layer: Layer) -> None:
    """Catches gradients that are computed otherwise, and are others, where second ones are to
    follow: gradgradcheck compares those with themselves alone."""
    arguments = away_from_the_kink(layer)
    output, _ = layer.call(arguments)
    leaves = list(arguments.leaves().values())
    plain, graphed = (
        torch.autograd.grad(
            output,
            leaves,
            arguments.grad,
            retain_graph=True,
            create_graph=graph,
            materialize_grads=True,
        )
        for graph in (False, True)
    )
    for leaf, expected, gradient in zip(leaves, plain, graphed, strict=True):
        assert gradient.shape == leaf.shape
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@every_inner
@pytest.mark.parametrize("name", ["gated_relu", "plain"])
def test_needs(name: str, keep_inner: bool) -> None:
    """Catches a gradient that depends on which others are asked for, and one that is returned
    unasked."""
    layer = replace(SMALL[name], keep_inner=keep_inner)
    arguments = layer.arguments(torch.float32)
    input, *series, bias, gates = backward(layer, arguments, [True] * 6)
    for needs in product([True, False], repeat=6):
        some_input, *some_series, some_bias, some_gates = backward(layer, arguments, needs)
        assert torch.equal(some_input, input) if needs[0] else some_input.numel() == 0
        for some, terms, need in zip(some_series, series, needs[1:4], strict=True):
            assert len(some) == len(terms) * need
            assert all(map(torch.equal, some, terms)) or not need
        assert torch.equal(some_bias, bias) if needs[4] else some_bias.numel() == 0
        assert torch.equal(some_gates, gates) if needs[5] else some_gates.numel() == 0


@every_inner
@pytest.mark.parametrize(
    "layer", [TYPICAL, SMALL["relu"], SMALL["no_bias"]], ids=["typical", "relu", "one_term"]
)
def test_gradients_are_tensors_of_their_own(layer: Layer, keep_inner: bool) -> None:
    """Catches terms that share one gradient's memory, where an optimiser or clipping in place would
    scale it twice."""
    layer = replace(layer, keep_inner=keep_inner)
    arguments = layer.arguments(torch.float32)
    input, first, grouped, last, bias, gates = backward(layer, arguments, [True] * 6)
    tensors = [t for t in (input, *first, *grouped, *last, bias, gates) if t.numel()]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    given = {t.untyped_storage().data_ptr() for t in (*arguments.leaves().values(), arguments.grad)}
    assert not given & {t.untyped_storage().data_ptr() for t in tensors}


def test_no_gradient_of_inner_and_none_of_what_needs_none() -> None:
    """Catches an inner tensor that seems differentiable, and gradients of frozen parameters."""
    layer = replace(TYPICAL, keep_inner=True)
    arguments = layer.arguments(torch.float32)
    arguments.series[1][0].requires_grad_()
    output, inner = layer.call(arguments)
    assert output.requires_grad
    assert not inner.requires_grad
    output.sum().backward()
    assert [t.grad is not None for t in arguments.series[1]] == [True, False, False]
    assert all(
        t.grad is None for t in (arguments.input, *arguments.series[0], *arguments.series[2])
    )


def test_second_derivatives_of_a_layer_half_frozen() -> None:
    """Catches frozen terms that forbid a graph of the gradients of the others."""
    layer = SMALL["gated"]
    arguments = layer.arguments(torch.float64).map(Tensor.requires_grad_)
    for terms in arguments.series:
        terms[0].requires_grad_(False)
    leaves = [leaf for leaf in arguments.leaves().values() if leaf.requires_grad]
    output, _ = layer.call(arguments)
    first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)
    arguments = arguments.map(lambda tensor: tensor.detach().requires_grad_())
    output, _ = layer.call(arguments)
    every = list(arguments.leaves().values())
    frozen = {id(terms[0]) for terms in arguments.series}
    chosen = [leaf for leaf in every if id(leaf) not in frozen]
    first = torch.autograd.grad(output.square().sum(), chosen, create_graph=True)
    expected = torch.autograd.grad(sum(g.sin().sum() for g in first), chosen)
    for result, value in zip(second, expected, strict=True):
        torch.testing.assert_close(result, value)


# torch.library ------------------------------------------------------------------------------------

CHECKED = {
    "gated": replace(SMALL["gated"], keep_inner=True),
    "relu": replace(SMALL["relu"], middle=replace(SMALL["relu"].middle, channels_last=True)),
}
every_checked = pytest.mark.parametrize("layer", CHECKED.values(), ids=CHECKED)


@every_checked
@float32_and_bfloat16
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_forward(layer: Layer, dtype: torch.dtype, requires_grad: bool) -> None:
    """Catches a schema, fake kernel or autograd registration that torch.compile would stumble
    over."""
    arguments = layer.arguments(dtype, torch.float32).map(lambda t: t.requires_grad_(requires_grad))
    weights = (
        *arguments.series,
        arguments.bias,
        torch.tensor(layer.middle.active),
        arguments.gates,
    )
    torch.library.opcheck(
        ops.bottleneck,
        (arguments.input, *weights, *layer.middle.geometry, layer.relu, layer.keep_inner),
    )


@every_checked
@float32_and_bfloat16
def test_opcheck_packed(layer: Layer, dtype: torch.dtype) -> None:
    """Catches the same in the operator that takes packed weights."""
    torch.library.opcheck(
        ops.bottleneck_packed, layer.packed(layer.arguments(dtype, torch.float32))
    )


@every_checked
@float32_and_bfloat16
def test_opcheck_backward(layer: Layer, dtype: torch.dtype) -> None:
    """Catches the same in the backward operator, for every kind of returned gradient."""
    arguments = layer.arguments(dtype, torch.float32)
    output, inner = layer.call(arguments)
    weights = (
        *arguments.series,
        arguments.bias,
        torch.tensor(layer.middle.active),
        arguments.gates,
    )
    for needs in (
        [True] * 6,
        [True, False, True, False, True, False],
        [False, True, False, True, False, True],
    ):
        saved = (
            output if layer.relu else None,
            *weights,
            *layer.middle.geometry,
            layer.relu,
            needs,
        )
        torch.library.opcheck(
            ops.bottleneck_backward, (arguments.grad, arguments.input, inner, *saved)
        )


@every_checked
@float32_and_bfloat16
def test_opcheck_pack(layer: Layer, dtype: torch.dtype) -> None:
    """Catches the same in the operator that packs."""
    arguments = layer.arguments(dtype, torch.float32)
    weights = (
        *arguments.series,
        arguments.bias,
        torch.tensor(layer.middle.active),
        arguments.gates,
    )
    torch.library.opcheck(ops.bottleneck_pack, (arguments.input, *weights))
