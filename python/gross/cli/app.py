"""The ``gross`` command: what its subcommands share.

Results go to the output stream, as text or with ``--json`` as one JSON object; progress and errors
go to the error stream."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

from .. import data as data_sets
from .. import networks, storage
from .. import weights as weight_files
from ..report import TEXT_WIDTH, error_console

app = typer.Typer(
    help="Decompose a network into every grouped-convolution architecture at once, and see what "
    "each of them costs.",
    epilog="Exit status: 0 done; 1 the work failed, the reason is on the error stream; 2 the "
    "command line is wrong.",
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


class Structure(tuple[int | float | None, int]):
    """A structure of convolutions as an argument of the command line: channels, "all" of them or a
    share such as 0.5, and side of the kernel."""

    @classmethod
    def parse(cls, text: str) -> Structure:
        channels, _, side = text.partition(",")
        try:
            if channels == "all":
                return cls((None, int(side)))
            return cls((float(channels) if "." in channels else int(channels), int(side)))
        except ValueError as error:
            raise typer.BadParameter(
                f"got {text!r}, accepted is C,N, such as all,2 or 0.5,2 or 64,2"
            ) from error


@dataclass(frozen=True)
class CalibrationImages:
    """So many training images of a data set, ``DATA[:COUNT]`` on the command line."""

    data: str
    count: int = 256

    @classmethod
    def parse(cls, text: str) -> CalibrationImages:
        data, colon, count = text.rpartition(":")
        # folder:PATH has a colon of its own.
        if not colon or not count.lstrip("-").isdigit():
            return cls(text)
        if int(count) < 1:
            raise typer.BadParameter(f"got {text!r}, accepted is a COUNT of at least 1")
        return cls(data, int(count))

    def inputs(self, root: Path | None, shape: tuple[int, ...] | None, seed: int) -> torch.Tensor:
        """Images as training draws and augments them, ``[COUNT, C, H, W]``."""
        side = shape[-1] if shape and self.data.startswith("folder:") else None
        images = data_sets.load(self.data, root=root, size=side).train
        # Few at a time: loaders of files read ahead by some batches. They are whole.
        size = min(self.count, 32)
        most = len(images) // size * size
        if self.count > most:
            raise ValueError(
                f"calibration: got {self.count} images of {self.data!r}, accepted are at most "
                f"{most or len(images)}"
            )
        batches = images.epoch(size, seed=seed, epoch=0)
        some = [inputs for inputs, _ in islice(batches, -(-self.count // size))]
        return torch.cat(some)[: self.count]


NAMES = ", ".join(networks.NETWORKS)
#: A network that the commands take as it is written here.
EXAMPLE = "torchvision.models:squeezenet1_1"
CALLABLE = f"module:function, a function without arguments that returns a model, such as {EXAMPLE}"
GroupSizes = Annotated[
    Ints | None,
    typer.Option(
        parser=Ints.parse,
        metavar="S,S,...",
        help="Each layer takes those that fit and cost fewer MACs than its convolution. By default "
        "the paper's for its networks, 1,4,16,32 for others.",
        show_default=False,
    ),
]
StructureOption = Annotated[
    Structure | None,
    typer.Option(
        "--structure",
        parser=Structure.parse,
        metavar="C,N",
        help="Structured convolutions: C channels, all of them or a share such as 0.5, and kernels "
        "of N; of every convolution that is as large, but the first.",
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
Root = Annotated[
    Path | None, typer.Option(help="Where cifar10 lies. [default: data]", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


@contextmanager
def failures() -> Iterator[None]:
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


def show(as_json: bool, content: dict[str, Any], renderable: object) -> None:
    if as_json:
        typer.echo(json.dumps(content))
    else:
        console = Console(width=None if sys.stdout.isatty() else TEXT_WIDTH)
        # Brackets in a text are no markup: a report's pictures have them.
        console.print(renderable, markup=False)


def check_output(option: str, path: Path | None) -> None:
    """Refuse a file whose folder does not exist, before any work."""
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(
            f"got {path}, accepted is a file in a folder that exists", param_hint=option
        )


def device_named(name: str) -> torch.device:
    """The device that ``--device`` names."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise typer.BadParameter(
            f"got {name!r}, accepted are cpu, cuda, cuda:1 and the like", param_hint="--device"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(
            f"got {name!r}, and no CUDA device is available", param_hint="--device"
        )
    return device


def build(network: str, num_classes: int | None, weights: Path | None) -> nn.Module:
    """One of the paper's networks, or the model that module:function makes."""
    if network in networks.NETWORKS:
        return networks.build(network, num_classes=num_classes, weights=weights)
    make = named(network, "NETWORK", f"{NAMES} and {CALLABLE}")
    model = make()
    if not isinstance(model, nn.Module):
        raise typer.BadParameter(
            f"got {network!r}, which returns {type(model).__name__}", param_hint="NETWORK"
        )
    if weights is not None:
        weight_files.load(model, weight_files.read(weights), weights)
    return model


def named(text: str, option: str, accepted: str) -> Callable[..., Any]:
    """The function that ``module:function`` names."""
    module_name, _, name = text.partition(":")
    if not name:
        raise typer.BadParameter(f"got {text!r}, accepted are {accepted}", param_hint=option)
    # An installed command does not look for modules where it is called, as python does.
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise typer.BadParameter(f"got {text!r}: {error}", param_hint=option) from error
    if not callable(function):
        raise typer.BadParameter(
            f"got {text!r}, which is {type(function).__name__} and cannot be called",
            param_hint=option,
        )
    return function


def target(target: str, network: str | None = None) -> tuple[nn.Module, tuple[int, ...] | None]:
    """The network that ``target`` names, and the size of its input if that is known.

    A saved supernet is put into what ``network`` names, or else what the file says that it was made
    of."""
    if Path(target).is_file():
        description = storage.describe(target)
        if description.network is not None:
            return storage.load(target), networks.input_size(description.network[0])
        origin = network or description.provenance.get("network")
        if isinstance(origin, str) and ":" in origin:
            return storage.load(target, build(origin, None, None)), None
        return storage.load(target), None
    if target in networks.NETWORKS:
        with torch.device("meta"):
            return networks.build(target), networks.input_size(target)
    return build(target, None, None), None
