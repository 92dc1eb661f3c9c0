"""What the benchmarks of 8 bits measure: all of it computes the same."""

import pytest
import torch

from benchmarks import test_int8
from benchmarks.eight_bits import variants
from benchmarks.shapes import Shape
from gross_kernels.environment import weight_bits

pytestmark = pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")

SHAPE = Shape(24, 40, (3, 3), (2, 2), (1, 1), (9, 11), 32, (1, 4), (16, 32))


@pytest.mark.parametrize("bits", ["8 bits", "numbers"])
@pytest.mark.parametrize("kind", ["layer", "dense"])
def test_programs_are_right_the_last_time(kind: str, bits: str) -> None:
    """Catches a program that returns another value than its last, weights whose numbers are not
    those of their bits, and sums that saturate: what is timed would be something else."""
    step, weights = (
        test_int8.layer_step(SHAPE, 4) if kind == "layer" else test_int8.dense_step(SHAPE)
    )
    input = test_int8.images(SHAPE, 3)
    ours = test_int8.program(step, weights, input, test_int8.HELD)
    exact = test_int8.check(ours, step, weights, input)
    assert 0.5 < exact.std() < 2  # of variance 1: else all of it is cut
    if bits == "numbers":
        plain = test_int8.program(step, test_int8.in_float32(step, weights), input, None)
        assert (plain()[:1] - exact).abs().mean() < 0.05


def test_pytorchs_convolutions_have_the_same_bits() -> None:
    """Catches a zero point, a scale, a stride or a bias that one of PyTorch's operators is not
    given."""
    step, weights = test_int8.dense_step(SHAPE)
    input = test_int8.images(SHAPE, 3)
    exact = test_int8.program(step, weights, input, test_int8.HELD)()
    convolution = test_int8.convolution(step, weights)
    calls = variants([convolution], test_int8.HELD, input, 2)
    assert calls
    for name, call in calls.items():
        error = (call() - exact)[exact.abs() < 3.9].abs().max()
        assert error <= 0.51 * test_int8.HELD.scale, name


def test_weights_fit_the_instructions() -> None:
    """Catches weights of 8 bits where sums of two products saturate: PyTorch's would be wrong, and
    ours take the slow way."""
    weight, scales = test_int8.drawn(64, 32, (3, 3))
    assert weight.abs().max() == 2 ** (weight_bits() - 1) - 1
    sums = torch.nn.functional.conv2d(torch.randn(8, 32, 9, 9), weight * scales.view(-1, 1, 1, 1))
    assert sums.std() == pytest.approx(1, rel=0.1)
