"""A call of the whole-layer operator ``gross::bottleneck``, the layers that make it, and how wrong
it may be.

The tolerance rule: an error is at most twice that of torch's three convolutions in the same
precision, on the exactly summed weights and without oneDNN, plus a tiny absolute term, see
:func:`tiny`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import exact
import pytest
import torch
import torch.nn.functional as F
from accuracy import DTYPES, largest_error, tiny
from case import Case
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gross_kernels import GroSSConv2d

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


# Calls --------------------------------------------------------------------------------------------


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


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


# Layers -------------------------------------------------------------------------------------------

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
