"""The documents: their code runs and prints what they say, their lines fit, their links and file
names lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
from gross.cli import app
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
WIDTH = 100


def name(document: Path) -> str:
    return str(document.relative_to(ROOT))


@pytest.mark.parametrize("document", ["README.md", "docs/tour.md", "docs/structured.md"])
def test_code(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Catches an example that does not run, or prints something else than the page shows below
    it: all blocks of a document in one session, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {}
    ran = 0
    for language, text in BLOCK.findall((ROOT / document).read_text()):
        if language == "python":
            capsys.readouterr()
            exec(compile(text, document, "exec"), session)
            ran += 1
        elif language == "text":
            assert capsys.readouterr().out == text
        elif language == "sh":
            for line in text.splitlines():
                command, *arguments = shlex.split(line)
                assert command == "gross"
                result = CliRunner().invoke(app, arguments)
                assert result.exit_code == 0, result.output
    assert ran > 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_width(document: Path) -> None:
    """Catches prose and code that run off the page. A row of a table is one line, however long."""
    lines = document.read_text().splitlines()
    if document.name == "README.md":
        assert len(lines) <= 60
    else:
        lines = [line for line in lines if not line.startswith("|")]
    assert [line for line in lines if len(line) > WIDTH] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links(document: Path) -> None:
    """Catches a link to a file that is not there."""
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    assert [target for target in targets if not (document.parent / target).exists()] == []


# The changelog tells of what was.
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.stem != "CHANGELOG"], ids=name)
def test_named_files(document: Path) -> None:
    """Catches a page about files that have moved: each source file that is named in code exists,
    under the path that is given or somewhere."""
    named = set(re.findall(r"`([\w/]+\.(?:py|h|cpp|cu|sh))`", document.read_text()))
    sources = [
        str(path.relative_to(ROOT))
        for folder in (
            "gross_kernels",
            "python",
            "csrc",
            "tests",
            "scripts",
            "benchmarks",
            "examples",
        )
        for path in (ROOT / folder).rglob("*.*")
    ] + ["setup.py"]
    assert {
        file for file in named if not any(f"/{s}".endswith(f"/{file}") for s in sources)
    } == set()


def test_settings() -> None:
    """Catches an environment variable that is read and not documented, or the other way round."""
    variable = re.compile(r"\bGROSS_KERNELS_[A-Z_]*[A-Z]")
    read = {
        name
        for folder in ("gross_kernels", "python", "csrc")
        for path in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.cpp")]
        for name in variable.findall(path.read_text())
    } | set(variable.findall((ROOT / "setup.py").read_text()))
    assert set(variable.findall((ROOT / "docs/settings.md").read_text())) == read
