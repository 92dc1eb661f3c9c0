"""``gross.search``: the best configuration of a supernet under a budget."""

from __future__ import annotations

import os
import random
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..arguments import (
    check_callable,
    check_choice,
    check_flag,
    check_int,
    check_path,
    check_type,
)
from ..deployment.mixed import MixedSupernet
from ..deployment.precision import read
from ..devices import placed
from ..evaluation import Accuracy
from ..supernet import check_supernet
from ..training.distributed import shard
from ..training.run import provenance
from .breadth_first import BreadthFirst
from .choices import PRECISIONS, Choices, choices_of, in_8_bits, of_sizes, sizes
from .cost import COSTS, Amount, Budget, Cost, costs_of
from .evaluations import Evaluation, Evaluations, Goal, Metric
from .evolution import Evolution
from .exhaustive import Exhaustive
from .journal import Journal, calibration_fingerprint, fingerprint, metric_fingerprint
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
    precision: str = "float32",
    calibration: Tensor | Iterable[Any] | None = None,
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
            milliseconds, and several at once, and for a score that is enough. None is no limit.
        method: "exhaustive", "breadth-first", "random" or "evolution"; or one with settings, such
            as ``BreadthFirst(runs=5)`` of :mod:`gross.architecture_search`.
        input_size: shape of one input without the batch dimension, to count MACs; known for
            images in tensors.
        seed: of everything random. The same seed gives the same result.
        journal: a file for every evaluation; a search that was killed goes on from it and repeats
            none.
        smaller: the result under the next smaller budget, whose ten best configurations the first
            runs of a breadth-first search start from.
        precision: "float32"; "int8", every layer in 8 bits; or "mixed", where each decomposed
            layer has its group size and its precision. A budget in milliseconds then needs a table
            with columns for 8 bits, and "mixed" needs milliseconds. The metric is called with the
            layers' inputs and weights rounded as the deployed kernels do it
            (:mod:`gross.deployment.mixed`). All that is no decomposed layer is in 8 bits as soon as
            any layer is.
        calibration: for 8 bits, some dozens of images as :func:`gross.export` takes them.
        device: where to search, such as "cuda"; the supernet is moved there and stays. By default
            where it is. 8 bits are for a CPU.
        quiet: show no progress.

    Returns:
        The best configuration, its score, and everything that was evaluated.

    Raises:
        TypeError: if calibration data is missing.
        ValueError: before any work, for a budget that no configuration is within (with the
            smallest), a space too large to be searched exhaustively, or a journal of another
            supernet, metric or calibration; for 8 bits, of a supernet that is not in float32 on a
            CPU, or with a latency table without them. After it, if every evaluation failed, with
            the first reason.
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
    _check_precision(supernet, precision, calibration, budget)
    costs = costs_of(supernet, input_size or _input_size(metric), budget.latency, precision)
    choices = tuple(of_sizes(layer.group_sizes, precision) for layer in layers.values())
    space = Space(choices, budget.limits(costs))
    goal = Goal() if budget.least_score is None else Goal(budget.least_score, _first(costs, space))
    run = _method(method, costs, space, smaller)
    identity = {"supernet": fingerprint(supernet), "metric": metric_fingerprint(metric)}
    images = [] if precision == "float32" else read(calibration)
    if images:
        identity["calibration"] = calibration_fingerprint(images)
    book = None if journal is None or shard().index else Journal(journal, identity)
    evaluated = MixedSupernet(supernet, images) if images else supernet
    with shown(run.name, quiet or shard().index > 0) as show:
        evaluations = Evaluations(evaluated, metric, book, show, goal)
        began = time.perf_counter()
        run(space, evaluations, random.Random(seed))
        if budget.base is not None:
            evaluations([budget.base])
        asked = {c: evaluations.known[c] for c in evaluations.asked}
        baseline = None
        if isinstance(run, BreadthFirst | Evolution):
            beside = Evaluations(evaluated, metric, book, show, goal)
            beside.known = evaluations.known
            RandomSearch(len(asked))(space, beside, random.Random(seed + 1))
            baseline = _best((beside.known[c] for c in beside.asked), goal)
    best = _best((e for e in asked.values() if space.allows(e.configuration)), goal)
    if best is None or best.score is None:
        errors = [e.error for e in asked.values() if e.error]
        raise ValueError(f"metric: every evaluation failed; the first one: {errors[0]}")

    if budget.least_score is not None and best.score < budget.least_score:
        warnings.warn(
            f"budget: no configuration has a score of {budget.least_score}, the best {best.score}",
            stacklevel=2,
        )

    def priced(evaluation: Evaluation) -> Evaluation:
        chosen = evaluation.configuration
        prices = {kind: cost(chosen) for kind, cost in costs.items()}
        int8 = tuple(compress(layers, in_8_bits(chosen)))
        return replace(evaluation, configuration=sizes(chosen), costs=prices, int8=int8)

    found = priced(best)
    return SearchResult(
        found.configuration,
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
        int8=found.int8,
        layers=tuple(layers),
    )


def _check_precision(
    supernet: nn.Module, precision: str, calibration: object, budget: Budget
) -> None:
    check_choice("precision", precision, PRECISIONS)
    if precision == "float32":
        if calibration is not None:
            raise ValueError(
                "calibration: got data for precision 'float32', accepted is None; or 'int8', "
                "'mixed'"
            )
        return
    first = next(supernet.parameters())
    if first.dtype != torch.float32 or first.device.type != "cpu":
        raise ValueError(
            f"precision: got {precision!r} for a supernet of {first.dtype} on {first.device}, "
            "accepted for 8 bits is float32 on a CPU"
        )
    if precision == "mixed" and budget.milliseconds is None and budget.least_score is None:
        raise ValueError(
            "budget: got none in milliseconds for precision 'mixed', accepted is one with "
            "milliseconds and latency: no other cost knows of 8 bits"
        )
    if precision == "mixed" and budget.latency is None:
        raise ValueError("budget: got no latency table, which precision 'mixed' needs")
    if precision == "int8" and budget.base is not None:
        raise ValueError(
            f"budget: got the configuration {budget.base} for precision 'int8', accepted are "
            "numbers and shares"
        )
    if calibration is None:
        raise TypeError(
            f"calibration: got None, accepted for precision {precision!r} is a tensor of inputs, "
            "or an iterable of them"
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
    starts: tuple[Choices, ...] = ()
    if smaller is not None:
        starts = tuple(choices_of(e, smaller.layers) for e in smaller.best(STARTS))
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
        return Evolution(_first(costs, space))
    raise ValueError(f"method: got {method!r}, accepted are {accepted}")


def _first(costs: Mapping[str, Cost], space: Space) -> Cost:
    """The cost that is to be small: the first that is limited, or known."""
    if space.limits:
        return space.limits[0].cost
    return next(costs[name] for name in ("milliseconds", *COSTS) if name in costs)


def _input_size(metric: object) -> tuple[int, ...] | None:
    data: Any = metric.data if isinstance(metric, Accuracy) else None
    if hasattr(data, "tensors"):
        data = data.tensors(1)
    return tuple(data[0].shape[1:]) if isinstance(data, tuple) else None


def _best(evaluations: Iterable[Evaluation], goal: Goal) -> Evaluation | None:
    """The highest rank; of equal ones the one seen first."""
    scored = (e for e in evaluations if e.score is not None)
    return max(scored, key=lambda e: goal.rank(e.configuration, e.score), default=None)
