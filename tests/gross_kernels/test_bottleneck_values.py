"""The layer in one pass, ``gross::bottleneck``: by value against the float64 definition in
``exact``, bit by bit, and what it refuses."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accuracy import DTYPES
from geometry import cases, pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS
from torch import Tensor
from whole_layer import (
    SEVERAL,
    TYPICAL,
    Layer,
    assert_accurate,
    assert_same_bits,
    every_dtype,
    every_inner,
    every_one,
    float32_and_bfloat16,
    ones,
    plain,
)

import gross_kernels
from gross_kernels.environment import instruction_set

ops = torch.ops.gross


# Values -------------------------------------------------------------------------------------------

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
#: Without that of this process, of which those with more products have the same code for layers.
OTHERS = [isa for isa in ISAS if not instruction_set().startswith(isa)]


@pytest.mark.parametrize("isa", OTHERS)
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


# The same bits ------------------------------------------------------------------------------------


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


# Refused ------------------------------------------------------------------------------------------


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
