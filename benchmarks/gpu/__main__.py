"""What there is to measure on a GPU, part by part: ``python -m benchmarks.gpu FOLDER --part PART``
adds its entries to FOLDER's gpu.json and gpu.md. Needs torch, Triton and pytest-benchmark alone.

A run whose device was lost, or that hung, ends with status 3; the same command in a new process
goes on after the entry that did it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from . import kernels, networks, plans, report
from .kernels import synchronise
from .results import Entry, Results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", choices=PARTS, default="kernels", help="(default: kernels)")
    parser.add_argument(
        "--seconds", type=float, default=150, help="leave out what does not fit (default: 150)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each (default: 15)")
    parser.add_argument(
        "--dry",
        action="store_true",
        help="tiny shapes on a CPU that plays a GPU: shows that every line runs, measures nothing",
    )
    options = parser.parse_args()
    if options.dry:
        import host_device

        host_device.play()
    elif not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: no GPU is available to torch; this measures GPUs alone")
    torch.backends.cudnn.benchmark = True
    end = time.monotonic() + options.seconds
    device, rounds = ("cpu", 1) if options.dry else ("cuda", options.rounds)
    results = Results(options.folder, report.markdown, partial(synchronise, device))
    if options.dry:
        results.longest = 300  # A CPU that plays the card may be a busy one.
    measured = PARTS[options.part]
    if measured is None:
        if not options.dry:
            parser.error("--part faults: accepted with --dry alone")
        faults(results)
    else:
        measured(results, device, rounds, end)
    if options.part == "kernels" and not report.plot(
        results.parts.get("kernels", []), options.folder / "gpu.png"
    ):
        print("gpu.png is left out: matplotlib is not installed")


def faults(results: Results) -> None:
    """What a card may do to a measurement, one entry each. The last two end the process."""

    def raises() -> Entry:
        raise RuntimeError("no kernel image is available")

    def is_lost() -> Entry:
        def synchronise() -> None:
            raise RuntimeError("an illegal memory access was encountered")

        results.synchronise = synchronise
        return {"milliseconds": 1.0}

    def hangs() -> Entry:
        time.sleep(60)
        return {}

    results.longest = 1.0
    results.add("faults", {"fault": "raises"}, raises)
    results.add("faults", {"fault": "loses the device"}, is_lost)
    results.add("faults", {"fault": "hangs"}, hangs)
    results.add("faults", {"fault": "none"}, lambda: {})


PARTS: dict[str, Callable[[Results, str, int, float], None] | None] = {
    "kernels": kernels.measure_all,
    "networks": networks.networks,
    "sweep": plans.sweep,
    "profile": plans.profile,
    "faults": None,
}


if __name__ == "__main__":
    main()
