"""Which calls the CUDA backend takes, and what dispatch says of the others: without a GPU, as the
library says."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from gross_kernels import dispatch
from gross_kernels.backends import cuda
from gross_kernels.call import Call
from gross_kernels.geometry import Geometry
from gross_kernels.series import Series

TYPICAL = Call(
    "cuda", torch.bfloat16, torch.float32, 64, 64, (1, 4, 16), (3, 3), Geometry(padding=(1, 1)), 3,
    channels_last=True, index=0,
)  # fmt: skip
H200 = [90, 132, 232448]


@pytest.fixture
def device(on_host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An H200 with a library built for it; tests change it."""
    device = list(H200)
    host = on_host._operators()
    fake = SimpleNamespace(
        build=lambda: ("2.15.0", 13000, "8.0;9.0a"),
        device=lambda index: device,
        supports=host.supports,
    )
    monkeypatch.setattr(cuda, "_operators", lambda: fake)
    monkeypatch.setattr(dispatch, "_serving", {})
    return device


@pytest.mark.parametrize("operation", ["forward", "input_grad", "weight_grad"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 11, 14, 15, 16, 28, 32, 64])
@pytest.mark.parametrize("capability", [80, 90])
def test_what_matters_is_served(
    device: list[int], capability: int, size: int, stride: int, operation: str
) -> None:
    """Catches a group size that silently goes to Triton."""
    device[:] = [90, 132, 232448] if capability == 90 else [80, 108, 166912]
    channels = size * 64
    for dtype, terms in ((torch.bfloat16, torch.float32), (torch.float16, torch.float16)):
        call = replace(
            TYPICAL, dtype=dtype, terms_dtype=terms, in_channels=channels, out_channels=channels,
            group_sizes=(size,), active=1, geometry=Geometry((stride, stride), (1, 1)),
            operation=operation,
        )  # fmt: skip
        assert cuda.refusal(call) is None


@pytest.mark.parametrize("operation", ["forward", "input_grad", "weight_grad"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32])
@pytest.mark.usefixtures("device")
def test_tf32_is_served(size: int, stride: int, operation: str) -> None:
    """Catches the same in TF32, whose pixels take twice the room."""
    call = replace(
        TYPICAL, dtype=torch.float32, in_channels=64, out_channels=64, group_sizes=(size,),
        active=1, geometry=Geometry((stride, stride), (1, 1)), operation=operation, float32="tf32",
    )  # fmt: skip
    assert cuda.refusal(call) is None


REFUSED = {
    "device": ({"device": "cpu"}, "serves CUDA tensors alone"),
    "dtype": (
        {"dtype": torch.float64, "terms_dtype": torch.float64},
        "serves float32, bfloat16 and float16",
    ),
    "number of terms": ({"group_sizes": (1,) * 17}, "serves float32"),
    "kernel": ({"kernel_size": (5, 5), "geometry": Geometry(padding=(2, 2))}, "serves 3×3 kernels"),
    "padding": ({"geometry": Geometry()}, "padding 1"),
    "dilation": ({"geometry": Geometry((1, 1), (1, 1), (2, 2))}, "dilation 1"),
    "stride": ({"geometry": Geometry((1, 2), (1, 1))}, "serves strides 1 and 2"),
    "memory format": ({"channels_last": False}, "serves dense channels-last memory"),
    "precision": ({"dtype": torch.float32, "float32": "tf32x3"}, "does not allow"),
    "channels": (
        {"in_channels": 68, "out_channels": 68, "group_sizes": (1, 2), "active": 2},
        "has no forward kernel",
    ),
    "group size": (
        {"in_channels": 256, "out_channels": 256, "group_sizes": (1, 128), "active": 2},
        "groups of 128 in",
    ),
}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what: str) -> None:
    """Catches a call that kernels would compute wrongly, or not at all, and a refusal without its
    reason."""
    changes, reason = REFUSED[what]
    call = replace(TYPICAL, **changes)
    assert reason in cuda.refusal(call)
    assert not cuda.supports(call)


@pytest.mark.usefixtures("device")
def test_inactive_terms_do_not_matter() -> None:
    """Catches a supernet whose largest group size decides about the small one that runs."""
    call = replace(TYPICAL, in_channels=256, out_channels=256, group_sizes=(1, 16, 256))
    assert cuda.refusal(replace(call, active=2)) is None
    assert cuda.refusal(call) is not None


def test_shared_memory(device: list[int]) -> None:
    """Catches kernels chosen for a device whose blocks cannot have the memory that they need: 99 KB
    on 8.6, 8.9, 12.0. Those that fit must serve it all the same."""
    device[:] = [86, 84, 99 * 1024]
    assert cuda.refusal(TYPICAL) is None
    device[2] = 4 * 1024
    cuda.properties.cache_clear()
    assert "has no forward kernel" in cuda.refusal(TYPICAL)


@pytest.mark.parametrize(
    ("architectures", "capabilities"),
    [("8.0;9.0a;10.0+PTX", {80, 86, 89, 90, 100, 103, 120}), ("9.0a", {90}), ("9.0", {90}),
     ("8.6", {86, 89}), ("10.0a", {100}), ("8.0+PTX 9.0a", {80, 86, 89, 90, 100, 103, 120})],
)  # fmt: skip
def test_built_for(architectures: str, capabilities: set[int]) -> None:
    """Catches code for one GPU that is launched on another, and a GPU that could run it but is
    refused."""
    assert {
        c for c in (75, 80, 86, 89, 90, 100, 103, 120) if cuda.runs_on(c, architectures)
    } == capabilities


def test_not_built_for_this_device(device: list[int]) -> None:
    """Catches a launch that fails for want of code: the library says 8.0 and 9.0a."""
    device[0] = 120
    assert cuda.refusal(TYPICAL) == "was built for 8.0;9.0a, not for compute capability 12.0"
    assert cuda.refusal(replace(TYPICAL, operation="series_sum")) is not None


def test_sum_is_served_whatever_the_shape(device: list[int]) -> None:
    """Catches sums of pointwise weights judged as if they were convolutions."""
    call = replace(
        TYPICAL,
        operation="series_sum",
        kernel_size=(1, 1),
        geometry=Geometry(),
        channels_last=False,
    )
    assert cuda.refusal(call) is None


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton as on a GPU that it serves."""
    if "triton" in dispatch.BACKENDS:
        monkeypatch.setattr(dispatch.BACKENDS["triton"], "_served", lambda index: True)


@pytest.mark.usefixtures("device", "served")
def test_explanation() -> None:
    """Catches a refused call whose explanation does not say what would have to change."""
    choice = dispatch.choose(TYPICAL)
    assert choice.name == "cuda"
    assert all(name in choice.reason for name in dispatch.PREFERENCE["cuda"])
    choice = dispatch.choose(replace(TYPICAL, channels_last=False))
    assert choice.name == dispatch.PREFERENCE["cuda"][1]
    assert "channels-last" in choice.reason
    with (
        dispatch.use_backend("cuda"),
        pytest.raises(ValueError, match=r"does not serve .*; cuda serves strides 1 and 2"),
    ):
        dispatch.choose(replace(TYPICAL, geometry=Geometry((3, 3), (1, 1))))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a library that is not there but chosen, and one that is broken but passed over in
    silence."""
    monkeypatch.setattr(cuda, "available", lambda: False)
    assert "was not built" in cuda.refusal(TYPICAL)
    monkeypatch.setattr(cuda, "load_error", OSError("undefined symbol"))
    with pytest.raises(
        RuntimeError,
        match=r"(?s)gross_cuda\.so: undefined symbol.*pip install.*GROSS_KERNELS_CUDA=0",
    ):
        cuda.supports(TYPICAL)


def test_broken_library(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an import that fails for all because the CUDA library does, and a CPU-only torch that
    loads it."""
    library = tmp_path / "gross_cuda.so"
    library.write_text("no library")
    monkeypatch.setattr(cuda, "LIBRARY", library)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    assert isinstance(cuda.load(), OSError)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda.load() is None
    assert not cuda.available()


def change_precision() -> None:
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def settings() -> Iterator[None]:
    """Puts torch's settings back, which torch.testing, once imported, forbids to change."""
    before = torch.backends.cudnn.conv.fp32_precision, torch.get_float32_matmul_precision()
    with torch.backends.__allow_nonbracketed_mutation():
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        yield
        torch.backends.cudnn.conv.fp32_precision = before[0]
    torch.set_float32_matmul_precision(before[1])


INPUT = torch.randn(1, 8, 5, 5).contiguous(memory_format=torch.channels_last)
KEPT: dict[str, Callable[[], tuple]] = {
    "operation": lambda: ("weight_grad", INPUT, 1),
    "active": lambda: ("forward", INPUT, 2),
    "memory format": lambda: ("forward", INPUT.contiguous(), 1),
    "window": lambda: ("forward", torch.cat([INPUT, INPUT], 3)[..., :5], 1),
    "dtype": lambda: ("forward", INPUT.bfloat16(), 1),
    "device": lambda: ("forward", INPUT.to("meta"), 1),
    "precision": lambda: change_precision() or ("forward", INPUT, 1),
}


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("what", KEPT)
def test_what_a_choice_depends_on(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a choice kept for one kind of calls that serves another: TF32 after it was forbidden,
    a slice of a channels-last tensor taken for a dense one."""
    terms, geometry = [torch.randn(8, s, 3, 3) for s in (1, 2)], Geometry(padding=(1, 1))
    asked: list[Call] = []
    monkeypatch.setattr(dispatch, "_serving", {})
    monkeypatch.setattr(
        dispatch, "choose", lambda call: asked.append(call) or SimpleNamespace(backend=len(asked))
    )
    for _ in range(2):
        assert dispatch.serving("forward", INPUT, Series(terms, 1), geometry) == 1
    operation, input, active = KEPT[what]()
    assert dispatch.serving(operation, input, Series(terms, active), geometry) == 2
    assert asked[0] != asked[1]
    assert asked[0].channels_last


def test_memory_that_is_both() -> None:
    """Catches images of one pixel taken for channels-last: their output would not have the format
    that is promised."""
    arguments = (Series([torch.randn(8, 2, 3, 3)], 1), Geometry(padding=(1, 1)))
    assert not Call.of(torch.randn(2, 8, 1, 1), *arguments).channels_last
    assert Call.of(INPUT, *arguments).channels_last
