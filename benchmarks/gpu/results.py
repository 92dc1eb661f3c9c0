"""What a run on a GPU leaves, entry by entry: gpu.json is whole after every one of them, whatever
happens to the next.

An entry that fails is kept with its error. One after which the device does not answer, or that
hangs, ends the process with :data:`LOST`: a new process goes on after it."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

#: The status of a process whose device no longer answers: the rest needs a new one.
LOST = 3
#: Seconds that an entry may take. The first of a kind compiles.
LONGEST = 40.0

Entry = dict[str, Any]


class Results:
    """The entries of every part, kept in ``folder``.

    Args:
        folder: where gpu.json and gpu.md lie; what they hold already is kept.
        report: makes gpu.md from facts and parts.
        synchronise: waits for the device; raises where it is lost.
    """

    def __init__(
        self,
        folder: Path,
        report: Callable[[Mapping[str, Any], Mapping[str, list[Entry]]], str],
        synchronise: Callable[[], None] = torch.cuda.synchronize,
        longest: float = LONGEST,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.report = report
        self.synchronise = synchronise
        self.longest = longest
        self.facts: dict[str, Any] = {}
        self.parts: dict[str, list[Entry]] = {}
        path = folder / "gpu.json"
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            self.facts, self.parts = kept["facts"], kept["parts"]
        self._lock = threading.Lock()
        self._running: tuple[str, Entry, float] | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    def add(self, part: str, label: Entry, work: Callable[[], Entry]) -> Entry | None:
        """Do one entry, unless it is there already, and write everything down.

        ``label`` names it; ``work`` gives what was found, or raises. Returns None where it was
        there. Raises SystemExit (:data:`LOST`) where the device does not answer afterwards."""
        if any(label.items() <= entry.items() for entry in self.parts.get(part, ())):
            return None
        with self._lock:
            self._running = (part, label, time.monotonic() + self.longest)
        lost = False
        try:
            entry = label | work()
        except Exception as error:
            entry = label | {"error": described(error)}
        try:
            self.synchronise()
        except RuntimeError as error:
            entry, lost = entry | {"error": f"the device is lost: {described(error)}"}, True
        with self._lock:
            self._running = None
            self._keep(part, entry)
        if "error" in entry:
            print(f"FAILED {part}: {label}: {entry['error']}", flush=True)
        if lost:
            raise SystemExit(LOST)
        return entry

    def state(self, facts: Mapping[str, Any]) -> None:
        """Keep facts about the run."""
        with self._lock:
            self.facts |= facts
            self._write()

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self.longest / 4))
            with self._lock:
                if self._running is None or time.monotonic() < self._running[2]:
                    continue
                part, label, _ = self._running
                error = f"no answer within {self.longest:.0f} s"
                self._keep(part, label | {"error": error})
                print(f"FAILED {part}: {label}: {error}", flush=True)
                # Threads that wait for the device cannot be ended otherwise.
                os._exit(LOST)

    def _keep(self, part: str, entry: Entry) -> None:
        self.parts.setdefault(part, []).append(entry)
        self._write()

    def _write(self) -> None:
        content = {"facts": self.facts, "parts": self.parts}
        replace(self.folder / "gpu.json", json.dumps(content, indent=1))
        replace(self.folder / "gpu.md", self.report(self.facts, self.parts))


def described(error: BaseException) -> str:
    """The kind of an error and the first lines of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
