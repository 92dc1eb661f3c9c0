"""The ``gross`` command: decompose a network, count its multiply-accumulates, look at what was
saved.

Results go to the output stream, as text or with ``--json`` as one JSON object; progress and errors
go to the error stream."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from gross_kernels.functional import pair

from . import networks, storage
from . import weights as weight_files
from .decompose.convert import Method, decompose
from .extras import from_extra
from .macs import macs
from .report import TEXT_WIDTH, error_console, errors_in_short, short, size
from .supernet import decomposed_layers

with from_extra():
    import typer
    from rich.box import SIMPLE_HEAD
    from rich.console import Console, Group
    from rich.table import Table

app = typer.Typer(
    help="Decompose a network into every grouped-convolution architecture at once, and see what each of them costs.",
    epilog="Exit status: 0 done; 1 the work failed, the reason is on the error stream; 2 the command line is wrong.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Ints(tuple[int, ...]):
    """Ints with commas between them, as an argument of the command line."""

    @classmethod
    def parse(cls, text: str) -> Ints:
        try:
            return cls(int(part) for part in text.split(","))
        except ValueError as error:
            raise typer.BadParameter(
                f"got {text!r}, accepted are ints with commas between them"
            ) from error


NAMES = ", ".join(networks.NETWORKS)
CALLABLE = "module:function, a function without arguments that returns a model, such as torchvision.models:mobilenet_v2"
GroupSizes = Annotated[
    Ints | None,
    typer.Option(
        parser=Ints.parse,
        metavar="S,S,...",
        help="Each layer takes those that fit. By default the paper's for its networks, 1,4,16,32 for others.",
        show_default=False,
    ),
]
InputSize = Annotated[
    Ints | None,
    typer.Option(
        parser=Ints.parse,
        metavar="C,H,W",
        help="Shape of one input, such as 3,224,224; known for the paper's networks.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


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
            help="Trained weights, a .pth or .safetensors file. By default those that the network is made with: fresh "
            "ones for the paper's networks, good for a trial.",
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
            help="Channels of the bottlenecks. By default a convolution's input channels; vgg16-narrow has its own.",
            show_default=False,
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            help="A convolution to leave alone, or a module around several; repeatable. Replaces the default, which is "
            "the first convolution.",
            show_default=False,
        ),
    ] = None,
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
    device: Annotated[str, typer.Option(help="Where the fit runs: cpu, cuda, cuda:1.")] = "cpu",
    input_size: InputSize = None,
    as_json: Json = False,
) -> None:
    """Decompose the convolutions of NETWORK at every group size, and save the supernet.

    Example: gross decompose vgg16 --weights vgg16-397923af.pth --output supernet.safetensors
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(
            f"got {device!r}, and no CUDA device is available", param_hint="--device"
        )
    if not output.parent.is_dir():
        raise typer.BadParameter(
            f"got {output}, accepted is a file in a folder that exists", param_hint="--output"
        )
    with _failures():
        torch.manual_seed(seed)
        known = networks.NETWORKS.get(network)
        dense = network if known is None else known.dense or network
        supernet = decompose(
            _build(dense, num_classes, weights).to(device),
            group_sizes or _group_sizes(network),
            width=pair("width", width) if width else known.structure["width"] if known else None,
            skip=skip,
            method=method,
            sweeps=sweeps,
            tolerance=tolerance,
            seed=seed,
            input_size=input_size or (known.input_size if known else None),
            quiet=as_json,
        )
        origin = {
            "network": network,
            "weights": None if weights is None else weights.name,
            "seed": seed,
        }
        storage.save(supernet, output, provenance=origin)
        _print(
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
            help="One group size per decomposed layer, in network order. By default a supernet's own; other networks "
            "are then counted as they are.",
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
    with _failures():
        model, known_size = _target(target)
        counted_size = input_size or known_size
        if counted_size is None:
            raise typer.BadParameter(
                "needed, it is not known for this network", param_hint="--input-size"
            )
        if configuration and not decomposed_layers(model):
            model = decompose(
                model, group_sizes or _group_sizes(target), method="random", quiet=True
            )
        report = macs(model, counted_size, configuration)
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
        _print(as_json, content, report)


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
    with _failures():
        if file is None:
            rows = [_known_network(name) for name in networks.NETWORKS]
            table = Table(*(key.replace("_", " ") for key in rows[0]), box=SIMPLE_HEAD)
            for row in rows:
                table.add_row(*(_cell(value) for value in row.values()))
            _print(as_json, {"networks": rows}, table)
        else:
            description = storage.describe(file)
            _print(as_json, asdict(description), _saved_supernet(description))


@contextmanager
def _failures() -> Iterator[None]:
    """Turn what bad input raises into one line on the error stream and exit status 1."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        lines = [str(error), *getattr(error, "__notes__", ())]
        message = "error: " + "\n".join(lines)
        error_console().print(
            message, style="bold red", markup=False, highlight=False, soft_wrap=True
        )
        raise typer.Exit(1) from error


def _print(as_json: bool, content: dict[str, Any], renderable: object) -> None:
    if as_json:
        typer.echo(json.dumps(content))
    else:
        Console(width=None if sys.stdout.isatty() else TEXT_WIDTH).print(renderable)


def _build(network: str, num_classes: int | None, weights: Path | None) -> nn.Module:
    """One of the paper's networks, or the model that module:function makes."""
    if network in networks.NETWORKS:
        return networks.build(network, num_classes=num_classes, weights=weights)
    module_name, _, function = network.partition(":")
    if not function:
        raise typer.BadParameter(
            f"got {network!r}, accepted are {NAMES} and {CALLABLE}", param_hint="NETWORK"
        )
    # An installed command does not look for modules where it is called, as python does.
    sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise typer.BadParameter(f"got {network!r}: {error}", param_hint="NETWORK") from error
    model = make()
    if not isinstance(model, nn.Module):
        raise typer.BadParameter(
            f"got {network!r}, which returns {type(model).__name__}", param_hint="NETWORK"
        )
    if weights is not None:
        weight_files.load(model, weight_files.read(weights), weights)
    return model


def _target(target: str) -> tuple[nn.Module, tuple[int, ...] | None]:
    """The network that ``target`` names, and the size of its input if that is known."""
    if Path(target).is_file():
        saved_as = storage.describe(target).network
        return storage.load(target), None if saved_as is None else networks.input_size(saved_as[0])
    if target in networks.NETWORKS:
        with torch.device("meta"):
            return networks.build(target), networks.input_size(target)
    return _build(target, None, None), None


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
            f"{structure['in_channels']}→{structure['out_channels']} {size(structure['kernel_size'])}",
            "→".join(map(str, dict.fromkeys(structure["width"]))),
            " ".join(map(str, structure["group_sizes"])),
            str(active),
            errors.get(layer, ""),
        )
    origin = Table("provenance", "", box=SIMPLE_HEAD)
    for key, value in description.provenance.items():
        origin.add_row(key, str(value))
    return Group(layers, origin)
