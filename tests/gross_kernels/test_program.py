"""Programs against their definition in float64, by the tolerance rule of ``tests/definition``."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from accuracy import largest_error, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gross_kernels.environment import instruction_set
from gross_kernels.program import ACTIVATIONS, KINDS, Program, Step, Steps, define, from_text, run

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
POOLING = ("max_pool", "mean_pool", "mean", "quantise")


@dataclass
class Case:
    """A program with inputs and weights for it."""

    steps: Steps
    inputs: list[Tensor]
    weights: list[Tensor]

    def run(self) -> list[Tensor]:
        packed = self.steps.pack(self.weights, self.inputs[0])
        return run(self.inputs, packed, self.steps.text())

    def truth(self) -> list[Tensor]:
        return define(self._wide(self.inputs), self._wide(self._rounded()), self.steps)

    def magnitude(self) -> list[Tensor]:
        """Of every output the largest that it can be: with sums of magnitudes."""
        steps = [replace(step, activation="none") for step in self.steps.steps]
        positive = [
            [t.abs() for t in tensors] for tensors in self._both(self.inputs, self._rounded())
        ]
        return define(*positive, replace(self.steps, steps=tuple(steps)))

    def library(self) -> list[Tensor]:
        """By PyTorch in this dtype, in 16 bits in float32: what is stored is rounded to it once,
        and so is what lies between a layer's three convolutions."""
        dtype = self.inputs[0].dtype
        wide = torch.promote_types(dtype, torch.float32)
        values, weights = list(self.inputs), [w.to(wide) for w in self._rounded()]
        for step in self.steps.steps:
            read = [values[step.source].to(wide)]
            if step.residual >= 0:
                read.append(values[step.residual].to(wide))
            for part in _parts(step):
                with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
                    single = Steps((part,), len(read), (len(read),))
                    read[0] = define(read, weights, single)[0].to(dtype).to(wide)
            values.append(read[0].to(dtype))
        return [values[i] for i in self.steps.returned]

    def _rounded(self) -> list[Tensor]:
        """Kernels as they are stored; bias and slopes are kept in the sum's type."""
        dtype = self.inputs[0].dtype
        return [w.to(dtype) if w.dim() == 4 else w for w in self.weights]

    def _both(self, *lists: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        return (self._wide(tensors) for tensors in lists)

    @staticmethod
    def _wide(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.double() for tensor in tensors]


def _parts(step: Step) -> list[Step]:
    """A layer as three convolutions; everything else as it is, reading the first value (and, as
    residual, the second)."""
    residual = 1 if step.residual >= 0 else -1
    if step.kind != "layer":
        return [replace(step, source=0, residual=residual)]
    pointwise = Step("convolution", 0, weights=step.weights)
    first = replace(pointwise, in_channels=step.in_channels, out_channels=step.width[0])
    first = replace(first, width=(step.in_channels, step.width[0]), group_size=step.in_channels)
    middle = replace(
        step, kind="convolution", source=0, residual=-1, activation="none", bias=-1, slopes=-1
    )
    middle = replace(middle, in_channels=step.width[0], out_channels=step.width[1])
    middle = replace(middle, weights=step.weights + 1)
    last = replace(
        pointwise,
        in_channels=step.width[1],
        width=(step.width[1], step.out_channels),
        group_size=step.width[1],
        out_channels=step.out_channels,
        weights=step.weights + 2,
        bias=step.bias,
        slopes=step.slopes,
        activation=step.activation,
        residual=residual,
        residual_last=step.residual_last,
    )
    return [first, middle, last]


def assert_accurate(case: Case, results: Sequence[Tensor]) -> None:
    columns = (results, case.truth(), case.magnitude(), case.library())
    for i, (result, truth, magnitude, rival) in enumerate(zip(*columns, strict=True)):
        what = f"{i}: {case.steps}"
        dtype = case.inputs[0].dtype
        assert result.shape == truth.shape, what
        assert result.dtype == dtype, what
        assert result.dim() != 4 or result.is_contiguous(memory_format=torch.channels_last)
        if truth.numel():
            error, theirs = largest_error(result, truth), largest_error(rival, truth)
            limit = 2 * theirs + tiny(dtype, truth, magnitude)
            assert error <= limit, f"{what}: error {error:.3g}, torch's {theirs:.3g}, {limit:.3g}"


# Drawing ------------------------------------------------------------------------------------------


class Drawn:
    """A random program, step by step."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.steps: list[Step] = []
        self.weights: list[Tensor] = []
        #: Of all values; of a linear step's without pixels.
        self.shapes: list[tuple[int, ...]] = []
        self.inputs: list[Tensor] = []

    def add_input(self, *shape: int) -> None:
        layout = self.random.choice(list(LAYOUTS.values()))
        self.inputs.append(layout(torch.randn(shape, generator=self.torch)).to(self.dtype))
        self.shapes.append(shape[1:])

    def weight(self, *shape: int) -> int:
        """Its number. A unit sum of squares over what it sums."""
        dtype = self.random.choice([self.dtype, self.dtype, torch.float32])
        scale = math.prod(shape[1:]) ** -0.5
        self.weights.append((scale * torch.randn(shape, generator=self.torch)).to(dtype))
        return len(self.weights) - 1

    def add(self, kind: str, source: int, **end: object) -> bool:
        """A step that reads a value; whether the value was one that such a step can read."""
        shape = self.shapes[source]
        if len(shape) == 1 and kind != "linear":
            return False
        if kind == "linear" and source < len(self.inputs) and math.prod(shape[1:]) > 1:
            return False  # The order of an input's pixels is its own.
        channels, size, choice = shape[0], shape[1:], self.random.choice
        made: dict[str, object] = {}
        if kind == "linear":
            inputs, outputs, size = math.prod(shape), choice([1, 7, 16, 33]), ()
            made = self._sizes(inputs, (inputs, outputs), inputs, outputs)
            made["weights"] = self.weight(outputs, inputs, 1, 1)
        elif kind in ("mean", "quantise"):
            outputs, size = channels, (1, 1) if kind == "mean" else size
        else:
            window, size = self._window(kind, size)
            if size is None:
                return False
            outputs = channels
            if kind in ("layer", "convolution"):
                made = getattr(self, f"_{kind}")(channels, window["kernel_size"])
                outputs = made["out_channels"]
            made |= window
        made |= self._end(kind, outputs, (outputs, *size)) | end
        self.steps.append(Step(kind, source, **made))  # type: ignore[arg-type]
        self.shapes.append((outputs, *size))
        return True

    @staticmethod
    def _sizes(inputs: int, width: tuple[int, int], size: int, outputs: int) -> dict:
        return {
            "in_channels": inputs, "width": width, "group_size": size, "out_channels": outputs,
        }  # fmt: skip

    def _convolution(self, channels: int, kernel: tuple[int, int]) -> dict:
        groups = self.random.choice([g for g in range(1, channels + 1) if channels % g == 0])
        outputs = groups * self.random.choice([1, 2, 4, 8])
        made = self._sizes(channels, (channels, outputs), channels // groups, outputs)
        return made | {"weights": self.weight(outputs, channels // groups, *kernel)}

    def _layer(self, channels: int, kernel: tuple[int, int]) -> dict:
        size, groups = self.random.choice([1, 2, 4, 8]), self.random.choice([1, 2, 3, 4])
        width = (size * groups, groups * self.random.choice([1, 2, 4, 8]))
        outputs = self.random.choice([1, 5, 16, 32])
        made = self._sizes(channels, width, size, outputs)
        made["weights"] = self.weight(width[0], channels, 1, 1)
        self.weight(width[1], size, *kernel)
        self.weight(outputs, width[1], 1, 1)
        return made

    def _window(self, kind: str, size: tuple[int, ...]) -> tuple[dict, tuple[int, ...] | None]:
        choice = self.random.choice
        kernel = (choice([1, 1, 2, 3, 5]), choice([1, 1, 2, 3, 5]))
        kernel = choice([kernel, (kernel[0], kernel[0])])
        stride = choice([(1, 1), (1, 1), (2, 2), (1, 2), (3, 2)])
        dilation = (1, 1) if kind in POOLING else choice([(1, 1), (1, 1), (2, 2), (1, 3)])
        # Pooling takes no more.
        most = [k // 2 for k in kernel] if kind in POOLING else [k + 1 for k in kernel]
        padding = choice([(0, 0), tuple(k // 2 for k in kernel), tuple(most)])
        rest = [
            n + 2 * p - d * (k - 1) - 1
            for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)
        ]
        window = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
        if min(rest) < 0:
            return window, None
        return window, tuple(r // s + 1 for r, s in zip(rest, stride, strict=True))

    def _end(self, kind: str, outputs: int, shape: tuple[int, ...]) -> dict:
        end: dict[str, object] = {}
        names = [name for name in ACTIVATIONS if name != "prelu" or kind not in POOLING]
        end["activation"] = self.random.choice(names)
        if kind not in POOLING and self.random.random() < 0.7:
            end["bias"] = self.weight(outputs)
        if end["activation"] == "prelu":
            end["slopes"] = self.weight(outputs)
        alike = [i for i, other in enumerate(self.shapes) if other == shape and len(shape) == 3]
        if alike and self.random.random() < 0.7:
            end["residual"] = self.random.choice(alike)
            end["residual_last"] = self.random.random() < 0.5
        return end

    def case(self, *returned: int) -> Case:
        steps = Steps(tuple(self.steps), len(self.inputs), returned)
        return Case(steps, self.inputs, self.weights)


def drawn(seed: int, dtype: torch.dtype) -> Case | None:
    """A program of one to five steps on images of up to 18×18."""
    made = Drawn(seed, dtype)
    choice = made.random.choice
    batch = choice([1, 2, 3, 5])
    for _ in range(choice([1, 1, 2])):
        made.add_input(
            batch,
            choice([1, 3, 8, 16, 20, 32, 48]),
            choice([1, 2, 5, 9, 18]),
            choice([1, 4, 7, 17]),
        )
    for _ in range(choice([1, 2, 3, 4, 5])):
        made.add(choice(KINDS), choice(range(len(made.shapes))))
    if not made.steps:
        return None
    values = range(len(made.inputs), len(made.shapes))
    return made.case(*dict.fromkeys([values[-1], choice(values)]))


@every_dtype
@settings(max_examples=60)
@given(seed=st.integers(0, 2**31))
def test_random_programs(dtype: torch.dtype, seed: int) -> None:
    """Catches a step that reads another's memory, a window, channel or end of a step that is lost,
    and a value that is overwritten before its last reader."""
    case = drawn(seed, dtype)
    if case is not None:
        assert_accurate(case, case.run())


ENDS = [(a, r) for a in ACTIVATIONS for r in (None, False, True)]


def single(kind: str, activation: str, residual_last: bool | None, dtype: torch.dtype) -> Case:
    """A convolution whose result a step of every kind reads; and the residual is computed too."""
    made = Drawn(7, dtype)
    made.add_input(3, 24, 9, 7)
    plain: dict = {"activation": "none", "residual": -1}
    same = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    made._window = lambda kind, size: (same, size)  # type: ignore[method-assign]
    made.add("max_pool", 0, **plain)
    made._layer = lambda *_: layer_of(made)  # type: ignore[method-assign]
    made._convolution = lambda *_: convolution_of(made)  # type: ignore[method-assign]
    if kind in ("mean", "linear"):
        made.add("mean", 1, **plain)
        made.add("mean_pool", 2, **plain)
    end = {"activation": activation, "residual": -1, "bias": -1, "slopes": -1}
    if kind not in POOLING:
        end |= {"bias": made.weight(33 if kind == "linear" else 24)}
    if activation == "prelu":
        end |= {"slopes": made.weight(33 if kind == "linear" else 24)}
    if residual_last is not None:
        end |= {"residual": 3 if kind == "mean" else 0, "residual_last": residual_last}
    made.random.choice = lambda values: values[-1]  # type: ignore[method-assign]
    assert made.add(kind, 1, **end)
    return made.case(len(made.shapes) - 1)


def layer_of(made: Drawn) -> dict:
    weights = [made.weight(20, 24, 1, 1), made.weight(40, 4, 3, 3), made.weight(24, 40, 1, 1)]
    return made._sizes(24, (20, 40), 4, 24) | {"weights": weights[0]}


def convolution_of(made: Drawn) -> dict:
    return made._sizes(24, (24, 24), 8, 24) | {"weights": made.weight(24, 8, 3, 3)}


@every_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_with_every_end(kind: str, dtype: torch.dtype) -> None:
    """Catches an activation or a residual that one kind of step does without, or takes in the other
    order."""
    count = 0
    for activation, residual_last in ENDS:
        if (activation == "prelu" and kind in POOLING) or (
            kind == "linear" and residual_last is not None
        ):
            continue
        case = single(kind, activation, residual_last, dtype)
        assert case.steps.steps[-1].kind == kind
        assert_accurate(case, case.run())
        count += 1
    assert count == {"linear": 5}.get(kind, 12 if kind in POOLING else 15)


CAPABILITY = torch.backends.cpu.get_cpu_capability()
ISAS = ["portable", *["avx2"] * (CAPABILITY in ("AVX2", "AVX512"))]
ISAS += ["avx512"] * (CAPABILITY == "AVX512")
#: Without that of this process, of which those with more products have the same code for programs.
OTHERS = [isa for isa in ISAS if not instruction_set().startswith(isa)]


def again(isa: str, tests: str, root: object) -> str:
    """Some of this file's tests in a process of another instruction set."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", tests, __file__]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        env=os.environ | {"GROSS_KERNELS_ISA": isa},
        cwd=str(root),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.mark.parametrize("isa", OTHERS)
def test_programs_for_other_processors(isa: str, pytestconfig: pytest.Config) -> None:
    """Catches a fault in kernels that a lesser processor than this one would run."""
    output = again(isa, "test_random_programs or every_kind", pytestconfig.rootpath)
    assert f"{len(DTYPES) * (1 + len(KINDS))} passed" in output


# Calls --------------------------------------------------------------------------------------------


def residual_block(dtype: torch.dtype = torch.float32, size: int = 40) -> Case:
    """Two layers with a residual, pooling and a classifier: enough work for two threads."""
    made = Drawn(3, dtype)
    made.add_input(2, 24, size, size)
    made._layer = lambda *_: layer_of(made)  # type: ignore[method-assign]
    same = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    made._window = lambda kind, shape: (same, shape)  # type: ignore[method-assign]
    made.add("layer", 0, activation="relu", residual=-1)
    made.add("layer", 1, activation="relu", residual=1, residual_last=False)
    made.add("max_pool", 2, activation="none", residual=-1)
    made.add("mean", 3, activation="none", residual=-1)
    made.add("linear", 4, activation="none")
    return made.case(2, 5)


@every_dtype
def test_threads_and_repetition_change_no_bit(dtype: torch.dtype, threads: None) -> None:
    """Catches work that is split so that sums depend on it, and memory of an earlier call that is
    read."""
    case = residual_block(dtype)
    torch.set_num_threads(1)
    expected = case.run()
    assert_accurate(case, expected)
    for count in (2, 1, 3):
        torch.set_num_threads(count)
        larger = residual_block(dtype, 50)
        larger.inputs[0].fill_(torch.nan)
        larger.run()
        for result, wanted in zip(case.run(), expected, strict=True):
            assert torch.equal(result, wanted)


def test_calls_from_several_threads() -> None:
    """Catches values between steps that callers share."""
    case = residual_block(size=12)
    packed, text = case.steps.pack(case.weights, case.inputs[0]), case.steps.text()
    inputs = [torch.randn_like(case.inputs[0]) for _ in range(16)]
    expected = [run([input], packed, text) for input in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(lambda input: run([input], packed, text), inputs))
            for results, wanted in zip(found, expected, strict=True):
                assert all(map(torch.equal, results, wanted))


def test_inputs_stay_and_results_are_the_callers() -> None:
    """Catches a residual that is overwritten though it is an input or read again, and outputs in
    memory that the next call writes."""
    made = Drawn(5, torch.float32)
    made.add_input(2, 24, 6, 6)
    made._layer = lambda *_: layer_of(made)  # type: ignore[method-assign]
    same = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    made._window = lambda kind, shape: (same, shape)  # type: ignore[method-assign]
    made.add("layer", 0, residual=0, activation="none")
    made.add("layer", 1, residual=0, activation="none")
    made.add("layer", 2, residual=1, activation="none")
    made.add("layer", 3, residual=1, activation="none")
    made.add("layer", 4, residual=3, activation="none")
    case = made.case(3, 5)
    before = case.inputs[0].clone()
    first = case.run()
    kept = [result.clone() for result in first]
    assert torch.equal(case.inputs[0], before)
    assert_accurate(case, first)
    case.inputs[0].zero_()
    case.run()
    assert all(map(torch.equal, first, kept))


@every_dtype
def test_empty_batches(dtype: torch.dtype) -> None:
    """Catches a division by the number of images."""
    case = residual_block(dtype)
    case.inputs[0] = case.inputs[0][:0]
    outputs = case.steps.steps[-1].out_channels
    assert [tuple(result.shape) for result in case.run()] == [(0, 24, 40, 40), (0, outputs)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(kind: str, value: float) -> None:
    """Catches a NaN that an activation or a maximum turns into a number, and one that spreads to
    other images or to windows that do not hold it."""
    for activation in ("none", "relu", "relu6"):
        case = single(kind, activation, None, torch.float32)
        clean = case.run()[0]
        case.inputs[0][1, 5, 4, 3] = value
        found, truth = case.run()[0], case.truth()[0]
        assert torch.equal(found.isnan(), truth.isnan())
        assert torch.equal(found.isposinf(), truth.isposinf())
        assert torch.equal(found.isneginf(), truth.isneginf())
        assert torch.equal(found[::2], clean[::2])
        if math.isnan(value):
            assert found[1].isnan().any()


# Refusals -----------------------------------------------------------------------------------------

HEADERS = {
    # Byte of the header, and what the error says of it.
    "magic": (0, "program: got bytes without the header of a program, accepted is"),
    "version": (8, r"program: got version 4, accepted is .* in version 3"),
    "vectors": (12, r"program: got one for vectors of \d+ bytes, accepted are \d+"),
    "size": (40, r"program: got \d+ bytes, accepted is what program_pack made: \d+"),
}


@pytest.mark.parametrize(("byte", "message"), HEADERS.values(), ids=HEADERS)
def test_every_part_of_the_header_counts(byte: int, message: str) -> None:
    """Catches a program of a later version, or for another processor, that is run."""
    case = residual_block(size=6)
    packed = case.steps.pack(case.weights, case.inputs[0])
    packed[byte] += 1
    with pytest.raises(RuntimeError, match=message):
        run(case.inputs, packed, case.steps.text())


@pytest.mark.parametrize("count", [0, 7, 47, 48, 200, -1])
def test_truncated_programs(count: int) -> None:
    """Catches bytes that are read beyond the tensor's end."""
    case = residual_block(size=6)
    packed = case.steps.pack(case.weights, case.inputs[0])
    with pytest.raises(RuntimeError, match="program: got "):
        run(case.inputs, packed[:count].clone(), case.steps.text())
    with pytest.raises(RuntimeError, match="program: got another kind of tensor"):
        run(case.inputs, packed.view(torch.int8), case.steps.text())


INPUTS = {
    "dtype": (lambda x: [x.double()], r"inputs\[0\]: accepted is .* of float32 on the CPU"),
    "dimensions": (lambda x: [x[0]], r"inputs\[0\]: accepted is \[N, C, H, W\] or \[N, C\]"),
    "channels": (lambda x: [x[:, :23]], "input: got 23 channels, accepted are 24"),
    "count": (lambda x: [x, x], "inputs: got 2, accepted are 1"),
    "none": (lambda x: [], "inputs: got 0, accepted are 1"),
}


@pytest.mark.parametrize(("change", "message"), INPUTS.values(), ids=INPUTS)
def test_inputs_of_another_kind(change, message: str) -> None:
    """Catches inputs that are read as what they are not."""
    case = residual_block(size=6)
    packed = case.steps.pack(case.weights, case.inputs[0])
    with pytest.raises(RuntimeError, match=message):
        run(change(case.inputs[0]), packed, case.steps.text())


def test_images_of_sizes_that_do_not_fit() -> None:
    """Catches a kernel larger than the image, and a residual of other images or another size."""
    made = Drawn(1, torch.float32)
    made.add_input(2, 24, 7, 7)
    made.add_input(2, 24, 5, 5)
    made._convolution = lambda *_: convolution_of(made)  # type: ignore[method-assign]
    window = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    made._window = lambda *_: (window, (5, 5))  # type: ignore[method-assign]
    made.add("convolution", 0, residual=1)
    case = made.case(2)
    assert_accurate(case, case.run())
    image, residual = case.inputs
    for inputs, message in (
        ([image[:, :, :2], residual], "got 2×7, accepted are sizes that every kernel fits into"),
        ([image, residual[:, :, :4]], "got sizes at which a sum's two sides differ"),
        ([image, residual[:1]], "got sizes at which a sum's two sides differ"),
        ([image, residual[:, :1]], "got sizes at which a sum's two sides differ"),
    ):
        case.inputs = inputs
        with pytest.raises(RuntimeError, match=f"input: {message}"):
            case.run()


STEPS = {
    "later_value": ({"source": 1}, "reads what no step before it wrote"),
    "later_residual": ({"residual": 5}, "reads what no step before it wrote"),
    "no_slopes": ({"activation": "prelu", "slopes": -1}, "got PReLU without slopes"),
    "pooled": (
        {"kind": "max_pool", "weights": -1, "activation": "prelu", "slopes": 0},
        "or after a step that has no weights",
    ),
    "kernel": ({"kernel_size": (3, 0)}, "accepted are kernel, stride and dilation of at least 1"),
    "groups": ({"group_size": 3}, "group size 3 does not nest in 20 → 40 channels"),
    "no_weight": ({"weights": 99}, "weights: got no tensor 99"),
    "other_weight": ({"weights": 1}, r"weights\[1\]: accepted is \[20, 24, 1, 1\]"),
    "bias": ({"bias": 0}, r"weights\[0\]: accepted is \[24\]"),
}


@pytest.mark.parametrize(("change", "message"), STEPS.values(), ids=STEPS)
def test_steps_that_are_none(change: dict, message: str) -> None:
    """Catches a step that is packed and then reads or writes what is not there."""
    case = residual_block(size=6)
    steps = (replace(case.steps.steps[0], **change), *case.steps.steps[1:])
    with pytest.raises(RuntimeError, match=message):
        replace(case.steps, steps=steps).pack(case.weights, case.inputs[0])


@pytest.mark.parametrize("returned", [0, 6, -1])
def test_returned_values_that_no_step_writes(returned: int) -> None:
    """Catches an output that is never written."""
    case = residual_block(size=6)
    with pytest.raises(RuntimeError, match=f"returned: got {returned}, accepted are"):
        replace(case.steps, returned=(returned,)).pack(case.weights, case.inputs[0])


# In PyTorch ---------------------------------------------------------------------------------------


def test_steps_as_text() -> None:
    """Catches a field that is lost on the way."""
    for seed in range(20):
        case = drawn(seed, torch.float32)
        if case is not None:
            assert from_text(case.steps.text()) == case.steps


@every_dtype
def test_shapes_without_values(dtype: torch.dtype) -> None:
    """Catches fake tensors of other shapes, strides or dtypes than the kernels', which
    ``torch.compile`` would believe."""
    for seed in range(12):
        case = drawn(seed, dtype)
        if case is not None:
            packed = case.steps.pack(case.weights, case.inputs[0])
            arguments = (case.inputs, packed, case.steps.text())
            torch.library.opcheck(
                torch.ops.gross.program_run, arguments, test_utils="test_faketensor"
            )
    torch.library.opcheck(torch.ops.gross.program_run, arguments, test_utils="test_schema")


def module(case: Case) -> Program:
    return Program(case.steps, case.weights, [False] * len(case.steps.returned))


def test_compiled() -> None:
    """Catches a graph break, and packed weights that a compiled network keeps after others were
    loaded: it must answer as the network itself."""
    network = module(residual_block(size=8))
    compiled = torch.compile(network, fullgraph=True)
    input = torch.randn(3, 24, 8, 8)
    with torch.no_grad():
        assert all(map(torch.equal, compiled(input), network(input)))
        before = network(input)[1]
        network.load_state_dict({k: 2 * v for k, v in network.state_dict().items()})
        assert all(map(torch.equal, compiled(input), network(input)))
        assert not torch.equal(network(input)[1], before)


def test_gradients_are_those_of_the_definition() -> None:
    """Catches outputs without a history where the input asks for gradients."""
    case = residual_block(torch.float64, 6)
    case.weights = [weight.double() for weight in case.weights]
    network, input = module(case), case.inputs[0].requires_grad_()
    found = network(input)[1]
    expected = define([input], case.weights, case.steps)[1]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        *[torch.autograd.grad(output.square().sum(), input)[0] for output in (found, expected)]
    )
    with torch.no_grad():
        assert network(input)[1].grad_fn is None


def test_multiply_accumulates() -> None:
    """Catches a step that is counted at another's size, or not at all, against torch's counter on
    the definition."""
    compared = 0
    for seed in range(30):
        case = drawn(seed, torch.float32)
        if case is None:
            continue
        packed = case.steps.pack(case.weights, case.inputs[0])
        counts = []
        for call in (
            lambda case=case: define(case.inputs, case.weights, case.steps),
            lambda case=case, packed=packed: run(case.inputs, packed, case.steps.text()),
        ):
            with FlopCounterMode(display=False) as counter:
                call()
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1], case.steps
        compared += counts[0] > 0
    assert compared > 10
