"""Compiles for this machine, once for each content: what comes of it stays in build/tests/ under a
hash of every file that was read, of the flags and of the compiler's version. ``make clean`` removes
it."""

import fcntl
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build/tests"
WARNINGS = ("-Wall", "-Wextra", "-Werror")
SANITIZERS = ("-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@cache
def version(compiler: str) -> bytes:
    """What the compiler says of itself."""
    return subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout


def compiled(
    source: Path, *flags: str, include: Iterable[Path | str] = (), compiler: str = "g++"
) -> Path:
    """The program (an object file with ``-c``) of one C++ or CUDA source.

    AssertionError with the compiler's words where it does not compile. ``include`` are folders of
    headers: which headers they hold counts, and not where they lie.
    """
    language = ("-x", "c++") if source.suffix == ".cu" and compiler == "g++" else ()
    command = [compiler, *flags, *(f"-I{folder}" for folder in include), *language, str(source)]
    listed = subprocess.run(
        [*(word for word in command if word != "-c"), "-M"], capture_output=True, text=True
    )
    assert listed.returncode == 0, listed.stderr
    rule = listed.stdout.replace("\\\n", " ").split(":", 1)[1]
    read = [Path(name.replace("\\ ", " ")) for name in re.findall(r"(?:\\ |\S)+", rule)]
    return made(command, source.stem, [version(compiler), *(path.read_bytes() for path in read)])


def linked(name: str, objects: Sequence[Path], *flags: str, libraries: Sequence[str] = ()) -> Path:
    """The shared library of objects from :func:`compiled`, whose names say what is in them."""
    command = ["g++", "-shared", *flags, *map(str, objects), *libraries]
    return made(command, name, [version("g++"), *(path.name.encode() for path in objects)])


def made(command: list[str], name: str, contents: Iterable[bytes]) -> Path:
    """What ``command`` writes, from before or made now. One process makes it, others wait."""
    flags = [word for word in command if not word.startswith(("-I", "-L", "/"))]
    key = sha256(b"".join(sha256(each).digest() for each in ("\0".join(flags).encode(), *contents)))
    target = FOLDER / f"{name}-{key.hexdigest()[:24]}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / f"{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = target.with_name(target.name + ".partial")
            finished = subprocess.run(
                [*command, "-o", str(partial)], capture_output=True, text=True
            )
            assert finished.returncode == 0, finished.stderr
            os.replace(partial, target)
    return target
