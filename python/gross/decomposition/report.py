"""What a decomposition did: the layers that it made, and what it left alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..report import errors_in_short, short, size, text

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class DecomposedLayer:
    """What was done to one convolution.

    Attributes:
        name: qualified name, the first one of a convolution that is registered more than once.
        in_channels, out_channels, kernel_size, stride: the convolution's.
        width: channels of the bottleneck (in, out).
        group_sizes: those that the layer has, ascending.
        errors: ‖X − X̂‖/‖X‖ of the kernel X at each group size; None if nothing was fitted.
        seconds: how long the fit took.
        parameters_before: of the convolution.
        parameters: of the bottleneck at each group size, once it is exported.
        macs_before, macs: multiply–accumulates, likewise, over all calls; None if neither an input
            size nor an example was given.
        response_errors: ‖y − ŷ‖/‖y‖ on the calibration data at each group size, y the
            convolution's output in the dense network, ŷ the layer's in the supernet, all of it at
            this group size; None without calibration, or if no input reaches the layer.
    """

    name: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    width: tuple[int, int]
    group_sizes: tuple[int, ...]
    errors: tuple[float, ...] | None
    seconds: float
    parameters_before: int
    parameters: tuple[int, ...]
    macs_before: int | None
    macs: tuple[int, ...] | None
    response_errors: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Decomposition:
    """What :func:`decompose` did. Printable: a table of the layers, and the convolutions left alone
    with the reasons.

    Attributes:
        method: "als" or "random"; both where the network was decomposed in two turns.
        layers: the decomposed layers, in network order.
        left_alone: why a convolution was not decomposed, by qualified name.
        parameters_before, parameters: of the whole network; of the supernet, with the terms of all
            group sizes.
    """

    method: str
    layers: tuple[DecomposedLayer, ...]
    left_alone: dict[str, str]
    parameters_before: int
    parameters: int

    def __rich__(self) -> Group:
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table

        title = f"{len(self.layers)} convolutions decomposed, method {self.method!r}"
        table = Table(box=SIMPLE_HEAD, title=title, padding=(0, 1, 0, 0), pad_edge=False)
        for heading in ("layer", "convolution", "width"):
            table.add_column(heading, no_wrap=True)
        calibrated = any(layer.response_errors for layer in self.layers)
        responses = ("response error",) if calibrated else ()
        for heading in ("group sizes", "weight error", *responses):
            table.add_column(heading)
        for heading in ("seconds", "parameters", "MACs"):
            table.add_column(heading, no_wrap=True, justify="right")
        for layer in self.layers:
            table.add_row(
                layer.name or "(the model)",
                f"{layer.in_channels}→{layer.out_channels} {size(layer.kernel_size)}"
                + ("" if layer.stride == (1, 1) else f" /{size(dict.fromkeys(layer.stride))}"),
                "→".join(map(str, dict.fromkeys(layer.width))),
                " ".join(map(str, layer.group_sizes)),
                errors_in_short(layer.errors),
                *([errors_in_short(layer.response_errors)] if calibrated else ()),
                f"{layer.seconds:.1f}",
                _change(layer.parameters_before, layer.parameters),
                _change(layer.macs_before, layer.macs),
            )
        totals = (
            f"{short(self.parameters_before)} parameters before, {short(self.parameters)} in the "
            "supernet"
        )
        alone = [
            f"left alone, {reason}: {', '.join(names)}"
            for reason, names in names_by_reason(self.left_alone).items()
        ]
        return Group(table, totals, *alone)

    def __str__(self) -> str:
        return text(self)


def names_by_reason(left_alone: Mapping[str, str]) -> dict[str, list[str]]:
    """The convolutions that were left alone, those of one reason together."""
    names: dict[str, list[str]] = {}
    for name, reason in left_alone.items():
        names.setdefault(reason, []).append(name or "(the model)")
    return names


def _change(before: int | None, after: Sequence[int] | None) -> str:
    if before is None or after is None:
        return ""
    return f"{short(before)}→" + "–".join(dict.fromkeys((short(after[0]), short(after[-1]))))
