"""The fits of a network's kernels, side by side, each with one thread.

A fit is thousands of products and factorisations too small to share: two threads wait for each
other at every one of them, and on a busy machine that takes many times as long as one thread
alone. Layers are independent, so each has a thread of its own from beginning to end, the largest
first, and the result is the same bit for bit for any number of them. Threads serve, not processes:
PyTorch works without the interpreter's lock, and a program needs no ``__main__`` to be safe."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from ..arguments import check_flag, check_int, check_number
from ..extras import from_extra
from ..report import error_console
from .block_term import BlockTerm, block_term_series
from .metric import block_term_series_in_metric
from .plan import Plan


@dataclass(frozen=True)
class FitSettings:
    """Of each fit: arguments of :func:`gross.decomposition.block_term_series`."""

    sweeps: int
    tolerance: float
    ridge: float
    warm_start: bool
    seed: int

    def __post_init__(self) -> None:
        """Check the settings; raises TypeError or ValueError naming the argument."""
        check_int("sweeps", self.sweeps, least=1)
        check_number("tolerance", self.tolerance, "a number of at least 0")
        check_number("ridge", self.ridge, "a positive number", open_below=True)
        check_flag("warm_start", self.warm_start)
        check_int("seed", self.seed)


class Progress:
    """What is told of the fits while they run, by several threads; this one tells nobody."""

    def sweep(self, name: str, group_size: int, sweep: int, error: float) -> None:
        """A sweep of a layer's fit at one group size has ended with this relative error."""

    def layer(self, done: int) -> None:
        """So many layers are done."""

    def calibration(self, line: str) -> None:
        """What is done with calibration data, before and after the fits."""


def fit_layers(
    plans: Sequence[Plan],
    settings: FitSettings,
    workers: int | None,
    progress: Progress,
    moments: Mapping[int, Tensor] | None = None,
) -> dict[int, list[BlockTerm]]:
    """Fit every group size of each plan's weight.

    Args:
        moments: of the patches that meet a weight, by its ``id``; where there are none, the fit is
            of the weight alone.
        workers: how many layers are fitted at a time; by default as many as torch has threads. On a
            GPU it is one layer after the other.

    Returns:
        The fits by the weight's ``id``: layers that share a weight share them.
    """
    jobs = {id(plan.weight): plan for plan in plans}
    largest_first = sorted(jobs.values(), key=lambda plan: -plan.weight.numel())
    if any(plan.weight.device.type != "cpu" for plan in plans):
        workers = 1
    fits: dict[int, list[BlockTerm]] = {}
    stopped = threading.Event()

    def fit(plan: Plan) -> list[BlockTerm]:
        def after_sweep(group_size: int, sweep: int, error: float) -> None:
            if stopped.is_set():
                raise KeyboardInterrupt
            progress.sweep(plan.name, group_size, sweep, error)

        weight = plan.weight.detach()
        series = block_term_series
        if moments is not None and id(plan.weight) in moments:
            series = partial(block_term_series_in_metric, moments=moments[id(plan.weight)])
        return series(
            weight.float() if weight.dtype.itemsize < 4 else weight,
            plan.group_sizes,
            width=plan.width,
            progress=after_sweep,
            **asdict(settings),
        )

    with _one_thread_each(workers or torch.get_num_threads()) as pool:
        futures = {pool.submit(fit, plan): plan for plan in largest_first}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                fits[id(futures[future].weight)] = future.result()
                progress.layer(done)
        except BaseException:
            # Ctrl-C, or a fit that failed: the others end with their present sweep.
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    return fits


@contextmanager
def _one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in each of which torch works alone. What the caller's thread, and threads started
    later, may use is afterwards as it was."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


@contextmanager
def shown_progress(layers: int, quiet: bool) -> Iterator[Progress]:
    """A bar on the error stream: how many layers are done, and where a fit is."""
    if quiet:
        yield Progress()
        return
    with from_extra():
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
        )
        from rich.progress import Progress as Bar

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Bar(*columns, console=error_console()) as bar:
        task = bar.add_task("", total=layers)

        class Shown(Progress):
            def sweep(self, name: str, group_size: int, sweep: int, error: float) -> None:
                line = f"{name} group size {group_size}, sweep {sweep}: error {error:.4f}"
                bar.update(task, description=line)

            def layer(self, done: int) -> None:
                bar.update(task, completed=done)

            def calibration(self, line: str) -> None:
                bar.update(task, description=line)

        yield Shown()
        bar.update(task, completed=layers, description="")
