"""The Triton kernels on a GPU: values in every way through them, precision, tuning."""

import importlib
import json
from pathlib import Path

import pytest
import torch
import windows
from accuracy import Target, assert_accurate
from case import Case
from larger import DEVICE, LARGER, TYPICAL
from packing import CASES

from gross_kernels import explain, series_conv2d, use_backend
from gross_kernels.backends.triton import launch, tiles

OTHERS = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
]


def target(dtype: torch.dtype = torch.bfloat16, terms_dtype: torch.dtype = torch.float32) -> Target:
    return Target("triton", DEVICE, dtype, terms_dtype)


def assert_values(case: Case, dtype: torch.dtype, terms_dtype: torch.dtype) -> None:
    arguments = target(dtype, terms_dtype).arguments(case)
    assert_accurate(target(dtype, terms_dtype).run(case, *arguments), case, arguments)


@pytest.mark.parametrize("case", [*CASES.values(), *LARGER.values()], ids=[*CASES, *LARGER])
def test_values(case: Case) -> None:
    """Catches a kernel that the compiler, not the interpreter, gets wrong: races, layouts, matrix
    instructions."""
    assert_values(case, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtypes", OTHERS, ids=str)
@pytest.mark.parametrize("case", LARGER.values(), ids=LARGER)
def test_values_in_other_dtypes(case: Case, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Catches the same in the other precisions. A compiler takes a second for each of the kernels:
    fewer cases."""
    assert_values(case, *dtypes)


@pytest.mark.parametrize("products", ["tf32", "ieee"])
def test_other_float32(products: str) -> None:
    """Catches TF32 with more error than TF32 has, and a strict call that fails to compile or uses
    it."""
    torch.backends.cudnn.conv.fp32_precision = products
    torch.set_float32_matmul_precision("highest")
    arguments = target(torch.float32).arguments(TYPICAL)
    if products == "ieee":
        assert_accurate(target(torch.float32).run(TYPICAL, *arguments), TYPICAL, arguments)
        return
    reduced = target(torch.float32).run(TYPICAL, *arguments)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    for result, strict in zip(reduced, target(torch.float32).run(TYPICAL, *arguments), strict=True):
        if strict.any():
            error = (result - strict).abs().max() / strict.abs().max()
            assert 1e-6 < error < 2e-3


def test_dispatch() -> None:
    """Catches a GPU call that is served by something else, and float64, which Triton does not
    serve, by nobody."""
    input, terms, *_ = TYPICAL.tensors(torch.bfloat16, torch.float32, DEVICE)
    assert explain(input.contiguous(), terms, padding=1).startswith("triton: first of")
    assert explain(input.double(), [t.double() for t in terms], padding=1).startswith(
        "reference: first of"
    )
    doubled = series_conv2d(input.double(), [t.double() for t in terms], padding=1)
    with use_backend("reference"):
        assert torch.equal(
            series_conv2d(input.double(), [t.double() for t in terms], padding=1), doubled
        )


@pytest.mark.sweep
def test_autotuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a choice that is not remembered, changes the values, or is made again. It compiles
    and times ten kernels: half a minute of a card."""
    monkeypatch.setattr(tiles, "AUTOTUNE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    case = Case(3, 64, 64, (1, 8), (3, 3), (17, 19), padding=(1, 1), active=2, channels_last=True)
    arguments = target().arguments(case)
    assert_accurate(target().run(case, *arguments), case, arguments)
    (file,) = (tmp_path / "gross_kernels").iterdir()
    chosen = json.loads(file.read_text())
    assert len(chosen) == 3
    monkeypatch.setattr(launch.triton.testing, "do_bench", None)
    for name in ("forward", "weight_grad"):
        importlib.import_module(f"gross_kernels.backends.triton.{name}")._plans.clear()
    assert_accurate(target().run(case, *arguments), case, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_sums_over_windows(channels_last: bool, dtype: torch.dtype) -> None:
    """Catches sums that the compiler gets wrong, and a dtype that no kernel serves: float64 goes by
    the definition."""
    format = torch.channels_last if channels_last else torch.contiguous_format
    for shape, numbers in (
        ((4, 64, 28, 28), ((1, 2, 2), 1, (1, 1), (1, 1), (1, 1))),
        ((2, 96, 14, 14), ((17, 2, 3), 2, (1, 2), (1, 0), (2, 1))),
    ):
        input = torch.randn(shape).to(dtype).contiguous(memory_format=format)
        wide = input.double().requires_grad_()
        here = input.to(DEVICE, copy=True).requires_grad_()
        expected = windows.sum_pool(wide, windows.Windows(*numbers))
        output = torch.ops.gross.sum_pool(here, *numbers)
        grad = torch.randn(expected.shape).to(dtype)
        pairs = [
            (output, expected),
            (
                torch.autograd.grad(output, here, grad.to(DEVICE))[0],
                torch.autograd.grad(expected, wide, grad.double())[0],
            ),
        ]
        assert output.is_contiguous(memory_format=format)
        for got, exact_sum in pairs:
            bound = (1 if dtype == torch.bfloat16 else 40) * torch.finfo(dtype).eps
            assert (got.cpu().double() - exact_sum).abs().max() <= bound * exact_sum.abs().max()
