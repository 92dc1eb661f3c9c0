"""Supernets on disk: a safetensors file whose header carries a JSON description.

One file, so that weights and description cannot part and both are replaced at once. The description
has the architecture where it is one of the paper's networks, the geometry, group sizes and width of
each decomposed layer, the active configuration, and where the supernet is from. Nothing is pickled.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from gross_kernels import GroSSConv2d

from . import networks, weights
from .decomposition.convert import DecomposedLayer, Decomposition, decompose
from .supernet import Configuration, configuration, decomposed_layers, set_configuration

#: The description's key in the header of the file.
KEY = "gross"
#: Raised when files can no longer be read as they were.
FORMAT = 1


@dataclass(frozen=True)
class Description:
    """What a saved supernet says about itself.

    Attributes:
        network: name and number of classes of one of the paper's networks before its decomposition;
            None for any other model.
        layers: geometry, width and group sizes of each decomposed layer, by qualified name in
            network order.
        configuration: the active group sizes.
        shared: tensors stored under another name, because the model has them under several.
        decomposition: the report of ``gross.decompose``, if the model has one.
        provenance: time, versions, and what the user added.
    """

    network: tuple[str, int] | None
    layers: dict[str, dict[str, Any]]
    configuration: Configuration
    shared: dict[str, str]
    decomposition: Decomposition | None
    provenance: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Description:
        """The description back from JSON. Raises ValueError if the text is not one of this
        format."""
        content = json.loads(text)
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"got format {content['format']!r}, accepted is {FORMAT}")
            network, report = content["network"], content["decomposition"]
            return cls(
                None if network is None else (network[0], network[1]),
                dict(content["layers"]),
                tuple(content["configuration"]),
                dict(content["shared"]),
                None if report is None else _report(report),
                dict(content["provenance"]),
            )
        except (TypeError, KeyError, IndexError) as error:
            raise ValueError(f"incomplete description, {type(error).__name__}: {error}") from error


def save(
    model: nn.Module, path: str | os.PathLike[str], *, provenance: Mapping[str, Any] | None = None
) -> None:
    """Save a supernet as one safetensors file with a JSON description in its header. An existing
    file is replaced at once.

    Args:
        model: a network with decomposed layers. Whether it is one of the paper's networks is found
            out, also when its number of classes or its group sizes are others.
        path: the file to write, by custom ``.safetensors``; its folder must exist.
        provenance: what else the description shall say: anything that JSON can.

    Raises:
        ValueError: if the model has no decomposed layer, or its state is not all tensors with
            values.
        FileNotFoundError: if the folder does not exist.
    """
    layers = decomposed_layers(model)
    if not layers:
        raise ValueError(
            f"model: got {type(model).__name__} without decomposed layers, accepted is what gross.decompose returns"
        )
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.is_meta:
            raise ValueError(
                f"model: got a state {name!r} without values, accepted are tensors on a real device"
            )
    first_names: dict[tuple[Any, ...], str] = {}
    stored = {
        n: first_names.setdefault((v.data_ptr(), v.shape, v.stride(), v.dtype), n)
        for n, v in state.items()
    }
    description = Description(
        _recognise(model),
        {name: _structure(layer) for name, layer in layers.items()},
        configuration(model),
        {name: first for name, first in stored.items() if name != first},
        vars(model).get("decomposition_report"),
        {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "gross-kernels": _version(),
            "torch": str(torch.__version__),
            **(provenance or {}),
        },
    )
    tensors = {name: state[name] for name, first in stored.items() if name == first}
    weights.write_safetensors(path, tensors, {KEY: description.to_json()})


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Load a supernet that :func:`save` wrote. Everything is checked before a tensor is loaded.

    Args:
        path: the file.
        model: needed where the supernet is not of one of the paper's networks: the model before its
            decomposition, or a supernet of the same structure. It is left as it is; the result has
            its device and dtypes.

    Returns:
        A new supernet in the saved configuration; without ``model`` on the CPU, in the saved
        dtypes, in training mode.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, is not a saved supernet, or does not fit the model,
            with what is wrong.
    """
    description = describe(path)
    try:
        if model is not None:
            supernet = _restructure(model, description.layers)
        elif description.network is not None:
            supernet = _restructure(_empty(*description.network), description.layers)
        else:
            raise ValueError(
                "gross.networks.build does not know its network; needed is model, as it was before or after its "
                "decomposition"
            )
        tensors = weights.read_safetensors(path)
        tensors |= {name: tensors[first] for name, first in description.shared.items()}
        weights.load(supernet, tensors, "the file", assign=model is None)
        set_configuration(supernet, description.configuration)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    vars(supernet)["decomposition_report"] = description.decomposition
    return supernet


def describe(path: str | os.PathLike[str]) -> Description:
    """The description of a saved supernet.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated or is not a saved supernet.
    """
    metadata = weights.read_metadata(path)
    if KEY not in metadata:
        raise ValueError(
            f"{path} holds tensors, but no supernet saved by gross.save: its header has no description"
        )
    try:
        return Description.from_json(metadata[KEY])
    except ValueError as error:
        raise ValueError(f"{path} is not a supernet that this version can read: {error}") from error


def _structure(layer: GroSSConv2d) -> dict[str, Any]:
    """What makes a layer, as JSON has it."""
    padding = layer.padding
    return {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel_size": list(layer.kernel_size),
        "stride": list(layer.stride),
        "padding": padding if isinstance(padding, str) else list(padding),
        "dilation": list(layer.dilation),
        "padding_mode": layer.padding_mode,
        "bias": layer.bias is not None,
        "width": list(layer.width),
        "group_sizes": list(layer.group_sizes),
    }


def _restructure(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """A copy of ``model`` with these decomposed layers; those that it has already must have the
    same structure."""
    present = decomposed_layers(model)
    new = {name: layer for name, layer in layers.items() if name not in present}
    if new:
        model = decompose(
            model,
            {name: tuple(layer["group_sizes"]) for name, layer in new.items()},
            width={name: tuple(layer["width"]) for name, layer in new.items()},
            method="random",
            quiet=True,
        )
    else:
        model = copy.deepcopy(model)
    for name, layer in decomposed_layers(model).items():
        if _structure(layer) != layers.get(name):
            raise ValueError(
                f"layer {name!r} is {_structure(layer)}, and {layers.get(name)} in the file"
            )
    return model


def _empty(name: str, num_classes: int) -> nn.Module:
    with torch.device("meta"):
        return networks.build(name, num_classes=num_classes)


def _recognise(model: nn.Module) -> tuple[str, int] | None:
    """Name and number of classes of the network that ``model`` is a decomposition of, if
    :func:`gross.networks.build` makes it.

    The network is built without memory, given the same structure, and compared module by module,
    arguments included."""
    classifiers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    layers = {name: _structure(layer) for name, layer in decomposed_layers(model).items()}
    for name, network in networks.NETWORKS.items():
        if not classifiers or network.dense is not None:
            continue
        num_classes = classifiers[-1].out_features
        try:
            candidate = _restructure(_empty(name, num_classes), layers)
        except ValueError:
            continue
        set_configuration(candidate, configuration(model))
        if _modules(candidate) == _modules(model):
            return name, num_classes
    return None


def _modules(model: nn.Module) -> list[tuple[str, type[nn.Module], str]]:
    """Every module with its arguments. Lists of parameters are left out: they show device and
    dtype."""
    return [
        (name, type(module), module.extra_repr())
        for name, module in model.named_modules()
        if not isinstance(module, nn.ParameterList)
    ]


def _report(content: Mapping[str, Any]) -> Decomposition:
    """The report back from JSON, which has lists for tuples."""
    layers: list[DecomposedLayer] = []
    for layer in content["layers"]:
        values: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in layer.items()
        }
        layers.append(DecomposedLayer(**values))
    return Decomposition(**{**content, "layers": tuple(layers)})


def _version() -> str | None:
    """This package's version, None where it runs from its sources without being installed."""
    try:
        return version("gross-kernels")
    except PackageNotFoundError:
        return None
