"""What a conversion to structured layers did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..decomposition.report import names_by_reason
from ..report import errors_in_short, short, size, text

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class StructuredLayer:
    """What was done to one layer.

    Attributes:
        name: qualified name, the first one of a layer that is registered more than once.
        kind: the class of the layer that it was.
        in_channels, out_channels, groups: its own.
        kernel: size of its kernels, ``(C, N, …)``.
        structure: ``(c, n, …)``.
        residual: ``‖(I − A A⁺)W‖_F/‖W‖_F`` of its weight W; None on the meta device, which has no
            values.
        parameters_before, parameters: of both layers.
        multiplications_before, multiplications, additions_before, additions: of both, over all
            calls; None if neither an input size nor an example was given.
    """

    name: str
    kind: str
    in_channels: int
    out_channels: int
    groups: int
    kernel: tuple[int, ...]
    structure: tuple[int, ...]
    residual: float | None
    parameters_before: int
    parameters: int
    multiplications_before: int | None = None
    multiplications: int | None = None
    additions_before: int | None = None
    additions: int | None = None


@dataclass(frozen=True)
class StructuredDecomposition:
    """What :func:`gross.structured.decompose` did. Printable: a table of the layers, and those left
    alone with the reasons.

    Attributes:
        layers: the structured layers, in network order.
        left_alone: why a layer was not structured, by qualified name.
        parameters_before, parameters: of the whole network.
        macs_before, macs: multiply–accumulates of the whole network, as :func:`gross.macs` counts
            them; None if neither an input size nor an example was given.
    """

    layers: tuple[StructuredLayer, ...]
    left_alone: dict[str, str]
    parameters_before: int
    parameters: int
    macs_before: int | None = None
    macs: int | None = None

    def __rich__(self) -> Group:
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table

        title = f"{len(self.layers)} layers structured"
        table = Table(box=SIMPLE_HEAD, title=title, padding=(0, 1, 0, 0), pad_edge=False)
        for heading in ("layer", "was", "structure", "residual"):
            table.add_column(heading, no_wrap=True)
        for heading in ("parameters", "multiplications", "additions"):
            table.add_column(heading, no_wrap=True, justify="right")
        for layer in self.layers:
            kernel = size(layer.kernel[1:])
            grouped = f" in {layer.groups} groups" if layer.groups > 1 else ""
            table.add_row(
                layer.name or "(the model)",
                f"{layer.in_channels}→{layer.out_channels} {kernel}{grouped}".rstrip(),
                size(layer.structure),
                errors_in_short(None if layer.residual is None else [layer.residual]),
                _change(layer.parameters_before, layer.parameters),
                _change(layer.multiplications_before, layer.multiplications),
                _change(layer.additions_before, layer.additions),
            )
        totals = f"the network: {_change(self.parameters_before, self.parameters)} parameters"
        if self.macs is not None:
            totals += f", {_change(self.macs_before, self.macs)} MACs"
        alone = [
            f"left alone, {reason}: {', '.join(names)}"
            for reason, names in names_by_reason(self.left_alone).items()
        ]
        return Group(table, totals, *alone)

    def __str__(self) -> str:
        return text(self)


def _change(before: int | None, after: int | None) -> str:
    return "" if before is None or after is None else f"{short(before)}→{short(after)}"
