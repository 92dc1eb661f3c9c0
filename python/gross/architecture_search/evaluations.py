"""The evaluations of a search: each configuration once, in the journal at once, shared over the
processes that ``torchrun`` started."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..deployment.mixed import MixedSupernet
from ..evaluation import Accuracy, evaluate
from ..supernet import Configuration, configuration, set_configuration
from ..training.distributed import running, shard
from ..training.selection import evaluating
from .choices import Choices, in_8_bits, shown, sizes
from .cost import Cost
from .journal import Journal
from .progress import Show

#: What a search maximises: a number from the model, which is set to a configuration.
Metric = Callable[[nn.Module], float]
#: Configurations of one tree walk. They are known together, and the journal is written after it;
#: other metrics are written down one by one.
TREE = 64


@dataclass(frozen=True)
class Evaluation:
    """What is known of one configuration.

    Attributes:
        score: the metric, the higher the better; None where it failed.
        error: why it failed.
        costs: of the configuration, by name.
        int8: the decomposed layers in 8 bits, by name.
    """

    configuration: Configuration
    score: float | None
    error: str | None = None
    costs: Mapping[str, float] = field(default_factory=dict)
    int8: tuple[str, ...] = ()


@dataclass(frozen=True)
class Goal:
    """What makes one configuration better than another: its score; or, once that is enough, its
    cost.

    Attributes:
        enough: such a score; by default none is.
        cost: what is to be small then.
    """

    enough: float = math.inf
    cost: Cost | None = None

    def rank(self, chosen: Choices, score: float | None) -> tuple[float, float]:
        if score is None:
            return -math.inf, 0.0
        if score < self.enough or self.cost is None:
            return score, 0.0
        return self.enough, -self.cost(chosen)


class Evaluations:
    """Scores by choices. Calling it evaluates those that are not known yet.

    Args:
        supernet: what is evaluated; where layers may be in 8 bits, a
            :class:`gross.deployment.mixed.MixedSupernet`.
        goal: what :meth:`rank` goes by.
    """

    def __init__(
        self,
        supernet: nn.Module | MixedSupernet,
        metric: Metric,
        journal: Journal | None = None,
        progress: Show = lambda done, total, best: None,
        goal: Goal | None = None,
    ) -> None:
        self.mixed = supernet if isinstance(supernet, MixedSupernet) else None
        self.supernet = supernet.network if isinstance(supernet, MixedSupernet) else supernet
        self.metric = metric
        self.journal = journal
        self.progress = progress
        self.goal = goal or Goal()
        #: By choices, which are also the evaluations' configurations: a result takes them apart.
        self.known: dict[Choices, Evaluation] = {}
        #: Those that this search asked for, in the order of their first request.
        self.asked: dict[Choices, None] = {}
        self.expected = 0
        for record in self.broadcast([] if journal is None else journal.records):
            c = tuple(record["configuration"])
            self.known[c] = Evaluation(c, record["score"], record["error"])

    def __call__(self, every: Iterable[Choices]) -> None:
        wanted = list(dict.fromkeys(every))
        self.asked.update(dict.fromkeys(wanted))
        # A tree has one precision for each layer.
        new = sorted((c for c in wanted if c not in self.known), key=lambda c: (in_8_bits(c), c))
        self.expected = len(self.known) + len(new)
        processes = shard()
        step = (TREE if isinstance(self.metric, Accuracy) else 1) * processes.count
        for start in range(0, len(new), step):
            part = new[start : start + step]
            # Neighbours in the sorted list share the most: every process takes a sub-tree.
            share = math.ceil(len(part) / processes.count)
            mine = part[processes.index * share : (processes.index + 1) * share]
            for evaluation in self._gather(self._evaluate(mine)):
                self.add(evaluation)

    def add(self, evaluation: Evaluation) -> None:
        """Take note of an evaluation, whoever made it."""
        if evaluation.configuration in self.known:
            return
        self.known[evaluation.configuration] = evaluation
        if self.journal is not None:
            known = {"configuration": evaluation.configuration, "score": evaluation.score}
            self.journal.append({**known, "error": evaluation.error})
        self.progress(len(self.known), self.expected, self.best_score)

    def score(self, chosen: Choices) -> float:
        """The score, −∞ where the evaluation failed."""
        score = self.known[chosen].score
        return -math.inf if score is None else score

    def rank(self, chosen: Choices) -> tuple[float, float]:
        """The higher, the better."""
        return self.goal.rank(chosen, self.known[chosen].score)

    @property
    def best_score(self) -> float:
        return max((e.score for e in self.known.values() if e.score is not None), default=-math.inf)

    def _evaluate(self, every: Sequence[Choices]) -> list[Evaluation]:
        found: list[Evaluation] = []
        for int8, group in groupby(every, in_8_bits):
            if self.mixed is not None:
                self.mixed.set_precision(int8)
            found += self._of_one_precision(list(group), len(self.known) + len(found))
        return found

    def _of_one_precision(self, every: Sequence[Choices], done: int) -> list[Evaluation]:
        """Evaluations with the same layers in 8 bits, after so many others."""
        if isinstance(self.metric, Accuracy):

            def show(images: int, total: int) -> None:
                part = len(every) * images // total
                self.progress(done + part, self.expected, self.best_score)

            try:
                scores = evaluate(self.supernet, map(sizes, every), self.metric, progress=show)
            except (RuntimeError, ArithmeticError):
                # One of them, perhaps: each alone says which.
                pass
            else:
                return [_judged(c, s) for c, s in zip(every, scores, strict=True)]
        return [self._alone(c) for c in every]

    def _alone(self, wanted: Choices) -> Evaluation:
        before = configuration(self.supernet)
        try:
            with evaluating(self.supernet):
                set_configuration(self.supernet, sizes(wanted))
                return _judged(wanted, self.metric(self.supernet))
        except Exception as error:
            # The metric is the user's: one configuration that it cannot take shall not end a
            # search of hours.
            return _failed(wanted, f"{type(error).__name__}: {error}")
        finally:
            set_configuration(self.supernet, before)

    def _gather(self, mine: list[Evaluation]) -> list[Evaluation]:
        if not running():
            return mine
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
        return [evaluation for part in parts for evaluation in part]

    def broadcast(self, value: Any) -> Any:
        """The value of the first process."""
        if not running():
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]


def _judged(chosen: Choices, score: object) -> Evaluation:
    if isinstance(score, torch.Tensor) and score.numel() == 1:
        score = score.item()
    if not isinstance(score, Real):
        return _failed(chosen, f"the metric returned no number: {score!r}")
    if math.isnan(score):
        return _failed(chosen, "the metric returned NaN")
    return Evaluation(chosen, float(score))


def _failed(chosen: Choices, error: str) -> Evaluation:
    warnings.warn(f"configuration {shown(chosen)} is skipped: {error}", stacklevel=2)
    return Evaluation(chosen, None, error)
