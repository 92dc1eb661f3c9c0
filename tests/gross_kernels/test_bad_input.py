"""Bad arguments of every public entry: the right exception names the argument, what was got and
what is accepted."""

import inspect
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gross_kernels
from gross_kernels import (
    CompositeBasis,
    GroSSConv2d,
    SeriesConv2d,
    StructuredBasis,
    StructuredConv2d,
    StructuredConv3d,
    StructuredLinear,
    dispatch,
    expand,
    explain,
    functional,
    series_conv2d,
    use_backend,
    use_fused,
    use_layer,
)
from gross_kernels.dispatch import BACKENDS, PREFERENCE
from gross_kernels.series import check_group_sizes

INPUT = torch.randn(2, 4, 6, 6)
TERMS = [torch.randn(4, s, 3, 3) for s in (1, 2, 4)]


def terms(
    *sizes: int, out_channels: int = 4, kernel_size: tuple[int, int] = (3, 3)
) -> list[Tensor]:
    return [torch.randn(out_channels, s, *kernel_size) for s in sizes]


def assert_refuses(
    error: type[Exception], argument: str, got: str, accepted: str, call: Callable
) -> None:
    """The message reads "argument: got …, accepted …"."""
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error
    pattern = rf"{re.escape(argument)}: got .*{re.escape(got)}.*accepted .*{re.escape(accepted)}"
    assert re.match(pattern, str(caught.value)), str(caught.value)


def case(error: type[Exception], argument: str, got: str, accepted: str, **arguments: object):
    return pytest.param(error, argument, got, accepted, arguments, id=f"{argument}-{got}")


# series_conv2d and explain ----------------------------------------------------------------------

OF_FUNCTION = [
    case(TypeError, "input", "ndarray", "Tensor", input=INPUT.numpy()),
    case(TypeError, "input", "NoneType", "Tensor", input=None),
    case(ValueError, "input", "(6, 6)", "[N, C_in, H, W]", input=INPUT[0, 0]),
    case(ValueError, "input", "(1, 2, 4, 6, 6)", "[N, C_in, H, W]", input=INPUT[None]),
    case(TypeError, "input", "torch.int64", "float32, float64, float16", input=INPUT.long()),
    case(
        TypeError,
        "input",
        "torch.complex64",
        "float32, float64, float16",
        input=INPUT.to(torch.complex64),
    ),
    case(
        TypeError,
        "input",
        "torch.float8_e5m2",
        "float32, float64, float16",
        input=INPUT.to(torch.float8_e5m2),
    ),
    case(
        TypeError,
        "input",
        "torch.float64 with terms of torch.float32",
        "equal dtypes",
        input=INPUT.double(),
    ),
    case(
        TypeError,
        "input",
        "torch.float32 with terms of torch.float64",
        "float32 terms",
        terms=[TERMS[0].double()],
    ),
    case(
        TypeError,
        "input",
        "torch.float32 with terms of torch.bfloat16",
        "equal",
        terms=[TERMS[0].bfloat16()],
    ),
    case(ValueError, "input", "device meta", "cpu", input=INPUT.to("meta")),
    case(TypeError, "terms", "NoneType", "sequence of Tensors", terms=None),
    case(TypeError, "terms", "Tensor", "sequence of Tensors", terms=TERMS[0]),
    case(ValueError, "terms", "none", "at least one", terms=[]),
    case(TypeError, "terms[1]", "list", "Tensor", terms=[TERMS[0], []]),
    case(
        ValueError, "terms[0]", "(4, 1, 3)", "[C_out, group size, kh, kw]", terms=[TERMS[0][..., 0]]
    ),
    case(
        ValueError,
        "terms[0]",
        "(4, 1, 0, 3)",
        "[C_out, group size, kh, kw]",
        terms=terms(1, kernel_size=(0, 3)),
    ),
    case(
        ValueError,
        "terms[0]",
        "(0, 1, 3, 3)",
        "[C_out, group size, kh, kw]",
        terms=terms(1, out_channels=0),
    ),
    case(
        ValueError,
        "terms[1]",
        "(8, 2, 3, 3)",
        "(4, 1, 3, 3)",
        terms=[*terms(1), *terms(2, out_channels=8)],
    ),
    case(
        ValueError,
        "terms[1]",
        "(4, 2, 3, 1)",
        "(4, 1, 3, 3)",
        terms=[*terms(1), *terms(2, kernel_size=(3, 1))],
    ),
    case(
        TypeError, "terms[1]", "torch.float64", "torch.float32", terms=[TERMS[0], TERMS[1].double()]
    ),
    case(ValueError, "terms[2]", "device meta", "cpu", terms=[*TERMS[:2], TERMS[2].to("meta")]),
    case(
        ValueError, "terms", "group size 3 in (3,)", "divisors of the input width 4", terms=terms(3)
    ),
    case(ValueError, "terms", "group size 8", "divisors of the input width 4", terms=terms(8)),
    case(
        ValueError,
        "terms",
        "group size 4",
        "divisors of the input width 5",
        input=torch.randn(1, 5, 6, 6),
        terms=terms(4),
    ),
    case(
        ValueError,
        "terms",
        "group size 1",
        "divisors of the input width 0",
        input=torch.randn(1, 0, 6, 6),
    ),
    case(
        ValueError,
        "terms",
        "4 groups",
        "divides the output width 6",
        terms=terms(1, out_channels=6),
    ),
    case(ValueError, "terms", "4 before 2 in (4, 2)", "each divides the next", terms=terms(4, 2)),
    case(ValueError, "terms", "2 before 2 in (2, 2)", "ascending", terms=terms(2, 2)),
    case(
        ValueError,
        "terms",
        "2 before 3",
        "each divides the next",
        input=torch.randn(1, 6, 6, 6),
        terms=terms(2, 3, out_channels=6),
    ),
    case(ValueError, "terms", "17 group sizes", "1 to 16", terms=terms(*range(1, 18))),
    case(ValueError, "active", "0", "1 to 3", active=0),
    case(ValueError, "active", "4", "1 to 3", active=4),
    case(ValueError, "active", "-1", "1 to 3", active=torch.tensor(-1)),
    case(TypeError, "active", "1.0", "an int", active=1.0),
    case(TypeError, "active", "True", "an int", active=True),
    case(
        TypeError,
        "active",
        "torch.int32",
        "0-dimensional int64",
        active=torch.tensor(1, dtype=torch.int32),
    ),
    case(TypeError, "active", "(1,)", "0-dimensional int64", active=torch.tensor([1])),
    case(TypeError, "active", "on meta", "on the CPU", active=torch.tensor(1, device="meta")),
    case(ValueError, "stride", "0", "at least 1", stride=0),
    case(ValueError, "stride", "(1, 1, 1)", "pair of ints", stride=(1, 1, 1)),
    case(TypeError, "stride", "1.5", "an int", stride=1.5),
    case(TypeError, "stride", "'1'", "an int", stride="1"),
    case(ValueError, "padding", "-1", "at least 0", padding=(0, -1)),
    case(TypeError, "padding", "True", "an int", padding=True),
    case(ValueError, "padding", "'full'", "'valid', 'same'", padding="full"),
    case(
        ValueError,
        "padding",
        "'same' with stride (2, 1)",
        "stride 1",
        padding="same",
        stride=(2, 1),
    ),
    case(ValueError, "dilation", "(1, 0)", "at least 1", dilation=(1, 0)),
    case(ValueError, "kernel_size", "3", "padded input size 2", input=torch.randn(1, 4, 2, 6)),
    case(
        ValueError,
        "kernel_size",
        "dilated: 9) along W",
        "padded input size 8",
        dilation=(1, 4),
        padding=1,
    ),
    case(ValueError, "kernel_size", "3", "padded input size 0", input=torch.randn(1, 4, 6, 0)),
    case(TypeError, "gates", "list", "Tensor of shape [3]", gates=[1.0, 1.0, 1.0]),
    case(ValueError, "gates", "(2,)", "[3]", gates=torch.ones(2)),
    case(ValueError, "gates", "(3, 1)", "[3]", gates=torch.ones(3, 1)),
    case(
        TypeError,
        "gates",
        "torch.float64",
        "torch.float32",
        gates=torch.ones(3, dtype=torch.float64),
    ),
    case(
        TypeError, "gates", "torch.int64", "torch.float32", gates=torch.ones(3, dtype=torch.int64)
    ),
    case(ValueError, "gates", "device meta", "cpu", gates=torch.ones(3, device="meta")),
]


@pytest.fixture
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backend is asked whether it serves a call, and none computes: a fault is seen before, so
    that one run stands for all backends."""

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("a backend was asked")

    for module, name in (
        *((backend, name) for backend in BACKENDS.values() for name in ("supports", "forward")),
        (dispatch, "choose"),
        (dispatch, "choose_layer"),
        (functional, "call"),
    ):
        monkeypatch.setattr(module, name, asked)


@pytest.mark.usefixtures("nobody_is_asked")
@pytest.mark.parametrize(("error", "argument", "got", "accepted", "arguments"), OF_FUNCTION)
@pytest.mark.parametrize("function", [series_conv2d, explain])
def test_function(
    function: Callable,
    error: type[Exception],
    argument: str,
    got: str,
    accepted: str,
    arguments: dict,
) -> None:
    """Catches an argument that is not checked before work begins, and a message that does not
    help."""
    given = {"input": INPUT, "terms": TERMS} | arguments
    assert_refuses(error, argument, got, accepted, lambda: function(**given))


def test_operator_checks_too() -> None:
    """Catches a read out of bounds when the operator itself is called, past the Python checks."""
    op, geometry = torch.ops.gross.series_conv2d, ((1, 1), (0, 0), (1, 1))
    one = torch.tensor(1)
    for arguments in (
        (INPUT, [], one, None, *geometry),
        (INPUT, TERMS, torch.tensor(4), None, *geometry),
        (INPUT, TERMS, torch.tensor(0), None, *geometry),
        (INPUT, terms(3), one, None, *geometry),
        (INPUT, [*terms(1), *terms(2, out_channels=8)], one, None, *geometry),
        (INPUT, TERMS, one, torch.ones(2), *geometry),
        (INPUT, TERMS, one, None, (0, 1), (0, 0), (1, 1)),
        (INPUT, TERMS, one, None, (1, 1), (-1, 0), (1, 1)),
        (INPUT[:, :, :2], TERMS, one, None, *geometry),
        (INPUT.double(), TERMS, one, None, *geometry),
    ):
        with pytest.raises(RuntimeError, match=r"accepted|nest|larger"):
            op(*arguments)
    with pytest.raises(RuntimeError, match="grad: accepted"):
        torch.ops.gross.series_conv2d_backward(
            INPUT, INPUT, TERMS, one, None, *geometry, [True, True, False]
        )


# Layers -----------------------------------------------------------------------------------------

OF_LAYER = [
    case(ValueError, "in_channels", "0", "at least 1", in_channels=0),
    case(TypeError, "in_channels", "4.0", "an int", in_channels=4.0),
    case(ValueError, "out_channels", "-4", "at least 1", out_channels=-4),
    case(TypeError, "out_channels", "'4'", "an int", out_channels="4"),
    case(ValueError, "kernel_size", "0", "at least 1", kernel_size=0),
    case(ValueError, "kernel_size", "(3, 3, 3)", "pair of ints", kernel_size=(3, 3, 3)),
    case(TypeError, "kernel_size", "None", "an int", kernel_size=None),
    case(ValueError, "stride", "0", "at least 1", stride=0),
    case(ValueError, "padding", "-1", "at least 0", padding=-1),
    case(ValueError, "padding", "'full'", "'valid', 'same'", padding="full"),
    case(ValueError, "padding", "'same' with stride (2, 2)", "stride 1", padding="same", stride=2),
    case(ValueError, "dilation", "0", "at least 1", dilation=0),
    case(ValueError, "padding_mode", "'constant'", "'zeros', 'reflect'", padding_mode="constant"),
    case(ValueError, "group_sizes", "0 group sizes", "1 to 16", group_sizes=()),
    case(TypeError, "group_sizes", "4", "sequence of ints", group_sizes=4),
    case(TypeError, "group_sizes", "1.0", "ints", group_sizes=(1.0, 2)),
    case(TypeError, "group_sizes", "True", "ints", group_sizes=(True, 2)),
    case(
        ValueError,
        "group_sizes",
        "0 in (0, 2)",
        "divisors of the input width 4",
        group_sizes=(0, 2),
    ),
    case(
        ValueError,
        "group_sizes",
        "3 in (1, 3)",
        "divisors of the input width 4",
        group_sizes=(1, 3),
    ),
    case(ValueError, "group_sizes", "4 before 2", "ascending", group_sizes=(4, 2)),
]
OF_WHOLE_LAYER = [
    case(ValueError, "groups", "2", "1", groups=2),
    case(ValueError, "width", "0", "at least 1", width=0),
    case(TypeError, "width", "1.5", "an int", width=1.5),
    case(ValueError, "width", "(4, 4, 4)", "pair of ints", width=(4, 4, 4)),
    case(
        ValueError,
        "group_sizes",
        "4 groups",
        "divides the output width 6",
        width=(4, 6),
        group_sizes=(1,),
    ),
    case(
        ValueError,
        "group_sizes",
        "4 in (4,)",
        "divisors of the input width 6",
        width=6,
        group_sizes=(4,),
    ),
]


@pytest.mark.parametrize(
    ("kind", "error", "argument", "got", "accepted", "arguments"),
    [
        pytest.param(kind, *c.values, id=f"{kind.__name__}-{c.id}")
        for kind, cases in ((SeriesConv2d, OF_LAYER), (GroSSConv2d, OF_LAYER + OF_WHOLE_LAYER))
        for c in cases
    ],
)
def test_construction(
    kind: type[nn.Module],
    error: type[Exception],
    argument: str,
    got: str,
    accepted: str,
    arguments: dict,
) -> None:
    """Catches a layer that can be made and then fails, or that says less than what is wrong."""
    defaults = {"in_channels": 4, "out_channels": 4, "kernel_size": 3}
    assert_refuses(error, argument, got, accepted, lambda: kind(**defaults | arguments))


OF_FORWARD = [
    case(ValueError, "input", "5 channels", "4", input=torch.randn(1, 5, 6, 6)),
    case(ValueError, "input", "(6, 6)", "[N, C_in, H, W]", input=INPUT[0, 0]),
    case(TypeError, "input", "torch.float64", "equal dtypes", input=INPUT.double()),
    case(TypeError, "input", "torch.int32", "float32, float64", input=INPUT.int()),
    case(TypeError, "input", "NoneType", "Tensor", input=None),
    case(ValueError, "input", "device meta", "cpu", input=INPUT.to("meta")),
    case(ValueError, "kernel_size", "3", "padded input size 2", input=torch.randn(1, 4, 2, 6)),
    case(ValueError, "gates", "(2,)", "[3]", gates=torch.ones(2)),
    case(TypeError, "gates", "list", "Tensor of shape [3]", gates=[1, 1, 1]),
    case(
        TypeError, "gates", "torch.int64", "torch.float32", gates=torch.ones(3, dtype=torch.int64)
    ),
    case(ValueError, "gates", "device meta", "cpu", gates=torch.ones(3, device="meta")),
]


@pytest.mark.usefixtures("nobody_is_asked")
@pytest.mark.parametrize("kind", [GroSSConv2d, SeriesConv2d])
@pytest.mark.parametrize(("error", "argument", "got", "accepted", "arguments"), OF_FORWARD)
def test_forward(
    kind: type[nn.Module],
    error: type[Exception],
    argument: str,
    got: str,
    accepted: str,
    arguments: dict,
) -> None:
    """Catches a layer that computes with arguments that the function would refuse."""
    layer = kind(4, 4, 3)
    assert_refuses(error, argument, got, accepted, lambda: layer(**{"input": INPUT} | arguments))


@pytest.mark.parametrize("layer", [GroSSConv2d(4, 4, 3), SeriesConv2d(4, 4, 3)])
def test_sizes_that_a_layer_does_not_have(layer: nn.Module) -> None:
    """Catches a size that is set, counted or folded although the layer has no such term; the layer
    keeps its own."""
    accepted = "(1, 2, 4)"
    for size in (3, 8, 0, -1, None, "4", 1.5):
        assert_refuses(
            ValueError,
            "group_size",
            repr(size),
            accepted,
            lambda size=size: setattr(layer, "group_size", size),
        )
    assert layer.group_size == 4
    assert_refuses(ValueError, "group_size", "3", accepted, lambda: layer.macs(8, 3))
    assert_refuses(ValueError, "input_size", "2", "dilated kernel", lambda: layer.macs(2))
    assert_refuses(ValueError, "input_size", "0", "at least 1", lambda: layer.macs((8, 0)))
    assert_refuses(TypeError, "input_size", "'8'", "an int", lambda: layer.macs("8"))
    if isinstance(layer, GroSSConv2d):
        assert_refuses(ValueError, "group_size", "3", accepted, lambda: layer.fold(3))


@pytest.mark.parametrize(
    ("error", "argument", "got", "accepted", "bottlenecks"),
    [
        (ValueError, "bottlenecks", "none", "at least one", {}),
        (ValueError, "bottlenecks[2]", "R of shape (4, 4, 3, 3)", "(4, 2, 3, 3)", {2: (4, 4, 4)}),
        (
            ValueError,
            "bottlenecks[4]",
            "P of shape (8, 4, 1, 1)",
            "(4, 4, 1, 1)",
            {2: (4, 2, 4), 4: (8, 4, 4)},
        ),
        (ValueError, "bottlenecks[2]", "Q of shape (4, 8, 1, 1)", "(4, 4, 1, 1)", {2: (4, 2, 8)}),
        (ValueError, "group_sizes", "3 in (3,)", "divisors of the input width 4", {3: (4, 3, 4)}),
        (TypeError, "group_sizes", "'2'", "ints", {"2": (4, 2, 4)}),
    ],
)
def test_from_bottlenecks(
    error: type[Exception], argument: str, got: str, accepted: str, bottlenecks: dict
) -> None:
    """Catches bottlenecks that do not fit the convolution or one another, given as width, group
    size, width."""
    weights = {
        size: (torch.randn(p, 4, 1, 1), torch.randn(4, r, 3, 3), torch.randn(4, q, 1, 1))
        for size, (p, r, q) in bottlenecks.items()
    }
    conv = nn.Conv2d(4, 4, 3)
    assert_refuses(
        error, argument, got, accepted, lambda: GroSSConv2d.from_bottlenecks(conv, weights)
    )


def test_from_other_things_than_bottlenecks() -> None:
    """Catches an AttributeError or IndexError from inside in the place of an explanation."""
    conv, make = nn.Conv2d(4, 4, 3), GroSSConv2d.from_bottlenecks
    weights = torch.randn(4, 4, 1, 1), torch.randn(4, 2, 3, 3), torch.randn(4, 4, 1, 1)
    assert_refuses(
        TypeError, "conv", "Linear", "nn.Conv2d", lambda: make(nn.Linear(4, 4), {2: weights})
    )
    assert_refuses(
        ValueError, "groups", "2", "1", lambda: make(nn.Conv2d(4, 4, 3, groups=2), {2: weights})
    )
    for got, bad in (
        ("[(4, 4, 1, 1), (4, 2, 3, 3)]", weights[:2]),
        ("[(16,), (72,), (16,)]", [weight.flatten() for weight in weights]),
        ("['list', 'list', 'list']", [[1], [2], [3]]),
    ):
        assert_refuses(
            ValueError, "bottlenecks[2]", got, "P, R, Q", lambda bad=bad: make(conv, {2: bad})
        )


# Ψ and the rest ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "argument", "got", "accepted", "arguments"),
    [
        (TypeError, "weight", "list", "Tensor", ([1.0], 2, 4)),
        (
            ValueError,
            "weight",
            "(4, 2, 3)",
            "[C_out, group size, kh, kw]",
            (torch.randn(4, 2, 3), 2, 4),
        ),
        (ValueError, "to_group_size", "2 before 1", "ascending", (TERMS[1], 1, 4)),
        (ValueError, "to_group_size", "3", "divisors of the input width 4", (TERMS[1], 3, 4)),
        (
            ValueError,
            "to_group_size",
            "2 before 3",
            "each divides the next",
            (torch.randn(6, 2, 3, 3), 3, 6),
        ),
        (ValueError, "to_group_size", "0", "divisors", (TERMS[1], 0, 4)),
        (TypeError, "to_group_size", "2.0", "an int", (TERMS[1], 2.0, 4)),
        (
            ValueError,
            "to_group_size",
            "2 groups",
            "divides the output width 3",
            (torch.randn(3, 2, 1, 1), 2, 4),
        ),
        (ValueError, "to_group_size", "4", "divisors of the input width 6", (TERMS[1], 4, 6)),
        (TypeError, "in_channels", "4.0", "an int", (TERMS[1], 4, 4.0)),
    ],
)
def test_expand(
    error: type[Exception], argument: str, got: str, accepted: str, arguments: tuple
) -> None:
    """Catches a Ψ between sizes that do not nest, which would be another operator."""
    assert_refuses(error, argument, got, accepted, lambda: expand(*arguments))


def test_unknown_backend() -> None:
    """Catches a misspelt name that silently leaves the default in place."""
    for name in ("triton-x", "", None):
        assert_refuses(
            ValueError,
            "backend",
            repr(name),
            "'cpu', 'cuda', 'reference'",
            use_backend(name).__enter__,
        )


def test_group_sizes_name_is_used() -> None:
    """Catches a message that speaks of another argument than the caller's."""
    assert_refuses(
        ValueError, "terms", "3", "divisors", lambda: check_group_sizes((3,), 4, 4, "terms")
    )


# Every argument there is ------------------------------------------------------------------------

CONV = nn.Conv2d(4, 4, 3)
BOTTLENECK = (torch.randn(4, 4, 1, 1), torch.randn(4, 2, 3, 3), torch.randn(4, 4, 1, 1))
NUMBERS = [None, 1.5, "3", True, 0, -1, [1, 2, 3], torch.ones(2), object()]
OF_CONVOLUTION = {
    "kernel_size": NUMBERS,
    "stride": NUMBERS,
    "padding": [None, 1.5, "full", True, -1, [1, 2, 3], object()],
    "dilation": NUMBERS,
}
TENSORS = [None, 1.0, "x", [1.0], object()]
OF_SERIES = {
    "input": TENSORS,
    "terms": [None, 1.0, "x", [], [1.0], INPUT, object()],
    "active": [1.5, "1", True, 0, 4, [1], torch.ones(2), object()],
    "gates": TENSORS[1:],
} | {name: OF_CONVOLUTION[name] for name in ("stride", "padding", "dilation")}
OF_MADE_LAYER = {
    "in_channels": [None, 1.5, "4", True, 0, -4, object()],
    "out_channels": [None, 1.5, "4", True, 0, -4, object()],
    **OF_CONVOLUTION,
    "padding_mode": [None, 1, "constant", object()],
    "device": [1.5, "nowhere", [], object()],
    "dtype": ["float32", torch.complex64, torch.int64, torch.float8_e5m2, object()],
    "group_sizes": [4, "4", (), (3,), (2, 1), (1.0,), (True,), ("1",), object()],
}
SIZE = [1.5, "4", True, 3, 0, object()]
OF_METHOD = {
    "forward": {"input": TENSORS, "gates": TENSORS[1:]},
    "macs": {"input_size": NUMBERS, "group_size": SIZE},
    "fold": {"group_size": SIZE},
    "pack": {"dtype": ["float32", torch.float64, torch.int64, object()]},
    "explain": {
        "device": [1.5, "nowhere", [], object()],
        "input_size": NUMBERS,
        "images": [None, 1.5, "4", True, 0, object()],
        "dtype": ["float32", torch.float64, torch.int64, object()],
    },
    "from_bottlenecks": {
        "conv": [None, nn.Linear(4, 4), object()],
        "bottlenecks": [None, {}, [BOTTLENECK], {2: None}, {2: BOTTLENECK[:2]}, {3: BOTTLENECK}],
    },
    "release_inactive": {},
    "reset_parameters": {},
}
OF_STRUCTURED = {
    **{name: values for name, values in OF_MADE_LAYER.items() if name != "group_sizes"},
    "groups": [None, 3, 0, 1.5, "1", True, object()],
    "bias": [None, 1, "yes", object()],
    "structure": [None, 2, "42", (5, 2), (4, 4), (0, 1), (1.5, 2), (4, 2, 2), (4, None), object()],
}
OF_BASIS = {
    "compose": {"coefficients": [*TENSORS, torch.ones(2, 3), torch.ones(2).int()]},
    **{name: {"weight": [*TENSORS, torch.ones(2, 3)]} for name in ("project", "residual")},
    "operations": {"out_channels": [None, 0, 1.5, "1", True], "positions": [None, -1, 1.5, "1"]},
}
OF_ANY_STRUCTURED = {
    "dense_weight": {},
    "to_dense": {},
    "reset_parameters": {},
    "forward": {"input": [*TENSORS, torch.ones(2), torch.ones(3, 3, 3, 3)]},
}
OF_STRUCTURED_METHOD = {
    "Conv2d": {
        "fold": {"kernels": [None, 1, "yes"]},
        "from_dense": {"module": [None, nn.Linear(4, 4)], "structure": OF_STRUCTURED["structure"]},
        "operations": {"input_size": NUMBERS},
        **OF_ANY_STRUCTURED,
    },
    "Conv3d": {
        "from_dense": {"module": [None, nn.Linear(4, 4)], "structure": OF_STRUCTURED["structure"]},
        "operations": {"input_size": [None, 1.5, "3", True, 0, [1, 2], object()]},
        **OF_ANY_STRUCTURED,
    },
    "Linear": {
        "from_dense": {"module": [None, nn.Conv2d(4, 4, 3)], "structure": [None, 0, 5, 1.5, "2"]},
        "operations": {},
        **OF_ANY_STRUCTURED,
    },
}
#: By entry and argument: values of a wrong type, and such as are no good.
WRONG: dict[str, dict[str, list[object]]] = {
    "series_conv2d": OF_SERIES,
    "explain": OF_SERIES,
    "expand": {
        "weight": [*TENSORS, INPUT[0]],
        "to_group_size": [None, 1.5, "4", True, 0, 3, object()],
        "in_channels": [None, 1.5, "4", True, 0, 5, object()],
    },
    "pack": {
        "network": [None, "x", object()],
        "dtype": ["float32", torch.float64, torch.int64, object()],
    },
    "use_backend": {"name": [None, 1, "triton-x", [], object()]},
    "use_fused": {"fused": [None, 1, "0", object()]},
    "use_layer": {"way": [None, 1, "fused", [], object()]},
    "SeriesConv2d": OF_MADE_LAYER,
    "GroSSConv2d": OF_MADE_LAYER
    | {
        "groups": [None, 2, 0, 1.5, "1", True, object()],
        "bias": [None, 1, "yes", object()],
        "width": [0, 1.5, "4", True, (4, 4, 4), object()],
        "relu": [None, 1, "yes", object()],
    },
    **{f"SeriesConv2d.{name}": OF_METHOD[name] for name in ("forward", "macs")},
    **{f"GroSSConv2d.{name}": values for name, values in OF_METHOD.items()},
    "SeriesConv2d.release_inactive": {},
    "SeriesConv2d.reset_parameters": {},
    "CompositeBasis": {"patterns": [None, [[1]], torch.ones(3), torch.full((1, 2), 0.5)]},
    "StructuredBasis": {
        "size": [None, 4, "4", (0,), (1.5,), ()],
        "structure": [None, 2, "2", (0,), (5,), (1.5,), (2, 2)],
    },
    "StructuredConv2d": OF_STRUCTURED,
    "StructuredConv3d": OF_STRUCTURED
    | {name: [None, 1.5, "3", True, -1, [1, 2], object()] for name in OF_CONVOLUTION},
    "StructuredLinear": {
        **{f"{which}_features": OF_MADE_LAYER["in_channels"] for which in ("in", "out")},
        **{name: OF_STRUCTURED[name] for name in ("bias", "device", "dtype")},
        "structure": [None, 0, 5, 1.5, "2", (2, 2), object()],
    },
    **{
        f"{basis}.{name}": values
        for basis in ("CompositeBasis", "StructuredBasis")
        for name, values in OF_BASIS.items()
    },
    **{
        f"Structured{kind}.{name}": values
        for kind in ("Conv2d", "Conv3d", "Linear")
        for name, values in OF_STRUCTURED_METHOD[kind].items()
    },
}
RIGHT: dict[str, dict[str, object]] = {
    "series_conv2d": {"input": INPUT, "terms": TERMS},
    "explain": {"input": INPUT, "terms": TERMS},
    "expand": {"weight": TERMS[1], "to_group_size": 4, "in_channels": 4},
    "pack": {"network": GroSSConv2d(4, 4, 3).eval()},
    "GroSSConv2d": {"in_channels": 4, "out_channels": 4, "kernel_size": 3},
    "SeriesConv2d": {"in_channels": 4, "out_channels": 4, "kernel_size": 3},
    "CompositeBasis": {"patterns": torch.ones(1, 4)},
    "StructuredBasis": {"size": (4,), "structure": (2,)},
    "CompositeBasis.compose": {"coefficients": torch.ones(1)},
    "StructuredBasis.compose": {"coefficients": torch.ones(2)},
    ".project": {"weight": torch.ones(4)},
    ".residual": {"weight": torch.ones(4)},
    "CompositeBasis.operations": {"out_channels": 1, "positions": 1},
    "StructuredBasis.operations": {"out_channels": 1, "positions": 1},
    **{
        f"StructuredConv{n}d": {
            "in_channels": 4,
            "out_channels": 4,
            "kernel_size": 3,
            "structure": (4, 2),
        }
        for n in (2, 3)
    },
    "StructuredLinear": {"in_features": 4, "out_features": 4, "structure": 2},
    "StructuredConv2d.operations": {"input_size": 8},
    "StructuredConv3d.operations": {"input_size": 8},
    "StructuredConv2d.from_dense": {"module": CONV, "structure": (4, 2)},
    "StructuredConv3d.from_dense": {"module": nn.Conv3d(4, 4, 3), "structure": (4, 2)},
    "StructuredLinear.from_dense": {"module": nn.Linear(4, 4), "structure": 2},
    "StructuredConv3d.forward": {"input": torch.randn(1, 4, 6, 6, 6)},
    "StructuredLinear.forward": {"input": torch.randn(2, 4)},
    ".forward": {"input": INPUT},
    ".macs": {"input_size": 8},
    ".from_bottlenecks": {"conv": CONV, "bottlenecks": {2: BOTTLENECK}},
}
MADE: dict[str, Callable] = {
    "CompositeBasis": lambda: CompositeBasis(torch.ones(1, 4)),
    "StructuredBasis": lambda: StructuredBasis((4,), (2,)),
    "StructuredConv2d": lambda: StructuredConv2d(4, 4, 3, structure=(4, 2)),
    "StructuredConv3d": lambda: StructuredConv3d(4, 4, 3, structure=(4, 2)),
    "StructuredLinear": lambda: StructuredLinear(4, 4, structure=2),
}
#: What an error of one argument may speak of instead.
OTHER_NAMES = {"in_channels": "to_group_size", "bottlenecks": "group_sizes"}


def entries() -> dict[str, Callable]:
    """Every public function, layer and method of a layer, by name."""
    found: dict[str, Callable] = {}
    for name in gross_kernels.__all__:
        entry = getattr(gross_kernels, name)
        if not callable(entry):
            continue
        found[name] = entry
        if isinstance(entry, type):
            made = MADE.get(name, lambda entry=entry: entry(4, 4, 3))()
            layer = made.eval() if isinstance(made, nn.Module) else made
            own = {
                n
                for kind in entry.__mro__
                if kind.__module__.startswith("gross_")
                for n in vars(kind)
            }
            for method in own:
                if not method.startswith("_") and callable(getattr(entry, method)):
                    found[f"{name}.{method}"] = getattr(layer, method)
    return found


#: Methods that are torch's, overridden for their effect: their arguments are its.
TORCHS = {"extra_repr", "train", "register_parameter"}


def test_every_argument_is_tried() -> None:
    """Catches a new function, method or argument that no test gives a wrong value."""
    tried = {name: set(values) for name, values in WRONG.items()}
    there = {
        name: set(inspect.signature(entry).parameters)
        for name, entry in entries().items()
        if name.rpartition(".")[2] not in TORCHS
    }
    assert {n: v for n, v in tried.items() if n.rpartition(".")[2] not in TORCHS} == there


def enter(entry: Callable, arguments: dict[str, object]) -> object:
    """Call; a context manager is entered, too."""
    result = entry(**arguments)
    return result.__enter__() if entry in (use_backend, use_fused, use_layer) else result


@pytest.mark.parametrize("name", [n for n in WRONG if n.rpartition(".")[2] not in TORCHS])
def test_wrong_values_of_every_argument(name: str) -> None:
    """Catches an argument that is not checked, or whose error does not name it, what was got, and
    what is accepted."""
    entry, right = entries()[name], RIGHT.get(name, RIGHT.get(name[name.find(".") :], {}))
    if name not in ("use_backend", "use_fused", "use_layer"):
        enter(entry, right)
    for argument, values in WRONG[name].items():
        for value in values:
            with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
                enter(entry, right | {argument: value})
            named = {argument, OTHER_NAMES.get(argument, argument)}
            named |= {"backend"} if entry is use_backend else set()
            message = str(caught.value)
            assert re.match(rf"({'|'.join(named)})(\[\w+\])?: got .*accepted ", message), (
                argument,
                value,
                message,
            )


@pytest.mark.parametrize("kind", [GroSSConv2d, SeriesConv2d])
def test_integers_of_numpy(kind: type[nn.Module]) -> None:
    """Catches integers that nn.Conv2d takes and the layers refuse, or keep as they are."""
    three, four = np.int64(3), np.int32(4)
    layer = kind(
        four, four, three, stride=np.int64(1), padding=(np.int64(1), 1), group_sizes=[four]
    )
    numbers = (layer.in_channels, layer.out_channels, *layer.kernel_size, *layer.group_sizes)
    assert all(type(number) is int for number in (*numbers, *layer.padding, *layer.stride))
    layer.group_size = four
    assert type(layer.group_size) is int
    assert layer.macs(np.int64(8), four) == kind(4, 4, 3, padding=1, group_sizes=[4]).macs(8)
    active = np.int64(2)
    assert torch.equal(series_conv2d(INPUT, TERMS, active), series_conv2d(INPUT, TERMS, 2))


# Empty is not bad -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*PREFERENCE["cpu"], "reference"])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("kind", [GroSSConv2d, SeriesConv2d])
def test_no_images(kind: type[nn.Module], padding_mode: str, backend: str) -> None:
    """Catches an error, or gradients that are not zeros, for an empty batch in a layer."""
    layer = kind(4, 4, 3, stride=2, padding=1, padding_mode=padding_mode)
    for size in layer.group_sizes:
        layer.group_size = size
        layer.zero_grad()
        input = torch.randn(0, 4, 6, 5, requires_grad=True)
        with use_backend(backend):
            output = layer(input)
            output.sum().backward()
        assert output.shape == (0, 4, 3, 3)
        assert input.grad.shape == input.shape
        grads = [parameter.grad for parameter in layer.parameters()]
        assert all(backend == "reference" if grad is None else not grad.any() for grad in grads)


def test_no_pixels() -> None:
    """Catches a division by zero for an input without pixels that padding makes wide enough."""
    input = torch.randn(2, 4, 0, 5, requires_grad=True)
    output = series_conv2d(input, TERMS, padding=2)
    output.sum().backward()
    assert torch.equal(output, torch.zeros(2, 4, 2, 7))
    assert input.grad.shape == input.shape
