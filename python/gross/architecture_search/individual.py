"""The experiment behind Table 5 and Figure 5: does the supernet rank configurations as individual
fine-tuning does, and better than shortcuts?"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..arguments import check_callable, check_int, check_path, check_type
from ..copying import copy_model
from ..data import Data
from ..devices import placed
from ..evaluation import Accuracy, evaluate
from ..supernet import Configuration, check_configuration, check_supernet
from ..supernet import configuration as active_configuration
from ..training import Recipe, finetune
from ..training.run import provenance, replace
from .journal import Journal, fingerprint, metric_fingerprint
from .ranking import TOP, Agreement, agreement
from .space import Space

#: Configurations of the paper's study, and epochs of its shortened schedule.
CONFIGURATIONS = 45
PARTIAL = 5
#: What a search could rank by, as the paper's Table 5 has it.
STRATEGIES = {"without": "no fine-tuning", "partial": "partial fine-tuning", "gross": "GroSS"}
#: Raised when studies can no longer be read as they were.
FORMAT = 1


@dataclass(frozen=True)
class Point:
    """Validation accuracies of one configuration, in percent.

    Attributes:
        drawn: whether it was drawn at random, and so counts for the ranking.
        gross: in the supernet.
        without: in the decomposition, without fine-tuning.
        partial, true: after part of its individual fine-tuning, and after all of it.
        seconds: of the fine-tuning.
    """

    configuration: Configuration
    drawn: bool
    gross: float
    without: float
    partial: float
    true: float
    seconds: float


@dataclass(frozen=True)
class Study:
    """The points of a study; a JSON file with :meth:`save` and :meth:`load`.

    Attributes:
        points: one per configuration.
        schedule: epochs of the individual fine-tuning, in part and in full.
        provenance: time, versions, seed, recipe, data.
    """

    points: tuple[Point, ...]
    schedule: tuple[int, int]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def true(self) -> dict[Configuration, float]:
        """Accuracy after individual fine-tuning, by configuration."""
        return {point.configuration: point.true for point in self.points}

    def agreement(self, strategy: str) -> Agreement:
        """How one of "without", "partial" and "gross" ranks the configurations drawn."""
        drawn = [point for point in self.points if point.drawn]
        return agreement([getattr(p, strategy) for p in drawn], [p.true for p in drawn])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the study as JSON, in place of a file that is there."""
        replace(Path(path), json.dumps({"format": FORMAT, **asdict(self)}, indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Study:
        """Read what :meth:`save` wrote; ValueError for any other file."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError(f"accepted is format {FORMAT}")
            content["points"] = tuple(
                Point(**{**point, "configuration": tuple(point["configuration"])})
                for point in content["points"]
            )
            content["schedule"] = tuple(content["schedule"])
            return cls(**content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not a study: {error}") from error


def study(
    supernet: nn.Module,
    decomposed: nn.Module,
    data: Data,
    recipe: str | os.PathLike[str] | Recipe,
    directory: str | os.PathLike[str],
    *,
    count: int = CONFIGURATIONS,
    partial: int = PARTIAL,
    also: Sequence[Configuration] = (),
    seed: int = 0,
    device: str | int | torch.device | None = None,
    progress: Callable[[int, int, Point], None] = lambda done, total, point: None,
    **overrides: Any,
) -> Study:
    """Fine-tune random configurations individually, and compare (section 5.2).

    Every configuration is fine-tuned once, from the decomposition; its partial accuracy is the one
    after the first epochs of that schedule.

    Args:
        supernet: decomposed and fine-tuned.
        decomposed: the same before its fine-tuning, from where the individual ones start.
        data: trains on ``data.train``, compares accuracies on ``data.validation``.
        recipe: of the individual fine-tuning.
        directory: made if it does not exist; a study that was stopped goes on from it.
        count: random configurations, or all if there are fewer.
        partial: epochs of the partial fine-tuning.
        also: further configurations to fine-tune, which do not count for the ranking: baselines,
            and what searches found.
        seed: of the draw and of the fine-tuning.
        device: where to run, such as "cuda"; both supernets are moved there and stay. By default
            where they are.
        progress: called after each configuration with how many are done, how many there are, and
            the last one.
        overrides: other values for the recipe.

    Raises:
        ValueError: before any work, for supernets that do not fit each other, more partial epochs
            than the recipe has, or a directory of another study.
    """
    sizes = tuple(layer.group_sizes for layer in check_supernet("supernet", supernet).values())
    before = tuple(layer.group_sizes for layer in check_supernet("decomposed", decomposed).values())
    check_type("data", data, Data, "a gross.data.Data")
    check_int("count", count, least=TOP)
    check_int("partial", partial)
    check_type("also", also, Sequence, "a sequence of configurations")
    check_int("seed", seed)
    check_callable("progress", progress, "a function of two ints and a point")
    folder = check_path("directory", directory)
    if sizes != before:
        raise ValueError("decomposed: got other layers than the supernet's, accepted are the same")
    loaded = recipe if isinstance(recipe, Recipe) else Recipe.load(check_path("recipe", recipe))
    loaded = loaded.override(overrides)
    if not 1 <= partial <= loaded.epochs:
        raise ValueError(f"partial: got {partial} epochs, accepted are 1 to {loaded.epochs}")
    for net in (supernet, decomposed):
        placed(net, device)
    active = active_configuration(supernet)
    also = [check_configuration(c, sizes, active) for c in also]
    drawn = _draw(sizes, count, seed)
    configurations = list(dict.fromkeys([*drawn, *also]))
    folder.mkdir(parents=True, exist_ok=True)
    accuracy = Accuracy(data.validation)
    identity = {
        "supernet": fingerprint(supernet),
        "decomposed": fingerprint(decomposed),
        "metric": metric_fingerprint(accuracy),
        "recipe": json.dumps([loaded.flat(), partial, seed], default=str),
    }
    journal = Journal(folder / "study.jsonl", identity)
    known = {tuple(record["configuration"]): record for record in journal.records}
    in_supernet = evaluate(supernet, configurations, accuracy)
    without = evaluate(decomposed, configurations, accuracy)
    points = []
    for i, c in enumerate(configurations):
        if c not in known:
            known[c] = _finetune(decomposed, data, loaded, c, folder, (partial, seed))
            journal.append(known[c])
        point = Point(
            c,
            c in drawn,
            in_supernet[i],
            without[i],
            known[c]["partial"],
            known[c]["true"],
            known[c]["seconds"],
        )
        points.append(point)
        progress(i + 1, len(configurations), point)
    facts = {**provenance(), **identity, "data": data.name, "seed": seed}
    return Study(tuple(points), (partial, loaded.epochs), facts)


def _draw(sizes: tuple[tuple[int, ...], ...], count: int, seed: int) -> list[Configuration]:
    """Distinct random configurations, all if there are fewer."""
    space, generator = Space(sizes), random.Random(seed)
    drawn: dict[Configuration, None] = {}
    while len(drawn) < min(count, space.size):
        drawn[space.draw(generator)] = None
    return list(drawn)


def _finetune(
    decomposed: nn.Module,
    data: Data,
    recipe: Recipe,
    configuration: Configuration,
    folder: Path,
    partial_and_seed: tuple[int, int],
) -> dict[str, Any]:
    """Fine-tune one configuration; its accuracies, as the journal has them."""
    partial, seed = partial_and_seed
    run = folder / "-".join(map(str, configuration))
    network = copy_model(decomposed).to(memory_format=torch.channels_last)
    began = time.perf_counter()
    history = finetune(
        network,
        data,
        recipe,
        configuration=configuration,
        directory=run,
        resume=True,
        seed=seed,
        quiet=True,
    )
    for checkpoint in run.glob("checkpoint-*"):
        checkpoint.unlink()
    accuracies = [epoch["accuracy"] for epoch in history.epochs]
    assert all(map(math.isfinite, accuracies))
    return {
        "configuration": configuration,
        "partial": accuracies[partial - 1],
        "true": accuracies[-1],
        "seconds": time.perf_counter() - began,
    }
