"""Which parameters train, and what keeps still meanwhile."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gross_kernels import GroSSConv2d

from ..supernet import decomposed_layers
from .recipes import Recipe


@contextmanager
def selected(
    model: nn.Module, recipe: Recipe, configuration: Sequence[int] | None
) -> Iterator[dict[str, nn.Parameter]]:
    """Within, ``model`` trains what the recipe says: the parameters, by name.

    What the caller has frozen stays so. In a fixed ``configuration`` only the last active term of
    each series trains: the smaller ones are constants, so that the sums move as the weights of a
    plain bottleneck would (with every active term training, n times as far). Afterwards modes and
    ``requires_grad`` are as before.

    Raises:
        ValueError: if nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    layers = decomposed_layers(model).values()
    terms = {id(term) for layer in layers for _, term in _numbered(layer)}
    active = terms
    if configuration is not None:
        active = {
            id(term)
            for layer, size in zip(layers, configuration, strict=True)
            for number, term in _numbered(layer)
            if number == layer.group_sizes.index(size)
        }
    trained = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.requires_grad
        and (id(parameter) in active if id(parameter) in terms else recipe.trains == "all")
    }
    if not trained:
        raise ValueError(
            f"trains: got {recipe.trains!r}, which leaves {type(model).__name__} nothing to train"
        )
    before = {parameter: parameter.requires_grad for parameter in parameters.values()}
    modes = {module: module.training for module in model.modules()}
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trained)
        training_mode(model, recipe)
        yield trained
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
        for module, mode in modes.items():
            module.training = mode


def _numbered(layer: GroSSConv2d) -> Iterator[tuple[int, nn.Parameter]]:
    """The terms of a layer's three series, each with its place in the series."""
    for series in layer._series():
        for name, parameter in series.named_parameters():
            # "3"; "3_orig" where it is pruned, "parametrizations.3.original" if parametrised.
            number = re.search(r"\d+", name)
            assert number is not None
            yield int(number[0]), parameter


def training_mode(model: nn.Module, recipe: Recipe) -> None:
    """Training mode, with batch norms in evaluation mode where their statistics are frozen."""
    model.train()
    if recipe.batch_norm == "frozen":
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, ``model`` is in evaluation mode and records no gradients; afterwards every module is
    as before."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
