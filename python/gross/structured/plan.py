"""Which layers of a network become structured, in which structure, and why the others do not."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gross_kernels import StructuredBasis, StructuredConv2d, StructuredConv3d, StructuredLinear
from gross_kernels.structured import check_structure

from ..arguments import check_int, check_number, check_type
from ..copying import closed_parts, plain_name, unwrapped
from ..decomposition.plan import (
    captured,
    check_names,
    holds_more,
    inside,
    overridden,
    skipped_by_default,
)

#: ``(c, n)`` of a convolution, c of a linear layer. c may be None for all channels, or a share of
#: them between 0 and 1.
Structure = tuple[int | float | None, int | Sequence[int]] | int | float
Structures = Structure | Mapping[str, Structure]

Layer = nn.Conv2d | nn.Conv3d | nn.Linear
STRUCTURED: dict[type[nn.Module], type[Any]] = {
    nn.Conv2d: StructuredConv2d,
    nn.Conv3d: StructuredConv3d,
    nn.Linear: StructuredLinear,
}
KINDS = tuple(STRUCTURED)


@dataclass(frozen=True, eq=False)
class Plan:
    """One layer to be structured.

    Attributes:
        name: qualified name, the first one of a layer that is registered more than once.
        module: the layer in the model.
        basis: of its kernels in their structure.
    """

    name: str
    module: Layer
    basis: StructuredBasis

    @property
    def kind(self) -> type[Any]:
        """The class of the layer in its place."""
        return next(to for kind, to in STRUCTURED.items() if isinstance(self.module, kind))


def structured_layers(model: nn.Module) -> dict[str, Any]:
    """The structured layers by qualified name, in network order."""
    return {
        plain_name(name): module
        for name, module in unwrapped(model).named_modules()
        if isinstance(module, tuple(STRUCTURED.values()))
    }


def make_plans(
    model: nn.Module,
    structures: Structures,
    skip: Collection[str] | None,
    order: Sequence[str] | None = None,
) -> tuple[list[Plan], dict[str, str]]:
    """The layers to be structured, in network order, and why the others are left alone.

    Args:
        order: names of layers in the order in which a forward pass calls them, if that is known.

    Raises:
        TypeError: for an argument of another type.
        ValueError: if there are none, or a named one cannot be structured as asked.
    """
    found: list[tuple[str, Layer]] = [
        (plain_name(name), module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear)
    ]
    names = [name for name, _ in found]
    named = structures if isinstance(structures, Mapping) else None
    if named is not None:
        check_names("structures", named, names, "convolutions or linear layers")
        if not named:
            raise ValueError("structures: got no names, accepted is at least one")
    else:
        _check_form(structures)
    skipped = _skipped(found, skip, named is not None, order)
    held = captured(model, KINDS)
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    asked = {module: named[name] for name, module in found if named and name in named}
    plans: list[Plan] = []
    left_alone = {plain_name(name): why for name, why in closed_parts(model).items()}
    seen: set[nn.Module] = set()
    for name, layer in found:
        if layer in seen:
            continue
        seen.add(layer)
        if named is not None and layer not in asked:
            left_alone[name] = "not named in structures"
            continue
        reason = skipped.get(layer) or _ineligible(layer) or held.get(layer)
        if reason is None and owners.get(id(layer._parameters.get("weight")), 0) > 1:
            reason = "its weight is shared with another layer"
        basis = None
        if reason is None:
            size = _size(layer)
            if named is not None:
                wanted = _resolved(f"structures[{name!r}]", asked[layer], size)
                basis = StructuredBasis(size, wanted)
            else:
                basis, reason = _fitting(structures, size)
        if basis is not None:
            plans.append(Plan(name, layer, basis))
        elif named is not None and layer not in skipped:
            raise ValueError(f"structures: {name!r} cannot be structured: {reason}")
        else:
            left_alone[name] = reason or ""
    if not plans:
        some = "; ".join(f"{name}: {reason}" for name, reason in list(left_alone.items())[:3])
        raise ValueError(
            f"model: got {type(model).__name__} with {len(left_alone)} layers, of which none can "
            f"be structured as {structures!r}; accepted are models with one that can. {some}"
        )
    return plans, left_alone


def _size(layer: Layer) -> tuple[int, ...]:
    """Of the layer's kernels."""
    if isinstance(layer, nn.Linear):
        return (int(layer.in_features),)
    return (int(layer.in_channels) // int(layer.groups), *map(int, layer.kernel_size))


def _channels(name: str, c: Any, channels: int) -> Any:
    """c channels of so many, where it is a share of them."""
    if not isinstance(c, float):
        return c
    accepted = "a share of the channels above 0 and of at most 1, or an int"
    share = check_number(name, c, accepted, open_below=True)
    if share > 1:
        raise ValueError(f"{name}: got {c}, accepted is {accepted}")
    return max(1, round(share * channels))


def _resolved(name: str, structure: Any, size: Sequence[int]) -> tuple[int, ...]:
    """What a layer was asked for by name, in numbers."""
    if len(size) == 1:
        return check_structure(name, _channels(name, structure, size[0]), size)
    if isinstance(structure, Sequence) and len(structure) == 2:
        structure = (_channels(name, structure[0], size[0]), structure[1])
    return check_structure(name, structure, size)


def _check_form(structure: Any) -> None:
    """That one structure for all layers is one of a convolution."""
    accepted = "(c, n), or a mapping from names of layers to structures"
    check_type("structures", structure, Sequence, accepted)
    if isinstance(structure, str) or len(structure) != 2:
        raise TypeError(f"structures: got {structure!r}, accepted is {accepted}")
    c, n = structure
    for each in n if isinstance(n, Sequence) else [n]:
        check_int("structures", each, least=1)
    if isinstance(c, float):
        _channels("structures", c, 1)
    elif c is not None:
        check_int("structures", c, least=1)


def _fitting(structure: Any, size: Sequence[int]) -> tuple[StructuredBasis | None, str | None]:
    """The basis of a layer for the structure that is asked of all, or why it has none."""
    if len(size) == 1:
        return None, "linear layers are structured by name"
    channels, *kernel = size
    c, n = structure
    c = _channels("structures", c, channels)
    shown = "×".join(map(str, kernel))
    if c is not None and c > channels:
        return None, f"its {channels} channels are fewer than c = {c}"
    small = [n] * len(kernel) if isinstance(n, int) else list(n)
    if len(small) != len(kernel) or any(a > b for a, b in zip(small, kernel, strict=True)):
        return None, f"its kernel of {shown} is smaller than n = {n}"
    basis = StructuredBasis(size, (channels if c is None else c, *small))
    if basis.coefficients == basis.size:
        return None, f"the structure is its whole kernel, {channels} channels of {shown}"
    return basis, None


def _skipped(
    found: Sequence[tuple[str, Layer]],
    skip: Collection[str] | None,
    named: bool,
    order: Sequence[str] | None,
) -> dict[nn.Module, str]:
    """The layers that shall stay: those of ``skip``, or by default the first convolution larger
    than 1×1."""
    if skip is None and not named:
        return skipped_by_default(
            [(n, m) for n, m in found if isinstance(m, nn.Conv2d | nn.Conv3d)], order
        )
    accepted = "a collection of names of layers, or of modules around them"
    skip = skip or ()
    if isinstance(skip, str):
        raise TypeError(f"skip: got the string {skip!r}, accepted is {accepted}")
    check_type("skip", skip, Collection, accepted)
    for each in skip:
        if not any(inside(name, each) for name, _ in found):
            raise ValueError(f"skip: got {each!r}, accepted is {accepted}")
    return {
        layer: "named in skip" for name, layer in found if any(inside(name, each) for each in skip)
    }


def _ineligible(layer: Layer) -> str | None:
    """Why a layer cannot be structured, whatever is asked for; None if it can."""
    base = next(kind for kind in KINDS if isinstance(layer, kind))
    reason = overridden(layer, base)
    if reason is not None:
        return reason
    if math.prod(_size(layer)) == 1:
        return "its kernel is a single number"
    like = STRUCTURED[base]
    made = like(1, 1, structure=1) if base is nn.Linear else like(1, 1, 1, structure=(1, 1))
    return holds_more(layer, frozenset((*vars(made), *dir(like))))
