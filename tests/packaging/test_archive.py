"""The source archive, and what the extras bring."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN = {"gross", "gross_kernels", "benchmarks"}


def test_archive(tmp_path: Path) -> None:
    """Catches an archive without the tests, or without a file that they read."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout, but an unpacked archive")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    # A copy, since setuptools packs again what it has packed once.
    copy = tmp_path / "copy"
    for file in tracked:
        if (ROOT / file).exists():
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, copy / file)
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)],
        cwd=copy, env=os.environ | {"GROSS_KERNELS_CUDA": "0"}, check=True, capture_output=True,
    )  # fmt: skip
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        packed = {member.name.partition("/")[2] for member in content if member.isfile()}
    assert {file for file in tracked if (ROOT / file).exists()} - packed == {".gitignore"}


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("gross_kernels", ()),
        ("python/gross", ("train", "search", "onnx-int8")),
        ("examples", ("demo", "super-resolution")),
        ("benchmarks", ("bench",)),
        ("tests", ("test",)),
    ],
)
def test_extras(folder: str, extras: tuple[str, ...]) -> None:
    """Catches an extra that lacks what its folder imports, which its author has installed and
    nobody else."""
    brought = set(map(distribution, PROJECT["dependencies"]))
    for extra in extras:
        brought |= set(requirements(extra))
    distributions = packages_distributions()
    missing = {
        module
        for path in (ROOT / folder).rglob("*.py")
        for module in imports(path)
        if not {normal(name) for name in distributions.get(module, [module])} & brought
    }
    # The processor's name comes with pytest-benchmark.
    assert missing - {"cpuinfo"} == set()


def requirements(extra: str) -> Iterator[str]:
    """Distributions that an extra names, those of the extras in it included."""
    for requirement in PROJECT["optional-dependencies"][extra]:
        inner = re.match(r"gross-kernels\[(.*)\]", requirement)
        if inner is None:
            yield distribution(requirement)
        else:
            for name in inner[1].split(","):
                yield from requirements(name)


def distribution(requirement: str) -> str:
    return normal(re.match(r"[\w.-]+", requirement)[0])


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imports(path: Path) -> Iterator[str]:
    """Packages that a file imports, but for the standard library, this project and the file's
    neighbours."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        for name in names:
            package = name.partition(".")[0]
            if package not in OWN | sys.stdlib_module_names and not neighbour(package):
                yield package


def neighbour(module: str) -> bool:
    """Whether a module stands in the tests, which import one another by their names."""
    return any((ROOT / "tests").rglob(f"{module}.py"))
