"""``gross train`` and ``gross finetune``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from .. import data as data_sets
from .. import networks, storage, structured
from .. import weights as weight_files
from ..supernet import decomposed_layers
from ..training import History, Interrupted, Recipe, distributed, finetune, train
from ..training.memory import keep_freed_memory
from ..training.recipes import NAMES as RECIPES
from ..training.recipes import parse
from .app import (
    CALLABLE,
    NAMES,
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

Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="The run's directory: metrics, checkpoints and the result.",
        show_default=False,
    ),
]
DataName = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DATA",
        help="digits (scikit-learn's), cifar10 (torchvision's copy in --root), or folder:PATH with "
        "train/ and val/ or test/, each with one folder of images a class.",
    ),
]
Download = Annotated[bool, typer.Option("--download", help="Fetch cifar10 if it is not there.")]
Size = Annotated[
    int | None,
    typer.Option(
        help="Side of an input, for folder:PATH. [default: the images', or 224]",
        show_default=False,
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="RECIPE",
        help=f"A .toml file, or one of {', '.join(RECIPES)}.",
        show_default=False,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Another value for the recipe, such as epochs=3 or optimizer.lr=0.02; repeatable.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(help="Of fresh weights, data order, augmentation, dropout.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in --output, if there is one.")
]
Device = Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1.")]
Precision = Annotated[
    str | None,
    typer.Option(help="float32 or bfloat16. [default: the recipe's]", show_default=False),
]
Compile = Annotated[bool, typer.Option("--compile", help="Run through torch.compile.")]
Configuration = Annotated[
    Ints | None,
    typer.Option(
        parser=Ints.parse,
        metavar="S,S,...",
        help="Train this configuration alone: one group size per decomposed layer, or one for all.",
        show_default=False,
    ),
]


@app.command("train")
def train_command(
    network: Annotated[
        str,
        typer.Argument(
            metavar="NETWORK",
            help=f"{NAMES}; or {CALLABLE}; or a file of gross decompose --structure.",
            show_default=False,
        ),
    ],
    output: Output,
    data: DataName = "digits",
    recipe: RecipeName = None,
    overrides: Set = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            "-w",
            help="Begin with these, a .pth or .safetensors file. By default with fresh ones.",
            show_default=False,
        ),
    ] = None,
    structure: StructureOption = None,
    structural_weight: Annotated[
        float,
        typer.Option(
            min=0,
            help="λ of the structural regularisation, which draws kernels towards --structure; 0.1 "
            "to 1.",
        ),
    ] = 0.0,
    seed: Seed = 0,
    resume: Resume = False,
    device: Device = "cpu",
    precision: Precision = None,
    compile: Compile = False,
    root: Root = None,
    download: Download = False,
    size: Size = None,
    as_json: Json = False,
) -> None:
    """Train an ordinary NETWORK, or a structured one, and save its weights in
    DIR/model.safetensors.

    Example: gross train 4-layer --data digits --output runs/full
    """
    with _session(device) as place:
        chosen = _recipe(recipe or "train", overrides, precision, compile)
        images = data_sets.load(data, root=root, size=size, download=download)
        torch.manual_seed(seed)
        classes = len(images.classes) if network in networks.NETWORKS else None
        saved_before = Path(network).is_file()
        model = _structured(network) if saved_before else build(network, classes, weights)
        model = model.to(place)
        penalty = None
        if (structure is None) != (structural_weight == 0):
            raise typer.BadParameter(
                "got one of --structure and --structural-weight, accepted are both or neither",
                param_hint="--structural-weight",
            )
        if structure is not None:
            penalty = structured.regularizer(model, structure, weight=structural_weight)
        history = train(
            model,
            images,
            chosen,
            regularizer=penalty,
            directory=output,
            resume=resume,
            seed=seed,
            quiet=as_json,
        )
        saved = output / "model.safetensors"
        if distributed.shard().index == 0:
            if saved_before:
                origin = storage.describe(network).provenance
                storage.save(model, saved, provenance={**origin, "run": str(output), "data": data})
            else:
                weight_files.write_safetensors(saved, model.state_dict(), {})
            _show(as_json, saved, history)


@app.command("finetune")
def finetune_command(
    supernet: Annotated[
        Path, typer.Argument(metavar="SUPERNET", help="What gross decompose saved.")
    ],
    output: Output,
    data: DataName = "digits",
    recipe: RecipeName = None,
    overrides: Set = None,
    configuration: Configuration = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            metavar="WEIGHTS",
            help="Trained weights of the network before its decomposition: train towards its "
            "answers instead of the labels. Recipes of response reconstruction need them.",
            show_default=False,
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            help=f"What was decomposed, if not one of {NAMES}: {CALLABLE}.", show_default=False
        ),
    ] = None,
    seed: Seed = 0,
    resume: Resume = False,
    device: Device = "cpu",
    precision: Precision = None,
    compile: Compile = False,
    root: Root = None,
    download: Download = False,
    size: Size = None,
    as_json: Json = False,
) -> None:
    """Train every configuration of SUPERNET together, or one of them alone, and save the result in
    DIR/supernet.safetensors.

    Example: gross finetune supernet.safetensors --recipe 4-layer-gross --data cifar10 -o runs/gross
    """
    with _session(device) as place:
        chosen = _recipe(recipe or "finetune", overrides, precision, compile)
        images = data_sets.load(data, root=root, size=size, download=download)
        original = None if network is None else build(network, None, None)
        model = storage.load(supernet, original).to(place)
        history = finetune(
            model,
            images,
            chosen,
            configuration=configuration[0]
            if configuration and len(configuration) == 1
            else configuration,
            teacher=None if teacher is None else _teacher(supernet, teacher, network).to(place),
            directory=output,
            resume=resume,
            seed=seed,
            quiet=as_json,
        )
        saved = output / "supernet.safetensors"
        if distributed.shard().index == 0:
            origin = storage.describe(supernet).provenance
            storage.save(model, saved, provenance={**origin, "run": str(output), "data": data})
            _show(as_json, saved, history)


def _structured(file: str) -> nn.Module:
    """A saved network that trains as an ordinary one does."""
    model = storage.load(file)
    if decomposed_layers(model):
        raise typer.BadParameter(
            f"got {file}, a supernet, accepted are structured networks: see gross finetune",
            param_hint="NETWORK",
        )
    return model


@contextmanager
def _session(device: str) -> Iterator[torch.device]:
    """The device, or this process's of those that torchrun started; failures in one line, and after
    Ctrl-C the command that goes on."""
    asked = device_named(device)
    keep_freed_memory()
    try:
        with failures(), distributed.launched(asked) as place:
            yield place
    except Interrupted as interruption:
        if distributed.first_process():
            again = [argument for argument in sys.argv[1:] if argument != "--resume"]
            command = shlex.join(["gross", *again, "--resume"])
            typer.echo(f"{interruption}\n{command}", err=True)
        raise typer.Exit(130) from interruption


def _recipe(name: str, overrides: list[str] | None, precision: str | None, compile: bool) -> Recipe:
    try:
        values: dict[str, Any] = dict(map(parse, overrides or ()))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--set") from error
    if precision is not None:
        values["precision"] = precision
    if compile:
        values["compile"] = True
    return Recipe.load(name).override(values)


def _teacher(supernet: Path, weights: Path, network: str | None) -> nn.Module:
    """The network that was decomposed, with trained weights."""
    if network is not None:
        return build(network, None, weights)
    known = storage.describe(supernet).network
    if known is None:
        raise typer.BadParameter("needed with --teacher for this supernet", param_hint="--network")
    return networks.build(known[0], num_classes=known[1], weights=weights)


def _show(as_json: bool, saved: Path, history: History) -> None:
    show(as_json, {"output": str(saved), "epochs": list(history.epochs)}, f"saved {saved}")
