"""Layers whose kernel does not read the last rows of the image, several images at once."""

import pytest
import torch
import torch.nn.functional as F

import gross_kernels  # noqa: F401

ops = torch.ops.gross

#: Kernel size, stride and height: how many of the rows are read.
SHAPES = {
    "1x1_stride_2": (1, 2, 8),  # 7 of 8
    "1x1_stride_3": (1, 3, 12),  # 10 of 12
    "3x3_stride_2": (3, 2, 8),  # 7 of 8
    "2x2_stride_4": (2, 4, 7),  # 6 of 7
}


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("keep_inner", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "height"), SHAPES.values(), ids=SHAPES)
def test_rows_that_no_kernel_reads(
    kernel: int, stride: int, height: int, keep_inner: bool, channels_last: bool
) -> None:
    """Catches images of one strip that are read as if the rows of one followed those that the
    convolution needs of the other: every image but the first was another."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    input = torch.randn(5, 31, height, 4).to(memory_format=memory_format)
    first = torch.randn(48, 31, 1, 1) / 31**0.5
    middle = torch.randn(48, 8, kernel, kernel) / (8 * kernel**2) ** 0.5
    last = torch.randn(20, 48, 1, 1) / 48**0.5
    geometry = ((stride, stride), (0, 0), (1, 1))
    series = ([first], [middle], [last])
    output, _ = ops.bottleneck(
        input, *series, None, torch.tensor(1), None, *geometry, False, keep_inner
    )
    inner = F.conv2d(input.double(), first.double())
    expected = F.conv2d(inner, middle.double(), None, stride, groups=6)
    expected = F.conv2d(expected, last.double())
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-4)
