"""``gross.search``: the best configuration of a supernet under a budget."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from ..arguments import check_callable, check_flag, check_int, check_path, check_type
from ..devices import placed
from ..evaluation import Accuracy
from ..supernet import check_supernet
from ..training.distributed import shard
from ..training.run import provenance
from .breadth_first import BreadthFirst
from .cost import Amount, Budget, Cost, costs_of
from .evaluations import Evaluation, Evaluations, Metric
from .evolution import Evolution
from .exhaustive import Exhaustive
from .journal import Journal, fingerprint, metric_fingerprint
from .progress import shown
from .random_search import RandomSearch
from .result import SearchResult
from .space import Space

#: Searches by name; "evolution" minimises the budget's first cost, or MACs.
METHODS = tuple(kind.name for kind in (Exhaustive, BreadthFirst, RandomSearch, Evolution))
#: Configurations of the next smaller search that the first runs start from (section 3.4).
STARTS = 10


class Method(Protocol):
    """A search: asks ``evaluations`` for configurations of ``space``."""

    name: ClassVar[str]

    def __call__(
        self, space: Space, evaluations: Evaluations, generator: random.Random
    ) -> None: ...


def search(
    supernet: nn.Module,
    metric: Metric | Any,
    budget: Budget | Amount | None = None,
    method: str | Method = "breadth-first",
    *,
    input_size: Sequence[int] | None = None,
    seed: int = 0,
    journal: str | os.PathLike[str] | None = None,
    smaller: SearchResult | None = None,
    device: str | int | torch.device | None = None,
    quiet: bool = False,
) -> SearchResult:
    """Find the best configuration of a supernet within a budget (section 3.4).

    Beside every breadth-first and evolutionary search a random search of the same number of
    evaluations is made, as the baseline. Under ``torchrun`` the processes share the evaluations.

    Args:
        supernet: what :func:`gross.decompose` returns, usually trained; left as it is, but for
            ``device``.
        metric: ``metric(model) -> float``, higher is better, called with the supernet set to a
            configuration, in evaluation mode and without gradients. Or labelled images (a pair of
            tensors, a loader, a split of :mod:`gross.data`, a :class:`gross.Accuracy`): then it is
            the accuracy in percent, of many configurations at once by :func:`gross.evaluate`.
        budget: a number of MACs, a share of the dense network's such as "50%", or a base
            configuration whose MACs are the limit; a :class:`gross.Budget` for parameters,
            milliseconds, and several at once. None is no limit.
        method: "exhaustive", "breadth-first", "random" or "evolution"; or one with settings, such
            as ``BreadthFirst(runs=5)`` of :mod:`gross.architecture_search`.
        input_size: shape of one input without the batch dimension, to count MACs; known for
            images in tensors.
        seed: of everything random. The same seed gives the same result.
        journal: a file for every evaluation; a search that was killed goes on from it and repeats
            none.
        smaller: the result under the next smaller budget, whose ten best configurations the first
            runs of a breadth-first search start from.
        device: where to search, such as "cuda"; the supernet is moved there and stays. By default
            where it is.
        quiet: show no progress.

    Returns:
        The best configuration, its score, and everything that was evaluated.

    Raises:
        ValueError: before any work, for a budget that no configuration is within (with the
            smallest), a space too large to be searched exhaustively, or a journal of another
            supernet or metric. After it, if every evaluation failed, with the first reason.
    """
    layers = check_supernet("supernet", supernet)
    metric = _checked_metric(metric)
    check_int("seed", seed)
    check_flag("quiet", quiet)
    if smaller is not None:
        check_type("smaller", smaller, SearchResult, "what another search returned")
    if journal is not None:
        check_path("journal", journal)
    placed(supernet, device)
    budget = Budget.of(budget)
    costs = costs_of(supernet, input_size or _input_size(metric), budget.latency)
    space = Space(tuple(layer.group_sizes for layer in layers.values()), budget.limits(costs))
    run = _method(method, costs, space, smaller)
    identity = {"supernet": fingerprint(supernet), "metric": metric_fingerprint(metric)}
    book = None if journal is None or shard().index else Journal(journal, identity)
    with shown(run.name, quiet or shard().index > 0) as show:
        evaluations = Evaluations(supernet, metric, book, show)
        began = time.perf_counter()
        run(space, evaluations, random.Random(seed))
        if budget.base is not None:
            evaluations([budget.base])
        asked = {c: evaluations.known[c] for c in evaluations.asked}
        baseline = None
        if isinstance(run, BreadthFirst | Evolution):
            beside = Evaluations(supernet, metric, book, show)
            beside.known = evaluations.known
            RandomSearch(len(asked))(space, beside, random.Random(seed + 1))
            baseline = _best(beside.known[c] for c in beside.asked)
    best = _best(e for e in asked.values() if space.allows(e.configuration))
    if best is None or best.score is None:
        errors = [e.error for e in asked.values() if e.error]
        raise ValueError(f"metric: every evaluation failed; the first one: {errors[0]}")

    def priced(evaluation: Evaluation) -> Evaluation:
        prices = {kind: cost(evaluation.configuration) for kind, cost in costs.items()}
        return replace(evaluation, costs=prices)

    return SearchResult(
        best.configuration,
        best.score,
        run.name,
        seed,
        {limit.cost.name: limit.most for limit in space.limits},
        {kind: cost.fixed for kind, cost in costs.items()},
        tuple(map(priced, asked.values())),
        None if budget.base is None else priced(evaluations.known[budget.base]),
        None if baseline is None else priced(baseline),
        time.perf_counter() - began,
        {**provenance(), **identity},
    )


def _checked_metric(metric: object) -> Metric:
    """A metric as it is, of images their accuracy."""
    if callable(metric):
        return metric
    try:
        return Accuracy(metric)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(
            f"metric: got {type(metric).__name__}, accepted is a function of the model, or "
            "labelled images: a pair of tensors, a loader"
        ) from error


def _method(
    method: str | Method, costs: Mapping[str, Cost], space: Space, smaller: SearchResult | None
) -> Method:
    starts = () if smaller is None else smaller.top(STARTS)
    accepted = f"{', '.join(map(repr, METHODS))}, or one of gross.architecture_search with settings"
    if not isinstance(method, str):
        check_callable("method", method, accepted)
        return method
    if method == "exhaustive":
        return Exhaustive()
    if method == "breadth-first":
        return BreadthFirst(starts=starts)
    if method == "random":
        return RandomSearch()
    if method == "evolution":
        first = space.limits[0].cost if space.limits else costs.get("macs", costs["parameters"])
        return Evolution(first)
    raise ValueError(f"method: got {method!r}, accepted are {accepted}")


def _input_size(metric: object) -> tuple[int, ...] | None:
    data: Any = metric.data if isinstance(metric, Accuracy) else None
    if hasattr(data, "tensors"):
        data = data.tensors(1)
    return tuple(data[0].shape[1:]) if isinstance(data, tuple) else None


def _best(evaluations: Iterable[Evaluation]) -> Evaluation | None:
    """The highest score; of equal ones the one seen first."""
    scored = (e for e in evaluations if e.score is not None)
    return max(scored, key=lambda e: e.score or 0.0, default=None)
