"""The way from a call to Triton's launcher, with a driver that launches nothing: what a GPU would
be given."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from ahead_of_time import TARGETS
from case import Case
from triton.runtime import driver

from gross_kernels.backends import triton as backend
from gross_kernels.backends.triton.launch import Kernel
from gross_kernels.epilogue import Epilogue
from gross_kernels.series import Series

CASE = Case(
    2, 64, 64, (1, 4), (3, 3), (9, 8), padding=(1, 1), active=2, gated=True, channels_last=True
)


class Driver:
    """An H200 as far as Triton's run-time asks: launches are noted."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (0, 0, 255, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 232448},
            unload_module=lambda *_: None,
        )

    def launcher_cls(self, source: object, metadata: object) -> object:
        return lambda *arguments: self.launches.append(arguments)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 77

    def get_current_target(self) -> object:
        return TARGETS["sm_90"]

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@pytest.fixture
def fake() -> Iterator[Driver]:
    """Triton with the driver above."""
    fake, before = Driver(), driver._active
    driver.set_active(fake)
    yield fake
    driver.set_active(before)


def test_later_launches_are_the_first(fake: Driver) -> None:
    """Catches a short cut past Triton's look-up that passes other arguments, another grid or
    another stream."""
    input, terms, gates, grad = CASE.tensors(torch.bfloat16, torch.float32)
    series, geometry = Series(terms, 2, gates), CASE.geometry
    last = Series([torch.randn(48, 64, 1, 1)] * 2, 2, gates)
    epilogue = Epilogue(torch.randn(48), activation="relu")
    for call, kernels in (
        (lambda: backend.forward(input, series, geometry), 1),
        (lambda: backend.input_grad(grad, input, series, geometry), 1),
        (lambda: backend.weight_grad(grad, input, series, geometry), 2),
        (lambda: backend.series_sum(Series(terms[:1] * 3, 2)), 1),
        (lambda: backend.grouped_pointwise(input, series, last, geometry, epilogue), 3),
    ):
        seen = []
        for _ in range(2):
            fake.launches.clear()
            call()
            assert len(fake.launches) == kernels
            # Between the kernel's own fields and its arguments stand Triton's hooks.
            seen.append([(*launch[:6], *map(plain, launch[9:])) for launch in fake.launches])
        assert seen[0] == seen[1]
        assert all(launch[:4] == (launch[0], 1, 1, 77) for launch in seen[0])


@pytest.mark.parametrize("capturing", [True, False])
def test_a_first_call_in_a_graph(capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a driver's "operation not permitted" that does not say what to do, and one that is
    blamed on a graph where there is none."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    class Function:
        def __getitem__(self, grid: tuple) -> Callable[..., None]:
            def refuse(*_: object, **__: object) -> None:
                raise RuntimeError("operation not permitted when stream is capturing")

            return refuse

    expected = "made once before" if capturing else "operation not permitted"
    with pytest.raises(RuntimeError, match=expected):
        Kernel(Function(), 1, (), 4, 2)(SimpleNamespace(is_cuda=True))


def plain(value: object) -> object:
    """Arguments without what a new allocation changes: shapes and dtypes in place of tensors."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    return tuple(map(plain, value)) if isinstance(value, (tuple, list)) else value
