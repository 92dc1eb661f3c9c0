"""``gross::sum_pool`` and its gradient against sums written term by term in float64."""

import pytest
import torch
import windows as exact
from hypothesis import example, given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS
from torch import Tensor
from torch.func import jvp, vmap

from gross_kernels import pooling, use_backend
from gross_kernels.pooling import SumPool2d, Windows

pool, pool_backward = torch.ops.gross.sum_pool, torch.ops.gross.sum_pool_backward
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return LAYOUTS[layout](values)


def pooled_gradient(function, input: Tensor, grad: Tensor) -> Tensor:
    leaf = input.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf, grad)[0]


def assert_accurate(got: Tensor, exact_sum: Tensor, librarys: Tensor) -> None:
    """The rule: at most twice the error of PyTorch's own sums in the same precision, and a unit in
    the last place of the largest."""
    assert got.shape == exact_sum.shape
    if got.numel() == 0:
        return
    wide = got.double()
    error, librarys_error = (wide - exact_sum).abs().max(), (librarys.double() - exact_sum).abs()
    tiny = torch.finfo(got.dtype).eps * exact_sum.abs().max()
    assert error <= 2 * librarys_error.max() + tiny


@settings(deadline=None, max_examples=150)
@given(
    exact.geometries(), st.sampled_from(DTYPES), st.sampled_from(sorted(LAYOUTS)), st.integers(0, 9)
)
@example(((1, 9, 5, 70), Windows((1, 2, 2), 1, (1, 1), (1, 1), (1, 1))), DTYPES[0], "contiguous", 1)
@example(((2, 66, 9, 9), Windows((33, 3, 3))), DTYPES[2], "channels_last", 1)
# Wider than one part of the work.
@example(((1, 64, 4, 900), Windows((5, 2, 3))), DTYPES[0], "channels_last", 1)
@example(((1, 200, 4, 300), Windows((1, 2, 2))), DTYPES[0], "contiguous", 1)
def test_sums_and_their_gradient(geometry, dtype, layout, seed):
    """Catches a window that is short or long by one, groups that run into one another, a border, a
    layout that is read wrongly, sums that lose digits."""
    shape, windows = geometry
    input = drawn(shape, dtype, layout, seed)
    output = pool(input, *windows)
    expected = exact.sum_pool(input.double(), windows)
    wide = torch.promote_types(dtype, torch.float32)
    librarys = exact.sum_pool(input.to(wide), windows).to(dtype)
    assert output.dtype == dtype
    assert_accurate(output, expected, librarys)

    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    grad = grad.contiguous(memory_format=pooling.memory_format(output))
    got = pool_backward(grad, input.shape[1:], *windows)
    each = [
        pooled_gradient(lambda x: exact.sum_pool(x, windows), input.to(of), grad.to(of))
        for of in (torch.float64, wide)
    ]
    assert_accurate(got, each[0], each[1].to(dtype))


@settings(deadline=None, max_examples=60)
@given(exact.geometries())
def test_the_definition_says_the_same(geometry):
    """Catches a definition, which runs under transforms and on other devices, that is another."""
    shape, windows = geometry
    input = torch.randn(shape, dtype=torch.float64)
    expected = exact.sum_pool(input, windows)
    torch.testing.assert_close(pooling.define(input, *windows), expected)
    grad = torch.randn_like(expected)
    found = pooling.define_backward(grad, input.shape[1:], *windows)
    torch.testing.assert_close(
        found, pooled_gradient(lambda x: exact.sum_pool(x, windows), input, grad)
    )


def test_long_windows_keep_their_digits():
    """Catches running sums by differences of prefixes: a large number would leave its rounding
    error behind in every window after it."""
    input = torch.ones(1, 2000, 1, 1)
    input[:, 0] = 1e8
    output = pool(input, (1000, 1, 1), 1, (1, 1), (0, 0), (1, 1))
    assert torch.equal(output[0, 1:, 0, 0], torch.full((1000,), 1000.0))


def test_memory_formats_stay():
    """Catches an output whose strides are not what compiled code was told."""
    windows = Windows((2, 2, 2), 1, (1, 1), (1, 1), (1, 1))
    for layout in ("contiguous", "channels_last", "window", "channels_last_window"):
        input = drawn((2, 5, 6, 7), torch.float32, layout)
        meta = pool(input.to("meta"), *windows)
        output = pool(input, *windows)
        assert output.stride() == meta.stride()
        grad = pool_backward(output, input.shape[1:], *windows)
        assert grad.stride() == pool_backward(meta, input.shape[1:], *windows).stride()


def test_the_number_of_threads_changes_no_bit():
    """Catches parts of the work that overlap or leave gaps."""
    input = drawn((2, 40, 60, 60), torch.float32, "channels_last")
    windows = Windows((7, 3, 2), 1, (1, 1), (2, 1), (2, 1))
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs.append(pool(input, *windows))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    librarys = exact.sum_pool(input, windows)
    assert_accurate(outputs[0], exact.sum_pool(input.double(), windows), librarys)


def test_operator_checks():
    """Catches a schema, shapes or gradients that torch's own checks find wrong."""
    input = torch.randn(2, 6, 7, 8, dtype=torch.float64, requires_grad=True)
    for windows in (Windows((2, 2, 3), 2, (1, 1), (1, 2), (2, 1)), Windows((3, 1, 4), 1, (2, 3))):
        torch.library.opcheck(pool.default, (input, *windows))
        grad = torch.randn_like(pool(input.detach(), *windows)).requires_grad_()
        torch.library.opcheck(pool_backward.default, (grad, [6, 7, 8], *windows))
        assert torch.autograd.gradcheck(lambda x: pool(x, *windows), input)  # noqa: B023
        assert torch.autograd.gradgradcheck(lambda x: pool(x, *windows), input)  # noqa: B023


def test_transforms():
    """Catches forward mode and vmap that give other numbers."""
    windows = Windows((2, 2, 2))
    input, tangent = torch.randn(2, 3, 2, 5, 6, 6, dtype=torch.float64)
    expected = exact.sum_pool(tangent.flatten(0, 1), windows)
    _, got = jvp(lambda x: pool(x, *windows), (input.flatten(0, 1),), (tangent.flatten(0, 1),))
    torch.testing.assert_close(got, expected)
    batched = vmap(lambda x: pool(x, *windows))(tangent)
    torch.testing.assert_close(batched.flatten(0, 1), expected)


def test_autocast_casts_the_input():
    """Catches sums in float32 that are handed to a convolution in 16 bits."""
    with torch.autocast("cpu", torch.bfloat16):
        assert pool(torch.randn(1, 2, 4, 4), *Windows((1, 2, 2))).dtype == torch.bfloat16


def test_the_forced_reference_serves():
    """Catches a forced backend that is not asked."""
    input = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    module = SumPool2d(Windows((1, 2, 2)))
    expected = exact.sum_pool(input, module.windows)
    with use_backend("reference"):
        torch.testing.assert_close(module(input), expected)
    torch.testing.assert_close(SumPool2d(module.windows, kernels=False)(input), expected)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"window": (1, 2)}, "window"),
        ({"window": (0, 2, 2)}, "window"),
        ({"window": (4, 2, 2)}, "window"),
        ({"window": (1, 9, 2)}, "window"),
        ({"groups": 2}, "window"),
        ({"groups": 0}, "groups"),
        ({"stride": (0, 1)}, "stride"),
        ({"padding": (-1, 1)}, "padding"),
        ({"dilation": (1, 0)}, "dilation"),
    ],
)
def test_the_kernel_refuses(changed, named):
    """Catches arguments that would have the kernel read elsewhere."""
    usual = {
        "window": (1, 2, 2), "groups": 1, "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=rf"{named}.*accepted"):
        pool(torch.randn(1, 3, 4, 4), *{**usual, **changed}.values())
    with pytest.raises(RuntimeError, match=r"grad: accepted is the output's shape"):
        pool_backward(torch.randn(1, 3, 4, 4), [3, 4, 4], *usual.values())
