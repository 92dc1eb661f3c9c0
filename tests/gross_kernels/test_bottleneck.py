"""The layer in one pass, ``gross::bottleneck``: by value against the float64 definition in
``exact``, twice differentiated, bit by bit, packed, and as ``GroSSConv2d`` uses it.

The tolerance rule: an error is at most twice that of torch's three convolutions in the same
precision, on the exactly summed weights and without oneDNN, plus a tiny absolute term, see
:func:`tiny`."""

import copy
import importlib.util
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import ModuleType

import exact
import pytest
import torch
import torch.nn.functional as F
from accuracy import DTYPES, largest_error, tiny
from case import Case
from geometry import cases, pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gross_kernels
from gross_kernels import GroSSConv2d, dispatch, use_backend, use_fused

ops = torch.ops.gross
Named = dict[str, Tensor]

every_dtype = pytest.mark.parametrize(
    "dtypes", DTYPES, ids=lambda pair: "-".join(str(dtype)[6:] for dtype in pair)
)
float32_and_bfloat16 = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)
POINTWISE = ((1, 1), (0, 0), (1, 1))


@dataclass(frozen=True)
class Arguments:
    """The operator's tensors and an output gradient."""

    input: Tensor
    series: tuple[list[Tensor], list[Tensor], list[Tensor]]
    bias: Tensor | None
    gates: Tensor | None
    grad: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "Arguments":
        """With every tensor replaced."""
        return Arguments(
            change(self.input),
            tuple([change(term) for term in terms] for terms in self.series),
            None if self.bias is None else change(self.bias),
            None if self.gates is None else change(self.gates),
            change(self.grad),
        )

    def leaves(self) -> Named:
        """What gradients are taken of, by name."""
        names = "pointwise_in", "grouped", "pointwise_out"
        terms = {
            f"{n}[{i}]": t
            for n, series in zip(names, self.series, strict=True)
            for i, t in enumerate(series)
        }
        single = {"input": self.input, "bias": self.bias, "gates": self.gates}
        return {name: tensor for name, tensor in (single | terms).items() if tensor is not None}

    def grads(self, output: Tensor, grad: Tensor) -> Named:
        """Gradients of all leaves, by name."""
        leaves = self.leaves()
        found = torch.autograd.grad(output, list(leaves.values()), grad, materialize_grads=True)
        return {
            f"gradient of {name}": gradient for name, gradient in zip(leaves, found, strict=True)
        }


@dataclass(frozen=True)
class Layer:
    """One call of the operator: the grouped convolution in the middle, the channels outside, and
    what else it takes."""

    middle: Case
    in_channels: int
    out_channels: int
    bias: bool = True
    relu: bool = False
    keep_inner: bool = False

    def arguments(self, dtype: torch.dtype, terms_dtype: torch.dtype | None = None) -> Arguments:
        """Normal numbers, weights by their fan-in: the output's are about as large as the
        input's."""
        case = self.middle
        generator = torch.Generator().manual_seed(case.seed)
        terms_dtype = terms_dtype or dtype

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def weights(*shapes: tuple[int, ...]) -> list[Tensor]:
            return [
                (draw(*shape) / max(1, shape[1:].numel()) ** 0.5).to(terms_dtype)
                for shape in map(torch.Size, shapes)
            ]

        count = len(case.group_sizes)
        memory_format = torch.channels_last if case.channels_last else torch.contiguous_format
        return Arguments(
            draw(case.batch, self.in_channels, *case.size).to(dtype, memory_format=memory_format),
            (
                weights(*[(case.in_channels, self.in_channels, 1, 1)] * count),
                weights(*((case.out_channels, s, *case.kernel_size) for s in case.group_sizes)),
                weights(*[(self.out_channels, case.out_channels, 1, 1)] * count),
            ),
            draw(self.out_channels).to(terms_dtype) if self.bias else None,
            draw(count).to(terms_dtype) if case.gated else None,
            draw(case.batch, self.out_channels, *case.output_shape[2:]).to(
                dtype, memory_format=memory_format
            ),
        )

    def call(self, given: Arguments) -> tuple[Tensor, Tensor]:
        """Output and inner tensor of the operator."""
        case = self.middle
        weights = (*given.series, given.bias, torch.tensor(case.active), given.gates)
        return ops.bottleneck(given.input, *weights, *case.geometry, self.relu, self.keep_inner)

    def packed(self, given: Arguments) -> tuple[Tensor, Tensor, tuple[int, ...], bool]:
        """Arguments of the operator that takes packed weights."""
        case = self.middle
        weights = ops.bottleneck_pack(
            given.input, *given.series, given.bias, torch.tensor(case.active), given.gates
        )
        group_size = case.group_sizes[case.active - 1]
        shape = (
            case.in_channels,
            case.out_channels,
            group_size,
            self.out_channels,
            *case.kernel_size,
        )
        return (
            given.input,
            weights,
            (*shape, *(number for pair in case.geometry for number in pair)),
            self.relu,
        )

    def run(self, given: Arguments) -> Named:
        """Output, inner tensor if kept, and all gradients of the operator."""
        given = given.map(lambda t: t.detach().requires_grad_())
        output, inner = self.call(given)
        assert self.keep_inner or inner.numel() == 0
        kept = {"inner": inner} if self.keep_inner else {}
        return {"output": output.detach(), **kept, **given.grads(output, given.grad)}

    def definition(self, given: Arguments, clamped: Tensor | None) -> Named:
        """The same in float64 from the formula; the gradient passes where the output is not
        ``clamped``."""
        case = self.middle
        given = given.map(lambda t: t.detach().double().requires_grad_())
        first, grouped, last = given.series
        inner = exact.series_conv2d(given.input, first, case.active, given.gates, *POINTWISE)
        middle = exact.series_conv2d(inner, grouped, case.active, given.gates, *case.geometry)
        output = exact.series_conv2d(middle, last, case.active, given.gates, *POINTWISE)
        return self._with_gradients(given, inner, output, clamped)

    def library(self, given: Arguments, clamped: Tensor | None) -> Named:
        """The same from torch's three convolutions on the exactly summed weights, everything
        between them rounded to the input's dtype. In 16 bits each is computed in float32 and
        rounded once, see ``test_operator``."""
        case, dtype = self.middle, given.input.dtype
        wide = torch.promote_types(dtype, torch.float32)
        widths = (self.in_channels, case.in_channels, case.out_channels)
        weights = [
            exact.dense_weight(terms, case.active, given.gates, channels).to(dtype).requires_grad_()
            for terms, channels in zip(given.series, widths, strict=True)
        ]
        bias = None if given.bias is None else given.bias.detach().to(dtype).requires_grad_()
        input = given.input.detach().requires_grad_()

        def convolution(input: Tensor, weight: Tensor, *geometry: Sequence[int]) -> Tensor:
            return F.conv2d(input.to(wide), weight.to(wide), None, *geometry).to(dtype)

        dense = Arguments(input, tuple([weight] for weight in weights), bias, None, given.grad)
        with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
            inner = convolution(input, weights[0])
            middle = convolution(inner, weights[1], *case.geometry)
            output = F.conv2d(middle.to(wide), weights[2].to(wide), None)
            results = self._with_gradients(dense, inner, output, clamped)
        gates = torch.zeros(len(case.group_sizes), dtype=torch.float64)
        for (name, terms), channels in zip(self._series(given), widths, strict=True):
            whole = results.pop(f"gradient of {name}[0]").to(wide)
            for i, term in enumerate(terms):
                part = torch.zeros_like(term, dtype=wide)
                if i < case.active:
                    rows = torch.arange(len(term))[:, None]
                    part = whole[rows, exact.input_channels(channels, len(term), term.shape[1])]
                    gates[i] += (part.double() * term.double()).sum()
                results[f"gradient of {name}[{i}]"] = (
                    part if given.gates is None else part * given.gates[i].to(wide)
                )
        if given.gates is not None:
            results["gradient of gates"] = gates
        return {name: result.to(dtype) for name, result in results.items()}

    def _with_gradients(
        self, given: Arguments, inner: Tensor, output: Tensor, clamped: Tensor | None
    ) -> Named:
        if given.bias is not None:
            output = output + given.bias.to(output.dtype)[:, None, None]
        grad = given.grad.to(output.dtype)
        gradients = given.grads(output, grad if clamped is None else grad.masked_fill(clamped, 0))
        kept = {"inner": inner.detach()} if self.keep_inner else {}
        return {"output": (output.relu() if self.relu else output).detach(), **kept, **gradients}

    def _series(self, given: Arguments) -> Iterator[tuple[str, list[Tensor]]]:
        yield from zip(("pointwise_in", "grouped", "pointwise_out"), given.series, strict=True)


def assert_accurate(results: Named, layer: Layer, given: Arguments) -> None:
    """Apply the tolerance rule to ``results``, as :meth:`Layer.run` returns them."""
    # Which side of the kink an output is on is decided by the output under test, whose value is
    # checked for itself.
    clamped = results["output"] <= 0 if layer.relu else None
    truths, rivals = layer.definition(given, clamped), layer.library(given, clamped)
    magnitudes = replace(layer, relu=False).definition(given.map(torch.abs), None)
    sources = {f"gradient of {name}": leaf for name, leaf in given.leaves().items()}
    assert results.keys() == truths.keys() == rivals.keys()
    for name, truth in truths.items():
        result = results[name]
        assert result.shape == truth.shape, name
        assert result.dtype == sources.get(name, given.input).dtype, name
        if truth.numel():
            error, theirs = largest_error(result, truth), largest_error(rivals[name], truth)
            limit = 2 * theirs + tiny(given.input.dtype, truth, magnitudes[name])
            assert error <= limit, (
                f"{name}: error {error:.3g}, torch's {theirs:.3g}, limit {limit:.3g}"
            )


def assert_same_bits(results: Named, expected: Named) -> None:
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


# Values -----------------------------------------------------------------------------------------

LARGER = [None, None, None, (30, 41), (45, 17), (5, 300)]


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Any grouped convolution of ``cases`` between any channels, a quarter of them on maps of
    several strips."""
    middle, size = draw(cases()), draw(st.sampled_from(LARGER))
    if size is not None:
        middle = replace(middle, size=tuple(map(max, middle.size, size)))
    in_channels, out_channels = draw(pairs(1, 36))
    return Layer(middle, in_channels, out_channels, *(draw(st.booleans()) for _ in range(3)))


@every_dtype
@settings(max_examples=25)
@given(layer=layers())
def test_values(dtypes: tuple[torch.dtype, torch.dtype], layer: Layer) -> None:
    """Catches a wrong output, inner tensor or gradient, for any geometry and any of the operator's
    options."""
    arguments = layer.arguments(*dtypes)
    assert_accurate(layer.run(arguments), layer, arguments)


def plain(
    *channels: int, sizes: tuple[int, ...], size: tuple[int, int], batch: int = 2, **others: object
) -> Case:
    """A 3×3 grouped convolution of ``channels`` that keeps the image's size."""
    options = {"padding": (1, 1), "active": len(sizes), "channels_last": True} | others
    return Case(batch, *channels, sizes, (3, 3), size, **options)


TYPICAL = Layer(
    Case(
        2,
        18,
        12,
        (3, 9, 18),
        (3, 3),
        (9, 7),
        (2, 1),
        (1, 2),
        active=2,
        gated=True,
        channels_last=True,
    ),
    20,
    35,
)
SEVERAL = {
    "typical": TYPICAL,
    "typical_relu": replace(TYPICAL, relu=True, keep_inner=True, bias=False),
    "one_pixel": Layer(plain(16, 16, sizes=(1, 4), size=(1, 1), batch=5), 16, 48, relu=True),
    "two_by_two": Layer(plain(64, 64, sizes=(2, 8), size=(2, 2), batch=7), 24, 33),
    "four_by_four": Layer(
        plain(32, 64, sizes=(4, 16), size=(4, 4), batch=3, channels_last=False), 64, 32
    ),
    "seven_by_seven": Layer(
        plain(96, 48, sizes=(2, 6), size=(7, 7), batch=1, active=1), 130, 128, keep_inner=True
    ),
    "few_pixels": Layer(Case(1, 18, 36, (3,), (3, 3), (6, 5), (2, 1), (1, 1), active=1), 100, 100),
    "many_strips": Layer(plain(16, 16, sizes=(1, 2, 16), size=(61, 53), active=2), 17, 16),
    "many_strips_contiguous": Layer(
        plain(6, 6, sizes=(3,), size=(64, 40), batch=1, channels_last=False), 5, 7
    ),
    "many_strips_dilated": Layer(
        Case(
            1,
            12,
            18,
            (2, 6),
            (5, 3),
            (70, 30),
            (1, 1),
            (4, 0),
            (3, 2),
            active=2,
            channels_last=True,
        ),
        16,
        32,
    ),
    "many_strips_strided": Layer(
        Case(2, 8, 8, (1, 8), (3, 5), (80, 90), (3, 2), (0, 3), active=2), 9, 16, relu=True
    ),
    "stride_beyond_the_kernel": Layer(
        Case(2, 6, 12, (2, 6), (1, 1), (50, 40), (3, 3), active=2), 4, 6
    ),
    "wider_than_a_strip": Layer(plain(8, 8, sizes=(4,), size=(3, 1000), batch=1), 16, 16),
    "many_channels": Layer(
        plain(144, 288, sizes=(9, 36, 144), size=(20, 20), batch=1, active=1), 300, 272
    ),
    "all_in_the_padding": Layer(
        Case(2, 6, 12, (2, 6), (2, 3), (3, 4), padding=(7, 5), gated=True), 5, 3
    ),
}
every_one = pytest.mark.parametrize("layer", SEVERAL.values(), ids=SEVERAL)


@every_one
@float32_and_bfloat16
def test_values_by_shape(layer: Layer, dtype: torch.dtype) -> None:
    """Catches a fault where a strip, a thread's share or a vector ends: rows that are carried over,
    several whole images to a strip, part of an image, rows wider than a strip."""
    arguments = layer.arguments(dtype, torch.float32)
    assert_accurate(layer.run(arguments), layer, arguments)


CAPABILITY = torch.backends.cpu.get_cpu_capability()
ISAS = [
    "portable",
    *["avx2"] * (CAPABILITY in ("AVX2", "AVX512")),
    *["avx512"] * (CAPABILITY == "AVX512"),
]


@pytest.mark.parametrize("isa", ISAS)
def test_values_for_other_processors(
    isa: str, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a fault in kernels that a lesser processor than this one would run; the choice is
    made once a process."""
    monkeypatch.setenv("GROSS_KERNELS_ISA", isa)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "test_values_by_shape",
        __file__,
    ]
    result = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert f"{2 * len(SEVERAL)} passed" in result.stdout


@every_dtype
@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("keep_inner", [False, True])
def test_few_images(dtypes: tuple[torch.dtype, torch.dtype], batch: int, keep_inner: bool) -> None:
    """Catches a division by the number of images, and gradients of an empty batch that are not
    zeros."""
    layer = replace(
        TYPICAL, middle=replace(TYPICAL.middle, batch=batch), relu=True, keep_inner=keep_inner
    )
    arguments = layer.arguments(*dtypes)
    results = layer.run(arguments)
    assert_accurate(results, layer, arguments)
    if batch == 0:
        assert not any(result.any() for result in results.values())


@every_dtype
@pytest.mark.parametrize("gated", [False, True])
def test_nothing_comes_from_inactive_terms(
    dtypes: tuple[torch.dtype, torch.dtype], gated: bool
) -> None:
    """Catches a term or gate beyond ``active`` that is read, even if multiplied by zero, and
    gradients there."""
    layer = replace(TYPICAL, middle=replace(TYPICAL.middle, gated=gated))
    arguments = layer.arguments(*dtypes)
    expected = layer.run(arguments)
    for terms in arguments.series:
        terms[2].fill_(torch.nan)
    if arguments.gates is not None:
        arguments.gates[2] = torch.nan
    results = layer.run(arguments)
    assert_same_bits(results, expected)
    zeros = [
        results[f"gradient of {name}[2]"] for name in ("pointwise_in", "grouped", "pointwise_out")
    ]
    assert not any(gradient.any() for gradient in zeros)
    assert not gated or results["gradient of gates"][2] == 0


@pytest.mark.parametrize("terms_dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_rounded_once(terms_dtype: torch.dtype) -> None:
    """Catches terms that are scaled or added in 16 bits: here they cancel, and their rounding would
    not."""
    middle = plain(8, 8, sizes=(4, 8), size=(6, 5))
    layer = Layer(middle, 8, 8)
    arguments = layer.arguments(torch.bfloat16, terms_dtype)
    for terms in arguments.series:
        large = terms[0].mul_(64)
        terms[1].add_(-gross_kernels.expand(large, terms[1].shape[1], terms[1].shape[1]))
    assert_accurate(layer.run(arguments), layer, arguments)


# As an input may be laid out besides: images apart, and strides of zero.
MORE_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = LAYOUTS | {
    "images": lambda t: torch.repeat_interleave(t, 2, 0).to(memory_format=torch.channels_last)[::2],
    "expanded": lambda t: t[:, :1, :, :1].expand_as(t),
    "one_number": lambda t: t[:1, :1, :1, :1].expand_as(t),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", MORE_LAYOUTS)
@pytest.mark.parametrize("keep_inner", [False, True])
@pytest.mark.parametrize("size", [(9, 7), (40, 23)], ids=["several_to_a_strip", "several_strips"])
def test_strided_arguments(
    dtype: torch.dtype, layout: str, size: tuple[int, int], keep_inner: bool
) -> None:
    """Catches a kernel that takes the strides of any argument for granted, and an output in another
    memory format than a convolution's."""

    def lay(tensor: Tensor) -> Tensor:
        return (
            MORE_LAYOUTS[layout](tensor)
            if tensor.dim() == 4
            else torch.stack([tensor, -tensor], 1)[:, 0]
        )

    layer = replace(TYPICAL, keep_inner=keep_inner, middle=replace(TYPICAL.middle, size=size))
    arguments = layer.arguments(dtype).map(lay)
    results = layer.run(arguments)
    assert_accurate(results, layer, arguments)
    like = F.conv2d(arguments.input.float(), torch.ones(2, 20, 1, 1), None)
    for name in ["output", "gradient of input", *["inner"] * keep_inner]:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            ours = results[name].is_contiguous(memory_format=memory_format)
            assert ours == like.is_contiguous(memory_format=memory_format), name


@pytest.mark.parametrize("keep_inner", [False, True])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_value_that_is_not_finite(value: float, keep_inner: bool) -> None:
    """Catches a value that spreads to other images, or to outputs whose window does not hold it."""
    layer = Layer(plain(12, 12, sizes=(2, 4), size=(40, 30)), 20, 18, keep_inner=keep_inner)
    arguments = layer.arguments(torch.float32)
    clean, _ = layer.call(arguments)
    arguments.input[0, 5, 20, 4] = value
    output, _ = layer.call(arguments)
    reached = torch.zeros_like(output, dtype=torch.bool)
    reached[0, :, 19:22, 3:6] = True
    assert torch.equal(output.isfinite(), ~reached)
    assert torch.equal(output[~reached], clean[~reached])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_channels", [3, 16])
def test_relu_keeps_what_is_not_a_number(dtype: torch.dtype, out_channels: int) -> None:
    """Catches a clamp that turns NaN into zero, and so hides it, where torch's ReLU keeps it."""
    layer = Layer(plain(8, 8, sizes=(8,), size=(3, 3)), 8, out_channels, relu=True)
    arguments = layer.arguments(dtype)
    arguments.input[1, 2, 1, 1] = torch.nan
    output, _ = layer.call(arguments)
    assert output[1].isnan().all()
    assert output[0].isfinite().all()


# Gradients --------------------------------------------------------------------------------------

SMALL = {
    "plain": Layer(Case(2, 4, 4, (1, 2, 4), (1, 2), (2, 3), active=2), 2, 3),
    "gated": Layer(
        Case(1, 4, 2, (2, 4), (2, 1), (3, 2), (2, 1), (1, 1), (2, 1), active=2, gated=True), 3, 2
    ),
    "relu": Layer(
        Case(1, 4, 4, (2, 4), (2, 2), (2, 3), (1, 2), (1, 0), active=2, seed=3), 2, 3, relu=True
    ),
    "gated_relu": Layer(
        Case(1, 2, 4, (1, 2), (1, 2), (2, 2), active=1, gated=True, channels_last=True, seed=4),
        3,
        2,
        relu=True,
    ),
    "no_bias": Layer(Case(1, 2, 2, (2,), (1, 1), (2, 2)), 2, 2, bias=False),
}
every_small = pytest.mark.parametrize("layer", SMALL.values(), ids=SMALL)
every_inner = pytest.mark.parametrize("keep_inner", [False, True], ids=["recomputed", "kept"])


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


def backward(layer: Layer, arguments: Arguments, needs: Sequence[bool]) -> tuple:
    """The backward operator after the forward one."""
    output, inner = layer.call(arguments)
    weights = (
        *arguments.series,
        arguments.bias,
        torch.tensor(layer.middle.active),
        arguments.gates,
    )
    saved = (output if layer.relu else None, *weights, *layer.middle.geometry, layer.relu)
    return ops.bottleneck_backward(arguments.grad, arguments.input, inner, *saved, list(needs))


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


# torch.library ----------------------------------------------------------------------------------

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


# The same bits ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("threads")
@every_one
@float32_and_bfloat16
def test_same_bits_for_any_number_of_threads(layer: Layer, dtype: torch.dtype) -> None:
    """Catches outputs and gradients that depend on how many threads share the work: on where strips
    are cut, on which channels of a strip are whose, or on who adds first."""
    arguments = layer.arguments(dtype, torch.float32)
    for keep_inner in (False, True):
        layer = replace(layer, keep_inner=keep_inner)
        torch.set_num_threads(1)
        expected = layer.run(arguments)
        for count in (2, 3):
            torch.set_num_threads(count)
            assert_same_bits(layer.run(arguments), expected)


@every_dtype
def test_same_bits_in_repeated_runs(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Catches additions in an order left to chance, and results that depend on what an earlier call
    left behind: here NaN, in every place of the scratch memory."""
    for name in ("typical", "seven_by_seven", "many_strips_strided", "stride_beyond_the_kernel"):
        layer = SEVERAL[name]
        arguments = layer.arguments(*dtypes)
        expected = layer.run(arguments)
        assert_same_bits(layer.run(arguments), expected)
        poison = Layer(plain(64, 64, sizes=(64,), size=(60, 60)), 64, 64)
        poison.call(poison.arguments(*dtypes).map(lambda t: t.fill_(torch.nan)))
        assert_same_bits(layer.run(arguments), expected)


@every_dtype
def test_same_bits_packed(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Catches weights that are packed otherwise beforehand than in the call, with gates or without,
    for any size."""
    for layer in SEVERAL.values():
        for active in range(1, len(layer.middle.group_sizes) + 1):
            layer = replace(
                layer, middle=replace(layer.middle, active=active, batch=1), keep_inner=False
            )
            arguments = layer.arguments(*dtypes)
            assert torch.equal(
                ops.bottleneck_packed(*layer.packed(arguments)), layer.call(arguments)[0]
            )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "dtypes", [DTYPES[0], DTYPES[1], DTYPES[4]], ids=["float32", "float64", "bfloat16"]
)
@every_inner
def test_poisoned_buffers(dtypes: tuple[torch.dtype, torch.dtype], keep_inner: bool) -> None:
    """Catches outputs and scratch tensors of which an element is never written, or is read before
    it is."""
    for layer in SEVERAL.values():
        arguments = layer.arguments(*dtypes)
        results = replace(layer, keep_inner=keep_inner).run(arguments)
        assert all(result.isfinite().all() for result in results.values())
        assert ops.bottleneck_packed(*layer.packed(arguments)).isfinite().all()


# Packed layers ----------------------------------------------------------------------------------

SIZES = (1, 2, 4, 8)


class Calls(TorchDispatchMode):
    """Names of the operators that ran, and how often the whole-layer operator had packed
    weights."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.packed = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:
        self.names.append(func._schema.name)
        self.packed += func is ops.bottleneck_packed.default
        return func(*args, **(kwargs or {}))


def made(relu: bool = True, dtype: torch.dtype = torch.float32, **options: object) -> GroSSConv2d:
    """A layer in evaluation mode, half of whose outputs the ReLU clamps."""
    options = {
        "padding": 1,
        "group_sizes": SIZES,
        "width": (16, 32),
        "relu": relu,
        "dtype": dtype,
    } | options
    return GroSSConv2d(20, 18, 3, **options).eval()


def calls_of(layer: nn.Module, *inputs: Tensor) -> Calls:
    with torch.no_grad(), Calls() as calls:
        layer(*inputs)
    return calls


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


# By parts ---------------------------------------------------------------------------------------

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
    assert layer.explain() == "fused, packed: there is a kernel for the whole layer on the CPU"
    assert layer.explain("cuda") == "parts: there is no fused kernel for cuda tensors"
    with use_fused(False):
        assert layer.explain() == "parts: GROSS_KERNELS_FUSED=0 or use_fused(False)"
        assert_parts(layer, input)
        assert layer.pack().explain().startswith("parts: ")
    with use_backend("cpu"):
        assert layer.explain() == "fused: there is a kernel for the whole layer on the CPU"
        assert "gross::bottleneck" in calls_of(layer, input).names
    with use_backend("reference"):
        assert (
            layer.explain() == "parts: the reference backend is forced, which has no fused kernel"
        )
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


# Memory -----------------------------------------------------------------------------------------


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


# Refused ----------------------------------------------------------------------------------------


def refused(**changes: object) -> dict[str, object]:
    """Keyword arguments of the operator, some of them replaced."""
    given = Layer(plain(8, 12, sizes=(2, 4), size=(6, 5)), 5, 7).arguments(torch.float32)
    first, grouped, last = given.series
    arguments = {
        "input": given.input,
        "pointwise_in": first,
        "grouped": grouped,
        "pointwise_out": last,
        "bias": given.bias,
        "active": torch.tensor(2),
        "gates": None,
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
        "relu": False,
        "keep_inner": False,
    }
    assert changes.keys() <= arguments.keys()
    return arguments | changes


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "no_first": ({"pointwise_in": []}, "pointwise_in: "),
    "few_first": (
        {"pointwise_in": [ones(8, 5, 1, 1)]},
        "pointwise_in: got 1 terms, accepted is .* 2",
    ),
    "many_last": (
        {"pointwise_out": [ones(7, 12, 1, 1)] * 3},
        "pointwise_out: got 3 terms, accepted is .* 2",
    ),
    "no_last": ({"pointwise_out": []}, "pointwise_out: "),
    "first_channels": (
        {"pointwise_in": [ones(8, 6, 1, 1)] * 2},
        r"pointwise_in\[0\]: accepted is \[8, 5, 1, 1\]",
    ),
    "first_kernel": (
        {"pointwise_in": [ones(8, 5, 1, 1), ones(8, 5, 1, 3)]},
        r"pointwise_in\[1\]: accepted is \[8, 5",
    ),
    "first_width": (
        {"pointwise_in": [ones(8, 5, 1, 1), ones(4, 5, 1, 1)]},
        r"pointwise_in\[1\]: accepted is \[8, 5",
    ),
    "first_dimensions": ({"pointwise_in": [ones(8, 5)] * 2}, "pointwise_in: "),
    "first_dtype": (
        {"pointwise_in": [ones(8, 5, 1, 1, dtype=torch.float64)] * 2},
        r"pointwise_in\[0\]: .* dtype",
    ),
    "last_channels": (
        {"pointwise_out": [ones(7, 8, 1, 1)] * 2},
        r"pointwise_out\[0\]: accepted is \[7, 12, 1, 1\]",
    ),
    "last_outputs": (
        {"pointwise_out": [ones(7, 12, 1, 1), ones(6, 12, 1, 1)]},
        r"pointwise_out\[1\]: accepted is \[7",
    ),
    "last_dtype": (
        {"pointwise_out": [ones(7, 12, 1, 1, dtype=torch.bfloat16)] * 2},
        r"pointwise_out\[0\]: .* dtype",
    ),
    "no_outputs": ({"pointwise_out": [ones(0, 12, 1, 1)] * 2, "bias": None}, "pointwise_out: "),
    "bias_size": ({"bias": ones(8)}, r"bias: accepted is \[7\]"),
    "bias_dimensions": ({"bias": ones(7, 1)}, r"bias: accepted is \[7\]"),
    "bias_dtype": ({"bias": torch.ones(7, dtype=torch.int32)}, "bias: accepted dtypes"),
    "active_zero": ({"active": torch.tensor(0)}, "active: got 0, accepted is 1 to 2"),
    "active_large": ({"active": torch.tensor(3)}, "active: got 3, accepted is 1 to 2"),
    "active_dtype": ({"active": torch.tensor(1.0)}, "active: accepted is a 0-dimensional int64"),
    "gates_count": ({"gates": ones(3)}, "gates: accepted is one per term"),
    "gates_dtype": ({"gates": torch.ones(2, dtype=torch.int64)}, "gates: accepted dtypes"),
    "input_dimensions": ({"input": ones(5, 6, 5)}, "input: "),
    "input_dtype": ({"input": torch.ones(2, 5, 6, 5, dtype=torch.int32)}, "input: accepted dtypes"),
    "input_channels": (
        {"input": ones(2, 6, 6, 5)},
        r"pointwise_in\[0\]: accepted is \[8, 6, 1, 1\]",
    ),
    "terms_dtype": (
        {"input": ones(2, 5, 6, 5, dtype=torch.float64)},
        "accepted is the input's dtype",
    ),
    "too_small": ({"input": ones(2, 5, 1, 1), "padding": (0, 0)}, "kernel_size: "),
    "stride": ({"stride": (0, 1)}, "stride, padding, dilation: "),
    "padding": ({"padding": (1, -1)}, "stride, padding, dilation: "),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(changes: dict[str, object], message: str) -> None:
    """Catches arguments that the kernel would read beyond their ends, and an error that does not
    name the argument."""
    ops.bottleneck(**refused())
    with pytest.raises(RuntimeError, match=message):
        ops.bottleneck(**refused(**changes))


@pytest.mark.parametrize(
    "grouped",
    [[ones(12, 3, 3, 3)] * 2, [ones(12, 4, 3, 3), ones(12, 2, 3, 3)], [], [ones(12, 2)] * 2],
)
def test_refused_grouped(grouped: list[Tensor]) -> None:
    """Catches grouped terms that do not nest, and an error that calls them by another operator's
    name."""
    with pytest.raises(RuntimeError, match=r"grouped(\[\d\])?: "):
        ops.bottleneck(**refused(grouped=grouped))


PACKED = Layer(plain(8, 12, sizes=(2, 4), size=(6, 5)), 5, 7)


def numbers(**changes: int) -> tuple[int, ...]:
    """The shape of ``PACKED``, some numbers replaced."""
    shape = {"width_in": 8, "width_out": 12, "group_size": 4, "out_channels": 7}
    for name, number in {"kernel": 3, "stride": 1, "padding": 1, "dilation": 1}.items():
        shape |= {f"{name}h": number, f"{name}w": number}
    assert changes.keys() <= shape.keys()
    return tuple((shape | changes).values())


MADE = "packed: accepted is what bottleneck_pack made"
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


# Autocast and compilation -----------------------------------------------------------------------


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
