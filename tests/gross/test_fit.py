"""Layers fitted side by side: the same result for any number, nothing of the caller's changed, and
an end to it."""

import itertools
import os
import signal
import threading

import gross
import pytest
import torch
from gross.decomposition import fit as module
from gross.decomposition.plan import Request, make_plans
from torch import nn


def network(layers: int = 4) -> nn.Module:
    channels = (3, 8, 8, 16, 16, 8, 24, 24)[: layers + 2]
    pairs = itertools.pairwise(channels)
    return nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in pairs))


@pytest.mark.parametrize("width", [None, 4])
def test_the_result_is_the_same_bit_for_bit_for_any_number_of_workers(threads, width):
    """Catches a fit that depends on its neighbours, on the order in which they end, or on how many
    threads the caller has; and TensorLy's backend, which it sets where a width is below the
    channels, shared by threads."""
    model = network()
    results = []
    for workers, caller in ((1, 1), (2, 1), (5, 2), (None, 2)):
        torch.set_num_threads(caller)
        supernet = gross.decompose(
            model, (1, 2, 4), width=width, sweeps=5, workers=workers, quiet=True
        )
        errors = [layer.errors for layer in supernet.decomposition_report.layers]
        results.append(([p.detach() for p in supernet.parameters()], errors))
    for parameters, errors in results[1:]:
        assert errors == results[0][1]
        assert all(torch.equal(a, b) for a, b in zip(parameters, results[0][0], strict=True))


def test_each_fit_has_one_thread_and_the_callers_are_untouched(threads, monkeypatch):
    """Catches fits that share threads, which on a busy machine wait for each other at every small
    product, and a caller who is left with one thread afterwards."""
    torch.set_num_threads(2)
    seen = []

    def noted(*args, **kwargs):
        seen.append((torch.get_num_threads(), threading.current_thread()))
        return block_term_series(*args, **kwargs)

    block_term_series = module.block_term_series
    monkeypatch.setattr(module, "block_term_series", noted)
    gross.decompose(network(), (1, 2), sweeps=1, quiet=True)
    assert {count for count, _ in seen} == {1}
    assert threading.main_thread() not in {thread for _, thread in seen}
    later = []
    fresh = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    assert [torch.get_num_threads(), *later] == [2, 2]


def test_the_largest_layers_are_fitted_first(monkeypatch):
    """Catches the largest layer left for the end, when the other workers have nothing to do."""
    order = []
    block_term_series = module.block_term_series

    def noted(weight, *args, **kwargs):
        order.append(weight.numel())
        return block_term_series(weight, *args, **kwargs)

    monkeypatch.setattr(module, "block_term_series", noted)
    gross.decompose(network(6), (1, 2), sweeps=1, workers=1, quiet=True)
    assert order == sorted(order, reverse=True)
    assert len(order) > 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_end_of_one_fit_is_the_end_of_all(error):
    """Catches fits that go on for minutes after Ctrl-C or a failure, and threads left behind."""
    plans, _ = make_plans(network(), Request((1, 2), skip=()))
    settings = module.FitSettings(10**9, 0.0, 1e-2, True, 0)
    before = threading.active_count()
    # A process that a shell started in the background ignores the signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    # A second Ctrl-C would not wait for the threads.
    once = iter([True])

    class Interrupted(module.Progress):
        def sweep(self, name: str, group_size: int, sweep: int, error_: float) -> None:
            if sweep == 20 and next(once, False):
                if error is KeyboardInterrupt:
                    os.kill(os.getpid(), signal.SIGINT)
                else:
                    raise error("no")

    try:
        with pytest.raises(error):
            module.fit_layers(plans, settings, 2, Interrupted())
    finally:
        signal.signal(signal.SIGINT, handler)
    assert threading.active_count() == before


def test_bad_settings_are_refused_before_a_thread_starts():
    """Catches an error that comes out of a worker's thread."""
    with pytest.raises(ValueError, match=r"^sweeps: got 0"):
        module.FitSettings(0, 0.0, 1e-2, True, 0)
