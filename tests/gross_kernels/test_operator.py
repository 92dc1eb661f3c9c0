"""Every backend that runs on this machine, by value, against the float64 definition in ``exact``,
by the rule of ``accuracy``."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import exact
import pytest
import torch
import torch.nn.functional as F
from accuracy import DTYPES, Target, assert_accurate
from case import Case
from geometry import cases
from hypothesis import assume, given, settings
from layouts import LAYOUTS
from torch import Tensor

from gross_kernels import expand, series_conv2d, use_backend
from gross_kernels.dispatch import BACKENDS
from gross_kernels.series import Series

#: Random calls for each backend and dtype; Triton's interpreter, some hundred times slower, is
#: given fewer.
EXAMPLES = int(os.environ.get("GROSS_TEST_EXAMPLES", 60))
TYPICAL = Case(
    2, 18, 12, (3, 9, 18), (3, 3), (9, 7), (2, 1), (1, 2), active=2, gated=True, channels_last=True
)

TARGETS = [
    target
    for device in ["cpu", *["cuda"] * torch.cuda.is_available()]
    for backend in BACKENDS
    for dtypes in DTYPES
    if (target := Target(backend, device, *dtypes)).serves(TYPICAL)
]
every_target = pytest.mark.parametrize("target", TARGETS, ids=str)
every_backend = pytest.mark.parametrize(
    "target", [t for t in TARGETS if t.dtype == torch.float32], ids=str
)


# The definition ---------------------------------------------------------------------------------


def test_exact_blocks_by_hand() -> None:
    """Catches a wrong block start in the tests' own definition: groups counted by input, not by
    output channel."""
    assert exact.input_channels(4, 4, 1).tolist() == [[0], [1], [2], [3]]
    assert exact.input_channels(4, 8, 2).tolist() == [[0, 1]] * 4 + [[2, 3]] * 4
    assert exact.input_channels(6, 3, 2).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert exact.input_channels(6, 2, 3).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_exact_sum_by_hand() -> None:
    """Catches terms that are placed, scaled or counted wrongly in the tests' own definition."""
    terms = [
        torch.tensor([[1.0], [2.0]])[..., None, None],
        torch.tensor([[10.0, 20.0], [30.0, 40.0]])[..., None, None],
    ]
    gates = torch.tensor([3.0, 0.5])
    assert exact.dense_weight(terms, 1, None, 2).flatten(1).tolist() == [[1, 0], [0, 2]]
    assert exact.dense_weight(terms, 2, None, 2).flatten(1).tolist() == [[11, 20], [30, 42]]
    assert exact.dense_weight(terms, 2, gates, 2).flatten(1).tolist() == [[8, 10], [15, 26]]


def test_exact_convolution_by_hand() -> None:
    """Catches a tests' definition that flips the kernel, or confuses rows and columns, stride,
    padding or dilation."""
    input = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])[None, None]
    term = torch.tensor([1.0, 10.0])[None, None, None]
    assert exact.series_conv2d(input, [term], 1, None, (1, 1), (0, 0), (1, 1)).tolist() == [
        [[[21, 32], [54, 65]]]
    ]
    assert exact.series_conv2d(input, [term], 1, None, (2, 1), (0, 1), (1, 2)).tolist() == [
        [[[20, 31, 2]]]
    ]
    assert exact.series_conv2d(input, [term], 1, None, (1, 2), (1, 0), (1, 1)).tolist() == [
        [[[0], [21], [54], [0]]]
    ]


# Values -----------------------------------------------------------------------------------------


@every_target
@settings(max_examples=EXAMPLES)
@given(case=cases())
def test_values(target: Target, case: Case) -> None:
    """Catches a wrong output or gradient of input, terms or gates, for any geometry, in any
    precision."""
    assume(target.serves(case))
    arguments = target.arguments(case)
    assert_accurate(target.run(case, *arguments), case, arguments)


#: Vectors of whole groups and parts of groups, with stretches of 2, 4 and 7 pairs of columns, and
#: an odd column over.
WIDE = [
    Case(
        2,
        64,
        64,
        (4, 16, 32),
        (3, 3),
        (9, 13),
        padding=(1, 1),
        active=3,
        gated=True,
        channels_last=True,
    ),
    Case(1, 48, 96, (24,), (3, 3), (8, 29), (2, 1), (1, 0), channels_last=True),
    Case(3, 64, 32, (32, 64), (3, 5), (6, 7), (1, 2), (1, 2), active=1, channels_last=True),
    Case(2, 80, 80, (8, 40), (1, 3), (5, 16), dilation=(1, 2), active=2, channels_last=True),
    Case(2, 32, 32, (16,), (2, 2), (4, 4), channels_last=True),
    Case(2, 32, 32, (16,), (3, 1), (6, 5), channels_last=True),  # no zeros between rows
]


@every_target
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_values_of_wide_groups(target: Target, case: Case) -> None:
    """Catches a fault of kernels that take whole vectors of one group: pairs of channels or of
    columns, rows' ends."""
    arguments = target.arguments(case)
    assert_accurate(target.run(case, *arguments), case, arguments)


#: Vectors of whole pixels, which the CPU's kernels read in place: every tile's width, strides,
#: unequal widths.
PIXELS = [
    Case(2, 64, 64, (1,), (3, 3), (9, 14), padding=(1, 1), gated=True, channels_last=True),
    Case(3, 32, 32, (1, 2), (3, 3), (5, 9), (2, 2), (1, 1), active=1, channels_last=True),
    Case(2, 32, 32, (2, 4), (3, 3), (7, 7), padding=(1, 1), active=1, channels_last=True),
    Case(
        5,
        16,
        16,
        (1, 2, 4, 8),
        (3, 3),
        (2, 2),
        padding=(1, 1),
        active=4,
        gated=True,
        channels_last=True,
    ),
    Case(3, 48, 48, (4,), (3, 3), (4, 4), padding=(1, 1), channels_last=True),
    Case(2, 32, 32, (4,), (3, 3), (8, 15), (2, 2), (1, 1), channels_last=True),
    Case(2, 32, 32, (2,), (3, 3), (6, 16), (1, 2), (1, 1), channels_last=True),
    Case(2, 32, 32, (8,), (3, 3), (6, 11), (2, 1), (1, 1), channels_last=True),
    Case(2, 32, 32, (4,), (5, 3), (9, 15), padding=(2, 1), channels_last=True),
    Case(2, 32, 64, (4,), (3, 3), (5, 28), padding=(1, 1), channels_last=True),
    Case(2, 32, 32, (2,), (3, 1), (5, 6), padding=(1, 0), channels_last=True),
    Case(3, 64, 64, (32,), (3, 3), (2, 2), padding=(1, 1), channels_last=True),
    Case(3, 64, 64, (2, 32), (3, 3), (4, 4), padding=(1, 1), active=2, channels_last=True),
    Case(3, 64, 64, (4,), (3, 3), (5, 3), padding=(1, 1), channels_last=True),
    Case(3, 58, 58, (29,), (3, 3), (6, 7), padding=(1, 1), channels_last=True),
    Case(2, 32, 32, (1,), (3, 3), (6, 1), padding=(1, 1), channels_last=True),
]


@every_target
@pytest.mark.parametrize("case", PIXELS, ids=str)
def test_values_of_whole_pixels(target: Target, case: Case) -> None:
    """Catches a fault of kernels without a copy of the input: borders, the last of several rows,
    taps that are not."""
    arguments = target.arguments(case)
    assert_accurate(target.run(case, *arguments), case, arguments)


CAPABILITY = torch.backends.cpu.get_cpu_capability()
#: Instruction sets below this processor's best, which the rest of the tests run with.
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
        "test_values[cpu",
        __file__,
    ]
    result = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert f"{len(DTYPES)} passed" in result.stdout


@every_backend
@pytest.mark.parametrize("active", [1, 7, 11])
def test_many_terms(target: Target, active: int) -> None:
    """Catches a fixed-size array of terms that is too short: eleven sizes, all powers of two to
    1024."""
    case = Case(
        1, 1024, 1024, tuple(2**i for i in range(11)), (1, 1), (2, 2), active=active, gated=True
    )
    arguments = target.arguments(case)
    assert_accurate(target.run(case, *arguments), case, arguments)


@every_backend
@pytest.mark.parametrize("active", [1, 15, 16])
@pytest.mark.parametrize("gated", [False, True])
def test_sixteen_terms(target: Target, active: int, gated: bool) -> None:
    """Catches a limit below 16 terms. Sixteen different sizes need 2^30 weights: these are sums of
    one shape."""
    terms = list(torch.randn(16, 5, 3, 1, 1, device=target.device))
    gates = torch.randn(16, device=target.device) if gated else None
    scales = [1.0] * 16 if gates is None else gates.tolist()
    expected = sum(
        scale * term.double() for scale, term in zip(scales[:active], terms, strict=False)
    )
    result = BACKENDS[target.backend].series_sum(Series(terms, active, gates))
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)


@every_target
def test_the_sum_is_rounded_once(target: Target) -> None:
    """Catches float32 terms that are rounded to 16 bits one by one: here they cancel, and their
    rounding would not."""
    case = Case(2, 8, 8, (4, 8), (3, 3), (6, 5), active=2)
    input, (large, small), gates, grad = target.arguments(case)
    terms = [64 * large, small - expand(64 * large, 8, 8)]
    arguments = (input, terms, gates, grad)
    assert_accurate(target.run(case, *arguments), case, arguments)


@every_target
def test_function_and_its_gradients(target: Target) -> None:
    """Catches a public function whose autograd returns another value, dtype or memory format than
    the backend does."""
    input, terms, gates, grad = arguments = target.arguments(TYPICAL)
    leaves = input, *terms, gates = [t.detach().requires_grad_() for t in (input, *terms, gates)]
    stride, padding, dilation = TYPICAL.geometry
    with use_backend(target.backend):
        output = series_conv2d(
            input,
            terms,
            TYPICAL.active,
            stride=stride,
            padding=padding,
            dilation=dilation,
            gates=gates,
        )
        grads = torch.autograd.grad(output, leaves, grad, materialize_grads=True)
    assert_accurate([output.detach(), *grads], TYPICAL, arguments)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert grads[0].is_contiguous(memory_format=torch.channels_last)


@every_backend
def test_unbatched_input(target: Target) -> None:
    """Catches an unbatched input that is taken for something else than a batch of one."""
    input, terms, gates, _ = target.arguments(replace(TYPICAL, channels_last=False))
    with use_backend(target.backend):
        batched = series_conv2d(input[:1], terms, gates=gates, padding=1)
        assert torch.equal(series_conv2d(input[0], terms, gates=gates, padding=1), batched[0])


@every_backend
@pytest.mark.parametrize(
    ("kernel_size", "dilation"), [((3, 3), (1, 1)), ((2, 4), (1, 1)), ((2, 3), (3, 2))]
)
def test_padding_words(
    target: Target, kernel_size: tuple[int, int], dilation: tuple[int, int]
) -> None:
    """Catches "same" that pads an even kernel on the wrong side, and "valid" that pads at all."""
    input, terms, _, _ = target.arguments(
        Case(2, 6, 4, (3, 6), kernel_size, (7, 8), dilation=dilation)
    )
    totals = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    (top, bottom), (left, right) = ((total // 2, total - total // 2) for total in totals)
    with use_backend(target.backend):
        same, valid = (
            series_conv2d(input, terms, padding=word, dilation=dilation)
            for word in ("same", "valid")
        )
    for result, source in ((same, F.pad(input, (left, right, top, bottom))), (valid, input)):
        expected = exact.series_conv2d(
            source.cpu(), [t.cpu() for t in terms], 2, None, (1, 1), (0, 0), dilation
        )
        torch.testing.assert_close(result.cpu().double(), expected, rtol=1e-5, atol=1e-4)
    assert same.shape[2:] == input.shape[2:]


# The same bits ----------------------------------------------------------------------------------

SEVERAL = [
    TYPICAL,
    Case(3, 28, 8, (7, 28), (5, 2), (20, 13), padding=(5, 6), dilation=(1, 3), active=2),
    Case(1, 64, 64, (1, 4, 16, 64), (3, 3), (17, 17), padding=(1, 1), active=3, gated=True),
    Case(2, 11, 33, (11,), (3, 3), (9, 7), (2, 1), (1, 2), gated=True),
]


def assert_same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a, b), (
            f"result {i} differs by up to {(a.double() - b.double()).abs().max().item():.3g}"
        )


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("case", SEVERAL, ids=range(len(SEVERAL)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(case: Case, dtype: torch.dtype) -> None:
    """Catches results of the CPU kernels that depend on how many threads share the work, or on
    which adds first."""
    target = Target("cpu", "cpu", dtype, dtype)
    arguments = target.arguments(case)
    torch.set_num_threads(1)
    expected = target.run(case, *arguments)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        for _ in range(2):
            assert_same_bits(target.run(case, *arguments), expected)


@every_target
def test_same_bits_in_repeated_runs(target: Target) -> None:
    """Catches atomic additions and reads of memory that nobody wrote."""
    for case in SEVERAL:
        arguments = target.arguments(case)
        expected = target.run(case, *arguments)
        for _ in range(3):
            assert_same_bits(target.run(case, *arguments), expected)


@pytest.mark.usefixtures("poisoned")
@every_target
def test_poisoned_buffers(target: Target) -> None:
    """Catches outputs and scratch tensors of which an element is never written, or is read before
    it is: windows wholly in the padding, pixels that no window reads, channels of a last partial
    block."""
    beyond = Case(2, 6, 12, (2, 6), (2, 3), (3, 4), padding=(7, 5), gated=True)
    unread = Case(2, 6, 12, (2, 6), (1, 1), (8, 9), stride=(3, 3), active=2)
    for case in (*SEVERAL, beyond, unread):
        arguments = target.arguments(case)
        assert_accurate(target.run(case, *arguments), case, arguments)


# Layouts ----------------------------------------------------------------------------------------


@every_target
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_arguments(target: Target, layout: str) -> None:
    """Catches a kernel that takes the strides of the input, of the output's gradient or of the
    terms for granted."""
    input, terms, gates, grad = arguments = target.arguments(TYPICAL)
    lay = LAYOUTS[layout]
    strided = (
        lay(input),
        [lay(term) for term in terms],
        torch.stack([gates, gates], 1)[:, 0],
        lay(grad),
    )
    assert_accurate(target.run(TYPICAL, *strided), TYPICAL, arguments)


@every_backend
def test_expanded_arguments(target: Target) -> None:
    """Catches a kernel that takes a stride of zero for a dense tensor, as in the gradient of a
    mean."""
    input, terms, gates, grad = target.arguments(TYPICAL)
    strided = (
        input[:, :1, :, :1].expand_as(input),
        [term[:1, :, :, :1].expand_as(term) for term in terms],
        gates[:1].expand_as(gates),
        grad[:1, :1, :1, :1].expand_as(grad),
    )
    assert_accurate(target.run(TYPICAL, *strided), TYPICAL, strided)


# Values that are not finite ---------------------------------------------------------------------


@every_target
@pytest.mark.parametrize("gated", [False, True])
def test_nothing_leaks_from_inactive_terms(target: Target, gated: bool) -> None:
    """Catches a term or gate beyond ``active`` that is read, even if multiplied by zero, and
    gradients there."""
    case = replace(TYPICAL, gated=gated)
    input, terms, gates, grad = target.arguments(case)
    expected = target.run(case, input, terms, gates, grad)
    terms[2].fill_(torch.nan)
    if gates is not None:
        gates[2] = torch.nan
    results = target.run(case, input, terms, gates, grad)
    assert_same_bits(results, expected)
    assert not results[4].any()
    assert not gated or results[5][2] == 0


@every_target
@pytest.mark.parametrize(("channels", "channels_last"), [(12, False), (16, True)])
def test_infinite_input(target: Target, channels: int, channels_last: bool) -> None:
    """Catches an infinity that spreads to outputs whose group or window does not hold it, or that
    gets lost. On the matrix unit's tile groups of Triton's kernels stand side by side, and zero
    times infinity is not zero: there it may spread to the window's other groups."""
    case = Case(
        2,
        channels,
        channels,
        (2, 4),
        (3, 3),
        (8, 8),
        padding=(1, 1),
        active=2,
        channels_last=channels_last,
    )
    input, terms, gates, _ = target.arguments(case)
    forward = BACKENDS[target.backend].forward
    clean = forward(input, Series(terms, 2, gates), case.geometry)
    input[0, 5, 4, 4] = torch.inf
    output = forward(input, Series(terms, 2, gates), case.geometry)
    reached = torch.zeros_like(output, dtype=torch.bool)
    reached[0, slice(None) if target.backend == "triton" else slice(4, 8), 3:6, 3:6] = True
    assert torch.equal(output[~reached], clean[~reached])
    weight = exact.dense_weight([t.cpu() for t in terms], 2, None, channels)[4:8, 5].flip(1, 2)
    assert torch.equal(output[0, 4:8, 3:6, 3:6].cpu().double(), weight.sign() * torch.inf)


# Empty ------------------------------------------------------------------------------------------


@every_target
def test_no_images(target: Target) -> None:
    """Catches a division by the number of images, and gradients of an empty batch that are not
    zeros."""
    case = replace(TYPICAL, batch=0)
    output, grad_input, *rest = target.run(case, *target.arguments(case))
    assert output.shape == case.output_shape
    assert grad_input.shape == (0, case.in_channels, *case.size)
    assert len(rest) == 4
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in rest)
