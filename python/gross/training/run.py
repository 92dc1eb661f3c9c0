"""The run directory: what was run, what it measured, and its checkpoints.

``run.json`` says what the run is; ``metrics.jsonl`` has one line an epoch, and TensorBoard the
same; ``checkpoint-*.safetensors`` are the latest two checkpoints."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..extras import from_extra

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

#: What must be equal for a run to go on.
IDENTITY = ("recipe", "seed", "data", "model", "configuration", "loss", "regularizer")


@dataclass
class RunDirectory:
    """A run's files. Only the first of many processes writes."""

    folder: Path
    board: SummaryWriter

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], identity: Mapping[str, Any], *, resume: bool
    ) -> RunDirectory:
        """Begin a run, or go on with one.

        Args:
            folder: made if it does not exist.
            identity: what the run is, JSON by the keys of :data:`IDENTITY`.
            resume: go on with the run in ``folder``, if there is one.

        Raises:
            ValueError: if ``folder`` holds a run and ``resume`` is False, or a run that differs,
                with what differs.
            OSError: if the folder cannot be written.
            ImportError: if tensorboard is missing.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"directory: got {folder}, which is a file")
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob("*.part"):
            left_over.unlink()
        described = folder / "run.json"
        now = json.loads(json.dumps(dict(identity)))
        if described.exists():
            if not resume:
                raise ValueError(
                    f"directory: got {folder}, which holds a run; accepted is another one, or "
                    "resume to go on"
                )
            _check_same(json.loads(described.read_text(encoding="utf-8")), now, folder)
        else:
            replace(described, json.dumps({**now, **provenance()}, indent=1))
        with from_extra("train"):
            from torch.utils.tensorboard import SummaryWriter
        return cls(folder, SummaryWriter(str(folder / "tensorboard")))

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def rewind(self, epoch: int) -> list[dict[str, Any]]:
        """The records of the first ``epoch`` epochs; later ones, and a line cut off by the end of a
        process, are removed."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8").splitlines()[:epoch]
        replace(self.metrics, "".join(f"{line}\n" for line in lines))
        return [json.loads(line) for line in lines]

    def record(self, values: Mapping[str, Any]) -> None:
        """Add one epoch's line, and its numbers to TensorBoard."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(dict(values)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for name, value in values.items():
            if isinstance(value, int | float):
                self.board.add_scalar(name, value, values["epoch"])
        self.board.flush()

    def close(self) -> None:
        self.board.close()


def replace(path: Path, text: str) -> None:
    """Put a text file in place of ``path`` at once."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def provenance() -> dict[str, Any]:
    """When, with which versions and from which sources this process runs."""
    try:
        package: str | None = version("gross-kernels")
    except PackageNotFoundError:
        package = None
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "gross-kernels": package,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "revision": _revision(),
    }


def _revision() -> str | None:
    """The git revision of this package's sources, None where they are no checkout."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(
            describe, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    differences = []
    for key in IDENTITY:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            for name in sorted(old.keys() | new.keys()):
                if old.get(name) != new.get(name):
                    differences.append(f"{key} {name}: {old.get(name)!r}, now {new.get(name)!r}")
        elif old != new:
            differences.append(f"{key}: {old!r}, now {new!r}")
    if differences:
        raise ValueError(f"resume: the run in {folder} is another one; {'; '.join(differences)}")
