"""What rests on private torch API, and its fall-back on torch.library.register_autograd."""

import os
import subprocess
import sys

import pytest
import torch

import gross_kernels
from gross_kernels import library

GRADIENTS = """
import sys
import pytest
from gross_kernels import library
assert not library.PRIVATE
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_private_api_works_here() -> None:
    """Catches the slow way taken in silence: 100 µs a layer and step."""
    assert library.PRIVATE


def test_without_private_api(pytestconfig: pytest.Config) -> None:
    """Catches a fall-back that computes something else: first and second derivatives, forward mode,
    checkpoints, opcheck."""
    tests = pytestconfig.rootpath / "tests/gross_kernels"
    chosen = "first_and_second or opcheck_forward or with_a_graph or step or sizes_of_one_step"
    chosen += " or forward_mode_of_trainable or test_needs or test_gradgradcheck"
    names = ("test_bottleneck_gradients.py", "test_checkpoint.py", "test_autograd.py")
    files = [str(tests / name) for name in (*names, "test_transforms.py")]
    environment = os.environ | {"_GROSS_KERNELS_REGISTER_AUTOGRAD": "1"}
    result = subprocess.run(
        [sys.executable, "-c", GRADIENTS, *files, "-k", chosen],
        env=environment,
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    passed = int(result.stdout.rpartition(" passed")[0].split()[-1])
    assert passed > 50


@pytest.mark.parametrize("missing", ["_after_autograd_keyset", "_AutoDispatchBelowAutograd"])
def test_probe(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a probe that does not see what is missing; where all is there, it says yes."""
    before = dict(library._definitions)
    assert library._try_flat()
    monkeypatch.delattr(torch._C, missing)
    assert not library._try_flat()
    assert library._definitions == before


def test_probe_sees_other_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a probe that takes a wrong gradient for a right one."""
    flat = library._flat

    def doubled(values: list, lengths: list) -> list:
        return [v * 2 if isinstance(v, torch.Tensor) else v for v in flat(values, lengths)]

    monkeypatch.setattr(library, "_flat", doubled)
    assert not library._try_flat()


def test_version() -> None:
    """Catches two versions of one package."""
    metadata = pytest.importorskip("importlib.metadata")
    try:
        installed = metadata.version("gross-kernels")
    except metadata.PackageNotFoundError:
        pytest.skip("requires an installed package")
    assert gross_kernels.__version__ == installed
