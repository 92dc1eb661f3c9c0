"""Grouped and last convolution in one Triton kernel, by value, in Triton's interpreter; run by
test_interpreter.py in a process of its own."""

import importlib
from dataclasses import dataclass, replace

import exact
import interpreter
import pytest
import torch
import torch.nn.functional as F
from accuracy import largest_error, tiny
from case import Case
from numerics import precision
from torch import Tensor

from gross_kernels import GroSSConv2d, dispatch, program, use_layer
from gross_kernels.backends import triton as backend
from gross_kernels.epilogue import ACTIVATIONS, Epilogue
from gross_kernels.grouped_pointwise import grouped_pointwise
from gross_kernels.series import Series

module = importlib.import_module("gross_kernels.backends.triton.grouped_pointwise")
POINTWISE = ((1, 1), (0, 0), (1, 1))


@dataclass(frozen=True)
class Pair:
    """A call: the grouped convolution, and what comes after."""

    grouped: Case
    out_channels: int
    activation: str = "none"
    bias: bool = True
    residual: bool = False
    residual_last: bool = False
    one_slope: bool = False


LAST = {"channels_last": True}
PAIRS = {
    "groups of 1": Pair(Case(2, 32, 32, (1,), (3, 3), (5, 6), padding=(1, 1), **LAST), 48, "relu"),
    "gated, contiguous": Pair(
        Case(1, 32, 32, (1, 4, 16), (3, 3), (5, 4), padding=(1, 1), active=3, gated=True),
        16, "silu", residual=True,
    ),
    "not a power of two": Pair(
        Case(2, 30, 30, (3, 15), (3, 2), (5, 4), padding=(1, 0), active=2, **LAST),
        33, "relu6", residual=True, residual_last=True,
    ),
    "groups of 11": Pair(Case(2, 11, 33, (11,), (2, 3), (5, 4), (2, 1), (1, 2), gated=True), 7),
    "groups of 18": Pair(
        Case(1, 36, 36, (9, 18), (3, 1), (5, 3), padding=(1, 0), active=2, gated=True),
        20, "prelu", bias=False, one_slope=True,
    ),
    "groups of 32": Pair(
        Case(1, 64, 64, (4, 32), (2, 2), (4, 5), padding=(1, 1), active=2, **LAST), 64, "prelu",
        residual=True,
    ),
    "groups of 64": Pair(Case(1, 64, 64, (8, 64), (1, 2), (3, 4), active=2, **LAST), 24, "relu"),
    "depth multiplier": Pair(
        Case(1, 6, 24, (1, 2), (2, 2), (4, 5), active=2, gated=True, **LAST), 40
    ),
    "fewer between": Pair(Case(2, 24, 6, (4, 8), (2, 2), (4, 5), padding=(1, 0), active=2), 9),
    "two blocks of outputs": Pair(
        Case(1, 16, 16, (4,), (3, 3), (4, 4), padding=(1, 1), **LAST), 300, "relu"
    ),
    "stride": Pair(Case(2, 32, 32, (4,), (3, 3), (7, 8), (2, 3), (1, 1), **LAST), 32, "relu"),
    "dilation": Pair(
        Case(1, 16, 16, (2, 4), (3, 3), (8, 11), (1, 2), (3, 2), (2, 3), active=2), 17
    ),
    "several tiles": Pair(
        Case(3, 16, 16, (4,), (3, 3), (19, 17), padding=(1, 1), **LAST), 18, "relu", residual=True
    ),
    "5×5": Pair(Case(1, 16, 16, (2,), (5, 5), (6, 7), padding=(2, 2), **LAST), 16),
}  # fmt: skip
every_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


def tensors(
    pair: Pair, dtype: torch.dtype, terms_dtype: torch.dtype
) -> tuple[Tensor, Series, Series, Epilogue]:
    case = pair.grouped
    input, terms, gates, _ = case.tensors(dtype, terms_dtype)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    width = case.out_channels
    terms = [term / term[0].numel() ** 0.5 for term in terms]
    last = [(draw(pair.out_channels, width, 1, 1) / width**0.5).to(terms_dtype) for _ in terms]
    batch, _, *size = case.output_shape
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    slopes = draw(1 if pair.one_slope else pair.out_channels).to(terms_dtype)
    residual = draw(batch, pair.out_channels, *size).to(dtype, memory_format=layout)
    epilogue = Epilogue(
        draw(pair.out_channels).to(terms_dtype) if pair.bias else None,
        residual if pair.residual else None,
        pair.activation,
        slopes if pair.activation == "prelu" else None,
        pair.residual_last,
    )
    return input, Series(terms, case.active, gates), Series(last, case.active, gates), epilogue


def wide(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.double()


def definition(
    pair: Pair, given: tuple[Tensor, Series, Series, Epilogue], absolute: bool = False
) -> Tensor:
    """In float64 from the formula; ``absolute``: of everything's magnitude, without an
    activation."""
    input, grouped, last, epilogue = given
    change = (lambda t: wide(t).abs()) if absolute else wide
    gates = None if grouped.gates is None else change(grouped.gates)
    between = exact.series_conv2d(
        change(input), [change(t) for t in grouped.terms], grouped.active, gates,
        *pair.grouped.geometry,
    )  # fmt: skip
    total = exact.series_conv2d(
        between, [change(t) for t in last.terms], last.active, gates, *POINTWISE
    )
    bias, residual, activation, slopes, residual_last = epilogue
    made = [None if each is None else change(each) for each in (bias, residual)]
    if absolute:
        return Epilogue(*made).of(total)
    return Epilogue(*made, activation, wide(slopes), residual_last).of(total)


def library(pair: Pair, given: tuple[Tensor, Series, Series, Epilogue]) -> Tensor:
    """Torch's two convolutions on the exactly summed weights, each in float32 and rounded once."""
    input, grouped, last, epilogue = given
    dtype, case = input.dtype, pair.grouped
    value = input
    for series, channels, geometry in (
        (grouped, case.in_channels, case.geometry),
        (last, case.out_channels, POINTWISE),
    ):
        weight = exact.dense_weight(series.terms, series.active, series.gates, channels).to(dtype)
        value = F.conv2d(value.float(), weight.float(), None, *geometry).to(dtype)
    rest = [None if each is None else each.to(dtype) for each in (epilogue.bias, epilogue.slopes)]
    bias, slopes = rest
    return epilogue._replace(bias=bias, slopes=slopes).of(value)


def run(given: tuple[Tensor, Series, Series, Epilogue], pair: Pair) -> Tensor:
    input, grouped, last, epilogue = given
    active = torch.tensor(grouped.active)
    return grouped_pointwise(
        input, grouped.terms, last.terms, active, grouped.gates, pair.grouped.geometry, epilogue
    )


def check(pair: Pair, dtype: torch.dtype, terms_dtype: torch.dtype) -> None:
    given = tensors(pair, dtype, terms_dtype)
    result, truth = run(given, pair), definition(pair, given)
    assert result.dtype == dtype
    assert result.is_contiguous(
        memory_format=torch.channels_last if pair.grouped.channels_last else torch.contiguous_format
    )
    limit = 2 * largest_error(library(pair, given), truth)
    limit += tiny(dtype, truth, definition(pair, given, absolute=True))
    assert largest_error(result, truth) <= limit


@every_pair
def test_bfloat16(pair: Pair) -> None:
    """Catches any wrong index, mask, weight or epilogue, sums in 16 bits, and terms that are
    rounded one by one."""
    check(pair, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("name", ["gated, contiguous", "not a power of two", "stride"])
def test_float32(name: str) -> None:
    """Catches the same to the last bits of float32, by three passes of TF32."""
    check(PAIRS[name], torch.float32, torch.float32)


@pytest.mark.parametrize("name", ["gated, contiguous", "fewer between"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_terms_of_16_bits(name: str, dtype: torch.dtype) -> None:
    """Catches terms that are taken for float32."""
    check(PAIRS[name], dtype, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", ["none", "before", "after"])
def test_epilogues(activation: str, residual: str) -> None:
    """Catches an activation that is left out, is another, or does not meet the residual on the
    right side."""
    pair = replace(
        PAIRS["stride"],
        activation=activation,
        residual=residual != "none",
        residual_last=residual == "after",
    )
    check(pair, torch.float16, torch.float32)


@pytest.mark.parametrize("name", ["groups of 1", "not a power of two"])
def test_strict(name: str) -> None:
    """Catches strict float32 that is multiplied as TF32."""
    with precision("ieee", "highest"):
        check(PAIRS[name], torch.float32, torch.float32)


@pytest.mark.parametrize("name", ["groups of 1", "groups of 32"])
def test_tf32(name: str) -> None:
    """Catches weights that are not rounded to TF32 before the matrix unit cuts them off: of pixels
    that TF32 has, it takes nothing."""
    pair = replace(PAIRS[name], activation="none", bias=False, residual=False)
    input, grouped, last, epilogue = tensors(pair, torch.float32, torch.float32)
    cut = torch.from_numpy(interpreter.cut_to_tf32(input.numpy()))
    given = (cut.to(memory_format=torch.channels_last), grouped, last, epilogue)
    with precision("tf32", "highest"):
        result = run(given, pair)

    def weight(series: Series, channels: int) -> Tensor:
        dense = exact.dense_weight(series.terms, series.active, series.gates, channels).float()
        return torch.from_numpy(interpreter.to_tf32(dense.numpy())).double()

    case = pair.grouped
    between = F.conv2d(cut.double(), weight(grouped, case.in_channels), None, *case.geometry)
    between = torch.from_numpy(interpreter.cut_to_tf32(between.float().numpy())).double()
    expected = F.conv2d(between, weight(last, case.out_channels))
    size = definition(pair, given, absolute=True)
    # A number between may be cut off on the other side of a step, 2⁻¹⁰ of it.
    assert largest_error(result, expected) <= 2**-10 * size.max() / 8
    assert largest_error(result, definition(pair, given)) > 1e-6


def test_layers() -> None:
    """Catches a layer that does not go this way where it is to, or computes another layer so."""
    layer = GroSSConv2d(20, 18, 3, 2, 1, group_sizes=(1, 4, 8), width=(16, 32), relu=True)
    input = torch.randn(2, 20, 6, 5)
    before = len(module._plans._plans)
    with torch.no_grad():
        with use_layer("grouped_pointwise"):
            result = layer(input)
        with use_layer("merged"):
            expected = layer(input)
    torch.testing.assert_close(result, expected)
    assert len(module._plans._plans) == before + 1
    with use_layer("grouped_pointwise"):
        layer(input).sum().backward()
    assert layer.grouped[0].grad is not None


def test_which_calls() -> None:
    """Catches groups and kernels that would unroll without end, or dtypes that there are no kernels
    for."""
    call = dispatch.Call(
        "cpu", torch.bfloat16, torch.float32, 128, 128, (4, 64, 128), (3, 3),
        PAIRS["groups of 1"].grouped.geometry, 2, "grouped_pointwise",
    )  # fmt: skip
    assert backend.supports(call)
    assert not backend.supports(replace(call, active=3))
    assert not backend.supports(replace(call, kernel_size=(7, 7)))
    assert not backend.supports(replace(call, dtype=torch.float64))


def test_no_images() -> None:
    """Catches a launch of no program."""
    pair = replace(PAIRS["groups of 1"], grouped=replace(PAIRS["groups of 1"].grouped, batch=0))
    assert run(tensors(pair, torch.bfloat16, torch.float32), pair).shape == (0, 48, 5, 6)


# Costs ------------------------------------------------------------------------------------------


def test_products_and_bytes() -> None:
    """Catches products and reads beyond those that the model of the layer's time counts: of every
    pixel and inner channel nine taps of 16 channels and all outputs; every pixel's nine neighbours,
    once for each block of outputs; every output written once."""
    pair = Pair(Case(2, 64, 64, (4,), (3, 3), (16, 16), padding=(1, 1), **LAST), 128, "relu")
    given = tensors(pair, torch.bfloat16, torch.float32)
    with interpreter.counted() as counts:
        run(given, pair)
    pixels, width, out_channels = 2 * 16 * 16, 64, 128
    assert counts["products"] == pixels * width * (9 * 16 + out_channels)
    # Of nine taps 3 · 16 − 2 rows and as many columns are within the image.
    within = 2 * 46 * 46 * width
    programs = pixels // 128
    weights = programs * (9 * width * 16 + width * out_channels + out_channels)
    terms = 4 * 9 * width + width * out_channels
    assert counts["loaded"] == within + weights + terms
    assert counts["stored"] == pixels * out_channels + 9 * width * 16 + width * out_channels


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [
        # Two images side by side, where one would leave half of the lanes idle.
        ((7, 7), 1, (2, 8, 8)),
        ((56, 56), 1, (2, 8, 8)),
        ((112, 112), 1, (1, 8, 16)),
        ((1, 1), 1, (128, 1, 1)),
    ],
)
def test_tile_shape_by_hand(
    size: tuple[int, int], stride: int, expected: tuple[int, int, int]
) -> None:
    """Catches tiles that compute pixels which are not there, or read more of the halo than they
    must."""
    assert module.tile_shape(128, size, [(stride, 2)] * 2) == expected


def test_programs_use_it() -> None:
    """Catches a step of a program whose weights or epilogue reach the operator in another order."""
    step = program.Step(
        "layer", 0, residual=1, activation="relu", in_channels=8, width=(16, 16), group_size=4,
        out_channels=12, kernel_size=(3, 3), padding=(1, 1), weights=0, bias=3,
    )  # fmt: skip
    weights = [torch.randn(16, 8, 1, 1), torch.randn(16, 4, 3, 3), torch.randn(12, 16, 1, 1)]
    weights = [weight / weight[0].numel() ** 0.5 for weight in weights] + [torch.randn(12)]
    input, residual = torch.randn(2, 8, 5, 6), torch.randn(2, 12, 5, 6)
    (expected,) = program.define(
        [input, residual], weights, program.Steps((step,), inputs=2, returned=(2,))
    )
    with torch.no_grad():
        result = program._in_two(
            step, input, weights, Epilogue(weights[3], residual, activation="relu")
        )
    torch.testing.assert_close(result, expected)
