"""Structural regularisation: a loss that draws weights towards structured kernels, so that the
network can be decomposed after its training with little loss."""

from __future__ import annotations

from collections.abc import Collection
from functools import reduce
from operator import add

from torch import Tensor, nn

from ..arguments import check_module, check_number
from ..copying import unwrapped
from .plan import Plan, Structures, make_plans


class Regularizer:
    """``λ Σ ‖(I − A A⁺)W‖_F/‖W‖_F`` over layers, anew at each call: ``loss + penalty()``.

    Made by :func:`regularizer`. Computed in float32 at least, axis by axis (see
    :mod:`gross_kernels.composite`), with nothing larger than the weights.

    Attributes:
        weight: λ.
        left_alone: the layers that it leaves free, by qualified name, with the reason.
    """

    def __init__(self, plans: list[Plan], weight: float, left_alone: dict[str, str]) -> None:
        self._plans = plans
        self.weight = weight
        self.left_alone = left_alone

    def __call__(self) -> Tensor:
        """The scalar, differentiable with respect to the layers' weights."""
        terms = [plan.basis.residual(plan.module.weight) for plan in self._plans]
        return self.weight * reduce(add, [term.to(terms[0].device) for term in terms])

    def residuals(self) -> dict[str, float]:
        """``‖(I − A A⁺)W‖_F/‖W‖_F`` of each layer, by qualified name: what is lost if it is
        decomposed now."""
        return {
            plan.name: float(plan.basis.residual(plan.module.weight.detach()))
            for plan in self._plans
        }

    def __repr__(self) -> str:
        structures = {plan.name: plan.basis.coefficients for plan in self._plans}
        return f"{type(self).__name__}(weight={self.weight}, structures={structures})"


def regularizer(
    model: nn.Module,
    structures: Structures,
    *,
    weight: float = 1.0,
    skip: Collection[str] | None = None,
) -> Regularizer:
    """The structural regularisation of a network, for any training loop::

        penalty = gross.structured.regularizer(model, (None, 2), weight=0.1)
        loss = criterion(model(images), labels) + penalty()

    Args:
        model: the network that is trained, inside ``torch.compile`` or
            ``DistributedDataParallel`` or not.
        structures, skip: as :func:`gross.structured.decompose` takes them: the same layers.
        weight: λ.

    Raises:
        TypeError: for an argument of another type.
        ValueError: if no layer can be structured, or a named one cannot as asked.
    """
    model = unwrapped(check_module("model", model))
    number = check_number("weight", weight, "a finite number of at least 0")
    plans, left_alone = make_plans(model, structures, skip)
    return Regularizer(plans, number, left_alone)
