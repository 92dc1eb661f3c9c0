"""What a configuration costs: multiply–accumulates, parameters or milliseconds, and budgets in
them.

Every cost is a sum over the layers, ``fixed + Σ_i per_layer[i][size]``, so that thousands of
configurations are counted in milliseconds and the smallest is known without looking for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from ..arguments import check_type
from ..copying import unwrapped
from ..macs import macs
from ..supernet import Configuration, check_configuration, check_supernet, dense_network

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
        per_layer: what each decomposed layer costs at each of its group sizes.
        dense: what the network costs with plain convolutions in place of the decomposed layers.
    """

    name: str
    fixed: float
    per_layer: tuple[Mapping[int, float], ...]
    dense: float

    def __call__(self, configuration: Sequence[int]) -> float:
        return self.fixed + sum(
            costs[size] for costs, size in zip(self.per_layer, configuration, strict=True)
        )

    def checked(self, configuration: Sequence[int]) -> float:
        """The cost of a configuration; ValueError if it is not one of the supernet's."""
        sizes = [tuple(costs) for costs in self.per_layer]
        return self(check_configuration(configuration, sizes, tuple(s[0] for s in sizes)))

    @property
    def smallest(self) -> float:
        """The least that a configuration costs."""
        return self.fixed + sum(min(costs.values()) for costs in self.per_layer)


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
    """

    macs: Amount | None = None
    parameters: Amount | None = None
    milliseconds: Amount | None = None
    latency: LatencyTable | None = None

    def __post_init__(self) -> None:
        for name in COSTS:
            amount = getattr(self, name)
            known = amount is None or isinstance(amount, str | Real) or _is_configuration(amount)
            if not known or isinstance(amount, bool):
                raise TypeError(
                    f"budget: got {name} {amount!r} of type {type(amount).__name__}, {ACCEPTED}"
                )

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
) -> dict[str, Cost]:
    """The costs that are known of a supernet, by name.

    Args:
        input_size: shape of one input without the batch dimension; needed for MACs.
        latency: needed for milliseconds.

    Raises:
        ValueError: if the latency table is of other layers.
    """
    # Not above: a latency table prices configurations by what is in this file.
    from ..latency import LatencyTable

    layers = check_supernet("supernet", supernet)
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
            tuple({size: slope * size for size in sizes} for slope, sizes in slopes),
            macs(plain, input_size).total,
        )
    per_layer = tuple(
        {
            size: layer.width[0] * layer.in_channels
            + layer.width[1] * size * math.prod(layer.kernel_size)
            + layer.out_channels * layer.width[1]
            for size in layer.group_sizes
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
        costs["milliseconds"] = Cost(
            "milliseconds", latency.rest, tuple(latency.layers.values()), latency.dense
        )
    return costs


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
