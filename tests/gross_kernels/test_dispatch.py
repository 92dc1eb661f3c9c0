"""Which backend serves a call, how one is forced, what happens without the compiled library, and
the bug report."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gross_kernels
from gross_kernels import GroSSConv2d, dispatch, explain, series_conv2d, use_backend
from gross_kernels.call import Call
from gross_kernels.geometry import Geometry
from gross_kernels.series import Series

PACKAGE = Path(gross_kernels.__file__).parent
INPUT = torch.randn(2, 8, 6, 6)
TERMS = [torch.randn(8, s, 3, 3) for s in (1, 4)]
CALL = """
import torch, gross_kernels
input, terms = torch.ones(1, 4, 3, 3), [torch.ones(4, s, 3, 3) for s in (1, 2)]
print(gross_kernels.explain(input, terms))
print(gross_kernels.series_conv2d(input, terms).flatten().tolist())
print(gross_kernels.GroSSConv2d(4, 4, 3)(input).shape)
"""


def run(
    *arguments: str, root: Path = PACKAGE.parent, **variables: str
) -> subprocess.CompletedProcess:
    """Python in a process of its own, importing the package from ``root``."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("GROSS_KERNELS_")
    }
    environment |= {"PYTHONPATH": str(root), **variables}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=root, capture_output=True, text=True
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the reference's functions as they are called."""
    seen: list[str] = []

    def recorded(function: Callable) -> Callable:
        def call(*arguments: object) -> torch.Tensor:
            seen.append(function.__name__)
            return function(*arguments)

        return call

    for function in (dispatch.reference.forward, dispatch.reference.series_sum):
        monkeypatch.setattr(dispatch.reference, function.__name__, recorded(function))
    return seen


# Choosing ---------------------------------------------------------------------------------------


def test_forced_backend_computes(calls: list[str]) -> None:
    """Catches a context that changes what is reported, but not what runs, in the function or in the
    layer."""
    series_conv2d(INPUT, TERMS)
    layer = GroSSConv2d(8, 8, 3)
    expected = layer(INPUT)
    assert calls == []
    with use_backend("reference"):
        series_conv2d(INPUT, TERMS)
        assert calls == ["forward"]
        torch.testing.assert_close(layer(INPUT), expected)
    assert calls == ["forward", "series_sum", "forward", "series_sum"]
    series_conv2d(INPUT, TERMS)
    assert len(calls) == 4


def test_use_backend_nests_and_ends() -> None:
    """Catches a backend that stays forced after the context, above all after an exception."""
    before = dispatch.forced_backend()
    with use_backend("reference"):
        with use_backend("cpu"):
            assert dispatch.forced_backend() == "cpu"
        assert dispatch.forced_backend() == "reference"
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert dispatch.forced_backend() == before


def test_use_backend_as_a_decorator() -> None:
    """Catches a context manager that cannot decorate a function, as torch's own can."""
    assert use_backend("reference")(dispatch.forced_backend)() == "reference"


def test_explain() -> None:
    """Catches an explanation that names another backend than the one that runs, or no reason."""
    name, _, reason = explain(INPUT, TERMS).partition(": ")
    assert name == dispatch.PREFERENCE["cpu"][0]
    assert "first of cpu" in reason
    assert explain(INPUT[0], TERMS, 1, stride=2, padding="valid") == explain(INPUT, TERMS)
    with use_backend("reference"):
        name, _, reason = explain(INPUT, TERMS).partition(": ")
    assert name == "reference"
    assert "use_backend" in reason


def test_backend_that_does_not_serve_the_call() -> None:
    """Catches a forced backend that is silently replaced by another one."""
    call = Call.of(INPUT.to("meta"), Series(TERMS, 2), Geometry())
    with (
        use_backend("cpu"),
        pytest.raises(ValueError, match=r"backend: 'cpu' is forced but does not serve .*'meta'"),
    ):
        dispatch.choose(call)
    assert dispatch.choose(call).name == "reference"


def test_first_backend_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a preference that is not followed, and a call that nobody serves but somebody
    gets."""
    call = Call.of(INPUT, Series(TERMS, 2), Geometry())
    refuses = SimpleNamespace(supports=lambda call: False)
    monkeypatch.setitem(dispatch.BACKENDS, "refuses", refuses)
    monkeypatch.setitem(dispatch.PREFERENCE, "cpu", ("refuses", "reference", "cpu"))
    choice = dispatch.choose(call)
    assert (choice.name, choice.backend) == ("reference", dispatch.reference)
    assert choice.reason == "first of refuses, reference, cpu for cpu tensors that serves this call"
    monkeypatch.setitem(dispatch.PREFERENCE, "cpu", ("refuses",))
    with pytest.raises(ValueError, match="backend: none of refuses serves Call"):
        dispatch.choose(call)


def test_call_describes_the_arguments() -> None:
    """Catches a description in which input and output, or stride and padding, are exchanged."""
    terms = [torch.empty(12, s, 3, 2, dtype=torch.float32) for s in (2, 6)]
    input = torch.empty(5, 6, 7, 8, dtype=torch.bfloat16, memory_format=torch.channels_last)
    geometry = Geometry((1, 2), (3, 4), (5, 6))
    call = Call.of(input, Series(terms, 1), Geometry(*map(list, geometry)), "input_grad")
    types = ("cpu", torch.bfloat16, torch.float32)
    assert call == Call(
        *types, 6, 12, (2, 6), (3, 2), geometry, 1, "input_grad", channels_last=True
    )


def test_backends_have_the_same_functions() -> None:
    """Catches a backend that lacks a function that dispatch or the tests call."""
    for backend in dispatch.BACKENDS.values():
        assert all(
            callable(getattr(backend, name))
            for name in ("forward", "input_grad", "weight_grad", "series_sum")
        )
    assert {name for names in dispatch.PREFERENCE.values() for name in names} <= set(
        dispatch.BACKENDS
    )


def test_every_device_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a machine of two kinds of GPUs, of which the first that is asked judges the other."""
    backend = pytest.importorskip("gross_kernels.backends.triton", exc_type=ImportError)
    of = {0: (7, 5), 1: (9, 0), None: (8, 0)}
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", of.__getitem__)
    backend._served.cache_clear()
    try:
        for _ in range(2):
            assert [
                backend.supports(
                    replace(
                        Call.of(INPUT, Series(TERMS, 2), Geometry()), device="cuda", index=index
                    )
                )
                for index in of
            ] == [False, True, True]
    finally:
        backend._served.cache_clear()


# In a process of its own ------------------------------------------------------------------------


def test_variable_forces_a_backend() -> None:
    """Catches a GROSS_KERNELS_BACKEND that is not read."""
    result = run("-c", CALL, GROSS_KERNELS_BACKEND="reference")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("reference: forced by GROSS_KERNELS_BACKEND")


def test_variable_with_an_unknown_backend() -> None:
    """Catches a misspelt variable that is ignored: importing the package fails and says what is
    accepted."""
    result = run("-c", "import gross_kernels", GROSS_KERNELS_BACKEND="cuda9")
    assert result.returncode == 1
    assert (
        "ValueError: backend: got 'cuda9', accepted are 'cpu', 'cuda', 'reference'" in result.stderr
    )


def test_variable_with_an_unknown_instruction_set() -> None:
    """Catches a misspelt instruction set that is ignored, or that ends the process without a Python
    exception."""
    result = run("-c", CALL, GROSS_KERNELS_ISA="sse9")
    assert result.returncode == 1
    assert "RuntimeError" in result.stderr
    assert (
        "GROSS_KERNELS_ISA: got 'sse9', accepted are portable, avx2, avxvnni, avx512, avx512vnni "
        "and avx512bf16" in result.stderr
    )


@pytest.fixture(scope="module")
def without_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package that has no compiled library."""
    root = tmp_path_factory.mktemp("without_library")
    shutil.copytree(
        PACKAGE, root / "gross_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return root


def test_missing_library_says_what_to_do(without_library: Path) -> None:
    """Catches a silent fall back to slow code, and an import that fails before anything can be
    said."""
    result = run("-c", CALL, root=without_library)
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()
    assert any(
        "compiled CPU kernels could not be loaded from" in line and "gross_cpu.so" in line
        for line in message
    )
    assert "pip install -e ." in result.stderr
    assert "GROSS_KERNELS_BACKEND=reference" in result.stderr
    assert "python -m gross_kernels.environment" in result.stderr


def test_missing_library_does_not_concern_the_reference(without_library: Path) -> None:
    """Catches a way out, named in the message above, that does not work."""
    result = run("-c", CALL, root=without_library, GROSS_KERNELS_BACKEND="reference")
    assert result.returncode == 0, result.stderr
    assert str([27.0] * 4) in result.stdout


def test_environment_report() -> None:
    """Catches a report that fails, or lacks what a bug report needs."""
    result = run("-m", "gross_kernels.environment", GROSS_KERNELS_BACKEND="reference")
    assert result.returncode == 0, result.stderr
    facts = dict(line.split(":", 1) for line in result.stdout.strip().splitlines())
    assert torch.__version__ in facts["torch"]
    assert sys.version.split()[0] in facts["python"]
    assert "built with" in facts["cpu kernels"]
    assert "-O3" in facts["cpu kernels"]
    assert facts["cuda kernels"].split()[0] in ("built", "not")
    assert "GROSS_KERNELS_BACKEND=reference" in facts["variables"]
    assert facts["cpu call"].strip() == "reference: forced by GROSS_KERNELS_BACKEND or use_backend"


def test_environment_report_without_the_library(without_library: Path) -> None:
    """Catches a report that fails in the very case that it is made for."""
    result = run("-m", "gross_kernels.environment", root=without_library)
    assert result.returncode == 0, result.stderr
    assert "not loaded" in result.stdout


THREADS = """
import os, torch
from gross_kernels import GroSSConv2d

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
layer = GroSSConv2d(16, 16, 3, padding=1, group_sizes=(4, 16))
little, much = (torch.randn(1, 16, size, size) for size in (4, 64))
before = threads()
layer(little.requires_grad_()).sum().backward()
with torch.no_grad():
    layer.eval().pack()(little)
    assert threads() == before, "little work"
    layer(much)
    assert threads() > before, "much work"
"""


def test_little_work_stays_on_its_thread() -> None:
    """Catches work of a few microseconds that is given to other threads, and much work that is
    not."""
    result = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
