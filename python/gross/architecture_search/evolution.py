"""Evolutionary search: NSGA-II through Optuna, which gives the whole front of accuracy and cost."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..extras import from_extra
from ..training.distributed import shard
from .choices import Choices
from .cost import Cost
from .evaluations import Evaluation, Evaluations
from .space import Space

if TYPE_CHECKING:
    from optuna import Study, Trial


@dataclass(frozen=True)
class Evolution:
    """NSGA-II: the score upwards, a cost downwards, the budget's limits as constraints.

    Trials beyond the budget are told apart by how far they are beyond it, and are not evaluated.
    A shared storage makes several processes, on several machines, workers of one search; the same
    seed gives the same result for one worker without storage.

    Attributes:
        cost: the one to minimise.
        evaluations: trials of this worker.
        population: of a generation.
        storage: a database by its URL, such as ``sqlite:///search.db``; by default in memory.
        study: the search's name there.
    """

    name: ClassVar[str] = "evolution"

    cost: Cost
    evaluations: int = 500
    population: int = 50
    storage: str | None = None
    study: str = "gross"

    def __call__(self, space: Space, evaluations: Evaluations, generator: random.Random) -> None:
        seed = generator.randrange(2**31)
        # Of processes that share their evaluations the first one holds the study.
        study = self._open(space, seed) if shard().index == 0 else None
        remaining = self.evaluations
        while remaining > 0:
            trials = [study.ask() for _ in range(min(self.population, remaining))] if study else []
            asked = [_chosen(trial, space) for trial in trials]
            if study is not None:
                _learn(study, space, evaluations)
            wanted: list[Choices] = evaluations.broadcast(asked)
            evaluations(c for c in wanted if space.allows(c))
            for trial, c in zip(trials, asked, strict=True):
                self._tell(study, trial, c, space, evaluations)
            remaining -= len(wanted)

    def _open(self, space: Space, seed: int) -> Study:
        with from_extra("search"):
            import optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.NSGAIISampler(population_size=self.population, seed=seed)
        return optuna.create_study(
            storage=self.storage,
            sampler=sampler,
            study_name=self.study,
            directions=["maximize", "minimize"],
            load_if_exists=True,
        )

    def _tell(
        self,
        study: Any,
        trial: Trial,
        chosen: Choices,
        space: Space,
        evaluations: Evaluations,
    ) -> None:
        from optuna.trial import TrialState

        for limit in space.limits:
            trial.set_constraint(limit.cost.name, limit.cost(chosen) - limit.most)
        cost = self.cost(chosen)
        if not space.allows(chosen):
            # Between two that are infeasible the excess alone decides.
            study.tell(trial, [0.0, cost])
        elif evaluations.known[chosen].score is None:
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, [evaluations.score(chosen), cost])


def _chosen(trial: Trial, space: Space) -> Choices:
    return tuple(trial.suggest_categorical(f"layer{i}", own) for i, own in enumerate(space.choices))


def _learn(study: Study, space: Space, evaluations: Evaluations) -> None:
    """Take note of what other workers have evaluated."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        c = tuple(trial.params[f"layer{i}"] for i in range(len(space.choices)))
        if space.allows(c):
            evaluations.add(Evaluation(c, trial.values[0]))
