"""How well a search space ranks configurations, against their true accuracies (section 5.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..arguments import check_int, check_numbers
from ..extras import from_extra

#: The best by true accuracy that count as relevant (Table 5).
TOP = 5
#: How many of the best configurations are removed first (Table 5).
REMOVED = (0, 10, 20, 30)


def average_precision(
    found: Sequence[float], true: Sequence[float], *, top: int = TOP, removed: int = 0
) -> float:
    """Average precision of a ranking, 0 to 1: of the ``top`` configurations by true accuracy, the
    mean of the precisions at their ranks by ``found``.

    Args:
        found: accuracy of each configuration in the search space.
        true: its accuracy after individual fine-tuning.
        top: how many are relevant.
        removed: first leave out so many of the best by true accuracy: the search is then one among
            the others.

    Raises:
        ValueError: if the lengths differ, or fewer than ``top`` configurations remain.
    """
    found = check_numbers("found", found, "accuracies")
    true = check_numbers("true", true, "accuracies")
    check_int("top", top, least=1)
    check_int("removed", removed, least=0)
    if len(found) != len(true):
        raise ValueError(
            f"found: got {len(found)} accuracies, accepted are as many as true ones, {len(true)}"
        )
    if len(true) - removed < top:
        raise ValueError(
            f"removed: got {removed} of {len(true)} configurations, accepted are at most "
            f"{len(true) - top}, which leave {top}"
        )
    remaining = sorted(range(len(true)), key=lambda i: -true[i])[removed:]
    relevant = set(remaining[:top])
    precisions, hits = [], 0
    for rank, i in enumerate(sorted(remaining, key=lambda i: -found[i]), 1):
        if i in relevant:
            hits += 1
            precisions.append(hits / rank)
    return sum(precisions) / top


@dataclass(frozen=True)
class Agreement:
    """How a search space agrees with the true accuracies.

    Attributes:
        precision: average precision by how many of the best were removed, where enough remain.
        kendall: Kendall's τ-b.
        spearman: Spearman's ρ.
    """

    precision: dict[int, float]
    kendall: float
    spearman: float

    @property
    def mean(self) -> float:
        """Mean average precision (the last column of Table 5)."""
        return sum(self.precision.values()) / len(self.precision)


def agreement(found: Sequence[float], true: Sequence[float]) -> Agreement:
    """Table 5's average precisions and the rank correlations. Raises ValueError for fewer than five
    configurations."""
    found = check_numbers("found", found, "accuracies")
    true = check_numbers("true", true, "accuracies")
    with from_extra("search"):
        from scipy.stats import kendalltau, spearmanr
    top = min(TOP, len(true))
    return Agreement(
        {
            removed: average_precision(found, true, top=top, removed=removed)
            for removed in REMOVED
            if len(true) - removed >= top
        },
        float(kendalltau(found, true).statistic),
        float(spearmanr(found, true).statistic),
    )
