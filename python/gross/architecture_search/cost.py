"""What a configuration costs: multiply–accumulates, parameters or milliseconds, and budgets in
them.

Every cost is a sum over the layers, ``fixed + Σ_i per_layer[i][choice]``, so that thousands of
configurations are counted in milliseconds and the smallest is known without looking for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from ..arguments import check_choice, check_number, check_type
from ..copying import unwrapped
from ..macs import macs
from ..supernet import Configuration, check_configuration, check_supernet, dense_network
from .choices import PRECISIONS, of_sizes

if TYPE_CHECKING:
    from ..latency import LatencyTable

#: A number; a share of the dense network, such as "50%"; or a configuration, which is then the
#: base that must not be exceeded.
Amount = float | str | Sequence[int]
ACCEPTED = "accepted are positive numbers, shares such as '50%', and a configuration"
COSTS = ("macs", "parameters", "milliseconds")


@dataclass(frozen=True)
class Cost:
    """One kind of cost.

    Attributes:
        name: "macs", "parameters" or "milliseconds".
        fixed: what the rest of the network costs.
        per_layer: what each decomposed layer costs at each of its choices.
        dense: what the network costs with plain convolutions in place of the decomposed layers.
        mixed: the cost of configurations with any layer in 8 bits, where it is another; then
            ``fixed`` and ``per_layer`` are for the others.
    """

    name: str
    fixed: float
    per_layer: tuple[Mapping[int, float], ...]
    dense: float
    mixed: Cost | None = None

    def __call__(self, chosen: Sequence[int]) -> float:
        cost = self.of([chosen])
        return cost.fixed + sum(
            costs[choice] for costs, choice in zip(cost.per_layer, chosen, strict=True)
        )

    def of(self, choices: Sequence[Sequence[int]]) -> Cost:
        """The cost that holds if any layer is in 8 bits that may be, by these choices."""
        return self if self.mixed is None or min(map(min, choices)) > 0 else self.mixed

    def checked(self, configuration: Sequence[int]) -> float:
        """The cost of a configuration; ValueError if it is not one of the supernet's."""
        sizes = [tuple(costs) for costs in self.per_layer]
        return self(check_configuration(configuration, sizes, tuple(s[0] for s in sizes)))

    def least(self, choices: Sequence[Sequence[int]]) -> float:
        """A bound on what combinations of these choices cost; if some are in 8 bits, of those with
        any layer so."""
        cost = self.of(choices)
        return cost.fixed + sum(
            min(costs[choice] for choice in own)
            for costs, own in zip(cost.per_layer, choices, strict=True)
        )

    @property
    def smallest(self) -> float:
        """The least that a configuration costs."""
        found = [self.least([tuple(costs) for costs in self.per_layer])]
        if self.mixed is not None:
            every = [tuple(costs) for costs in self.mixed.per_layer]
            for i, own in enumerate(every):
                lowered = tuple(choice for choice in own if choice < 0)
                found.append(self.least([*every[:i], lowered, *every[i + 1 :]]))
        return min(found)


@dataclass(frozen=True)
class Limit:
    """A cost and the most that it may be."""

    cost: Cost
    most: float

    def allows(self, configuration: Sequence[int]) -> bool:
        return self.cost(configuration) <= self.most


@dataclass(frozen=True)
class Budget:
    """What a search must respect; several limits hold at once.

    Attributes:
        macs, parameters: of the exported network, for one input. A number, a share of the dense
            network such as "50%", or a base configuration whose cost is the limit.
        milliseconds: predicted by ``latency``, likewise.
        latency: needed for milliseconds.
        least_score: of the metric. Of the configurations that have it the cheapest is wanted, by
            the first of milliseconds, MACs and parameters that is known; by default the one with
            the best score.
    """

    macs: Amount | None = None
    parameters: Amount | None = None
    milliseconds: Amount | None = None
    latency: LatencyTable | None = None
    least_score: float | None = None

    def __post_init__(self) -> None:
        for name in COSTS:
            amount = getattr(self, name)
            known = amount is None or isinstance(amount, str | Real) or _is_configuration(amount)
            if not known or isinstance(amount, bool):
                raise TypeError(
                    f"budget: got {name} {amount!r} of type {type(amount).__name__}, {ACCEPTED}"
                )

        if self.least_score is not None:
            check_number("least_score", self.least_score, "a number", -math.inf)

    @classmethod
    def of(cls, value: Budget | Amount | None) -> Budget:
        """A budget; anything else is a budget in MACs, and None has no limit."""
        return value if isinstance(value, Budget) else cls(macs=value)

    @property
    def base(self) -> Configuration | None:
        """The base configuration, if an amount is one."""
        for name in COSTS:
            amount = getattr(self, name)
            if _is_configuration(amount):
                return tuple(map(int, amount))
        return None

    def limits(self, costs: Mapping[str, Cost]) -> tuple[Limit, ...]:
        """The limits in numbers.

        Raises:
            ValueError: naming the amount, if it is not one, or if no configuration is within it,
                with the smallest that is.
        """
        limits = []
        for name in COSTS:
            amount = getattr(self, name)
            if amount is None:
                continue
            if name not in costs:
                needed = {"macs": "input_size", "milliseconds": "latency"}[name]
                raise ValueError(f"budget: got {name} {amount!r}; needed for it is {needed}")
            cost = costs[name]
            most = _number(name, amount, cost)
            if most < cost.smallest:
                raise ValueError(
                    f"budget: got {_shown(most)} {name}, accepted is at least "
                    f"{_shown(cost.smallest)}, which the smallest configuration costs"
                )
            limits.append(Limit(cost, most))
        return tuple(limits)


def costs_of(
    supernet: nn.Module,
    input_size: Sequence[int] | None = None,
    latency: LatencyTable | None = None,
    precision: str = "float32",
) -> dict[str, Cost]:
    """The costs that are known of a supernet, by name.

    Args:
        input_size: shape of one input without the batch dimension; needed for MACs.
        latency: needed for milliseconds.
        precision: as :func:`gross.search`'s.

    Raises:
        ValueError: if the latency table is of other layers, or has no column for 8 bits that is
            needed.
    """
    # Not above: a latency table prices configurations by what is in this file.
    from ..latency import LatencyTable

    layers = check_supernet("supernet", supernet)
    check_choice("precision", precision, PRECISIONS)
    if latency is not None:
        check_type("latency", latency, LatencyTable, "a gross.LatencyTable")
    supernet = unwrapped(supernet)
    costs = {}
    plain = dense_network(supernet)
    if input_size is not None:
        report = macs(supernet, input_size)
        slopes = zip(report.per_group_size, report.group_sizes, strict=True)
        costs["macs"] = Cost(
            "macs",
            report.fixed,
            tuple(
                {choice: slope * abs(choice) for choice in of_sizes(sizes, precision)}
                for slope, sizes in slopes
            ),
            macs(plain, input_size).total,
        )
    per_layer = tuple(
        {
            choice: layer.width[0] * layer.in_channels
            + layer.width[1] * abs(choice) * math.prod(layer.kernel_size)
            + layer.out_channels * layer.width[1]
            for choice in of_sizes(layer.group_sizes, precision)
        }
        for layer in layers.values()
    )
    series = sum(p.numel() for layer in layers.values() for s in layer._series() for p in s)
    costs["parameters"] = Cost(
        "parameters",
        sum(p.numel() for p in supernet.parameters()) - series,
        per_layer,
        sum(p.numel() for p in plain.parameters()),
    )
    if latency is not None:
        latency.check_layers(supernet)
        costs["milliseconds"] = _milliseconds(latency, precision)
    return costs


def _milliseconds(latency: LatencyTable, precision: str) -> Cost:
    if precision != "float32" and not latency.int8_layers:
        raise ValueError(
            f"latency: got a table of float32 alone for precision {precision!r}, accepted is one "
            "measured with calibration data"
        )
    made = partial(Cost, "milliseconds", dense=latency.dense)
    floats = made(fixed=latency.rest, per_layer=tuple(latency.layers.values()))
    if precision == "float32":
        return floats
    lowered = tuple(
        {-size: time for size, time in latency.int8_layers[name].items()} for name in latency.layers
    )
    int8 = made(fixed=latency.int8_rest, per_layer=lowered)
    if precision == "int8":
        return int8
    both = tuple(
        latency.beside_8_bits(name) | own for name, own in zip(latency.layers, lowered, strict=True)
    )
    return replace(floats, mixed=replace(int8, per_layer=both))


def _number(name: str, amount: Amount, cost: Cost) -> float:
    if isinstance(amount, str):
        share = amount.removesuffix("%")
        try:
            value = float(share) / 100 * cost.dense if share != amount else math.nan
        except ValueError:
            value = math.nan
    elif isinstance(amount, float | int | Real):  # mypy knows no Real among the amounts.
        value = float(amount)
    else:
        return cost.checked(amount)
    if not value > 0:
        raise ValueError(f"budget: got {name} {amount!r}, {ACCEPTED}")
    return value


def _is_configuration(amount: object) -> bool:
    return isinstance(amount, Sequence | np.ndarray | Tensor) and not isinstance(amount, str)


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
