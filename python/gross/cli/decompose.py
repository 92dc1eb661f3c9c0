"""``gross decompose``, ``gross macs`` and ``gross info``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from gross_kernels.geometry import pair

from .. import networks, storage, structured
from ..decomposition.convert import Method, decompose
from ..macs import macs
from ..report import errors_in_short, short, size
from ..supernet import decomposed_layers
from .app import (
    CALLABLE,
    NAMES,
    CalibrationImages,
    GroupSizes,
    InputSize,
    Ints,
    Json,
    Root,
    StructureOption,
    app,
    build,
    device_named,
    failures,
    show,
)
from .app import target as target_network


@app.command("decompose")
def decompose_command(
    network: Annotated[
        str, typer.Argument(metavar="NETWORK", help=f"{NAMES}; or {CALLABLE}.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The .safetensors file to write.", show_default=False),
    ],
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            "-w",
            help="Trained weights, a .pth or .safetensors file. By default those that the network "
            "is made with: fresh ones for the paper's networks, good for a trial.",
            show_default=False,
        ),
    ] = None,
    num_classes: Annotated[
        int | None,
        typer.Option(
            help="Outputs of the classifier, for the paper's networks.", show_default=False
        ),
    ] = None,
    group_sizes: GroupSizes = None,
    width: Annotated[
        Ints | None,
        typer.Option(
            parser=Ints.parse,
            metavar="W or IN,OUT",
            help="Channels of the bottlenecks. By default a convolution's input or output "
            "channels, whichever are fewer; vgg16-narrow has its own.",
            show_default=False,
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            help="A convolution to leave alone, or a module around several; repeatable. Replaces "
            "the default, which is the first convolution.",
            show_default=False,
        ),
    ] = None,
    keep_costlier: Annotated[
        bool,
        typer.Option(
            "--keep-costlier", help="Keep group sizes that cost more MACs than the convolution."
        ),
    ] = False,
    method: Annotated[
        Method, typer.Option(help="als fits the weights, random makes the structure alone.")
    ] = "als",
    sweeps: Annotated[
        int, typer.Option(min=1, help="At most so many for each layer and group size.")
    ] = 50,
    tolerance: Annotated[
        float, typer.Option(help="Stop when a sweep lowers the relative error by less.")
    ] = 1e-5,
    seed: Annotated[int, typer.Option(help="Of the fit, and of fresh weights.")] = 0,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Layers that are fitted at a time. By default one a core; the result is the same.",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        CalibrationImages | None,
        typer.Option(
            parser=CalibrationImages.parse,
            metavar="DATA[:COUNT]",
            help="Fit what the network gives for COUNT training images (256) instead of the "
            "weights alone: digits, cifar10 or folder:PATH, as gross train takes them.",
            show_default=False,
        ),
    ] = None,
    structure: StructureOption = None,
    root: Root = None,
    device: Annotated[str, typer.Option(help="Where the fit runs: cpu, cuda, cuda:1.")] = "cpu",
    input_size: InputSize = None,
    as_json: Json = False,
) -> None:
    """Decompose the convolutions of NETWORK at every group size, and save the supernet; or with
    --structure make them structured, sum-pooling and a smaller convolution.

    Example: gross decompose vgg16 --weights vgg16-397923af.pth --output supernet.safetensors
    """
    place = device_named(device)
    if not output.parent.is_dir():
        raise typer.BadParameter(
            f"got {output}, accepted is a file in a folder that exists", param_hint="--output"
        )
    with failures():
        torch.manual_seed(seed)
        known = networks.NETWORKS.get(network)
        dense = network if known is None else known.dense or network
        shape = input_size or (known.input_size if known else None)
        if structure is not None and (group_sizes or width or calibration):
            raise typer.BadParameter(
                "got one beside --group-sizes, --width or --calibration, accepted is one of both",
                param_hint="--structure",
            )
        model = build(dense, num_classes, weights).to(place)
        supernet = (
            structured.decompose(model, structure, skip=skip, input_size=shape, quiet=as_json)
            if structure is not None
            else decompose(
                model,
                group_sizes or _group_sizes(network),
                width=pair("width", width)
                if width
                else known.structure["width"]
                if known
                else None,
                skip=skip,
                keep_costlier=keep_costlier,
                method=method,
                sweeps=sweeps,
                tolerance=tolerance,
                seed=seed,
                workers=workers,
                input_size=shape,
                calibration=None if calibration is None else calibration.inputs(root, shape, seed),
                quiet=as_json,
            )
        )
        origin = {
            "network": network,
            "weights": None if weights is None else weights.name,
            "seed": seed,
        }
        if calibration is not None:
            origin["calibration"] = f"{calibration.data}:{calibration.count}"
        storage.save(supernet, output, provenance=origin)
        show(
            as_json, {"output": str(output), **asdict(storage.describe(output))}, f"saved {output}"
        )


@app.command("macs")
def macs_command(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help=f"A supernet that gross saved; or {NAMES}; or {CALLABLE}.",
            show_default=False,
        ),
    ],
    configuration: Annotated[
        Ints | None,
        typer.Option(
            parser=Ints.parse,
            metavar="S,S,...",
            help="One group size per decomposed layer, in network order, or one for all of them. "
            "By default a supernet's own; other networks are then counted as they are.",
            show_default=False,
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="What a saved supernet was made of, where that is none of the networks above. By "
            "default the function that the file names, which is imported and called.",
            show_default=False,
        ),
    ] = None,
    group_sizes: GroupSizes = None,
    input_size: InputSize = None,
    as_json: Json = False,
) -> None:
    """Count the multiply-accumulates of TARGET for one input, layer by layer, in any configuration.

    Example: gross macs vgg16 --configuration 1,32,32,32,16,1,32,16,32,4,32,16
    """
    with failures():
        model, known_size = target_network(target, network)
        counted_size = input_size or known_size
        if counted_size is None:
            raise typer.BadParameter(
                "needed, it is not known for this network", param_hint="--input-size"
            )
        if configuration and not decomposed_layers(model):
            model = decompose(
                model, group_sizes or _group_sizes(target), method="random", quiet=True
            )
        chosen = configuration[0] if configuration and len(configuration) == 1 else configuration
        report = macs(model, counted_size, chosen)
        content = {
            "input_size": report.input_size,
            "configuration": report.configuration,
            "total": report.total,
            "grouped": report.grouped,
            "layers": [
                {**asdict(layer), "grouped": layer.grouped, "total": layer.total}
                for layer in report.layers
            ],
        }
        show(as_json, content, report)


@app.command()
def info(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="A supernet that gross saved.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a saved supernet is and where it is from. Without FILE, list the networks that gross
    knows."""
    with failures():
        if file is None:
            rows = [_known_network(name) for name in networks.NETWORKS]
            table = Table(*(key.replace("_", " ") for key in rows[0]), box=SIMPLE_HEAD)
            for row in rows:
                table.add_row(*(_cell(value) for value in row.values()))
            show(as_json, {"networks": rows}, table)
        else:
            description = storage.describe(file)
            show(as_json, asdict(description), _saved_supernet(description))


def _group_sizes(network: str) -> Sequence[int] | Mapping[str, Sequence[int]]:
    known = networks.NETWORKS.get(network)
    return networks.FOUR_SIZES if known is None else known.structure["group_sizes"]


def _known_network(name: str) -> dict[str, Any]:
    network = networks.NETWORKS[name]
    sizes = network.structure["group_sizes"].values()
    with torch.device("meta"):
        model = networks.build(network.dense or name)
    return {
        "network": name,
        "input_size": network.input_size,
        "num_classes": network.num_classes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": macs(model, network.input_size).total,
        "decomposed_layers": len(sizes),
        "configurations": math.prod(map(len, sizes)),
    }


def _cell(value: object) -> str:
    if isinstance(value, tuple):
        return size(value)
    return short(value) if isinstance(value, int) and value > 9999 else str(value)


def _saved_supernet(description: storage.Description) -> Group:
    """What ``gross info`` shows of a file."""
    name = (
        "a network that gross does not know"
        if description.network is None
        else description.network[0]
    )
    report = description.decomposition
    errors = (
        {}
        if report is None
        else {layer.name: errors_in_short(layer.errors) for layer in report.layers}
    )
    headings = ("layer", "convolution", "width", "group sizes", "active", "relative error")
    layers = Table(*headings, title=f"supernet of {name}", box=SIMPLE_HEAD)
    for (layer, structure), active in zip(
        description.layers.items(), description.configuration, strict=True
    ):
        layers.add_row(
            layer,
            f"{structure['in_channels']}→{structure['out_channels']} "
            f"{size(structure['kernel_size'])}",
            "→".join(map(str, dict.fromkeys(structure["width"]))),
            " ".join(map(str, structure["group_sizes"])),
            str(active),
            errors.get(layer, ""),
        )
    small = Table("layer", "structure", title="structured layers", box=SIMPLE_HEAD)
    for layer, coefficients in description.structured.items():
        small.add_row(layer, size(coefficients))
    origin = Table("provenance", "", box=SIMPLE_HEAD)
    for key, value in description.provenance.items():
        origin.add_row(key, str(value))
    shown = [table for table in (layers, small) if table.row_count]
    return Group(*shown, origin)
